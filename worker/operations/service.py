"""A worker's standing parts: made before the first job, kept in order by a heartbeat, let go at the end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta

import structlog

from hostler import embedded
from hostler.settings import Settings
from migrations import schema
from models import Database
from worker.kvm.qmp import EventLoop
from worker.operations import incarnation
from worker.operations.context import NodeContext
from worker.operations.guests import Guests
from worker.operations.incarnation import NodeLock
from worker.operations.ledger import Wakeup
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
        self._lock = lock
        self._stopping = threading.Event()
        self._heart: threading.Thread | None = None

    @classmethod
    def open(cls, settings: Settings) -> Service:
        """Become the node's worker: schema, lock, incarnation, adoption, and the predecessor's jobs freed.

        Raises SecondWorker, SchemaOutdated, ServiceUnreachable or what the database driver raises; nothing was changed
        then, and no guest was touched.
        """
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

    def start_heart(self, wake: Callable[[Wakeup], None]) -> None:
        """Beat until ``close``; ``wake`` sends a job's message again."""
        self._heart = threading.Thread(target=self._beat, args=(wake,), name="heartbeat", daemon=True)
        self._heart.start()

    def _beat(self, wake: Callable[[Wakeup], None]) -> None:
        while not self._stopping.wait(HEARTBEAT_S):
            try:
                embedded.ensure(self.node.settings)
                incarnation.beat(self.node.database, self.node.incarnation)
                self.guests.tend()
                for wakeup in self.node.ledger.forgotten(FORGOTTEN_AFTER):
                    wake(wakeup)
            except Exception as exc:
                log.warning("heartbeat failed; trying again", reason=str(exc))

    def close(self) -> None:
        """End this incarnation. Every guest runs on."""
        self._stopping.set()
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
