"""A job of a node without a worker says so: another node's worker tells its master, through the result backend.

Of the living workers on one database one is the watcher (two at once do no harm). Each beat it looks for nodes without
a worker, in the database, and for queues of nodes that the database does not know. What it tells never takes the place
of a result, and the node's own reports replace it when its worker is back.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass, field

import structlog
from celery import Celery

from hostler.contract import worker_name
from models import Database
from tasks import queues
from tasks.queues import Queues
from tasks.told import Report, as_it_is, of_job, of_message, say, taken_soon
from worker.operations import presence
from worker.operations.service import HEARTBEAT_S, Service

log = structlog.get_logger(__name__)

JOBS_MAX = 300
"""How many jobs are told of in one beat; those of a longer queue have their turn in the next ones."""

JOBS_AT_START_MAX = 1000
STRANGE_MAX = 100
PING_S = 1.0


@dataclass
class _Absence:
    """A node without a worker, and how far its jobs were told: nobody else changes them meanwhile."""

    message: str
    sequence: int = 0
    offsets: dict[str, int] = field(default_factory=dict)


class Watcher:
    """Looks after the nodes without a worker, in a thread of its own, for broker and backend may keep it waiting."""

    def __init__(self, app: Celery, database: Database, node: str) -> None:
        self._app = app
        self._database = database
        self._node = node
        self._absences: dict[str, _Absence] = {}
        self._strange: set[str] = set()
        self._cursor = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def start(self) -> None:
        """Look with every beat from now on."""
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._stopping.set()
        self._thread.join(timeout=PING_S)

    def _run(self) -> None:
        while not self._stopping.wait(HEARTBEAT_S):
            try:
                self.look()
            except Exception as exc:
                self._absences.clear()  # whatever was not told yet is looked at anew
                log.warning("the jobs of absent nodes could not be looked at", reason=str(exc))

    def look(self) -> None:
        """One beat's work. Raises whatever database, broker or backend raise; the next look makes up for it."""
        if not presence.is_watcher(self._database, self._node):
            self._absences.clear()
            return
        with queues.looking(self._app) as broker:
            absent = self._absent(broker)
            self._absences = {
                node: known if (known := self._absences.get(node)) and known.message == message else _Absence(message)
                for node, message in absent.items()
            }
            reports: list[Report] = []
            for node in absent:
                reports += self._of_ledger(node, JOBS_MAX - len(reports))
                reports += self._of_queue(node, broker, JOBS_MAX - len(reports))
        if reports:
            self._tell(reports)

    def _absent(self, broker: Queues | None) -> dict[str, str]:
        """The nodes without a worker, and what is to be said of each."""
        known = presence.presences(self._database)
        absent = {node: found.absence for node, found in known.items() if not found.alive}
        if broker:
            self._cursor, met = broker.scan(self._cursor)
            strange = sorted((self._strange | met) - known.keys())[:STRANGE_MAX]
            self._strange = {node for node in strange if broker.size(node)}
        return absent | {node: presence.never_seen(node) for node in self._strange - known.keys()}

    def _of_ledger(self, node: str, limit: int) -> list[Report]:
        absence = self._absences[node]
        jobs = presence.open_jobs(self._database, node, absence.sequence, limit) if limit > 0 else []
        if jobs:
            absence.sequence = jobs[-1].sequence
        return [of_job(job, absence.message) for job in jobs]

    def _of_queue(self, node: str, broker: Queues | None, limit: int) -> list[Report]:
        if broker is None or limit <= 0:
            return []
        absence = self._absences[node]
        found = list(broker.read(node, absence.offsets, limit))
        received = presence.known_jobs(self._database, [queued.job_id for queued in found])
        return [of_message(queued, absence.message) for queued in found if queued.job_id not in received]

    def _tell(self, reports: list[Report]) -> None:
        answered = self._answering({report.node for report in reports})
        for node in answered:
            self._absences.pop(node, None)
        told = [report for report in reports if report.node not in answered and say(self._app, report)]
        if told:
            log.info("told jobs that their node has no worker", jobs=len(told), nodes=sorted({r.node for r in told}))
        self._repair(told)

    def _answering(self, nodes: Collection[str]) -> set[str]:
        """Those that live all the same: on another database, or with a clock that goes wrong."""
        names = {worker_name(node): node for node in nodes}
        replies = self._app.control.ping(destination=[*names], timeout=PING_S, limit=len(names))
        return {names[name] for reply in replies or () for name in reply if name in names}

    def _repair(self, told: list[Report]) -> None:
        """Take back what was said of nodes whose worker came back in between."""
        known = presence.presences(self._database)
        back = [report for report in told if report.node in known and known[report.node].alive]
        if back:
            rows = presence.known_jobs(self._database, [report.job_id for report in back])
            for report in back:
                row = rows.get(report.job_id)
                say(self._app, as_it_is(row) if row else taken_soon(report))


def tell_own(app: Celery, database: Database, node: str) -> None:
    """A worker that is back takes back what was said in its absence. To be called before its first delivery."""
    try:
        reports = [as_it_is(job) for job in presence.open_jobs(database, node, 0, JOBS_AT_START_MAX)]
        with queues.looking(app) as broker:
            found = list(broker.read(node, {}, JOBS_AT_START_MAX)) if broker else []
        received = presence.known_jobs(database, [queued.job_id for queued in found])
        reports += [taken_soon(of_message(queued, "")) for queued in found if queued.job_id not in received]
        for report in reports:
            say(app, report, only_if_told=True)
    except Exception as exc:
        log.warning("what was said while there was no worker could not be taken back", reason=str(exc))


_watchers: list[Watcher] = []


def watch(app: Celery, service: Service) -> None:
    """Start this process's watcher."""
    _watchers[:] = [Watcher(app, service.node.database, service.node.name)]
    _watchers[0].start()


def watch_no_more() -> None:
    """End it."""
    while _watchers:
        _watchers.pop().close()
