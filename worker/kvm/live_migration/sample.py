"""One look at a live migration, in units that say what they are, and the words in which QEMU says how it stands."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from worker.kvm.qmp import Monitor

NOT_BEGUN = "none"
COMPLETED, FAILED, CANCELLED = "completed", "failed", "cancelled"
PRE_SWITCHOVER = "pre-switchover"
POSTCOPY_ACTIVE, POSTCOPY_PAUSED, POSTCOPY_RECOVER = "postcopy-active", "postcopy-paused", "postcopy-recover"

ENDS = frozenset({NOT_BEGUN, COMPLETED, FAILED, CANCELLED})
"""Here nothing more comes. Every other word, those of a future QEMU included, is a migration on its way."""
POSTCOPY = frozenset({POSTCOPY_ACTIVE, POSTCOPY_PAUSED, POSTCOPY_RECOVER})
"""The guest is the target's, and needs the source for the rest of its memory."""
HANDED_ON = POSTCOPY | {COMPLETED}
"""From here on the source's QEMU never continues the guest by itself, and the target's can."""
GIVEN_UP = frozenset({FAILED, CANCELLED})
"""The guest is the source's, which has let it go on if it ran."""

QUERY_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Sample:
    """How a migration stood at ``at`` (seconds of the monotonic clock). What QEMU does not say is 0.

    ``status`` is QEMU's word, ``none`` before it began. ``mbps`` is QEMU's throughput in megabits per second.
    ``passes`` counts from 1. ``downtime_ms`` is known at the end, ``expected_downtime_ms`` meanwhile. ``error`` is
    QEMU's reason for a failure.
    """

    at: float
    status: str
    total_bytes: int = 0
    transferred_bytes: int = 0
    remaining_bytes: int = 0
    dirty_pages_rate: int = 0
    page_size: int = 4096
    mbps: float = 0.0
    passes: int = 0
    setup_ms: int = 0
    total_ms: int = 0
    downtime_ms: int = 0
    expected_downtime_ms: int = 0
    error: str = ""
    postcopy_requests: int = 0
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def ended(self) -> bool:
        """Whether nothing more comes: ``completed``, ``failed``, ``cancelled``, or ``none`` where nothing was begun."""
        return self.status in ENDS

    @property
    def dirty_rate_bytes_s(self) -> int:
        """What the guest writes; QEMU measures it at the end of a pass, and not more often than once a second."""
        return self.dirty_pages_rate * self.page_size


def query(monitor: Monitor) -> Sample:
    """Ask QEMU, source or target, how its migration stands (``query-migrate``). Raises QmpLost."""
    return read(monitor.execute("query-migrate", timeout_s=QUERY_TIMEOUT_S), time.monotonic())


def read(answer: dict[str, Any], at: float) -> Sample:
    """QEMU's answer to ``query-migrate``, given at ``at``."""
    ram = answer.get("ram", {})
    return Sample(
        at=at,
        status=answer.get("status", NOT_BEGUN),
        total_bytes=ram.get("total", 0),
        transferred_bytes=ram.get("transferred", 0),
        remaining_bytes=ram.get("remaining", 0),
        dirty_pages_rate=ram.get("dirty-pages-rate", 0),
        page_size=ram.get("page-size", 4096),
        mbps=ram.get("mbps", 0.0),
        passes=ram.get("dirty-sync-count", 0),
        setup_ms=answer.get("setup-time", 0),
        total_ms=answer.get("total-time", 0),
        downtime_ms=answer.get("downtime", 0),
        expected_downtime_ms=answer.get("expected-downtime", 0),
        error=answer.get("error-desc", ""),
        postcopy_requests=ram.get("postcopy-requests", 0),
        raw=answer,
    )
