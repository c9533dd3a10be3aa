"""The client's part about live migration."""

from __future__ import annotations

from typing import Literal, TypedDict, Unpack

from hostler.contract import TaskName
from hostler.job_request import JobRequest, Task, request


class MoveOptions(TypedDict, total=False):
    """How a guest moves; what is left out has its default (see ``migration.info`` in the reference)."""

    live: bool
    bandwidth_mib_s: float | None
    downtime_ms: int | None
    downtime_max_ms: int | None
    deadline_s: float | None
    on_deadline: Literal["abort", "force", "postcopy"]
    auto_converge: bool
    xbzrle: bool
    compression: Literal["none", "zlib", "zstd"]
    multifd_channels: int
    postcopy: Literal["never", "if-needed", "at-once"]
    copy_storage: Literal["none", "full", "top"]
    tls: bool | None


class MigrateOptions(MoveOptions, total=False):
    """The same, and ``dry_run``: nothing moves, the guest's memory is watched for ``sample_s`` seconds."""

    dry_run: bool
    sample_s: float


class TuneOptions(TypedDict, total=False):
    """What can be changed of a migration under way."""

    bandwidth_mib_s: float | None
    downtime_ms: int | None
    downtime_max_ms: int | None
    deadline_s: float | None
    on_deadline: Literal["abort", "force", "postcopy"] | None
    postcopy_now: bool
    force_now: bool


def _migrate(
    node: str, name: str, target: str, job_id: str | None = None, **options: Unpack[MigrateOptions]
) -> JobRequest:
    """Move a guest from ``node`` to ``target``. Its progress carries ``live_migration``. Result: the report.

    With ``dry_run`` nothing moves, and the report's ``prediction`` says what would happen.
    """
    return request(TaskName.INSTANCE_MIGRATE, node, job_id, name=name, target=target, **options)


def _migrate_cancel(node: str, name: str, job_id: str | None = None) -> JobRequest:
    """Give up the migration of a guest, if it still can be. ``node`` is its source. Result: what was found and done."""
    return request(TaskName.INSTANCE_MIGRATE_CANCEL, node, job_id, name=name)


def _migrate_tune(node: str, name: str, job_id: str | None = None, **changes: Unpack[TuneOptions]) -> JobRequest:
    """Change a migration under way. ``node`` is its source. Result: what holds now."""
    return request(TaskName.INSTANCE_MIGRATE_TUNE, node, job_id, name=name, **changes)


def _migration_report(node: str, id: str, job_id: str | None = None) -> JobRequest:
    """Result: ``report``, ``stage`` and ``samples`` of the migration ``id``, which is the id of its job."""
    return request(TaskName.MIGRATION_REPORT, node, job_id, id=id)


def _migration_info(
    node: str, name: str, target: str, job_id: str | None = None, **options: Unpack[MoveOptions]
) -> JobRequest:
    """First of the four steps of a master that drives them: what ``target`` has to know. Result: for the next one."""
    return request(TaskName.MIGRATION_INFO, node, job_id, name=name, target=target, **options)


def _migration_accept(node: str, info: dict[str, object], job_id: str | None = None) -> JobRequest:
    """Second step, on the target: have a QEMU there that waits. ``info`` is the first one's result."""
    return request(TaskName.MIGRATION_ACCEPT, node, job_id, info=info)


def _migration_run(node: str, name: str, accepted: dict[str, object], job_id: str | None = None) -> JobRequest:
    """Third step, on the source: move the guest's memory. ``accepted`` is the second one's result."""
    return request(TaskName.MIGRATION_RUN, node, job_id, name=name, accepted=accepted)


def _migration_finalize(node: str, migration_id: str, success: bool = True, job_id: str | None = None) -> JobRequest:
    """Last step, on the target: let the guest go on there, or, without ``success``, end the QEMU that waits."""
    return request(TaskName.MIGRATION_FINALIZE, node, job_id, migration_id=migration_id, success=success)


def _migration_recover(node: str, migration_id: str, job_id: str | None = None) -> JobRequest:
    """On the target, in a post-copy whose connection broke: listen again. Result: ``host`` and ``port``."""
    return request(TaskName.MIGRATION_RECOVER, node, job_id, migration_id=migration_id)


class MigrationTasks:
    """The tasks of :class:`hostler.Client` about live migration."""

    migrate = Task(_migrate)
    migrate_cancel = Task(_migrate_cancel)
    migrate_tune = Task(_migrate_tune)
    migration_report = Task(_migration_report)
    migration_info = Task(_migration_info)
    migration_accept = Task(_migration_accept)
    migration_run = Task(_migration_run)
    migration_finalize = Task(_migration_finalize)
    migration_recover = Task(_migration_recover)
