"""Guests leave a node: what comes next, decided anew at each look from SQL alone, so that it can be taken up again.

The largest guests go first, each to where the most memory is free: they need the largest holes, which small ones would
fill, and the small ones fit into what is left. It also keeps the end short, when the last few move at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypedDict

from hostler.contract import InstanceState, TaskName
from worker.operations.context import JobContext, NodeContext
from worker.operations.maintenance.parts import PLACING, Part, key_of, parts_of
from worker.operations.maintenance.targets import Rooms, facts_of, unusable
from worker.operations.steps import HandedOver, Step

LOOK_S = 300.0
"""How long it waits for its parts before it looks by itself."""
SHUTDOWN_S = 120.0
SPAN = (5, 99)


@dataclass(frozen=True)
class Leaving:
    """A guest as SQL has it now. ``runs``: it has a QEMU on the node it leaves; ``due``: it does not run, and is to."""

    name: str
    node: str
    state: str
    reason: str
    memory_mib: int
    spec: dict[str, Any]
    runs: bool
    due: bool


class GuestVerdict(TypedDict):
    """What became of a guest: ``moved``, ``stopped``, ``left`` (as it was) or ``failed``; ``node`` is where it is."""

    name: str
    verdict: str
    node: str
    reason: str
    job: str | None


@dataclass(frozen=True)
class How:
    """In which way the guests leave: at most ``parallel`` at once, at most ``per_link`` of them to one node."""

    parallel: int
    per_link: int
    allow_shutdown: bool = False
    options: dict[str, object] | None = None


class Evacuation:
    """One look at the guests that leave the node ``home``, for ``targets``; which it asks only where it needs them."""

    def __init__(
        self, node: NodeContext, job: JobContext, home: str, guests: list[Leaving], targets: list[str], how: How
    ) -> None:
        self._node = node
        self._job = job
        self._home = home
        self._how = how
        self._guests = sorted(guests, key=lambda guest: (-guest.memory_mib, guest.name))
        self._targets = targets
        self._parts = parts_of(node.database, job.id)
        self._open = [part for part in self._parts if not part.ended and part.kind in (*PLACING, "stop")]
        self._decided: dict[str, GuestVerdict] = {}

    def go_on(self) -> list[GuestVerdict]:
        """What became of each guest, once that is so. Raises HandedOver while some move, Cancelled."""
        steps = self._next_steps()
        if steps or self._open:
            self._tell(steps)
            waited_for = [part.step for part in self._open] + steps
            raise HandedOver(self._node.ledger.hand_over(self._job.id, waited_for, LOOK_S))
        return [self._decided[guest.name] for guest in sorted(self._guests, key=lambda guest: guest.name)]

    def _next_steps(self) -> list[Step]:
        undecided = [guest for guest in self._guests if not self._is_settled(guest)]
        if not undecided:
            return []
        facts = facts_of(self._node, self._job, self._targets, self._parts)
        gone = unusable(self._node.database, facts, self._home)
        usable = {name: part for name, part in facts.items() if name not in gone}
        memory_mib = {guest.name: guest.memory_mib for guest in self._guests}
        rooms = Rooms(self._node.database, usable, self._parts, memory_mib)
        steps = self._begin(undecided, lambda guest: self._placing(guest, rooms))
        if steps or self._open:
            return steps  # whose end may make room for others
        if stops := self._begin(undecided, self._stopping):
            return stops
        for guest in undecided:
            self._decide(guest, "left", self._why_left(guest, rooms))
        return []

    def _begin(self, guests: list[Leaving], make: Callable[[Leaving], Step | None]) -> list[Step]:
        steps: list[Step] = []
        for guest in guests:
            if len(self._open) + len(steps) >= self._how.parallel:
                break
            if step := make(guest):
                steps.append(step)
        return steps

    def _is_settled(self, guest: Leaving) -> bool:
        """Whether there is nothing to begin: a part of it is under way, or it is decided, which is noted."""
        mine = self._parts_of(guest)
        if any(not part.ended for part in mine):
            return True
        if guest.node != self._home and mine:
            stuck = guest.state == InstanceState.MIGRATING and not mine[-1].succeeded
            self._decide(guest, "failed" if stuck else "moved", mine[-1].reason)
        elif guest.node == self._home and not guest.runs and not guest.due:
            self._decide(guest, "stopped", guest.reason)
        return guest.name in self._decided

    def _placing(self, guest: Leaving, rooms: Rooms) -> Step | None:
        mine = self._parts_of(guest)
        if any(part.sent_memory for part in mine):
            return None  # what failed on the way would fail so on the next one too, after as long a time
        kind = "start" if guest.due else "move"  # one that was to be started there may run here by now
        tried = [part.place for part in mine if part.kind == kind]
        target = rooms.take(guest.memory_mib, tried, self._how.per_link)
        if target is None:
            return None
        name = f"{key_of(guest.name)}.{len(mine) + 1}"
        if guest.due:
            whole = {"instance": guest.spec}
            return Step(self._job.id, f"start.{name}", TaskName.INSTANCE_START, target, whole, guest.name)
        arguments = {"name": guest.name, "target": target, **(self._how.options or {})}
        return Step(self._job.id, f"move.{name}", TaskName.INSTANCE_MIGRATE, self._home, arguments, guest.name)

    def _stopping(self, guest: Leaving) -> Step | None:
        mine = self._parts_of(guest)
        if not self._how.allow_shutdown or not guest.runs or any(part.kind == "stop" for part in mine):
            return None
        arguments = {"name": guest.name, "timeout_s": SHUTDOWN_S, "on_timeout": "fail"}
        name = f"stop.{key_of(guest.name)}.{len(mine) + 1}"
        return Step(self._job.id, name, TaskName.INSTANCE_STOP, self._home, arguments, guest.name)

    def _why_left(self, guest: Leaving, rooms: Rooms) -> str:
        tried = [f"{part.kind} ({part.place}): {part.reason}" for part in self._parts_of(guest)]
        untried = set(rooms.free_mib) - {part.place for part in self._parts_of(guest)}
        if not rooms.free_mib:
            tried.append("no node can take it: none said how much memory it has")
        elif untried and not any(part.sent_memory for part in self._parts_of(guest)):
            tried.append(f"it has {guest.memory_mib} MiB; {rooms.in_words()}")
        return "; ".join(tried)

    def _parts_of(self, guest: Leaving) -> list[Part]:
        return [part for part in self._parts if part.instance == guest.name]

    def _decide(self, guest: Leaving, verdict: str, reason: str) -> None:
        mine = self._parts_of(guest)
        job = mine[-1].id if mine else None
        self._decided[guest.name] = GuestVerdict(
            name=guest.name, verdict=verdict, node=guest.node, reason=reason, job=job
        )

    def _tell(self, steps: Iterable[Step]) -> None:
        done, total = len(self._decided), len(self._guests)
        under_way = [f"{part.instance} ({part.kind}, {part.place})" for part in self._open]
        under_way += [f"{step.instance} ({step.name.split('.')[0]}, {step.arguments.get('target') or step.node})"
                      for step in steps]  # fmt: skip
        low, high = SPAN
        percent = low + (high - low) * done // max(1, total)
        self._job.phase("move", percent, f"{done} of {total} guests are done; under way: {', '.join(under_way)}")


def not_begun(node: NodeContext, job_id: str) -> list[Part]:
    """Its parts that nobody has begun."""
    return [part for part in parts_of(node.database, job_id) if not part.begun and not part.ended]
