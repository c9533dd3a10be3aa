"""What the database says of this node: the same few queries whatever the number of guests and jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.orm import Session, aliased

from hostler.contract import FINAL_JOB_STATES, JobState
from models import DiskLease, Instance, InstanceLock, Job, JobParent, Runtime, UidLease, UidRange, utc_now
from worker.operations.context import NodeContext
from worker.operations.job_rows import PARENTS

LONG_ENDED = timedelta(minutes=1)
"""A job whose parents have all ended is woken by the last of them, or by one of the next heartbeats."""

Rows = Sequence[Any]


@dataclass(frozen=True)
class Records:
    """``locks`` carries the job of each lock, empty where there is none. ``released`` are jobs that wait on parents
    which have all ended for a while."""

    incarnation: str
    states: dict[str, str]
    runtimes: Sequence[Runtime]
    disk_leases: Sequence[DiskLease]
    uid_leases: Sequence[UidLease]
    uid_ranges: Sequence[UidRange]
    locks: Rows
    jobs_at_work: Rows
    waiting: Rows
    released: frozenset[str]

    def held(self, but: str) -> dict[str, Any]:
        """The instances that an unfinished job has for itself, with the lock; not those of the job ``but``."""
        return {
            lock.instance_name: lock
            for lock in self.locks
            if lock.state and lock.state not in FINAL_JOB_STATES and lock.job_id != but
        }


def read(node: NodeContext) -> Records:
    """Read them, in one transaction that changes nothing."""
    with node.database.reading() as session:
        states = select(Instance.name, Instance.state).where(Instance.node == node.name)
        return Records(
            incarnation=node.incarnation,
            states={row.name: row.state for row in session.execute(states)},
            runtimes=session.scalars(select(Runtime).where(Runtime.node == node.name)).all(),
            disk_leases=session.scalars(select(DiskLease).where(DiskLease.node == node.name)).all(),
            uid_leases=session.scalars(
                select(UidLease).where(UidLease.node == node.name, UidLease.instance_name.is_not(None))
            ).all(),
            uid_ranges=session.scalars(select(UidRange).where(UidRange.node == node.name)).all(),
            locks=_locks(session, node.name),
            jobs_at_work=session.execute(
                select(Job.id, Job.task, Job.phase, Job.instance_name, Job.claimed_by).where(
                    Job.node == node.name,
                    Job.state.in_([JobState.STARTED, JobState.PROGRESS]),
                    Job.waits_on.is_(None),  # a job that has a step on another node is at work without a worker
                )
            ).all(),
            waiting=session.execute(
                select(Job.id, Job.sequence, Job.instance_name, Job.waits_on)
                .where(Job.node == node.name, Job.state == JobState.WAITING)
                .order_by(Job.sequence)
            ).all(),
            released=_released(session, node.name),
        )


def known_elsewhere(node: NodeContext, uuids: list[str]) -> set[str]:
    """Which of these uuids are runtimes of other nodes: two nodes may share a host and its run folder."""
    if not uuids:
        return set()
    with node.database.reading() as session:
        return {*session.scalars(select(Runtime.uuid).where(Runtime.uuid.in_(uuids), Runtime.node != node.name))}


def _locks(session: Session, node: str) -> Rows:
    # Also those that a job of another node has of an instance of this one, or of one that has a QEMU here.
    mine = select(Instance.name).where(Instance.node == node)
    here = select(Runtime.instance_name).where(Runtime.node == node)
    return session.execute(
        select(
            InstanceLock.instance_name,
            InstanceLock.job_id,
            InstanceLock.node,
            InstanceLock.taken_at,
            Job.state,
            Job.task,
        )
        .outerjoin(Job, Job.id == InstanceLock.job_id)
        .where(or_(InstanceLock.node == node, *(InstanceLock.instance_name.in_(names) for names in (mine, here))))
    ).all()


def _released(session: Session, node: str) -> frozenset[str]:
    parent = aliased(Job)
    rows = session.execute(
        select(Job.id, parent.finished_at)
        .join(JobParent, JobParent.job_id == Job.id)
        .outerjoin(parent, parent.id == JobParent.parent_id)
        .where(Job.node == node, Job.state == JobState.WAITING, Job.waits_on == PARENTS)
    ).all()
    since = utc_now() - LONG_ENDED
    held_back = {row.id for row in rows if row.finished_at is None or row.finished_at > since}
    return frozenset(row.id for row in rows) - held_back
