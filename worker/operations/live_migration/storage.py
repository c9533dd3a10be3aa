"""Disks that the two nodes do not share: made on the target, copied, and complete when the guest goes on there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import select

from hostler.errors import InvalidArgument
from hostler.payloads import Disk, Instance
from models import DiskLease, LiveMigration, Snapshot
from worker.errors import OperationError, QemuFailed, Unsupported
from worker.kvm import devices, images
from worker.kvm.live_migration import storage
from worker.kvm.live_migration.nbd import Address
from worker.operations import checks
from worker.operations.context import NodeContext
from worker.operations.guests import Guest
from worker.operations.live_migration import rows, security
from worker.operations.live_migration.teller import Teller
from worker.operations.live_migration.tuning import MIB, bandwidth_mib_s

Sync = Literal["full", "top"]


def describe(node: NodeContext, instance: Instance, sync: str) -> list[dict[str, Any]]:
    """The disks to copy, as the target has to make them. Raises Unsupported for what cannot be copied so."""
    if sync == "none":
        return []
    with node.database.reading() as session:
        snapshots = session.scalars(select(Snapshot.name).where(Snapshot.instance_name == instance.name)).all()
    if snapshots and sync == "full":
        raise Unsupported(
            f"{instance.name} has snapshots ({', '.join(snapshots)}), which a full copy would not have; delete them, "
            "or copy the top alone (copy_storage top), with the files below shared"
        )
    return [*_to_copy(instance, sync)]


def _to_copy(instance: Instance, sync: str) -> Iterator[dict[str, Any]]:
    for index, (number, disk) in enumerate(instance.numbered_disks()):
        if disk.mode == "ro" or disk.shared:
            continue  # what nobody writes, or several share, has to be there
        backing = images.backing_file(disk.path) if sync == "top" and disk.format == "qcow2" else None
        if sync == "top" and backing is None:
            raise Unsupported(f"disks[{index}]: {disk.path!r} lies on no other file; copy it in full")
        size_bytes = images.virtual_size(disk.path, disk.format)
        on_device = devices.is_device(disk.path)
        yield {
            "name": f"disk{number}",
            "field": f"disks[{index}].path",
            "path": disk.path,
            "format": disk.format,
            "size_bytes": size_bytes,
            "backing": [*backing] if backing else None,
            "on_device": on_device,
            "identity": devices.identity(disk.path) if on_device else "",
            "blank": on_device and devices.is_blank(disk.path),
            "room_bytes": _room_bytes(disk, size_bytes, on_device=on_device),
        }


def _room_bytes(disk: Disk, size_bytes: int, *, on_device: bool) -> int:
    """What a block device on the target has to have: as much as the guest may fill, or as the source's has."""
    if disk.format == "raw":
        return size_bytes
    return devices.size_bytes(disk.path) if on_device else images.room_bytes(size_bytes)


def make_images(node: NodeContext, row: LiveMigration) -> None:
    """On the target: an empty image for each disk, a file or in a block device that is there.

    Raises InvalidArgument where a block device will not do, else Unsupported; then none is made. Which are ours is
    written down before, so that whoever comes after a death can tell them from somebody else's.
    """
    discard_images(node, row)
    _require_places(node, row)
    disks = {disk["path"]: disk for disk in row.info["copied"]}
    if disks:
        rows.note(node, row.job_id, info=row.info | {"made": [*disks]})
    made: list[str] = []
    try:
        for path, disk in disks.items():
            made += [path] if devices.is_device(path) else []  # also one that is formatted in part is not blank
            _make_image(disk)
            made.append(path)
    except QemuFailed as exc:
        remove_images(made)
        rows.note(node, row.job_id, info=row.info | {"made": []})
        raise Unsupported(f"the target cannot make the guest's disks: {exc}") from exc


def _make_image(disk: dict[str, Any]) -> None:
    path, format, size_bytes = disk["path"], disk["format"], disk["size_bytes"]
    backing = tuple(disk["backing"]) if disk["backing"] else None
    if not devices.is_device(path):
        storage.create_image(path, format, size_bytes, backing)
    elif format != "raw":  # to a raw one all is copied, also what is zero
        images.format_device(path, size_bytes, backing)


def _require_places(node: NodeContext, row: LiveMigration) -> None:
    """Raises InvalidArgument or Unsupported where a disk cannot be made; nothing was touched."""
    problems = [(disk["field"], why) for disk in row.info["copied"] if (why := _problem_of_device(node, row, disk))]
    if problems:
        raise InvalidArgument([{"field": field, "reason": f"{why} (node {node.name})"} for field, why in problems])
    if taken := [disk["path"] for disk in row.info["copied"] if _has_content(Path(disk["path"]))]:
        raise Unsupported(
            f"the target has {', '.join(taken)} already. A file with content is never overwritten: remove it there, if "
            "it is one that an earlier migration left"
        )


def _problem_of_device(node: NodeContext, row: LiveMigration, disk: dict[str, Any]) -> str:
    """Why a disk cannot be copied into a block device at its path; empty where it can, or where it becomes a file."""
    path, needed = disk["path"], disk["room_bytes"]
    if not devices.is_device(path):
        why = f"{path!r} is a block device on the source and none here; make one of {needed} bytes"
        return why if disk["on_device"] else ""
    if holder := _holder(node, row.instance_name, path):
        return f"{path!r} is in use by instance {holder}"
    if same := _may_be_the_same(disk):
        return same
    try:
        found, blank = devices.free_size_bytes(path), devices.is_blank(path)
    except OSError as exc:
        return f"the block device {path!r} cannot be written to: {exc.strerror}"
    if found < needed or (found > needed and disk["format"] == "raw"):  # QEMU mirrors between equals only
        exactly = "exactly " if disk["format"] == "raw" else ""
        return f"the block device {path!r} has {found} bytes, and the disk needs {exactly}{needed}"
    return "" if blank else (
        f"the block device {path!r} has content, and is not overwritten; if nobody needs it, clear its first MiB: "
        f"dd if=/dev/zero of={path} bs=1M count=1 oflag=direct"
    )  # fmt: skip


def _may_be_the_same(disk: dict[str, Any]) -> str:
    """Why the block device here may be the source's own, which would be copied onto itself and cleared at a failure.

    Empty where it is another one: the two say who they are, or one has content and the other, asked later, has not.
    """
    here, there, path = devices.identity(disk["path"]), disk["identity"], disk["path"]
    if here and here == there:
        return f"{path!r} is the same block device on both nodes ({here}); do not copy what they share"
    if disk["blank"] and not (here and there):
        return (
            f"{path!r} is blank on the source, so that nothing tells whether it is the same block device here; have "
            "the guest write to it first, a partition table for example"
        )
    return ""


def _holder(node: NodeContext, name: str, path: str) -> str | None:
    same = DiskLease.node == node.name, DiskLease.file_id == checks.file_id(path), DiskLease.instance_name != name
    with node.database.reading() as session:
        return session.scalar(select(DiskLease.instance_name).where(*same).limit(1))


def _has_content(path: Path) -> bool:
    try:
        return path.exists() and not path.is_block_device() and (not path.is_file() or path.stat().st_size > 0)
    except OSError:
        return False


def discard_images(node: NodeContext, row: LiveMigration) -> None:
    """On the target: remove what was made for a migration that came to nothing. What is there later is not ours."""
    if made := row.info.get("made"):
        remove_images(made)
        rows.note(node, row.job_id, info=row.info | {"made": []})


def remove_images(paths: list[str]) -> None:
    """On the target: what was made for a migration that came to nothing; a block device is blank again."""
    for path in paths:
        with suppress(OSError, QemuFailed):
            if devices.is_device(path):
                images.blank_device(path, devices.LABELS_BYTES)
            else:
                Path(path).unlink()


def export(row: LiveMigration, guest: Guest, host: str, ports: range, creds: str) -> int | None:
    """On the target: let the source write to the disks; the port, None where none are copied."""
    if not row.info["copied"]:
        return None
    disks = {disk["name"]: disk["name"] for disk in row.info["copied"]}
    return storage.export_disks(guest.talk(), disks, host, ports, tls_creds=creds).port


def copy(node: NodeContext, row: LiveMigration, guest: Guest, teller: Teller, check: Callable[[], None]) -> None:
    """On the source: return when both sides have the same. A worker that takes over goes on with what QEMU is at.

    ``check`` is called a few times a second. Raises MigrationFailed, QemuFailed and what ``check`` raises; the mirrors
    are then ended by ``end``.
    """
    monitor = guest.talk()
    begun = {each.id.removeprefix(storage.PREFIX) for each in storage.mirrors(monitor)}
    host, port = str(row.host), int(row.info["nbd_port"])
    address = Address(host, port, security.of_source(node, row))
    sync: Sync = "top" if row.options["copy_storage"] == "top" else "full"
    for disk in row.info["copied"]:
        if disk["name"] not in begun:
            node_name = node_of(guest, disk["name"])
            bandwidth = int(bandwidth_mib_s(row) * MIB)
            storage.start_mirror(monitor, disk["name"], node_name, address, sync=sync, bandwidth_bytes_s=bandwidth)
    storage.follow(monitor, guest.job_changed, teller.tell_storage, check)


def tune(row: LiveMigration, guest: Guest, bandwidth_bytes_s: int) -> None:
    """On the source: copy each disk at most so fast from now on; 0 is unlimited."""
    if row.info["copied"]:
        storage.set_bandwidth(guest.talk(), bandwidth_bytes_s)


def require_sound(guest: Guest) -> None:
    """On the source: raises MigrationFailed where a disk that was copied is no longer kept the same on the target."""
    storage.require_sound(guest.talk())


def node_of(guest: Guest, name: str) -> str:
    """The block node that a disk has now; a snapshot puts another one on top."""
    drive = guest.talk().device_property(f"{name}-device", "drive")
    return str(drive or name)


def finish(row: LiveMigration, guest: Guest) -> None:
    """On the source, while the guest stands still: the target's disks are complete and on their own."""
    if row.info["copied"]:
        # A worker that found the switch recorded comes after one that died at it.
        storage.finish_mirrors(guest.talk(), guest.job_changed, again=row.stage == rows.Stage.SWITCHING)


def end(row: LiveMigration, guest: Guest) -> None:
    """On the source: nothing is copied any more; the guest goes on with its own disks."""
    if row.info["copied"]:
        storage.end_mirrors(guest.talk(), guest.job_changed)


def close(row: LiveMigration, guest: Guest) -> None:
    """On the target: the disks are the guest's alone."""
    if row.info["copied"]:
        with suppress(OperationError):
            storage.stop_exports(guest.talk())
