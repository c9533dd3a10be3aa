"""How a job's end, or its being put off, reaches the ledger, the result backend and the jobs that waited for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import structlog
from celery import Celery
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError

from hostler.contract import FINAL_JOB_STATES, ErrorCode, JobState, queue_name
from hostler.errors import OperationFailed
from tasks.reporting import Reporter
from worker.operations.ledger import Ledger
from worker.operations.receipts import CancelOutcome, Ended, Wakeup
from worker.operations.service import Service

log = structlog.get_logger(__name__)

LEDGER_RETRY_S = 1.0
UNRECORDABLE = {
    "code": str(ErrorCode.INTERNAL),
    "message": "the job ended, but its result could not be recorded; the worker's log has the reason",
    "details": {"retryable": False},
}
shutting_down = threading.Event()
"""Set when the worker was told to end: nothing may hold it up then."""

_reporters: list[Reporter] = []


def use_reporter(reporter: Reporter | None) -> None:
    """Make ``reporter`` the one of this process, or none."""
    _reporters[:] = [reporter] if reporter else []


def report(request: Any, state: JobState, meta: dict[str, Any] | OperationFailed) -> None:
    """Publish through the process's reporter."""
    for reporter in _reporters:
        reporter.report(request, state, meta)


def as_error(failure: OperationFailed) -> dict[str, Any]:
    """A failure as the ledger keeps it."""
    return {"code": failure.code, "message": failure.message, "details": failure.details}


def settle(app: Celery, ledger: Ledger, job_id: str, finish: Callable[[], Ended]) -> None:
    """Record the end, however long the database is away, then see to the jobs that waited for this one."""
    while True:
        try:
            ended = finish()
            break
        except LookupError:
            log.error("a job ended whose row is gone", job=job_id)
            return
        except (OperationalError, InterfaceError) as exc:
            log.warning("the job's end could not be recorded; trying again", job=job_id, reason=str(exc))
            if shutting_down.wait(LEDGER_RETRY_S):
                return  # the row says that it is under way: the next worker looks at what is true and ends it
        except SQLAlchemyError:
            # What it ended with is nothing a database can keep; its instance must not wait for that for ever.
            log.exception("the job's end cannot be recorded as it is", job=job_id)
            finish = partial(ledger.fail, job_id, UNRECORDABLE)
    for reporter in _reporters:
        reporter.settle(job_id)
    carry_out(app, ended)


def carry_out(app: Celery, ended: Ended) -> None:
    """Wake and revoke what has to be. What the broker does not take now, the heartbeat sends later."""
    for wakeup in ended.wakeups:
        try:
            wake(app, wakeup)
        except Exception as exc:
            log.warning("a waiting job could not be woken; the heartbeat will", job=wakeup.job_id, reason=str(exc))
    for job_id in ended.revoked:
        mark_revoked(app, job_id, "a job that it comes after failed")


def wake(app: Celery, wakeup: Wakeup) -> None:
    """Send a job's message (again): same id, same arguments, to its node's queue."""
    app.send_task(
        wakeup.task,
        kwargs=wakeup.arguments,
        task_id=wakeup.job_id,
        queue=queue_name(wakeup.node),
        priority=wakeup.priority,
    )


def mark_revoked(app: Celery, job_id: str, message: str, request: Any = None) -> None:
    """Let the job's master and Flower see that it was revoked."""
    try:
        app.backend.mark_as_revoked(job_id, message, request=request)
        with app.events.default_dispatcher() as events:
            events.send("task-revoked", uuid=job_id, terminated=False, signum=None, expired=False)
    except Exception as exc:
        log.warning("a job is revoked, but its result could not say so", job=job_id, reason=str(exc))


def postpone(app: Celery, service: Service, request: Any, failure: OperationFailed) -> bool:
    """Put a job off after a transient failure; False when it was tried often enough, or the database is away."""
    try:
        put_off = service.node.ledger.postpone(request.id, as_error(failure))
    except (LookupError, SQLAlchemyError):
        return False
    if put_off is None:
        return False
    retry_at, ended = put_off
    log.info("a job is put off", job=request.id, reason=str(failure), retry_at=retry_at.isoformat())
    report(request, JobState.RETRY, failure)
    service.expect_retry(retry_at)
    carry_out(app, ended)
    return True


def cancel(app: Celery, service: Service, job_id: str, *, also_running: bool) -> dict[str, Any]:
    """Cancel a job: revoked at once where it has not begun, asked to give up where it runs.

    The answer says what became of it: ``revoked``, ``requested`` (it will end as REVOKED), ``too_late`` (it will
    finish), ``running`` (and was not to be disturbed) or ``finished``.
    """
    if not service.node.ledger.knows(job_id) and _state(app, job_id) != JobState.PENDING:
        # Every node is asked, and those that share no database have not heard of it.
        return {"id": job_id, "outcome": "running", "message": "another node has it"}
    outcome, ended = service.node.ledger.cancel(job_id, "cancelled before it began", also_running=also_running)
    carry_out(app, ended)
    if outcome is CancelOutcome.REVOKED:
        mark_revoked(app, job_id, "cancelled before it began")
        return {"id": job_id, "outcome": "revoked", "message": "it had not begun and never will"}
    if outcome is CancelOutcome.FINISHED:
        return {"id": job_id, "outcome": "finished", "message": "it has ended already"}
    if not also_running:
        return {"id": job_id, "outcome": "running", "message": "it runs; ask with terminate to have it give up"}
    return {"id": job_id, **service.cancel_running(job_id)}


def _state(app: Celery, job_id: str) -> str:
    return str(app.backend.get_task_meta(job_id, cache=False)["status"])


def repair_results(app: Celery, service: Service) -> None:
    """Give the result backend the ends of jobs whose worker may have died between the ledger and the backend."""
    for job in service.unpublished:
        try:
            if _state(app, job.id) in FINAL_JOB_STATES:
                continue
            log.info("a result had not reached the backend", job=job.id, state=job.state)
            if job.state == JobState.SUCCESS:
                app.backend.mark_as_done(job.id, job.result)
            elif job.state == JobState.FAILURE and job.error:
                failure = OperationFailed(job.error["code"], job.error["message"], job.error["details"])
                app.backend.mark_as_failure(job.id, failure)
            else:
                mark_revoked(app, job.id, job.message)
        except Exception as exc:
            log.warning("a result could not be repaired", job=job.id, reason=str(exc))
    service.unpublished.clear()
