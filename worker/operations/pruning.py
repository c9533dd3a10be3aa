"""Retention: jobs that ended long ago leave the ledger, a batch at a time, so that nobody has to wait for it.

Each batch is looked at without a lock, then removed in a short transaction of its own. A pass may be given up after any
batch; the next one begins anew. What is never removed, however old: a job that has not ended, and one that a job which
has not ended comes after or retries.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, NamedTuple

import structlog
from sqlalchemy import and_, delete, exists, or_, select
from sqlalchemy.orm import Session, aliased

from hostler.contract import FINAL_JOB_STATES, JobState
from hostler.payloads import CHANGING_TASKS, JobPruneArguments
from hostler.settings import Settings
from models import Database, Incarnation, Job, JobParent, utc_now
from worker.errors import Cancelled
from worker.operations.context import JobContext
from worker.operations.ledger import PREDECESSORS, TOMBSTONE

log = structlog.get_logger(__name__)

BATCH = 1000
BATCHES_A_BEAT = 5
PRUNE_EVERY_S = 3600.0

QUERIES_KEPT = timedelta(days=1)
"""Jobs that only look are many, and nobody asks for them later."""

WORKERS_KEPT = timedelta(days=7)

BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)
"""Before all jobs."""


class Old(NamedTuple):
    """What is looked at of an ended job."""

    sequence: int
    id: str
    task: str
    state: str
    retry_of: str | None
    finished_at: datetime | None


@dataclass(frozen=True)
class Cutoffs:
    """What ended before these times is removed: jobs that changed something, those of them that failed or were revoked,
    and jobs that only looked."""

    changes: datetime
    failures: datetime
    queries: datetime

    @classmethod
    def ago(cls, changes_s: int, failures_s: int) -> Cutoffs:
        """So many seconds before now; 0 keeps them for ever."""
        now = utc_now()
        changes, failures = (now - timedelta(seconds=age) if age else BEGINNING for age in (changes_s, failures_s))
        return cls(changes, failures, max(changes, now - QUERIES_KEPT))

    def of(self, job: Old) -> datetime:
        """The one that counts for a job."""
        if job.task not in CHANGING_TASKS and job.task != TOMBSTONE:
            return self.queries
        if job.state != JobState.SUCCESS:
            return self.failures
        # A failed job must not look as if nobody had retried it.
        return min(self.changes, self.failures) if job.retry_of else self.changes


@dataclass
class Pruned:
    """How many jobs were removed, by state; and how many were old enough, but unfinished jobs need them."""

    removed: Counter[str] = field(default_factory=Counter)
    kept: int = 0

    def __iadd__(self, other: Pruned) -> Pruned:
        self.removed += other.removed
        self.kept += other.kept
        return self


class Pruner:
    """Prunes a node's ledger about once an hour, a few batches at each heartbeat, so that none is held up."""

    def __init__(self, database: Database, settings: Settings, begin_in_s: float | None = None) -> None:
        self._database = database
        self._settings = settings
        # Workers of many nodes, started together, shall not prune together.
        self._begin_at = time.monotonic() + (random.uniform(60, 600) if begin_in_s is None else begin_in_s)  # noqa: S311
        self._pass: Iterator[Pruned] | None = None

    def tend(self) -> None:
        """Go on with a pass, or begin one when it is time."""
        if self._pass is None:
            if time.monotonic() < self._begin_at:
                return
            self._begin_at = time.monotonic() + PRUNE_EVERY_S
            keep = Cutoffs.ago(self._settings.keep_jobs_s, self._settings.keep_failures_s)
            self._pass = prune(self._database, self._settings.node, keep)
        batches = [*islice(self._pass, BATCHES_A_BEAT)]
        if len(batches) < BATCHES_A_BEAT:
            self._pass = None
        if removed := sum((batch.removed for batch in batches), Counter[str]()):
            log.info("old jobs were removed from the ledger", **removed)


def prune_jobs(job: JobContext, arguments: JobPruneArguments) -> dict[str, Any]:
    """One whole pass over the node's ledger, or with ``dry_run`` only what it would remove.

    Raises Cancelled; what was removed until then stays removed.
    """
    settings = job.node.settings
    changes_s = settings.keep_jobs_s if arguments.older_than_s is None else arguments.older_than_s
    failures_s = (
        settings.keep_failures_s if arguments.failures_older_than_s is None else arguments.failures_older_than_s
    )
    total, dry_run = Pruned(), arguments.dry_run
    for batch in prune(job.node.database, job.node.name, Cutoffs.ago(changes_s, failures_s), dry_run=dry_run):
        total += batch
        if job.is_giving_up:
            raise Cancelled(f"cancelled; {total.removed.total()} jobs were removed before, no others are")
    return {
        "would_remove" if dry_run else "removed": total.removed.total(),
        "kept": total.kept,
        "by_state": {str(state): total.removed[state] for state in sorted(FINAL_JOB_STATES)},
    }


def prune(database: Database, node: str, cutoffs: Cutoffs, *, dry_run: bool = False) -> Iterator[Pruned]:
    """A pass over the node's ended jobs; each step is a batch. At its end, workers that no job names go too."""
    for state in sorted(FINAL_JOB_STATES):
        batch: list[Old] | None = None
        while batch is None or len(batch) == BATCH:
            batch = _next_batch(database, node, state, cutoffs, after=batch[-1] if batch else None)
            old = [job for job in batch if job.finished_at and job.finished_at < cutoffs.of(job)]
            yield _remove(database, old, dry_run=dry_run) if old else Pruned()
    if not dry_run:
        _forget_workers(database, node)


def _next_batch(database: Database, node: str, state: JobState, cutoffs: Cutoffs, after: Old | None) -> list[Old]:
    ended, sequence = (after.finished_at, after.sequence) if after else (BEGINNING, 0)
    query = (
        select(Job.sequence, Job.id, Job.task, Job.state, Job.retry_of, Job.finished_at)
        .where(Job.node == node, Job.state == state)
        .where(Job.finished_at < max(cutoffs.changes, cutoffs.failures, cutoffs.queries))
        # MariaDB finds no index for (a, b) > (x, y).
        .where(and_(Job.finished_at >= ended, or_(Job.finished_at > ended, Job.sequence > sequence)))
        .order_by(Job.finished_at, Job.sequence)
        .limit(BATCH)
    )
    with database.reading() as session:
        return [Old(*row) for row in session.execute(query)]


def _remove(database: Database, old: list[Old], *, dry_run: bool) -> Pruned:
    if dry_run:
        with database.reading() as session:
            return _count(old, _needed(session, {job.sequence for job in old}))
    with database.transaction() as session:
        # Whoever is about to retry one of them has it locked: it is passed over, and nobody begins to from here on. One
        # that begins to wait for several now either finds this one or has seen that it ended (``job_rows.parents``).
        wanted = select(Job.sequence).where(Job.sequence.in_([job.sequence for job in old]))
        locked = {*session.scalars(wanted.with_for_update(skip_locked=True))}
        needed = _needed(session, locked)
        gone = delete(Job).where(Job.sequence.in_(locked - needed))
        session.execute(gone.execution_options(synchronize_session=False))
        return _count([job for job in old if job.sequence in locked], needed)


def _needed(session: Session, numbers: set[int]) -> set[int]:
    child, retry = aliased(Job), aliased(Job)
    after = select(child.id).join(JobParent, JobParent.job_id == child.id).where(JobParent.parent_id == Job.id)
    again = select(retry.id).where(retry.retry_of == Job.id)
    # With a limit each stays a look-up per job: joined, so many at once tempt PostgreSQL to read the whole table.
    found = [after.where(child.finished_at.is_(None)).limit(1), again.where(retry.finished_at.is_(None)).limit(1)]
    unfinished = or_(*(query.scalar_subquery().is_not(None) for query in found))
    return {*session.scalars(select(Job.sequence).where(Job.sequence.in_(numbers), unfinished))}


def _count(jobs: list[Old], needed: set[int]) -> Pruned:
    gone = Counter(job.state for job in jobs if job.sequence not in needed)
    return Pruned(gone, len(jobs) - gone.total())


def _forget_workers(database: Database, node: str) -> None:
    mine = select(Incarnation.id).where(Incarnation.node == node)
    with database.transaction() as session:
        # Of the latest ones the next worker asks what they ended last.
        latest = session.scalars(mine.order_by(Incarnation.started_at.desc()).limit(PREDECESSORS + 1)).all()
        old = mine.where(Incarnation.ended_at < utc_now() - WORKERS_KEPT, Incarnation.id.not_in(latest))
        nameless = session.scalars(old.where(~exists().where(Job.claimed_by == Incarnation.id)).limit(BATCH)).all()
        session.execute(delete(Incarnation).where(Incarnation.id.in_(nameless)))
