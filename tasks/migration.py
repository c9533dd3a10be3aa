"""Jobs about live migration: all of it in one, its four steps, and what changes or ends one under way."""

from __future__ import annotations

from typing import Any

from celery import current_app

from hostler.contract import TaskName
from hostler.migration import (
    MigrateArguments,
    MigrateCancelArguments,
    MigrateTuneArguments,
    MigrationAcceptArguments,
    MigrationFinalizeArguments,
    MigrationInfoArguments,
    MigrationRecoverArguments,
    MigrationRunArguments,
)
from hostler.payloads import JobIdArguments
from tasks import outcome
from tasks.boundary import operation
from worker.operations.context import JobContext
from worker.operations.live_migration import driven, rows
from worker.operations.live_migration.accept import accept as accept_guest
from worker.operations.live_migration.finalize import listen_again
from worker.operations.live_migration.migrate import migrate as migrate_guest
from worker.operations.service import Service


@operation(TaskName.INSTANCE_MIGRATE, track_started=False)
def migrate(service: Service, job: JobContext, arguments: MigrateArguments) -> Any:
    """Move a guest to another node while it runs."""
    return migrate_guest(service.node, service.guests, job, arguments)


@operation(TaskName.INSTANCE_MIGRATE_CANCEL)
def cancel(service: Service, job: JobContext, arguments: MigrateCancelArguments) -> Any:
    """Give up the migration an instance is in, or the one that waits for its turn."""
    job_id = driven.job_to_cancel(service.node, arguments.name)
    return outcome.cancel(current_app, service, job_id, also_running=True)


@operation(TaskName.INSTANCE_MIGRATE_TUNE)
def tune(service: Service, job: JobContext, arguments: MigrateTuneArguments) -> Any:
    """Change the limits of the migration an instance is in."""
    return driven.tune(service.node, service.guests, arguments)


@operation(TaskName.MIGRATION_INFO)
def info(service: Service, job: JobContext, arguments: MigrationInfoArguments) -> Any:
    """What a target has to know of a guest."""
    return driven.info(service.node, service.guests, job, arguments)


@operation(TaskName.MIGRATION_ACCEPT, track_started=False)
def accept(service: Service, job: JobContext, arguments: MigrationAcceptArguments) -> Any:
    """Make a QEMU that waits for a guest."""
    return accept_guest(service.node, service.guests, job, str(arguments.info["migration_id"]))


@operation(TaskName.MIGRATION_RUN)
def run(service: Service, job: JobContext, arguments: MigrationRunArguments) -> Any:
    """Move a guest's memory to the target that accepted it."""
    return driven.run(service.node, service.guests, job, arguments)


@operation(TaskName.MIGRATION_FINALIZE, track_started=False)
def finalize(service: Service, job: JobContext, arguments: MigrationFinalizeArguments) -> Any:
    """Continue a guest that has arrived, or remove what waited for it."""
    return driven.end(service.node, service.guests, job, arguments)


@operation(TaskName.MIGRATION_RECOVER)
def recover(service: Service, job: JobContext, arguments: MigrationRecoverArguments) -> Any:
    """Listen again for the rest of a guest's memory."""
    row = rows.get(service.node, arguments.migration_id)
    return listen_again(service.node, service.guests, row)


@operation(TaskName.MIGRATION_REPORT)
def report(service: Service, job: JobContext, arguments: JobIdArguments) -> Any:
    """How a migration went, with all looks at it."""
    return driven.report(service.node, arguments.id)
