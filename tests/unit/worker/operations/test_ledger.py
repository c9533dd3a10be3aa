"""The ledger's rules, one by one, on each kind of database. What happens all at once is in test_ledger_races.py."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import func, select, update

from models import Database, Incarnation, Job, utc_now
from tests.unit.worker.operations.ledgers import (
    DROP,
    RUN,
    again,
    fail,
    ids,
    ledger_of,
    locks,
    receipt,
    row,
    succeed,
    wait,
)
from worker.operations.ledger import LAST_MOMENTS, UNHEARD_MAX
from worker.operations.receipts import Decision, Receipt, Verdict, is_job_id

ERROR = {"code": "NOT_RUNNING", "message": "web1 is not running", "details": {"retryable": False}}
LONG_AGO = timedelta(hours=1)


def jobs(database: Database) -> int:
    with database.reading() as session:
        return session.scalars(select(func.count()).select_from(Job)).one()


def age(database: Database, job_id: str, by: timedelta) -> None:
    with database.transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(updated_at=utc_now() - by))


def test_a_new_job_is_run_and_is_in_the_ledger_as_claimed(database: Database) -> None:
    ledger = ledger_of(database)
    before = utc_now()
    assert ledger.receive(receipt("j1", timeout_s=1.5)) == RUN
    job = row(database, "j1")
    assert (job.node, job.task, job.state, job.attempts) == ("n1", "instance.pause", "STARTED", 1)
    assert (job.instance_name, job.arguments) == ("web1", {"name": "web1", "timeout_s": 1.5})
    assert (job.phase, job.percent, job.phases, job.waiting_for) == ("received", 0, [], [])
    assert (job.result, job.error, job.finished_at) == (None, None, None)
    assert job.started_at and before <= job.received_at <= job.started_at <= utc_now()
    assert job.claimed_by
    assert locks(database) == {"web1": "j1"}


def test_a_job_of_a_busy_instance_is_parked_and_says_what_it_waits_for(database: Database) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("j1"))
    assert ledger.receive(receipt("j2")) == wait("j1")
    job = row(database, "j2")
    assert (job.state, job.waiting_for) == ("WAITING", ["j1"])
    assert job.message.endswith(" j1")
    assert (job.claimed_by, job.attempts, job.started_at) == (None, 0, None)


def test_a_parked_job_names_every_job_ahead_of_it_in_the_order_they_will_run(database: Database) -> None:
    ledger = ledger_of(database)
    for job_id in ("first", "second", "third"):
        ledger.receive(receipt(job_id))
    assert ledger.receive(receipt("a-fourth")) == wait("first", "second", "third")


def test_jobs_of_other_instances_and_of_none_do_not_wait(database: Database) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("j1"))
    assert ledger.receive(receipt("j2", "web2")) == RUN
    assert ledger.receive(receipt("j3", None)) == RUN
    assert locks(database) == {"web1": "j1", "web2": "j2"}


def test_names_that_differ_in_case_only_are_two_instances_and_two_jobs(database: Database) -> None:
    ledger = ledger_of(database)
    assert ledger.receive(receipt("j1", "web1")) == RUN
    assert ledger.receive(receipt("J1", "WEB1")) == RUN
    assert locks(database) == {"web1": "j1", "WEB1": "J1"}


def test_the_longest_id_and_name_and_any_text_are_kept_whole(database: Database) -> None:
    ledger = ledger_of(database)
    job_id, name = "j" * 255, "n" * 255
    text = "snow ❄, rocket 🚀, quote ' \" \\ %s :x\n" * 4000
    assert ledger.receive(receipt(job_id, name, text=text)) == RUN
    ledger.advance(job_id, "spawn", 10, text)
    fail(ledger, job_id, ERROR | {"message": text})
    job = row(database, job_id)
    assert job.instance_name == name
    assert (job.arguments["text"], job.message, job.phases[0]["message"]) == (text, text, text)
    assert job.error and job.error["message"] == text


@pytest.mark.parametrize(
    ("job_id", "valid"),
    [
        ("6b1f8c9e-7a3b-4a52-8a13-1f0f7a2d4c11", True),
        ("my-own.id:7/(x)", True),
        ("j" * 255, True),
        ("", False),
        ("j" * 256, False),
        ("two words", False),
        ("tab\tin it", False),
        ("line\n", False),
        ("nul\0", False),
        ("grün", False),
    ],
)
def test_a_job_id_is_1_to_255_visible_ascii_characters(job_id: str, valid: bool) -> None:
    assert is_job_id(job_id) is valid


def test_the_ledger_knows_every_job_it_was_given_on_whichever_node(database: Database) -> None:
    n1, n2 = ledger_of(database, "n1"), ledger_of(database, "n2")
    n1.receive(receipt("j1"))
    assert n1.knows("j1")
    assert n2.knows("j1")
    assert not n1.knows("J1")


def test_a_second_delivery_of_a_running_job_is_dropped_and_changes_nothing(database: Database) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("j1"))
    ledger.advance("j1", "pause", 50, "stopping the guest's processors")
    assert ledger.receive(receipt("j1")) == DROP
    job = row(database, "j1")
    assert (job.state, job.phase, job.attempts) == ("PROGRESS", "pause", 1)
    assert jobs(database) == 1


@pytest.mark.parametrize("state", ["SUCCESS", "FAILURE"])
def test_a_second_delivery_of_a_finished_job_is_dropped_and_its_end_stays(database: Database, state: str) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("j1"))
    succeed(ledger, "j1", {"name": "web1"}) if state == "SUCCESS" else fail(ledger, "j1", ERROR)
    finished_at = row(database, "j1").finished_at
    assert ledger.receive(receipt("j1", other="arguments")) == DROP
    job = row(database, "j1")
    assert (job.state, job.finished_at, job.arguments) == (state, finished_at, {"name": "web1"})
    assert locks(database) == {}


def test_a_second_delivery_of_a_parked_job_leaves_it_where_it_stands(database: Database) -> None:
    ledger = ledger_of(database)
    for job_id in ("j1", "j2", "j3"):
        ledger.receive(receipt(job_id))
    assert ledger.receive(receipt("j2")) == wait("j1")
    assert row(database, "j3").waiting_for == ["j1", "j2"]
    handed_on = succeed(ledger, "j1")
    assert handed_on and handed_on.job_id == "j2"


def test_a_job_whose_turn_it_is_runs_once_whichever_of_its_messages_comes_first(database: Database) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("j1"))
    ledger.receive(receipt("j2"))
    handed_on = succeed(ledger, "j1")
    assert handed_on
    assert ledger.receive(receipt("j2")) == RUN
    assert ledger.receive(again(handed_on)) == DROP


def test_an_id_that_another_node_has_already_is_dropped(database: Database) -> None:
    n1, n2 = ledger_of(database, "n1"), ledger_of(database, "n2")
    n1.receive(receipt("j1"))
    assert n2.receive(receipt("j1")) == DROP
    assert n2.receive(receipt("j1", "web2")) == DROP
    assert row(database, "j1").node == "n1"
    assert locks(database) == {"web1": "j1"}


def test_jobs_of_one_instance_run_in_the_order_they_came_and_the_last_gives_the_lock_up(database: Database) -> None:
    ledger = ledger_of(database)
    sent = ["e", "d", "c", "b", "a"]
    for job_id in sent:
        ledger.receive(receipt(job_id))
    ran = ["e"]
    while wakeup := succeed(ledger, ran[-1]) if len(ran) % 2 else fail(ledger, ran[-1], ERROR):
        assert (row(database, wakeup.job_id).state, row(database, wakeup.job_id).waiting_for) == ("PENDING", [])
        assert locks(database) == {"web1": wakeup.job_id}
        assert ledger.receive(again(wakeup)) == RUN
        ran.append(wakeup.job_id)
    assert ran == sent
    assert locks(database) == {}


def test_a_newcomer_does_not_overtake_a_job_that_was_handed_the_instance_and_not_woken_yet(database: Database) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("j1"))
    ledger.receive(receipt("j2"))
    succeed(ledger, "j1")
    assert ledger.receive(receipt("j3")) == wait("j2")


def test_the_lock_is_handed_to_the_next_job_even_when_that_is_another_nodes(database: Database) -> None:
    n1, n2 = ledger_of(database, "n1"), ledger_of(database, "n2")
    n1.receive(receipt("j1"))
    assert n2.receive(receipt("j2", mode="live")) == wait("j1")
    wakeup = succeed(n1, "j1")
    assert wakeup and (wakeup.job_id, wakeup.node) == ("j2", "n2")
    assert wakeup.arguments == {"name": "web1", "mode": "live"}
    assert n1.receive(again(wakeup)) == DROP
    assert n2.receive(again(wakeup)) == RUN
    assert succeed(n2, "j2") is None


def test_the_end_of_a_job_without_an_instance_wakes_nobody(database: Database) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("j1"))
    ledger.receive(receipt("j2"))
    ledger.receive(receipt("list", None))
    assert succeed(ledger, "list", []) is None
    assert row(database, "j2").state == "WAITING"


def test_a_phase_is_recorded_with_its_time_and_all_phases_are_kept(database: Database) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("j1"))
    for phase, percent in (("validate", 5), ("claim", 15), ("spawn", 45)):
        assert ledger.advance("j1", phase, percent, f"now: {phase}") == percent
    job = row(database, "j1")
    assert (job.state, job.phase, job.percent, job.message) == ("PROGRESS", "spawn", 45, "now: spawn")
    assert [entry["phase"] for entry in job.phases] == ["validate", "claim", "spawn"]
    assert [entry["message"] for entry in job.phases] == ["now: validate", "now: claim", "now: spawn"]
    times = [entry["at"] for entry in job.phases]
    assert times == sorted(times)
    assert all(at.endswith("+00:00") for at in times)
    assert ledger.last_phase_of("j1") == ("spawn", datetime.fromisoformat(times[-1]))


def test_what_was_decided_about_a_job_is_in_its_history_and_is_no_phase(database: Database) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("j1"))
    ledger.advance("j1", "spawn", 45, "starting QEMU")
    ledger.note("j1", "begun anew")
    job = row(database, "j1")
    assert (job.state, job.phase, job.percent, job.message) == ("PROGRESS", "spawn", 45, "begun anew")
    assert [entry["phase"] for entry in job.phases] == ["spawn", "recover"]
    assert ledger.last_phase_of("j1")[0] == "spawn"


def test_the_percentage_never_falls(database: Database) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("j1"))
    assert [ledger.advance("j1", "x", percent, "") for percent in (20, 60, 5, 60, 61)] == [20, 60, 60, 60, 61]
    fail(ledger, "j1", ERROR)
    assert row(database, "j1").percent == 61


@pytest.mark.parametrize("result", [None, [], {"name": "web1", "pid": 7, "nics": [{"ip": ""}]}, "text", 0, False])
def test_success_is_recorded_with_its_result_at_100_percent(database: Database, result: Any) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("j1"))
    succeed(ledger, "j1", result)
    job = row(database, "j1")
    assert (job.state, job.percent, job.error) == ("SUCCESS", 100, None)
    assert job.result == result
    assert job.finished_at


def test_failure_is_recorded_with_its_error(database: Database) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("j1"))
    ledger.advance("j1", "pause", 50, "stopping")
    fail(ledger, "j1", ERROR)
    job = row(database, "j1")
    assert (job.state, job.phase, job.percent, job.error, job.result) == ("FAILURE", "pause", 50, ERROR, None)
    assert job.finished_at


def test_a_job_that_is_not_in_the_ledger_cannot_advance_or_end(database: Database) -> None:
    ledger = ledger_of(database)
    with pytest.raises(LookupError, match="job j1 is not in the ledger"):
        ledger.advance("j1", "pause", 50, "")
    with pytest.raises(LookupError, match="job j1 is not in the ledger"):
        succeed(ledger, "j1")
    with pytest.raises(LookupError, match="job j1 is not in the ledger"):
        fail(ledger, "j1", ERROR)
    assert ledger.last_phase_of("j1") == ("received", None)
    assert jobs(database) == 0


def test_the_next_worker_takes_over_what_its_predecessor_held_with_phases_and_lock(database: Database) -> None:
    dead = ledger_of(database)
    for job_id, instance in (("j1", "web1"), ("parked", "web1"), ("j2", "web2"), ("done", "web3"), ("list", None)):
        dead.receive(receipt(job_id, instance))
    dead.advance("j1", "spawn", 45, "starting QEMU")
    succeed(dead, "done", {"name": "web3"})
    heir = ledger_of(database)
    taken = heir.take_over()
    assert ids(taken) == ["j1", "j2", "list"]
    assert {wakeup.node for wakeup in taken} == {"n1"}
    assert locks(database) == {"web1": "j1", "web2": "j2"}
    assert heir.receive(receipt("newcomer")) == wait("j1", "parked")
    assert heir.receive(again(taken[0])) == Decision(Verdict.RUN, attempt=2)
    assert heir.last_phase_of("j1")[0] == "spawn"
    job = row(database, "j1")
    assert (job.state, job.attempts, job.percent) == ("STARTED", 2, 45)
    handed_on = succeed(heir, "j1")
    assert handed_on and handed_on.job_id == "parked"
    assert row(database, "done").state == "SUCCESS"


def test_taking_over_twice_names_the_same_jobs_and_counts_no_attempt(database: Database) -> None:
    dead = ledger_of(database)
    dead.receive(receipt("j1"))
    assert ids(ledger_of(database).take_over()) == ["j1"]
    heir = ledger_of(database)
    assert ids(heir.take_over()) == ["j1"]
    assert row(database, "j1").attempts == 1


def test_a_job_that_was_handed_the_instance_and_never_woken_is_taken_over_too(database: Database) -> None:
    dead = ledger_of(database)
    dead.receive(receipt("j1"))
    dead.receive(receipt("j2"))
    succeed(dead, "j1")
    heir = ledger_of(database)
    assert ids(heir.take_over()) == ["j2"]
    assert heir.receive(receipt("j2")) == RUN


def test_the_next_worker_is_named_all_that_ended_in_the_last_moments_of_the_one_before(database: Database) -> None:
    """Also what was revoked before it began, which names no worker: on whichever node, as a child of what failed."""
    n1, n2 = ledger_of(database), ledger_of(database, "n2")
    for job_id in ("done", "waiting", "running"):
        n1.receive(receipt(job_id))
    n2.receive(Receipt("child", "instance.list", {}, None, after=("waiting",)))
    n2.receive(receipt("of-n2", "web2"))
    assert n1.cancel("waiting", "not needed")[1].revoked == ["child"]
    n1.cancel("not-received", "not needed")
    succeed(n1, "done")
    succeed(n2, "of-n2")
    assert sorted(ledger_of(database).unpublished()) == ["child", "done", "not-received", "waiting"]


def test_what_ended_long_before_the_death_of_a_worker_or_after_it_is_not_named(database: Database) -> None:
    ledger = ledger_of(database)
    for job_id in ("done", "waiting"):
        ledger.receive(receipt(job_id))
    ledger.cancel("waiting", "not needed")
    succeed(ledger, "done")
    for died_at, named in ((utc_now() + 2 * LAST_MOMENTS, []), (utc_now() - 2 * UNHEARD_MAX, ["done"])):
        with database.transaction() as session:
            session.execute(update(Incarnation).values(heartbeat_at=died_at))
        assert ledger_of(database).unpublished() == named


def test_a_worker_takes_over_nothing_of_another_node(database: Database) -> None:
    n1, n2 = ledger_of(database, "n1"), ledger_of(database, "n2")
    n1.receive(receipt("j1"))
    assert n2.take_over() == []
    job = row(database, "j1")
    assert job.state == "STARTED"
    assert job.claimed_by


def test_a_message_that_does_not_come_is_asked_for_after_a_while_by_its_own_node_only(database: Database) -> None:
    n1, n2 = ledger_of(database, "n1"), ledger_of(database, "n2")
    n1.receive(receipt("j1"))
    n2.receive(receipt("j2"))
    n2.receive(receipt("j3"))
    succeed(n1, "j1")  # j2 has the instance now; its message is lost
    assert n2.forgotten(timedelta(seconds=30)) == []
    for job_id in ("j1", "j2", "j3"):
        age(database, job_id, LONG_AGO)
    assert n1.forgotten(timedelta(seconds=30)) == []
    assert ids(n2.forgotten(timedelta(seconds=30))) == ["j2"]


def test_what_runs_waits_or_is_done_is_never_called_forgotten(database: Database) -> None:
    ledger = ledger_of(database)
    for job_id, instance in (("runs", "web1"), ("waits", "web1"), ("works", "web2"), ("done", "web3")):
        ledger.receive(receipt(job_id, instance))
    ledger.advance("works", "pause", 50, "")
    succeed(ledger, "done")
    for job_id in ("runs", "waits", "works", "done"):
        age(database, job_id, LONG_AGO)
    assert ledger.forgotten(timedelta(seconds=30)) == []
