"""The worker is killed at each step of an operation in turn, before and after it, and the promises are looked at.

The steps are not written down: the operation is carried out once while ``tests.faults.steps`` records them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import select

from models import Incarnation
from models import Job as JobRow
from tests.faults.promises import Sent, all_ready, violations
from tests.nodes import TestNode, node, tiny_instance, until

LAST_STEP_S = 0.5
"""When the result can be read, what the worker still does for the job is a matter of milliseconds."""
WORKER = (sys.executable, "-m", "tests.faults.steps")
SCRIPT = "#!/bin/sh\nexit $(cat {root}/exit 2>/dev/null || echo 0)\n"


@dataclass(frozen=True)
class Step:
    """The ``nth`` step of a name, as the recording saw it."""

    name: str
    nth: int

    def __str__(self) -> str:
        return f"{self.name} #{self.nth}"


class Bed:
    """A node in a network namespace whose worker dies where the plan says."""

    def __init__(self, made: TestNode) -> None:
        self.node = made
        self.disks = made.root
        """Where the guest's disk is made."""
        self._plan, self._log = made.root / "plan", made.root / "steps"
        self._serial = 0
        for script in ("ifup", "ifdown"):
            path = made.root / script
            path.write_text(SCRIPT.format(root=made.root))
            path.chmod(0o755)
            made.environment[f"HOSTLER_{script.upper()}"] = str(path)

    def start_worker(self) -> None:
        self.node.start_worker(*WORKER, str(self._plan), str(self._log))

    def plan(self, **where: Any) -> None:
        """Count the steps from here on, and die at the one given."""
        self._serial += 1
        prepared = self._plan.with_suffix(".new")
        prepared.write_text(json.dumps({"serial": self._serial, **where}))
        prepared.rename(self._plan)

    def no_plan(self) -> None:
        self._plan.unlink(missing_ok=True)

    def recorded(self) -> list[Step]:
        lines = [json.loads(line) for line in self._log.read_text().splitlines()]
        return [Step(name, nth) for serial, name, nth in lines if serial == self._serial]

    def instance(self, name: str = "web1") -> dict[str, Any]:
        nics = [{"mac": "52:54:00:00:00:01", "mode": "bridged", "link": "br0"}]
        return tiny_instance(self.disks, name) | {"nics": nics}

    def ifup_fails(self, fails: bool) -> None:
        (self.node.root / "exit").write_text("1" if fails else "0")

    def booted(self) -> None:
        """Start the guest, and wait until it listens to its power button."""
        self.node.start(self.instance())
        with self.node.serial("web1") as serial:
            serial.tick()

    def rest(self) -> None:
        """No plan, a worker, and no guest."""
        self.no_plan()
        self.ifup_fails(False)
        if self.node.worker is None or self.node.worker.poll() is not None:
            self.start_worker()
        self.node.end_guests()


@contextmanager
def bed(netns: str) -> Iterator[Bed]:
    """A bed whose taps are in the network namespace."""
    with node(prefix=("ip", "netns", "exec", netns)) as made:
        yield Bed(made)


Send = Callable[[Bed], list[Sent]]


@dataclass(frozen=True)
class Case:
    """An operation to be killed: what has to be before, the jobs, and how the instance has to be afterwards."""

    send: Send
    after: str
    before: Callable[[Bed], object] = lambda bed: None


def _sent(task: str, ends: frozenset[str] = frozenset({"SUCCESS"}), **arguments: Any) -> Send:
    return lambda bed: [Sent(bed.node.send(task, **arguments).id, ends)]


def _start(bed: Bed) -> list[Sent]:
    return [Sent(bed.node.send("instance.start", instance=bed.instance()).id)]


def _failing_start(bed: Bed) -> list[Sent]:
    bed.ifup_fails(True)
    return [Sent(bed.node.send("instance.start", instance=bed.instance()).id, frozenset({"NETWORK_FAILED"}))]


def _reset(bed: Bed) -> list[Sent]:
    row = bed.node.row("web1")
    assert row and row.runtime
    journal = Path(row.runtime.run_dir) / "journal"
    job = bed.node.send("instance.reboot", name="web1", mode="reset")

    def once() -> str | None:
        resets = [line for line in journal.read_text().splitlines() if "host-qmp-system-reset" in line]
        return None if len(resets) == 1 else f"the reset line was pulled {len(resets)} times"

    return [Sent(job.id, effect=once)]


def _queue(bed: Bed) -> list[Sent]:
    """Three jobs of one instance at once, and one that comes after all of them."""
    jobs = [
        bed.node.send("instance.start", instance=bed.instance()),
        bed.node.send("instance.stop", name="web1", force=True),
        bed.node.send("instance.start", instance=bed.instance(), paused=True),
    ]
    jobs.append(bed.node.send("instance.resume", name="web1", after=[jobs[-1].id]))
    return [Sent(job.id) for job in jobs]


def _crashed(bed: Bed) -> None:
    """A guest whose QEMU ended while nobody watched, with all it left."""
    bed.booted()
    bed.node.end_guests()


def _stopped(bed: Bed) -> None:
    """An instance that is known, and was stopped."""
    bed.node.start(bed.instance(), paused=True)
    bed.node.do("instance.stop", name="web1", force=True)


def _paused(bed: Bed) -> None:
    bed.node.start(bed.instance(), paused=True)


CASES = {
    "start": Case(_start, "running"),
    "start that fails": Case(_failing_start, "stopped", _stopped),
    "stop": Case(_sent("instance.stop", name="web1", on_timeout="fail"), "stopped", Bed.booted),
    "stop by force": Case(_sent("instance.stop", name="web1", force=True), "stopped", _paused),
    "reboot": Case(_sent("instance.reboot", name="web1"), "running", Bed.booted),
    "reboot, hard": Case(_sent("instance.reboot", name="web1", mode="hard"), "running", Bed.booted),
    "reboot by reset": Case(_reset, "running", Bed.booted),
    "pause": Case(_sent("instance.pause", name="web1"), "paused", Bed.booted),
    "resume": Case(_sent("instance.resume", name="web1"), "running", _paused),
    "cleanup": Case(_sent("instance.cleanup", name="web1"), "stopped", _crashed),
    "a queue": Case(_queue, "running"),
}


@dataclass
class Sweep:
    """What came of killing the worker at each step of one operation."""

    case: str
    steps: int = 0
    kills: int = 0
    not_reached: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    decided_s: list[float] = field(default_factory=list)


def sweep(bed: Bed, name: str, *, sides: tuple[str, ...] = ("before", "after")) -> Sweep:
    """Kill the worker at each step of the case, on each side of it."""
    found = Sweep(name)
    steps = record(bed, CASES[name])
    found.steps = len(steps)
    for step in steps:
        for when in sides:
            kill_at(bed, CASES[name], step, when, found)
    return found


def record(bed: Bed, case: Case) -> list[Step]:
    """The steps of a case, by carrying it out undisturbed."""
    bed.rest()
    _stopped(bed)  # what is asked of QEMU once and kept is no step of the next start
    case.before(bed)
    bed.plan()
    problems = _end_of(bed, case, case.send(bed))
    bed.no_plan()
    assert not problems, problems
    return list(dict.fromkeys(bed.recorded()))


def kill_at(bed: Bed, case: Case, step: Step, when: str, found: Sweep) -> None:
    """One kill, the next worker, and the promises."""
    bed.rest()
    case.before(bed)
    bed.plan(step=step.name, nth=step.nth, when=when)
    jobs = case.send(bed)
    worker = bed.node.worker
    assert worker
    if not _killed(bed, worker, jobs):
        found.not_reached.append(f"{when} {step}")
    else:
        found.kills += 1
        bed.no_plan()
        bed.node.kill_worker()
        bed.start_worker()
    found.violations += [f"{found.case}, killed {when} {step}: {what}" for what in _end_of(bed, case, jobs)]
    found.decided_s += decided_after_s(bed.node, jobs)


def _killed(bed: Bed, worker: subprocess.Popen[bytes], jobs: list[Sent]) -> bool:
    """Whether the worker died; False when all is done and it still lives."""
    until(lambda: worker.poll() is not None or _all_told(bed.node, jobs), what="the kill or the end")
    with suppress(subprocess.TimeoutExpired):
        worker.wait(LAST_STEP_S)
    return worker.poll() is not None


def _end_of(bed: Bed, case: Case, jobs: list[Sent]) -> list[str]:
    try:
        until(lambda: _all_told(bed.node, jobs), what="every job ends, and its result can be read")
        bed.node.until_state("web1", case.after)
    except AssertionError as exc:
        return [f"{exc}; {_describe(bed.node, jobs)}"]
    return violations(bed.node, jobs)


def _all_told(node: TestNode, jobs: list[Sent]) -> bool:
    """Whether every job has ended in SQL and, a moment later, for whoever waits for its result."""
    with node.reading() as session:
        rows = session.scalars(select(JobRow).where(JobRow.id.in_([job.id for job in jobs]))).all()
    ended = len(rows) == len(jobs) and all(row.finished_at for row in rows)
    return ended and all_ready(node, [job.id for job in jobs])


def _describe(node: TestNode, jobs: list[Sent]) -> str:
    with node.reading() as session:
        rows = session.scalars(select(JobRow).where(JobRow.id.in_([job.id for job in jobs]))).all()
    told = [f"{row.task} is {row.state} in {row.phase}: {row.error or row.message}" for row in rows]
    state = node.row("web1")
    return f"{'; '.join(told)}; web1 is {state.state if state else 'unknown'}"


def decided_after_s(node: TestNode, jobs: list[Sent]) -> list[float]:
    """How long after its start the next worker had decided about each job it took over."""
    with node.reading() as session:
        began = session.scalars(select(Incarnation).order_by(Incarnation.started_at.desc())).first()
        rows = session.scalars(select(JobRow).where(JobRow.id.in_([job.id for job in jobs]))).all()
    notes = [entry["at"] for row in rows for entry in row.phases if entry["phase"] == "recover"]
    assert began
    return [(datetime.fromisoformat(at) - began.started_at).total_seconds() for at in notes]
