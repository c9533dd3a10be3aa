"""The jobs that a drain or a failover is made of: steps of it, whose rows are all that it has to remember."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from hostler.contract import FINAL_JOB_STATES, JobState, TaskName
from hostler.errors import InvalidArgument
from hostler.payloads import instance_of
from models import Database, Job
from worker.operations.steps import Step

KEY_MAX = 40
ID_MAX = 180
"""Its parts' ids begin with its own, and theirs with them; 255 is the most an id may have."""

KINDS = {
    TaskName.INSTANCE_MIGRATE: "move",
    TaskName.INSTANCE_START: "start",
    TaskName.INSTANCE_STOP: "stop",
    TaskName.NODE_INFO: "facts",
}
PLACING = ("move", "start")
"""Parts that give a node a guest more."""


@dataclass(frozen=True)
class Part:
    """One of its jobs. ``place`` is the node it takes a guest to, or that was asked."""

    id: str
    kind: str
    instance: str | None
    place: str
    begun: bool
    ended: bool
    succeeded: bool
    sent_memory: bool
    result: Any
    reason: str
    step: Step


def parts_of(database: Database, job_id: str) -> list[Part]:
    """All that a job had done or has done for it, in order."""
    with database.reading() as session:
        return [_part(job) for job in session.scalars(select(Job).where(Job.step_of == job_id).order_by(Job.sequence))]


def _part(job: Job) -> Part:
    task = TaskName(job.task)
    name = job.id.removeprefix(f"{job.step_of}.")
    return Part(
        id=job.id,
        kind=KINDS.get(task, "other"),
        instance=instance_of(job.arguments),
        place=str(job.arguments.get("target") or job.node),
        begun=job.attempts > 0,
        ended=job.state in FINAL_JOB_STATES,
        succeeded=job.state == JobState.SUCCESS,
        sent_memory=any(entry["phase"] == "transfer" for entry in job.phases),
        result=job.result,
        reason=str((job.error or {}).get("message", "")),
        step=Step(str(job.step_of), name, task, job.node, job.arguments, job.instance_name),
    )


def key_of(name: str) -> str:
    """An instance's name as part of an id; a long one is cut, and still like no other."""
    if len(name) <= KEY_MAX:
        return name
    return f"{name[: KEY_MAX - 13]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def require_short(job_id: str) -> None:
    """Raises InvalidArgument for an id that leaves no room for those of its parts."""
    if len(job_id) > ID_MAX:
        raise InvalidArgument([{"field": "id", "reason": f"the job's id may have {ID_MAX} characters here"}])
