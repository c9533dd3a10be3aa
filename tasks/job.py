"""Jobs about jobs: looking at the ledger, cancelling, retrying, asking why."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from celery import current_app

from hostler.contract import TaskName
from hostler.payloads import JobIdArguments, JobListArguments, JobPruneArguments, JobRetryArguments
from tasks import outcome, queues
from tasks.boundary import operation
from worker.errors import UnknownJob
from worker.operations import pruning, queries, why
from worker.operations.context import JobContext
from worker.operations.presence import presences
from worker.operations.service import Service


@operation(TaskName.JOB_LIST)
def list_jobs(service: Service, job: JobContext, arguments: JobListArguments) -> Any:
    """The node's latest jobs."""
    return queries.list_jobs(service.node, arguments)


@operation(TaskName.JOB_INFO)
def info(service: Service, job: JobContext, arguments: JobIdArguments) -> Any:
    """One job, with the history of its phases."""
    return queries.job_info(service.node, arguments.id)


@operation(TaskName.JOB_CANCEL)
def cancel(service: Service, job: JobContext, arguments: JobIdArguments) -> Any:
    """Cancel a job that has not begun, or ask one that runs to give up; the answer says what became of it."""
    return outcome.cancel(current_app, service, arguments.id, also_running=True)


@operation(TaskName.JOB_RETRY)
def retry(service: Service, job: JobContext, arguments: JobRetryArguments) -> Any:
    """Send failed jobs again, each under a new id that names the one it retries; the answer pairs the two."""
    ledger = service.node.ledger
    if arguments.id:
        wakeups = {arguments.id: ledger.retry(arguments.id)}
    else:
        wakeups = ledger.retry_failed(datetime.fromisoformat(str(arguments.failed_since)), arguments.limit)
    for wakeup in wakeups.values():
        outcome.wake(current_app, wakeup)
    return [{"id": wakeup.job_id, "retry_of": old, "task": wakeup.task} for old, wakeup in wakeups.items()]


@operation(TaskName.JOB_WHY)
def ask_why(service: Service, job: JobContext, arguments: JobIdArguments) -> Any:
    """Why a job does not run, and the safe command that resolves it."""
    try:
        return why.explain(service.node, arguments.id)
    except UnknownJob:
        with queues.looking(current_app) as broker:
            queued = broker.find(arguments.id, presences(service.node.database)) if broker else None
        if queued is None:
            raise
        return why.explain_unreceived(service.node, queued.job_id, queued.node, queued.task, queued.ahead)


@operation(TaskName.JOB_PRUNE)
def prune(service: Service, job: JobContext, arguments: JobPruneArguments) -> Any:
    """Remove from the node's ledger what ended long ago; a node does so by itself every hour."""
    return pruning.prune_jobs(job, arguments)
