"""A worker's standing parts: made before the first job, kept in order by a heartbeat, let go at the end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

import structlog

from hostler import embedded
from hostler.settings import Settings
from migrations import schema
from models import Database, utc_now
from worker.kvm.qmp import EventLoop
from worker.operations import incarnation, wanted_rows
from worker.operations.audit.patrol import Patrol
from worker.operations.context import JobContext, NodeContext
from worker.operations.guests import Guests
from worker.operations.host import require_fit
from worker.operations.incarnation import NodeLock
from worker.operations.live_migration import leftovers
from worker.operations.pruning import Pruner
from worker.operations.receipts import Ended, Wakeup
from worker.operations.reconcile import adopt_guests

log = structlog.get_logger(__name__)

HEARTBEAT_S = 5.0
FORGOTTEN_AFTER = timedelta(seconds=30)
"""A message that a broker has not delivered after this is sent again; a second delivery does no harm."""


class Service:
    """One worker incarnation: its node, its guests, and the jobs it took over."""

    def __init__(self, node: NodeContext, guests: Guests, lock: NodeLock, left_behind: list[Wakeup]) -> None:
        self.node = node
        self.guests = guests
        self.left_behind = left_behind
        self.unpublished = node.ledger.unpublished()
        self._lock = lock
        self._jobs: dict[str, JobContext] = {}
        self._stopping = threading.Event()
        self._nudged = threading.Event()
        self._due_at = self._next_due_at()
        node.wake_at = self.wake_at
        self._pruner = Pruner(node.database, node.settings)
        self._patrol = Patrol(node, guests, node.settings.audit_interval_s)
        self._heart: threading.Thread | None = None

    @classmethod
    def open(cls, settings: Settings) -> Service:
        """Become the node's worker: schema, lock, incarnation, adoption, and the predecessor's jobs freed.

        Raises HostUnfit, SecondWorker, SchemaOutdated, ServiceUnreachable or what the database driver raises; nothing
        was changed then, and no guest was touched.
        """
        require_fit(settings)
        embedded.ensure(settings)
        lock = NodeLock(settings.state_dir, settings.node)
        try:
            database = Database(settings.effective_database_url)
            schema.ensure_current(database, may_upgrade=settings.embedded_database)
            me = incarnation.enter(database, settings.node)
        except BaseException:
            lock.release()
            raise
        node = NodeContext(settings, database, me, EventLoop())
        guests = Guests(node)
        left_behind = node.ledger.take_over()
        adopt_guests(node, guests)
        return cls(node, guests, lock, left_behind)

    @contextmanager
    def running(self, job: JobContext) -> Iterator[None]:
        """Keep a job within reach of ``cancel_running`` while it is carried out."""
        self._jobs[job.id] = job
        try:
            yield
        finally:
            self._jobs.pop(job.id, None)

    def cancel_running(self, job_id: str) -> dict[str, str]:
        """Ask a running job to give up; the answer has ``outcome`` and ``message``."""
        job = self._jobs.get(job_id)
        if job is None:
            return {
                "outcome": "running",
                "message": "it runs on another node, is just ending, or gives up when it is taken up again",
            }
        if job.cancel():
            return {"outcome": "requested", "message": f"it gives up in phase {job.current_phase} and undoes its work"}
        return {"outcome": "too_late", "message": f"too late: {job.current_phase}, it will finish"}

    def wake_at(self, at: datetime | None) -> None:
        """Something is due at ``at``, a job that was put off or a guest's restart: see to it then."""
        if at:
            self._due_at = min(at, self._due_at or at)
            self._nudged.set()

    def _next_due_at(self) -> datetime | None:
        return min(filter(None, (self.node.ledger.next_retry_at(), wanted_rows.next_at(self.node))), default=None)

    def start_heart(self, carry_out: Callable[[Ended], None]) -> None:
        """Beat until ``close``; ``carry_out`` sends the messages of jobs to wake."""
        self._heart = threading.Thread(target=self._beat, args=(carry_out,), name="heartbeat", daemon=True)
        self._heart.start()

    def _beat(self, carry_out: Callable[[Ended], None]) -> None:
        beat_at = 0.0
        while not self._stopping.is_set():
            try:
                if self._due_at and self._due_at <= utc_now():
                    carry_out(Ended(self.node.ledger.due()))
                    carry_out(Ended(wanted_rows.due(self.node)))
                    self._due_at = self._next_due_at()
                if time.monotonic() >= beat_at:
                    beat_at = time.monotonic() + HEARTBEAT_S
                    self._tend(carry_out)
            except Exception as exc:
                log.warning("heartbeat failed; trying again", reason=str(exc))
            self._nudged.wait(self._pause_s(beat_at))
            self._nudged.clear()

    def _pause_s(self, beat_at: float) -> float:
        until_due_s = (self._due_at - utc_now()).total_seconds() if self._due_at else HEARTBEAT_S
        return max(0.05, min(until_due_s, beat_at - time.monotonic()))

    def _tend(self, carry_out: Callable[[Ended], None]) -> None:
        try:
            incarnation.beat(self.node.database, self.node.incarnation)
        except incarnation.NodeFenced as exc:
            log.error(exc.message)
            os.kill(os.getpid(), signal.SIGTERM)  # no more jobs; what it had is other nodes' by now
            raise
        embedded.ensure(self.node.settings)
        self.guests.tend()
        leftovers.sweep(self.node, self.guests)
        carry_out(self.node.ledger.overdue())
        carry_out(Ended(self.node.ledger.forgotten(FORGOTTEN_AFTER)))
        self._pruner.tend()
        self._patrol.beat()
        self.wake_at(self._next_due_at())  # whoever was to tell may have lost its database in that very moment

    def close(self) -> None:
        """End this incarnation. Every guest runs on."""
        self._stopping.set()
        self._nudged.set()
        if self._heart:
            self._heart.join(timeout=10)
        self.guests.close()
        self.node.loop.close()
        try:
            incarnation.leave(self.node.database, self.node.incarnation)
        finally:
            self.node.database.dispose()
            self._lock.release()


_current: list[Service] = []


def current() -> Service:
    """The service of this process. Raises RuntimeError outside a worker."""
    if not _current:
        raise RuntimeError("no node service in this process: it is started with the worker")
    return _current[0]


def set_current(service: Service | None) -> None:
    """Make ``service`` the one of this process, or none."""
    _current[:] = [service] if service else []
