"""Disks and CD and floppy drives: for each an image with its cache, and a device where the guest finds it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hostler.hvparams import HvParams
from hostler.payloads import Disk, Instance
from worker.kvm.command_line.options import HostPart, Option, boots_first

IDE_UNITS = 4
"""An i440FX machine has two IDE buses of two units, a q35 at least four of one; CD drives take the last ones."""
SCSI_DISKS = 7
"""A parallel SCSI bus has eight ids; the controller keeps the last."""

CONTROLLERS = {"scsi": "lsi53c895a", "virtio-scsi": "virtio-scsi-pci"}
CDROMS = ("cdrom_image_path", "cdrom2_image_path", "cloud_init_image_path")
"""The images that are CDs, in the order of their drives. A seed that the node makes is in the last one."""

CD_DRIVES = {"cdrom_image_path": "cdrom_drive", "cdrom2_image_path": "cdrom2_drive"}
"""The drives that may be empty, by the parameter of their image: the parameter that they are there all the same."""

BYPASS = frozenset({"none", "directsync"})
"""Cache modes without the host's cache."""
WRITE_THROUGH = frozenset({"writethrough", "directsync"})
"""Cache modes in which a write has ended only when it is on the disk."""


def disks(instance: Instance, host: HostPart) -> Iterator[Option]:
    """The instance's disks, in their order, and the controllers they and the CDs need."""
    hvparams = instance.hvparams
    plugged_in = instance.placement.slots if instance.placement else {}
    disk_types = [hvparams.disk_type] if instance.disks or controller(hvparams.disk_type) in plugged_in else []
    for kind in dict.fromkeys([*disk_types, *cdrom_types(hvparams).values()]):
        if kind in CONTROLLERS:
            yield "-device", {"driver": CONTROLLERS[kind], "id": controller(kind)}
    for number, disk in instance.numbered_disks():
        yield "-blockdev", disk_image(instance, number, disk, disk.path in host.block_devices)
        yield "-device", disk_device(instance, number, disk)


def images_of(instance: Instance) -> list[str]:
    """The paths of all that is in the guest's disks and drives."""
    hvparams = instance.hvparams
    media = [*(getattr(hvparams, field) for field in CDROMS), hvparams.floppy_image_path]
    return [disk.path for disk in instance.disks] + [path for path in media if path]


def disk_device(instance: Instance, number: int, disk: Disk) -> dict[str, Any]:
    """What the guest sees of a disk; its image is the block node ``diskNUMBER``."""
    hvparams, node = instance.hvparams, f"disk{number}"
    device = _device(hvparams, hvparams.disk_type, number) | {"id": f"{node}-device", "drive": node}
    if disk.shared:
        device["share-rw"] = True
    if hvparams.disk_cache in WRITE_THROUGH:
        device["write-cache"] = "off"
    return device | (boots_first(hvparams, "disk") if disk == instance.disks[0] else {})


def cdroms(instance: Instance, host: HostPart) -> Iterator[Option]:
    """CD drives with their images, if any; of type paravirtual a read-only disk, for virtio has no CD drive."""
    hvparams = instance.hvparams
    for number, (field, kind) in enumerate(cdrom_types(hvparams).items()):
        node = f"cdrom{CDROMS.index(field)}"
        path = getattr(hvparams, field) or (host.seed_path if field == CDROMS[-1] else "")
        if path:
            yield "-blockdev", cd_image(node, path, _driver(path, host))
        unit = IDE_UNITS - 1 - number if kind == "ide" else _first_free_id(instance, kind) + number
        device = _device(hvparams, kind, unit, medium="cd") | {"id": f"{node}-device"}
        device |= {"drive": node} if path else {}
        yield "-device", device | (boots_first(hvparams, "cdrom") if field == CDROMS[0] else {})


def cd_image(node: str, path: str, driver: str) -> dict[str, Any]:
    """The block node of a CD, which ``driver`` opens (see ``worker.kvm.devices``)."""
    file = {"driver": driver, "filename": path}
    return {"node-name": node, "driver": "raw", "read-only": True, "file": file}


def floppy(hvparams: HvParams, host: HostPart) -> Iterator[Option]:
    """The floppy drive, writable as its image was for Ganeti's guests."""
    if hvparams.floppy_image_path:
        path = hvparams.floppy_image_path
        file = {"driver": _driver(path, host), "filename": path}
        yield "-blockdev", {"node-name": "floppy0", "driver": "raw", "read-only": False, "file": file}
        if "q35" in hvparams.machine_version:
            yield "-device", {"driver": "isa-fdc", "id": "fdc"}
        if boots_first(hvparams, "floppy"):
            yield "-global", "isa-fdc.bootindexA=1"  # the controller's, which a PC has by itself, and not the drive's
        yield "-device", {"driver": "floppy", "id": "floppy0-device", "drive": "floppy0", "unit": 0}


def cdrom_types(hvparams: HvParams) -> dict[str, str]:
    """The type of each CD drive that there is, by the name of its parameter."""
    fallback = hvparams.disk_type if hvparams.disk_type in CONTROLLERS else "ide"
    return {
        field: hvparams.cdrom_disk_type
        or ("ide" if field == CDROMS[0] and hvparams.boot_order == "cdrom" else fallback)
        for field in CDROMS
        if getattr(hvparams, CD_DRIVES.get(field, "has_seed")) or getattr(hvparams, field)
    }


def disk_image(instance: Instance, number: int, disk: Disk, is_block_device: bool) -> dict[str, Any]:
    """The block node of a disk."""
    hvparams = instance.hvparams
    file: dict[str, Any] = {"driver": "host_device" if is_block_device else "file", "filename": disk.path}
    if hvparams.disk_aio:
        file["aio"] = hvparams.disk_aio
    cache = {"direct": hvparams.disk_cache in BYPASS}
    if hvparams.disk_cache in BYPASS:
        file["cache"] = {"direct": True}
    if hvparams.disk_cache == "unsafe":
        cache["no-flush"] = True
    return {
        "node-name": f"disk{number}",
        "driver": disk.format,
        "read-only": disk.mode == "ro",
        "discard": hvparams.disk_discard,
        "cache": cache,
        "file": file,
    }


def _driver(path: str, host: HostPart) -> str:
    if path in host.cd_drives:
        return "host_cdrom"
    return "host_device" if path in host.block_devices else "file"


def _device(hvparams: HvParams, kind: str, unit: int, medium: str = "hd") -> dict[str, Any]:
    if kind == "ide":
        return {"driver": f"ide-{medium}"} | _ide_place(hvparams, unit)
    if kind in CONTROLLERS:
        return {"driver": f"scsi-{medium}", "bus": f"{controller(kind)}.0", "scsi-id": unit}
    if kind == "nvme":
        return {"driver": "nvme", "serial": f"disk{unit}"}
    return {"driver": "virtio-blk-pci"}


def controller(kind: str) -> str:
    """The name of the controller that SCSI disks of this type are on."""
    return "scsi0" if kind == "scsi" else "virtio-scsi0"


def _ide_place(hvparams: HvParams, unit: int) -> dict[str, Any]:
    if "q35" in hvparams.machine_version:
        return {"bus": f"ide.{unit}", "unit": 0}
    return {"bus": f"ide.{unit // 2}", "unit": unit % 2}


def _first_free_id(instance: Instance, kind: str) -> int:
    return len(instance.disks) if instance.hvparams.disk_type == kind else 0
