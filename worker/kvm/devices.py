"""Which of QEMU's drivers opens what lies at a path: a file, a device of the host, or a CD drive of the host."""

from __future__ import annotations

import os
import stat
from pathlib import Path

SCSI_CDROM_MAJOR = 11
"""The kernel's number for CD drives (admin-guide/devices.txt); they are opened without a medium too."""

LABELS_BYTES = 2**20
"""Partition tables, file systems, volumes and images have theirs here; the last one is that of btrfs, at 64 KiB."""


def driver_of(path: str) -> str:
    """``file``, ``host_device`` or ``host_cdrom``; ``file`` also where there is nothing, which QEMU then says."""
    try:
        found = Path(path).stat()
    except OSError:
        return "file"
    if not stat.S_ISBLK(found.st_mode):
        return "file"
    return "host_cdrom" if os.major(found.st_rdev) == SCSI_CDROM_MAJOR else "host_device"


def is_device(path: str) -> bool:
    """Whether a block device is at ``path``."""
    return driver_of(path) != "file"


def size_bytes(path: str) -> int:
    """How large a block device is. Raises OSError."""
    return _size_bytes(path, os.O_RDONLY)


def free_size_bytes(path: str) -> int:
    """How large a block device is that may be overwritten. Raises OSError, also while it is mounted or part of another.

    A QEMU that has it open does not show.
    """
    # open(2): with O_EXCL and without O_CREAT, a block device that the system itself uses is refused.
    return _size_bytes(path, os.O_RDWR | os.O_EXCL)


def identity(path: str) -> str:
    """What a block device says of itself that no other one of any host says; empty where it says nothing.

    Of sysfs: the uuid of device mapper (LVM, multipath), else the World Wide Name, else the serial number.
    """
    number = Path(path).stat().st_rdev
    folder = Path("/sys/dev/block") / f"{os.major(number)}:{os.minor(number)}"
    for name in ("dm/uuid", "wwid", "device/wwid", "serial", "device/serial"):
        try:
            if said := (folder / name).read_text(errors="replace").strip():
                return said
        except OSError:
            continue
    return ""


def is_blank(path: str) -> bool:
    """Whether nothing is at the beginning of a block device, where whatever it holds has a label. Raises OSError."""
    with Path(path).open("rb") as device:
        return not any(device.read(LABELS_BYTES))


def _size_bytes(path: str, flags: int) -> int:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)
