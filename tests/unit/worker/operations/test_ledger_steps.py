"""A job that has another node do a part of it: it waits without a worker, and goes on whatever happens meanwhile."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import cast

import pytest
from sqlalchemy import event, update
from sqlalchemy.orm import Session

from hostler.contract import JobState, TaskName
from models import Database, Incarnation, Job, utc_now
from tests.unit.worker.operations.ledgers import DROP, ids, ledger_of, locks, receipt, row
from worker.operations import why
from worker.operations.context import NodeContext
from worker.operations.ledger import Ledger
from worker.operations.receipts import CancelOutcome, Receipt, Verdict
from worker.operations.steps import Step

STEP = Step("j1", "accept", TaskName.MIGRATION_ACCEPT, "n2", {"info": {"migration_id": "j1"}})
STEP_RECEIPT = Receipt("j1.accept", "migration.accept", {"info": {"migration_id": "j1"}}, None)
ERROR = {"code": "QEMU_FAILED", "message": "no", "details": {"retryable": False}}


@pytest.fixture
def waiting(database: Database) -> tuple[Ledger, Ledger]:
    """The ledgers of two nodes; a job of the first has handed a step to the second."""
    first, second = ledger_of(database), ledger_of(database, "n2")
    first.receive(receipt("j1", "web1"))
    assert ids(first.hand_over("j1", [STEP], 60)) == ["j1.accept"]
    return first, second


def test_a_job_waits_for_its_step_in_progress_and_keeps_its_instance(
    database: Database, waiting: tuple[Ledger, Ledger]
) -> None:
    job = row(database, "j1")
    assert (job.state, job.waits_on, job.waiting_for, job.claimed_by) == ("PROGRESS", "steps", ["j1.accept"], None)
    assert locks(database) == {"web1": "j1"}
    assert waiting[0].receive(receipt("j1", "web1")) == DROP
    assert (row(database, "j1.accept").node, row(database, "j1.accept").step_of) == ("n2", "j1")


@pytest.mark.parametrize("ends", ["succeed", "fail"])
def test_the_step_wakes_its_job_however_it_ends_and_that_is_no_death(
    database: Database, waiting: tuple[Ledger, Ledger], ends: str
) -> None:
    first, second = waiting
    assert second.receive(STEP_RECEIPT).verdict is Verdict.RUN
    ended = second.succeed("j1.accept", {"port": 1}) if ends == "succeed" else second.fail("j1.accept", ERROR)
    assert [(each.job_id, each.node) for each in ended.wakeups] == [("j1", "n1")]
    again = first.receive(receipt("j1", "web1"))
    assert (again.verdict, again.attempt, again.deaths) == (Verdict.RUN, 2, 0)
    end = first.step("j1.accept")
    assert end is not None
    assert (end.succeeded, end.result, end.error) == (
        (True, {"port": 1}, None) if ends == "succeed" else (False, None, ERROR)
    )


def test_the_end_of_a_step_and_the_waking_of_its_job_are_one_commit(
    database: Database, waiting: tuple[Ledger, Ledger]
) -> None:
    _, second = waiting
    second.receive(STEP_RECEIPT)
    ended = second._finish("j1.accept", JobState.SUCCESS, also=lambda session: commits_of(session, database))
    assert ids(ended.wakeups) == ["j1"]
    assert (row(database, "j1").state, row(database, "j1").waits_on) == ("PENDING", None)


def commits_of(session: Session, database: Database) -> None:
    """From here on each commit must show both ends, or neither."""

    def both(_session: Session) -> None:
        assert (row(database, "j1.accept").state, row(database, "j1").state) == ("SUCCESS", "PENDING")

    event.listen(session, "after_commit", both, once=True)


def test_an_end_that_is_recorded_again_names_the_job_again_whose_message_may_be_unsent(
    database: Database, waiting: tuple[Ledger, Ledger]
) -> None:
    first, second = waiting
    second.receive(STEP_RECEIPT)
    assert ids(second.succeed("j1.accept", None).wakeups) == ["j1"]
    assert ids(second.succeed("j1.accept", None).wakeups) == ["j1"]
    assert first.receive(receipt("j1", "web1")).verdict is Verdict.RUN
    assert second.succeed("j1.accept", None).wakeups == []


def test_a_hand_over_records_its_phase_and_what_else_is_true_or_nothing(database: Database) -> None:
    ledger = ledger_of(database)
    ledger_of(database, "n2")
    ledger.receive(receipt("j1", "web1"))

    def fails(session: Session) -> None:
        raise RuntimeError("no")

    phase = ("accept", 5, "a QEMU that waits")
    with pytest.raises(RuntimeError):
        ledger.hand_over("j1", [STEP], 60, phase=phase, also=fails)
    assert (row(database, "j1").state, ledger.knows("j1.accept")) == ("STARTED", False)
    ledger.hand_over("j1", [STEP], 60, phase=phase)
    job = row(database, "j1")
    assert (job.phase, job.percent, job.message, job.waits_on) == (*phase, "steps")


def test_what_else_a_job_s_success_makes_true_is_true_with_it(database: Database) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("j1", "web1"))
    ledger.receive(receipt("j2", "web2"))
    change = update(Job).where(Job.id == "j2").values(message="true")
    with pytest.raises(ZeroDivisionError):
        ledger.succeed("j1", None, lambda session: (session.execute(change), 1 / 0))
    assert (row(database, "j1").state, row(database, "j2").message) != ("SUCCESS", "true")
    ledger.succeed("j1", None, lambda session: session.execute(change))
    assert (row(database, "j1").state, row(database, "j2").message) == ("SUCCESS", "true")


def test_a_step_that_is_handed_over_twice_is_done_once(database: Database, waiting: tuple[Ledger, Ledger]) -> None:
    first, second = waiting
    assert ids(first.hand_over("j1", [STEP], 60)) == ["j1.accept"]
    second.receive(STEP_RECEIPT)
    assert second.receive(STEP_RECEIPT) == DROP


def test_a_job_that_hands_over_a_step_which_has_ended_is_woken_at_once(
    database: Database, waiting: tuple[Ledger, Ledger]
) -> None:
    first, second = waiting
    second.receive(STEP_RECEIPT)
    second.succeed("j1.accept", None)
    first.receive(receipt("j1", "web1"))
    assert ids(first.hand_over("j1", [STEP], 60)) == ["j1"]
    assert first.receive(receipt("j1", "web1")).verdict is Verdict.RUN


def test_a_job_is_woken_when_its_step_takes_too_long(database: Database, waiting: tuple[Ledger, Ledger]) -> None:
    first, _ = waiting
    assert first.due() == []
    with database.transaction() as session:
        session.execute(update(Job).where(Job.id == "j1").values(retry_at=utc_now() - timedelta(seconds=1)))
    assert first.next_retry_at() is not None
    assert ids(first.due()) == ["j1"]
    assert first.receive(receipt("j1", "web1")).verdict is Verdict.RUN


def test_a_cancel_wakes_the_job_to_undo_what_it_began(database: Database, waiting: tuple[Ledger, Ledger]) -> None:
    first, _ = waiting
    outcome, ended = first.cancel("j1", "no more")
    assert (outcome, ids(ended.wakeups)) == (CancelOutcome.REQUESTED, ["j1"])
    again = first.receive(receipt("j1", "web1"))
    assert (again.verdict, again.cancelled) == (Verdict.RUN, True)


def test_a_new_worker_lets_a_job_wait_on_for_its_step(database: Database, waiting: tuple[Ledger, Ledger]) -> None:
    assert ids(waiting[0].take_over()) == ["j1.accept"]  # its message may not have been sent
    assert row(database, "j1").waits_on == "steps"


def test_a_job_whose_step_ended_and_whose_waker_died_is_overdue(
    database: Database, waiting: tuple[Ledger, Ledger]
) -> None:
    with database.transaction() as session:
        session.execute(update(Job).where(Job.id == "j1.accept").values(state="SUCCESS", finished_at=utc_now()))
    assert ids(waiting[0].overdue().wakeups) == ["j1"]
    assert waiting[0].overdue().wakeups == []


def test_a_step_shows_in_the_job_it_belongs_to_only_while_that_waits_for_it(
    database: Database, waiting: tuple[Ledger, Ledger]
) -> None:
    first, second = waiting
    second.receive(STEP_RECEIPT)
    stored, whole = second.advance_step("j1.accept", "spawn", 40, "making a QEMU", ("j1", "accept", 7))
    assert (stored, whole and (whole.id, whole.percent)) == (40, ("j1", 7))
    assert (row(database, "j1").phase, row(database, "j1").message) == ("accept", "making a QEMU (n2)")
    assert (row(database, "j1.accept").phase, row(database, "j1.accept").percent) == ("spawn", 40)
    first.cancel("j1", "no more")
    assert second.advance_step("j1.accept", "greeting", 60, "and on", ("j1", "accept", 9)) == (60, None)
    assert row(database, "j1").percent == 7


def test_why_names_the_step_and_the_node_that_has_no_worker_for_it(
    database: Database, waiting: tuple[Ledger, Ledger]
) -> None:
    node = cast(NodeContext, SimpleNamespace(database=database, name="n1"))
    explained = why.explain(node, "j1")
    assert explained["because"][1] == "job j1.accept (migration.accept on n2, PENDING, received, 0 %)"
    assert explained["command"] == "hostler watch j1"
    with database.transaction() as session:
        long_ago = utc_now() - timedelta(minutes=5)
        session.execute(update(Incarnation).where(Incarnation.node == "n2").values(heartbeat_at=long_ago))
    explained = why.explain(node, "j1")
    assert explained["because"][0].startswith("node n2 has no worker")
    assert explained["command"] == "hostler worker --node n2"


MOVES = [
    Step("d1", f"move.{name}", TaskName.INSTANCE_MIGRATE, "n1", {"name": name, "target": "n2"}, name)
    for name in ("web1", "web2")
]


def move(name: str) -> Receipt:
    return Receipt(f"d1.move.{name}", "instance.migrate", {"name": name, "target": "n2"}, name, slot="migration")


def test_a_job_with_several_steps_is_woken_by_each_that_ends(database: Database) -> None:
    ledger = ledger_of(database)
    drain = Receipt("d1", "node.drain", {"auto": True}, None)
    ledger.receive(drain)
    assert ids(ledger.hand_over("d1", MOVES, 60)) == ["d1.move.web1", "d1.move.web2"]
    assert [ledger.receive(move(name)).verdict for name in ("web1", "web2")] == [Verdict.RUN] * 2
    assert locks(database) == {"web1": "d1.move.web1", "web2": "d1.move.web2"}
    assert ids(ledger.succeed("d1.move.web2", None).wakeups) == ["d1"]
    assert ledger.receive(drain).verdict is Verdict.RUN
    assert ledger.hand_over("d1", MOVES[:1], 60) == []  # it is under way: nobody needs its message again
    assert ledger.receive(drain) == DROP
    assert ids(ledger.fail("d1.move.web1", ERROR).wakeups) == ["d1"]


def test_a_step_with_an_instance_waits_behind_the_job_that_holds_it(database: Database) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("j1", "web1"))
    ledger.receive(Receipt("d1", "node.drain", {"auto": True}, None))
    ledger.hand_over("d1", MOVES, 60)
    assert ledger.receive(move("web1")).waiting_for == ("j1",)
    assert ids(ledger.succeed("j1", None).wakeups) == ["d1.move.web1"]
