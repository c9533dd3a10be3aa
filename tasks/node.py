"""Jobs about the node itself and its ledger."""

from __future__ import annotations

from typing import Any

from hostler.contract import TaskName
from hostler.payloads import JobInfoArguments, JobListArguments, NoArguments
from tasks.boundary import operation
from worker.operations import queries
from worker.operations.context import JobContext
from worker.operations.service import Service


@operation(TaskName.NODE_INFO)
def info(service: Service, job: JobContext, arguments: NoArguments) -> Any:
    """Facts about this host."""
    return queries.node_info(service.node)


@operation(TaskName.JOB_LIST)
def list_jobs(service: Service, job: JobContext, arguments: JobListArguments) -> Any:
    """The node's latest jobs."""
    return queries.list_jobs(service.node, arguments)


@operation(TaskName.JOB_INFO)
def job_info(service: Service, job: JobContext, arguments: JobInfoArguments) -> Any:
    """One job, with the history of its phases."""
    return queries.job_info(service.node, arguments.id)
