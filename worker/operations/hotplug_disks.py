"""Disks of a running guest: plugged in, taken out, made larger."""

from __future__ import annotations

import time
from pathlib import Path

import structlog

from hostler.contract import TaskName
from hostler.errors import InvalidArgument
from hostler.payloads import (
    Disk,
    DiskAddArguments,
    DiskRemoveArguments,
    DiskResizeArguments,
    Instance,
    InstanceView,
)
from worker.errors import OperationError, QmpLost
from worker.kvm.block import tops
from worker.kvm.command_line.disks import controller, disk_device, disk_image
from worker.kvm.opening import open_image
from worker.operations import hotplug
from worker.operations.context import JobContext, NodeContext
from worker.operations.guests import Guests
from worker.operations.hotplug import Change, changed, close_image, lease, record, release, saved, unplug
from worker.operations.views import view_of

log = structlog.get_logger(__name__)

MIB = 2**20
PCI_TYPES = frozenset({"paravirtual", "nvme"})
NUMBERS = range(256)


def disk_add(node: NodeContext, guests: Guests, job: JobContext, arguments: DiskAddArguments) -> InstanceView:
    """Plug in a disk, as the last one.

    Raises InvalidArgument, Unsupported, NotRunning or QemuFailed; the guest and what it holds are as before then. After
    QmpLost the job is tried again; the disk stays reserved for this guest, which may have it, until that ends.
    """
    disk = arguments.disk
    instance, begun = saved(node, guests, job, TaskName.INSTANCE_DISK_ADD, arguments.name)
    if begun and disk in instance.disks:
        return view_of(node, instance.name)
    change = Change(node, job, guests.need(instance.name), instance)
    number = _free_number(change, disk)
    wanted = _with_disks(instance, [*instance.numbered_disks(), (number, disk)])
    _require_hotplug(change)
    hotplug.require_valid(node, wanted, f"disks[{len(instance.disks)}]", "disk")
    job.phase("plug", 30, f"plugging in {disk.path} as disk {number}")
    job.commit()
    lease(change, disk, "disk.path")
    try:
        _plug(change, wanted, number, disk)
    except QmpLost:
        raise  # whether QEMU has it is not known: the next attempt asks
    except OperationError:
        _take_back(change, number, disk)
        raise
    return record(change, wanted)


def disk_remove(node: NodeContext, guests: Guests, job: JobContext, arguments: DiskRemoveArguments) -> InstanceView:
    """Take out a disk once the guest has let go of it; then others may have it.

    Raises InvalidArgument, Unsupported or NotRunning, and TimedOut when the guest does not react: it keeps the disk.
    """
    path = arguments.path
    instance, begun = saved(node, guests, job, TaskName.INSTANCE_DISK_REMOVE, arguments.name)
    left = [(number, disk) for number, disk in instance.numbered_disks() if disk.path != path]
    if begun and len(left) == len(instance.disks):
        return view_of(node, instance.name)
    change = Change(node, job, guests.need(instance.name), instance)
    number, _ = _find(instance, path)
    _require_hotplug(change)
    _require_no_snapshot(change, number)
    job.phase("unplug", 30, f"waiting up to {arguments.timeout_s:g} s for the guest to let go of disk {number}")
    job.commit()
    unplug(change, f"disk{number}-device", time.monotonic() + arguments.timeout_s)
    close_image(change, f"disk{number}")
    return record(change, _with_disks(instance, left))


def disk_resize(node: NodeContext, guests: Guests, job: JobContext, arguments: DiskResizeArguments) -> InstanceView:
    """Make a disk larger; the guest is told. Nothing is done where it has that size already.

    Raises InvalidArgument, NotRunning or QemuFailed; the disk has its old size then.
    """
    instance, _ = saved(node, guests, job, TaskName.INSTANCE_DISK_RESIZE, arguments.name)
    change = Change(node, job, guests.need(instance.name), instance)
    number, disk = _find(instance, arguments.path)
    _require_no_snapshot(change, number)
    size_bytes = arguments.size_mib * MIB
    now_bytes = int(change.monitor.block_nodes()[f"disk{number}"]["image"]["virtual-size"])
    if size_bytes < now_bytes:
        _invalid("size_mib", f"{arguments.size_mib} is less than {disk.path!r} has ({now_bytes / MIB:g} MiB)")
    if disk.mode == "ro" or disk.shared:
        _invalid("path", f"{disk.path!r} is {'read-only' if disk.mode == 'ro' else 'shared with other guests'}")
    if size_bytes > now_bytes:
        job.phase("resize", 50, f"making disk {number} {arguments.size_mib} MiB large")
        job.commit()
        change.monitor.resize_block_node(f"disk{number}", size_bytes)
    return view_of(node, instance.name)


def _find(instance: Instance, path: str) -> tuple[int, Disk]:
    for number, disk in instance.numbered_disks():
        if disk.path == path:
            return number, disk
    has = ", ".join(disk.path for disk in instance.disks) or "none"
    raise InvalidArgument([{"field": "path", "reason": f"{instance.name} has no disk {path!r}; its disks: {has}"}])


def _with_disks(instance: Instance, disks: list[tuple[int, Disk]]) -> Instance:
    placement = hotplug.placed(instance, disks, instance.numbered_nics())
    given = [disk.model_dump(mode="json") for _, disk in disks]
    return changed(instance, "disk", disks=given, placement=placement)


def _free_number(change: Change, disk: Disk) -> int:
    """The first number that nothing else has; the one of an earlier attempt where QEMU has the image open already."""
    nodes = change.monitor.block_nodes()
    taken = {number for number, _ in change.instance.numbered_disks()}
    taken.update(hotplug.cd_scsi_ids(change.instance).values())
    taken.update(number for number in NUMBERS if nodes.get(f"disk{number}", {}).get("file", disk.path) != disk.path)
    return next(number for number in NUMBERS if number not in taken)


def _require_hotplug(change: Change) -> None:
    hvparams = change.instance.hvparams
    if hvparams.disk_type in PCI_TYPES:
        hotplug.require_pci_hotplug(change.instance, "hvparams.disk_type")
    elif hvparams.disk_type != "virtio-scsi":
        hotplug.refuse("hvparams.disk_type", f"disks of type {hvparams.disk_type} cannot come or go while a guest runs")
    elif controller(hvparams.disk_type) not in change.monitor.devices():
        hotplug.refuse("hvparams.disk_type", "the guest was started without a disk, and has no controller for this one")


def _require_no_snapshot(change: Change, number: int) -> None:
    top = tops(change.monitor).get(f"disk{number}-device", f"disk{number}")
    if top != f"disk{number}":
        hotplug.refuse("path", f"the guest writes to an overlay of this disk ({top}); delete its snapshots first")


def _plug(change: Change, wanted: Instance, number: int, disk: Disk) -> None:
    image = disk_image(wanted, number, disk, Path(disk.path).is_block_device())
    if image["node-name"] not in change.monitor.block_nodes():
        open_image(change.monitor, image, confined=wanted.hvparams.is_confined)
    device = disk_device(wanted, number, disk)
    if device["id"] not in change.monitor.devices():
        change.monitor.plug(device)


def _take_back(change: Change, number: int, disk: Disk) -> None:
    """Close the image and give the disk back; it stays reserved where QEMU may still have it."""
    try:
        if f"disk{number}-device" not in change.monitor.devices():
            close_image(change, f"disk{number}")
            release(change, disk)
    except OperationError as exc:
        log.warning("a disk that could not be plugged in stays reserved", path=disk.path, reason=exc.message)


def _invalid(field: str, reason: str) -> None:
    raise InvalidArgument([{"field": field, "reason": reason}])
