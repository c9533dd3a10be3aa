"""The client's part about maintenance of nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from hostler.client_migration import MoveOptions
from hostler.contract import TaskName
from hostler.job_request import JobRequest, Task, request


def _drain(
    node: str,
    targets: Sequence[str] = (),
    *,
    auto: bool = False,
    allow_shutdown: bool = False,
    parallel: int | None = None,
    job_id: str | None = None,
    **options: Unpack[MoveOptions],
) -> JobRequest:
    """Move every guest of ``node`` to ``targets``, or, with ``auto``, to all nodes that can take some.

    ``options`` are those of each migration. Result: ``verdicts``, one for each guest: ``name``, ``verdict`` (``moved``,
    ``stopped``), ``node``, ``reason``, ``job``. Where guests are ``left`` or ``failed`` the job fails with
    MIGRATION_FAILED, and the verdicts are in its details.
    """
    where = {"targets": list(targets), "auto": auto, "allow_shutdown": allow_shutdown, "parallel": parallel}
    return request(TaskName.NODE_DRAIN, node, job_id, **where, **options)


def _undrain(node: str, job_id: str | None = None) -> JobRequest:
    """Let the node take guests in again. Result: ``node``, and ``drained_at``, since when it did not (or None)."""
    return request(TaskName.NODE_UNDRAIN, node, job_id)


def _hold(node: str, reason: str = "", job_id: str | None = None) -> JobRequest:
    """Let the node begin no more jobs that change its guests; they wait. Result: ``node``, ``held_at``, ``reason``."""
    return request(TaskName.NODE_HOLD, node, job_id, reason=reason)


def _unhold(node: str, job_id: str | None = None) -> JobRequest:
    """Let the jobs go that the node held back. Result: ``node``, ``held_at`` (or None), how many ``jobs`` waited."""
    return request(TaskName.NODE_UNHOLD, node, job_id)


def _fence(node: str, dead: str, confirm: str, restart_on: Sequence[str] = (), job_id: str | None = None) -> JobRequest:
    """Have the living ``node`` write down that the node ``dead`` is off: its guests can be started elsewhere then.

    ``confirm`` is "it is off". Result: ``guests``, with ``verdict`` (``crashed``, ``moved``, ``returned``, ``started``)
    and ``reason`` each, and ``jobs``: how many of its jobs were ended.
    """
    return request(TaskName.NODE_FENCE, node, job_id, node=dead, confirm=confirm, restart_on=list(restart_on))


def _unfence(node: str, fenced: str, job_id: str | None = None) -> JobRequest:
    """Have the living ``node`` let the node ``fenced`` have a worker again. Result: ``node`` and ``fenced_at``."""
    return request(TaskName.NODE_UNFENCE, node, job_id, node=fenced)


class MaintenanceTasks:
    """The tasks of :class:`hostler.Client` about maintenance."""

    drain = Task(_drain)
    undrain = Task(_undrain)
    hold = Task(_hold)
    unhold = Task(_unhold)
    fence = Task(_fence)
    unfence = Task(_unfence)
