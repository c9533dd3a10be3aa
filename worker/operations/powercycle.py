"""Rebooting the host at once, as its reset button does: nothing is shut down, and every guest's power is cut.

The job ends first, then the host goes: who acts waits until SQL says that the job succeeded. So the next worker finds
a job that is done, and nothing that is delivered again reboots the host again. Should the worker be killed in the
second between the two, the host stays up; its ``boot_id`` in ``node.info`` tells.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import structlog
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from hostler.contract import FINAL_JOB_STATES, JobState
from hostler.errors import InvalidArgument
from hostler.payloads import PowercycleArguments
from models import Job
from worker.errors import Unsupported
from worker.kvm.process import boot_id
from worker.operations.context import JobContext, NodeContext

log = structlog.get_logger(__name__)

LOOK_S = 0.05
TOLD_S = 1.0
"""How long the job's success has to reach the result backend and whoever waits for it; it takes milliseconds."""
SYNC_S = 10.0
"""How long the disks may take. Storage that hangs is a reason to reboot, and must not prevent it."""
COMMAND_S = 30.0


@dataclass(frozen=True)
class Means:
    """``trigger`` gets the letter b (the kernel's sysrq: reboot at once); where it cannot be written, ``command``."""

    trigger: Path
    command: tuple[str, ...]


def means() -> Means:
    """What reboots this host. The one place that knows."""
    return Means(Path("/proc/sysrq-trigger"), ("reboot", "-n", "-f"))


def powercycle(node: NodeContext, job: JobContext, arguments: PowercycleArguments) -> threading.Thread:
    """Have the host rebooted as soon as the job is recorded as done; the thread that sees to it is for tests to join.

    Raises InvalidArgument when the wrong node or boot is meant, Unsupported where it is not allowed, Cancelled. Nothing
    was done then.
    """
    _require_meant(node, arguments)
    _require_allowed(node)
    job.commit()
    job.phase("powercycle", 90, "the host is rebooted as soon as this job has ended")
    # No daemon: a worker that is told to end in this very moment still does what it reported as done.
    thread = threading.Thread(target=_reboot_after, args=(node, job.id, means()), name="powercycle")
    thread.start()
    return thread


def _require_meant(node: NodeContext, arguments: PowercycleArguments) -> None:
    errors = []
    if arguments.confirm != node.name:
        errors.append(
            {"field": "confirm", "reason": f"{arguments.confirm!r} is not the name of this node, {node.name}"}
        )
    if arguments.boot_id not in (None, boot_id()):
        errors.append({"field": "boot_id", "reason": "the host was rebooted since; nothing was done"})
    if errors:
        raise InvalidArgument(errors)


def _require_allowed(node: NodeContext) -> None:
    if not node.settings.allow_powercycle:
        raise Unsupported(
            f"node {node.name} does not allow it; nothing was done. To allow it, start its worker with "
            "HOSTLER_ALLOW_POWERCYCLE=true"
        )
    if os.geteuid() != 0:
        raise Unsupported(f"the worker of {node.name} does not run as root, which alone may reboot; nothing was done")


def _reboot_after(node: NodeContext, job_id: str, how: Means) -> None:
    state = _end_of(node, job_id)
    if state != JobState.SUCCESS:
        log.warning("the host is not rebooted: the job was not recorded as done", job=job_id, state=state)
        return
    log.warning("rebooting the host", job=job_id)
    time.sleep(TOLD_S)
    _sync()
    _reboot(how)


def _end_of(node: NodeContext, job_id: str) -> str | None:
    """How the job ended; None when it did not while this worker runs, so that the next one takes it up."""
    while True:
        worker_ends = not threading.main_thread().is_alive()
        try:
            with node.database.reading() as session:
                state = session.scalar(select(Job.state).where(Job.id == job_id))
            if state is None or state in FINAL_JOB_STATES:
                return state
        except SQLAlchemyError as exc:
            log.warning("cannot see yet whether the job is recorded as done", job=job_id, reason=str(exc))
        if worker_ends:
            return None
        time.sleep(LOOK_S)


def _sync() -> None:
    syncing = threading.Thread(target=os.sync, name="sync", daemon=True)
    syncing.start()
    syncing.join(SYNC_S)
    if syncing.is_alive():
        log.warning("the disks did not take everything; rebooting all the same", after_s=SYNC_S)


def _reboot(how: Means) -> None:
    try:
        trigger = os.open(how.trigger, os.O_WRONLY)
        try:
            os.write(trigger, b"b")
        finally:
            os.close(trigger)
    except OSError as exc:
        log.warning("the kernel cannot be told; trying a program", trigger=str(how.trigger), reason=exc.strerror)
        _run(how.command)


def _run(command: tuple[str, ...]) -> None:
    try:
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMMAND_S, check=True)
    except (OSError, subprocess.SubprocessError) as exc:
        said = getattr(exc, "stderr", None) or b""
        log.error("the host was not rebooted", reason=str(exc), said=said.decode(errors="replace").strip())
