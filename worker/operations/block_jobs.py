"""Jobs inside QEMU as part of a job of ours: followed with progress in bytes, and ended whatever becomes of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from hostler.contract import InstanceState
from worker.errors import NotRunning, OperationError, QemuFailed, QmpLost, TimedOut
from worker.kvm import block
from worker.kvm.block import BlockJob
from worker.operations.context import JobContext, NodeContext
from worker.operations.guests import Guest, Guests
from worker.operations.views import view_of

POLL_S = 0.25
END_S = 30.0
"""A job that was cancelled ends when its last write has; storage that takes longer is stuck."""
MIB = 2**20


class Meter:
    """Reports bytes as percent between two bounds, at most four times a second; what was reported never falls."""

    def __init__(self, job: JobContext, first: int, last: int, what: str) -> None:
        self._job, self._first, self._last, self._what = job, first, last, what
        self._reported_at = 0.0
        self._done = 0

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        """Raises Cancelled when the job was asked to give up."""
        self._job.check_cancelled()
        self._done = max(self._done, done_bytes)
        if time.monotonic() - self._reported_at < POLL_S:
            return
        self._reported_at = time.monotonic()
        share = min(1.0, self._done / total_bytes) if total_bytes else 0.0
        percent = self._first + int((self._last - self._first) * share)
        self._job.progress(percent, f"{self._what}: {self._done // MIB} of {max(self._done, total_bytes) // MIB} MiB")


def running_guest(node: NodeContext, guests: Guests, name: str) -> Guest | None:
    """The guest whose disks QEMU has open, None of an instance that does not run.

    Raises UnknownInstance, QmpLost, NotRunning.
    """
    guest = guests.get(name)
    view = view_of(node, name)  # in this order: of a guest that has just ended, the row tells all
    if guest and guest.ended.is_set():
        return None
    if guest is None and view["state"] not in (InstanceState.STOPPED, InstanceState.CRASHED):
        raise QmpLost(f"{name} is on record as {view['state']}, and its QEMU is not watched yet; asked again")
    if guest and guest.talk().status() == "inmigrate":
        raise NotRunning(f"{name} has not arrived yet", state=InstanceState.INCOMING)
    return guest


def follow(
    job: JobContext, guest: Guest, prefix: str, meter: Meter, is_over: Callable[[list[BlockJob]], bool]
) -> list[BlockJob]:
    """Wait until the jobs of this prefix are as wanted. Raises Cancelled, QmpLost, QemuFailed when one has failed."""
    while True:
        guest.job_changed.clear()
        found = block.jobs(guest.talk(), prefix)
        failed = [each.error for each in found if each.error]
        if failed and all(each.status == "concluded" for each in found):
            # One that failed has QEMU cancel the others of its group: theirs is not the reason.
            reasons = [error for error in failed if "cancel" not in error.lower()] or failed
            raise QemuFailed(f"QEMU could not finish it: {reasons[0]}")
        meter(sum(each.done_bytes for each in found), sum(each.total_bytes for each in found))
        if is_over(found):
            return found
        job.wait(guest.job_changed, POLL_S)


def end_jobs(guest: Guest, prefix: str) -> None:
    """Have QEMU end and forget all jobs of this prefix. Raises QmpLost, TimedOut when one does not end."""
    monitor, deadline = guest.talk(), time.monotonic() + END_S
    cancelled: set[str] = set()
    while found := block.jobs(monitor, prefix):
        guest.job_changed.clear()
        for each in found:
            if each.status == "concluded":
                block.dismiss(monitor, each.id)
            elif each.id not in cancelled:
                cancelled.add(each.id)
                with suppress(QemuFailed):  # it has just ended, or been cancelled with another one of its group
                    block.cancel(monitor, each.id)
        if time.monotonic() > deadline:
            raise TimedOut(f"QEMU of {guest.name} does not end its job {found[0].id}; its storage may be stuck")
        guest.job_changed.wait(0.05)


def close_nodes(guest: Guest, prefix: str) -> None:
    """Have QEMU close every image of ours that no device uses. Raises QmpLost."""
    monitor = guest.talk()
    for name in monitor.block_nodes():
        if name.startswith(prefix):
            with suppress(QemuFailed):
                monitor.remove_block_node(name)


def quietly(clean_up: Callable[[], object]) -> None:
    """Clean up after a failure that is told to the sender; what goes wrong with that is found again by the next job."""
    with suppress(OperationError, OSError):
        clean_up()
