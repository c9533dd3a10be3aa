"""Live migrations whose workers are killed at each step, on either side; the steps are seen, as in ``sweep``.

The guest goes from one node to the other and back for ever, so that what one migration leaves is in the way of the
next. After each: the job ended as it should, one QEMU, on the node that owns it, and a counter that never went back.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from hostler.client import Job
from tests.faults.outside import counter
from tests.faults.promises import Sent, all_ready, violations
from tests.faults.surroundings import Postgres, postgres
from tests.faults.sweep import Bed, Step
from tests.node.migration_peers import Authority
from tests.nodes import TestNode, until
from tests.pairs import Site, job_row, own_folders, pair, stage_of, still_wrong, two_sites

NAME = "web1"
T = TypeVar("T")
END_S = 60.0
"""How long a migration may take to end, once its workers live again."""
SIDES = ("source", "target")
WHENS = ("before", "after")


@dataclass(frozen=True)
class Case:
    """A way of migrating. ``apart``: the nodes share no disk, and have certificates."""

    options: dict[str, Any] = field(default_factory=dict)
    apart: bool = False


CASES = {
    "migrate": Case(),
    "migrate, post-copy": Case({"postcopy": "at-once", "bandwidth_mib_s": 0.2}),
    "migrate, disks copied, in TLS": Case({"copy_storage": "full", "tls": True}, apart=True),
}


@dataclass
class Sweep:
    """What came of killing a worker at each step of a migration."""

    case: str
    steps: int = 0
    kills: int = 0
    not_reached: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)


class Pair:
    """Two nodes whose workers die where they are told to, and a guest that is on one of them."""

    def __init__(self, nodes: list[TestNode], sites: list[Site], server: Postgres | None = None) -> None:
        self.nodes = nodes
        self.sites = sites
        self.server = server
        self.folders: list[Path] = []
        """Where each node's disks really are, where they share none."""
        self.beds = {node.name: Bed(node) for node in nodes}
        self.count = 0

    @property
    def source(self) -> TestNode:
        row = self.nodes[0].row(NAME)
        assert row
        return next(node for node in self.nodes if node.name == row.node)

    @property
    def target(self) -> TestNode:
        return next(node for node in self.nodes if node is not self.source)

    def sides(self) -> dict[str, Bed]:
        """The beds of source and target, as they are now."""
        source, target = self.source, self.target
        return {"source": self.beds[source.name], "target": self.beds[target.name]}

    def rest(self) -> None:
        """No plans, workers, and a guest that runs somewhere."""
        for bed in self.beds.values():
            bed.no_plan()
            if bed.node.worker is None or bed.node.worker.poll() is not None:
                bed.node.kill_worker()
                bed.start_worker()
        row = self.nodes[0].row(NAME)
        if row is None or row.runtime is None:
            where = self.beds[row.node] if row else next(iter(self.beds.values()))
            where.booted()
            self.count = 0
        self._forget_copies()

    def _forget_copies(self) -> None:
        """The disks that the guest left behind: somebody has to remove them before it comes back."""
        for node, folder in zip(self.nodes, self.folders, strict=False):
            for path in folder.iterdir() if node is not self.source else ():
                path.unlink()

    def start_anew(self) -> None:
        """After a broken promise: all guests and workers killed, so that the next one does not inherit it."""
        for bed in self.beds.values():
            bed.node.kill_worker()
            for pid in bed.node.qemu_pids():
                os.kill(pid, signal.SIGKILL)
            bed.no_plan()
        for bed in self.beds.values():
            bed.start_worker()
        with suppress(AssertionError):
            until(lambda: all(not node.leftovers() for node in self.nodes), END_S)

    def send(self, **options: Any) -> Job:
        return self.source.send("instance.migrate", name=NAME, target=self.target.name, **options)

    def seen(self) -> None:
        """Note how far the guest has counted: it must not go back."""
        source = self.source
        self.count = until(lambda: max(self.count, counter(source, NAME)), what="the guest counts")

    def forget_connections(self) -> None:
        """Use none of the client's and the database's connections of before a fault."""
        for node in self.nodes:
            if node._client:
                node._client.close()
                node._client = None
            node.database().dispose()

    def wrong(self, job: Job, ends: frozenset[str], owner: str, *, runs: bool = True) -> list[str]:
        """What is wrong once the job has ended and all is at rest; ``owner`` is where the guest has to be then."""
        sent = Sent(job.id, ends)
        try:
            until(lambda: all_ready(self.nodes[0], [job.id]), END_S, "the migration ends")
            until(lambda: not self.unfinished(job), END_S, "its steps end")
        except AssertionError as exc:
            return [f"3: {exc}: {self.describe(job)}"]
        found = still_wrong(lambda: violations(self.nodes, [sent]))
        return [*found, *self.wrong_guest(owner, runs=runs), *self.wrong_copies()]

    def wrong_copies(self) -> list[str]:
        """The guest writes nothing to its disk, so that source and copy have to be the same."""
        found = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in self.folders]
        return [] if not found or found[0] == found[1] else [f"1: the copied disks differ: {[*map(sorted, found)]}"]

    def unfinished(self, job: Job) -> list[str]:
        rows = [job_row(self.nodes[0], f"{job.id}.{step}") for step in ("accept", "finalize", "discard")]
        return [row.id for row in rows if row and not row.finished_at]

    def wrong_guest(self, owner: str, *, runs: bool) -> Iterator[str]:
        """The guest is on the node that has to own it, and its counter goes on, or it has crashed."""
        source = self.source
        if source.name != owner:
            yield f"1: {NAME} is {source.name}'s, not {owner}'s"
        row = source.row(NAME)
        if row is None or row.state != ("running" if runs else "crashed"):
            yield f"8: {NAME} is {row and row.state}"
            return
        if not runs:
            return
        try:
            now = until(lambda: count if (count := counter(source, NAME)) > self.count else 0, 10, "it counts")
            self.count = until(lambda: count if (count := counter(source, NAME)) > now else 0, 10, "it counts on")
        except AssertionError as exc:
            yield f"5: the counter was {self.count}, and is {counter(source, NAME)}: {exc}"

    def describe(self, job: Job) -> str:
        """How a migration stands, for people."""
        rows = [job_row(self.nodes[0], f"{job.id}{step}") for step in ("", ".accept", ".finalize", ".discard")]
        told = [
            f"{row.task} {row.id[36:]} {row.state} in {row.phase}, {row.error or row.message}" for row in rows if row
        ]
        return "; ".join([f"stage {stage_of(self.nodes[0], job)}", *told])


@contextmanager
def migrating_pair(**environment: str) -> Iterator[Pair]:
    """Two nodes in network namespaces with a cable between them, and workers that can be told where to die."""
    with two_sites() as sites, pair(sites=sites, start=False, **environment) as nodes:
        made = Pair(nodes, sites)
        made.rest()
        yield made


@contextmanager
def pair_apart() -> Iterator[Pair]:
    """As ``migrating_pair``, but the nodes share no disk, and have certificates."""
    with two_sites() as sites, TemporaryDirectory(prefix="hst-") as folder:
        names = ",".join(f"IP:{site.address}" for site in sites)
        certificates = Authority(Path(folder, "authority")).issue(Path(folder, "nodes"), server=names)
        with pair(sites=sites, start=False, HOSTLER_MIGRATION_TLS_DIR=str(certificates)) as nodes:
            made = Pair(nodes, sites)
            made.folders = own_folders(nodes)
            for bed in made.beds.values():
                bed.disks = made.folders[0]
            made.rest()
            yield made


@contextmanager
def pair_on_postgres() -> Iterator[Pair]:
    """As ``migrating_pair``, with a PostgreSQL of our own. Raises Lacking."""
    with two_sites() as sites, pair(sites=sites, start=False) as nodes, postgres(nodes[0]) as server:
        nodes[1].environment["HOSTLER_DATABASE_URL"] = nodes[0].environment["HOSTLER_DATABASE_URL"]
        made = Pair(nodes, sites, server)
        try:
            made.rest()
            yield made
        finally:
            for node in nodes:
                node.kill_worker()


def record(made: Pair, **options: Any) -> dict[str, list[Step]]:
    """The steps of a migration on either side, by carrying it out undisturbed, once each way."""
    steps: dict[str, list[Step]] = {}
    for _ in range(2):
        made.rest()
        sides, owner = made.sides(), made.target.name
        for bed in sides.values():
            bed.plan()
        job = made.send(**options)
        wrong = made.wrong(job, frozenset({"SUCCESS"}), owner)
        assert not wrong, wrong
        for bed in sides.values():
            bed.no_plan()
        steps = {side: list(dict.fromkeys(bed.recorded())) for side, bed in sides.items()}
    return steps


def dies(bed: Bed, asked: TestNode, job: Job) -> bool:
    """Whether the worker died as planned, and was started again, before the job had ended, as another node sees it."""
    worker = bed.node.worker
    assert worker
    until(lambda: worker.poll() is not None or all_ready(asked, [job.id]), END_S, "the kill or the end")
    with suppress(Exception):
        worker.wait(0.5)
    if worker.poll() is None:
        return False
    bed.no_plan()
    bed.node.kill_worker()
    bed.start_worker()
    return True


def kill_at(made: Pair, side: str, step: Step, when: str, found: Sweep, **options: Any) -> None:
    """One kill, the next worker, and the promises."""
    made.rest()
    owner, sides = made.target.name, made.sides()
    bed = sides[side]
    bed.plan(step=step.name, nth=step.nth, when=when)
    job = made.send(**options)
    what = f"{found.case}, {side} killed {when} {step}"
    if dies(bed, made.nodes[0], job):
        found.kills += 1
    else:
        found.not_reached.append(f"{side}: {when} {step}")
    wrong = made.wrong(job, frozenset({"SUCCESS"}), owner)
    found.violations += [f"{what}: {each}" for each in wrong]
    if wrong:
        made.start_anew()


def some(every: list[T], kills: int, seed: int) -> list[T]:
    """So many of them, chosen by ``seed``; all where it is 0."""
    return random.Random(seed).sample(every, min(kills, len(every))) if kills else every


def sweep(case: str, kills: int = 0, seed: int = 0) -> Sweep:
    """Kill source and target at each step, before and after it; or so many times, chosen by ``seed``."""
    found, options = Sweep(case), CASES[case].options
    with pair_apart() if CASES[case].apart else migrating_pair() as made:
        steps = record(made, **options)
        found.steps = sum(map(len, steps.values()))
        every = [(side, step, when) for side in SIDES for step in steps[side] for when in WHENS]
        for side, step, when in some(every, kills, seed):
            kill_at(made, side, step, when, found, **options)
    return found
