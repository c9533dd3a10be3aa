"""Who has a uid: processes and open sockets of this host, files below a folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_SOCKET_TABLES = tuple(f"{kind}{version}" for kind in ("tcp", "udp", "raw") for version in ("", "6"))
_SOCKET_UID = 7
"""The column of /proc/net's tables, see proc_pid_net(5)."""


def uids_in_use() -> set[int]:
    """Every uid (real, effective, saved, file system) of a process, and every owner of a socket on the network.

    The worker has to see all processes: a /proc mounted with hidepid shows a user's own alone, but root sees all.
    """
    return {*_of_processes(), *_of_sockets()}


def uids_of(pid: int) -> set[int]:
    """The uids of a process; none of a zombie, which has nothing any more and may never be reaped. Raises OSError."""
    status = (_PROC / str(pid) / "status").read_bytes()
    fields = dict(line.split(b":", 1) for line in status.splitlines() if b":" in line)
    if fields[b"State"].split()[0] in b"ZX" and int(fields[b"Threads"]) <= 1:  # its threads may live on
        return set()
    return {int(word) for word in fields[b"Uid"].split()}


def owned_by(uid: int, folder: Path) -> Iterator[Path]:
    """What ``uid`` owns in and below ``folder``; links are not followed."""
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            with contextlib.suppress(FileNotFoundError):
                if path.lstat().st_uid == uid:
                    yield path


def _of_processes() -> Iterator[int]:
    # The owner of /proc/PID is no answer: it is root for a process that has changed its uid.
    for entry in os.scandir(_PROC):
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                yield from uids_of(int(entry.name))


def _of_sockets() -> Iterator[int]:
    for table in _SOCKET_TABLES:
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            for line in (_PROC / "net" / table).read_text().splitlines()[1:]:
                yield int(line.split()[_SOCKET_UID])
