"""Celery's consumer with the ledger in front of it: a message is recorded before it is acknowledged."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import structlog
from celery import bootsteps
from celery.apps.worker import safe_say
from celery.platforms import EX_FAILURE
from celery.worker.consumer import Connection, Consumer, Events
from celery.worker.request import Request
from celery.worker.state import maybe_shutdown, task_ready
from kombu.transport import redis
from kombu.utils.encoding import bytes_to_str
from sqlalchemy.exc import SQLAlchemyError

from hostler.contract import JobState, queue_name
from hostler.errors import InvalidArgument, OperationFailed
from hostler.payloads import instance_of
from models import utc_now
from tasks import outcome
from tasks.boundary import receipt_of
from worker.operations.receipts import Decision, Verdict, is_job_id
from worker.operations.service import current

log = structlog.get_logger(__name__)
T = TypeVar("T")

_NOT_NEEDED = {"without_mingle": True, "without_gossip": True}
"""Steps by which workers share revoked ids and elect leaders: two seconds of every start, of no use to us."""

_NONSENSE = (ValueError, TypeError, LookupError, AttributeError)
"""What reading a message of another shape than Celery's raises, somewhere."""

DATABASE_RETRY_S = 1.0


class _EventsAtOnce(bootsteps.StartStopStep):
    """Sends each event by itself. Celery collects them in a list that it empties after sending it, and what a thread
    of the pool adds in between is lost: one job's end in six, measured, so that Flower shows it at work for ever."""

    requires = (Events,)

    def start(self, parent: Consumer) -> None:
        parent.event_dispatcher.buffer_group = frozenset()


class _RestoreAtOnce(bootsteps.StartStopStep):
    """Puts back what a dead worker of this node, or a broken connection, had taken and not acknowledged. Celery would
    do so when the visibility timeout has passed (an hour); the keys are this node's own and it has one worker, so
    nobody holds those messages any more. One that was recorded already is dropped as a duplicate."""

    requires = (Connection,)

    def start(self, parent: Consumer) -> None:
        channel = parent.connection.default_channel
        if not isinstance(channel, redis.Channel):
            return
        qos = channel.qos
        with channel.conn_or_acquire() as client:
            # Each goes to the end that is consumed first: the latest first, so that the earliest comes before it.
            for tag in client.zrevrange(qos.unacked_index_key, 0, -1):
                qos.restore_by_tag(bytes_to_str(tag), client)


class NodeConsumer(Consumer):
    """Consumes the node's queue: each message goes through the ledger, which runs, parks or drops it."""

    class Blueprint(Consumer.Blueprint):
        """Celery's, and steps of ours."""

        default_steps = (*Consumer.Blueprint.default_steps, _EventsAtOnce, _RestoreAtOnce)

    loop: Callable[..., Any]

    def __init__(
        self, on_task_request: Callable[[Request], Any], *, worker_options: dict[str, Any] | None = None, **options: Any
    ) -> None:
        self._run = on_task_request
        # Celery consumes all queues it knows, and it knows those that were sent to: after the next connection to the
        # broker this worker would have the messages of every node that it ever woke.
        options["app"].amqp.queues.select([queue_name(current().node.name)])
        super().__init__(self._receive, worker_options=(worker_options or {}) | _NOT_NEEDED, **options)
        self._loop, self.loop = self.loop, self._guarded_loop

    def _guarded_loop(self, *args: Any) -> None:
        """Celery's loop; what the broker delivers and is no message costs the connection, not the worker."""
        try:
            self._loop(*args)
        except _NONSENSE as exc:
            log.exception("the broker delivered what is no message; connecting anew")
            raise ConnectionError(f"no message: {exc}") from exc

    def cancel_active_requests(self) -> None:
        """End the process here and now: Celery calls this for a cold shutdown (SIGQUIT, a second Ctrl-C) alone.

        It would go on to wait for the pool's threads after all. The next worker continues what they were at.
        """
        safe_say("worker: ended at once; the next one continues its jobs, and every guest runs on", sys.__stderr__)
        os._exit(EX_FAILURE)

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        """Celery's handler, except that no message whatever can end the worker."""
        handle = super().create_task_handler(*args, **kwargs)

        def guarded(message: Any) -> Any:
            try:
                return handle(message)
            except _NONSENSE as exc:
                return self.on_decode_error(message, exc)

        return guarded

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """A message whose body cannot be read: its job fails with INVALID_ARGUMENT, where it has an id to say so to."""
        if not message.acknowledged:
            super().on_decode_error(message, exc)
        self._refuse(message, "message", f"the message cannot be read: {exc}")

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        """As ``on_decode_error``, for a body of a type that is not read at all (pickle), or wrong headers."""
        super().on_invalid_task(body, message, exc)
        self._refuse(message, "message", f"the message cannot be read: {exc}")

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        """As ``on_decode_error``, for a task that no node has; Celery's own would fail it with an error of its own."""
        message.ack_log_error(logging.getLogger(__name__), self.connection_errors)
        self._refuse(message, "task", f"there is no task {message.headers.get('task')!r}")

    def _refuse(self, message: Any, field: str, reason: str) -> None:
        job_id = (message.headers or {}).get("id")
        if not isinstance(job_id, str) or not is_job_id(job_id):
            return
        if _as_soon_as_possible(lambda: current().node.ledger.knows(job_id)):
            return  # whoever sent this has an id that is a job's already, whose result is not to be touched
        failure = InvalidArgument([{"field": field, "reason": reason}])
        self.app.backend.mark_as_failure(job_id, OperationFailed(*failure.args))
        if self.event_dispatcher:
            self.event_dispatcher.send("task-failed", uuid=job_id, exception=str(failure))

    def _receive(self, request: Request) -> None:
        if not isinstance(request.args, list) or not isinstance(request.kwargs, dict):
            task_ready(request)
            raise ValueError("args must be a list, kwargs an object")
        decision = self._decide(request)
        if decision.verdict is Verdict.RUN:
            request.request_dict["hostler_attempt"] = decision.attempt
            request.request_dict["hostler_deaths"] = decision.deaths
            request.request_dict["hostler_cancelled"] = decision.cancelled
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
        priority = min(9, max(0, request.delivery_info.get("priority") or 0))
        receipt = receipt_of(request.id, request.type, request.kwargs, priority)
        # Nothing is acknowledged meanwhile: the messages stay with the broker until the ledger can have them.
        return _as_soon_as_possible(lambda: service.node.ledger.receive(receipt))

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


def _as_soon_as_possible(ask_ledger: Callable[[], T]) -> T:
    while True:
        try:
            return ask_ledger()
        except SQLAlchemyError as exc:
            log.error("the database is away; jobs wait with the broker", reason=str(exc))
            maybe_shutdown()  # a worker that is told to end must not wait for its database first
            time.sleep(DATABASE_RETRY_S)
