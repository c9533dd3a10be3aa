"""What QEMU can do with the disks of a running guest: snapshots, merges, copies. One function per command.

Reference: the QMP reference manual of QEMU, block devices and background jobs. A job's end stays to be read until it is
dismissed, so that a worker that was away learns how it ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from worker.kvm.qmp import Monitor


@dataclass(frozen=True)
class BlockJob:
    """A background job: ``status`` in QEMU's word (``running``, ``ready``, ``concluded``, ...)."""

    id: str
    status: str
    done_bytes: int
    total_bytes: int
    error: str


def tops(monitor: Monitor) -> dict[str, str]:
    """The node that each device reads and writes, by the device's id."""
    found: dict[str, str] = {}
    for entry in monitor.execute("query-block"):
        if "inserted" in entry:
            # A device with a backend of its own is named by that: /machine/peripheral/ID/virtio-backend.
            found |= {part: entry["inserted"]["node-name"] for part in entry.get("qdev", "").split("/") if part}
    return found


def take_snapshot(monitor: Monitor, overlays: Mapping[str, str]) -> None:
    """Put an overlay on top of each node (by node, the overlay's node): all at one moment, or none."""
    actions = [
        {"type": "blockdev-snapshot", "data": {"node": node, "overlay": overlay}} for node, overlay in overlays.items()
    ]
    monitor.execute("transaction", {"actions": actions})


def start_backup(monitor: Monitor, targets: Mapping[str, tuple[str, str]]) -> None:
    """Copy nodes as they are at this one moment, each by a job: by the job's id, node and target's node.

    All jobs succeed, or none.
    """
    actions = [
        {
            "type": "blockdev-backup",
            "data": {"job-id": job, "device": node, "target": target, "sync": "full", "auto-dismiss": False},
        }
        for job, (node, target) in targets.items()
    ]
    # An only one cannot be grouped with itself, and need not be.
    mode = "grouped" if len(actions) > 1 else "individual"
    monitor.execute("transaction", {"actions": actions, "properties": {"completion-mode": mode}})


def start_commit(monitor: Monitor, job: str, device: str, top: str, base: str, base_path: str = "") -> None:
    """Begin to write what lies between ``top`` and ``base`` into ``base``, in the chain below the node ``device``.

    Where ``top`` is not that node, the file above it says then that it lies on ``base_path``.
    """
    names = {"job-id": job, "device": device, "top-node": top, "base-node": base}
    below = {"backing-file": base_path} if base_path else {}
    monitor.execute("block-commit", {**names, **below, "auto-dismiss": False})


def complete(monitor: Monitor, job: str) -> None:
    """Have a commit of the topmost file, once it is ready, end: from then on the file below is written."""
    monitor.execute("block-job-complete", {"device": job})


def unsynced_bytes(monitor: Monitor, node: str) -> int:
    """How much of a node that is being mirrored was written since and is not even begun to be copied."""
    bitmaps = monitor.block_nodes()[node].get("dirty-bitmaps", [])
    return sum(int(bitmap["count"]) for bitmap in bitmaps if not bitmap.get("name"))


def jobs(monitor: Monitor, prefix: str) -> list[BlockJob]:
    """The jobs whose ids begin so."""
    return [
        BlockJob(job["id"], job["status"], job["current-progress"], job["total-progress"], job.get("error", ""))
        for job in monitor.execute("query-jobs")
        if job["id"].startswith(prefix)
    ]


def cancel(monitor: Monitor, job: str) -> None:
    """Have a job end without effect. Raises QemuFailed where it is ending already."""
    monitor.execute("block-job-cancel", {"device": job, "force": True})


def dismiss(monitor: Monitor, job: str) -> None:
    """Forget a job that has ended."""
    monitor.execute("job-dismiss", {"id": job})


def node_of(nodes: Mapping[str, dict[str, Any]], path: str, format: str) -> str | None:
    """The node of an open image, of those that ``Monitor.block_nodes`` gives."""
    return next((name for name, node in nodes.items() if node["file"] == path and node["drv"] == format), None)
