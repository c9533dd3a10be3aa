"""Jobs that nobody carries out or wakes, and instances that ended jobs still have."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import select

from hostler.contract import FINAL_JOB_STATES, JobState, TaskName
from models import InstanceLock, Job
from worker.operations.audit.findings import Bench, Finding, Kind, Seen, finding
from worker.operations.job_rows import INSTANCE, hand_on, locked_lock, make_ready, owned_job, wakeup
from worker.operations.views import iso

REPAIR = TaskName.NODE_REPAIR


def _locks(seen: Seen) -> Iterator[Finding]:
    for lock in seen.records.locks:
        if lock.node == seen.node and (lock.state is None or lock.state in FINAL_JOB_STATES):
            how = f"has ended ({lock.state})" if lock.state else "is not in the ledger"
            yield finding(
                "lock",
                lock.instance_name,
                f"{lock.instance_name} is held by job {lock.job_id}, which {how}; every other job of it waits",
                instance=lock.instance_name,
                repair=REPAIR,
                evidence={"job": lock.job_id, "state": lock.state, "taken_at": iso(lock.taken_at)},
            )


def _hand_on(bench: Bench, found: Finding) -> str:
    with bench.node.database.transaction() as session:
        lock = locked_lock(session, str(found["instance"]))
        job_id = found["evidence"]["job"]
        wakeups = hand_on(session, lock, job_id)
    bench.ended.wakeups += wakeups
    return f"{found['instance']} is free" if not wakeups else f"job {wakeups[0].job_id} has {found['instance']}"


def _abandoned(seen: Seen) -> Iterator[Finding]:
    for job in seen.records.jobs_at_work:
        if job.claimed_by != seen.records.incarnation:
            yield finding(
                "job",
                job.id,
                f"job {job.id} ({job.task}) is on record as at work in phase {job.phase}, but "
                + ("its worker is dead" if job.claimed_by else "no worker has it")
                + "; its repair has it carried on from there",
                instance=job.instance_name,
                repair=REPAIR,
                evidence={"task": job.task, "phase": job.phase, "claimed_by": job.claimed_by},
            )


def _carry_on(bench: Bench, found: Finding) -> str:
    with bench.node.database.transaction() as session:
        job = owned_job(session, found["subject"])
        if job.state in (JobState.STARTED, JobState.PROGRESS) and job.claimed_by == found["evidence"]["claimed_by"]:
            job.claimed_by, job.state = None, JobState.PENDING
            bench.ended.wakeups.append(wakeup(job))
    return f"job {found['subject']} is carried on"


def _waiting(seen: Seen) -> Iterator[Finding]:
    """Of the jobs that wait for an instance nobody has, the first of each; the others follow it."""
    holders = {lock.instance_name: lock.job_id for lock in seen.records.locks}
    first: set[str] = set()
    for job in seen.records.waiting:
        free = job.waits_on == INSTANCE and job.instance_name not in first
        if free and holders.get(job.instance_name, job.id) == job.id:
            yield _forgotten(job.id, job.instance_name, f"instance {job.instance_name}, which no job has")
        elif job.id in seen.records.released:
            yield _forgotten(job.id, job.instance_name, "jobs that have all ended")
        if job.waits_on == INSTANCE:
            first.add(job.instance_name)


def _forgotten(job_id: str, instance: str | None, reason: str) -> Finding:
    return finding(
        "waiting",
        job_id,
        f"job {job_id} waits for {reason}; nobody will wake it",
        instance=instance,
        repair=REPAIR,
        evidence={"waits_for": reason},
    )


def _wake(bench: Bench, found: Finding) -> str:
    if found["subject"] in bench.seen.records.released:
        ended = bench.node.ledger.overdue()
        bench.ended.wakeups += ended.wakeups
        bench.ended.revoked += ended.revoked
        return f"job {found['subject']} is woken, or revoked where a job that it comes after failed"
    with bench.node.database.transaction() as session:
        name = str(found["instance"])
        lock = locked_lock(session, name)
        job = session.scalars(select(Job).where(Job.id == found["subject"]).with_for_update()).one()
        if job.state == JobState.WAITING and (lock is None or lock.job_id == job.id):
            if lock is None:
                session.add(InstanceLock(instance_name=name, job_id=job.id, node=bench.node.name))
            bench.ended.wakeups.append(make_ready(job))
    return f"job {found['subject']} has {found['instance']}"


KINDS = [
    Kind("lock", _locks, _hand_on, of_ledger=True),
    Kind("job", _abandoned, _carry_on, of_ledger=True),
    Kind("waiting", _waiting, _wake, of_ledger=True),
]
