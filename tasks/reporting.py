"""Telling the world how a job goes: the result backend for its master, an event for Flower.

From a thread of its own that may fail and that nobody waits for. SQL has it already; only the newest report of a job
matters, so that a slow backend makes reports rarer and never a job slower.

A report may come late: its job ended meanwhile, in another thread, by another node's cancel, or while the report was
sent again and again over an outage. It then stands in the result's place, for ever. No backend offers to publish unless
there is a result, so each job that was reported on is in doubt until the ledger was asked afterwards.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable
from itertools import islice
from typing import Any

import structlog
from celery import Celery
from celery.app.task import Context

from hostler.contract import JobState
from hostler.errors import OperationFailed

log = structlog.get_logger(__name__)

SETTLE_S = 2.0
"""How long a finished job waits for a report under way, so that it cannot overwrite the job's result."""

PERIOD_S = 0.1
"""How often one job is reported on at most: phases that are over sooner cost more to tell than to do."""

LOOK_AFTER_S = 0.5
"""How long a job stays in doubt: the ledger is asked once for all reports of that time."""
LOOK_AGAIN_S = 2.0
"""After the ledger or the backend did not answer."""
LOOK_AT_MAX = 200

EVENTS = {JobState.WAITING: "task-Received", JobState.PROGRESS: "task-Started", JobState.RETRY: "task-Retry"}
"""Celery's event consumers make a type they do not know into a state by writing it in capitals. So Flower shows these
in states that it has buttons for, to revoke and to terminate, and that a later REVOKED replaces (it does not replace a
word of our own), while its metrics count the true task-received and task-started once."""

Meta = dict[str, Any] | OperationFailed
Report = tuple[Context, JobState, Meta]
Restore = Callable[[Collection[str]], Collection[str]]


class Reporter:
    """Publishes the latest report of each job, at once or PERIOD_S after the one before.

    ``restore`` is given jobs in doubt. It sees to it that the backend has the results of those that have ended, and
    returns those for which it could not; when it raises, it is given all of them again.
    """

    def __init__(self, app: Celery, hostname: str, restore: Restore) -> None:
        self._app = app
        self._hostname = hostname
        self._restore = restore
        self._doubted: set[str] = set()
        self._look_at = 0.0
        self._pending: dict[str, Report] = {}
        self._publishing: str | None = None
        self._told_at: dict[str, float] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self._thread.start()

    def report(self, request: Context, state: JobState, meta: Meta) -> None:
        """Publish ``meta`` soon; an older report of the same job that was not published yet is passed over."""
        with self._changed:
            self._pending[request.id] = (request, state, meta)
            self._changed.notify_all()

    def hurry(self, job_id: str) -> None:
        """Publish at once what is still to be published of a job: another node tells how it goes on."""
        with self._changed:
            self._told_at.pop(job_id, None)
            self._changed.notify_all()

    def settle(self, job_id: str) -> None:
        """Forget what is still to be published of a job: its end comes next."""
        with self._changed:
            self._pending.pop(job_id, None)
            self._changed.wait_for(lambda: self._publishing != job_id, SETTLE_S)

    def doubt(self, job_ids: Iterable[str]) -> None:
        """Make sure soon that the backend has the results of those jobs that have ended."""
        with self._changed:
            self._put_in_doubt(job_ids)

    def close(self) -> None:
        """Publish nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while not self._closed:
            report, doubted = self._next()
            if report:
                self._try_to_publish(report)
            elif doubted:
                self._try_to_restore(doubted)

    def _next(self) -> tuple[Report | None, set[str]]:
        """What is to be done, as soon as there is something: publish a report, or look at jobs in doubt."""
        with self._changed:
            while not self._closed:
                left_s = self._look_at - time.monotonic() if self._doubted else None
                if left_s is not None and left_s <= 0:
                    doubted = set(islice(self._doubted, LOOK_AT_MAX))
                    self._doubted -= doubted
                    return None, doubted
                due_s = {job_id: self._due_in_s(job_id) for job_id in self._pending}
                if due := next((job_id for job_id, wait_s in due_s.items() if wait_s <= 0), None):
                    self._publishing = due
                    return self._pending.pop(due), set()
                self._changed.wait(min(filter(None, (left_s, *due_s.values())), default=None))
            return None, set()

    def _due_in_s(self, job_id: str) -> float:
        return self._told_at.get(job_id, 0.0) + PERIOD_S - time.monotonic()

    def _put_in_doubt(self, job_ids: Iterable[str]) -> None:
        if not self._doubted:
            self._look_at = time.monotonic() + LOOK_AFTER_S
        self._doubted.update(job_ids)
        self._changed.notify_all()

    def _try_to_publish(self, report: Report) -> None:
        job_id = report[0].id
        try:
            self._publish(*report)
        except Exception as exc:
            log.warning("a job's progress could not be published", job=job_id, reason=str(exc))
        with self._changed:
            self._publishing = None
            now = time.monotonic()
            self._told_at = {each: at for each, at in self._told_at.items() if at > now - PERIOD_S} | {job_id: now}
            self._put_in_doubt([job_id])  # also after a failure: it may have arrived, and only the answer got lost

    def _try_to_restore(self, doubted: set[str]) -> None:
        left: Collection[str] = doubted
        try:
            left = self._restore(doubted)
        except Exception as exc:
            log.warning("whether reports came late could not be seen; looking again soon", reason=str(exc))
        if left:
            with self._changed:
                self._put_in_doubt(left)
                self._look_at = time.monotonic() + LOOK_AGAIN_S

    def _publish(self, request: Context, state: JobState, meta: Meta) -> None:
        backend = self._app.backend
        # The public store_result would retry through an outage, and hold up the reports of all other jobs.
        backend._store_result(request.id, backend.encode_result(meta, state), state, None, request=request)
        with self._app.events.default_dispatcher(hostname=self._hostname) as events:
            # Flower shows a task's `result` field, and no field of its own making.
            text = f"{meta['percent']} % {meta['message']}" if isinstance(meta, dict) else f"put off: {meta}"
            events.send(EVENTS[state], uuid=request.id, result=text)
