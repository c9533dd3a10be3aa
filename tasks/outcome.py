"""How a job's end, or its being put off, reaches the ledger, the result backend and the jobs that waited for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import structlog
from celery import Celery
from celery.app.task import Context
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError

from hostler.contract import FINAL_JOB_STATES, ErrorCode, JobState, queue_name
from hostler.errors import OperationFailed
from hostler.hidden import shown
from models import Database, Job
from tasks.reporting import Reporter
from worker.operations import presence
from worker.operations.ledger import Ledger
from worker.operations.receipts import CancelOutcome, Ended, Wakeup
from worker.operations.service import Service

log = structlog.get_logger(__name__)

LEDGER_RETRY_S = 1.0
QUEUED = "queued"
"""The phase of a job that no worker has received, told of by another node's worker (tasks/presence.py)."""

UNRECORDABLE = {
    "code": str(ErrorCode.INTERNAL),
    "message": "the job ended, but its result could not be recorded; the worker's log has the reason",
    "details": {"retryable": False},
}
shutting_down = threading.Event()
"""Set when the worker was told to end: nothing may hold it up then."""

unsent: list[Wakeup] = []
"""Those that the broker did not take. One that is lost or sent twice does no harm: the ledger knows better."""

_reporters: list[Reporter] = []


def use_reporter(reporter: Reporter | None) -> None:
    """Make ``reporter`` the one of this process, or none."""
    _reporters[:] = [reporter] if reporter else []


def report(request: Any, state: JobState, meta: dict[str, Any] | OperationFailed) -> None:
    """Publish through the process's reporter."""
    for reporter in _reporters:
        reporter.report(request, state, meta)


def report_whole(whole: Job, meta: dict[str, Any]) -> None:
    """How a step reports in the name of the job it belongs to, which its own node ends.

    Only while that job waits for the step, as the ledger has just seen; what comes late all the same is in doubt.
    """
    report(request_of(whole.id, whole.task, whole.arguments, whole.node), JobState.PROGRESS, meta)


def doubt(job_ids: Iterable[str]) -> None:
    """Have it made sure that the result backend has the ends of these jobs, of those that have ended."""
    for reporter in _reporters:
        reporter.doubt(job_ids)


def hurry(job_id: str) -> None:
    """Publish the last report of a job before another node reports on it."""
    for reporter in _reporters:
        reporter.hurry(job_id)


def report_no_more(job_id: str) -> None:
    """Publish nothing more of a job: its end comes next, or another node's report."""
    for reporter in _reporters:
        reporter.settle(job_id)


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
    report_no_more(job_id)
    carry_out(app, ended)


def carry_out(app: Celery, ended: Ended) -> None:
    """Wake and revoke what has to be. What the broker does not take now, the heartbeat sends soon."""
    left, unsent[:] = [*unsent], []
    for wakeup in [*left, *ended.wakeups]:
        try:
            wake(app, wakeup)
        except Exception as exc:
            unsent.append(wakeup)
            log.warning("a waiting job could not be woken; the heartbeat will", job=wakeup.job_id, reason=str(exc))
    for job_id in ended.revoked:
        mark_revoked(app, job_id, "a job that it comes after failed")


def wake(app: Celery, wakeup: Wakeup) -> None:
    """Send a job's message (again): same id, same arguments, to its node's queue."""
    app.send_task(
        wakeup.task,
        kwargs=wakeup.arguments,
        kwargsrepr=shown(wakeup.arguments),
        task_id=wakeup.job_id,
        queue=queue_name(wakeup.node),
        priority=wakeup.priority,
    )


def mark_revoked(app: Celery, job_id: str, message: str, request: Any = None) -> None:
    """Let the job's master and Flower see that it was revoked, at once or, where that fails, as soon as can be."""
    report_no_more(job_id)
    try:
        _tell_revoked(app, job_id, message, request)
    except Exception as exc:
        doubt([job_id])
        log.warning("a job is revoked, but its result could not say so", job=job_id, reason=str(exc))


def _tell_revoked(app: Celery, job_id: str, message: str, request: Any) -> None:
    app.backend.mark_as_revoked(job_id, message, request=request)
    with app.events.default_dispatcher() as events:
        events.send("task-revoked", uuid=job_id, terminated=False, signum=None, expired=False)


def postpone(app: Celery, service: Service, request: Any, failure: OperationFailed) -> bool:
    """Put a job off after a transient failure, however long the database is away: that may be what failed.

    False when it was tried often enough, or the worker is to end.
    """
    while True:
        try:
            attempt = getattr(request, "hostler_attempt", None)
            put_off = service.node.ledger.postpone(request.id, as_error(failure), attempt)
            break
        except (OperationalError, InterfaceError) as exc:
            log.warning("a job could not be put off; trying again", job=request.id, reason=str(exc))
            if shutting_down.wait(LEDGER_RETRY_S):
                return False
        except (LookupError, SQLAlchemyError):
            return False
    if put_off is None:
        return False
    retry_at, ended = put_off
    log.info("a job is put off", job=request.id, reason=str(failure), retry_at=retry_at.isoformat())
    report(request, JobState.RETRY, failure)
    service.wake_at(retry_at)
    carry_out(app, ended)
    return True


def cancel(app: Celery, service: Service, job_id: str, *, also_running: bool) -> dict[str, Any]:
    """Cancel a job: revoked at once where it has not begun, asked to give up where it runs.

    The answer says what became of it: ``revoked``, ``requested`` (it will end as REVOKED), ``too_late`` (it will
    finish), ``running`` (and was not to be disturbed) or ``finished``.
    """
    if not service.node.ledger.knows(job_id) and _was_received(app, job_id):
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
    if ended.wakeups:
        return {"id": job_id, "outcome": "requested", "message": "it waited for its steps, and gives up now"}
    return {"id": job_id, **service.cancel_running(job_id)}


def _was_received(app: Celery, job_id: str) -> bool:
    meta = app.backend.get_task_meta(job_id, cache=False)
    told = meta["result"] if meta["status"] == JobState.WAITING and isinstance(meta["result"], dict) else {}
    return bool(meta["status"] != JobState.PENDING and told.get("phase") != QUEUED)


def repair_results(app: Celery, service: Service) -> None:
    """Give the result backend the ends of jobs whose worker may have died between the ledger and the backend."""
    try:
        doubt(restore_results(app, service.node.database, service.unpublished))
    except Exception as exc:
        doubt(service.unpublished)
        log.warning("results could not be repaired yet", reason=str(exc))
    service.unpublished.clear()


def restore_results(app: Celery, database: Database, job_ids: Collection[str]) -> list[str]:
    """Give the result backend the ends of those jobs that have ended, where it has none.

    Returns those for which that failed. Raises whatever a database raises that does not answer. A job that has not
    ended by now, as the ledger has it, will publish its result after us.
    """
    failed = []
    for job in presence.known_jobs(database, job_ids).values():
        try:
            if job.state in FINAL_JOB_STATES:
                _restore_result(app, job)
        except Exception as exc:
            failed.append(job.id)
            log.warning("a result could not be repaired", job=job.id, reason=str(exc))
    return failed


def _restore_result(app: Celery, job: Job) -> None:
    stored = app.backend._get_task_meta_for(job.id)  # the public one would wait for a backend that is away
    if stored["status"] in FINAL_JOB_STATES:
        return
    log.info("a result had not reached the backend", job=job.id, state=job.state, stored=stored["status"])
    request = request_of(job.id, job.task, job.arguments, job.node)
    if job.state == JobState.SUCCESS:
        app.backend.mark_as_done(job.id, job.result, request)
    elif job.state == JobState.FAILURE and job.error:
        failure = OperationFailed(job.error["code"], job.error["message"], job.error["details"])
        app.backend.mark_as_failure(job.id, failure, request=request)
    else:
        _tell_revoked(app, job.id, job.message, request)


def request_of(job_id: str, task: str, arguments: dict[str, Any], node: str) -> Context:
    """What the result backend keeps beside a state, for a job whose message we do not have."""
    return Context(id=job_id, task=task, args=[], kwargs=arguments, delivery_info={"routing_key": queue_name(node)})
