"""What the ledger does to the rows of jobs and locks, inside a transaction of the caller's.

Locks are taken in one order: the node's, the instance's, the jobs'.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from hostler.contract import FINAL_JOB_STATES, ErrorCode, JobState
from hostler.payloads import HELD_TASKS
from models import InstanceLock, Job, JobParent, Node, utc_now
from worker.operations.receipts import Decision, Verdict, Wakeup

PARENTS, INSTANCE, LIMIT, HOLD = "parents", "instance", "limit", "hold"
"""What a WAITING job waits on."""

STEPS = "steps"
"""What a job waits on that has begun, and has another node do a part of it: in PROGRESS, claimed by nobody."""
WAITING_STATES = (JobState.WAITING, JobState.PROGRESS)


def wakeup(job: Job) -> Wakeup:
    return Wakeup(job.id, job.task, job.arguments, job.node, job.priority)


def make_ready(job: Job) -> Wakeup:
    """A job that waited has what it waited for: it is pending, and its message is to be sent."""
    job.state, job.waits_on, job.waiting_for = JobState.PENDING, None, []
    return wakeup(job)


def go_on(job: Job) -> Wakeup:
    """A job whose step has ended, or is waited for no longer, is to be taken up again by its own node."""
    job.resumes += 1
    job.retry_at = None
    return make_ready(job)


def whole_of(session: Session, step: Job) -> list[Wakeup]:
    """The job that waited for a step which has ended, to be taken up again; none where it waits no longer.

    One that was made ready and not taken up yet is named again: its message may not have been sent.
    """
    if step.step_of is None:
        return []
    whole = session.scalar(select(Job).where(Job.id == step.step_of).with_for_update())
    if whole and whole.waits_on == STEPS and step.id in whole.waiting_for:
        return [go_on(whole)]
    return [wakeup(whole)] if whole and whole.state == JobState.PENDING else []


def held_back(session: Session, job: Job) -> str | None:
    """Why the job's node does not begin it now; None where it does. A job that has begun, or is a part of one, goes on.

    Asked without a lock: a job that has not seen the end of the hold is let go within a heartbeat (``overdue``).
    """
    if job.task not in HELD_TASKS or job.attempts or job.step_of:
        return None
    return why_held(session, job.node)


def why_held(session: Session, node: str) -> str | None:
    """What to tell of a node that holds its jobs back; None where it does not."""
    held = session.execute(select(Node.held_at, Node.held_reason).where(Node.name == node)).first()
    if held is None or held.held_at is None:
        return None
    since = held.held_at.isoformat(timespec="seconds")
    return f"node {node} holds its jobs back since {since}" + (f": {held.held_reason}" if held.held_reason else "")


def hold(job: Job, message: str) -> Decision:
    """Let a job wait until its node begins jobs again. It keeps its instance: those sent after it stay behind it. It
    has no place in its class: that is decided when it begins."""
    job.slot_taken = False
    job.state, job.waits_on, job.waiting_for, job.message = JobState.WAITING, HOLD, [], message
    return Decision(Verdict.WAIT, message=message)


def held(session: Session, node: str) -> list[Job]:
    """The jobs that a node has held back and need not any more, in their order."""
    if session.scalar(select(Node.held_at).where(Node.name == node)) is not None:
        return []
    waiting = select(Job).where(Job.node == node, Job.state == JobState.WAITING, Job.waits_on == HOLD)
    return [*session.scalars(waiting.order_by(Job.sequence))]


def park(job: Job, waits_on: str, waiting_for: list[str]) -> Decision:
    job.state, job.waits_on, job.waiting_for = JobState.WAITING, waits_on, waiting_for
    others = f" and {len(waiting_for) - 1} more" if len(waiting_for) > 1 else ""
    reason = {PARENTS: "comes after", INSTANCE: "waiting for", LIMIT: "waiting for a free place, held by"}[waits_on]
    job.message = f"{reason} job {waiting_for[0]}{others}"
    return Decision(Verdict.WAIT, tuple(waiting_for), message=job.message)


def ahead(session: Session, job: Job) -> list[str]:
    """The jobs of the same instance that are before this one."""
    return list(
        session.scalars(
            select(Job.id)
            .where(
                Job.instance_name == job.instance_name,
                Job.state == JobState.WAITING,
                Job.waits_on == INSTANCE,
                Job.sequence < job.sequence,
            )
            .order_by(Job.sequence)
        )
    )


def parents(session: Session, job: Job) -> tuple[list[str], list[str]]:
    """The parents that have not ended, and those that ended without success."""
    ids = session.scalars(select(JobParent.parent_id).where(JobParent.job_id == job.id).order_by(JobParent.parent_id))
    # What had ended when the job was parked may have been pruned since.
    wanted = [parent for parent in ids if not job.waiting_for or parent in job.waiting_for]
    found = select(Job.id, Job.state).where(Job.id.in_(wanted))
    states = {row.id: row.state for row in session.execute(found)}
    still_open = [parent for parent in wanted if states.get(parent) not in FINAL_JOB_STATES]
    failed = [parent for parent in wanted if states.get(parent) in (JobState.FAILURE, JobState.REVOKED)]
    return still_open, failed


def comes_after_itself(session: Session, job_id: str) -> bool:
    """Whether the jobs that this one waits for wait for it, by however many steps: none of them could ever begin."""
    # Only a job that others named before it was received can close a circle; a long chain is not walked for nothing.
    ahead_of, seen = {job_id}, set[str]()
    named = session.scalar(select(JobParent.job_id).where(JobParent.parent_id == job_id).limit(1))
    while named and ahead_of:
        waiting = select(JobParent.parent_id).join(Job, Job.id == JobParent.job_id)
        found = {*session.scalars(waiting.where(JobParent.job_id.in_(ahead_of), Job.finished_at.is_(None)))}
        if job_id in found:
            return True
        ahead_of, seen = found - seen, seen | found
    return False


def cancelled(message: str) -> dict[str, Any]:
    return {"code": str(ErrorCode.CANCELLED), "message": message, "details": {"retryable": True}}


def revoke(job: Job, message: str) -> str:
    job.state, job.finished_at, job.message = JobState.REVOKED, utc_now(), message
    job.waits_on, job.waiting_for, job.error = None, [], cancelled(message)
    return message


def give_up_slot(job: Job) -> str | None:
    slot = job.slot if job.slot_taken else None
    job.slot_taken = False
    return slot


def hand_on(session: Session, lock: InstanceLock | None, job_id: str) -> list[Wakeup]:
    """Give the instance to the job that waits for it longest, or free it."""
    if lock is None or lock.job_id != job_id:
        return []
    following = session.scalar(
        select(Job)
        .where(Job.instance_name == lock.instance_name, Job.state == JobState.WAITING, Job.waits_on == INSTANCE)
        .order_by(Job.sequence)
        .limit(1)
        .with_for_update()
    )
    if following is None:
        session.delete(lock)
        return []
    lock.job_id, lock.node, lock.taken_at = following.id, following.node, utc_now()
    return [make_ready(following)]


def locked_lock(session: Session, instance_name: str) -> InstanceLock | None:
    return session.get(InstanceLock, instance_name, with_for_update=True, populate_existing=True)


def locked_with_instance(session: Session, job_id: str, *, missing_ok: bool = False) -> tuple[InstanceLock | None, Any]:
    instance_name = session.scalar(select(Job.instance_name).where(Job.id == job_id))
    lock = locked_lock(session, instance_name) if instance_name else None
    if missing_ok:
        return lock, session.scalar(select(Job).where(Job.id == job_id).with_for_update())
    return lock, owned_job(session, job_id)


def holds_instance(session: Session, job: Job) -> bool:
    holder = select(InstanceLock.job_id).where(InstanceLock.instance_name == job.instance_name)
    return session.scalar(holder) == job.id


def owned_job(session: Session, job_id: str) -> Job:
    job = session.scalar(select(Job).where(Job.id == job_id).with_for_update())
    if job is None:
        raise not_in_the_ledger(job_id)
    return job


def not_in_the_ledger(job_id: str) -> LookupError:
    return LookupError(f"job {job_id} is not in the ledger")


def waiting_children(session: Session, job_id: str) -> list[str]:
    """The jobs that wait for this one to end."""
    children = (
        select(JobParent.job_id)
        .join(Job, Job.id == JobParent.job_id)
        .where(JobParent.parent_id == job_id, Job.state.in_(WAITING_STATES), Job.waits_on.in_((PARENTS, STEPS)))
    )
    return list(session.scalars(children))
