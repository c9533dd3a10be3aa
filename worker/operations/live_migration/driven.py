"""The four steps for a master that drives a migration itself, and changing one under way."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from hostler.contract import TaskName
from hostler.errors import InvalidArgument
from hostler.hidden import without_secrets
from hostler.migration import (
    MigrateArguments,
    MigrateTuneArguments,
    MigrationFinalizeArguments,
    MigrationInfoArguments,
    MigrationRunArguments,
)
from hostler.payloads import parse
from models import InstanceLock, Job, LiveMigration
from worker.errors import MigrationFailed, NotRunning
from worker.operations.context import JobContext, NodeContext
from worker.operations.guests import Guests
from worker.operations.live_migration import checks, rows
from worker.operations.live_migration.accept import discard
from worker.operations.live_migration.finalize import finalize, give_back
from worker.operations.live_migration.migrate import Migration
from worker.operations.live_migration.rows import Stage


def info(node: NodeContext, guests: Guests, job: JobContext, arguments: MigrationInfoArguments) -> dict[str, Any]:
    """Begin a migration: what the target has to know. Its id is this job's. Nothing is touched."""
    if known := rows.find(node, job.id):
        return _told(known)
    full = MigrateArguments.model_validate(arguments.model_dump())
    checks.instance_here(node, full.name)
    checks.require_possible(node, job, full)
    row = checks.describe(node, job, full, guests.need(full.name))
    described = _told(row)
    with node.database.transaction() as session:
        session.add(row)
    return described


def _told(row: LiveMigration) -> dict[str, Any]:
    """What a master carries from step to step; the target reads the rest from SQL, secrets above all."""
    return {"migration_id": row.job_id, **without_secrets(row.info)}


def run(node: NodeContext, guests: Guests, job: JobContext, arguments: MigrationRunArguments) -> dict[str, Any]:
    """Move the memory to the target that has accepted it; the guest then stands still until ``migration.finalize``.

    Raises MigrationFailed or Cancelled; the guest then runs on here.
    """
    row = rows.get(node, str(arguments.accepted["migration_id"]))
    if row.instance_name != arguments.name or row.source != node.name:
        reason = f"is of {row.instance_name} on node {row.source}"
        raise InvalidArgument([{"field": "accepted.migration_id", "reason": reason}])
    if row.stage == Stage.ACCEPTING and row.target_uuid is None:
        raise MigrationFailed(f"node {row.target} has not accepted it: migration.accept comes first", phase=row.stage)
    rows.move_on(node, row.job_id, Stage.ACCEPTING, Stage.TRANSFERRING)
    return Migration(node, guests, job, row.job_id).transfer_only()


def end(
    node: NodeContext, guests: Guests, job: JobContext, arguments: MigrationFinalizeArguments
) -> dict[str, Any]:  # fmt: skip
    """On the target: continue the guest, or, without ``success``, remove what waited for it."""
    row = rows.get(node, arguments.migration_id)
    if row.target != node.name:
        raise InvalidArgument([{"field": "migration_id", "reason": f"this migration goes to node {row.target}"}])
    if arguments.success:
        return finalize(node, guests, job, row)
    if row.stage == Stage.MOVED:
        return give_back(node, guests, row, "its master said so")
    result = discard(node, guests, job, row)
    given_up = rows.as_failure(MigrationFailed("it was given up before it began; its master said so"), row.stage)
    # One that is aborted is the source's to end: its guest has to go on there.
    rows.move_on(node, row.job_id, Stage.ACCEPTING, Stage.DONE, report=row.report | {"failure": given_up})
    return result


def tune(node: NodeContext, guests: Guests, arguments: MigrateTuneArguments) -> dict[str, Any]:
    """Change the limits of the migration that an instance of this node is in. Raises NotRunning where there is none."""
    row = rows.get(node, migration_of(node, arguments.name))
    guest = guests.need(arguments.name)
    if row.stage not in rows.BEFORE_THE_SWITCH:
        raise MigrationFailed(
            f"too late: the migration of {arguments.name} is {row.stage}", phase=row.stage, migration_id=row.job_id
        )
    changes = arguments.changes()
    wish = "postcopy" if changes.pop("postcopy_now", False) else "force" if changes.pop("force_now", False) else None
    options = parse(MigrateArguments, row.options | changes).model_dump(mode="json")
    rows.note(node, row.job_id, options=options, report=row.report | ({"wish": wish} if wish else {}))
    guest.tuned.set()
    guest.migration_changed.set()
    return {"job": row.job_id, "name": arguments.name, "changed": arguments.changes()}


def migration_of(node: NodeContext, name: str) -> str:
    """The migration an instance is in, by the job that has it. Raises NotRunning where it is in none."""
    query = (
        select(LiveMigration.job_id)
        .where(LiveMigration.instance_name == name, LiveMigration.source == node.name)
        .where(LiveMigration.stage != Stage.DONE)
        .join(InstanceLock, InstanceLock.job_id == LiveMigration.job_id)
    )
    with node.database.reading() as session:
        found = session.scalar(query)
    if found is None:
        raise NotRunning(f"{name} is not being migrated from node {node.name}; see `hostler jobs --instance {name}`")
    return found


def job_to_cancel(node: NodeContext, name: str) -> str:
    """The job of the migration an instance is in, else of the first one that has not come so far. Raises NotRunning."""
    query = (
        select(Job.id)
        .where(Job.task == TaskName.INSTANCE_MIGRATE, Job.instance_name == name, Job.node == node.name)
        .where(Job.finished_at.is_(None))
        .order_by(Job.sequence)
        .limit(1)
    )
    try:
        return migration_of(node, name)
    except NotRunning:
        with node.database.reading() as session:
            if (waiting := session.scalar(query)) is None:
                raise
        return waiting


def report(node: NodeContext, job_id: str) -> dict[str, Any]:
    """How a migration went, or goes, with all looks at it. Raises InvalidArgument for a job that is none."""
    row: LiveMigration | None = rows.find(node, job_id)
    if row is None:
        with node.database.reading() as session:
            task = session.scalar(select(Job.task).where(Job.id == job_id))
        reason = f"job {job_id} is {task}, no live migration" if task else f"node {node.name} knows no job {job_id}"
        raise InvalidArgument([{"field": "id", "reason": reason}])
    return {
        "job": job_id,
        "name": row.instance_name,
        "source": row.source,
        "target": row.target,
        "stage": row.stage,
        "started_at": row.started_at.isoformat(),
        "ended_at": row.ended_at.isoformat() if row.ended_at else None,
        "report": row.report,
        "samples": rows.samples(node, job_id),
    }
