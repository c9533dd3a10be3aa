"""Celery's consumer with the ledger in front of it: a message is recorded before it is acknowledged."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import structlog
from celery.worker.consumer import Consumer
from celery.worker.request import Request
from celery.worker.state import task_ready
from sqlalchemy.exc import SQLAlchemyError

from hostler.contract import ErrorCode, JobState
from hostler.errors import OperationFailed
from hostler.payloads import instance_of
from models import utc_now
from tasks import outcome
from tasks.boundary import receipt_of
from worker.operations.receipts import Decision, Verdict, is_job_id
from worker.operations.service import current

log = structlog.get_logger(__name__)

_NOT_NEEDED = {"without_mingle": True, "without_gossip": True}
"""Steps by which workers share revoked ids and elect leaders: two seconds of every start, of no use to us."""

DATABASE_RETRY_S = 1.0


class NodeConsumer(Consumer):
    """Consumes the node's queue: each message goes through the ledger, which runs, parks or drops it."""

    def __init__(
        self, on_task_request: Callable[[Request], Any], *, worker_options: dict[str, Any] | None = None, **options: Any
    ) -> None:
        self._run = on_task_request
        super().__init__(self._receive, worker_options=(worker_options or {}) | _NOT_NEEDED, **options)

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        """Celery's handler, except that no message whatever can end the worker."""
        handle = super().create_task_handler(*args, **kwargs)

        def guarded(message: Any) -> Any:
            try:
                return handle(message)
            except (ValueError, TypeError, KeyError, AttributeError, LookupError) as exc:
                return self.on_decode_error(message, exc)

        return guarded

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """A message whose body cannot be read: its job fails with INVALID_ARGUMENT, where it has an id to say so to."""
        super().on_decode_error(message, exc)
        job_id = (message.headers or {}).get("id")
        if isinstance(job_id, str) and is_job_id(job_id):
            reason = f"the message's body cannot be read: {exc}"
            details = {"errors": [{"field": "message", "reason": reason}]}
            failure = OperationFailed(ErrorCode.INVALID_ARGUMENT, reason, details)
            self.app.backend.mark_as_failure(job_id, failure)

    def _receive(self, request: Request) -> None:
        decision = self._decide(request)
        if decision.verdict is Verdict.RUN:
            request.request_dict["hostler_attempt"] = decision.attempt
            self._run(request)
            return
        request.acknowledge()
        task_ready(request)
        if decision.verdict is Verdict.WAIT:
            self._report_waiting(request, decision)
        elif decision.verdict is Verdict.REVOKED:
            outcome.mark_revoked(self.app, request.id, decision.message, request._context)
        else:
            log.info("dropped a duplicate delivery", job=request.id, task=request.name)

    def _decide(self, request: Request) -> Decision:
        service = current()
        if not is_job_id(request.id):
            log.error("dropped a message whose id is not 1 to 255 visible ASCII characters", id=request.id)
            return Decision(Verdict.DROP)
        arguments = request.kwargs if isinstance(request.kwargs, dict) else {}
        priority = min(9, max(0, request.delivery_info.get("priority") or 0))
        receipt = receipt_of(request.id, request.type, arguments, priority)
        while True:
            try:
                return service.node.ledger.receive(receipt)
            except SQLAlchemyError as exc:
                # Nothing is acknowledged meanwhile: the messages stay with the broker until the ledger can have them.
                log.error("the database is away; jobs wait with the broker", reason=str(exc))
                time.sleep(DATABASE_RETRY_S)

    @staticmethod
    def _report_waiting(request: Request, decision: Decision) -> None:
        meta = {
            "phase": "waiting",
            "percent": 0,
            "message": decision.message,
            "instance": instance_of(request.kwargs),
            "node": current().node.name,
            "updated_at": utc_now().isoformat(),
            "waiting_for": list(decision.waiting_for),
        }
        outcome.report(request._context, JobState.WAITING, meta)
