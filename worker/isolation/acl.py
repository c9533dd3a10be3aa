"""A uid's own right to a file: an entry of the file's access control list (acl(5)), put in and taken out.

Owner and group of the file stay as they are, so that nothing has to be remembered and restored, and several guests can
share a disk. The kernel keeps the list as the attribute read and written here; entries are tag, rights and id.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import threading
from pathlib import Path

READ, WRITE = 4, 2

_ATTRIBUTE = "system.posix_acl_access"
_VERSION = struct.pack("<I", 2)
_ENTRY = struct.Struct("<HHI")
_OWNER, _USER, _GROUP, _NAMED_GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_NO_ID = 0xFFFFFFFF
_changing = threading.Lock()  # a list is read and written as a whole, and guests that share a disk start at once

_Entries = dict[tuple[int, int], int]


def grant(path: Path, uid: int, *, write: bool) -> None:
    """Let ``uid`` read the file, with ``write`` also change it. Safe to repeat. Raises OSError, without effect."""
    with _changing:
        entries = _read(path)
        entries[_USER, uid] = READ | (WRITE if write else 0)
        _write(path, entries | {(_MASK, _NO_ID): _needed_mask(entries)})


def revoke(path: Path, uid: int) -> bool:
    """Take away what ``grant`` gave; whether there was anything. Raises OSError."""
    with _changing:
        entries = _read(path)
        if entries.pop((_USER, uid), None) is None:
            return False
        if any(tag in (_USER, _NAMED_GROUP) for tag, _ in entries):
            entries[_MASK, _NO_ID] = _needed_mask(entries)
        else:
            del entries[_MASK, _NO_ID]  # a list without named entries becomes the file's mode again
        _write(path, entries)
        return True


def _needed_mask(entries: _Entries) -> int:
    mask = 0
    for (tag, _), rights in entries.items():
        mask |= rights if tag in (_USER, _GROUP, _NAMED_GROUP) else 0
    return mask


def _read(path: Path) -> _Entries:
    try:
        raw = os.getxattr(path, _ATTRIBUTE)
    except OSError as exc:
        if exc.errno != errno.ENODATA:
            raise
        mode = stat.S_IMODE(path.stat().st_mode)
        return {(tag, _NO_ID): mode >> shift & 7 for tag, shift in ((_OWNER, 6), (_GROUP, 3), (_OTHER, 0))}
    return {(tag, number): rights for tag, rights, number in _ENTRY.iter_unpack(raw[len(_VERSION) :])}


def _write(path: Path, entries: _Entries) -> None:
    packed = (_ENTRY.pack(tag, rights, number) for (tag, number), rights in sorted(entries.items()))
    os.setxattr(path, _ATTRIBUTE, _VERSION + b"".join(packed))
