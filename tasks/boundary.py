"""Between Celery and the operations: arguments in, result or ``OperationFailed`` out, the ledger told of the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import structlog
from celery import Task, shared_task
from sqlalchemy.exc import SQLAlchemyError

from hostler.contract import ErrorCode, JobState, TaskName
from hostler.errors import InvalidArgument, OperationFailed
from hostler.payloads import ARGUMENTS, EXCLUSIVE_TASKS, Payload, instance_of, parse
from tasks.reporting import Reporter
from worker.errors import OperationError
from worker.operations.context import JobContext
from worker.operations.ledger import Receipt, Wakeup
from worker.operations.service import Service, current

log = structlog.get_logger(__name__)

LEDGER_RETRY_S = 1.0
REFUSED_MAX = 4000
"""How much of arguments that were refused is kept, as text, for whoever looks into it."""

P = TypeVar("P", bound=Payload)
Operation = Callable[[Service, JobContext, P], Any]
OPERATIONS: dict[TaskName, Callable[..., Any]] = {}
"""Every task with the function that carries it out, for the documentation."""

_reporters: list[Reporter] = []


def operation(name: TaskName) -> Callable[[Operation[P]], Task]:
    """Make an operation the Celery task ``name``. Its arguments are those of ``hostler.payloads.ARGUMENTS``."""

    def decorate(function: Operation[P]) -> Task:
        OPERATIONS[name] = function

        @shared_task(name=str(name), bind=True, typing=False, throws=(OperationFailed,))
        def task(self: Task, *args: Any, **kwargs: Any) -> Any:
            return _run(self, name, function, args, kwargs)

        return task

    return decorate


def receipt_of(job_id: str, task: str, arguments: dict[str, Any]) -> Receipt:
    """What the ledger records of a message; only jobs that change an instance hold it."""
    instance = instance_of(arguments) if task in EXCLUSIVE_TASKS else None
    return Receipt(job_id, task, _storable(task, arguments), instance)


def _storable(task: str, arguments: dict[str, Any]) -> dict[str, Any]:
    # JSON can say what a database cannot keep (NUL, lone surrogates, NaN); arguments that pass our checks never do.
    try:
        parse(ARGUMENTS[TaskName(task)], arguments)
    except (InvalidArgument, ValueError):
        return {"refused": ascii(arguments)[:REFUSED_MAX]}
    return arguments


def use_reporter(reporter: Reporter | None) -> None:
    """Make ``reporter`` the one of this process, or none."""
    _reporters[:] = [reporter] if reporter else []


def report(request: Any, state: JobState, meta: dict[str, Any]) -> None:
    """Publish through the process's reporter."""
    for reporter in _reporters:
        reporter.report(request, state, meta)


def wake(app: Any, wakeup: Wakeup) -> None:
    """Send a job's message (again): same id, same arguments, to its node's queue."""
    app.send_task(wakeup.task, kwargs=wakeup.arguments, task_id=wakeup.job_id, queue=f"node.{wakeup.node}")


def _run(task: Task, name: TaskName, function: Operation[P], args: Any, kwargs: dict[str, Any]) -> Any:
    service, request = current(), task.request
    job = JobContext(
        id=request.id,
        instance=instance_of(kwargs),
        node=service.node,
        publish=lambda meta: report(request, JobState.PROGRESS, meta),
        attempt=getattr(request, "hostler_attempt", None) or 1,
    )
    ledger = service.node.ledger
    try:
        result = function(service, job, _arguments(name, args, kwargs))
    except Exception as exc:
        failure = as_failure(exc)
        _settle(task, request.id, lambda: ledger.fail(request.id, _as_error(failure)))
        raise failure from None
    _settle(task, request.id, lambda: ledger.succeed(request.id, result))
    return result


def _arguments(name: TaskName, args: Any, kwargs: dict[str, Any]) -> Any:
    if args:
        raise InvalidArgument([{"field": "args", "reason": "arguments are passed by keyword only"}])
    return parse(ARGUMENTS[name], kwargs)


def as_failure(exc: Exception) -> OperationFailed:
    """Any exception as the one exception of the contract."""
    if isinstance(exc, OperationFailed):
        return OperationFailed(exc.code, exc.message, exc.details)
    if isinstance(exc, OperationError):
        return OperationFailed(exc.code, exc.message, exc.details)
    if isinstance(exc, SQLAlchemyError):
        log.exception("database error in an operation")
        reason = str(getattr(exc, "orig", None) or type(exc).__name__)
        return OperationFailed(ErrorCode.INTERNAL, f"the node's database failed: {reason}", {"retryable": True})
    log.exception("unexpected error in an operation")
    return OperationFailed(ErrorCode.INTERNAL, f"{type(exc).__name__}: {exc}", {"retryable": False})


def _as_error(failure: OperationFailed) -> dict[str, Any]:
    return {"code": failure.code, "message": failure.message, "details": failure.details}


def _settle(task: Task, job_id: str, finish: Callable[[], Wakeup | None]) -> None:
    """Record the end, however long the database is away, then wake the job that waited for this one."""
    while True:
        try:
            wakeup = finish()
            break
        except LookupError:
            log.error("a job ended whose row is gone", job=job_id)
            return
        except SQLAlchemyError as exc:
            log.warning("the job's end could not be recorded; trying again", job=job_id, reason=str(exc))
            time.sleep(LEDGER_RETRY_S)
    for reporter in _reporters:
        reporter.settle(job_id)
    if wakeup:
        try:
            wake(task.app, wakeup)
        except Exception as exc:
            log.warning("a waiting job could not be woken; the heartbeat will", job=wakeup.job_id, reason=str(exc))
