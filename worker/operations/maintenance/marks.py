"""What SQL says of a node under maintenance, and what that forbids. Each mark is one transaction on the node's row."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from sqlalchemy import exists, select
from sqlalchemy.orm import Session

from hostler.contract import FINAL_JOB_STATES
from hostler.errors import InvalidArgument
from models import Database, Incarnation, Instance, Job, Node, utc_now
from worker.errors import InstanceBusy, NodeUnavailable
from worker.operations.views import iso

TAKES_GUESTS = exists().where(Node.name == Instance.node, Node.drained_at.is_(None))
"""Of an instance: its node is not drained."""


def row_of(database: Database, name: str) -> Node:
    """A node. Raises InvalidArgument where there is none of this name."""
    with database.reading() as session:
        if row := session.get(Node, name):
            return row
    raise InvalidArgument([{"field": "node", "reason": f"this node's database knows no node {name!r}"}])


def require_admission(node: Node | None, what: str) -> None:
    """Raises NodeUnavailable where a node takes no guest in. To be asked with the node's row locked: who drains it then
    sees the guest, or the guest sees the drain."""
    if node and node.drained_at:
        raise NodeUnavailable(f"{what}: {why_drained(node)}", drained_at=iso(node.drained_at), job=node.drained_by)


def why_drained(node: Node) -> str:
    """What to tell about a node that takes no guest in."""
    return (
        f"node {node.name} is drained since {iso(node.drained_at)} (job {node.drained_by}); choose another, or let it "
        f"take guests in again: `hostler undrain {node.name}`"
    )


def mark_drained(database: Database, name: str, job_id: str) -> datetime:
    """From now on no guest comes to the node; since when that is so. Safe to repeat. Raises InstanceBusy where another
    drain of it has not ended."""
    with database.transaction() as session:
        node = session.get_one(Node, name, with_for_update=True)
        _require_alone(session, node, node.drained_by, job_id)
        node.drained_at, node.drained_by = node.drained_at or utc_now(), job_id
        return node.drained_at


def unmark_drained(database: Database, name: str) -> datetime | None:
    """Since when it was drained; None where it was not. Raises InstanceBusy while it still is being drained."""
    with database.transaction() as session:
        node = session.get_one(Node, name, with_for_update=True)
        _require_alone(session, node, node.drained_by)
        since, node.drained_at, node.drained_by = node.drained_at, None, None
        return since


def mark_fenced(database: Database, name: str, job_id: str, still_off: Callable[[Session], None]) -> datetime:
    """From now on no worker starts there; since when that is so. Safe to repeat.

    ``still_off`` looks whether the node is off, when no worker of it can start any more, and raises where it is not.
    Raises InstanceBusy where another fence of it has not ended.
    """
    with database.transaction() as session:
        node = session.get_one(Node, name, with_for_update=True)
        if node.fenced_at and node.fenced_by == job_id:
            return node.fenced_at
        _require_alone(session, node, node.fenced_by, job_id)
        still_off(session)
        if node.fenced_at is None:
            latest = select(Incarnation).where(Incarnation.node == name).order_by(Incarnation.started_at.desc())
            worker = session.scalars(latest.limit(1)).first()
            node.fenced_at, node.fenced_boot_id = utc_now(), worker.boot_id if worker else None
        node.fenced_by = job_id
        for worker in session.scalars(
            select(Incarnation).where(Incarnation.node == name, Incarnation.ended_at.is_(None))
        ):
            worker.ended_at = utc_now()
        return node.fenced_at


def unmark_fenced(database: Database, name: str) -> datetime | None:
    """Since when it was fenced; None where it was not. Raises InstanceBusy while it still is being fenced."""
    with database.transaction() as session:
        node = session.get_one(Node, name, with_for_update=True)
        _require_alone(session, node, node.fenced_by)
        return lift_fence(node)


def lift_fence(node: Node) -> datetime | None:
    """The node may have a worker again. Within the caller's transaction."""
    since, node.fenced_at, node.fenced_by, node.fenced_boot_id = node.fenced_at, None, None, None
    return since


def _require_alone(session: Session, node: Node, other: str | None, job_id: str | None = None) -> None:
    if other is None or other == job_id:
        return
    state = session.scalar(select(Job.state).where(Job.id == other))
    if state is not None and state not in FINAL_JOB_STATES:
        raise InstanceBusy(
            f"job {other} is at it already ({node.name}); follow it: hostler watch {other}, or end it: "
            f"hostler cancel {other}",
            job=other,
        )
