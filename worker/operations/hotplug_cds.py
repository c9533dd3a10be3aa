"""CDs of a running guest: put into a drive, taken out. The drive itself stays, also over a reboot."""

from __future__ import annotations

import time
from typing import NamedTuple

from hostler.contract import InstanceState, TaskName
from hostler.payloads import CdEjectArguments, CdInsertArguments, Instance, InstanceView
from worker.errors import OperationError, QemuFailed, QmpLost, TimedOut
from worker.kvm import drives
from worker.kvm.command_line.disks import CD_DRIVES, CDROMS, cd_image, cdrom_types
from worker.kvm.devices import driver_of
from worker.kvm.opening import open_image
from worker.operations import checks, hotplug
from worker.operations.block_jobs import quietly
from worker.operations.context import JobContext, NodeContext
from worker.operations.guests import Guests
from worker.operations.hotplug import Change, changed, close_image, lease, release, saved, write_down
from worker.operations.views import view_of


class _Slot(NamedTuple):
    """One CD drive: the parameter of its image, its device, and the two names that its image can have in QEMU."""

    field: str
    device: str
    nodes: tuple[str, str]

    @classmethod
    def of(cls, drive: str) -> _Slot:
        field = f"{drive}_image_path"
        node = f"cdrom{CDROMS.index(field)}"
        return cls(field, f"{node}-device", (node, f"{node}-other"))


def cd_insert(node: NodeContext, guests: Guests, job: JobContext, arguments: CdInsertArguments) -> InstanceView:
    """Put an image into a CD drive, in the place of what is in it.

    Raises InvalidArgument, Unsupported, NotRunning, QemuFailed, and TimedOut when the guest has locked the tray; the
    guest has the CD that it had, then.
    """
    slot, path = _Slot.of(arguments.drive), arguments.path
    instance, begun = saved(node, guests, job, TaskName.INSTANCE_CD_INSERT, arguments.name)
    if begun and getattr(instance.hvparams, slot.field) == path and not guests.get(instance.name):
        return view_of(node, instance.name)
    change = Change(node, job, guests.need(instance.name), instance)
    wanted = _with_cd(instance, slot, path)
    _require_drive(instance, slot)
    hotplug.require_valid(node, wanted, f"hvparams.{slot.field}", "path")
    job.phase("medium", 30, f"putting {path} into drive {arguments.drive}")
    job.commit()
    lease(change, checks.cd(path), "path")
    before = drives.look(change.monitor, slot.device).node
    try:
        _exchange(change, slot, _opened(change, slot, path, begun=begun), arguments)
    except QmpLost:
        raise  # whether it is in is not known: the next attempt looks
    except OperationError:
        quietly(lambda: _take_back(change, slot, before, arguments))
        raise
    return write_down(change, wanted)


def cd_eject(node: NodeContext, guests: Guests, job: JobContext, arguments: CdEjectArguments) -> InstanceView:
    """Empty a CD drive; one that is empty stays so.

    Raises Unsupported, NotRunning, and TimedOut when the guest has locked the tray: the CD is in, then.
    """
    slot = _Slot.of(arguments.drive)
    instance, begun = saved(node, guests, job, TaskName.INSTANCE_CD_EJECT, arguments.name)
    if begun and not getattr(instance.hvparams, slot.field) and not guests.get(instance.name):
        return view_of(node, instance.name)
    change = Change(node, job, guests.need(instance.name), instance)
    _require_drive(instance, slot)
    job.phase("medium", 30, f"taking the CD out of drive {arguments.drive}")
    job.commit()
    _exchange(change, slot, None, arguments)
    return write_down(change, _with_cd(instance, slot, ""))


def _with_cd(instance: Instance, slot: _Slot, path: str) -> Instance:
    drive = {} if path else {CD_DRIVES[slot.field]: True}
    hvparams = instance.hvparams.model_dump(mode="json") | {slot.field: path} | drive
    return changed(instance, "path", hvparams=hvparams)


def _require_drive(instance: Instance, slot: _Slot) -> None:
    kind = cdrom_types(instance.hvparams).get(slot.field)
    if kind is None:
        drive = CD_DRIVES[slot.field]
        hotplug.refuse(f"hvparams.{drive}", f"{instance.name} was started without this drive; set {drive} for that")
    if kind == "paravirtual":
        hotplug.refuse("hvparams.cdrom_disk_type", "a CD of type paravirtual is a disk, which cannot be taken out")


def _opened(change: Change, slot: _Slot, path: str, *, begun: bool) -> str:
    """The node of the image, opened beside the one in the drive; that itself where an earlier attempt put it there."""
    monitor = change.monitor
    current = drives.look(monitor, slot.device).node
    if begun and current and monitor.block_nodes()[current]["file"] == path:
        return current
    node = next(name for name in slot.nodes if name != current)
    close_image(change, node)
    open_image(monitor, cd_image(node, path, driver_of(path)), confined=change.instance.hvparams.is_confined)
    return node


def _exchange(change: Change, slot: _Slot, wanted: str | None, arguments: CdEjectArguments) -> None:
    """Have ``wanted`` in the closed drive, None for nothing. The guest may open and close the tray meanwhile."""
    deadline = time.monotonic() + arguments.timeout_s
    asked = False
    while (drive := drives.look(change.monitor, slot.device)) != drives.Drive(wanted, is_open=False):
        shut = drive.node != wanted and not drive.is_open
        if shut and asked and time.monotonic() > deadline:
            raise TimedOut(
                f"{change.guest.name} keeps the tray of its drive {arguments.drive} locked, as a system does whose CD "
                f"is mounted, and did not open it within {arguments.timeout_s:g} s. Its CD stays in. Unmount it in the "
                "guest and send the job again, or send it with force",
                state=InstanceState.RUNNING,
            )
        change.guest.unplugged.clear()
        try:
            _step(change, slot, drive, wanted, force=arguments.force)
        except QemuFailed:
            if drives.look(change.monitor, slot.device) == drive:
                raise  # it was not because the guest moved the tray just then
        asked = asked or shut
        if shut and not drives.look(change.monitor, slot.device).is_open:
            change.job.wait(change.guest.unplugged, min(hotplug.LOOK_S, arguments.timeout_s))
    for node in slot.nodes:
        if node != wanted:
            close_image(change, node)


def _step(change: Change, slot: _Slot, drive: drives.Drive, wanted: str | None, *, force: bool) -> None:
    monitor = change.monitor
    if drive.node == wanted:
        drives.close_tray(monitor, slot.device)
    elif not drive.is_open:
        drives.open_tray(monitor, slot.device, force=force)
    elif drive.node:
        drives.remove_medium(monitor, slot.device)
    elif wanted:
        drives.insert_medium(monitor, slot.device, wanted)


def _take_back(change: Change, slot: _Slot, before: str | None, arguments: CdInsertArguments) -> None:
    """Have the CD in the drive again that was in it, and let others have the one that did not come to be."""
    _exchange(change, slot, before, arguments)
    release(change, checks.cd(arguments.path))
    if before is None and getattr(change.instance.hvparams, slot.field):  # an earlier attempt had taken it out
        write_down(change, _with_cd(change.instance, slot, ""))
