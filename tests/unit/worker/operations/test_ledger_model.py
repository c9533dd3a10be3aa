"""The ledger does what a simple model of it says, whatever is sent, repeated, lost, cancelled or killed in what order.

One caller at a time here; test_ledger_storm.py has many at once. LEDGER_EXAMPLES=1000 and pytest's --timeout=3000 make
a longer run of it, which also takes the minutes to find the shortest sequence of steps that fails.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import select, update

from hostler.errors import OperationFailed
from models import Database, Job, utc_now
from tests.unit.worker.operations.ledger_model import CLAIMED, FINAL, Ending, LedgerModel
from tests.unit.worker.operations.ledgers import ids, locks
from tests.unit.worker.operations.mortals import Killed, MortalNode, forget_all_jobs, mortal_nodes
from worker.errors import OperationError
from worker.operations.ledger import RETRY_MAX_S, Ledger
from worker.operations.receipts import Decision, Ended, Receipt

EXAMPLES = int(os.environ.get("LEDGER_EXAMPLES", "25"))
SETTINGS = settings(
    max_examples=EXAMPLES,
    stateful_step_count=40,
    deadline=None,
    print_blob=True,
    phases=[phase for phase in Phase if phase is not Phase.shrink or "LEDGER_EXAMPLES" in os.environ],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
ERROR = {"code": "QMP_LOST", "message": "QEMU is silent", "details": {"retryable": True}}
ENDS = {"succeed": ({"name": "web1"}, "SUCCESS"), "fail": (ERROR, "FAILURE"), "revoke": ("gave up", "REVOKED")}
HOUR = timedelta(hours=1)
LATER = timedelta(seconds=RETRY_MAX_S)
"""Longer than a machine lives; what is put off for much longer is due at once, as if the clock had been wrong."""
NODES = st.sampled_from(["n1", "n2"])
RARELY = st.sampled_from([False, False, False, False, True])
T = TypeVar("T")


def message(job_id: str, instance: str | None, slot: str | None, **more: Any) -> Receipt:
    task = "instance.start" if slot else "instance.pause" if instance else "instance.list"
    return Receipt(job_id, task, {"name": instance}, instance, slot, **more)


class LedgerMachine(RuleBasedStateMachine):
    """Two nodes that share a database, and the model of what they have to do."""

    database: ClassVar[Database]
    nodes: ClassVar[dict[str, MortalNode]]
    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        forget_all_jobs(self.database)
        for node in self.nodes.values():
            node.start_worker()
        self.model = LedgerModel({name: node.places for name, node in self.nodes.items()})
        self.sent: dict[str, tuple[Receipt, str]] = {}
        self.owed: list[str] = []
        self.ended: dict[str, tuple[Any, ...]] = {}
        self.succeeded: Counter[str] = Counter()
        self.agrees = True

    # How the machine acts

    def _ask(self, node: str, what: Callable[[Ledger], T], *, killed: bool = False) -> T | None:
        """Have a node's worker do something; None when it was killed right after the first commit of that."""
        self.agrees = False
        self.nodes[node].database.transactions_left = 1 if killed else None
        with suppress(Killed):
            return what(self.nodes[node].ledger)
        return None

    def _woken(self, found: Ended | list[str] | None, expected: tuple[list[str], list[str]]) -> None:
        assert isinstance(found, Ended)
        assert (sorted(ids(found.wakeups)), sorted(found.revoked)) == (sorted(expected[0]), sorted(expected[1]))
        self.owed += expected[0]

    def _ending(self, node: str, found: Ended | None, expected: Any, killed: bool) -> None:
        if killed:
            self._bury(node)
        else:
            self._woken(found, self.model.wake_others(expected, node))

    def _bury(self, node: str) -> None:
        self.nodes[node].start_worker()
        freed = self._ask(node, lambda ledger: ids(ledger.take_over()))
        expected = self.model.take_over(node)
        assert freed == expected
        self.owed += expected

    # What masters and brokers do

    @rule(
        target=jobs,
        node=NODES,
        instance=st.sampled_from(["web1", "web1", "web2", "web3", None]),
        slot=st.sampled_from([None, "start"]),
        priority=st.sampled_from([0, 0, 5]),
        after_failure=st.sampled_from(["cancel", "run"]),
        arrives=st.sampled_from([True, True, True, False]),
        data=st.data(),
    )
    def send(
        self,
        node: str,
        instance: str | None,
        slot: str | None,
        priority: int,
        after_failure: str,
        arrives: bool,
        data: st.DataObject,
    ) -> str:
        job_id = f"j{len(self.sent)}"
        parents = st.lists(st.sampled_from([*self.sent]), min_size=1, max_size=2) if self.sent else st.just([])
        after = tuple(data.draw(parents, "after")) if data.draw(st.booleans(), "has parents") else ()
        receipt = message(job_id, instance, slot, priority=priority, after=after, after_failure=after_failure)
        self.sent[job_id] = receipt, node
        if arrives:
            self._deliver(job_id, node)
        return job_id

    @rule(job=jobs, astray=RARELY, killed=RARELY)
    def deliver(self, job: str, astray: bool, killed: bool) -> None:
        """For the first time or again, whatever has become of the job; perhaps to a node that it was not meant for."""
        node = self.sent[job][1]
        self._deliver(job, {"n1": "n2", "n2": "n1"}[node] if astray else node, killed=killed)

    @precondition(lambda self: self.owed)
    @rule(data=st.data())
    def deliver_a_wakeup(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(self.owed), "wakeup")
        self.owed.remove(job_id)
        self._deliver(job_id, self.model.jobs[job_id].node)

    @precondition(lambda self: self.owed)
    @rule(data=st.data())
    def lose_a_wakeup(self, data: st.DataObject) -> None:
        self.owed.remove(data.draw(st.sampled_from(self.owed), "wakeup"))

    def _deliver(self, job_id: str, node: str, *, killed: bool = False) -> None:
        receipt = self.sent[job_id][0]
        found = self._ask(node, lambda ledger: ledger.receive(receipt), killed=killed)
        if killed:
            if not receipt.after:
                self.model.decide(receipt, node)
            elif job_id in self.model.jobs:
                self.model.meet_parents(receipt)
            else:
                self.model.write_down(receipt, node)
            self._bury(node)
            return
        assert found
        assert _all_of(found) == _all_of(self.model.receive(receipt, node))

    # What workers do

    @precondition(lambda self: self.model.at_work())
    @rule(data=st.data())
    def advance(self, data: st.DataObject) -> None:
        job_id, node = self._draw_worker(data)
        self._ask(node, lambda ledger: ledger.advance(job_id, "spawn", 45, ""))
        self.model.jobs[job_id].become("PROGRESS")

    @precondition(lambda self: self.model.at_work())
    @rule(data=st.data(), killed=RARELY, how=st.sampled_from(["succeed", "succeed", "fail", "revoke"]))
    def end(self, data: st.DataObject, killed: bool, how: str) -> None:
        self._end(*self._draw_worker(data), how, killed=killed)

    def _end(self, job_id: str, node: str, how: str, *, killed: bool = False) -> None:
        self.succeeded[job_id] += how == "succeed"
        found = self._ask(node, lambda ledger: getattr(ledger, how)(job_id, ENDS[how][0]), killed=killed)
        self._ending(node, found, self.model.end(job_id, ENDS[how][1]), killed)

    @rule(job=jobs, how=st.sampled_from([*ENDS]))
    def end_again(self, job: str, how: str) -> None:
        """What a worker does whose database went away when the end was committed: once more, or even otherwise."""
        known = self.model.jobs.get(job)
        if known and known.state in FINAL:
            found = self._ask(known.node, lambda ledger: getattr(ledger, how)(job, ENDS[how][0]))
            ending = Ending([], False, self.model.children(job))
            self._woken(found, self.model.wake_others(ending, known.node))

    @precondition(lambda self: self.model.at_work())
    @rule(data=st.data(), killed=RARELY)
    def postpone(self, data: st.DataObject, killed: bool) -> None:
        job_id, node = self._draw_worker(data)
        put_off = self._ask(node, lambda ledger: ledger.postpone(job_id, ERROR), killed=killed)
        expected = self.model.postpone(job_id)
        assert killed or (put_off is None) == (expected is None)
        if expected:
            self._set_retry_at(job_id, LATER)
            self._ending(node, put_off[1] if put_off else None, expected, killed)
        elif killed:
            self._bury(node)

    def _draw_worker(self, data: st.DataObject) -> tuple[str, str]:
        job_id = data.draw(st.sampled_from(self.model.at_work()), "at work")
        return job_id, self.model.jobs[job_id].node

    def _set_retry_at(self, job_id: str, at: timedelta) -> None:
        with self.database.transaction() as session:
            session.execute(update(Job).where(Job.id == job_id).values(retry_at=utc_now() + at))

    @precondition(lambda self: any(job.state == "RETRY" for job in self.model.jobs.values()))
    @rule(data=st.data())
    def the_time_comes(self, data: st.DataObject) -> None:
        put_off = [job_id for job_id, job in self.model.jobs.items() if job.state == "RETRY"]
        self._the_time_comes(data.draw(st.sampled_from(put_off), "put off"))

    def _the_time_comes(self, job_id: str) -> None:
        self._set_retry_at(job_id, -HOUR)
        self.model.jobs[job_id].due = True

    @rule(node=NODES)
    def wake_due(self, node: str) -> None:
        found = self._ask(node, lambda ledger: Ended(ledger.due()))
        self._woken(found, (self.model.wake_due(node), []))

    @rule(node=NODES)
    def wake_forgotten(self, node: str) -> None:
        found = self._ask(node, lambda ledger: Ended(ledger.forgotten(-HOUR)))
        self._woken(found, (self.model.of(node, "PENDING"), []))

    @rule(node=NODES)
    def wake_overdue(self, node: str) -> None:
        self._woken(self._ask(node, lambda ledger: ledger.overdue()), self.model.overdue(node))

    @rule(node=NODES)
    def kill(self, node: str) -> None:
        self.agrees = False
        self._bury(node)

    # What operators do

    @rule(job=jobs, node=NODES, also_running=st.booleans(), killed=RARELY)
    def cancel(self, job: str, node: str, also_running: bool, killed: bool) -> None:
        """Also before the job's message has arrived, and asked of another node."""
        found = self._ask(node, lambda ledger: ledger.cancel(job, "enough", also_running=also_running), killed=killed)
        outcome, expected = self.model.cancel(self.sent[job][0], node, also_running=also_running)
        assert killed or (found and found[0] is outcome)
        self._ending(node, found[1] if found else None, expected, killed)

    @rule(target=jobs, job=jobs, node=NODES)
    def retry(self, job: str, node: str) -> Any:
        refusal = self.model.refuses_to_retry(job, node)
        try:
            found = self._ask(node, lambda ledger: ledger.retry(job).job_id)
        except (OperationError, OperationFailed) as exc:
            assert type(exc).__name__ == refusal
            return multiple()
        assert found
        assert refusal is None
        self.sent[found] = self.model.retry(job, found), node
        self.owed.append(found)
        return found

    # What has to hold

    @invariant()
    def rows_say_what_the_model_says(self) -> None:
        with self.database.reading() as session:
            rows = session.scalars(select(Job).order_by(Job.sequence)).all()
        assert [_told(job) for job in rows] == [
            (i, job.node, job.state, job.waits_on, job.attempts, job.retries, job.has_place, job.asked_to_give_up,
             job.claimed, job.retry_of)
            for i, job in self.model.jobs.items()
        ]  # fmt: skip
        assert locks(self.database) == self.model.holders
        self._promises_hold(rows)
        self.agrees = True

    def _promises_hold(self, rows: Any) -> None:
        """What the ledger promises, said of the rows alone."""
        held, at_work = locks(self.database), [job for job in rows if job.state in CLAIMED]
        for job in at_work:
            assert job.instance_name is None or held[job.instance_name] == job.id
            assert job.claimed_by == self.nodes[job.node].ledger._incarnation
        for name, node in self.nodes.items():
            assert sum(job.slot == "start" and job.node == name for job in at_work) <= node.places
        for job in rows:
            assert (job.finished_at is not None) == (job.state in FINAL)
            if job.state in FINAL:
                end = (job.state, job.result, job.error, job.finished_at, job.attempts, job.claimed_by)
                assert self.ended.setdefault(job.id, end) == end, "a final job changed"

    def teardown(self) -> None:
        """When all that is outstanding is delivered and all that runs has ended, nothing waits any more."""
        if not self.agrees:  # a step has failed already, and says more than what comes of it
            return
        for _ in range(5 * len(self.sent) + 5):  # a job is woken a few times at most
            if not self._let_everything_happen():
                break
        with self.database.reading() as session:
            rows = session.scalars(select(Job)).all()
        assert {job.id for job in rows} == set(self.sent)
        assert [job.id for job in rows if job.state not in FINAL or job.slot_taken] == []
        assert locks(self.database) == {}
        assert +self.succeeded == Counter(job.id for job in rows if job.state == "SUCCESS")

    def _let_everything_happen(self) -> bool:
        """One round of deliveries, ends and healing; False when there was nothing to do."""
        waiting = [*self.owed, *(i for i in self.sent if i not in self.model.jobs)]
        self.owed.clear()
        for job_id in waiting:
            known = self.model.jobs.get(job_id)
            self._deliver(job_id, known.node if known else self.sent[job_id][1])
        for job_id in self.model.at_work():
            self._end(job_id, self.model.jobs[job_id].node, "succeed")
        for node in self.nodes:
            for job_id in self.model.of(node, "RETRY"):
                self._the_time_comes(job_id)
            for wake in (self.wake_due, self.wake_overdue, self.wake_forgotten):
                wake(node)
        self.rows_say_what_the_model_says()
        return bool(waiting or self.owed)


def _all_of(decision: Decision) -> tuple[Any, ...]:
    return decision, decision.deaths, decision.cancelled


def _told(job: Job) -> tuple[Any, ...]:
    return (
        job.id, job.node, job.state, job.waits_on, job.attempts, job.retries, job.slot_taken,
        job.cancel_requested_at is not None, job.claimed_by is not None, job.retry_of,
    )  # fmt: skip


@pytest.mark.parametrize(
    "empty_database_url", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)], indirect=True
)
def test_the_ledger_does_what_its_model_does_step_by_step(database: Database) -> None:
    with mortal_nodes(database) as two:

        class Machine(LedgerMachine):
            pass

        Machine.database, Machine.nodes = database, two
        run_state_machine_as_test(Machine, settings=SETTINGS)
