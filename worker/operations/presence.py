"""Which nodes have a worker, as their heartbeats say, and what lies there unfinished meanwhile."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import and_, func, select

from hostler.contract import FINAL_JOB_STATES, JobState
from models import Database, Incarnation, Instance, Job, Node, utc_now
from worker.operations.context import NodeContext
from worker.operations.service import HEARTBEAT_S
from worker.operations.views import iso

ABSENT_AFTER = timedelta(seconds=3 * HEARTBEAT_S)
"""A worker that missed two beats may be slow; one that missed three is taken for gone."""

OPEN_JOB_STATES = frozenset(JobState) - FINAL_JOB_STATES


@dataclass(frozen=True)
class Presence:
    """A node and its latest worker. ``since``: when a living one started, when an absent one gave its last sign."""

    node: str
    alive: bool = False
    since: datetime | None = None
    version: str | None = None
    pid: int | None = None

    @property
    def absence(self) -> str:
        """What to tell about a job of this node while it has no worker."""
        since = f" since {self.since.isoformat(timespec='seconds')}" if self.since else ""
        return f"node {self.node} has no worker{since}; start one there: hostler worker"


def never_seen(node: str) -> str:
    """What to tell about a job that was sent to a node no database knows."""
    return f"no worker of node {node} was ever seen; check the name"


def presences(database: Database) -> dict[str, Presence]:
    """Every node that ever had a worker on this database, by name."""
    newest = (
        select(Incarnation.node, func.max(Incarnation.started_at).label("started_at"))
        .group_by(Incarnation.node)
        .subquery()
    )
    query = (
        select(Node.name, Incarnation)
        .outerjoin(newest, newest.c.node == Node.name)
        .outerjoin(
            Incarnation, and_(Incarnation.node == Node.name, Incarnation.started_at == newest.c.started_at)
        )
        .order_by(Node.name)
    )  # fmt: skip
    with database.reading() as session:
        return {row.name: _presence(row.name, row.Incarnation) for row in session.execute(query)}


def _presence(node: str, worker: Incarnation | None) -> Presence:
    if worker is None:
        return Presence(node)
    alive = worker.ended_at is None and worker.heartbeat_at >= utc_now() - ABSENT_AFTER
    since = worker.started_at if alive else worker.ended_at or worker.heartbeat_at
    return Presence(node, alive, since, worker.version, worker.pid)


def is_watcher(database: Database, node: str) -> bool:
    """Whether it is for this node to speak for the absent ones: of the living, its name comes first."""
    living = select(func.min(Incarnation.node)).where(
        Incarnation.ended_at.is_(None), Incarnation.heartbeat_at >= utc_now() - ABSENT_AFTER
    )
    with database.reading() as session:
        return session.scalar(living) == node


def open_jobs(database: Database, node: str, after: int, limit: int) -> list[Job]:
    """The node's jobs that have not ended, in their order, from beyond ``after`` (a ``sequence``)."""
    query = (
        select(Job)
        .where(Job.node == node, Job.state.in_(sorted(OPEN_JOB_STATES)), Job.sequence > after)
        .order_by(Job.sequence)
        .limit(limit)
    )
    with database.reading() as session:
        return list(session.scalars(query))


def known_jobs(database: Database, job_ids: Collection[str]) -> dict[str, Job]:
    """Those of the jobs that some node's ledger has, by id."""
    with database.reading() as session:
        return {job.id: job for job in session.scalars(select(Job).where(Job.id.in_(job_ids)))}


def has_begun(job: Job) -> bool:
    """Whether a worker ever began to carry the job out."""
    return job.attempts > 0


def list_nodes(node: NodeContext, asking: str) -> list[dict[str, Any]]:
    """All nodes of this database, by name, with guests as last recorded; the job ``asking`` is not counted."""
    guests = select(Instance.node, Instance.state, func.count().label("number")).group_by(
        Instance.node, Instance.state
    )  # fmt: skip
    jobs = select(Job.node, func.count().label("number")).where(
        Job.state.in_(sorted(OPEN_JOB_STATES)), Job.id != asking
    )  # fmt: skip
    with node.database.reading() as session:
        counted: dict[str, dict[str, int]] = {}
        for row in session.execute(guests):
            counted.setdefault(row.node, {})[row.state] = row.number
        marks = {row.name: row for row in session.scalars(select(Node))}
        unfinished = {row.node: row.number for row in session.execute(jobs.group_by(Job.node))}
    return [
        {
            "node": name,
            "worker": "alive" if found.alive else "absent",
            "since": iso(found.since),
            "version": found.version,
            "pid": found.pid if found.alive else None,
            "instances": counted.get(name, {}),
            "open_jobs": unfinished.get(name, 0),
            "drained_at": iso(marks[name].drained_at),
            "drained_by": marks[name].drained_by,
            "held_at": iso(marks[name].held_at),
            "held_reason": marks[name].held_reason,
            "fenced_at": iso(marks[name].fenced_at),
        }
        for name, found in presences(node.database).items()
    ]
