"""The names outsiders rely on: tasks, queues, states, phases and error codes.

Nothing here is ever renamed; see docs/contract.md, which a test compares with this module.
"""

from __future__ import annotations

import re
from enum import StrEnum

NODE_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,63}", re.ASCII)
"""A node's name: it becomes part of a queue's name and of a worker's name."""

INSTANCE_NAME_PATTERN = re.compile(r"(?!-)[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", re.ASCII)
INSTANCE_NAME_MAX = 255
"""A DNS-style name. Its grammar excludes ``.``, ``..``, ``/`` and everything a shell or a path could misread."""

ESCAPE_KEY = "^]"
"""What a person types to leave a console (0x1d, telnet's and virsh's key too)."""


class TaskName(StrEnum):
    """Every job a node understands, as the name a sender passes to ``send_task``."""

    INSTANCE_START = "instance.start"
    INSTANCE_STOP = "instance.stop"
    INSTANCE_REBOOT = "instance.reboot"
    INSTANCE_RESTART = "instance.restart"
    INSTANCE_PAUSE = "instance.pause"
    INSTANCE_RESUME = "instance.resume"
    INSTANCE_CLEANUP = "instance.cleanup"
    INSTANCE_DISK_ADD = "instance.disk_add"
    INSTANCE_DISK_REMOVE = "instance.disk_remove"
    INSTANCE_DISK_RESIZE = "instance.disk_resize"
    INSTANCE_NIC_ADD = "instance.nic_add"
    INSTANCE_NIC_REMOVE = "instance.nic_remove"
    INSTANCE_CD_INSERT = "instance.cd_insert"
    INSTANCE_CD_EJECT = "instance.cd_eject"
    INSTANCE_SET_MEMORY = "instance.set_memory"
    INSTANCE_SET_PASSWORD = "instance.set_password"  # noqa: S105  (a task's name)
    INSTANCE_INFO = "instance.info"
    INSTANCE_LIST = "instance.list"
    INSTANCE_CONSOLE = "instance.console"
    INSTANCE_CHECK = "instance.check"
    INSTANCE_BACKUP = "instance.backup"
    INSTANCE_MIGRATE = "instance.migrate"
    INSTANCE_MIGRATE_CANCEL = "instance.migrate_cancel"
    INSTANCE_MIGRATE_TUNE = "instance.migrate_tune"
    MIGRATION_INFO = "migration.info"
    MIGRATION_ACCEPT = "migration.accept"
    MIGRATION_RUN = "migration.run"
    MIGRATION_FINALIZE = "migration.finalize"
    MIGRATION_RECOVER = "migration.recover"
    MIGRATION_REPORT = "migration.report"
    SNAPSHOT_CREATE = "snapshot.create"
    SNAPSHOT_LIST = "snapshot.list"
    SNAPSHOT_REVERT = "snapshot.revert"
    SNAPSHOT_DELETE = "snapshot.delete"
    NODE_INFO = "node.info"
    NODE_LIST = "node.list"
    NODE_AUDIT = "node.audit"
    NODE_REPAIR = "node.repair"
    UID_POOL_SHOW = "uid_pool.show"
    UID_POOL_ADD = "uid_pool.add"
    UID_POOL_REMOVE = "uid_pool.remove"
    QUARANTINE_LIST = "quarantine.list"
    QUARANTINE_RELEASE = "quarantine.release"
    NODE_VERIFY = "node.verify"
    NODE_POWERCYCLE = "node.powercycle"
    NODE_DRAIN = "node.drain"
    NODE_UNDRAIN = "node.undrain"
    NODE_HOLD = "node.hold"
    NODE_UNHOLD = "node.unhold"
    NODE_FENCE = "node.fence"
    NODE_UNFENCE = "node.unfence"
    JOB_LIST = "job.list"
    JOB_INFO = "job.info"
    JOB_CANCEL = "job.cancel"
    JOB_RETRY = "job.retry"
    JOB_WHY = "job.why"
    JOB_PRUNE = "job.prune"


class JobState(StrEnum):
    """Celery's own states plus the two of hostler (WAITING, PROGRESS)."""

    PENDING = "PENDING"
    WAITING = "WAITING"
    STARTED = "STARTED"
    PROGRESS = "PROGRESS"
    RETRY = "RETRY"
    SUCCESS = "SUCCESS"
    FAILURE = "FAILURE"
    REVOKED = "REVOKED"


FINAL_JOB_STATES = frozenset({JobState.SUCCESS, JobState.FAILURE, JobState.REVOKED})

KEEP_MIN_S = 600
"""An ended job stays in the ledger at least this long: its message may yet be delivered again."""
KEEP_MAX_S = 100 * 365 * 86400


class InstanceState(StrEnum):
    """What an instance is doing, as far as its node knows."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    CRASHED = "crashed"
    INCOMING = "incoming"
    MIGRATING = "migrating"
    UNKNOWN = "unknown"


class ErrorCode(StrEnum):
    """The closed list of reasons a job can fail for; the first argument of ``OperationFailed``."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    UNKNOWN_INSTANCE = "UNKNOWN_INSTANCE"
    ALREADY_RUNNING = "ALREADY_RUNNING"
    NOT_RUNNING = "NOT_RUNNING"
    INSTANCE_BUSY = "INSTANCE_BUSY"
    UID_POOL_EXHAUSTED = "UID_POOL_EXHAUSTED"
    NETWORK_FAILED = "NETWORK_FAILED"
    QEMU_FAILED = "QEMU_FAILED"
    QMP_LOST = "QMP_LOST"
    MIGRATION_FAILED = "MIGRATION_FAILED"
    TIMED_OUT = "TIMED_OUT"
    CANCELLED = "CANCELLED"
    UNSUPPORTED = "UNSUPPORTED"
    NODE_UNAVAILABLE = "NODE_UNAVAILABLE"
    INTERNAL = "INTERNAL"


def queue_name(node: str) -> str:
    """The queue that only ``node``'s worker consumes. Raises ValueError for a name no node can have."""
    if not NODE_PATTERN.fullmatch(node):
        raise ValueError(f"node: {node!r} is not a node name (letters, digits, '.', '_', '-'; at most 63)")
    return f"node.{node}"


def worker_name(node: str) -> str:
    """The Celery node name of ``node``'s worker, for ``inspect`` and ``control``."""
    return f"hostler@{node}"
