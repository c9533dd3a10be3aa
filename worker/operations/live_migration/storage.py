"""Disks that the two nodes do not share: made on the target, copied, and complete when the guest goes on there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import select

from hostler.payloads import Instance
from models import LiveMigration, Snapshot
from worker.errors import OperationError, QemuFailed, Unsupported
from worker.kvm import images
from worker.kvm.live_migration import storage
from worker.kvm.live_migration.nbd import Address
from worker.operations.context import JobContext, NodeContext
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
        yield {
            "name": f"disk{number}",
            "path": disk.path,
            "format": disk.format,
            "size_bytes": images.virtual_size(disk.path, disk.format),
            "backing": [*backing] if backing else None,
        }


def make_images(node: NodeContext, row: LiveMigration) -> list[str]:
    """On the target: an empty image for each disk. Returns the paths. Raises Unsupported; then none is made.

    Which are ours is written down before, so that whoever comes after a death can tell them from somebody else's.
    """
    disks = {disk["path"]: disk for disk in row.info["copied"]}
    remove_images(row.info.get("made", []))
    if taken := [path for path in disks if _has_content(Path(path))]:
        raise Unsupported(
            f"the target has {', '.join(taken)} already. A file with content is never overwritten: remove it there, if "
            "it is one that an earlier migration left"
        )
    if disks:
        rows.note(node, row.job_id, info=row.info | {"made": [*disks]})
    made: list[str] = []
    try:
        for path, disk in disks.items():
            backing = tuple(disk["backing"]) if disk["backing"] else None
            storage.create_image(path, disk["format"], disk["size_bytes"], backing)
            made.append(path)
    except QemuFailed as exc:
        remove_images(made)
        rows.note(node, row.job_id, info=row.info | {"made": []})
        raise Unsupported(f"the target cannot make the guest's disks: {exc}") from exc
    return made


def _has_content(path: Path) -> bool:
    try:
        return path.exists() and (not path.is_file() or path.stat().st_size > 0)
    except OSError:
        return False


def remove_images(paths: list[str]) -> None:
    """On the target: what was made for a migration that came to nothing."""
    for path in paths:
        with suppress(OSError):
            Path(path).unlink()


def export(row: LiveMigration, guest: Guest, host: str, ports: range, creds: str) -> int | None:
    """On the target: let the source write to the disks; the port, None where none are copied."""
    if not row.info["copied"]:
        return None
    disks = {disk["name"]: disk["name"] for disk in row.info["copied"]}
    return storage.export_disks(guest.talk(), disks, host, ports, tls_creds=creds).port


def copy(node: NodeContext, job: JobContext, row: LiveMigration, guest: Guest, teller: Teller) -> None:
    """On the source: return when both sides have the same. A worker that takes over goes on with what QEMU is at.

    Raises MigrationFailed, QemuFailed, Cancelled; the mirrors are then ended by ``end``.
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
    storage.follow(monitor, guest.job_changed, teller.tell_storage, job.check_cancelled)


def node_of(guest: Guest, name: str) -> str:
    """The block node that a disk has now; a snapshot puts another one on top."""
    drive = guest.talk().device_property(f"{name}-device", "drive")
    return str(drive or name)


def finish(row: LiveMigration, guest: Guest) -> None:
    """On the source, while the guest stands still: the target's disks are complete and on their own."""
    if row.info["copied"]:
        storage.finish_mirrors(guest.talk(), guest.job_changed)


def end(row: LiveMigration, guest: Guest) -> None:
    """On the source: nothing is copied any more; the guest goes on with its own disks."""
    if row.info["copied"]:
        storage.end_mirrors(guest.talk(), guest.job_changed)


def close(row: LiveMigration, guest: Guest) -> None:
    """On the target: the disks are the guest's alone."""
    if row.info["copied"]:
        with suppress(OperationError):
            storage.stop_exports(guest.talk())
