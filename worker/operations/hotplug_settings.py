"""What else of a running guest can be changed: its memory, by the balloon, and its display's password."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from hostler.contract import InstanceState, TaskName
from hostler.errors import InvalidArgument
from hostler.payloads import Instance, InstanceView, SetMemoryArguments, SetPasswordArguments
from models import Runtime
from worker.errors import QemuFailed, TimedOut
from worker.kvm.command_line import machine
from worker.kvm.prepared import password_files, read_password
from worker.operations import hotplug
from worker.operations.context import JobContext, NodeContext
from worker.operations.guests import Guests
from worker.operations.hotplug import Change, changed, saved, write_down
from worker.operations.views import view_of

MIB = 2**20
LOOK_S = 0.2


def set_memory(node: NodeContext, guests: Guests, job: JobContext, arguments: SetMemoryArguments) -> InstanceView:
    """Have the guest give back memory through its balloon, or take it again; its next QEMU has that much.

    Raises InvalidArgument, Unsupported or NotRunning, and TimedOut when the guest does not react: it then has what it
    had before.
    """
    instance, begun = saved(node, guests, job, TaskName.INSTANCE_SET_MEMORY, arguments.name)
    if begun and instance.memory_mib == arguments.memory_mib:
        return view_of(node, instance.name)
    change = Change(node, job, guests.need(instance.name), instance)
    if not instance.hvparams.balloon:
        hotplug.refuse("hvparams.balloon", f"{instance.name} was started without a balloon")
    if reason := _out_of_bounds(node, instance, arguments.memory_mib):
        raise InvalidArgument([{"field": "memory_mib", "reason": reason}])
    job.phase("balloon", 30, f"waiting up to {arguments.timeout_s:g} s for the guest's memory to change")
    job.commit()
    _inflate(change, arguments)
    return write_down(change, instance.model_copy(update={"memory_mib": arguments.memory_mib}))


def set_password(node: NodeContext, guests: Guests, job: JobContext, arguments: SetPasswordArguments) -> InstanceView:
    """Give the display the password that a file on this node holds, for connections from now on and after a reboot.

    Raises InvalidArgument, Unsupported, NotRunning or QemuFailed; the old password counts then.
    """
    kind, file = arguments.kind, arguments.password_file
    instance, begun = saved(node, guests, job, TaskName.INSTANCE_SET_PASSWORD, arguments.name)
    if begun and getattr(instance.hvparams, f"{kind}_password_file") == file and not guests.get(instance.name):
        return view_of(node, instance.name)
    change = Change(node, job, guests.need(instance.name), instance)
    if kind not in password_files(instance.hvparams):
        reason = f"{instance.name} was started without a {kind} display that asks for a password"
        hotplug.refuse(f"hvparams.{kind}_password_file", reason)
    password = _password_in(file)
    hvparams = instance.hvparams.model_dump(mode="json") | {f"{kind}_password_file": file}
    wanted = changed(instance, "password_file", hvparams=hvparams)
    job.phase("password", 50, f"changing the password of the {kind} display")
    job.commit()
    change.monitor.set_password(kind, password)
    return write_down(change, wanted)


def _out_of_bounds(node: NodeContext, instance: Instance, memory_mib: int) -> str:
    with node.database.reading() as session:
        hardware = session.get_one(Runtime, (instance.name, node.name)).hardware
    least_mib, most_mib = instance.hvparams.memory_min_mib, machine.memory_mib(Instance.model_validate(hardware))
    if memory_mib < least_mib:
        return f"{memory_mib} is less than its memory_min_mib ({least_mib})"
    return f"{memory_mib} is more than {instance.name} was started with ({most_mib})" if memory_mib > most_mib else ""


def _inflate(change: Change, arguments: SetMemoryArguments) -> None:
    monitor, target_bytes = change.monitor, arguments.memory_mib * MIB
    deadline = time.monotonic() + arguments.timeout_s
    monitor.inflate_balloon(target_bytes)
    while abs((has_bytes := monitor.memory_bytes()) - target_bytes) >= MIB:
        if time.monotonic() > deadline:
            monitor.inflate_balloon(change.instance.memory_mib * MIB)
            raise TimedOut(
                f"{change.instance.name} still had {has_bytes / MIB:.0f} MiB after {arguments.timeout_s:g} s: it has "
                "no balloon driver, is paused, or needs the memory. It was told to have its "
                f"{change.instance.memory_mib} MiB again, which stays on record",
                state=InstanceState.RUNNING,
            )
        change.job.wait(threading.Event(), LOOK_S)


def _password_in(file: str) -> str:
    try:
        return read_password(Path(file)).decode()
    except QemuFailed as exc:
        reason = exc.message
    except UnicodeDecodeError:
        reason = f"password file {file} is not UTF-8"
    raise InvalidArgument([{"field": "password_file", "reason": reason}])
