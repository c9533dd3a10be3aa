"""Drives whose medium can be changed while the guest runs. One function per command of QEMU's.

Reference: the QMP reference manual of QEMU, block devices. A drive is named by its device's id.
"""

from __future__ import annotations

from dataclasses import dataclass

from worker.kvm.qmp import Monitor


@dataclass(frozen=True)
class Drive:
    """What is in a drive: the node of its medium, None when it is empty."""

    node: str | None
    is_open: bool


def look(monitor: Monitor, device: str) -> Drive:
    """How a drive is now. Raises LookupError where there is none."""
    for entry in monitor.execute("query-block"):
        if device in entry.get("qdev", "").split("/"):
            return Drive(entry.get("inserted", {}).get("node-name"), entry.get("tray_open", False))
    raise LookupError(f"no drive {device}")


def open_tray(monitor: Monitor, device: str, *, force: bool) -> None:
    """Open the tray. A guest that has locked it is asked to, with ``force`` it is not; then it opens when it wants."""
    monitor.execute("blockdev-open-tray", {"id": device, "force": force})


def close_tray(monitor: Monitor, device: str) -> None:
    """Close the tray: the guest sees what is in the drive."""
    monitor.execute("blockdev-close-tray", {"id": device})


def remove_medium(monitor: Monitor, device: str) -> None:
    """Take the medium out of the open tray. Raises QemuFailed when it is closed."""
    monitor.execute("blockdev-remove-medium", {"id": device})


def insert_medium(monitor: Monitor, device: str, node: str) -> None:
    """Put an open image into the open, empty tray. Raises QemuFailed when it is neither."""
    monitor.execute("blockdev-insert-medium", {"id": device, "node-name": node})
