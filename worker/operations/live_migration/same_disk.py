"""Whether two nodes mean the same disk by one path."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import Any

HEAD_BYTES = 4096
"""The first sectors: a partition table or a file system's label, which a running guest does not write."""


def fingerprint(path: str) -> dict[str, Any]:
    """What a disk looks like from this node: its kind, its size, and what tells it from others. Raises OSError.

    A file on shared storage has the same inode on every node; a block device has no such number, its first sectors
    stand for it.
    """
    found = Path(path).stat()
    if not stat.S_ISBLK(found.st_mode):
        return {"kind": "file", "size_bytes": found.st_size, "inode": found.st_ino}
    with Path(path).open("rb") as device:
        head = hashlib.sha256(device.read(HEAD_BYTES)).hexdigest()
        return {"kind": "block device", "size_bytes": device.seek(0, os.SEEK_END), "head": head}


def difference(there: dict[str, Any], path: str) -> str | None:
    """Why this node's ``path`` is not the disk that ``fingerprint`` saw on another one; None where nothing says so."""
    try:
        here = fingerprint(path)
    except OSError as exc:
        return f"{path!r}: {exc.strerror}"
    if here["kind"] != there["kind"]:
        return f"{path!r} is a {here['kind']}, on the source a {there['kind']}"
    # A file of a format that grows may be written to between the two looks; its inode tells.
    names = ("inode",) if here["kind"] == "file" else ("size_bytes", "head")
    if any(here[name] != there[name] for name in names):
        return f"{path!r} is another {here['kind']} than on the source; copy it with copy_storage, or share it"
    return None
