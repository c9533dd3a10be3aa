"""Disks that source and target do not share: copied over NBD while the guest writes, finished while it stands still.

The order of calls, beside those of the migration itself:

    target   ``create_image`` for each disk, then QEMU is started with them; ``export_disks`` before anybody connects
    source   ``start_mirror`` for each disk; ``follow`` until all are ready; only then the migration
    source   at ``pre-switchover``, before ``switch_over``: ``finish_mirrors``
    target   ``stop_exports`` before the guest is continued
    source   ``end_mirrors`` wherever else it comes to an end, and ``stop_exports`` on the target

From ``ready`` on QEMU writes what the guest writes to both sides before the guest hears that it is written
(``copy-mode`` write-blocking, from the beginning): so the copying ends however much is written, and nothing is left for
the time when the guest stands still. The price is that writes are as slow as the network; one that is dead holds them
up until ``end_mirrors``. A mirror that fails costs the guest nothing: it goes on with its own disk.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from worker.errors import MigrationFailed, QemuFailed, TimedOut
from worker.kvm import block, images
from worker.kvm.block import BlockJob
from worker.kvm.live_migration import nbd
from worker.kvm.live_migration.nbd import Address
from worker.kvm.qmp import Monitor

PREFIX = "mirror-"
"""How the names of our jobs and block nodes begin; what follows is the disk's name."""
EVENTS = frozenset({"JOB_STATUS_CHANGE", "BLOCK_JOB_READY", "BLOCK_JOB_ERROR", "STOP"})
"""QEMU's events on which ``changed`` is to be set."""
ENDING = frozenset({"waiting", "pending", "aborting", "concluded"})
"""Statuses of a job that was told to end. One that could not copy the rest has an error."""
PERIOD_S = 0.25
END_S = 30.0
"""For what ends by itself. Who waits for it does so while the guest stands still, or while it is cleaned up."""
OPEN_TIMEOUT_S = 5
"""QEMU serves nobody while it connects, its guest neither; what it could be refused is found out before."""
_PORT_TAKEN = "address already in use"
_NO_SERVER = "nbd server not running"


def create_image(path: str, format: str, size_bytes: int, backing: tuple[str, str] | None = None) -> None:
    """Make a target's empty image; on top of ``backing`` (path, format) where only the rest is to be copied.

    An empty file that is there already is replaced. Raises QemuFailed; then nothing is changed, above all not a file
    or block device with content.
    """
    with contextlib.suppress(OSError):
        found = Path(path)
        if found.is_file() and not found.is_symlink() and found.stat().st_size == 0:
            found.unlink()
    if backing:
        images.create_overlay(path, *backing, size_bytes=size_bytes)
    else:
        images.create(path, format, size_bytes)


def export_disks(
    monitor: Monitor, disks: Mapping[str, str], host: str, ports: Iterable[int], tls_creds: str = ""
) -> Address:
    """Let a source write to these disks (the block node of each, by the name it gets), on the first free port.

    The QEMU waits for its guest meanwhile: from here on it has the images' locks. Raises MigrationFailed where no port
    is free, QemuFailed; then nothing is exported.
    """
    address = _serve(monitor, host, ports, tls_creds)
    try:
        for name, node in disks.items():
            export = {"type": "nbd", "id": f"{PREFIX}{name}", "node-name": node, "name": name, "writable": True}
            monitor.execute("block-export-add", export)
    except QemuFailed:
        stop_exports(monitor)
        raise
    return address


def stop_exports(monitor: Monitor) -> None:
    """Close the disks to the source, whoever is connected; nothing happens where none are open."""
    try:
        monitor.execute("nbd-server-stop")
    except QemuFailed as exc:
        if _NO_SERVER not in exc.message.lower():
            raise


def start_mirror(
    monitor: Monitor,
    disk: str,
    node: str,
    address: Address,
    *,
    sync: Literal["full", "top"] = "full",
    bandwidth_bytes_s: int = 0,
) -> None:
    """Begin to copy the block node ``node`` to the target's disk of the name ``disk``.

    ``sync`` top leaves out what is in the backing files, which both sides share. ``bandwidth_bytes_s`` is of this disk
    and not of what the guest writes meanwhile; 0 is unlimited. Raises MigrationFailed where the target does not answer
    or its disk has another size, QemuFailed; then nothing is begun.
    """
    name = f"{PREFIX}{disk}"
    _require_same_size(monitor, node, address, disk)
    if name in _nodes(monitor):
        monitor.remove_block_node(name)  # whoever connected died before the copying began
    monitor.add_block_node(_client(name, disk, address))
    try:
        job: dict[str, Any] = {"job-id": name, "device": node, "target": name, "sync": sync}
        if bandwidth_bytes_s:
            job["speed"] = bandwidth_bytes_s
        monitor.execute("blockdev-mirror", {**job, "copy-mode": "write-blocking", "auto-dismiss": False})
    except QemuFailed:
        monitor.remove_block_node(name)
        raise


def set_bandwidth(monitor: Monitor, bandwidth_bytes_s: int) -> None:
    """Change how fast each disk is copied; 0 is unlimited."""
    for each in block.jobs(monitor, PREFIX):
        with contextlib.suppress(QemuFailed):  # it has just ended
            monitor.execute("block-job-set-speed", {"device": each.id, "speed": bandwidth_bytes_s})


def follow(
    monitor: Monitor,
    changed: threading.Event,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Wait until all mirrors are ready: from then on both sides hold the same.

    ``changed`` is set by who receives QEMU's events (see ``EVENTS``) and cleared here. ``on_progress`` gets the bytes
    copied and to be copied of all disks, which both grow with what the guest writes. What it or ``check`` raises ends
    the waiting, and leaves the mirrors as they are. Raises QmpLost, MigrationFailed when a mirror has failed.
    """
    while True:
        check()
        changed.clear()
        found = require_sound(monitor)
        on_progress(*progress(found))
        if all(each.status == "ready" for each in found):
            return
        changed.wait(PERIOD_S)


def mirrors(monitor: Monitor) -> list[BlockJob]:
    """The mirrors there are, as they stand."""
    return block.jobs(monitor, PREFIX)


def progress(found: list[BlockJob]) -> tuple[int, int]:
    """How many bytes of all disks are copied, and how many there are to copy."""
    return sum(each.done_bytes for each in found), sum(each.total_bytes for each in found)


def require_sound(monitor: Monitor) -> list[BlockJob]:
    """The mirrors there are. Raises MigrationFailed when one has failed, for example because the target is gone."""
    found = mirrors(monitor)
    if failed := [each for each in found if each.error or each.status == "concluded"]:
        names = ", ".join(each.id.removeprefix(PREFIX) for each in failed)
        reason = failed[0].error or "it was ended by somebody else"
        raise MigrationFailed(f"the copying of {names} to the target failed: {reason}", retryable=True)
    return found


def finish_mirrors(monitor: Monitor, changed: threading.Event, *, again: bool = False) -> None:
    """Have the target's disks complete, durable and on their own; the source keeps its own as they are.

    Only while the guest stands still, and when all mirrors are ready, or where a worker died at it: ``again``. Raises
    MigrationFailed when a disk could not be completed, QemuFailed, TimedOut, QmpLost; it must not go on then.
    """
    found = [each for each in mirrors(monitor) if each.status not in ENDING] if again else require_sound(monitor)
    if late := [each.id.removeprefix(PREFIX) for each in found if each.status != "ready"]:
        raise MigrationFailed(f"{', '.join(late)} is not copied yet; nothing was ended", retryable=True)
    for each in found:
        # Of one that is ready this means: copy the rest, then stop.
        monitor.execute("block-job-cancel", {"device": each.id, "force": False})
    _until(monitor, changed, lambda left: all(each.error or each.status == "concluded" for each in left))
    if failed := [each for each in mirrors(monitor) if each.error]:
        raise MigrationFailed(f"{failed[0].id.removeprefix(PREFIX)} was not completed on the target: {failed[0].error}")
    _forget(monitor)


def end_mirrors(monitor: Monitor, changed: threading.Event) -> None:
    """Give up copying: no mirror and no connection is left, and the guest goes on with its own disks. Safe to repeat.

    The target's disks are worth nothing then. Raises QmpLost, TimedOut when QEMU does not let go of one.
    """
    # First of all cut the connections: a job cannot be ended while it waits for a target that is silent.
    if nodes := _nodes(monitor):
        with contextlib.suppress(QemuFailed):
            monitor.execute("yank", {"instances": [{"type": "block-node", "node-name": name} for name in nodes]})
    for each in mirrors(monitor):
        with contextlib.suppress(QemuFailed):  # it has just ended
            block.cancel(monitor, each.id)
    _until(monitor, changed, lambda left: all(each.status == "concluded" for each in left))
    _forget(monitor)


def _serve(monitor: Monitor, host: str, ports: Iterable[int], tls_creds: str) -> Address:
    tried = 0
    for port in ports:
        tried += 1
        server: dict[str, Any] = {"addr": {"type": "inet", "data": {"host": host, "port": str(port)}}}
        try:
            monitor.execute("nbd-server-start", server | ({"tls-creds": tls_creds} if tls_creds else {}))
        except QemuFailed as exc:
            if _PORT_TAKEN not in exc.message.lower():
                raise
        else:
            return Address(host, port)
    raise MigrationFailed(
        f"no port is free for the disks of a guest that comes in on {host}: {tried} refused;"
        " HOSTLER_MIGRATION_PORTS is the range",
        retryable=True,
    )


def _client(name: str, disk: str, address: Address) -> dict[str, Any]:
    node = {
        "driver": "nbd",
        "node-name": name,
        "server": {"type": "inet", "host": address.host, "port": str(address.port)},
        "export": disk,
        "open-timeout": OPEN_TIMEOUT_S,
        "discard": "unmap",  # what the guest gives back, and what is zero, takes no room on the target either
        "detect-zeroes": "unmap",
    }
    if address.tls:
        node["tls-creds"] = address.tls.creds
        node |= {"tls-hostname": address.tls.hostname} if address.tls.hostname else {}
    return node


def _require_same_size(monitor: Monitor, node: str, address: Address, disk: str) -> None:
    ours, theirs = int(monitor.block_nodes()[node]["image"]["virtual-size"]), nbd.size_of(address, disk)
    if ours != theirs:
        raise MigrationFailed(f"{disk} has {ours} bytes here and {theirs} on the target; nothing was copied")


def _until(monitor: Monitor, changed: threading.Event, is_over: Callable[[list[BlockJob]], bool]) -> None:
    deadline = time.monotonic() + END_S
    while True:
        changed.clear()
        if is_over(left := mirrors(monitor)):
            return
        if time.monotonic() > deadline:
            raise TimedOut(f"QEMU does not end its job {left[0].id}; its storage or the target may be stuck")
        changed.wait(PERIOD_S)


def _forget(monitor: Monitor) -> None:
    for each in mirrors(monitor):
        with contextlib.suppress(QemuFailed):
            block.dismiss(monitor, each.id)
    for name in _nodes(monitor):
        monitor.remove_block_node(name)  # which has the target make durable what it was sent


def _nodes(monitor: Monitor) -> list[str]:
    return [name for name in monitor.block_nodes() if name.startswith(PREFIX)]
