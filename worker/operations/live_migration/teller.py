"""Telling how a migration goes, from a thread of its own: the migration never waits for a database."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError

from models import MigrationSample, utc_now
from worker.operations.context import JobContext, NodeContext
from worker.operations.live_migration import rows
from worker.operations.live_migration.tuning import MIB

log = structlog.get_logger(__name__)

TRANSFER_FROM, TRANSFER_TO = 25, 90
"""What of the job's percent the transfer is."""
PERIOD_S = 0.25
"""At most so often: four a second (contract.md)."""
LAST_S = 2.0
"""How long the end of a transfer waits for the last look to be kept."""
_THIN_EVERY = 500


NOT_BEGUN = {
    "status": "none", "total_bytes": 0, "transferred_bytes": 0, "remaining_bytes": 0, "throughput_bytes_s": 0,
    "dirty_rate_bytes_s": 0, "pass": 0, "expected_downtime_ms": 0, "eta_s": None, "eta_confidence": 0.0, "percent": 0.0,
    "verdict": None, "storage": None,
}  # fmt: skip
"""What is said of the memory before it moves."""


class Teller:
    """Reports and keeps the latest look, and the last one of all; those that come faster are passed over."""

    def __init__(self, node: NodeContext, job: JobContext, migration_id: str) -> None:
        self._node = node
        self._job = job
        self._id = migration_id
        self._latest: dict[str, Any] | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="migration-teller", daemon=True)
        self._kept = 0
        self._told_at = 0.0

    def __enter__(self) -> Teller:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        # What is told late must not come after what the next phase tells.
        self._thread.join(LAST_S)

    def tell(self, meta: dict[str, Any]) -> None:
        """Take note of how it stands."""
        with self._changed:
            self._latest = meta
            self._changed.notify_all()

    def tell_storage(self, done_bytes: int, total_bytes: int) -> None:
        """Take note of how the copying of disks stands, which comes before the memory."""
        self.tell(NOT_BEGUN | {"storage": {"total_bytes": total_bytes, "transferred_bytes": done_bytes}})

    def _run(self) -> None:
        while (meta := self._next()) is not None:
            try:
                self._publish(meta)
            except SQLAlchemyError as exc:
                log.info("how a migration goes could not be told", migration=self._id, reason=str(exc))

    def _next(self) -> dict[str, Any] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed, self._told_at + PERIOD_S - time.monotonic())
            self._changed.wait_for(lambda: self._latest or self._closed)
            self._told_at = time.monotonic()
            meta, self._latest = self._latest, None
            return meta

    def _publish(self, meta: dict[str, Any]) -> None:
        percent = TRANSFER_FROM + int((TRANSFER_TO - TRANSFER_FROM) * meta["percent"] / 100)
        look = {"job_id": self._id, "at": utc_now(), "data": meta}  # kept for the migration's report
        self._job.migrating(percent, _in_words(meta), meta, lambda session: session.add(MigrationSample(**look)))
        self._kept += 1
        if self._kept % _THIN_EVERY == 0 and rows.count_samples(self._node, self._id) > rows.SAMPLES_MAX:
            rows.thin_out_samples(self._node, self._id)


def _in_words(meta: dict[str, Any]) -> str:
    if disks := meta["storage"]:
        return f"disks: {disks['transferred_bytes'] / MIB:.0f} of {disks['total_bytes'] / MIB:.0f} MiB"
    left = f"{meta['remaining_bytes'] / MIB:.0f} MiB left"
    speed = f"{(meta['throughput_bytes_s'] or 0) / MIB:.0f} MiB/s"
    return f"{meta['status']}: {left}, {speed}" + (f"; {meta['verdict']}" if meta["verdict"] else "")
