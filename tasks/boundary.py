"""Between Celery and the operations: arguments in, result or ``OperationFailed`` out, the ledger told of the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import structlog
from celery import Task, shared_task
from celery.exceptions import Ignore
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError

from hostler.contract import ErrorCode, JobState, TaskName
from hostler.errors import InvalidArgument, OperationFailed
from hostler.job_arguments import JobArguments
from hostler.payloads import ARGUMENTS, EXCLUSIVE_TASKS, SLOTS, instance_of, parse
from tasks import outcome
from worker.errors import Cancelled, Interrupted, OperationError
from worker.operations import recovery, recovery_table
from worker.operations.context import JobContext, Whole
from worker.operations.ledger import ATTEMPTS_MAX
from worker.operations.live_migration.names import SHOWN_AS, STEP_TASKS, migration_id_of
from worker.operations.receipts import Ended, Receipt
from worker.operations.service import Service, current
from worker.operations.steps import HandedOver

log = structlog.get_logger(__name__)

REFUSED_MAX = 4000
"""How much of arguments that were refused is kept, as text, for whoever looks into it."""

P = TypeVar("P", bound=JobArguments)
Operation = Callable[[Service, JobContext, P], Any]
OPERATIONS: dict[TaskName, Callable[..., Any]] = {}
"""Every task with the function that carries it out, for the documentation."""


def operation(name: TaskName, *, track_started: bool = True) -> Callable[[Operation[P]], Task]:
    """Make an operation the Celery task ``name``. Its arguments are those of ``hostler.payloads.ARGUMENTS``.

    Without ``track_started`` the result backend is not told STARTED: for one that tells a phase at once, and is taken
    up again and again, where STARTED would stand in the place of how far it is.
    """

    def decorate(function: Operation[P]) -> Task:
        OPERATIONS[name] = function

        tracked = None if track_started else False  # None: as configured

        @shared_task(name=str(name), bind=True, typing=False, throws=(OperationFailed,), track_started=tracked)
        def task(self: Task, *args: Any, **kwargs: Any) -> Any:
            return _run(self, name, function, args, kwargs)

        return task

    return decorate


def receipt_of(job_id: str, task: str, arguments: dict[str, Any], priority: int = 0) -> Receipt:
    """What the ledger records of a message.

    Only jobs that change an instance hold it, and what will be refused waits for nobody.
    """
    # JSON can say what a database cannot keep (NUL, lone surrogates, NaN); arguments that pass our checks never do.
    try:
        name = TaskName(task)
        parsed = parse(ARGUMENTS[name], arguments)
    except (InvalidArgument, ValueError):
        return Receipt(job_id, task, {"refused": ascii(arguments)[:REFUSED_MAX]}, None, priority=priority)
    return Receipt(
        job_id,
        task,
        arguments,
        instance_of(arguments) if name in EXCLUSIVE_TASKS else None,
        slot=SLOTS.get(name),
        priority=priority,
        after=tuple(parsed.after),
        after_failure=parsed.after_failure,
    )


def _run(task: Task, name: TaskName, function: Operation[P], args: Any, kwargs: dict[str, Any]) -> Any:
    service, request = current(), task.request
    job = JobContext(
        id=request.id,
        instance=instance_of(kwargs),
        node=service.node,
        publish=lambda meta: outcome.report(request, JobState.PROGRESS, meta),
        attempt=getattr(request, "hostler_attempt", None) or 1,
        deaths=getattr(request, "hostler_deaths", None) or 0,
        whole=_whole(task, name, kwargs),
    )
    if getattr(request, "hostler_cancelled", False):
        job.cancel()
    ledger = service.node.ledger
    try:
        with service.running(job), _told_to_its_end(job.whole):
            _give_up_if_tried_too_often(service, job, name)
            result = function(service, job, _arguments(name, args, kwargs))
    except HandedOver as elsewhere:
        outcome.hurry(job.id)
        outcome.carry_out(task.app, Ended(elsewhere.wakeups))
        _do_meanwhile(elsewhere, job)
        raise Ignore from None
    except Exception as exc:
        failure = as_failure(exc)
        if isinstance(exc, Cancelled) or (job.is_giving_up and is_transient(exc)):
            outcome.settle(task.app, ledger, job.id, lambda: ledger.revoke(job.id, failure.message))
            outcome.mark_revoked(task.app, job.id, failure.message, request)
            raise Ignore from None
        if is_transient(exc) and outcome.postpone(task.app, service, request, failure):
            raise Ignore from None
        outcome.settle(task.app, ledger, job.id, lambda: ledger.fail(job.id, outcome.as_error(failure)))
        raise failure from None
    outcome.settle(task.app, ledger, job.id, lambda: ledger.succeed(job.id, result, job.at_success))
    return result


@contextmanager
def _told_to_its_end(whole: Whole | None) -> Iterator[None]:
    """What is told late of a step must not come after what the node of its job tells next."""
    try:
        yield
    finally:
        if whole:
            outcome.report_no_more(whole.job_id)


def _do_meanwhile(elsewhere: HandedOver, job: JobContext) -> None:
    try:
        elsewhere.meanwhile()
    except Exception as exc:  # whatever it is: the job does it again, and says so then
        log.info("what was to be done meanwhile failed", job=job.id, reason=str(exc))


def _whole(task: Task, name: TaskName, kwargs: dict[str, Any]) -> Whole | None:
    """The job that this one is a step of; a job that somebody sent is none."""
    whole_id, _, step = str(task.request.id).rpartition(".")
    if name not in STEP_TASKS or migration_id_of(kwargs) != whole_id or step not in SHOWN_AS:
        return None
    return Whole(whole_id, outcome.report_whole, step, SHOWN_AS[step])


def _give_up_if_tried_too_often(service: Service, job: JobContext, name: TaskName) -> None:
    if job.deaths >= ATTEMPTS_MAX:
        if job.instance and name in recovery_table.TABLE:
            recovery.abandon(service.node, service.guests, job, name, job.instance)
        phase, _ = job.last_phase()
        raise Interrupted(
            f"the worker died {job.deaths} times while it carried out this job, last in phase {phase}; it is not "
            "tried again by itself. See the worker's log for what kills it, then retry",
            phase=phase,
        )


def _arguments(name: TaskName, args: Any, kwargs: dict[str, Any]) -> Any:
    if args:
        raise InvalidArgument([{"field": "args", "reason": "arguments are passed by keyword only"}])
    return parse(ARGUMENTS[name], kwargs)


def is_transient(exc: Exception) -> bool:
    """Whether a job that failed so is tried again by itself."""
    return exc.transient if isinstance(exc, OperationError) else isinstance(exc, OperationalError | InterfaceError)


def as_failure(exc: Exception) -> OperationFailed:
    """Any exception as the one exception of the contract."""
    if isinstance(exc, OperationError | OperationFailed):
        return OperationFailed(exc.code, exc.message, exc.details)
    if isinstance(exc, SQLAlchemyError):
        log.exception("database error in an operation")
        reason = str(getattr(exc, "orig", None) or type(exc).__name__)
        return OperationFailed(ErrorCode.INTERNAL, f"the node's database failed: {reason}", {"retryable": True})
    log.exception("unexpected error in an operation")
    return OperationFailed(ErrorCode.INTERNAL, f"{type(exc).__name__}: {exc}", {"retryable": False})
