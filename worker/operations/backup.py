"""Whole copies of an instance's disks as they are at one moment, of a running guest while it writes on.

The copies have other names until all are complete and durable: a file with its final name is a whole backup.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hostler.contract import TaskName
from hostler.errors import InvalidArgument
from hostler.payloads import BackupArguments, Disk, Instance
from models import utc_now
from worker.kvm import block, images
from worker.kvm.opening import open_image
from worker.operations.block_jobs import Meter, close_nodes, end_jobs, follow, quietly, running_guest
from worker.operations.context import JobContext, NodeContext
from worker.operations.guests import Guest, Guests
from worker.operations.recovery import recover
from worker.operations.recovery_table import Action
from worker.operations.snapshot_rows import saved
from worker.operations.views import iso, view_of

PREFIX = "backup-"
NAME_MAX = 255


@dataclass(frozen=True)
class _Copy:
    """A disk (by its device's number) and where its copy goes; ``part`` is its name until it is complete."""

    number: int
    disk: Disk
    path: Path
    part: Path
    format: str

    @property
    def job_id(self) -> str:
        return f"{PREFIX}{self.number}"


def backup(node: NodeContext, guests: Guests, job: JobContext, arguments: BackupArguments) -> dict[str, Any]:
    """Copy all disks. ``how`` is ``live`` or ``stopped``; ``consistent_at`` is the moment the copies show.

    Raises InvalidArgument, Unsupported, QemuFailed, QmpLost, Cancelled; no file and no job in QEMU is left then.
    """
    view_of(node, arguments.name)
    recovery = recover(node, guests, job, TaskName.INSTANCE_BACKUP, arguments.name)
    guest = running_guest(node, guests, arguments.name)
    instance = saved(node, arguments.name)
    copies = _copies(instance, arguments, job.id)
    if guest:
        _end(guest)
    if recovery.action is Action.CONTINUE and all(copy.part.exists() or copy.path.exists() for copy in copies):
        return _publish(arguments, copies, "live" if guest else "stopped")
    images.end_strays(str(copy.part) for copy in copies)
    _remove(copies)
    _require_possible(copies, arguments.targets)
    try:
        job.phase("copy", 1, f"copying {len(copies)} disk(s)")
        began_at = iso(utc_now())
        _copy(guest, job, copies, confined=instance.hvparams.is_confined) if guest else _copy_stopped(job, copies)
        for copy in copies:
            images.make_durable(str(copy.part))
        job.phase("publish", 98, "the copies are complete")
        job.commit()
    except BaseException:
        _remove(copies)
        raise
    return _publish(arguments, copies, "live" if guest else "stopped", began_at)


def _copy(guest: Guest, job: JobContext, copies: list[_Copy], *, confined: bool) -> None:
    monitor = guest.talk()
    nodes, tops = monitor.block_nodes(), block.tops(monitor)
    try:
        targets = {}
        for copy in copies:
            top = tops[f"disk{copy.number}-device"]
            images.create(str(copy.part), copy.format, nodes[top]["image"]["virtual-size"])
            open_image(monitor, _target(copy), confined=confined)
            targets[copy.job_id] = top, copy.job_id
        job.check_cancelled()
        block.start_backup(monitor, targets)
        meter = Meter(job, 1, 97, "copied")
        follow(job, guest, PREFIX, meter, lambda found: {each.status for each in found} <= {"concluded"})
    except BaseException:
        quietly(lambda: _end(guest))
        raise
    _end(guest)  # which also has QEMU write out what it holds back


def _target(copy: _Copy) -> dict[str, Any]:
    file = {"driver": "file", "filename": str(copy.part), "discard": "unmap"}
    # Zeros take no room in a qcow2 file, however they came into the disk.
    return {
        "node-name": copy.job_id,
        "driver": copy.format,
        "discard": "unmap",
        "detect-zeroes": "unmap",
        "file": file,
    }


def _end(guest: Guest) -> None:
    end_jobs(guest, PREFIX)
    close_nodes(guest, PREFIX)


def _copy_stopped(job: JobContext, copies: list[_Copy]) -> None:
    sizes = [images.virtual_size(copy.disk.path, copy.disk.format) for copy in copies]
    total, meter = sum(sizes), Meter(job, 1, 97, "copied")
    for number, copy in enumerate(copies):
        before, size = sum(sizes[:number]), sizes[number]
        images.create(str(copy.part), copy.format, size)

        def watch(share: float, before: int = before, size: int = size) -> None:
            meter(before + int(share * size), total)

        images.convert(copy.disk.path, copy.disk.format, str(copy.part), copy.format, watch)


def _publish(
    arguments: BackupArguments, copies: list[_Copy], how: str, consistent_at: str | None = None
) -> dict[str, Any]:
    for copy in copies:
        if copy.part.exists():
            copy.part.replace(copy.path)
        images.make_durable(str(copy.path))
    files = [
        {
            "disk": copy.disk.path,
            "path": str(copy.path),
            "format": copy.format,
            "virtual_size_bytes": images.virtual_size(str(copy.path), copy.format),
            "allocated_bytes": copy.path.stat().st_blocks * 512,
        }
        for copy in copies
    ]
    return {"name": arguments.name, "how": how, "consistent_at": consistent_at, "files": files}


def _copies(instance: Instance, arguments: BackupArguments, job_id: str) -> list[_Copy]:
    disks, given = instance.numbered_disks(), arguments.targets
    if not disks:
        _refuse("name", f"{instance.name} has no disks")
    if given and len(given) != len(disks):
        _refuse("targets", f"{len(given)} given, but {instance.name} has {len(disks)} disks")
    mark = hashlib.sha256(job_id.encode()).hexdigest()[:16]
    copies = []
    for index, (number, disk) in enumerate(disks):
        name = f"{instance.name}.disk{number}.{arguments.format}"
        path = Path(given[index]) if given else Path(str(arguments.target_dir), name)
        copies.append(_Copy(number, disk, path, path.with_name(f".{mark}-{number}.part"), arguments.format))
    return copies


def _require_possible(copies: list[_Copy], targets: list[str]) -> None:
    images.find()
    found = [
        (f"targets[{index}]" if targets else "target_dir", _problem(copy.path)) for index, copy in enumerate(copies)
    ]
    if errors := [{"field": field, "reason": reason} for field, reason in found if reason]:
        raise InvalidArgument(errors)


def _problem(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"{str(folder)!r} is no folder of this node"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"{str(folder)!r} cannot be written by the worker"
    if path.exists() or path.is_symlink():
        return f"{str(path)!r} exists already; nothing is overwritten"
    return f"{path.name!r} is longer than a file's name can be" if len(os.fsencode(path.name)) > NAME_MAX else ""


def _refuse(field: str, reason: str) -> NoReturn:
    raise InvalidArgument([{"field": field, "reason": reason}])


def _remove(copies: Iterable[_Copy]) -> None:
    for copy in copies:
        copy.part.unlink(missing_ok=True)
