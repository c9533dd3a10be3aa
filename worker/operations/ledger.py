"""The job ledger: Celery delivers, SQL decides.

A message is a wake-up, the row is the job. Receipt and claim are one transaction, made before the message is
acknowledged. A job may have to wait, in the ledger and without a thread, on three things in this order:

    parents    jobs it was told to come after, on whichever node
    instance   the job that changes the same instance; one at a time, in the order they were received
    limit      a free place in its class (starts, ...) on this node; by priority, then in order

Whoever ends a job wakes those that waited on it. Locks are taken in one order (node, instance, jobs), so that two
workers cannot hold each other up.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from hostler.contract import FINAL_JOB_STATES, JobState
from hostler.payloads import EXCLUSIVE_TASKS
from models import Database, Incarnation, InstanceLock, Job, JobParent, Node, utc_now
from worker.errors import InstanceBusy, UnknownJob, Unsupported
from worker.operations.job_rows import (
    INSTANCE,
    LIMIT,
    PARENTS,
    ahead,
    cancelled,
    give_up_slot,
    hand_on,
    locked_lock,
    locked_with_instance,
    make_ready,
    owned_job,
    parents,
    park,
    revoke,
    waiting_children,
    wakeup,
)
from worker.operations.patience import patient
from worker.operations.receipts import CancelOutcome, Decision, Ended, Receipt, Verdict, Wakeup

ATTEMPTS_MAX = 5
"""A job whose worker died this often is not tried again: it may be what kills the worker."""

RETRYABLE = frozenset({*EXCLUSIVE_TASKS})
"""Jobs that only look are asked again, not retried."""

RETRIES_MAX = 6
RETRY_MAX_S = 60
"""Transient failures are ridden out for about two minutes; what lasts longer wants a person."""

LAST_MOMENTS = timedelta(seconds=15)
"""Before its last heartbeat a worker certainly lived; what it ended since may not have reached the result backend."""

PREDECESSORS = 3

INSERTS_MAX = 20
"""Each round of a race for one id or one instance has a winner; twenty in a row are not lost to anybody."""

CLAIMED = (JobState.STARTED, JobState.PROGRESS)


class Ledger:
    """The jobs of one node, as one worker incarnation sees and changes them.

    ``limits`` is how many jobs of a class (``Receipt.slot``) may be under way on this node at once.
    """

    def __init__(
        self, database: Database, node: str, incarnation: str, limits: Mapping[str, int] | None = None
    ) -> None:
        self._database = database
        self._node = node
        self._incarnation = incarnation
        self._limits = dict(limits or {})

    # Receiving

    def receive(self, receipt: Receipt) -> Decision:
        """Record a delivery and decide: run it (then it is claimed), park it, or drop it as a duplicate.

        Called before the message is acknowledged; an exception (no database) leaves the message unacknowledged.
        """
        for _ in range(INSERTS_MAX):
            try:
                if decision := self._wait_for_parents(receipt):
                    return decision
                with self._database.transaction() as session:
                    return self._decide(session, receipt)
            except IntegrityError as exc:
                # Another worker inserted the same id, or took the instance, in this very moment: look again.
                conflict = exc
        raise conflict

    def _wait_for_parents(self, receipt: Receipt) -> Decision | None:
        """A transaction of its own, without the instance: a job that waits on others must not hold its instance up."""
        if not receipt.after:
            return None
        with self._database.transaction() as session:
            job = session.scalar(select(Job).where(Job.id == receipt.job_id).with_for_update())
            if job is None:
                job = self._insert(session, receipt)
            elif job.waits_on != PARENTS or job.state != JobState.WAITING:
                return None
            still_open, failed = parents(session, job.id)
            if failed and job.after_failure == "cancel":
                return Decision(Verdict.REVOKED, message=revoke(job, f"job {failed[0]}, which it comes after, failed"))
            if still_open:
                return park(job, PARENTS, still_open)
            job.state, job.waits_on = JobState.PENDING, None
            return None

    def _decide(self, session: Session, receipt: Receipt) -> Decision:
        known = session.execute(select(Job.instance_name).where(Job.id == receipt.job_id)).first()
        self._lock_node(session, receipt.slot)
        holder = self._lock_instance(session, known.instance_name if known else receipt.instance_name, receipt.job_id)
        job = owned_job(session, receipt.job_id) if known else self._insert(session, receipt)
        put_off = job.state == JobState.RETRY and job.retry_at is not None and job.retry_at > utc_now()
        if job.node != self._node or job.claimed_by or job.state in FINAL_JOB_STATES or put_off:
            session.rollback()  # the lock too, where nobody had it
            return Decision(Verdict.DROP)
        if holder:
            session.flush()  # it gets its place in the order
            return park(job, INSTANCE, [holder, *ahead(session, job)])
        if not job.slot_taken and (running := self._class_is_full(session, job)):
            return park(job, LIMIT, running)
        return self._claim(job)

    def _insert(self, session: Session, receipt: Receipt) -> Job:
        job = Job(
            id=receipt.job_id,
            node=self._node,
            task=receipt.task,
            instance_name=receipt.instance_name,
            arguments=receipt.arguments,
            state=JobState.PENDING,
            slot=receipt.slot,
            priority=receipt.priority,
            after_failure=receipt.after_failure,
            received_at=utc_now(),
            attempts=0,
            retries=0,
            slot_taken=False,
        )
        session.add(job)
        if others := [parent for parent in dict.fromkeys(receipt.after) if parent != job.id]:
            session.flush()
            session.add_all(JobParent(job_id=job.id, parent_id=parent) for parent in others)
            session.flush()
        return job

    def _lock_instance(self, session: Session, instance_name: str | None, job_id: str) -> str | None:
        """Take the instance for a job; the id of the job that holds it where that is another one."""
        if instance_name is None:
            return None
        lock = locked_lock(session, instance_name)
        if lock is None:
            session.add(InstanceLock(instance_name=instance_name, job_id=job_id, node=self._node))
            session.flush()
            return None
        return lock.job_id if lock.job_id != job_id else None

    def _lock_node(self, session: Session, slot: str | None) -> None:
        # Decisions about a class's free places are made one after another. Before anything is inserted that refers to
        # the node: that locks its row too, in part, and two who then want all of it hold each other up.
        if slot in self._limits:
            session.get(Node, self._node, with_for_update={"key_share": True})

    def _class_is_full(self, session: Session, job: Job) -> list[str]:
        """The jobs that fill the job's class; empty when there is a place, which the job then has."""
        if job.slot not in self._limits:
            return []
        running = session.scalars(
            select(Job.id).where(Job.node == self._node, Job.slot == job.slot, Job.slot_taken).order_by(Job.sequence)
        ).all()
        if len(running) >= self._limits[job.slot]:
            return list(running)
        job.slot_taken = True
        return []

    def _claim(self, job: Job) -> Decision:
        job.state = JobState.STARTED
        job.claimed_by = self._incarnation
        job.attempts += 1
        job.started_at = job.started_at or utc_now()
        job.waits_on, job.waiting_for = None, []
        deaths, cancelled = job.attempts - 1 - job.retries, job.cancel_requested_at is not None
        return Decision(Verdict.RUN, attempt=job.attempts, deaths=deaths, cancelled=cancelled)

    # Running

    @patient
    def advance(self, job_id: str, phase: str, percent: int, message: str) -> int:
        """Record a phase before its side effect. Returns the percentage as stored: it never falls."""
        with self._database.transaction() as session:
            job = owned_job(session, job_id)
            now = utc_now()
            job.state = JobState.PROGRESS
            job.phase, job.message = phase, message
            job.percent = max(job.percent, percent)
            job.phases = [*job.phases, {"phase": phase, "at": now.isoformat(), "message": message}]
            return job.percent

    def knows(self, job_id: str) -> bool:
        """Whether there is a job of this id, on whichever node and in whatever state."""
        with self._database.reading() as session:
            return session.scalar(select(Job.id).where(Job.id == job_id)) is not None

    def phases_of(self, job_id: str) -> list[str]:
        """The phases a job has been in, for one that is continued after its worker died."""
        with self._database.reading() as session:
            phases = session.scalar(select(Job.phases).where(Job.id == job_id)) or []
            return [str(entry["phase"]) for entry in phases]

    # Ending

    def succeed(self, job_id: str, result: Any) -> Ended:
        """Record success. Returns what has to be done about the jobs that waited for it."""
        return self._finish(job_id, JobState.SUCCESS, result=result)

    def fail(self, job_id: str, error: dict[str, Any]) -> Ended:
        """Record failure with ``{"code", "message", "details"}``. Returns as ``succeed`` does."""
        return self._finish(job_id, JobState.FAILURE, error=error)

    def revoke(self, job_id: str, message: str) -> Ended:
        """Record that a running job gave up because it was asked to, and undid what it had begun."""
        return self._finish(job_id, JobState.REVOKED, error=cancelled(message))

    def _finish(
        self, job_id: str, state: JobState, *, result: Any = None, error: dict[str, Any] | None = None
    ) -> Ended:
        with self._database.transaction() as session:
            lock, job = locked_with_instance(session, job_id)
            job.state = state
            job.result, job.error = result, error
            job.finished_at = utc_now()
            if state == JobState.SUCCESS:
                job.percent = 100
            slot, children = give_up_slot(job), waiting_children(session, job_id)
            ended = Ended(hand_on(session, lock, job_id))
        return self._wake_others(children, slot, ended)

    def _wake_others(self, children: list[str], slot: str | None, ended: Ended) -> Ended:
        """In transactions of their own; a worker killed in between leaves them to ``overdue``."""
        if slot:
            ended.wakeups += self._fill_class(slot)
        for child in children:
            self._settle_child(child, ended)
        return ended

    def _settle_child(self, child: str, ended: Ended) -> None:
        with self._database.transaction() as session:
            job = owned_job(session, child)
            still_open, failed = parents(session, child)
            if job.state != JobState.WAITING or job.waits_on != PARENTS:
                return
            if failed and job.after_failure == "cancel":
                revoke(job, f"job {failed[0]}, which it comes after, failed")
                ended.revoked.append(child)
                children = waiting_children(session, child)
            elif still_open:
                job.waiting_for = still_open
                return
            else:
                ended.wakeups.append(make_ready(job))
                return
        self._wake_others(children, None, ended)

    def _fill_class(self, slot: str) -> list[Wakeup]:
        """Give the free places of a class to those that wait longest, the more urgent first."""
        if slot not in self._limits:
            return []
        with self._database.transaction() as session:
            self._lock_node(session, slot)
            mine = select(Job).where(Job.node == self._node, Job.slot == slot)
            taken = session.scalar(select(func.count()).select_from(mine.where(Job.slot_taken).subquery())) or 0
            waiting = session.scalars(
                mine.where(Job.state == JobState.WAITING, Job.waits_on == LIMIT)
                .order_by(Job.priority.desc(), Job.sequence)
                .limit(max(0, self._limits[slot] - taken))
                .with_for_update()
            ).all()
            for job in waiting:
                job.slot_taken = True
            return [make_ready(job) for job in waiting]

    # Cancelling and trying again

    def cancel(self, job_id: str, message: str, *, also_running: bool = True) -> tuple[CancelOutcome, Ended]:
        """Revoke a job that has not begun, also one whose message is still on its way.

        For one that runs it is noted that it was asked to give up (unless not ``also_running``), for the worker that
        carries it out, or for the next one.
        """
        for _ in range(INSERTS_MAX):
            try:
                with self._database.transaction() as session:
                    lock, job = locked_with_instance(session, job_id, missing_ok=True)
                    if job is None:
                        self._insert_tombstone(session, job_id, message)
                        return CancelOutcome.REVOKED, Ended()
                    if job.state == JobState.REVOKED and not job.claimed_by:
                        return CancelOutcome.REVOKED, Ended()  # by another node that was asked too, or before
                    if job.state in FINAL_JOB_STATES:
                        return CancelOutcome.FINISHED, Ended()
                    if job.claimed_by or (job.attempts and job.state == JobState.PENDING):
                        if also_running:
                            job.cancel_requested_at = utc_now()
                        return CancelOutcome.REQUESTED, Ended()
                    revoke(job, message)
                    slot, children = give_up_slot(job), waiting_children(session, job_id)
                    ended = Ended(hand_on(session, lock, job_id))
                return CancelOutcome.REVOKED, self._wake_others(children, slot, ended)
            except IntegrityError as exc:
                conflict = exc
        raise conflict

    def _insert_tombstone(self, session: Session, job_id: str, message: str) -> None:
        job = Job(id=job_id, node=self._node, task="unknown", arguments={}, state=JobState.PENDING)
        revoke(job, message)
        session.add(job)
        session.flush()

    def postpone(self, job_id: str, error: dict[str, Any]) -> tuple[datetime, Ended] | None:
        """Put a job whose attempt failed aside until later. It keeps its instance, and gives up its class's place.

        The delay doubles with each retry and has jitter. Returns when it is due, and whom its place wakes. None, and
        nothing changed, after RETRIES_MAX of them.
        """
        with self._database.transaction() as session:
            job = owned_job(session, job_id)
            if job.retries >= RETRIES_MAX:
                return None
            delay = timedelta(seconds=min(RETRY_MAX_S, 2**job.retries) * random.uniform(0.5, 1.5))  # noqa: S311
            job.state, job.error, job.claimed_by = JobState.RETRY, error, None
            job.retries += 1
            job.retry_at = utc_now() + delay
            job.message = f"attempt {job.attempts} failed ({error['code']}); again at {job.retry_at.isoformat()}"
            slot, retry_at = give_up_slot(job), job.retry_at
        return retry_at, Ended(self._fill_class(slot) if slot else [])

    def due(self) -> list[Wakeup]:
        """The jobs that were put aside and whose time has come."""
        with self._database.transaction() as session:
            jobs = session.scalars(
                select(Job)
                .where(Job.node == self._node, Job.state == JobState.RETRY, Job.retry_at <= utc_now())
                .order_by(Job.sequence)
                .with_for_update()
            ).all()
            for job in jobs:
                job.state, job.error = JobState.PENDING, None
            return [wakeup(job) for job in jobs]

    def next_retry_at(self) -> datetime | None:
        """When the next job that was put aside is due; None when there is none."""
        with self._database.reading() as session:
            return session.scalar(
                select(func.min(Job.retry_at)).where(Job.node == self._node, Job.state == JobState.RETRY)
            )

    def retry(self, job_id: str) -> Wakeup:
        """A new job that repeats a failed or revoked one of this node, for its message to be sent.

        Raises UnknownJob, and InstanceBusy while the job itself or an earlier retry of it has not ended.
        """
        with self._database.transaction() as session:
            job = session.scalar(select(Job).where(Job.id == job_id, Job.node == self._node).with_for_update())
            if job is None:
                raise UnknownJob(job_id, self._node)
            later = select(Job.id).where(Job.retry_of == job_id, Job.finished_at.is_(None))
            if job.finished_at is None or (running := session.scalar(later)):
                raise InstanceBusy(f"job {job_id if job.finished_at is None else running} has not ended yet")
            if job.state == JobState.SUCCESS or "refused" in job.arguments or job.task not in RETRYABLE:
                raise Unsupported(f"job {job_id} ({job.task}, {job.state}) cannot be retried: it succeeded, or its "
                                  "arguments were refused; send a new job")  # fmt: skip
            again = Job(
                id=str(uuid.uuid4()),
                node=self._node,
                task=job.task,
                instance_name=job.instance_name,
                arguments={name: value for name, value in job.arguments.items() if name != "after"},
                state=JobState.PENDING,
                slot=job.slot,
                priority=job.priority,
                retry_of=job_id,
            )
            session.add(again)
            session.flush()
            return wakeup(again)

    def retry_failed(self, since: datetime, limit: int) -> dict[str, Wakeup]:
        """Retry each job of this node that failed since a time, where that can help and nobody did; old id to new."""
        retried = select(Job.retry_of).where(Job.retry_of.is_not(None))
        query = (
            select(Job)
            .where(Job.node == self._node, Job.state == JobState.FAILURE, Job.finished_at >= since)
            .where(Job.id.not_in(retried), Job.task.in_(RETRYABLE))
            .order_by(Job.sequence)
        )
        with self._database.reading() as session:
            failed = [job.id for job in session.scalars(query) if (job.error or {})["details"].get("retryable")]
        return {job_id: self.retry(job_id) for job_id in failed[:limit]}

    # After a death

    def unpublished(self) -> list[Job]:
        """Jobs that ended in the last moments of the workers before, whose results may not have reached the backend."""
        workers = (
            select(Incarnation)
            .where(Incarnation.node == self._node, Incarnation.id != self._incarnation)
            .order_by(Incarnation.started_at.desc())
            .limit(PREDECESSORS)
        )
        with self._database.reading() as session:
            return [
                job
                for worker in session.scalars(workers).all()
                for job in session.scalars(
                    select(Job).where(
                        Job.claimed_by == worker.id, Job.finished_at >= worker.heartbeat_at - LAST_MOMENTS
                    )
                )
            ]

    def take_over(self) -> list[Wakeup]:
        """Free the jobs that dead predecessors of this node held, and name all that have to be woken.

        To be called before the first delivery. A job keeps its id, its instance's lock and its recorded phases; the
        operation itself looks at what is true and continues from there.
        """
        with self._database.transaction() as session:
            unfinished = session.scalars(
                select(Job)
                .where(Job.node == self._node, Job.state.in_([JobState.PENDING, *CLAIMED]))
                .order_by(Job.sequence)
                .with_for_update()
            ).all()
            for job in unfinished:
                job.claimed_by, job.state = None, JobState.PENDING
            return [wakeup(job) for job in unfinished]

    def forgotten(self, older_than: timedelta) -> list[Wakeup]:
        """Jobs that wait for their message longer than a broker takes: it was lost, or never sent. Each is named again
        only after as long again."""
        query = select(Job).where(
            Job.node == self._node, Job.state == JobState.PENDING, Job.updated_at < utc_now() - older_than
        )
        with self._database.transaction() as session:
            jobs = session.scalars(query.with_for_update()).all()
            for job in jobs:
                job.updated_at = utc_now()
            return [wakeup(job) for job in jobs]

    def overdue(self) -> Ended:
        """Jobs that wait on parents which have all ended, or on a class that has places: their waker died."""
        ended = Ended()
        with self._database.reading() as session:
            waiting = session.scalars(
                select(Job.id).where(
                    Job.node == self._node, Job.state == JobState.WAITING, Job.waits_on == PARENTS
                )
            ).all()  # fmt: skip
        for job_id in waiting:
            self._settle_child(job_id, ended)
        for slot in self._limits:
            ended.wakeups += self._fill_class(slot)
        return ended
