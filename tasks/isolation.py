"""Jobs about what keeps guests apart: the node's uids for them, and what they left where nothing should ever be."""

from __future__ import annotations

from typing import Any

from hostler.contract import TaskName
from hostler.job_arguments import NoArguments
from hostler.payloads import (
    QuarantineReleaseArguments,
    UidPoolAddArguments,
    UidPoolRemoveArguments,
    UidPoolShowArguments,
)  # fmt: skip
from tasks.boundary import operation
from worker.operations import quarantine, uid_pool
from worker.operations.context import JobContext
from worker.operations.service import Service


@operation(TaskName.UID_POOL_SHOW)
def show(service: Service, job: JobContext, arguments: UidPoolShowArguments) -> Any:
    """The node's uids for guests, and which guest has which."""
    return uid_pool.show(service.node, history=arguments.history)


@operation(TaskName.UID_POOL_ADD)
def add(service: Service, job: JobContext, arguments: UidPoolAddArguments) -> Any:
    """Add ranges of uids to the node's pool."""
    return uid_pool.add(service.node, arguments.ranges, again=job.attempt > 1)


@operation(TaskName.UID_POOL_REMOVE)
def remove(service: Service, job: JobContext, arguments: UidPoolRemoveArguments) -> Any:
    """Take ranges of uids out of the node's pool."""
    return uid_pool.remove(service.node, arguments.ranges, again=job.attempt > 1)


@operation(TaskName.QUARANTINE_LIST)
def list_items(service: Service, job: JobContext, arguments: NoArguments) -> Any:
    """What guests' QEMUs left in their chroots."""
    return quarantine.list_items(service.node)


@operation(TaskName.QUARANTINE_RELEASE)
def release(service: Service, job: JobContext, arguments: QuarantineReleaseArguments) -> Any:
    """Delete items of the quarantine."""
    return quarantine.release(service.node, arguments.names, again=job.attempt > 1)
