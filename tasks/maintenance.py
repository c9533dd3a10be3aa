"""Jobs that empty a node of its guests, or give it up."""

from __future__ import annotations

from functools import partial
from typing import Any

from celery import current_app

from hostler.contract import TaskName, worker_name
from hostler.job_arguments import NoArguments
from hostler.maintenance import DrainArguments, FenceArguments, HoldArguments, UnfenceArguments
from tasks import outcome
from tasks.boundary import operation
from worker.operations.context import JobContext
from worker.operations.maintenance import drain as draining
from worker.operations.maintenance import fence as fencing
from worker.operations.maintenance import holding
from worker.operations.receipts import Ended
from worker.operations.service import Service

PING_S = 1.0


@operation(TaskName.NODE_DRAIN)
def drain(service: Service, job: JobContext, arguments: DrainArguments) -> Any:
    """Move every guest of this node to others; it takes none in from then on."""
    call_off = partial(outcome.cancel, current_app, service, also_running=False)
    return draining.drain(service.node, job, arguments, call_off)


@operation(TaskName.NODE_UNDRAIN)
def undrain(service: Service, job: JobContext, arguments: NoArguments) -> Any:
    """Let this node take guests in again."""
    return draining.undrain(service.node)


@operation(TaskName.NODE_HOLD)
def hold(service: Service, job: JobContext, arguments: HoldArguments) -> Any:
    """Begin no more jobs that change guests."""
    return holding.hold(service.node, job, arguments.reason)


@operation(TaskName.NODE_UNHOLD)
def unhold(service: Service, job: JobContext, arguments: NoArguments) -> Any:
    """Begin the jobs that were held back."""
    result, ended = holding.unhold(service.node)
    outcome.carry_out(current_app, ended)
    return result


@operation(TaskName.NODE_FENCE)
def fence(service: Service, job: JobContext, arguments: FenceArguments) -> Any:
    """Give up another node whose host is off: its guests can be started elsewhere."""
    return fencing.fence(service.node, job, arguments, _answers, _tell)


@operation(TaskName.NODE_UNFENCE)
def unfence(service: Service, job: JobContext, arguments: UnfenceArguments) -> Any:
    """Let a node that was fenced have a worker again."""
    return fencing.unfence(service.node, arguments.node)


def _answers(node: str) -> bool:
    return bool(current_app.control.ping(destination=[worker_name(node)], timeout=PING_S, limit=1))


def _tell(ended: Ended, job_ids: list[str]) -> None:
    outcome.carry_out(current_app, ended)
    outcome.doubt(job_ids)
