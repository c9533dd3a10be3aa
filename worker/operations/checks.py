"""Whether this host can run an instance, found out without touching anything. All problems at once, by field."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import psutil
from sqlalchemy import select

from hostler.errors import InvalidArgument
from hostler.payloads import Disk, Instance
from models import DiskLease, Snapshot
from models import Instance as InstanceRow
from worker.errors import Unsupported
from worker.kvm import images
from worker.kvm.command_line.disks import CDROMS
from worker.kvm.emulator import Features
from worker.network import links
from worker.operations import hardware, isolating
from worker.operations.assessments import assess
from worker.operations.context import NodeContext

Problem = tuple[str, str]


def check(node: NodeContext, instance: Instance) -> tuple[list[Problem], list[Problem]]:
    """(errors, warnings), each a list of (field, reason). Raises EmulatorMissing or EmulatorBroken without a QEMU."""
    errors = [*_invalid(node, instance), *_unsupported(node, instance)]
    return _named(errors), [*assess(instance), *_named([*_nic_warnings(node, instance), *isolating.warnings(instance)])]


def require_valid(node: NodeContext, instance: Instance) -> None:
    """Raises InvalidArgument with every problem, or Unsupported where all is valid but not all can be done yet."""
    invalid, unsupported = _invalid(node, instance), _unsupported(node, instance)
    errors = [{"field": field, "reason": reason} for field, reason in _named(invalid + unsupported)]
    if invalid:
        raise InvalidArgument(errors)
    if unsupported:
        raise Unsupported("; ".join(f"{each['field']}: {each['reason']}" for each in errors), errors=errors)


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


def _invalid(node: NodeContext, instance: Instance) -> list[Problem]:
    features = node.features()
    found = [
        *_machine(instance, features),
        *hardware.problems(instance, features),
        *_disks(instance),
        *_nics(node, instance),
        *_memory(instance),
        *_accelerator(node, instance),
        *isolating.problems(node, instance),
    ]
    return found or [*_below_snapshots(node, instance), *_disks_in_use(node, instance)]


def _unsupported(node: NodeContext, instance: Instance) -> list[Problem]:
    return [*hardware.unsupported(instance), *isolating.unsupported(node, instance)]


def _named(problems: list[Problem]) -> list[Problem]:
    return [(f"instance.{field}", reason) for field, reason in problems]


def _machine(instance: Instance, features: Features) -> Iterator[Problem]:
    hvparams = instance.hvparams
    machine = features.machines.get(hvparams.machine_version or "pc")
    if machine is None:
        yield "hvparams.machine_version", f"QEMU {features.version_text} has no machine {hvparams.machine_version!r}"
    elif instance.vcpus > machine.cpu_max:
        yield "vcpus", f"{instance.vcpus} is more than machine {machine.name} can have ({machine.cpu_max})"
    if hvparams.cpu_type and hvparams.cpu_type not in features.cpu_models:
        yield "hvparams.cpu_type", f"QEMU {features.version_text} has no CPU model {hvparams.cpu_type!r}"


def _disks(instance: Instance) -> Iterator[Problem]:
    seen: set[str] = set()
    for index, disk in enumerate(instance.disks):
        path = Path(disk.path)
        if reason := hardware.unreadable(path) if disk.mode == "ro" else hardware.unwritable(path):
            yield f"disks[{index}].path", reason
        if disk.mode == "ro" and instance.hvparams.disk_type == "ide":
            yield f"disks[{index}].mode", "an IDE disk cannot be read-only; use disk_type paravirtual or scsi"
        if hardware.unreadable(path):
            continue
        if (identity := file_id(disk.path)) in seen:
            yield f"disks[{index}].path", f"{disk.path!r} is the same file as another disk of this instance"
        seen.add(identity)


def _nics(node: NodeContext, instance: Instance) -> Iterator[Problem]:
    if node.settings.ifup:
        return  # a script of the site's own may know links that are no bridges of this host
    for index, nic in enumerate(instance.nics):
        if problem := links.problem(nic):
            yield f"nics[{index}].{problem[0]}", problem[1]


def _nic_warnings(node: NodeContext, instance: Instance) -> Iterator[Problem]:
    for index, nic in enumerate(instance.nics):
        if not node.settings.ifup and (warning := links.warning(nic)):
            yield f"nics[{index}].{warning[0]}", warning[1]


def _memory(instance: Instance) -> Iterator[Problem]:
    total_mib = psutil.virtual_memory().total // 2**20
    most = {"memory_mib": instance.memory_mib, "hvparams.memory_max_mib": instance.hvparams.memory_max_mib}
    for field, wanted_mib in most.items():
        if wanted_mib > total_mib:
            yield field, f"{wanted_mib} is more than this host has in all ({total_mib} MiB)"


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
    """Which of the instance's disks and CDs another instance has open in a way that excludes it."""
    by_file: dict[str, list[DiskLease]] = {}
    for lease in held:
        by_file.setdefault(lease.file_id, []).append(lease)
    for field, disk in opened(instance).items():
        try:
            files = {file_id(file.path): file for file in (disk, *beneath(disk))}
        except OSError as exc:
            yield field, f"{exc.filename!r}: {exc.strerror}"
            continue
        for identity, file in files.items():
            for lease in by_file.get(identity, []):
                if not _compatible(file, lease):
                    yield field, f"{file.path!r} is in use by instance {lease.instance_name}"


def opened(instance: Instance) -> dict[str, Disk]:
    """What the instance has open that others must not write to, by field: its disks and its CDs."""
    cds = {f"hvparams.{field}": getattr(instance.hvparams, field) for field in CDROMS}
    disks = {f"disks[{index}].path": disk for index, disk in enumerate(instance.disks)}
    return disks | {field: cd(path) for field, path in cds.items() if path}


def cd(path: str) -> Disk:
    """A CD as leases see it: any number of guests may read it."""
    return Disk.model_construct(path=path, mode="ro", shared=True, format="raw")


def alone(instance: Instance, disk: Disk) -> Instance:
    """``instance`` with nothing open but this disk or CD."""
    without_cds = instance.hvparams.model_copy(update=dict.fromkeys(CDROMS, ""))
    return instance.model_copy(update={"disks": [disk], "hvparams": without_cds})


def beneath(disk: Disk) -> list[Disk]:
    """The files that a disk lies on, read-only as its QEMU has them. Raises OSError."""
    files = images.backing_files(disk.path) if disk.format == "qcow2" else []
    return [Disk.model_construct(path=path, mode="ro", shared=False, format="qcow2") for path in files]


def leases(node: str, instance: Instance) -> list[DiskLease]:
    """What keeps others from an instance's disks and CDs and from the files that these lie on. Raises OSError."""
    found: dict[str, DiskLease] = {}
    disks = [*opened(instance).values()]
    for disk in [*disks, *(file for each in disks for file in beneath(each))]:
        lease = DiskLease(node=node, instance_name=instance.name, path=disk.path, file_id=file_id(disk.path))
        lease.shared, lease.read_only = disk.shared, disk.mode == "ro"
        found.setdefault(lease.file_id, lease)
    return [*found.values()]


def _below_snapshots(node: NodeContext, instance: Instance) -> Iterator[Problem]:
    """Disks that snapshots of the instance rest on: to write to them would destroy these."""
    with node.database.reading() as session:
        row = session.get(InstanceRow, instance.name)
        written = {disk["path"] for disk in row.spec["disks"]} if row else set()
        found = session.scalars(select(Snapshot).where(Snapshot.instance_name == instance.name).order_by(Snapshot.id))
        layers = [
            layer for each in found for layer in each.layers if each.state != "creating" or layer["path"] in written
        ]
    tops = {layer["root"]: layer["path"] for layer in layers}
    bases = {_identity(layer["base"]): layer["root"] for layer in layers}
    for index, disk in enumerate(instance.disks):
        if root := bases.get(_identity(disk.path)):
            yield (
                f"disks[{index}].path",
                (
                    f"snapshots of {instance.name} rest on {disk.path!r}, and writing to it would destroy them; it"
                    f" is {tops[root]!r} now, format qcow2 (hostler snapshot list {instance.name})"
                ),
            )
        elif disk.path in tops.values() and disk.format != "qcow2":
            yield f"disks[{index}].format", f"{disk.path!r} was made for a snapshot, in format qcow2"


def _identity(path: str) -> str:
    try:
        return file_id(path)
    except OSError:
        return path


def _compatible(disk: Disk, lease: DiskLease) -> bool:
    return (disk.shared and lease.shared) or (disk.mode == "ro" and lease.read_only)
