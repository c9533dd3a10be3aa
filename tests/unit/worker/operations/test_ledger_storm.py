"""What the ledger promises when two nodes of two threads each do everything at once, and their workers are killed.

Each round is made of one random number, which a failure names: LEDGER_SEED repeats its script, though not the threads'
timing. LEDGER_ROUNDS asks for more of them.
"""

from __future__ import annotations

import os
import random
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event, select, update

from models import Database, Job, utc_now
from tests.unit.worker.operations.ledger_model import FINAL
from tests.unit.worker.operations.ledgers import locks, row
from tests.unit.worker.operations.mortals import Killed, MortalNode, forget_all_jobs, mortal_nodes
from worker.operations.ledger import Ledger
from worker.operations.receipts import CancelOutcome, Decision, Ended, Receipt, Verdict

ROUNDS = int(os.environ.get("LEDGER_ROUNDS", "8"))
SEED = os.environ.get("LEDGER_SEED")
JOBS = 16
THREADS = 2
"""For each node."""
LIVES = 3
"""How often a node's worker is killed in a round."""
STAGES_MAX = 100
ERROR = {"code": "QMP_LOST", "message": "QEMU is silent", "details": {"retryable": True}}
HOUR = timedelta(hours=1)


def _postpone(ledger: Ledger, job_id: str) -> Ended:
    put_off = ledger.postpone(job_id, ERROR)
    assert put_off, "more retries than a storm has"
    return put_off[1]


ENDS: dict[str, Callable[[Ledger, str], Ended]] = {
    "succeed": lambda ledger, job_id: ledger.succeed(job_id, {}),
    "fail": lambda ledger, job_id: ledger.fail(job_id, ERROR),
    "revoke": lambda ledger, job_id: ledger.revoke(job_id, "gave up"),
    "postpone": _postpone,
}
STATES = {"succeed": {"SUCCESS"}, "fail": {"FAILURE"}, "revoke": {"REVOKED"}, "killed": FINAL, "postpone": {"REVOKED"}}
"""What a job may have become whose last attempt ended so; killed may have been who had just written its end down."""

Errand = Callable[[MortalNode], Ended | None]


@dataclass
class AtWork:
    """A job is at work from ``began`` to ``ended``, in the order of what all threads saw."""

    receipt: Receipt
    node: str
    began: int
    ended: int = 0
    how: str = "killed"


@dataclass
class Storm:
    """Errands for two nodes in random order, and what their threads saw while they ran them."""

    nodes: dict[str, MortalNode]
    chance: random.Random
    sent: dict[str, tuple[Receipt, str]] = field(default_factory=dict)
    errands: list[tuple[str, Errand]] = field(default_factory=list)
    log: list[AtWork] = field(default_factory=list)
    moment: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    # The script

    def write(self) -> None:
        """Jobs, each delivered once to thrice; cancels; and the heartbeat's work, anywhere between them."""
        for number in range(JOBS):
            self._send(f"j{self.chance.randrange(100):02}-{number}")
        for job_id in self.chance.sample([*self.sent], JOBS // 4):
            self._somewhere(self._cancels(job_id))
        for node in self.nodes:
            for _ in range(JOBS // 4):
                self.errands.append((node, _wakes_overdue))
                self.errands.append((node, _wakes_forgotten))
        self.chance.shuffle(self.errands)

    def _send(self, job_id: str) -> None:
        instance, node = self.chance.choice(["web1", "web2", "web3", None]), self.chance.choice([*self.nodes])
        after = self.chance.sample([*self.sent], min(len(self.sent), self.chance.choice([0, 0, 0, 1, 2, 3])))
        slot = self.chance.choice([None, "start", "start"])
        task = "instance.start" if slot else "instance.pause"
        choices = {"priority": self.chance.choice([0, 5]), "after_failure": self.chance.choice(["cancel", "run"])}
        self.sent[job_id] = Receipt(job_id, task, {}, instance, slot, after=tuple(after), **choices), node
        self.errands += [(node, self._delivers(job_id))] * self.chance.choice([1, 2, 3])

    def _somewhere(self, errand: Errand) -> None:
        self.errands.append((self.chance.choice([*self.nodes]), errand))

    # Errands

    def _delivers(self, job_id: str) -> Errand:
        def deliver(node: MortalNode) -> Ended | None:
            receipt = self.sent[job_id][0]
            decision = node.ledger.receive(receipt)
            return self._carry_out(node, receipt, decision) if decision.verdict is Verdict.RUN else None

        return deliver

    def _cancels(self, job_id: str) -> Errand:
        return lambda node: node.ledger.cancel(job_id, "enough")[1]

    def _carry_out(self, node: MortalNode, receipt: Receipt, decision: Decision) -> Ended | None:
        how = "revoke" if decision.cancelled else self._choose(["succeed"] * 5 + ["fail", "revoke", "postpone"])
        with self.lock:
            self.moment += 1
            mine = AtWork(receipt, node.name, self.moment)
            self.log.append(mine)
        try:
            if self._choose([True, False]):
                node.ledger.advance(receipt.job_id, "spawn", 45, "")
        finally:
            with self.lock:  # before others may begin
                self.moment += 1
                mine.ended = self.moment
        ended = ENDS[how](node.ledger, receipt.job_id)
        mine.how = how
        return ended

    def _choose(self, choices: list[Any]) -> Any:
        with self.lock:
            return self.chance.choice(choices)

    # Carrying it out

    def rage(self) -> None:
        """Run all errands and what comes of them, until nobody has to be woken any more."""
        lives = dict.fromkeys(self.nodes, LIVES)
        for _ in range(STAGES_MAX):
            for name, node in self.nodes.items():
                if lives[name] and node.database.transactions_left is None:
                    lives[name] -= 1
                    node.database.transactions_left = self.chance.randrange(1, 4 * JOBS)
            with ThreadPoolExecutor(THREADS * len(self.nodes)) as pool:
                threads = [pool.submit(self._work, node) for node in self.nodes.values() for _ in range(THREADS)]
                for thread in threads:
                    thread.result()
            if not self._heal():
                return
        raise AssertionError(f"still something to do after {STAGES_MAX} rounds of healing")

    def _work(self, node: MortalNode) -> None:
        while errand := self._next(node.name):
            try:
                self._wake(errand(node))
            except Killed:
                with self.lock:
                    self.errands.append((node.name, errand))  # the message was not acknowledged, or may as well be
                return

    def _next(self, node: str) -> Errand | None:
        with self.lock:
            mine = next((number for number, (name, _) in enumerate(self.errands) if name == node), None)
            return None if mine is None else self.errands.pop(mine)[1]

    def _wake(self, ended: Ended | None) -> None:
        with self.lock:
            for wakeup in ended.wakeups if ended else []:
                copies = self.chance.choice([0, 1, 1, 1, 2])  # a broker may lose it, or deliver it twice
                self.errands += [(wakeup.node, self._delivers(wakeup.job_id))] * copies

    def _heal(self) -> bool:
        """What new workers do for the killed, and heartbeats for what was lost; False when there is nothing."""
        for node in self.nodes.values():
            if node.database.transactions_left == 0:
                node.start_worker()
                self._deliver_for_sure(Ended(node.ledger.take_over()))
            limit, node.database.transactions_left = node.database.transactions_left, None
            with node.database.transaction() as session:
                session.execute(update(Job).where(Job.state == "RETRY").values(retry_at=utc_now() - HOUR))
            for found in (Ended(node.ledger.due()), node.ledger.overdue(), Ended(node.ledger.forgotten(-HOUR))):
                self._deliver_for_sure(found)
            node.database.transactions_left = limit
        return bool(self.errands)

    def _deliver_for_sure(self, ended: Ended) -> None:
        self.errands += [(wakeup.node, self._delivers(wakeup.job_id)) for wakeup in ended.wakeups]
        self.chance.shuffle(self.errands)


def _wakes_overdue(node: MortalNode) -> Ended:
    return node.ledger.overdue()


def _wakes_forgotten(node: MortalNode) -> Ended:
    return Ended(node.ledger.forgotten(-HOUR))


def _overlaps(one: AtWork, other: AtWork) -> bool:
    return one is not other and one.began < other.ended and other.began < one.ended


def _check(storm: Storm, database: Database) -> None:
    with database.reading() as session:
        rows = session.scalars(select(Job).order_by(Job.sequence)).all()
    assert {job.id for job in rows} == set(storm.sent)
    assert [(job.id, job.state, job.waits_on) for job in rows if job.state not in FINAL or job.slot_taken] == []
    assert locks(database) == {}
    of_instance: dict[str | None, list[AtWork]] = defaultdict(list)
    for work in storm.log:
        of_instance[work.receipt.instance_name].append(work)
    for name, works in of_instance.items():
        if name:
            assert [(a, b) for a in works for b in works if _overlaps(a, b)] == []
            began = [*dict.fromkeys(work.receipt.job_id for work in works if not work.receipt.after)]
            assert began == [job.id for job in rows if job.id in began], f"{name}: not in the order of receipt"
    for job in rows:
        attempts = [work.how for work in storm.log if work.receipt.job_id == job.id]
        assert set(attempts[:-1]) <= {"killed", "postpone"}, (job.id, attempts)
        assert job.state in (STATES[attempts[-1]] if attempts else {"REVOKED"}), (job.id, attempts)
    for name, node in storm.nodes.items():
        starts = [work for work in storm.log if work.node == name and work.receipt.slot]
        for work in starts:
            at_once = [other for other in starts if other.began <= work.began < other.ended]
            assert len(at_once) <= node.places, at_once


POSTGRESQL = pytest.param("postgresql", marks=pytest.mark.postgresql)
MARIADB = pytest.param("mariadb", marks=pytest.mark.mariadb)
TWO_KINDS = pytest.mark.parametrize("empty_database_url", ["sqlite", POSTGRESQL], indirect=True)
SERVERS = pytest.mark.parametrize("empty_database_url", [POSTGRESQL, MARIADB], indirect=True)
"""On SQLite nobody comes between the statements of a transaction."""


@TWO_KINDS
def test_whatever_happens_at_once_every_job_ends_once_in_order_and_alone(database: Database) -> None:
    with mortal_nodes(database) as nodes:
        for seed in [int(SEED)] if SEED else [random.randrange(2**32) for _ in range(ROUNDS)]:
            forget_all_jobs(database)
            for node in nodes.values():
                node.start_worker()
            storm = Storm(nodes, random.Random(seed))
            storm.write()
            try:
                storm.rage()
                _check(storm, database)
            except BaseException as exc:
                exc.add_note(f"LEDGER_SEED={seed}")
                raise


@SERVERS
@pytest.mark.parametrize("asked_of", ["n1", "n2"])
def test_a_job_that_is_cancelled_just_when_it_comes_and_waits_for_a_place_frees_its_instance(
    database: Database, asked_of: str
) -> None:
    with mortal_nodes(database) as nodes:
        for node in nodes.values():
            node.start_worker()
        arriving, cancelling = (
            nodes["n1"],
            MortalNode(database.url.render_as_string(hide_password=False), asked_of, 1),
        )
        cancelling.start_worker()
        arriving.ledger.receive(Receipt("j1", "instance.start", {}, "web1", "start"))

        def deliver_once(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            if "FROM jobs" in statement and "FOR UPDATE" in statement and not arriving.ledger.knows("j2"):
                verdict = arriving.ledger.receive(Receipt("j2", "instance.start", {}, "web2", "start")).verdict
                assert verdict is Verdict.WAIT

        try:
            event.listen(cancelling.database.engine, "before_cursor_execute", deliver_once)
            assert cancelling.ledger.cancel("j2", "enough") == (CancelOutcome.REVOKED, Ended())
        finally:
            cancelling.database.dispose()
        assert (row(database, "j2").state, locks(database)) == ("REVOKED", {"web1": "j1"})
