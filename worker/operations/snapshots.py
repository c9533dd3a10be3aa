"""Snapshots of an instance's disks: taken, listed, reverted to, given up; of a running guest too.

A snapshot keeps the files of its moment; new overlays on top of them take the writes from then on. The records say that
the disks are the overlays *before* QEMU has them: an overlay without content is the same disk, so that whatever ends
in between, the next start has every write. Likewise, a disk is recorded to be the file below only when that has all.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from hostler.contract import TaskName
from hostler.errors import InvalidArgument
from hostler.job_arguments import NameArguments
from hostler.payloads import Disk, Instance, SnapshotArguments
from models import Snapshot
from worker.errors import AlreadyRunning, OperationError, QemuFailed, QmpLost, TimedOut, Unsupported
from worker.kvm import block, images
from worker.kvm.command_line.disks import disk_image
from worker.kvm.opening import open_image
from worker.operations import isolating
from worker.operations import snapshot_rows as rows
from worker.operations.block_jobs import Meter, close_nodes, end_jobs, follow, quietly, running_guest
from worker.operations.context import JobContext, NodeContext
from worker.operations.guests import Guest, Guests
from worker.operations.recovery import recover
from worker.operations.recovery_table import Action
from worker.operations.snapshot_rows import CREATING, DELETING, PIVOTING, READY, File, Layer
from worker.operations.views import view_of

COMMIT = "commit-"
NODE = "snapshot-"
NAME_MAX = 255
"""Of a file, in bytes."""
SYNC_S = 10.0
"""How long a guest may be paused for the last writes of a merge; they take milliseconds, on storage that is well."""


def create(node: NodeContext, guests: Guests, job: JobContext, arguments: SnapshotArguments) -> dict[str, Any]:
    """Take a snapshot of all writable disks at one moment.

    Raises InvalidArgument, Unsupported, QemuFailed (nothing is left of it then), QmpLost (the next attempt finds out).
    """
    name = arguments.name
    view_of(node, name)
    recover(node, guests, job, TaskName.SNAPSHOT_CREATE, name)
    guest = running_guest(node, guests, arguments.name)
    _settle(node, guest, name)
    if job.attempt > 1 and (taken := _find(node, arguments)) and taken.job_id == job.id:
        return rows.snapshot_view(taken)
    instance = rows.saved(node, name)
    layers = _plan(node, instance, arguments.snapshot)
    job.phase("overlay", 10, f"making {len(layers)} new file(s) for what is written from now on")
    rows.insert(node, name, arguments.snapshot, job.id, layers)
    try:
        for layer in layers:
            images.create_overlay(layer.path, layer.base, layer.base_format)
        job.phase("snapshot", 60, "taking the snapshot")
        job.commit()
        _take(node, guest, instance, _need(node, arguments))
    except QmpLost:
        raise
    except Exception:
        quietly(lambda: _settle(node, guest, name))
        raise
    return rows.snapshot_view(_need(node, arguments))


def list_snapshots(node: NodeContext, arguments: NameArguments) -> list[dict[str, Any]]:
    """The instance's snapshots, the oldest first. Raises UnknownInstance."""
    view_of(node, arguments.name)
    return [rows.snapshot_view(row) for row in rows.snapshots_of(node, arguments.name)]


def revert(node: NodeContext, guests: Guests, job: JobContext, arguments: SnapshotArguments) -> dict[str, Any]:
    """Discard what a stopped instance wrote since its latest snapshot, which stays.

    Raises InvalidArgument, AlreadyRunning, QemuFailed; the disks are as they were then.
    """
    view = view_of(node, arguments.name)
    recovery = recover(node, guests, job, TaskName.SNAPSHOT_REVERT, arguments.name)
    if running_guest(node, guests, arguments.name):
        raise AlreadyRunning(f"{arguments.name} runs; stop it before its disks are reverted", state=view["state"])
    _settle(node, None, arguments.name)
    row = _need(node, arguments)
    new = {layer: f"{layer.path}.new" for layer in rows.layers_of(row)}
    if recovery.action is not Action.CONTINUE:
        _remove(new.values())
        _require_latest(node, row)
        job.phase("overlay", 10, "making new files on top of the snapshot")
        try:
            for layer, path in new.items():
                images.create_overlay(path, layer.base, layer.base_format)
            job.phase("exchange", 60, "discarding what was written since the snapshot")
            job.commit()
        except BaseException:
            _remove(new.values())
            raise
    for layer, path in new.items():
        if Path(path).exists():
            Path(path).replace(layer.path)
            images.make_durable(layer.path)
    return rows.snapshot_view(row)


def delete(node: NodeContext, guests: Guests, job: JobContext, arguments: SnapshotArguments) -> dict[str, Any]:
    """Give a snapshot up: what was written after it is merged into its files, of a running guest while it runs.

    Raises InvalidArgument, Unsupported, QemuFailed (the disks have every write; the snapshot is to be deleted again).
    """
    name = arguments.name
    view_of(node, name)
    recovery = recover(node, guests, job, TaskName.SNAPSHOT_DELETE, name)
    guest = running_guest(node, guests, arguments.name)
    _settle(node, guest, name)
    if recovery.action is Action.CONTINUE and _find(node, arguments) is None:
        return _deleted(node, arguments)
    row, instance = _need(node, arguments), rows.saved(node, name)
    _require_mergeable(node, instance, row, guest)
    job.phase("merge", 5, "merging what was written after the snapshot into its files")
    job.commit()
    if row.state == READY:
        rows.set_state(node, row, DELETING)
    for number, layer in enumerate(rows.layers_of(row)):
        rows.lease_for_merge(node, name, layer.base)
        share = 90 // len(row.layers)
        meter = Meter(job, 5 + share * number, 5 + share * (number + 1), f"merging {Path(layer.path).name}")
        _merge(node, guest, job, _Merge(row, number, layer, _above(node, row, layer)), meter)
    rows.forget(node, row)
    return _deleted(node, arguments)


# Taking


def _plan(node: NodeContext, instance: Instance, snapshot: str) -> list[Layer]:
    disks = [disk for disk in instance.disks if disk.mode == "rw"]
    if not disks:
        _refuse("name", f"{instance.name} has no disk that is written to")
    if any(row.name == snapshot for row in rows.snapshots_of(node, instance.name)):
        _refuse("snapshot", f"{instance.name} has a snapshot {snapshot!r} already")
    roots = {layer.path: layer.root for row in rows.snapshots_of(node, instance.name) for layer in rows.layers_of(row)}
    return [_layer(disk, roots.get(disk.path, disk.path), snapshot) for disk in disks]


def _layer(disk: Disk, root: str, snapshot: str) -> Layer:
    path = Path(f"{root}.{snapshot}.qcow2")
    if disk.shared:
        raise Unsupported(f"{disk.path} is shared with other instances, and they would not notice the snapshot")
    if Path(disk.path).is_block_device():
        raise Unsupported(f"{disk.path} is a block device; beside it is no folder for what is written from now on")
    if path.exists() or path.is_symlink():
        _refuse("snapshot", f"{str(path)!r} exists already; nothing is overwritten")
    if len(path.name.encode()) > NAME_MAX:
        _refuse("snapshot", f"{path.name!r} is longer than a file's name can be")
    return Layer(str(path), disk.path, disk.format, root)


def _take(node: NodeContext, guest: Guest | None, instance: Instance, row: Snapshot) -> None:
    layers = {layer.base: layer for layer in rows.layers_of(row)}
    files = {base: File(layer.path, "qcow2") for base, layer in layers.items()}
    rows.exchange(node, instance.name, files, {} if guest else {row.id: READY})
    if guest is None:
        return
    monitor = guest.talk()
    tops, overlays = block.tops(monitor), {}
    for number, disk in instance.numbered_disks():
        if layer := layers.get(disk.path):
            overlay = disk.model_copy(update={"path": layer.path, "format": "qcow2"})
            image = disk_image(instance, number, overlay, False) | {"node-name": f"{NODE}{row.id}-{number}"}
            open_image(monitor, image | {"backing": None}, confined=instance.hvparams.is_confined)
            overlays[tops[f"disk{number}-device"]] = image["node-name"]
    block.take_snapshot(monitor, overlays)
    rows.set_state(node, row, READY)


def _settle(node: NodeContext, guest: Guest | None, name: str) -> None:
    """Decide about a snapshot that was begun: it is kept where the guest may have written to it, else removed."""
    for row in rows.snapshots_of(node, name):
        if row.state != CREATING:
            continue
        layers = rows.layers_of(row)
        if _is_in_use(guest, layers):
            rows.set_state(node, row, READY)
            continue
        rows.exchange(node, name, {layer.path: File(layer.base, layer.base_format) for layer in layers})
        if guest:
            close_nodes(guest, f"{NODE}{row.id}-")
        _remove(layer.path for layer in layers)
        rows.forget(node, row)


def _is_in_use(guest: Guest | None, layers: list[Layer]) -> bool:
    if guest is None:
        return any(images.holds_data(layer.path) for layer in layers)
    monitor = guest.talk()
    nodes = monitor.block_nodes()
    used = {nodes[top]["file"] for top in block.tops(monitor).values() if top in nodes}
    return any(layer.path in used for layer in layers)


# Merging


class _Merge:
    """One disk of a snapshot that is being given up: its overlay goes into the file below it.

    ``above`` is the disk of the next snapshot, None where the overlay is what the guest writes to.
    """

    def __init__(self, row: Snapshot, number: int, layer: Layer, above: tuple[Snapshot, Layer] | None) -> None:
        self.row, self.layer, self.above = row, layer, above
        self.base = File(layer.base, layer.base_format)
        self.job_id = f"{COMMIT}{row.id}-{number}-"


def _above(node: NodeContext, row: Snapshot, layer: Layer) -> tuple[Snapshot, Layer] | None:
    later = (other for other in rows.snapshots_of(node, row.instance_name) if other.id > row.id)
    found = ((other, each) for other in later for each in rows.layers_of(other))
    return next(((other, each) for other, each in found if each.root == layer.root), None)


def _merge(node: NodeContext, guest: Guest | None, job: JobContext, merge: _Merge, meter: Meter) -> None:
    if guest:
        _merge_live(node, guest, job, merge, meter)
    elif _is_there(node, merge):
        images.end_strays([merge.layer.path])
        images.commit(merge.layer.path, lambda share: meter(int(share * _size(merge)), _size(merge)))
        images.make_durable(merge.base.path)
        if merge.above:
            images.rebase(merge.above[1].path, merge.base.path, merge.base.format)
    _record(node, merge)
    _remove([merge.layer.path])


def _is_there(node: NodeContext, merge: _Merge) -> bool:
    """Whether the overlay is still a part of its disk, as the records say, or the file above it."""
    if merge.above:
        return images.backing_files(merge.above[1].path)[:1] == [merge.layer.path]
    return any(disk.path == merge.layer.path for disk in rows.saved(node, merge.row.instance_name).disks)


def _size(merge: _Merge) -> int:
    return Path(merge.layer.path).stat().st_size


def _record(node: NodeContext, merge: _Merge) -> None:
    if merge.above is None:
        rows.exchange(node, merge.row.instance_name, {merge.layer.path: merge.base})
        return
    row, layer = merge.above
    rows.rest_on(node, row, Layer(layer.path, merge.base.path, merge.base.format, layer.root))
    rows.exchange(node, merge.row.instance_name, {})  # the leases follow the files


def _merge_live(node: NodeContext, guest: Guest, job: JobContext, merge: _Merge, meter: Meter) -> None:
    monitor = guest.talk()
    nodes = monitor.block_nodes()
    overlay = block.node_of(nodes, merge.layer.path, "qcow2")
    device = _device_node(node, guest, merge)
    if overlay and device:
        if not block.jobs(monitor, merge.job_id):
            base = block.node_of(nodes, merge.base.path, merge.base.format)
            if base is None:
                raise QemuFailed(f"QEMU of {guest.name} does not have {merge.base.path} open below {merge.layer.path}")
            block.start_commit(monitor, merge.job_id, device, overlay, base, merge.base.path if merge.above else "")
        try:
            follow(job, guest, merge.job_id, meter, lambda found: {"ready", "concluded"} >= {j.status for j in found})
            if merge.above is None:
                _pivot(node, guest, job, merge, meter, overlay)
        except OperationError as exc:
            if not isinstance(exc, QmpLost):
                quietly(lambda: end_jobs(guest, merge.job_id))
            raise
    end_jobs(guest, merge.job_id)
    _go_on(node, guest, merge.row)
    if overlay:
        close_nodes(guest, overlay)
    if merge.layer.path in {each["file"] for each in monitor.block_nodes().values()}:
        raise QemuFailed(f"QEMU of {guest.name} still has {merge.layer.path} open, so it is kept; delete it again")


def _device_node(node: NodeContext, guest: Guest, merge: _Merge) -> str | None:
    """The node of the guest's disk whose chain has the overlay; None where it is merged already."""
    monitor = guest.talk()
    nodes, tops = monitor.block_nodes(), block.tops(monitor)
    for number, _ in rows.saved(node, guest.name).numbered_disks():
        top = tops.get(f"disk{number}-device")
        if top and merge.layer.path in _chain(nodes, top):
            return top
    return None


def _chain(nodes: dict[str, dict[str, Any]], top: str) -> list[str]:
    """The files that a node consists of, from the top down."""
    below = {node["file"]: node.get("backing_file") for node in nodes.values() if node["drv"] == "qcow2"}
    found, path = [], nodes[top]["file"]
    while path and path not in found:
        found.append(path)
        path = below.get(path)
    return found


def _pivot(node: NodeContext, guest: Guest, job: JobContext, merge: _Merge, meter: Meter, overlay: str) -> None:
    """Have the guest write to the file below from now on.

    Its processors stand still meanwhile, for milliseconds: both files are the same then, and whichever of the records
    and QEMU changes first, and whatever is killed in between, no write is lost.
    """
    monitor = guest.talk()
    if monitor.status() == "running":
        rows.set_state(node, merge.row, PIVOTING)
        monitor.pause_vcpus()
    try:
        _wait_until_same(guest, merge.job_id, overlay)
        monitor.pause_vcpus()  # once more: it also writes out what QEMU still holds back of the file below
        images.make_durable(merge.base.path)
        _record(node, merge)
        block.complete(monitor, merge.job_id)
        follow(job, guest, merge.job_id, meter, lambda found: {j.status for j in found} <= {"concluded"})
    except QemuFailed:
        quietly(lambda: end_jobs(guest, merge.job_id))
        if _device_node(node, guest, merge):
            rows.exchange(node, guest.name, {merge.base.path: File(merge.layer.path, "qcow2")})
        _go_on(node, guest, merge.row)
        raise
    except TimedOut:
        _go_on(node, guest, merge.row)
        raise


def _wait_until_same(guest: Guest, job_id: str, overlay: str) -> None:
    monitor, deadline = guest.talk(), time.monotonic() + SYNC_S
    # In this order: what is taken out of the bitmap was added to the job's total before.
    while block.unsynced_bytes(monitor, overlay) or any(
        each.done_bytes < each.total_bytes for each in block.jobs(monitor, job_id)
    ):
        if time.monotonic() > deadline:
            raise TimedOut(f"the last writes of {guest.name} took longer than {SYNC_S:g} s to merge; it runs on")
        guest.job_changed.wait(0.005)


def _go_on(node: NodeContext, guest: Guest, row: Snapshot) -> None:
    """Let a guest run again that was paused for a pivot, by this worker or by the one before."""
    found = next((each for each in rows.snapshots_of(node, row.instance_name) if each.id == row.id), row)
    if found.state == PIVOTING:
        guest.talk().continue_vcpus()
        rows.set_state(node, row, DELETING)


# What is refused


def _require_mergeable(node: NodeContext, instance: Instance, row: Snapshot, guest: Guest | None) -> None:
    if guest is None:
        images.find()
    elif instance.hvparams.is_confined:
        _require_writable(node, guest, instance, row)
    present = {disk.path for disk in instance.disks}
    for layer in rows.layers_of(row):
        tops = {layer.path, layer.base} if (above := _above(node, row, layer)) is None else set()
        while above:
            tops, above = {above[1].path}, _above(node, *above)
        if not tops & present:
            _refuse("snapshot", f"{layer.path!r} belongs to no disk that {instance.name} has now")


def _require_writable(node: NodeContext, guest: Guest, instance: Instance, row: Snapshot) -> None:
    """Raises Unsupported where a confined QEMU had to open a file anew to write to it, and cannot."""
    nodes = guest.talk().block_nodes()
    written = [File(layer.base, layer.base_format) for layer in rows.layers_of(row)]
    above = [_above(node, row, layer) for layer in rows.layers_of(row)]
    written += [File(layer.path, "qcow2") for _, layer in filter(None, above)]  # which says on what it lies
    for file in written:
        found = block.node_of(nodes, file.path, file.format)
        if found and nodes[found]["ro"] and not isolating.let_write(node, instance, file.path):
            raise Unsupported(
                f"QEMU of {guest.name} is confined (security_model, use_chroot) and has had {file.path} open "
                "read-only since it was started, so that it cannot write to it. Stop the instance first"
            )


def _require_latest(node: NodeContext, row: Snapshot) -> None:
    later = [each.name for each in rows.snapshots_of(node, row.instance_name) if each.id > row.id]
    if later:
        _refuse("snapshot", f"{', '.join(later)} were taken later and would be lost; delete them first")
    if row.state != READY:
        _refuse("snapshot", f"{row.name!r} is half merged and no longer what it was; delete it")
    present = {disk.path for disk in rows.saved(node, row.instance_name).disks}
    for layer in rows.layers_of(row):
        if layer.path not in present:
            _refuse("snapshot", f"{layer.path!r} belongs to no disk that {row.instance_name} has now")


def _find(node: NodeContext, arguments: SnapshotArguments) -> Snapshot | None:
    return next((row for row in rows.snapshots_of(node, arguments.name) if row.name == arguments.snapshot), None)


def _need(node: NodeContext, arguments: SnapshotArguments) -> Snapshot:
    row = _find(node, arguments)
    if row is None:
        known = ", ".join(each.name for each in rows.snapshots_of(node, arguments.name)) or "none"
        _refuse("snapshot", f"{arguments.name} has no snapshot {arguments.snapshot!r}; there are: {known}")
    return row


def _deleted(node: NodeContext, arguments: SnapshotArguments) -> dict[str, Any]:
    disks = [{"path": disk.path, "format": disk.format} for disk in rows.saved(node, arguments.name).disks]
    return {"name": arguments.name, "snapshot": arguments.snapshot, "state": "deleted", "disks": disks}


def _refuse(field: str, reason: str) -> NoReturn:
    raise InvalidArgument([{"field": field, "reason": reason}])


def _remove(paths: Iterable[str]) -> None:
    for path in paths:
        Path(path).unlink(missing_ok=True)
