"""hostler: the contract between a master service and its nodes, and the client that speaks it."""

from typing import TYPE_CHECKING, Any

from hostler.contract import ErrorCode, InstanceState, JobState, TaskName, queue_name
from hostler.errors import InvalidArgument, OperationFailed, ServiceUnreachable

if TYPE_CHECKING:
    from hostler.client import Client
    from hostler.executor import JobExecutor
    from hostler.job import Job, JobSnapshot
    from hostler.job_request import JobRequest
    from hostler.payloads import Disk, Instance, Nic

__all__ = [
    "Client",
    "Disk",
    "ErrorCode",
    "Instance",
    "InstanceState",
    "InvalidArgument",
    "Job",
    "JobExecutor",
    "JobRequest",
    "JobSnapshot",
    "JobState",
    "Nic",
    "OperationFailed",
    "ServiceUnreachable",
    "TaskName",
    "queue_name",
]
__version__ = "0.1.0"

# Celery and pydantic take a quarter of a second to import; a program that only wants a name of the contract, such as
# `hostler --help`, shall not pay for them.
_ON_DEMAND = {
    "Client": "hostler.client",
    "Disk": "hostler.payloads",
    "Instance": "hostler.payloads",
    "Job": "hostler.job",
    "JobExecutor": "hostler.executor",
    "JobRequest": "hostler.job_request",
    "JobSnapshot": "hostler.job",
    "Nic": "hostler.payloads",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ON_DEMAND[name]), name)
