"""Jobs about the content of disks: snapshots and backups."""

from __future__ import annotations

from typing import Any

from hostler.contract import TaskName
from hostler.job_arguments import NameArguments
from hostler.payloads import BackupArguments, SnapshotArguments
from tasks.boundary import operation
from worker.operations import snapshots
from worker.operations.backup import backup as back_up
from worker.operations.context import JobContext
from worker.operations.service import Service


@operation(TaskName.INSTANCE_BACKUP)
def backup(service: Service, job: JobContext, arguments: BackupArguments) -> Any:
    """Copy all disks, as they are at one moment, into new files."""
    return back_up(service.node, service.guests, job, arguments)


@operation(TaskName.SNAPSHOT_CREATE)
def create(service: Service, job: JobContext, arguments: SnapshotArguments) -> Any:
    """Keep all writable disks as they are at this moment."""
    return snapshots.create(service.node, service.guests, job, arguments)


@operation(TaskName.SNAPSHOT_LIST)
def list_all(service: Service, job: JobContext, arguments: NameArguments) -> Any:
    """The snapshots of an instance."""
    return snapshots.list_snapshots(service.node, arguments)


@operation(TaskName.SNAPSHOT_REVERT)
def revert(service: Service, job: JobContext, arguments: SnapshotArguments) -> Any:
    """Discard what a stopped instance wrote since its latest snapshot."""
    return snapshots.revert(service.node, service.guests, job, arguments)


@operation(TaskName.SNAPSHOT_DELETE)
def delete(service: Service, job: JobContext, arguments: SnapshotArguments) -> Any:
    """Give a snapshot up: what was written since is merged into its files."""
    return snapshots.delete(service.node, service.guests, job, arguments)
