"""What is told of a job on behalf of a node that has no worker, or is just back; published past that node."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from celery import Celery

from hostler.contract import FINAL_JOB_STATES, JobState, queue_name
from hostler.errors import OperationFailed
from hostler.payloads import instance_of
from models import Job, utc_now
from tasks import outcome
from tasks.queues import Queued
from tasks.reporting import Meta
from worker.operations import presence


@dataclass(frozen=True)
class Report:
    """A job's state and meta, with what the backend keeps beside them."""

    job_id: str
    node: str
    state: JobState
    meta: Meta
    task: str
    arguments: dict[str, Any]


def of_job(job: Job, message: str) -> Report:
    """A job of the ledger: as far as it got, with a message."""
    state = JobState.PROGRESS if presence.has_begun(job) else JobState.WAITING
    meta = _meta(job.node, job.instance_name or instance_of(job.arguments), message) | {
        "phase": job.phase if presence.has_begun(job) else "waiting",
        "percent": job.percent,
    }
    if state == JobState.WAITING:
        meta["waiting_for"] = job.waiting_for
    return Report(job.id, job.node, state, meta, job.task, job.arguments)


def as_it_is(job: Job) -> Report:
    """A job of the ledger, as its own node would report it."""
    report = of_job(job, job.message or "its turn has come")
    if job.state == JobState.RETRY and job.error:
        failure = OperationFailed(job.error["code"], job.error["message"], job.error["details"])
        return replace(report, state=JobState.RETRY, meta=failure)
    return report


def of_message(queued: Queued, message: str) -> Report:
    """A job that no worker has received."""
    meta = _meta(queued.node, instance_of(queued.arguments), message) | {
        "phase": outcome.QUEUED,
        "percent": 0,
        "waiting_for": [],
    }
    return Report(queued.job_id, queued.node, JobState.WAITING, meta, queued.task, queued.arguments)


def taken_soon(report: Report) -> Report:
    """Such a job, now that its node has a worker again."""
    assert isinstance(report.meta, dict)
    message = f"in queue {queue_name(report.node)}, whose worker is back"
    return replace(report, meta=report.meta | {"message": message, "updated_at": utc_now().isoformat()})


def _meta(node: str, instance: str | None, message: str) -> dict[str, Any]:
    return {"message": message, "instance": instance, "node": node, "updated_at": utc_now().isoformat()}


def say(app: Celery, report: Report, *, only_if_told: bool = False) -> bool:
    """Publish a report, unless the job has ended or says the same already; with ``only_if_told`` unless it says
    nothing. Returns whether it was published."""
    stored = app.backend._get_task_meta_for(report.job_id)  # the public one would wait for a backend that is away
    if stored["status"] in FINAL_JOB_STATES or (only_if_told and stored["status"] == JobState.PENDING):
        return False
    if stored["status"] == report.state and _message(stored["result"]) == _message(report.meta):
        return False
    request = outcome.request_of(report.job_id, report.task, report.arguments, report.node)
    meta = app.backend.encode_result(report.meta, report.state)
    try:
        app.backend._store_result(report.job_id, meta, report.state, None, request=request)
    finally:
        outcome.doubt([report.job_id])  # it may have ended since we looked
    return True


def _message(meta: Any) -> str:
    return str(meta.get("message") if isinstance(meta, dict) else meta)
