"""What a new worker does before its first job: look at what its dead predecessor left, and adopt what runs."""

from __future__ import annotations

import structlog
from sqlalchemy import select

from hostler.contract import InstanceState
from models import Instance, Job, Runtime
from worker.operations.context import NodeContext
from worker.operations.guests import Guests, how_it_ended, identity_of, release
from worker.operations.wanted_rows import note_boot

log = structlog.get_logger(__name__)

PASSING = (InstanceState.STARTING, InstanceState.STOPPING)


def adopt_guests(node: NodeContext, guests: Guests) -> None:
    """Adopt every guest of this node that runs, and record the end of those that ended while no worker watched.

    A start that was under way is left alone here when its job is still open: that job decides. What is here of an
    instance that another node owns is watched too, and given back when it has ended.
    """
    with node.database.reading() as session:
        rows = session.scalars(select(Runtime).where(Runtime.node == node.name)).all()
        states = {row.instance_name: row.instance.state for row in rows if row.instance.node == node.name}
        unfinished = select(Job.instance_name, Job.phase).where(Job.node == node.name, Job.finished_at.is_(None))
        open_jobs = {(row.instance_name, row.phase) for row in session.execute(unfinished)}
    changing = {name for name, _ in open_jobs}
    for row in rows:
        killed_by_us = (row.instance_name, "kill") in open_jobs
        if row.instance_name in changing:
            if states.get(row.instance_name) == InstanceState.STARTING:
                continue
        else:
            _forget_passing_state(node, row.instance_name)
        if guests.adopt(row, killed_by_us=killed_by_us):
            log.info("adopted a running guest", instance=row.instance_name, pid=row.pid)
        elif identity_of(row) is None:
            ending = how_it_ended(row, killed_by_us=killed_by_us)
            log.info("a guest ended while no worker ran", instance=row.instance_name, reason=ending.reason)
            release(node, row.instance_name, row.uuid, ending)
    _settle_starting(node)
    note_boot(node)


def _forget_passing_state(node: NodeContext, name: str) -> None:
    # No job is at work on it any more: what it is has to be seen anew.
    with node.database.transaction() as session:
        row = session.get_one(Instance, name, with_for_update=True)
        if row.node == node.name and row.state in PASSING:
            row.state = InstanceState.UNKNOWN


def _settle_starting(node: NodeContext) -> None:
    """Instances left in a passing state without a runtime and without a job: nothing runs, so they are stopped."""
    with node.database.transaction() as session:
        for row in session.scalars(
            select(Instance).where(
                Instance.node == node.name,
                Instance.state.in_(PASSING),
            )
        ):
            if row.runtime is None:
                row.state = InstanceState.STOPPED
