"""Telling the world how a job goes: the result backend for its master, an event for Flower.

From a thread of its own that may fail and that nobody waits for. SQL has it already; only the newest report of a job
matters, so that a slow backend makes reports rarer and never a job slower.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import structlog
from celery import Celery
from celery.app.task import Context

from hostler.contract import JobState
from hostler.errors import OperationFailed

log = structlog.get_logger(__name__)

SETTLE_S = 2.0
"""How long a finished job waits for a report under way, so that it cannot overwrite the job's result."""

Meta = dict[str, Any] | OperationFailed
Report = tuple[Context, JobState, Meta]


class Reporter:
    """Publishes the latest report of each job, in the order the jobs first reported."""

    def __init__(self, app: Celery, hostname: str) -> None:
        self._app = app
        self._hostname = hostname
        self._pending: OrderedDict[str, Report] = OrderedDict()
        self._publishing: str | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self._thread.start()

    def report(self, request: Context, state: JobState, meta: Meta) -> None:
        """Publish ``meta`` soon; an older report of the same job that was not published yet is passed over."""
        with self._changed:
            self._pending[request.id] = (request, state, meta)
            self._changed.notify_all()

    def settle(self, job_id: str) -> None:
        """Forget what is still to be published of a job: its end comes next."""
        with self._changed:
            self._pending.pop(job_id, None)
            self._changed.wait_for(lambda: self._publishing != job_id, SETTLE_S)

    def close(self) -> None:
        """Publish nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._publishing = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._pending or self._closed)
                if self._closed:
                    return
                self._publishing, report = self._pending.popitem(last=False)
            try:
                self._publish(*report)
            except Exception as exc:
                log.warning("a job's progress could not be published", job=report[0].id, reason=str(exc))

    def _publish(self, request: Context, state: JobState, meta: Meta) -> None:
        backend = self._app.backend
        # The public store_result would retry through an outage, and hold up the reports of all other jobs.
        backend._store_result(request.id, backend.encode_result(meta, state), state, None, request=request)
        with self._app.events.default_dispatcher(hostname=self._hostname) as events:
            # Flower shows a task's `result` field, and no field of its own making.
            text = f"{meta['percent']} % {meta['message']}" if isinstance(meta, dict) else f"put off: {meta}"
            events.send("task-progress", uuid=request.id, result=text)
