"""What a job waits for besides its instance: its parents, on whichever node, and a place in its class."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import update

from models import Database, Job, Node, utc_now
from tests.unit.worker.operations.ledgers import DROP, RUN, ids, ledger_of, locks, receipt, row, wait
from worker.operations.ledger import Ledger
from worker.operations.receipts import CancelOutcome, Ended, Receipt, Verdict

ERROR = {"code": "NOT_RUNNING", "message": "web1 is not running", "details": {"retryable": False}}
RACES = 25
DEADLINE_S = 30.0


def child(job_id: str, *after: str, instance: str | None = None, after_failure: str = "cancel") -> Receipt:
    """A job that comes after others; of an instance of its own where none is given."""
    name = instance or f"of-{job_id}"
    return Receipt(job_id, "instance.pause", {"name": name}, name, after=after, after_failure=after_failure)


def start(job_id: str, priority: int = 0, instance: str | None = None) -> Receipt:
    """A job of the class ``start``; of an instance of its own where none is given."""
    name = instance or f"of-{job_id}"
    return Receipt(job_id, "instance.start", {"instance": {"name": name}}, name, slot="start", priority=priority)


def with_limit(database: Database, places: int, node: str = "n1") -> Ledger:
    """The ledger of a new worker that may have so many starts under way."""
    return Ledger(database, node, ledger_of(database, node)._incarnation, {"start": places})


def end_without_waking(database: Database, job_id: str, state: str = "SUCCESS") -> None:
    """What a worker leaves that is killed between the end of a job and the waking of those that wait for it."""
    with database.transaction() as session:
        gone = {"state": state, "finished_at": utc_now(), "slot_taken": False}
        session.execute(update(Job).where(Job.id == job_id).values(gone))


# Parents


def test_a_job_waits_for_all_its_parents_and_the_last_one_wakes_it(database: Database) -> None:
    ledger, last = ledger_of(database), child("last", "p1", "p2")
    ledger.receive(receipt("p1", "web1"))
    ledger.receive(receipt("p2", "web2"))
    assert ledger.receive(last) == wait("p1", "p2")
    assert (row(database, "last").waits_on, row(database, "last").message) == (
        "parents",
        "comes after job p1 and 1 more",
    )
    assert ledger.succeed("p1", None) == Ended()
    assert (row(database, "last").state, row(database, "last").waiting_for) == ("WAITING", ["p2"])
    assert ledger.receive(last) == wait("p2")
    ended = ledger.succeed("p2", None)
    assert (ids(ended.wakeups), ended.revoked) == (["last"], [])
    assert (row(database, "last").state, row(database, "last").waits_on) == ("PENDING", None)
    assert [ledger.receive(last), ledger.receive(last)] == [RUN, DROP]


def test_a_job_whose_parents_have_ended_well_runs_at_once(database: Database) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("p1"))
    ledger.succeed("p1", None)
    assert ledger.receive(child("c1", "p1", "p1", instance="web1")) == RUN


def test_a_job_that_waits_for_parents_does_not_hold_its_instance_up(database: Database) -> None:
    ledger, late = ledger_of(database), child("late", "p1", instance="web2")
    ledger.receive(receipt("p1", "web1"))
    ledger.receive(late)
    assert ledger.receive(receipt("j2", "web2")) == RUN
    assert ids(ledger.succeed("p1", None).wakeups) == ["late"]
    assert ledger.receive(late) == wait("j2")
    assert row(database, "late").waits_on == "instance"
    assert ids(ledger.succeed("j2", None).wakeups) == ["late"]
    assert ledger.receive(late) == RUN


def test_a_parent_that_fails_cancels_its_children_and_theirs_but_those_that_run_regardless(database: Database) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("p1"))
    ledger.receive(child("c1", "p1"))
    ledger.receive(child("c2", "p1", after_failure="run"))
    ledger.receive(child("grandchild", "c1"))
    ledger.receive(child("mourner", "grandchild", after_failure="run"))
    ended = ledger.fail("p1", ERROR)
    assert sorted(ended.revoked) == ["c1", "grandchild"]
    assert sorted(ids(ended.wakeups)) == ["c2", "mourner"]
    revoked = row(database, "grandchild")
    assert (revoked.state, revoked.waits_on, revoked.waiting_for) == ("REVOKED", None, [])
    assert revoked.error and revoked.error["code"] == "CANCELLED"
    assert revoked.error["message"] == "job c1, which it comes after, failed"
    assert revoked.finished_at
    assert ledger.receive(child("grandchild", "c1")) == DROP
    assert locks(database) == {}


def test_a_child_does_not_wait_for_its_other_parents_once_one_has_failed(database: Database) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("p1", "web1"))
    ledger.receive(receipt("p2", "web2"))
    ledger.receive(child("c1", "p1", "p2"))
    assert ledger.fail("p1", ERROR).revoked == ["c1"]
    assert ledger.succeed("p2", None) == Ended()


@pytest.mark.parametrize(("after_failure", "verdict"), [("cancel", Verdict.REVOKED), ("run", Verdict.RUN)])
def test_a_job_that_comes_when_its_parent_has_failed_already(
    database: Database, after_failure: str, verdict: Verdict
) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("p1"))
    ledger.fail("p1", ERROR)
    assert ledger.receive(child("c1", "p1", after_failure=after_failure)).verdict is verdict
    assert ledger.receive(child("c1", "p1", after_failure=after_failure)) == DROP
    assert locks(database) == ({"of-c1": "c1"} if verdict is Verdict.RUN else {})


def test_a_parent_that_nobody_has_received_yet_is_waited_for(database: Database) -> None:
    ledger = ledger_of(database)
    assert ledger.receive(child("c1", "later")) == wait("later")
    assert ledger.overdue() == Ended()
    assert ledger.receive(receipt("later")) == RUN
    assert ledger.overdue() == Ended()
    assert ids(ledger.succeed("later", None).wakeups) == ["c1"]


def test_a_parent_on_another_node_wakes_its_child_on_the_childs_own(database: Database) -> None:
    n1, n2 = ledger_of(database, "n1"), ledger_of(database, "n2")
    n2.receive(receipt("p1"))
    assert n1.receive(child("c1", "p1")) == wait("p1")
    (wakeup,) = n2.succeed("p1", None).wakeups
    assert (wakeup.job_id, wakeup.node) == ("c1", "n1")
    assert n2.receive(child("c1", "p1")) == DROP
    assert n1.receive(child("c1", "p1")) == RUN


def test_children_whose_waker_died_are_found_by_their_own_node(database: Database) -> None:
    n1, n2 = ledger_of(database, "n1"), ledger_of(database, "n2")
    for parent in ("good", "bad"):
        n2.receive(receipt(parent, parent))
        n1.receive(child(f"after-{parent}", parent))
    n1.receive(child("grandchild", "after-bad"))
    end_without_waking(database, "good")
    end_without_waking(database, "bad", "FAILURE")
    assert n2.overdue() == Ended()
    ended = n1.overdue()
    assert (ids(ended.wakeups), ended.revoked) == (["after-good"], ["after-bad", "grandchild"])
    assert n1.overdue() == Ended()
    assert n1.receive(child("after-good", "good")) == RUN


# Places in a class


def test_a_full_class_makes_its_jobs_wait_and_nobody_else(database: Database) -> None:
    ledger = with_limit(database, 2)
    assert [ledger.receive(start("s1")), ledger.receive(start("s2"))] == [RUN, RUN]
    assert ledger.receive(start("s3")) == wait("s1", "s2")
    parked = row(database, "s3")
    assert (parked.state, parked.waits_on, parked.slot_taken) == ("WAITING", "limit", False)
    assert parked.message == "waiting for a free place, held by job s1 and 1 more"
    assert ledger.receive(receipt("j1")) == RUN
    assert with_limit(database, 2, "n2").receive(start("elsewhere")) == RUN
    assert ids(ledger.succeed("s2", None).wakeups) == ["s3"]
    assert ledger.receive(start("s4")) == wait("s1", "s3")  # the place is kept for the one that was woken
    assert ledger.receive(start("s3")) == RUN


def test_places_go_to_the_more_urgent_first_and_else_in_order(database: Database) -> None:
    ledger = with_limit(database, 1)
    sent = {
        job.job_id: job for job in (start("s1"), start("b"), start("c", 5), start("d", 5), start("e"), start("f", 9))
    }
    for job in sent.values():
        ledger.receive(job)
    order, running = [], "s1"
    while wakeups := ledger.succeed(running, None).wakeups:
        (running,) = ids(wakeups)
        order.append(running)
        assert wakeups[0].priority == sent[running].priority
        assert ledger.receive(sent[running]) == RUN
    assert order == ["f", "c", "d", "b", "e"]


def test_a_hold_that_ended_unseen_keeps_no_job(database: Database) -> None:
    """Its worker died between the end of the hold and the jobs that waited, or a job looked in that very moment."""
    ledger = with_limit(database, 1)
    with database.transaction() as session:
        session.get_one(Node, "n1").held_at = utc_now()
    assert [ledger.receive(start(name)).verdict for name in ("s1", "s2")] == [Verdict.WAIT] * 2
    assert ledger.overdue().wakeups == []
    with database.transaction() as session:
        session.get_one(Node, "n1").held_at = None
    assert ids(ledger.overdue().wakeups) == ["s1", "s2"]
    assert ledger.receive(start("s1")) == RUN
    assert ledger.receive(start("s2")) == wait("s1")


def test_the_limit_of_a_class_holds_also_for_jobs_that_were_held_back(database: Database) -> None:
    ledger = with_limit(database, 1)
    assert ledger.receive(start("s1")) == RUN
    assert [ledger.receive(start(name)) for name in ("s2", "s3")] == [wait("s1")] * 2
    with database.transaction() as session:
        session.get_one(Node, "n1").held_at = utc_now()
    assert ledger.succeed("s1", None).wakeups == []
    assert ledger.overdue().wakeups == []
    assert {row(database, name).waits_on for name in ("s2", "s3")} == {"limit"}
    assert ledger.receive(start("s4")).message.startswith("node n1 holds its jobs back since")
    with database.transaction() as session:
        session.get_one(Node, "n1").held_at = None
    assert ids(ledger.let_go()) == ["s4"]
    assert ids(ledger.overdue().wakeups) == ["s2"]
    assert ledger.receive(start("s2")) == RUN
    assert ledger.receive(start("s4")) == wait("s2")
    assert not row(database, "s4").slot_taken


def _succeed(ledger: Ledger, job_id: str) -> Ended:
    return ledger.succeed(job_id, None)


def _fail(ledger: Ledger, job_id: str) -> Ended:
    return ledger.fail(job_id, ERROR)


def _give_up(ledger: Ledger, job_id: str) -> Ended:
    return ledger.revoke(job_id, "cancelled")


def _postpone(ledger: Ledger, job_id: str) -> Ended:
    put_off = ledger.postpone(job_id, ERROR)
    assert put_off
    return put_off[1]


ENDS = [_succeed, _fail, _give_up, _postpone]


@pytest.mark.parametrize("end", ENDS)
def test_every_kind_of_end_gives_the_place_to_the_next(database: Database, end: Callable[[Ledger, str], Ended]) -> None:
    ledger = with_limit(database, 1)
    ledger.receive(start("s1"))
    ledger.receive(start("s2"))
    assert ids(end(ledger, "s1").wakeups) == ["s2"]
    assert not row(database, "s1").slot_taken
    assert ledger.receive(start("s2")) == RUN
    assert ledger.receive(start("s3")) == wait("s2")


def test_a_woken_job_that_is_cancelled_gives_its_place_to_the_next(database: Database) -> None:
    ledger = with_limit(database, 1)
    for job_id in ("s1", "s2", "s3", "s4"):
        ledger.receive(start(job_id))
    assert ledger.cancel("s3", "enough") == (CancelOutcome.REVOKED, Ended())
    assert ids(ledger.succeed("s1", None).wakeups) == ["s2"]
    outcome, ended = ledger.cancel("s2", "enough")
    assert (outcome, ids(ended.wakeups)) == (CancelOutcome.REVOKED, ["s4"])
    assert [ledger.receive(start("s2")), ledger.receive(start("s4"))] == [DROP, RUN]


def test_a_job_that_waits_for_a_place_keeps_its_turn_with_its_instance(database: Database) -> None:
    ledger = with_limit(database, 1)
    ledger.receive(start("s1"))
    assert ledger.receive(start("s2", instance="web2")) == wait("s1")
    assert ledger.receive(receipt("after-s2", "web2")) == wait("s2")
    assert ids(ledger.succeed("s1", None).wakeups) == ["s2"]
    assert ledger.receive(receipt("after-s2", "web2")) == wait("s2")
    assert ledger.receive(start("s2", instance="web2")) == RUN
    assert ids(ledger.succeed("s2", None).wakeups) == ["after-s2"]


def test_a_worker_that_takes_over_keeps_the_places_taken_and_gives_out_those_that_its_limit_adds(
    database: Database,
) -> None:
    before = with_limit(database, 1)
    for job_id in ("s1", "s2", "s3"):
        before.receive(start(job_id))
    now = with_limit(database, 2)
    assert ids(now.take_over()) == ["s1"]
    assert ids(now.overdue().wakeups) == ["s2"]
    assert now.overdue() == Ended()
    assert now.receive(start("s1")).verdict is Verdict.RUN
    assert now.receive(start("s2")).verdict is Verdict.RUN
    assert now.receive(start("s3")) == wait("s1", "s2")


def test_a_place_whose_giver_died_is_given_out_later(database: Database) -> None:
    ledger = with_limit(database, 1)
    ledger.receive(start("s1"))
    ledger.receive(start("s2"))
    end_without_waking(database, "s1")
    assert ids(ledger.overdue().wakeups) == ["s2"]
    assert ledger.receive(start("s2")) == RUN


# All at once


def test_a_child_received_while_its_parent_ends_is_never_forgotten(database: Database) -> None:
    n1, n2 = ledger_of(database, "n1"), ledger_of(database, "n2")
    at_once = threading.Barrier(2)

    def end(number: int) -> Ended:
        at_once.wait(DEADLINE_S)
        return n2.succeed(f"p{number}", None)

    def deliver(number: int) -> Verdict:
        at_once.wait(DEADLINE_S)
        return n1.receive(child(f"c{number}", f"p{number}")).verdict

    with ThreadPoolExecutor(2) as pool:
        for number in range(RACES):
            n2.receive(receipt(f"p{number}", f"web{number}"))
            ending, arriving = pool.submit(end, number), pool.submit(deliver, number)
            verdict, woken = arriving.result(), ids(ending.result().wakeups)
            if verdict is Verdict.WAIT:
                woken += ids(n1.overdue().wakeups)
                assert woken == [f"c{number}"]
                verdict = n1.receive(child(f"c{number}", f"p{number}")).verdict
            assert verdict is Verdict.RUN
            assert row(database, f"c{number}").attempts == 1


def test_a_child_received_while_its_whole_parent_comes_and_goes_is_never_forgotten(database: Database) -> None:
    n1, n2 = ledger_of(database, "n1"), ledger_of(database, "n2")
    at_once = threading.Barrier(2)

    def come_and_go(number: int) -> Ended:
        at_once.wait(DEADLINE_S)
        n2.receive(receipt(f"p{number}", f"web{number}"))
        return n2.fail(f"p{number}", ERROR)

    def deliver(number: int) -> Verdict:
        at_once.wait(DEADLINE_S)
        return n1.receive(child(f"c{number}", f"p{number}")).verdict

    with ThreadPoolExecutor(2) as pool:
        for number in range(RACES):
            parent, arriving = pool.submit(come_and_go, number), pool.submit(deliver, number)
            arriving.result(), parent.result()
            n1.overdue()
            assert row(database, f"c{number}").state == "REVOKED"


def test_eight_threads_never_exceed_a_limit_and_every_job_runs(database: Database) -> None:
    ledger, jobs = with_limit(database, 3), [start(f"s{number:02}") for number in range(40)]
    by_id, most, under_way, lock = {job.job_id: job for job in jobs}, 0, 0, threading.Lock()

    def carry_out(job: Receipt) -> None:
        nonlocal most, under_way
        if ledger.receive(job).verdict is not Verdict.RUN:
            return
        with lock:
            under_way += 1
            most = max(most, under_way)
        ledger.advance(job.job_id, "spawn", 45, "")
        with lock:
            under_way -= 1
        for wakeup in ledger.succeed(job.job_id, None).wakeups:
            carry_out(by_id[wakeup.job_id])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(carry_out, jobs))
    while wakeups := ledger.overdue().wakeups:
        for wakeup in wakeups:
            carry_out(by_id[wakeup.job_id])
    assert {row(database, job.job_id).state for job in jobs} == {"SUCCESS"}
    assert 1 <= most <= 3


def test_jobs_that_come_after_each_other_are_revoked_and_say_why(database: Database) -> None:
    n1, n2 = ledger_of(database, "n1"), ledger_of(database, "n2")
    n1.receive(child("a", "c", instance="web1"))
    n2.receive(child("b", "a", instance="web2"))
    decision = n1.receive(child("c", "b", "x", instance="web3"))
    assert (decision.verdict, decision.message) == (Verdict.REVOKED, "it comes after a job that comes after it")
    assert row(database, "c").state == "REVOKED"
    for _ in range(2):
        n1.overdue()
        n2.overdue()
    assert [row(database, name).state for name in "ab"] == ["REVOKED", "REVOKED"]


def test_a_job_named_before_it_came_is_no_circle(database: Database) -> None:
    ledger = ledger_of(database)
    ledger.receive(child("second", "first", instance="web1"))
    assert ledger.receive(child("first", "zero", instance="web2")).verdict is Verdict.WAIT
    assert ledger.receive(receipt("zero", "web3")).verdict is Verdict.RUN
