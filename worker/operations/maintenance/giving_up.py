"""What a node that is off had, released in SQL: migrations with it, its guests, its QEMUs, its jobs.

In this order, so that whoever is woken by the end of a job finds all the rest decided. All of it is safe to repeat.
What only its host knows (taps, uids of its pool, folders) is seen to by its own worker, when it has one again.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from sqlalchemy import or_, select

from hostler.contract import InstanceState
from models import Instance, LiveMigration, Runtime
from worker.errors import NodeUnavailable
from worker.operations import presence
from worker.operations.context import NodeContext
from worker.operations.ledger import Ledger
from worker.operations.live_migration import rows
from worker.operations.live_migration.rows import Stage
from worker.operations.maintenance.marks import row_of
from worker.operations.receipts import Ended
from worker.operations.wanted import IDLE

JOBS_AT_ONCE = 100

Tell = Callable[[Ended, list[str]], None]
"""Carry out what the end of jobs brings about, and have the result backend told of them."""


def settle_migrations(node: NodeContext, dead: str) -> list[tuple[LiveMigration, bool]]:
    """Decide about each migration with the dead node. Those that their living target has to see to are returned, with
    whether the guest goes on there, or what waited for it is to be removed."""
    query = (
        select(LiveMigration)
        .where(or_(LiveMigration.source == dead, LiveMigration.target == dead), LiveMigration.stage != Stage.DONE)
        .order_by(LiveMigration.started_at.desc())
    )
    with node.database.reading() as session:
        open_rows = session.scalars(query).all()
    latest: dict[str, LiveMigration] = {}
    for row in open_rows:
        latest.setdefault(row.instance_name, row)
    found = [_settle(node, dead, row) for row in latest.values()]
    return [(row, success) for row, success in zip(latest.values(), found, strict=True) if success is not None]


def _settle(node: NodeContext, dead: str, row: LiveMigration) -> bool | None:
    why = NodeUnavailable(f"node {dead} was fenced: its host is off")
    failure = {"report": (row.report or {}) | {"failure": rows.as_failure(why, row.stage)}}
    if row.target == dead:
        if row.stage in rows.ON_THE_TARGET:
            # Where it never ran the source has it whole; where it may have run it crashed with the host.
            if row.stage == Stage.MOVED:
                rows.give_back(node, row.job_id, why)
            rows.move_on(node, row.job_id, Stage.CONTINUING, Stage.DONE, **failure)
        return None
    if row.stage == Stage.SWITCHING and row_of(node.database, row.target).fenced_at is None:
        # The target may have all of it, and nobody else can: it says whether it has.
        rows.give_to_target(node, row.job_id, {"tls": bool(row.info["tls"])})
    rows.move_on(node, row.job_id, rows.SOURCE_OWNS, Stage.ABORTED, **failure)
    stage = rows.get(node, row.job_id).stage
    if stage == Stage.FINALIZED:
        rows.move_on(node, row.job_id, Stage.FINALIZED, Stage.DONE)
    if stage == Stage.ABORTED:
        return False
    # With post-copy the rest of its memory was on the dead host: it can only be ended there, by a person.
    return True if stage in rows.ON_THE_TARGET and not row.report.get("postcopy") else None


def crash_guests(node: NodeContext, dead: str, since: datetime, job_id: str) -> None:
    """Its guests ended with it: ``ended_at`` is ``since`` for all of them. What it had of others is forgotten."""
    with node.database.reading() as session:
        with_qemu = select(Runtime.instance_name).where(Runtime.node == dead)
        names = session.scalars(
            select(Instance.name)
            .where(Instance.node == dead)
            .where(or_(Instance.state.not_in(IDLE), Instance.restart_at.is_not(None), Instance.name.in_(with_qemu)))
        ).all()
        every = {*names, *session.scalars(with_qemu)}
    for name in sorted(every):
        with node.database.transaction() as session:
            row = session.get(Instance, name, with_for_update=True, populate_existing=True)
            if row and row.node == dead:
                row.state, row.ended_at, row.restart_at = InstanceState.CRASHED, since, None
                row.reason = f"node {dead} was fenced (job {job_id}): its host is off"
            runtime = session.get(Runtime, (name, dead))
            if runtime:
                session.delete(runtime)


def end_jobs(node: NodeContext, dead: str, tell: Tell) -> None:
    """End all that it had to do. Who waited for one of its jobs goes on."""
    ledger = Ledger(node.database, dead, node.incarnation)
    message = f"node {dead} was fenced: its host is off"
    while jobs := presence.open_jobs(node.database, dead, 0, JOBS_AT_ONCE):
        for job in jobs:
            if presence.has_begun(job):
                error = {"code": NodeUnavailable.code, "message": message, "details": {"retryable": True}}
                ended = ledger.fail(job.id, error)
            else:
                ended = ledger.revoke(job.id, message)
            ended.wakeups = [wakeup for wakeup in ended.wakeups if wakeup.node != dead]
            tell(ended, [job.id])
