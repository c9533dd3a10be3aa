"""Many random jobs over many guests, while workers, QEMUs and the broker die at random.

Everything random comes from one seed, except the moments at which the machine lets things happen. After each round
every job has to have ended, no promise may be broken, and the jobs of each instance have to make sense one after
another: a start that succeeded although the guest ran, a stop of a guest that ran on, are told.
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
from typing import Any

import psutil
from sqlalchemy import select

from hostler.contract import FINAL_JOB_STATES
from hostler.errors import ServiceUnreachable
from models import Job as JobRow
from tests.faults.killer import Killer, freeze_worker, kill_broker
from tests.faults.promises import Sent, all_ready, bare, violations
from tests.nodes import TestNode, node, tiny_instance, until

ROUND = 50
ROUND_S = 180.0
"""How long the jobs of a round may take to end once the killing has stopped."""
PAUSE_S = (0.3, 2.5)
"""Between two faults."""
CHAOS = {"worker killed": 6, "worker ended": 1, "QEMU killed": 4, "broker killed": 1, "worker frozen": 1}
DOWN, RUNNING, PAUSED, UP, EITHER = "down", "running", "paused", "up", "up or down"

ANY_CODE = frozenset({
    "SUCCESS", "REVOKED", "CANCELLED", "ALREADY_RUNNING", "NOT_RUNNING", "UNKNOWN_INSTANCE", "TIMED_OUT", "QMP_LOST",
    "QEMU_FAILED", "INTERNAL", "INSTANCE_BUSY",
})  # fmt: skip


@dataclass
class Soak:
    """What a soak did and found."""

    seed: int
    jobs: int = 0
    duplicates: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0


Say = Callable[[str], object]


def soak(jobs: int, guests: int, seed: int, *, budget_s: float = 3600.0, say: Say = lambda _: None) -> Soak:
    """Run until ``jobs`` were sent or ``budget_s`` has passed."""
    found = Soak(seed)
    began = time.monotonic()
    with node() as made:
        made.start_worker()
        names = [f"web{number}" for number in range(guests)]
        bed = _Bed(made, names, random.Random(seed), found)
        while found.jobs < jobs and time.monotonic() - began < budget_s:
            bed.round(min(ROUND, jobs - found.jobs))
            say(f"{found.jobs} jobs, {found.faults.total()} faults, {len(found.violations)} violations")
        bed.last()
    found.seconds = time.monotonic() - began
    return found


class _Bed:
    def __init__(self, made: TestNode, names: list[str], rng: random.Random, found: Soak) -> None:
        self.node = made
        self.names = names
        self.rng = rng
        self.found = found
        self.sent: list[str] = []
        self.disturbed: set[str] = set()
        self.states = dict.fromkeys(names, DOWN)
        self.checked = 0

    def round(self, jobs: int) -> None:
        faults = {name: partial(fault, self) for name, fault in _FAULTS.items()}
        killer = Killer(CHAOS, faults, PAUSE_S, self.found.faults, random.Random(self.rng.random()))
        killer.start()
        try:
            for _ in range(jobs):
                self._send_one()
                time.sleep(self.rng.uniform(0, 0.1))
        finally:
            killer.stop()
        self._settle()

    def last(self) -> None:
        """End all guests in good order: nothing may be left."""
        for name in self.names:
            self._send("instance.stop", name=name, force=True)
        self._settle()
        for what, items in self.node.leftovers().items():
            self.found.violations.append(f"6: {what} are left at the end: {items}")

    def _send_one(self) -> None:
        name = self.rng.choice(self.names)
        task, arguments = self.rng.choice(_JOBS)(self.rng, name)
        if task == "instance.start":
            arguments = {"instance": tiny_instance(self.node.root, name)} | arguments
        self._send(task, **arguments)
        if self.rng.random() < 0.1 and self.sent:
            with suppress(ServiceUnreachable):
                self.node.client().job(self.rng.choice(self.sent[-10:])).cancel()

    def _send(self, task: str, **arguments: Any) -> None:
        job_id = f"soak-{self.found.seed}-{self.found.jobs}"
        times = 2 if self.rng.random() < 0.1 else 1
        for _ in range(times):
            until(lambda: self._try_to_send(task, job_id, arguments), what=f"{job_id} is sent")
        self.found.jobs += 1
        self.found.duplicates += times - 1
        self.sent.append(job_id)

    def _try_to_send(self, task: str, job_id: str, arguments: dict[str, Any]) -> bool:
        try:
            self.node.send(task, job_id=job_id, **arguments)
        except Exception:
            return False  # the broker was killed: sent again under the same id
        return True

    def _settle(self) -> None:
        """Wait until every job has ended, and look at the promises."""
        try:
            until(lambda: len(self._rows(final=True)) == len(self.sent) - self.checked, ROUND_S, "every job ends")
            until(lambda: all_ready(self.node, self.sent[self.checked :]), what="every result can be read")
            until(lambda: not self._in_motion(), what="the guests come to rest")
        except AssertionError as exc:
            self.found.violations.append(f"3: {exc}: {self._open() or self._unread()}")
            self.checked = len(self.sent)  # what is wrong with these jobs has been told
            self.disturbed.update(self.names)  # in which state they leave the guests is not known
            return
        rows = self._rows(final=True)
        jobs = [Sent(row.id, ANY_CODE) for row in rows]
        self.found.violations += violations(self.node, jobs)
        self.found.ended.update((row.error or {}).get("code", row.state) for row in rows)
        self._follow(rows)
        self.checked = len(self.sent)
        self.disturbed.clear()

    def _rows(self, *, final: bool) -> Sequence[JobRow]:
        wanted = select(JobRow).where(JobRow.id.in_(self.sent[self.checked :])).order_by(JobRow.sequence)
        with self.node.reading() as session:
            return session.scalars(wanted.where(JobRow.finished_at.is_not(None)) if final else wanted).all()

    def _open(self) -> list[str]:
        known = {row.id: row for row in self._rows(final=False)}
        return [
            f"{job_id}: " + (f"{row.task} {row.state} {row.phase} {row.message}" if row else "never received")
            for job_id in self.sent[self.checked :]
            if (row := known.get(job_id)) is None or not row.finished_at
        ]

    def _unread(self) -> list[str]:
        """The jobs that have ended and whose result does not say so: what the backend has, and what the ledger."""
        with bare(self.node) as app:
            told = {row: app.backend.get_task_meta(row.id, cache=False) for row in self._rows(final=True)}
        return [
            f"{row.id}: {row.task} is {row.state} since {row.finished_at}, begun {row.started_at} by {row.claimed_by} "
            f"({row.attempts} attempts, {row.retries} retries): {row.phase} {row.message}; "
            f"and its result is {meta['status']}: {meta['result']}"
            for row, meta in told.items()
            if meta["status"] not in FINAL_JOB_STATES
        ]

    def _in_motion(self) -> bool:
        """A QEMU that was just killed is still being cleaned up after."""
        for name in self.names:
            row = self.node.row(name)
            alive = bool(row and row.runtime and row.runtime.pid and psutil.pid_exists(row.runtime.pid))
            if row and (bool(row.runtime) != alive or row.state in ("starting", "stopping", "unknown")):
                return True
        return False

    def _follow(self, rows: Sequence[JobRow]) -> None:
        """The jobs of each instance, in the order they were carried out, against what they say they did."""
        for row in rows:
            name = row.instance_name
            if name is None:
                continue
            before, outcome, task = self.states[name], _outcome(row), row.task.removeprefix("instance.")
            allowed, after = _MEANING.get((task, outcome), (None, None))
            if name not in self.disturbed:
                if allowed is not None and before not in allowed:
                    self.found.violations.append(f"3: {row.id}: {row.task} ended as {outcome} when {name} was {before}")
                if allowed is None and outcome not in ("REVOKED", "UNKNOWN_INSTANCE"):
                    self.found.violations.append(f"3: {row.id}: {row.task} ended as {outcome}: {row.error}")
            if task in ("stop", "reboot") and outcome in ("TIMED_OUT", "REVOKED") and row.attempts and before != DOWN:
                self.states[name] = EITHER  # its power button was pressed, and it may still do as it was told
            elif before == EITHER and task not in ("start", "stop", "reboot", "cleanup"):
                pass
            elif after is not None:
                self.states[name] = PAUSED if after == RUNNING and row.arguments.get("paused") else after
            elif outcome == "REVOKED" and before not in (DOWN, EITHER):
                self.states[name] = UP
        for name in self.names:
            found = self.node.row(name)
            now = DOWN if found is None or found.runtime is None else str(found.state)
            before = self.states[name]
            expected = {UP: now != DOWN, EITHER: True}.get(before, before == now)
            if name not in self.disturbed and not expected:
                self.found.violations.append(f"3: {name} is {now}, and its jobs left it {before}")
            self.states[name] = EITHER if before == EITHER and now != DOWN else now


def _outcome(row: JobRow) -> str:
    return "REVOKED" if row.state == "REVOKED" else str((row.error or {}).get("code", row.state))


_ALIVE = {RUNNING, PAUSED, UP, EITHER}
_DEAD = {DOWN, EITHER}
_ALL = _ALIVE | _DEAD
_MEANING: dict[tuple[str, str], tuple[set[str], str | None]] = {
    ("start", "SUCCESS"): (_DEAD, RUNNING),
    ("start", "ALREADY_RUNNING"): (_ALIVE, None),
    ("stop", "SUCCESS"): (_ALL, DOWN),
    ("stop", "TIMED_OUT"): (_ALIVE, EITHER),
    ("reboot", "SUCCESS"): (_ALIVE, UP),
    ("reboot", "NOT_RUNNING"): (_DEAD, None),
    ("reboot", "TIMED_OUT"): (_ALIVE, EITHER),
    ("pause", "SUCCESS"): (_ALIVE, PAUSED),
    ("pause", "NOT_RUNNING"): (_DEAD, None),
    ("resume", "SUCCESS"): (_ALIVE, RUNNING),
    ("resume", "NOT_RUNNING"): (_DEAD, None),
    ("cleanup", "SUCCESS"): (_DEAD, DOWN),
    ("cleanup", "ALREADY_RUNNING"): (_ALIVE, None),
}
"""What the end of a job says of the instance before it, and what it leaves; None leaves it as it was."""

_MakeJob = Callable[[random.Random, str], tuple[str, dict[str, Any]]]
_JOBS: list[_MakeJob] = [
    *[lambda rng, name: ("instance.start", {"paused": rng.random() < 0.15})] * 8,
    *[lambda rng, name: ("instance.stop", {"name": name, "force": True})] * 3,
    *[lambda rng, name: ("instance.stop", {"name": name, "timeout_s": rng.choice([0.5, 3])})] * 2,
    lambda rng, name: ("instance.stop", {"name": name, "timeout_s": 0.5, "on_timeout": "fail"}),
    *[lambda rng, name: ("instance.reboot", {"name": name, "mode": rng.choice(["hard", "reset"])})] * 2,
    lambda rng, name: ("instance.reboot", {"name": name, "timeout_s": rng.choice([0.5, 3])}),
    *[lambda rng, name: (f"instance.{rng.choice(['pause', 'resume'])}", {"name": name})] * 3,
    lambda rng, name: ("instance.cleanup", {"name": name}),
    lambda rng, name: ("instance.list", {}),
]


def _kill_worker(bed: _Bed, _rng: random.Random) -> bool:
    bed.node.restart_worker()
    return True


def _end_worker(bed: _Bed, _rng: random.Random) -> bool:
    bed.node.kill_worker(signal.SIGTERM)
    bed.node.start_worker()
    return True


def _kill_qemu(bed: _Bed, rng: random.Random) -> bool:
    name = rng.choice(bed.names)
    bed.disturbed.add(name)
    row = bed.node.row(name)
    if row is None or row.runtime is None or row.runtime.pid not in bed.node.qemu_pids():
        return False
    with suppress(ProcessLookupError):
        os.kill(row.runtime.pid, signal.SIGKILL)
    return True


_FAULTS: dict[str, Callable[[_Bed, random.Random], bool]] = {
    "worker killed": _kill_worker,
    "worker ended": _end_worker,
    "QEMU killed": _kill_qemu,
    "broker killed": lambda bed, _rng: kill_broker(bed.node.settings),
    "worker frozen": lambda bed, rng: freeze_worker(bed.node, rng.uniform(0.5, 2)),
}
