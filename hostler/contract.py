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
    INSTANCE_PAUSE = "instance.pause"
    INSTANCE_RESUME = "instance.resume"
    INSTANCE_CLEANUP = "instance.cleanup"
    INSTANCE_INFO = "instance.info"
    INSTANCE_LIST = "instance.list"
    INSTANCE_CONSOLE = "instance.console"
    INSTANCE_CHECK = "instance.check"
    NODE_INFO = "node.info"
    JOB_LIST = "job.list"
    JOB_INFO = "job.info"
    JOB_CANCEL = "job.cancel"
    JOB_RETRY = "job.retry"
    JOB_WHY = "job.why"


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
