"""What to do with a live migration that does not come to its end by itself. Pure: it decides, others act."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

MARGIN = 0.05
"""A pass that has less than this share less to send than the best before it gets nowhere."""
STUCK_S = 60.0
"""Without a single byte for so long, the connection is taken for dead, whatever the deadline."""

What = Literal["raise-downtime", "postcopy", "force", "abort"]


@dataclass(frozen=True)
class Limits:
    """How far one goes. ``downtime_max_ms`` above ``downtime_ms`` lets the downtime grow; ``on_deadline`` is abort,
    force (stop the guest's processors, so that it ends) or postcopy; ``postcopy`` is never, if-needed or at-once."""

    downtime_ms: int
    deadline_s: float
    downtime_max_ms: int = 0
    on_deadline: What = "abort"
    postcopy: Literal["never", "if-needed", "at-once"] = "never"


@dataclass(frozen=True)
class Decision:
    """Something to do now, and why, in words for people. ``value`` is the new downtime in ms, else None."""

    what: What
    why: str
    value: int | None = None


class Convergence:
    """The judge of one migration. ``limits`` may be exchanged while it goes on; a raised downtime is written there."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._made: set[What] = set()
        self._passes = _Passes()
        self._sent = (-1, 0.0)  # bytes, and since when they are no more

    def decide(self, meta: dict[str, Any], elapsed_s: float) -> Decision | None:
        """What is to be done, from the progress (``Progress.feed``) at ``elapsed_s`` after the start of the transfer.

        Each thing is decided once, save that the downtime may be raised more than once, never twice to the same value.
        """
        if meta["status"] not in ("setup", "active"):
            return None
        stalled = self._passes.stalled_by(meta["pass"], meta["remaining_bytes"])
        decision = self._stuck(meta, elapsed_s) or self._at_once(meta) or self._late(meta, elapsed_s)
        if decision is None and stalled and not self._made & {"postcopy", "force"}:
            decision = self._stalled(meta)
        if decision is None or decision.what in self._made:
            return None
        if decision.what != "raise-downtime":
            self._made.add(decision.what)
        return decision

    def _stuck(self, meta: dict[str, Any], elapsed_s: float) -> Decision | None:
        if meta["transferred_bytes"] != self._sent[0]:
            self._sent = (meta["transferred_bytes"], elapsed_s)
        silent_s = elapsed_s - self._sent[1]
        return Decision("abort", f"not a byte was sent for {silent_s:.0f} s") if silent_s >= STUCK_S else None

    def _at_once(self, meta: dict[str, Any]) -> Decision | None:
        if self.limits.postcopy != "at-once" or meta["status"] != "active" or "postcopy" in self._made:
            return None
        return Decision("postcopy", "post-copy was wanted from the first pass on") if meta["pass"] else None

    def _late(self, meta: dict[str, Any], elapsed_s: float) -> Decision | None:
        if elapsed_s < self.limits.deadline_s or "postcopy" in self._made:
            return None
        # Where nothing was sent yet there is nothing that could be hurried.
        what: What = self.limits.on_deadline if meta["status"] == "active" else "abort"
        why = f"the deadline of {self.limits.deadline_s:g} s is over in pass {meta['pass']}"
        return Decision(what, f"{why}, with {_mib(meta['remaining_bytes'])} MiB to send")

    def _stalled(self, meta: dict[str, Any]) -> Decision | None:
        limits = self.limits
        size, best = self._passes.size, self._passes.best
        why = f"pass {meta['pass']} has {_mib(size)} MiB to send, the best before it had {_mib(best)} MiB"
        throughput = meta["throughput_bytes_s"]
        needed_ms = math.ceil(1100 * size / throughput) if throughput else limits.downtime_max_ms + 1
        if limits.postcopy == "if-needed" and needed_ms > max(limits.downtime_ms, limits.downtime_max_ms):
            return Decision("postcopy", f"{why}; a downtime of {needed_ms} ms would be needed")
        wanted_ms = min(limits.downtime_max_ms, max(needed_ms, 2 * limits.downtime_ms))
        if wanted_ms <= limits.downtime_ms:
            return None
        self.limits = replace(limits, downtime_ms=wanted_ms)
        return Decision("raise-downtime", f"{why}; a downtime of {needed_ms} ms is needed", wanted_ms)


class _Passes:
    """How much each pass had to send at its beginning. The first one, of the whole memory, says nothing."""

    def __init__(self) -> None:
        self.size = 0
        self.best = 0
        self._number = 1

    def stalled_by(self, number: int, remaining: int) -> bool:
        """Whether a pass has just begun that has no less to send than the best one before it."""
        if number <= self._number:
            return False
        if self._number >= 2:
            self.best = min(self.best or self.size, self.size)
        self._number, self.size = number, remaining
        return bool(self.best) and remaining >= self.best * (1 - MARGIN)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f}"
