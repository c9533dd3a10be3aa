"""What migrations left on this node whose job has ended without seeing to it: removed, or brought to an end.

For the case that whoever was to see to it died too often, or gave up waiting for this node.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import structlog
from sqlalchemy import exists, select
from sqlalchemy.orm import Session, aliased

from hostler.contract import FINAL_JOB_STATES, InstanceState, TaskName
from models import Instance, InstanceLock, Job, LiveMigration, Runtime, utc_now
from worker.errors import MigrationFailed, OperationError
from worker.kvm.live_migration.outgoing import Outgoing
from worker.kvm.live_migration.sample import POSTCOPY
from worker.operations.context import NodeContext
from worker.operations.guests import Guests
from worker.operations.job_rows import locked_lock
from worker.operations.live_migration import rows
from worker.operations.live_migration.other_side import end_incoming
from worker.operations.live_migration.returned import go_on_here
from worker.operations.live_migration.rows import Stage
from worker.operations.wanted import IDLE

log = structlog.get_logger(__name__)

ACCEPTED_MAX = timedelta(hours=1)
"""How long a migration that a master drives may wait to begin: after that its master counts as gone."""


def sweep(node: NodeContext, guests: Guests) -> None:
    """See to all that is left here. A QEMU whose guest runs, or which another one needs, is never ended."""
    for name, uuid, ended in _left(node):
        try:
            _remove(node, guests, name, uuid, ended)
        except OperationError as exc:
            log.warning("a live migration's leftover could not be removed", instance=name, reason=str(exc))
    for row in _abandoned(node):
        try:
            _end(node, guests, row)
        except OperationError as exc:
            log.warning("a live migration could not be ended", migration=row.job_id, reason=str(exc))


def remove(node: NodeContext, guests: Guests, name: str, *, for_migration: str) -> None:
    """As ``sweep``, for what migrations before this one left here of one guest. Raises OperationError."""
    for name_left, uuid, ended in _left(node, for_migration):
        if name_left == name:
            _remove(node, guests, name, uuid, ended)


def _remove(node: NodeContext, guests: Guests, name: str, uuid: str, ended: bool) -> None:
    guest = guests.get(name)
    if guest and guest.uuid == uuid and not guest.process.wait(0):
        if guest.talk().status() == "running":
            log.error("a guest runs here that another node owns; nothing is done", instance=name)
            return
        if not ended and Outgoing(guest.talk()).query().status in POSTCOPY:
            return  # the guest runs elsewhere on what this one still has of its memory
    removed = end_incoming(node, guests, name, uuid)
    log.info("a live migration's leftover was removed", instance=name, removed=removed)


def _end(node: NodeContext, guests: Guests, row: LiveMigration) -> None:
    """Its job can never come back to it, and the guest is this node's."""
    why = rows.as_failure(MigrationFailed("the job that was at it has ended; the guest stays"), row.stage)
    report = {"failure": why} | (row.report or {})
    if _take(node, row, report):
        go_on_here(node, guests, row)
        rows.move_on(node, row.job_id, Stage.ABORTED, Stage.DONE)
        log.info("a live migration whose job had ended was given up", migration=row.job_id, instance=row.instance_name)


def _take(node: NodeContext, row: LiveMigration, report: dict[str, Any]) -> bool:
    """Whether it is to be ended still: a job may have taken the guest since it was found, and moved it."""
    with node.database.transaction() as session:
        if locked_lock(session, row.instance_name):
            return False
        if session.scalar(select(Instance.node).where(Instance.name == row.instance_name)) != node.name:
            return False
        return rows.enter(session, row.job_id, rows.SOURCE_OWNS | {Stage.ABORTED}, Stage.ABORTED, report=report)


def _abandoned(node: NodeContext) -> list[LiveMigration]:
    """What this node has of migrations whose jobs have ended, of guests that it owns and nobody has moved since."""
    later = aliased(LiveMigration)
    moved_since = exists().where(
        later.instance_name == LiveMigration.instance_name,
        later.started_at > LiveMigration.started_at,
        (later.stage != Stage.DONE) | later.target_uuid.is_not(None),  # no dry run
    )
    held = exists().where(InstanceLock.instance_name == LiveMigration.instance_name)
    # A master drives it from step to step; whose step it is that sends memory has the instance meanwhile.
    forgotten = LiveMigration.started_at < utc_now() - ACCEPTED_MAX
    begun = (Job.task == TaskName.MIGRATION_INFO) & ((LiveMigration.stage != Stage.ACCEPTING) | forgotten)
    query = (
        select(LiveMigration)
        .join(Job, Job.id == LiveMigration.job_id)
        .join(Instance, Instance.name == LiveMigration.instance_name)
        .where(Instance.node == node.name, ~moved_since)
        .where(LiveMigration.source == node.name, LiveMigration.stage.in_(rows.SOURCE_OWNS | {Stage.ABORTED}))
        .where(Job.finished_at.is_not(None), (Job.task == TaskName.INSTANCE_MIGRATE) | begun, ~held)
    )
    with node.database.reading() as session:
        return [*session.scalars(query)]


def _left(node: NodeContext, but_for: str = "") -> list[tuple[str, str, bool]]:
    """Name and uuid of the QEMUs here whose guests other nodes own, and that nobody needs; whether the guest ended."""
    query = (
        select(Runtime.instance_name, Runtime.uuid, Instance.state)
        .join(Instance, Instance.name == Runtime.instance_name)
        .where(Runtime.node == node.name, Instance.node != node.name)
    )
    with node.database.reading() as session:
        found = session.execute(query).all()
        return [(name, uuid, state in IDLE) for name, uuid, state in found if _is_over(session, name, state, but_for)]


def _is_over(session: Session, name: str, state: str, but_for: str) -> bool:
    latest = (
        select(LiveMigration.stage, Job.state, Job.task)
        .join(Job, Job.id == LiveMigration.job_id)
        .where(LiveMigration.instance_name == name, LiveMigration.job_id != but_for)
        .where((LiveMigration.stage != Stage.DONE) | LiveMigration.target_uuid.is_not(None))  # no dry run
        .order_by(LiveMigration.started_at.desc())
        .limit(1)
    )
    found = session.execute(latest).first()
    if found is None:
        return True
    stage, job_state, task = found
    if job_state not in FINAL_JOB_STATES:
        return False  # the job itself removes what is left
    if stage in rows.ON_THE_TARGET:
        return state != InstanceState.MIGRATING  # somebody has decided about the guest on the target
    # Steps that a master drives are jobs of their own: between two of them there is none.
    return stage in (Stage.FINALIZED, Stage.DONE, Stage.ABORTED) or task == TaskName.INSTANCE_MIGRATE
