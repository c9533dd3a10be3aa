"""Stopping, rebooting, pausing, resuming and cleaning up guests."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from hostler.contract import InstanceState, TaskName
from hostler.errors import InvalidArgument
from hostler.payloads import Instance, InstanceView, RebootArguments, StopArguments
from models import Instance as InstanceRow
from worker.errors import AlreadyRunning, Cancelled, NotRunning, OperationError, TimedOut
from worker.kvm.qmp import Monitor
from worker.operations import checks
from worker.operations.context import JobContext, NodeContext
from worker.operations.ending import GUEST_SHUT_DOWN, Ending
from worker.operations.guests import Guest, Guests, identity_of, release
from worker.operations.recovery import Recovery, recover
from worker.operations.recovery_table import Action
from worker.operations.start import build, choose_accelerator, complete
from worker.operations.views import view_of
from worker.operations.wanted_rows import stopping, want_stopped

PRESS_EVERY_S = 10.0
"""A guest that is still booting does not see the power button; it is pressed again at this interval."""

BEFORE_REBUILD = frozenset({"received", "reset", "shutdown", "kill"})
"""Phases of a reboot in which a QEMU that runs is the one to end; after them it is the one just begun."""

TAKE_BACK_S = 2.0
"""A cancelled job has ended within 5 s; a QEMU that does not answer is asked again by the heartbeat."""

KILL_DEADLINE_S = 40.0
"""SIGTERM, SIGKILL and the clean-up together; see QemuProcess.kill."""


def stop(node: NodeContext, guests: Guests, job: JobContext, arguments: StopArguments) -> InstanceView:
    """Stop a guest: by its power button, or by force. The view's ``how`` says which it was.

    A paused guest is resumed first when it is asked to shut down: a guest that does not run cannot. Raises
    UnknownInstance, and TimedOut under ``on_timeout="fail"`` (the guest then runs on).
    """
    with stopping(node, arguments.name):
        return _stop(node, guests, job, arguments)


def _stop(node: NodeContext, guests: Guests, job: JobContext, arguments: StopArguments) -> InstanceView:
    recovery = recover(node, guests, job, TaskName.INSTANCE_STOP, arguments.name)
    guest = guests.get(arguments.name)
    if guest and recovery.action is Action.COMPLETE:
        guest.ended.wait(KILL_DEADLINE_S)  # it has ended, and is being cleaned up after
        guest = None
    view = view_of(node, arguments.name)  # in this order: of a guest that has just ended, the row tells all
    if guest is None:
        return _already_stopped(view, recovery)
    by_acpi = recovery.phase != "kill" and not arguments.force and _saved(node, arguments.name).hvparams.acpi
    if by_acpi and _ask_to_shut_down(node, guests, job, guest, arguments.timeout_s):
        return _view(node, arguments.name, guest.ending.how if guest.ending else "guest_shutdown")
    if by_acpi and arguments.on_timeout == "fail":
        _take_back(node, guests, guest)
        raise TimedOut(
            f"{guest.name} did not shut down within {arguments.timeout_s:g} s; it still runs. "
            "Ask again, or stop it with force",
            state=InstanceState.RUNNING,
        )
    _kill(node, guests, job, guest)
    return _view(node, arguments.name, guest.ending.how if guest.ending else "killed")


def reboot(node: NodeContext, guests: Guests, job: JobContext, arguments: RebootArguments) -> InstanceView:
    """Reboot a guest with the hardware it was started with.

    ``soft`` raises TimedOut when the guest does not shut down (it runs on); ``reset`` keeps the process. Raises
    NotRunning, UnknownInstance, and what a start can raise: then the guest is stopped.
    """
    view = view_of(node, arguments.name)
    recovery = recover(node, guests, job, TaskName.INSTANCE_REBOOT, arguments.name)
    if recovery.action is Action.COMPLETE:
        return view if recovery.phase == "reset" else complete(node, guests, arguments.name, paused=False)
    guest = guests.get(arguments.name) if recovery.phase in BEFORE_REBUILD else None
    if guest is None and recovery.action is Action.BEGIN:
        raise NotRunning(f"Failed to reboot instance {arguments.name}: not running", state=view["state"])
    if guest and arguments.mode == "reset":
        job.phase("reset", 50, "pulling the reset line")
        job.commit()
        guest.talk().reset()
        return view
    instance = _saved(node, arguments.name)
    if guest:
        _require_rebuildable(node, guests, guest, instance)
        _end_for_reboot(node, guests, job, guest, arguments, at_once=recovery.phase == "kill")
    job.carry_on()
    job.phase("rebuild", 55, "starting the saved virtual hardware")
    return build(node, guests, job, instance, accelerator=choose_accelerator(node, instance), paused=False, again=True)


def pause(node: NodeContext, guests: Guests, job: JobContext, name: str) -> InstanceView:
    """Stop a guest's processors; pausing a paused guest changes nothing. Raises NotRunning, QmpLost."""
    return _change(node, guests, job, name, TaskName.INSTANCE_PAUSE, "stopping", Monitor.pause_vcpus)


def resume(node: NodeContext, guests: Guests, job: JobContext, name: str) -> InstanceView:
    """Let a paused guest run on; resuming a running one changes nothing. Raises NotRunning, QmpLost."""
    return _change(node, guests, job, name, TaskName.INSTANCE_RESUME, "starting", Monitor.continue_vcpus)


def _change(
    node: NodeContext,
    guests: Guests,
    job: JobContext,
    name: str,
    task: TaskName,
    doing: str,
    command: Callable[[Monitor], None],
) -> InstanceView:
    view_of(node, name)
    recovery = recover(node, guests, job, task, name)
    guest = guests.need(name)
    if recovery.action is not Action.COMPLETE:
        job.phase(task.removeprefix("instance."), 50, f"{doing} the guest's processors")
        job.commit()
        command(guest.talk())
    guests.observe(guest)
    return view_of(node, name)


def cleanup(node: NodeContext, guests: Guests, job: JobContext, name: str) -> dict[str, Any]:
    """Give back whatever is left of a guest that does not run, and call it stopped.

    Raises AlreadyRunning for a live guest, UnknownInstance. The instance stays known, with its reason of ending.
    """
    view_of(node, name)
    recover(node, guests, job, TaskName.INSTANCE_CLEANUP, name)
    with node.database.reading() as session:
        row = session.get_one(InstanceRow, name)
        runtime = row.runtime
        reason = row.reason or "cleaned up"
        alive = runtime is not None and identity_of(runtime) is not None
        uuid = runtime.uuid if runtime else ""
    if alive or guests.get(name):
        raise AlreadyRunning(f"Cannot cleanup a live instance: {name} runs; stop it first", state=row.state)
    job.phase("cleanup", 50, "removing what is left of the guest")
    job.commit()
    want_stopped(node, name)
    given_back = release(node, name, uuid, Ending(InstanceState.STOPPED, reason, "already_stopped"))
    with node.database.transaction() as session:
        session.get_one(InstanceRow, name, with_for_update=True).state = InstanceState.STOPPED
    report: dict[str, Any] = {"name": name, "node": node.name, "removed": [], "released": [], "quarantined": []}
    for what in given_back:
        report[{"uid": "released", "quarantine": "quarantined"}.get(what.split()[0], "removed")].append(what)
    return report


def _view(node: NodeContext, name: str, how: str) -> InstanceView:
    view = view_of(node, name)
    view["how"] = how
    return view


def _already_stopped(view: InstanceView, recovery: Recovery) -> InstanceView:
    if view["pid"] is not None:
        raise OperationError(
            f"{view['name']} has a runtime on record but this worker does not watch it; run "
            f"`hostler cleanup {view['name']}`, which removes what is left if its QEMU has ended",
            state=view["state"],
        )
    view["how"] = "already_stopped"
    if recovery.action is Action.COMPLETE:  # this very job had begun to stop it when its worker died
        view["how"] = "guest_shutdown" if view["reason"] == GUEST_SHUT_DOWN else "killed"
    return view


def _saved(node: NodeContext, name: str) -> Instance:
    with node.database.reading() as session:
        return Instance.model_validate(session.get_one(InstanceRow, name).spec)


def _ask_to_shut_down(node: NodeContext, guests: Guests, job: JobContext, guest: Guest, timeout_s: float) -> bool:
    """Whether the guest shut down in time. Raises Cancelled when the job is to give up; the guest then is as before."""
    was_running = guest.talk().status(job.check_cancelled) == "running"
    try:
        job.phase("shutdown", 10, f"pressing the power button and waiting up to {timeout_s:g} s")
        _set_state(node, guest, InstanceState.STOPPING)
        return _press_until_it_ends(job, guest, timeout_s)
    except OperationError as exc:
        if isinstance(exc, Cancelled) and not was_running:
            with suppress(OperationError):
                guest.talk().pause_vcpus()
        _take_back(node, guests, guest)
        raise


def _press_until_it_ends(job: JobContext, guest: Guest, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while (left_s := deadline - time.monotonic()) > 0:
        if not guest.ended.is_set():
            _press(job, guest)
        if job.wait(guest.ended, min(PRESS_EVERY_S, left_s)):
            return True
    return False


def _take_back(node: NodeContext, guests: Guests, guest: Guest) -> None:
    """The guest is not being stopped any more: its state is what QEMU says."""
    _set_state(node, guest, InstanceState.UNKNOWN)
    guests.observe(guest, TAKE_BACK_S)


def _press(job: JobContext, guest: Guest) -> None:
    try:
        monitor = guest.talk()
        if monitor.status(job.check_cancelled) != "running":
            monitor.continue_vcpus()
        monitor.press_power_button(job.check_cancelled)
    except OperationError as exc:
        if isinstance(exc, Cancelled) or not guest.process.wait(1.0):
            raise


def _kill(node: NodeContext, guests: Guests, job: JobContext, guest: Guest) -> None:
    try:
        job.phase("kill", 60, "ending QEMU")
        job.commit()
    except Cancelled:
        _take_back(node, guests, guest)
        raise
    _set_state(node, guest, InstanceState.STOPPING)
    guest.killed_by_us = True
    guest.process.kill()
    if not guest.ended.wait(KILL_DEADLINE_S):
        raise TimedOut(f"QEMU of {guest.name} has ended, but cleaning up after it takes too long; it goes on")


def _end_for_reboot(
    node: NodeContext, guests: Guests, job: JobContext, guest: Guest, arguments: RebootArguments, *, at_once: bool
) -> None:
    if at_once or arguments.mode == "hard" or not _saved(node, arguments.name).hvparams.acpi:
        _kill(node, guests, job, guest)
    elif not _ask_to_shut_down(node, guests, job, guest, arguments.timeout_s):
        _take_back(node, guests, guest)
        raise TimedOut(
            f"{guest.name} did not shut down within {arguments.timeout_s:g} s; it still runs. "
            "Ask again, or reboot it with mode=hard",
            state=InstanceState.RUNNING,
        )


def _require_rebuildable(node: NodeContext, guests: Guests, guest: Guest, instance: Instance) -> None:
    """Raises InvalidArgument; the guest then runs on, also where an earlier attempt was about to end it."""
    try:
        checks.require_valid(node, instance)
    except InvalidArgument:
        guest.killed_by_us = False
        _take_back(node, guests, guest)
        raise


def _set_state(node: NodeContext, guest: Guest, state: InstanceState) -> None:
    with node.database.transaction() as session:
        row = session.get_one(InstanceRow, guest.name, with_for_update=True, populate_existing=True)
        if row.runtime and row.runtime.uuid == guest.uuid:
            row.state = state
