"""Why a job does not run, and the safe command that resolves it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from hostler.contract import FINAL_JOB_STATES, JobState, queue_name
from models import InstanceLock, Job, utc_now
from worker.errors import UnknownJob
from worker.operations import presence
from worker.operations.context import NodeContext
from worker.operations.job_rows import HOLD, INSTANCE, LIMIT, PARENTS, STEPS, why_held
from worker.operations.views import iso, job_view


def explain(node: NodeContext, job_id: str) -> dict[str, Any]:
    """``state``, ``because`` (sentences), ``command`` (what to run, or empty) and the job itself. Raises UnknownJob."""
    with node.database.reading() as session:
        job = session.scalar(select(Job).where(Job.id == job_id))
        if job is None:
            raise UnknownJob(job_id, node.name)
        others = {other.id: other for other in session.scalars(select(Job).where(Job.id.in_(job.waiting_for)))}
        lock = session.get(InstanceLock, job.instance_name) if job.instance_name else None
        held = why_held(session, job.node) or "the node has just begun jobs again"
    because, command = ([held], f"hostler unhold {job.node}") if job.waits_on == HOLD else _reasons(job, others, lock)
    presences = presence.presences(node.database)
    found = presences[job.node]
    for step in others.values() if job.waits_on == STEPS else ():
        if not presences[step.node].alive:
            because, command = [presences[step.node].absence, *because], _start_worker(step.node)
    if job.state not in FINAL_JOB_STATES and not found.alive and job.node != node.name:
        because, command = [found.absence, *because], _start_worker(job.node)
    return {"id": job.id, "state": job.state, "because": because, "command": command, "job": job_view(job, whole=False)}


def explain_unreceived(node: NodeContext, job_id: str, at: str, task: str, ahead: int) -> dict[str, Any]:
    """The same for a job that no worker has received: its message lies in the queue of node ``at``, behind others."""
    found = presence.presences(node.database).get(at)
    lies = f"its message lies in queue {queue_name(at)}, with {ahead} before it"
    if found is None:
        because, command = [presence.never_seen(at), lies], f"hostler cancel {job_id}"
    elif found.alive:
        because, command = [f"{lies}; the worker takes it when it has a thread free"], f"hostler jobs -n {at}"
    else:
        because, command = [found.absence, lies], _start_worker(at)
    job = {"id": job_id, "task": task, "node": at, "state": JobState.PENDING}
    return {"id": job_id, "state": JobState.PENDING, "because": because, "command": command, "job": job}


def _start_worker(node: str) -> str:
    return f"hostler worker --node {node}"


def _reasons(job: Job, others: dict[str, Job], lock: InstanceLock | None) -> tuple[list[str], str]:
    if job.state in FINAL_JOB_STATES:
        return [f"it has ended as {job.state} at {iso(job.finished_at)}"], _after_the_end(job)
    if job.state == JobState.RETRY:
        return [f"{job.message}: {(job.error or {}).get('message', '')}"], f"hostler cancel {job.id} -n {job.node}"
    if job.state == JobState.PENDING:
        since = (utc_now() - job.updated_at).total_seconds()
        return [
            f"its turn has come; its message was sent {since:.0f} s ago and is sent again every half minute until a "
            f"worker of node {job.node} takes it"
        ], "hostler doctor"
    if job.waits_on == STEPS:
        parts = [_describe(job_id, others.get(job_id)) for job_id in job.waiting_for]
        return ["another node does a part of it, until " + str(iso(job.retry_at)), *parts], f"hostler watch {job.id}"
    if job.state != JobState.WAITING:
        return [f"it runs: {job.phase}, {job.percent} %, {job.message}"], f"hostler watch {job.id}"
    return _waiting(job, others, lock)


def _waiting(job: Job, others: dict[str, Job], lock: InstanceLock | None) -> tuple[list[str], str]:
    first = job.waiting_for[0] if job.waiting_for else ""
    ahead = [_describe(job_id, others.get(job_id)) for job_id in job.waiting_for]
    if job.waits_on == INSTANCE:
        since = f" since {iso(lock.taken_at)}" if lock else ""
        return [f"instance {job.instance_name} is held{since} by", *ahead], f"hostler why {first} -n {job.node}"
    if job.waits_on == LIMIT:
        return [f"all places for {job.slot} jobs on node {job.node} are taken, by", *ahead], "wait, or raise the limit"
    assert job.waits_on == PARENTS
    return ["it comes after", *ahead], f"hostler why {first} -n {job.node}"


def _describe(job_id: str, job: Job | None) -> str:
    if job is None:
        return f"job {job_id}, which no node has received yet"
    return f"job {job_id} ({job.task} on {job.node}, {job.state}, {job.phase}, {job.percent} %)"


def _after_the_end(job: Job) -> str:
    if job.state == JobState.FAILURE and (job.error or {}).get("details", {}).get("retryable"):
        return f"hostler retry {job.id} -n {job.node}"
    return f"hostler job {job.id} --history -n {job.node}"
