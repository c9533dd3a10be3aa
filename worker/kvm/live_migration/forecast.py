"""How long a live migration takes, and whether it comes to an end: the arithmetic of passes, and the dirty rate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from worker.errors import TimedOut
from worker.kvm.qmp import Monitor

MIB = 2**20
ASSUMED_BYTES_S = 1_000_000_000
"""For "unlimited", before anything was sent: what one connection of QEMU carries over a fast network."""
_SHRINKS = 0.99  # a pass that leaves more than this of the one before does not get anywhere in useful time
_SAMPLE_PAGES = 4096
"""A GiB: the most that QEMU takes. Never the mode ``dirty-bitmap``, which is exact: QEMU 7.2 under TCG dies of it."""
_CHECK_S = 0.1
_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Forecast:
    """What is to be expected. Where it does not converge: what it takes if the guest is stopped after the next pass."""

    converges: bool
    seconds: float
    downtime_ms: float


def forecast(remaining_bytes: float, dirty_rate: float, bandwidth: float, downtime_ms: float) -> Forecast:
    """From ``remaining_bytes`` on, with ``dirty_rate`` and ``bandwidth`` in bytes/s (more than 0).

    Each pass sends what was dirty at its beginning; what the guest writes meanwhile is the next one's.
    """
    left, seconds = float(remaining_bytes), 0.0
    fits = bandwidth * downtime_ms / 1000
    while left > fits:
        takes = left / bandwidth
        dirtied = min(dirty_rate * takes, remaining_bytes)
        seconds += takes
        if dirtied > left * _SHRINKS and dirtied > fits:
            return Forecast(False, seconds + dirtied / bandwidth, dirtied / bandwidth * 1000)
        left = dirtied
    return Forecast(True, seconds + left / bandwidth, left / bandwidth * 1000)


def predict(memory_bytes: int, dirty_rate: int, bandwidth: int, downtime_ms: int) -> dict[str, Any]:
    """What a migration would be like that has not begun. Rates in bytes/s; bandwidth 0 is unlimited.

    Memory that the guest never touched is sent as a few bytes a page, so that the truth is often better.
    """
    expected = forecast(memory_bytes, dirty_rate, bandwidth or ASSUMED_BYTES_S, downtime_ms)
    return {
        "total_s": round(expected.seconds, 3),
        "downtime_ms": math.ceil(expected.downtime_ms),
        "dirty_rate_bytes_s": dirty_rate,
        "converges": expected.converges,
    }


def sample_dirty_rate(monitor: Monitor, seconds: float = 1.0, check: Callable[[], None] = lambda: None) -> int:
    """How much memory the running guest writes, in bytes/s, over whole ``seconds`` (at least one, at most 60).

    ``check`` is called meanwhile; what it raises ends the waiting, and QEMU ends its measurement by itself. Raises
    QemuFailed where QEMU measures already, TimedOut when no result comes. The guest is hardly slowed down.
    """
    whole_s = min(60, max(1, math.ceil(seconds)))
    monitor.execute("calc-dirty-rate", {"calc-time": whole_s, "mode": "page-sampling", "sample-pages": _SAMPLE_PAGES})
    deadline = time.monotonic() + whole_s + _PATIENCE_S
    while True:
        check()
        measured = monitor.execute("query-dirty-rate")
        if measured["status"] == "measured":
            return int(measured["dirty-rate"]) * MIB
        if time.monotonic() > deadline:
            raise TimedOut(f"QEMU had not measured the dirty rate {_PATIENCE_S:g} s after it should have")
        time.sleep(_CHECK_S)
