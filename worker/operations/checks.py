"""Whether this host can run an instance, found out without touching anything. All problems at once, by field."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import psutil
from sqlalchemy import select

from hostler.errors import InvalidArgument
from hostler.payloads import Disk, Instance
from models import DiskLease
from worker.kvm.arguments import IDE_UNITS
from worker.kvm.emulator import Features
from worker.operations.context import NodeContext

Problem = tuple[str, str]
SCSI_DISKS = 7
"""A parallel SCSI bus has eight ids; the controller keeps the last."""


def check(node: NodeContext, instance: Instance) -> tuple[list[Problem], list[Problem]]:
    """(errors, warnings), each a list of (field, reason). Raises EmulatorMissing or EmulatorBroken without a QEMU."""
    features = node.features()
    errors = [
        *_machine(instance, features),
        *_files(instance),
        *_disks(instance),
        *_nics(node, instance),
        *_memory(instance),
        *_accelerator(node, instance),
    ]
    if not errors:
        errors += [*_disks_in_use(node, instance)]
    return [(f"instance.{field}", reason) for field, reason in errors], [*_warnings(instance)]


def require_valid(node: NodeContext, instance: Instance) -> None:
    """Raises InvalidArgument with every problem."""
    errors, _ = check(node, instance)
    if errors:
        raise InvalidArgument([{"field": field, "reason": reason} for field, reason in errors])


def resolve(instance: Instance, features: Features) -> Instance:
    """``instance`` with its machine type pinned to a versioned one, so that a later QEMU builds the same hardware."""
    wanted = instance.hvparams.machine_version or "pc"
    name = features.machines[wanted].name
    hvparams = instance.hvparams.model_copy(update={"machine_version": name})
    return instance.model_copy(update={"hvparams": hvparams})


def file_id(path: str) -> str:
    """What a path opens, whatever it is called: device number of a block device, else file system and inode."""
    found = Path(path).stat()
    if stat.S_ISBLK(found.st_mode):
        return f"block:{found.st_rdev:x}"
    return f"file:{found.st_dev:x}:{found.st_ino}"


def _machine(instance: Instance, features: Features) -> Iterator[Problem]:
    hvparams = instance.hvparams
    machine = features.machines.get(hvparams.machine_version or "pc")
    if machine is None:
        yield "hvparams.machine_version", f"QEMU {features.version_text} has no machine {hvparams.machine_version!r}"
    elif instance.vcpus > machine.cpu_max:
        yield "vcpus", f"{instance.vcpus} is more than machine {machine.name} can have ({machine.cpu_max})"
    if hvparams.cpu_type and hvparams.cpu_type not in features.cpu_models:
        yield "hvparams.cpu_type", f"QEMU {features.version_text} has no CPU model {hvparams.cpu_type!r}"


def _files(instance: Instance) -> Iterator[Problem]:
    hvparams = instance.hvparams
    for field in ("kernel_path", "initrd_path", "cdrom_image_path"):
        path = getattr(hvparams, field)
        if path and (reason := _unreadable(Path(path))):
            yield f"hvparams.{field}", reason


def _unreadable(path: Path) -> str:
    try:
        mode = path.stat().st_mode
    except OSError as exc:
        return f"{str(path)!r}: {exc.strerror}"
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        return f"{str(path)!r} is neither a file nor a block device"
    return "" if os.access(path, os.R_OK) else f"{str(path)!r} cannot be read by the worker"


def _disks(instance: Instance) -> Iterator[Problem]:
    hvparams = instance.hvparams
    seen: set[str] = set()
    for index, disk in enumerate(instance.disks):
        if reason := _unreadable(Path(disk.path)):
            yield f"disks[{index}].path", reason
        elif disk.mode == "rw" and not os.access(disk.path, os.W_OK):
            yield f"disks[{index}].path", f"{disk.path!r} cannot be written by the worker"
        if disk.mode == "ro" and hvparams.disk_type == "ide":
            yield f"disks[{index}].mode", "an IDE disk cannot be read-only; use disk_type paravirtual or scsi"
        if not reason and (identity := file_id(disk.path)) in seen:
            yield f"disks[{index}].path", f"{disk.path!r} is the same file as another disk of this instance"
        elif not reason:
            seen.add(identity)
    units = IDE_UNITS - bool(hvparams.cdrom_image_path)
    limit = {"ide": units, "scsi": SCSI_DISKS}.get(hvparams.disk_type)
    if limit is not None and len(instance.disks) > limit:
        yield "disks", f"{len(instance.disks)} are more than disk_type {hvparams.disk_type} can connect ({limit})"


def _nics(node: NodeContext, instance: Instance) -> Iterator[Problem]:
    for index, nic in enumerate(instance.nics):
        # A script of the site's own may know links that are no Linux bridges.
        if nic.mode == "bridged" and not node.settings.ifup and not Path(f"/sys/class/net/{nic.link}/bridge").is_dir():
            yield f"nics[{index}].link", f"this host has no bridge {nic.link!r}"


def _memory(instance: Instance) -> Iterator[Problem]:
    total_mib = psutil.virtual_memory().total // 2**20
    if instance.memory_mib > total_mib:
        yield "memory_mib", f"{instance.memory_mib} is more than this host has in all ({total_mib} MiB)"


def _accelerator(node: NodeContext, instance: Instance) -> Iterator[Problem]:
    if instance.hvparams.kvm_flag == "enabled" and not (probe := node.kvm()).works:
        yield "hvparams.kvm_flag", f"KVM does not work on this host: {probe.reason}"


def _disks_in_use(node: NodeContext, instance: Instance) -> Iterator[Problem]:
    with node.database.reading() as session:
        held = session.scalars(
            select(DiskLease).where(DiskLease.node == node.name, DiskLease.instance_name != instance.name)
        ).all()
    yield from conflicts(instance, list(held))


def conflicts(instance: Instance, held: list[DiskLease]) -> Iterator[Problem]:
    """Which of the instance's disks another instance has open in a way that excludes it."""
    by_file: dict[str, list[DiskLease]] = {}
    for lease in held:
        by_file.setdefault(lease.file_id, []).append(lease)
    for index, disk in enumerate(instance.disks):
        try:
            identity = file_id(disk.path)
        except OSError as exc:
            yield f"disks[{index}].path", f"{disk.path!r}: {exc.strerror}"
            continue
        for lease in by_file.get(identity, []):
            if not _compatible(disk, lease):
                yield f"disks[{index}].path", f"{disk.path!r} is in use by instance {lease.instance_name}"


def _compatible(disk: Disk, lease: DiskLease) -> bool:
    return (disk.shared and lease.shared) or (disk.mode == "ro" and lease.read_only)


def _warnings(instance: Instance) -> Iterator[Problem]:
    hvparams = instance.hvparams
    if not hvparams.machine_version:
        yield "instance.hvparams.machine_version", "unset: pinned to this QEMU's newest at the first start"
    if not hvparams.acpi:
        yield "instance.hvparams.acpi", "off: the guest cannot be asked to shut down and will be killed"
