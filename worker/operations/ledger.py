"""The job ledger: Celery delivers, SQL decides.

A message is a wake-up, the row is the job. Receipt and claim are one transaction, made before the message is
acknowledged. A job may have to wait, in the ledger and without a thread, on four things in this order:

    parents    jobs it was told to come after, on whichever node
    instance   the job that changes the same instance; one at a time, in the order they were received
    hold       its node to begin jobs again
    limit      a free place in its class (starts, ...) on this node; by priority, then in order

Whoever ends a job wakes those that waited on it. Locks are taken in one order (node, instance, jobs), so that two
workers cannot hold each other up.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, exists, func, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, aliased

from hostler.contract import FINAL_JOB_STATES, JobState, TaskName
from hostler.payloads import EXCLUSIVE_TASKS, SLOTS, instance_of
from models import Database, Incarnation, InstanceLock, Job, JobParent, Node, utc_now
from worker.errors import InstanceBusy, UnknownJob, Unsupported
from worker.operations.job_rows import (
    HOLD,
    INSTANCE,
    LIMIT,
    PARENTS,
    STEPS,
    ahead,
    cancelled,
    comes_after_itself,
    give_up_slot,
    go_on,
    hand_on,
    held,
    held_back,
    hold,
    holds_instance,
    locked_lock,
    locked_with_instance,
    make_ready,
    not_in_the_ledger,
    owned_job,
    parents,
    park,
    revoke,
    waiting_children,
    wakeup,
    whole_of,
)
from worker.operations.patience import patient
from worker.operations.receipts import CancelOutcome, Decision, Ended, Receipt, Verdict, Wakeup
from worker.operations.steps import Step, StepEnd

ATTEMPTS_MAX = 5
"""A job whose worker died this often is not tried again: it may be what kills the worker."""

RETRYABLE = EXCLUSIVE_TASKS | {TaskName.NODE_DRAIN}
"""Jobs that only look are asked again, not retried."""

RETRIES_MAX = 6
RETRY_MAX_S = 60
"""Transient failures are ridden out for about two minutes; what lasts longer wants a person."""

RETRY_FARTHEST = timedelta(seconds=1.5 * RETRY_MAX_S)
"""Nothing is put off for longer. What seems to be was put off before the clock was set back, and is due."""

LAST_MOMENTS = timedelta(seconds=15)
"""Before its last heartbeat a worker certainly lived; what it ended since may not have reached the result backend."""

UNHEARD_MAX = timedelta(minutes=2)
"""After its last heartbeat a worker hardly lived for longer."""

PREDECESSORS = 3

INSERTS_MAX = 20
"""Each round of a race for one id or one instance has a winner; twenty in a row are not lost to anybody."""

CLAIMED = (JobState.STARTED, JobState.PROGRESS)

UNDER_WAY = (JobState.PENDING, *CLAIMED)
"""Jobs that run or are about to: those that may have a place in their class. Said so that an index finds them."""

TOMBSTONE = "unknown"
"""The task of a job that was revoked before its message came."""

NOTE = "recover"
"""In a job's history, what was decided when it was taken up again; not a phase of it."""

Also = Callable[[Session], object]
"""What else is changed in a transaction of the ledger's; may be called more than once. A phase locks its job after it,
since it may lock a node; all others before it, since it may insert what refers to the job."""


def nothing_else(_session: Session) -> None:
    """What else is changed mostly."""


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
        """Transactions of their own, without the instance: a job that waits on others must not hold its instance up.

        A new job is written down as waiting before its parents are looked at: who ends one of them later sees it. So
        nobody locks rows of parents, for which there is no order that all could keep.
        """
        if not receipt.after:
            return None
        if not self.knows(receipt.job_id):
            with self._database.transaction() as session:
                job = self._insert(session, receipt)
                job.state, job.waits_on = JobState.WAITING, PARENTS
        with self._database.transaction() as session:
            job = owned_job(session, receipt.job_id)
            if job.waits_on != PARENTS or job.state != JobState.WAITING:
                return None
            still_open, failed = parents(session, job)
            if failed and job.after_failure == "cancel":
                return Decision(Verdict.REVOKED, message=revoke(job, f"job {failed[0]}, which it comes after, failed"))
            if still_open and comes_after_itself(session, job.id):
                return Decision(Verdict.REVOKED, message=revoke(job, "it comes after a job that comes after it"))
            if still_open:
                return park(job, PARENTS, still_open)
            job.state, job.waits_on = JobState.PENDING, None
            return None

    def _decide(self, session: Session, receipt: Receipt) -> Decision:
        known = session.execute(select(Job.instance_name, Job.slot_taken).where(Job.id == receipt.job_id)).first()
        if not (known and known.slot_taken):  # one that had its place and lost it meanwhile has ended, or is put off
            self._lock_node(session, receipt.slot)
        holder = self._lock_instance(session, known.instance_name if known else receipt.instance_name, receipt.job_id)
        job = owned_job(session, receipt.job_id) if known else self._insert(session, receipt)
        put_off = job.state == JobState.RETRY and job.retry_at is not None and job.retry_at > utc_now()
        elsewhere = job.node != self._node or job.waits_on == STEPS
        if elsewhere or job.claimed_by or job.state in FINAL_JOB_STATES or put_off:
            session.rollback()  # the lock too, where nobody had it
            return Decision(Verdict.DROP)
        if holder:
            session.flush()  # it gets its place in the order
            return park(job, INSTANCE, [holder, *ahead(session, job)])
        with session.no_autoflush:  # a new job is written once, as it is in the end
            if reason := held_back(session, job):
                return hold(job, reason)
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
            resumes=0,
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

    def _lock_node(self, session: Session, slot: str | None) -> Node | None:
        # Decisions about a class's free places are made one after another. Before anything is inserted that refers to
        # the node: that locks its row too, in part, and two who then want all of it hold each other up.
        if slot in self._limits:
            return session.get(Node, self._node, with_for_update={"key_share": True})
        return None

    def _class_is_full(self, session: Session, job: Job) -> list[str]:
        """The jobs that fill the job's class; empty when there is a place, which the job then has."""
        if job.slot not in self._limits:
            return []
        running = session.scalars(
            select(Job.id)
            .where(Job.node == self._node, Job.state.in_(UNDER_WAY), Job.slot == job.slot, Job.slot_taken)
            .order_by(Job.sequence)
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
        deaths = job.attempts - 1 - job.retries - job.resumes
        cancelled = job.cancel_requested_at is not None
        return Decision(Verdict.RUN, attempt=job.attempts, deaths=deaths, cancelled=cancelled)

    # Running

    @patient
    def advance(self, job_id: str, phase: str, percent: int, message: str, also: Also = nothing_else) -> int:
        """Record a phase before its side effect. Returns the percentage as stored: it never falls."""
        with self._database.transaction() as session:
            also(session)
            job = owned_job(session, job_id)
            job.state = JobState.PROGRESS
            self._enter(job, phase, percent, message)
            return job.percent

    @patient
    def advance_step(
        self,
        job_id: str,
        phase: str,
        percent: int,
        message: str,
        whole: tuple[str, str, int],
        also: Also = nothing_else,
    ) -> tuple[int, Job | None]:
        """As ``advance``, for a step, and for the job it belongs to: its id, its phase and its percentage.

        That job is returned too; None where it does not wait for the step (any more).
        """
        whole_id, its_phase, its_percent = whole
        both = select(Job).where(Job.id.in_([job_id, whole_id])).with_for_update()
        with self._database.transaction() as session:
            also(session)
            found = {job.id: job for job in session.scalars(both)}
            if (job := found.get(job_id)) is None:
                raise not_in_the_ledger(job_id)
            job.state = JobState.PROGRESS
            self._enter(job, phase, percent, message)
            waiting = found.get(whole_id)
            if waiting is None or waiting.waits_on != STEPS:
                return job.percent, None
            self._enter(waiting, its_phase, its_percent, f"{message} ({self._node})")
            return job.percent, waiting

    @staticmethod
    def _enter(job: Job, phase: str, percent: int, message: str) -> None:
        job.phase, job.message = phase, message
        job.percent = max(job.percent, percent)
        job.phases = [*job.phases, {"phase": phase, "at": utc_now().isoformat(), "message": message}]

    def progress(
        self,
        job_id: str,
        percent: int,
        message: str,
        live_migration: dict[str, Any] | None = None,
        also: Also = nothing_else,
    ) -> int:
        """Record how far a job has come within its phase. Returns the percentage as stored: it never falls."""
        with self._database.transaction() as session:
            job = owned_job(session, job_id)
            job.percent, job.message = max(job.percent, percent), message
            job.live_migration = live_migration or job.live_migration
            also(session)
            return job.percent

    def knows(self, job_id: str) -> bool:
        """Whether there is a job of this id, on whichever node and in whatever state."""
        with self._database.reading() as session:
            return session.scalar(select(Job.id).where(Job.id == job_id)) is not None

    @patient
    def note(self, job_id: str, message: str) -> None:
        """Add to the history of a job what was decided about it; its phase stays."""
        with self._database.transaction() as session:
            job = owned_job(session, job_id)
            job.message = message
            job.phases = [*job.phases, {"phase": NOTE, "at": utc_now().isoformat(), "message": message}]

    def last_phase_of(self, job_id: str) -> tuple[str, datetime | None]:
        """The phase a job is or was in, and since when, for one that is continued after its worker died."""
        with self._database.reading() as session:
            phases = session.scalar(select(Job.phases).where(Job.id == job_id)) or []
        for entry in reversed(phases):
            if entry["phase"] != NOTE:
                return str(entry["phase"]), datetime.fromisoformat(str(entry["at"]))
        return "received", None

    # Steps, mostly on other nodes

    def hand_over(
        self,
        job_id: str,
        steps: Sequence[Step],
        deadline_s: float,
        *,
        phase: tuple[str, int, str] | None = None,
        also: Also = nothing_else,
    ) -> list[Wakeup]:
        """Have other jobs do parts of a job, which waits for them from now on without a worker.

        The job is woken when one of the steps has ended, when ``deadline_s`` are over, or when it is cancelled. Safe to
        repeat: a step that is there already is waited for. Returns whose messages are to be sent.

        ``phase`` (with its percentage and message) is entered at the same moment.
        """
        ids = [step.id for step in steps]
        with self._database.transaction() as session:
            job = owned_job(session, job_id)
            known = {part.id: part for part in session.scalars(select(Job).where(Job.id.in_(ids)))}
            also(session)
            if phase:
                self._enter(job, *phase)
            job.state, job.claimed_by, job.waits_on = JobState.PROGRESS, None, STEPS
            job.waiting_for, job.retry_at = ids, utc_now() + timedelta(seconds=deadline_s)
            new = {step.id: step.row(job) for step in steps if step.id not in known}
            session.add_all(new.values())
            session.flush()
            session.add_all(JobParent(job_id=job.id, parent_id=step_id) for step_id in new)
            wakeups = [wakeup(part) for part in (*known.values(), *new.values()) if part.state == JobState.PENDING]
        if not known:
            return wakeups  # nobody could see them before, and whoever ends one sees that the job waits
        # Looked at once it is there for all to see that the job waits: a step may have ended meanwhile.
        ended = Ended()
        self._settle_child(job_id, ended)
        return [*wakeups, *ended.wakeups]

    def step(self, step_id: str) -> StepEnd | None:
        """How a step ended; None while it has not, or where there is none."""
        with self._database.reading() as session:
            row = session.scalar(select(Job).where(Job.id == step_id, Job.finished_at.is_not(None)))
            return StepEnd(row.state == JobState.SUCCESS, row.result, row.error) if row else None

    def waited_s(self, step_id: str) -> float | None:
        """How long ago a step was handed over; None where there is none."""
        with self._database.reading() as session:
            since = session.scalar(select(Job.received_at).where(Job.id == step_id))
            return (utc_now() - since).total_seconds() if since else None

    # Ending

    def succeed(self, job_id: str, result: Any, also: Also = nothing_else) -> Ended:
        """Record success. Returns what has to be done about the jobs that waited for it."""
        return self._finish(job_id, JobState.SUCCESS, result=result, also=also)

    def fail(self, job_id: str, error: dict[str, Any]) -> Ended:
        """Record failure with ``{"code", "message", "details"}``. Returns as ``succeed`` does."""
        return self._finish(job_id, JobState.FAILURE, error=error)

    def revoke(self, job_id: str, message: str) -> Ended:
        """Record that a running job gave up because it was asked to, and undid what it had begun."""
        return self._finish(job_id, JobState.REVOKED, error=cancelled(message))

    def _finish(
        self,
        job_id: str,
        state: JobState,
        *,
        result: Any = None,
        error: dict[str, Any] | None = None,
        also: Also = nothing_else,
    ) -> Ended:
        with self._database.transaction() as session:
            lock, job = locked_with_instance(session, job_id)
            also(session)
            if job.state not in FINAL_JOB_STATES:  # as it is when this is repeated after a commit of unknown outcome
                job.state, job.result, job.error = state, result, error
                job.finished_at = utc_now()
                if state == JobState.SUCCESS:
                    job.percent = 100
            slot, ended = give_up_slot(job), Ended(hand_on(session, lock, job_id))
            ended.wakeups += (whole := whole_of(session, job))
        # A step that has woken its job: whoever else comes after it, which nobody does by himself, is woken by a beat.
        return ended if whole and not slot else self._wake_others(job_id, slot, ended)

    def _wake_others(self, job_id: str, slot: str | None, ended: Ended) -> Ended:
        """In transactions of their own; a worker killed in between leaves them to ``overdue``."""
        if slot:
            ended.wakeups += self._fill_class(slot)
        # Asked when the end is there for all to see: a child that is not among these yet will see it.
        with self._database.reading() as session:
            children = waiting_children(session, job_id)
        for child in children:
            self._settle_child(child, ended)
        return ended

    def _settle_child(self, child: str, ended: Ended) -> None:
        with self._database.transaction() as session:
            job = owned_job(session, child)
            still_open, failed = parents(session, job)
            if job.waits_on == STEPS and len(still_open) < len(job.waiting_for):
                ended.wakeups.append(go_on(job))
            if job.state != JobState.WAITING or job.waits_on != PARENTS:
                return
            if failed and job.after_failure == "cancel":
                revoke(job, f"job {failed[0]}, which it comes after, failed")
                ended.revoked.append(child)
            elif still_open:
                job.waiting_for = still_open
                return
            else:
                ended.wakeups.append(make_ready(job))
                return
        self._wake_others(child, None, ended)

    def _fill_class(self, slot: str) -> list[Wakeup]:
        """Give the free places of a class to those that wait longest, the more urgent first."""
        if slot not in self._limits:
            return []
        with self._database.transaction() as session:
            node = self._lock_node(session, slot)
            mine = select(Job).where(Job.node == self._node, Job.slot == slot)
            queue = mine.where(Job.state == JobState.WAITING, Job.waits_on == LIMIT)
            if node and node.held_at:
                queue = queue.where(or_(Job.attempts > 0, Job.step_of.is_not(None)))
            queue = queue.order_by(Job.priority.desc(), Job.sequence).limit(self._limits[slot]).with_for_update()
            if not (waiting := session.scalars(queue).all()):
                return []
            having = mine.where(Job.state.in_(UNDER_WAY), Job.slot_taken)
            taken = session.scalar(select(func.count()).select_from(having.subquery())) or 0
            waiting = waiting[: max(0, self._limits[slot] - taken)]
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
                    if lock is None and job is not None and holds_instance(session, job):
                        continue  # its message came between the two: look again, in the order of the locks
                    if job is None:
                        job = self._insert_tombstone(session, job_id)
                    if job.state == JobState.REVOKED and not job.claimed_by:
                        return CancelOutcome.REVOKED, Ended()  # by another node that was asked too, or before
                    if job.state in FINAL_JOB_STATES:
                        return CancelOutcome.FINISHED, Ended()
                    if job.claimed_by or job.waits_on == STEPS or (job.attempts and job.state == JobState.PENDING):
                        if also_running:
                            job.cancel_requested_at = utc_now()
                        waits = also_running and job.waits_on == STEPS
                        return CancelOutcome.REQUESTED, Ended([go_on(job)] if waits else [])
                    revoke(job, message)
                    slot, ended = give_up_slot(job), Ended(hand_on(session, lock, job_id))
                return CancelOutcome.REVOKED, self._wake_others(job_id, slot, ended)
            except IntegrityError as exc:
                conflict = exc
        raise conflict

    def _insert_tombstone(self, session: Session, job_id: str) -> Job:
        job = Job(id=job_id, node=self._node, task=TOMBSTONE, arguments={}, state=JobState.PENDING)
        session.add(job)
        session.flush()
        return job

    def postpone(self, job_id: str, error: dict[str, Any], attempt: int | None = None) -> tuple[datetime, Ended] | None:
        """Put a job whose attempt failed aside until later. It keeps its instance, and gives up its class's place.

        The delay doubles with each retry and has jitter. Returns when it is due, and whom its place wakes. None, and
        nothing changed, after RETRIES_MAX of them. May be repeated with the same ``attempt`` by who does not know
        whether it took effect.
        """
        with self._database.transaction() as session:
            job = owned_job(session, job_id)
            if attempt and (job.state == JobState.RETRY or job.attempts != attempt):
                return job.retry_at or utc_now(), Ended()
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
        now = utc_now()
        query = (
            select(Job.id)
            .where(Job.node == self._node, Job.state == JobState.RETRY)
            .where(or_(Job.retry_at <= now, Job.retry_at > now + RETRY_FARTHEST))
            .order_by(Job.sequence)
        )
        waited_enough = select(Job.id).where(*self._waits_for_a_step(), Job.retry_at <= now)
        with self._database.reading() as session:
            found = [*session.scalars(query), *session.scalars(waited_enough)]
        return [wakeup for job_id in found if (wakeup := self._take_up(job_id))]

    def _waits_for_a_step(self) -> tuple[ColumnElement[bool], ...]:
        return Job.node == self._node, Job.state == JobState.PROGRESS, Job.waits_on == STEPS

    def _take_up(self, job_id: str) -> Wakeup | None:
        # One by one and by its key: to lock a range is to wait for whoever cancels one of it, and he for us.
        with self._database.transaction() as session:
            job = owned_job(session, job_id)
            if job.waits_on == STEPS:
                return go_on(job)
            if job.state != JobState.RETRY:
                return None
            job.state, job.error = JobState.PENDING, None
            return wakeup(job)

    def next_retry_at(self) -> datetime | None:
        """When the next job that was put aside is due; None when there is none."""
        with self._database.reading() as session:
            at = session.scalar(
                select(func.min(Job.retry_at)).where(Job.node == self._node, Job.state == JobState.RETRY)
            )
            step_at = session.scalar(select(func.min(Job.retry_at)).where(*self._waits_for_a_step()))
            now = utc_now()
            at = now if at and at > now + RETRY_FARTHEST else at
            return min(filter(None, (at, step_at)), default=None)

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
            arguments = {name: value for name, value in job.arguments.items() if name != "after"}
            return self.add(session, TaskName(job.task), arguments, priority=job.priority, retry_of=job_id)

    def add(
        self,
        session: Session,
        task: TaskName,
        arguments: dict[str, Any],
        *,
        priority: int = 0,
        retry_of: str | None = None,
    ) -> Wakeup:
        """Give this node a job, in a transaction of the caller's; its message is to be sent after that.

        Where it is not sent, the job is one of those ``forgotten``.
        """
        job = Job(
            id=str(uuid.uuid4()),
            node=self._node,
            task=task,
            instance_name=instance_of(arguments),
            arguments=arguments,
            state=JobState.PENDING,
            slot=SLOTS.get(task),
            priority=priority,
            retry_of=retry_of,
        )
        session.add(job)
        session.flush()
        return wakeup(job)

    def retry_failed(self, since: datetime, limit: int) -> dict[str, Wakeup]:
        """Retry each job of this node that failed since a time, where that can help and nobody did; old id to new."""
        later = aliased(Job)
        query = (
            select(Job.id, Job.error)
            .where(Job.node == self._node, Job.state == JobState.FAILURE, Job.finished_at >= since)
            .where(~exists().where(later.retry_of == Job.id), Job.task.in_(RETRYABLE))
            .order_by(Job.sequence)
        )
        with self._database.reading() as session:
            failed = [job.id for job in session.execute(query) if (job.error or {})["details"].get("retryable")]
        return {job_id: self.retry(job_id) for job_id in failed[:limit]}

    # After a death

    def unpublished(self) -> list[str]:
        """Jobs that ended in the last moments of the workers before, whose results may not have reached the backend.

        Those that were revoked before anybody had claimed them name no worker, and may be of any node.
        """
        workers = (
            select(Incarnation)
            .where(Incarnation.node == self._node, Incarnation.id != self._incarnation)
            .order_by(Incarnation.started_at.desc())
            .limit(PREDECESSORS)
        )
        found: dict[str, None] = {}
        with self._database.reading() as session:
            for worker in session.scalars(workers).all():
                since, until = worker.heartbeat_at - LAST_MOMENTS, worker.heartbeat_at + UNHEARD_MAX
                ended = select(Job.id).where(Job.finished_at >= since)
                found |= dict.fromkeys(session.scalars(ended.where(Job.claimed_by == worker.id)))
                unclaimed = ended.where(Job.claimed_by.is_(None), Job.finished_at <= until)
                found |= dict.fromkeys(session.scalars(unclaimed))
        return [*found]

    def take_over(self) -> list[Wakeup]:
        """Free the jobs that dead predecessors of this node held, and name all that have to be woken.

        To be called before the first delivery. A job keeps its id, its instance's lock and its recorded phases; the
        operation itself looks at what is true and continues from there.
        """
        with self._database.transaction() as session:
            unfinished = session.scalars(
                select(Job)
                .where(Job.node == self._node, Job.state.in_(UNDER_WAY), Job.waits_on.is_(None))
                .order_by(Job.sequence)
                .with_for_update()
            ).all()
            for job in unfinished:
                job.claimed_by, job.state = None, JobState.PENDING
            # Whether the messages of steps were sent is not known; one that comes twice does no harm.
            waiting = select(Job.id).where(*self._waits_for_a_step())
            steps = session.scalars(select(Job).where(Job.step_of.in_(waiting), Job.finished_at.is_(None))).all()
            return [wakeup(job) for job in (*unfinished, *steps)]

    def forgotten(self, older_than: timedelta) -> list[Wakeup]:
        """Jobs that wait for their message longer than a broker takes: it was lost, or never sent. Each is named again
        only after as long again."""
        now = utc_now()
        long_ago = or_(Job.updated_at < now - older_than, Job.updated_at > now + older_than)  # the clock was set back
        query = select(Job).where(Job.node == self._node, Job.state == JobState.PENDING, long_ago)
        with self._database.transaction() as session:
            jobs = session.scalars(query.with_for_update()).all()
            for job in jobs:
                job.updated_at = utc_now()
            return [wakeup(job) for job in jobs]

    def overdue(self) -> Ended:
        """Jobs that wait on parents which have all ended, on a class that has places, or on a hold that is over: their
        waker died."""
        ended = Ended()
        with self._database.reading() as session:
            on_parents = select(Job.id).where(
                Job.node == self._node, Job.state == JobState.WAITING, Job.waits_on == PARENTS
            )
            on_steps = select(Job.id).where(*self._waits_for_a_step())
            waiting = [*session.scalars(on_parents), *session.scalars(on_steps)]
        for job_id in waiting:
            self._settle_child(job_id, ended)
        for slot in self._limits:
            ended.wakeups += self._fill_class(slot)
        ended.wakeups += self.let_go()
        return ended

    def let_go(self) -> list[Wakeup]:
        """The jobs that this node held back until now; none while it does."""
        with self._database.reading() as session:
            found = [job.id for job in held(session, self._node)]
        return [wakeup for job_id in found if (wakeup := self._let_one_go(job_id))]

    def _let_one_go(self, job_id: str) -> Wakeup | None:
        with self._database.transaction() as session:
            job = owned_job(session, job_id)
            return make_ready(job) if job.state == JobState.WAITING and job.waits_on == HOLD else None
