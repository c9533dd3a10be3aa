"""What cancelling does to a job in each of its states, and to those that wait for it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from models import Database
from tests.unit.worker.operations.ledgers import DROP, RUN, again, ids, ledger_of, locks, receipt, row, succeed, wait
from worker.operations.ledger import Ledger
from worker.operations.receipts import CancelOutcome, Ended, Receipt, Verdict

REVOKED, REQUESTED, FINISHED = CancelOutcome.REVOKED, CancelOutcome.REQUESTED, CancelOutcome.FINISHED
ERROR = {"code": "QMP_LOST", "message": "QEMU is silent", "details": {"retryable": True}}
RACES = 25
DEADLINE_S = 30.0


def child(job_id: str, parent: str) -> Receipt:
    return Receipt(job_id, "instance.list", {}, None, after=(parent,))


def is_revoked(database: Database, job_id: str, message: str) -> None:
    job = row(database, job_id)
    assert (job.state, job.message, job.waits_on, job.waiting_for) == ("REVOKED", message, None, [])
    assert job.error == {"code": "CANCELLED", "message": message, "details": {"retryable": True}}
    assert job.finished_at
    assert job.claimed_by is None


def test_a_job_that_waits_for_its_instance_is_revoked_at_once_and_never_begins(database: Database) -> None:
    ledger = ledger_of(database)
    for job_id in ("j1", "j2", "j3"):
        ledger.receive(receipt(job_id))
    assert ledger.cancel("j2", "not needed") == (REVOKED, Ended())
    assert ledger.cancel("j2", "twice") == (REVOKED, Ended())
    is_revoked(database, "j2", "not needed")
    assert ledger.receive(receipt("j2")) == DROP
    assert locks(database) == {"web1": "j1"}
    woken = succeed(ledger, "j1")
    assert woken and woken.job_id == "j3"
    assert row(database, "j2").attempts == 0


def test_a_job_that_waits_for_parents_is_revoked_and_its_own_children_with_it(database: Database) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("p1"))
    ledger.receive(child("c1", "p1"))
    ledger.receive(child("grandchild", "c1"))
    outcome, ended = ledger.cancel("c1", "not needed")
    assert (outcome, ended.wakeups, ended.revoked) == (REVOKED, [], ["grandchild"])
    is_revoked(database, "c1", "not needed")
    is_revoked(database, "grandchild", "job c1, which it comes after, failed")
    assert ledger.succeed("p1", None) == Ended()


def test_a_holder_that_has_not_begun_hands_its_instance_on(database: Database) -> None:
    ledger = ledger_of(database)
    for job_id in ("j1", "j2", "j3"):
        ledger.receive(receipt(job_id))
    succeed(ledger, "j1")
    assert locks(database) == {"web1": "j2"}
    outcome, ended = ledger.cancel("j2", "not needed")
    assert (outcome, ids(ended.wakeups), ended.revoked) == (REVOKED, ["j3"], [])
    assert locks(database) == {"web1": "j3"}
    assert [ledger.receive(receipt("j2")), ledger.receive(again(ended.wakeups[0]))] == [DROP, RUN]


def test_a_job_that_was_put_off_is_revoked_and_frees_its_instance(database: Database) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("j1"))
    ledger.postpone("j1", ERROR)
    assert ledger.cancel("j1", "not needed") == (REVOKED, Ended())
    is_revoked(database, "j1", "not needed")
    assert locks(database) == {}
    assert (ledger.due(), ledger.next_retry_at()) == ([], None)


def test_a_running_job_is_only_asked_and_ends_as_revoked_when_it_gives_up(database: Database) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("j1"))
    ledger.receive(receipt("j2"))
    ledger.receive(child("c1", "j1"))
    assert ledger.cancel("j1", "not needed") == (REQUESTED, Ended())
    asked = row(database, "j1")
    assert (asked.state, asked.finished_at, asked.error) == ("STARTED", None, None)
    assert asked.cancel_requested_at
    assert locks(database) == {"web1": "j1"}
    ended = ledger.revoke("j1", "cancelled in phase shutdown")
    assert (ids(ended.wakeups), ended.revoked) == (["j2"], ["c1"])
    gave_up = row(database, "j1")
    assert (gave_up.state, gave_up.result) == ("REVOKED", None)
    assert gave_up.error and gave_up.error["code"] == "CANCELLED"
    assert ledger.receive(receipt("j1")) == DROP


def test_a_running_job_that_was_asked_too_late_succeeds(database: Database) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("j1"))
    ledger.cancel("j1", "not needed")
    ledger.succeed("j1", {"name": "web1"})
    assert (row(database, "j1").state, row(database, "j1").result) == ("SUCCESS", {"name": "web1"})


@pytest.mark.parametrize("state", ["SUCCESS", "FAILURE", "REVOKED"])
def test_a_finished_job_stays_as_it_is(database: Database, state: str) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("j1"))
    if state == "SUCCESS":
        ledger.succeed("j1", [1])
    elif state == "FAILURE":
        ledger.fail("j1", ERROR)
    else:
        ledger.revoke("j1", "once")
    before = row(database, "j1")
    assert ledger.cancel("j1", "twice") == (FINISHED, Ended())
    after = row(database, "j1")
    assert (after.state, after.result, after.error, after.message, after.finished_at, after.cancel_requested_at) == (
        before.state, before.result, before.error, before.message, before.finished_at, None,
    )  # fmt: skip


def test_a_message_that_comes_after_its_cancelling_is_dropped_by_every_worker(database: Database) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("j1", "web2"))
    assert ledger.cancel("not-yet", "not needed") == (REVOKED, Ended())
    is_revoked(database, "not-yet", "not needed")
    assert ledger.cancel("not-yet", "again") == (REVOKED, Ended())
    assert ledger.receive(receipt("not-yet")) == DROP
    assert ledger.receive(child("not-yet", "j1")) == DROP
    following = ledger_of(database)
    assert ids(following.take_over()) == ["j1"]
    assert following.receive(receipt("not-yet")) == DROP
    assert ledger_of(database, "n2").receive(receipt("not-yet")) == DROP
    assert locks(database) == {"web2": "j1"}


def test_what_was_revoked_stays_so_when_the_worker_is_another(database: Database) -> None:
    before = ledger_of(database)
    before.receive(receipt("j1"))
    before.receive(receipt("j2"))
    before.cancel("j2", "not needed")
    now = ledger_of(database)
    assert ids(now.take_over()) == ["j1"]
    assert now.receive(receipt("j2")) == DROP
    assert now.receive(receipt("j1")).verdict is Verdict.RUN
    assert now.receive(receipt("j3")) == wait("j1")
    woken = succeed(now, "j1")
    assert woken and woken.job_id == "j3"
    is_revoked(database, "j2", "not needed")


# All at once


def race(database: Database, job_id: str, claiming: Receipt) -> tuple[Verdict, CancelOutcome, Ended]:
    ledger, canceller = ledger_of(database), ledger_of(database)
    at_once = threading.Barrier(2)

    def claim(own: Ledger) -> Verdict:
        at_once.wait(DEADLINE_S)
        return own.receive(claiming).verdict

    def cancel(own: Ledger) -> tuple[CancelOutcome, Ended]:
        at_once.wait(DEADLINE_S)
        return own.cancel(job_id, "not needed")

    with ThreadPoolExecutor(2) as pool:
        claimed, cancelled = pool.submit(claim, ledger), pool.submit(cancel, canceller)
        return claimed.result(), *cancelled.result()


def test_of_a_claim_and_a_cancelling_exactly_one_wins(database: Database) -> None:
    """Both when the message is the job's first one, and when the job was woken."""
    ledger = ledger_of(database)
    for number in range(RACES):
        job_id, instance = f"j{number}", f"web{number}"
        if number % 2:
            ledger.receive(receipt(f"first{number}", instance))
            ledger.receive(receipt(job_id, instance))
            ledger.receive(receipt(f"last{number}", instance))
            succeed(ledger, f"first{number}")
        verdict, outcome, ended = race(database, job_id, receipt(job_id, instance))
        assert (verdict, outcome) in ((Verdict.RUN, REQUESTED), (Verdict.DROP, REVOKED))
        assert row(database, job_id).state == ("STARTED" if verdict is Verdict.RUN else "REVOKED")
        assert ids(ended.wakeups) == ([f"last{number}"] if number % 2 and outcome is REVOKED else [])
        held = {"STARTED": job_id, "REVOKED": f"last{number}" if number % 2 else None}[row(database, job_id).state]
        assert locks(database).get(instance) == held


def test_cancelling_the_next_one_while_the_holder_ends_loses_nobody(database: Database) -> None:
    ledger, other = ledger_of(database), ledger_of(database)
    at_once = threading.Barrier(2)

    def end(number: int) -> list[str]:
        at_once.wait(DEADLINE_S)
        return ids(ledger.succeed(f"a{number}", None).wakeups)

    def cancel(number: int) -> list[str]:
        at_once.wait(DEADLINE_S)
        outcome, ended = other.cancel(f"b{number}", "not needed")
        assert outcome is REVOKED
        return ids(ended.wakeups)

    with ThreadPoolExecutor(2) as pool:
        for number in range(RACES):
            for job_id in (f"a{number}", f"b{number}", f"c{number}"):
                ledger.receive(receipt(job_id, f"web{number}"))
            ending, cancelling = pool.submit(end, number), pool.submit(cancel, number)
            assert (ending.result() + cancelling.result())[-1] == f"c{number}"
            assert locks(database)[f"web{number}"] == f"c{number}"


def test_two_nodes_that_cancel_an_unknown_job_at_once_agree(database: Database) -> None:
    nodes = [ledger_of(database, node) for node in ("n1", "n2")]
    at_once = threading.Barrier(2)

    def cancel(ledger: Ledger, job_id: str) -> CancelOutcome:
        at_once.wait(DEADLINE_S)
        return ledger.cancel(job_id, "not needed")[0]

    with ThreadPoolExecutor(2) as pool:
        for number in range(RACES):
            assert {*pool.map(cancel, nodes, [f"j{number}"] * 2)} == {REVOKED}
            is_revoked(database, f"j{number}", "not needed")
