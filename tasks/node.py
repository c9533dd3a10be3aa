"""Jobs about the node itself."""

from __future__ import annotations

from typing import Any

from hostler.contract import TaskName
from hostler.payloads import NoArguments
from tasks.boundary import operation
from worker.operations import queries
from worker.operations.context import JobContext
from worker.operations.service import Service


@operation(TaskName.NODE_INFO)
def info(service: Service, job: JobContext, arguments: NoArguments) -> Any:
    """Facts about this host."""
    return queries.node_info(service.node)
