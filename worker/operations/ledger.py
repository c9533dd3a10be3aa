"""The job ledger: Celery delivers, SQL decides.

A message is a wake-up, the row is the job. Receipt and claim are one transaction, made before the message is
acknowledged. Of the jobs that change one instance, one at a time holds the instance's lock; the others wait in the
ledger, in the order they were sent, and cost no thread. Whoever gives the lock up hands it to the next.

Rows are locked in one order, so that no two transactions wait for each other: the instance's lock, then jobs. A job is
inserted under the lock, which makes its sequence number its place among the jobs of its instance.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum, auto
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from hostler.contract import FINAL_JOB_STATES, JobState
from models import Database, InstanceLock, Job, utc_now

ATTEMPTS_MAX = 3
"""A job whose worker died this often is not tried again: it may be what kills the worker."""

INSERTS_MAX = 10
"""How often a delivery looks again that met another worker's insert; once is rare."""

_JOB_ID = re.compile(r"[\x21-\x7e]{1,255}")
CLAIMED = (JobState.STARTED, JobState.PROGRESS)


class Verdict(Enum):
    """What to do with a delivered message."""

    RUN = auto()
    WAIT = auto()
    DROP = auto()


@dataclass(frozen=True)
class Receipt:
    """What a message asks for. ``instance_name`` is set for jobs that change that instance."""

    job_id: str
    task: str
    arguments: dict[str, Any]
    instance_name: str | None


@dataclass(frozen=True)
class Wakeup:
    """A job whose message has to be sent (again): it now holds its instance, or its worker died."""

    job_id: str
    task: str
    arguments: dict[str, Any]
    node: str


@dataclass(frozen=True)
class Decision:
    """The verdict on a delivery; for ``WAIT`` with the jobs ahead."""

    verdict: Verdict
    waiting_for: tuple[str, ...] = ()
    attempt: int = 0


def is_job_id(value: str) -> bool:
    """Whether ``value`` can be a job's id: 1 to 255 visible ASCII characters."""
    return bool(_JOB_ID.fullmatch(value))


class Ledger:
    """The jobs of one node, as one worker incarnation sees and changes them."""

    def __init__(self, database: Database, node: str, incarnation: str) -> None:
        self._database = database
        self._node = node
        self._incarnation = incarnation

    def receive(self, receipt: Receipt) -> Decision:
        """Record a delivery and decide: run it (then it is claimed), park it, or drop it as a duplicate.

        Called before the message is acknowledged; an exception (no database) leaves the message unacknowledged.
        """
        for _ in range(INSERTS_MAX):
            try:
                with self._database.transaction() as session:
                    return self._decide(session, receipt)
            except IntegrityError as exc:
                # Another worker inserted the same id, or took the instance, in this very moment: look again.
                conflict = exc
        raise conflict

    def _decide(self, session: Session, receipt: Receipt) -> Decision:
        known = session.execute(select(Job.instance_name).where(Job.id == receipt.job_id)).first()
        holder = self._lock_instance(session, known.instance_name if known else receipt.instance_name, receipt.job_id)
        job = _owned_job(session, receipt.job_id) if known else self._insert(session, receipt)
        if job.node != self._node or job.claimed_by or job.state in FINAL_JOB_STATES:
            session.rollback()  # the lock too, where nobody had it
            return Decision(Verdict.DROP)
        return self._park(session, job, holder) if holder else self._claim(job)

    def _insert(self, session: Session, receipt: Receipt) -> Job:
        job = Job(
            id=receipt.job_id,
            node=self._node,
            task=receipt.task,
            instance_name=receipt.instance_name,
            arguments=receipt.arguments,
            state=JobState.PENDING,
        )
        session.add(job)
        session.flush()
        return job

    def _lock_instance(self, session: Session, instance_name: str | None, job_id: str) -> str | None:
        """Take the instance for a job; the id of the job that holds it where that is another one."""
        if instance_name is None:
            return None
        lock = _locked_lock(session, instance_name)
        if lock is None:
            session.add(InstanceLock(instance_name=instance_name, job_id=job_id, node=self._node))
            session.flush()
            return None
        return lock.job_id if lock.job_id != job_id else None

    @staticmethod
    def _park(session: Session, job: Job, holder: str) -> Decision:
        ahead = session.scalars(
            select(Job.id)
            .where(
                Job.instance_name == job.instance_name,
                Job.state == JobState.WAITING,
                Job.sequence < job.sequence,
            )
            .order_by(Job.sequence)
        )
        job.state = JobState.WAITING
        job.waiting_for = [holder, *ahead]
        job.message = f"waiting for job {holder}"
        return Decision(Verdict.WAIT, tuple(job.waiting_for))

    def _claim(self, job: Job) -> Decision:
        job.state = JobState.STARTED
        job.claimed_by = self._incarnation
        job.attempts = (job.attempts or 0) + 1
        job.started_at = job.started_at or utc_now()
        job.waiting_for = []
        return Decision(Verdict.RUN, attempt=job.attempts)

    def advance(self, job_id: str, phase: str, percent: int, message: str) -> int:
        """Record a phase before its side effect. Returns the percentage as stored: it never falls."""
        with self._database.transaction() as session:
            job = _owned_job(session, job_id)
            now = utc_now()
            job.state = JobState.PROGRESS
            job.phase, job.message = phase, message
            job.percent = max(job.percent, percent)
            job.phases = [*job.phases, {"phase": phase, "at": now.isoformat(), "message": message}]
            return job.percent

    def phases_of(self, job_id: str) -> list[str]:
        """The phases a job has been in, for one that is continued after its worker died."""
        with self._database.reading() as session:
            phases = session.scalar(select(Job.phases).where(Job.id == job_id)) or []
            return [str(entry["phase"]) for entry in phases]

    def succeed(self, job_id: str, result: Any) -> Wakeup | None:
        """Record success. Returns the job that now holds the instance, for its message to be sent."""
        return self._finish(job_id, JobState.SUCCESS, result=result)

    def fail(self, job_id: str, error: dict[str, Any]) -> Wakeup | None:
        """Record failure with ``{"code", "message", "details"}``. Returns as ``succeed`` does."""
        return self._finish(job_id, JobState.FAILURE, error=error)

    def _finish(
        self, job_id: str, state: JobState, *, result: Any = None, error: dict[str, Any] | None = None
    ) -> Wakeup | None:
        with self._database.transaction() as session:
            instance_name = session.scalar(select(Job.instance_name).where(Job.id == job_id))
            lock = _locked_lock(session, instance_name) if instance_name else None
            job = _owned_job(session, job_id)
            job.state = state
            job.result, job.error = result, error
            job.finished_at = utc_now()
            if state == JobState.SUCCESS:
                job.percent = 100
            return self._hand_on(session, lock) if lock and lock.job_id == job_id else None

    @staticmethod
    def _hand_on(session: Session, lock: InstanceLock) -> Wakeup | None:
        following = session.scalar(
            select(Job)
            .where(Job.instance_name == lock.instance_name, Job.state == JobState.WAITING)
            .order_by(Job.sequence)
            .limit(1)
            .with_for_update()
        )
        if following is None:
            session.delete(lock)
            return None
        following.state = JobState.PENDING
        following.waiting_for = []
        lock.job_id, lock.node, lock.taken_at = following.id, following.node, utc_now()
        return Wakeup(following.id, following.task, following.arguments, following.node)

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
            return [Wakeup(job.id, job.task, job.arguments, job.node) for job in unfinished]

    def forgotten(self, older_than: timedelta) -> list[Wakeup]:
        """Jobs that wait for their message longer than a broker takes: it was lost, or never sent."""
        query = select(Job).where(
            Job.node == self._node, Job.state == JobState.PENDING, Job.updated_at < utc_now() - older_than
        )
        with self._database.reading() as session:
            return [Wakeup(job.id, job.task, job.arguments, job.node) for job in session.scalars(query)]


def _locked_lock(session: Session, instance_name: str) -> InstanceLock | None:
    return session.get(InstanceLock, instance_name, with_for_update=True, populate_existing=True)


def _owned_job(session: Session, job_id: str) -> Job:
    job = session.scalar(select(Job).where(Job.id == job_id).with_for_update())
    if job is None:
        raise LookupError(f"job {job_id} is not in the ledger")
    return job
