"""Guests that go back and forth between two nodes, while workers, QEMUs and the broker die at random.

Everything random comes from one seed, except the moments at which the machine lets things happen. After each round
every job has to have ended, no promise may be broken, and each guest is on one node, counting on from where it was,
unless a QEMU of its own was killed. At the end both nodes' own audits have to find nothing, and nothing may be left of
the guests once they are killed.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import psutil
from sqlalchemy import select

from models import Job as JobRow
from models import Runtime
from tests.faults.killer import Killer, freeze_worker, kill_broker
from tests.faults.outside import counter
from tests.faults.promises import Sent, all_ready, violations
from tests.faults.sweep import Bed
from tests.nodes import TestNode, until
from tests.pairs import FORGIVING_S, SLOW_MIB_S, end_guests, in_order, job_row, pair, two_sites

ROUND = 10
ROUND_S = 180.0
"""How long the jobs of a round may take to end once the killing has stopped."""
PAUSE_S = (0.2, 1.5)
"""Between two faults."""
CHAOS = {"worker killed": 6, "both workers killed": 1, "QEMU killed": 2, "broker killed": 1, "worker frozen": 1}
ENDS = frozenset({
    "SUCCESS", "REVOKED", "CANCELLED", "NOT_RUNNING", "UNKNOWN_INSTANCE", "MIGRATION_FAILED", "INVALID_ARGUMENT",
    "NODE_UNAVAILABLE", "QMP_LOST", "QEMU_FAILED", "TIMED_OUT",
})  # fmt: skip


@dataclass
class MigrationSoak:
    """What a soak did and found."""

    seed: int
    jobs: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0


Say = Callable[[str], object]


def soak(jobs: int, guests: int, seed: int, *, budget_s: float = 3600.0, say: Say = lambda _: None) -> MigrationSoak:
    """Run until ``jobs`` migrations were asked for or ``budget_s`` has passed. Needs root."""
    found = MigrationSoak(seed)
    began = time.monotonic()
    with two_sites() as sites, pair(sites=sites, start=False) as nodes:
        bed = _Bed(nodes, [f"web{number}" for number in range(guests)], random.Random(seed), found)
        while found.jobs < jobs and time.monotonic() - began < budget_s:
            bed.round(min(ROUND, jobs - found.jobs))
            say(f"{found.jobs} migrations, {found.faults.total()} faults, {len(found.violations)} violations")
        bed.last()
    found.seconds = time.monotonic() - began
    return found


class _Bed:
    def __init__(self, nodes: list[TestNode], names: list[str], rng: random.Random, found: MigrationSoak) -> None:
        self.nodes = nodes
        self.beds = [Bed(node) for node in nodes]
        for node in nodes:
            node.start_worker()
        self.names = names
        self.rng = rng
        self.found = found
        self.counts = dict.fromkeys(names, 0)
        self.disturbed: set[str] = set()

    def owner(self, name: str) -> TestNode:
        row = self.nodes[0].row(name)
        return next(node for node in self.nodes if row is None or node.name == row.node)

    def round(self, jobs: int) -> None:
        for name in self.names:
            self._have_it_run(name)
        self.disturbed.clear()
        sent: list[str] = []
        faults = {name: partial(fault, self) for name, fault in _FAULTS.items()}
        killer = Killer(CHAOS, faults, PAUSE_S, self.found.faults, random.Random(self.rng.random()))
        killer.start()
        try:
            for _ in range(jobs):
                until(lambda: self._send(sent), what="a migration is sent")
                time.sleep(self.rng.uniform(0, 1.0))
        finally:
            killer.stop()
        self._settle(sent)

    def _have_it_run(self, name: str) -> None:
        row = self.nodes[0].row(name)
        if row is None or row.runtime is None:
            self.owner(name).start(self.beds[0].instance(name))
            self.counts[name] = 0
        owner = self.owner(name)
        self.counts[name] = until(lambda: max(self.counts[name], counter(owner, name)), what=f"{name} counts")

    def _send(self, sent: list[str]) -> bool:
        """To the node that has the guest now; by the time it is read it may be elsewhere."""
        name, job_id = self.rng.choice(self.names), f"soak-{self.found.seed}-{self.found.jobs}"
        source = self.owner(name)
        target = next(node for node in self.nodes if node is not source)
        options = {"bandwidth_mib_s": 8 * SLOW_MIB_S} if self.rng.random() < 0.5 else {}
        try:
            job = source.send("instance.migrate", job_id=job_id, name=name, target=target.name, **options)
            if self.rng.random() < 0.15:
                job.cancel()
        except Exception:
            return job_id in sent  # the broker was killed: sent again under the same id
        self.found.jobs += 1
        sent.append(job_id)
        return True

    def _settle(self, sent: Sequence[str]) -> None:
        """Wait until every job has ended, and look at the promises."""
        try:
            until(lambda: all_ready(self.nodes[0], sent), ROUND_S, "every migration ends")
        except AssertionError as exc:
            open_jobs = [row for job_id in sent if (row := job_row(self.nodes[0], job_id)) and not row.finished_at]
            told = [f"{row.id} {row.state} {row.phase} {row.message}" for row in open_jobs]
            self.found.violations.append(f"3: {exc}: {told}")
            return
        wrong: list[str] = []

        def look() -> bool:
            wrong[:] = violations(self.nodes, [Sent(job_id, ENDS) for job_id in sent])
            return not wrong

        with suppress(AssertionError):
            until(look, 2 * FORGIVING_S)
        self.found.violations += wrong
        with self.nodes[0].reading() as session:
            rows = session.scalars(select(JobRow).where(JobRow.id.in_(sent))).all()
        self.found.ended.update((row.error or {}).get("code", row.state) for row in rows)
        for name in self.names:
            self._look_at(name)

    def _look_at(self, name: str) -> None:
        owner, row = self.owner(name), self.nodes[0].row(name)
        if name in self.disturbed and (row is None or row.runtime is None):
            return
        if row is None or row.state != "running":
            self.found.violations.append(f"8: {name} is {row and row.state} on {owner.name}: {row and row.reason}")
            return
        try:
            until(lambda: counter(owner, name) > self.counts[name], 10)
        except AssertionError:
            self.found.violations.append(f"5: {name} had counted to {self.counts[name]}, now {counter(owner, name)}")

    def last(self) -> None:
        """With all at rest: what the nodes' audits find, and what is left once the guests are killed."""
        self.found.violations += in_order(self.nodes)
        try:
            end_guests(self.nodes)
        except AssertionError as exc:
            self.found.violations.append(f"6: {exc}")


def _kill_worker(bed: _Bed, rng: random.Random) -> bool:
    rng.choice(bed.nodes).restart_worker()
    return True


def _kill_both(bed: _Bed, _rng: random.Random) -> bool:
    for node in bed.nodes:
        node.kill_worker()
    for node in bed.nodes:
        node.start_worker()
    return True


def _kill_qemu(bed: _Bed, rng: random.Random) -> bool:
    """One of a guest's QEMUs, on whichever side."""
    name = rng.choice(bed.names)
    with bed.nodes[0].reading() as session:
        pids = session.scalars(select(Runtime.pid).where(Runtime.instance_name == name)).all()
    alive = [pid for pid in pids if pid and psutil.pid_exists(pid)]
    if not alive:
        return False
    bed.disturbed.add(name)
    with suppress(ProcessLookupError):
        os.kill(rng.choice(alive), signal.SIGKILL)
    return True


_FAULTS: dict[str, Callable[[_Bed, random.Random], bool]] = {
    "worker killed": _kill_worker,
    "both workers killed": _kill_both,
    "QEMU killed": _kill_qemu,
    "broker killed": lambda bed, _rng: kill_broker(bed.nodes[0].settings),
    "worker frozen": lambda bed, rng: freeze_worker(rng.choice(bed.nodes), rng.uniform(0.5, 3)),
}
