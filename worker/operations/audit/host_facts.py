"""What this host has of our guests: one look at /proc, one at the guests' folders. What may not be read is left out."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from worker.isolation.cgroups import Groups
from worker.isolation.in_use import uids_of
from worker.kvm.process import ProcessIdentity, arguments_of, qemu_processes
from worker.network.tap import TUN_DEVICE

_PROC = Path("/proc")
_DELETED = " (deleted)"


@dataclass(frozen=True)
class QemuSeen:
    """A process with ``-uuid`` among its arguments. ``journal`` is its standard output, ``taps`` None if unreadable."""

    identity: ProcessIdentity
    uuid: str
    name: str
    executable: str
    journal: str
    taps: frozenset[str] | None


@dataclass(frozen=True)
class HostFacts:
    """``folders`` has the entries of each guest's folder; ``own_taps`` are those that this worker has open;
    ``empty_groups`` the control groups without a process, by the uuids of their guests."""

    processes: list[QemuSeen]
    folders: dict[str, frozenset[str]]
    own_taps: frozenset[str]
    interfaces: dict[str, int]
    pids_by_uid: dict[int, list[int]]
    empty_groups: frozenset[str]


def gather(guests_dir: Path, uids: Iterable[range], groups: Groups) -> HostFacts:
    """Look at the host; ``uids`` are those whose processes are of interest, ``groups`` the control groups."""
    return HostFacts(
        processes=[_seen(uuid, identity) for uuid, identity in qemu_processes()],
        folders=_folders(guests_dir),
        own_taps=_taps_of(os.getpid()) or frozenset(),
        interfaces={name: index for index, name in socket.if_nameindex()},
        pids_by_uid=_pids_by_uid([*uids]),
        empty_groups=frozenset(groups.uuids()),
    )


def _seen(uuid: str, identity: ProcessIdentity) -> QemuSeen:
    arguments = arguments_of(identity.pid)
    name = arguments[arguments.index("-name") + 1] if "-name" in arguments[:-1] else ""
    journal = ""
    with contextlib.suppress(OSError):
        journal = str((_PROC / str(identity.pid) / "fd" / "1").readlink()).removesuffix(_DELETED)
    executable = arguments[0] if arguments else ""
    return QemuSeen(identity, uuid, name, executable, journal, _taps_of(identity.pid))


def _taps_of(pid: int) -> frozenset[str] | None:
    """The names of the taps a process has open; an empty one for a tap that was deleted under it."""
    found = set()
    try:
        for link in (_PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed in this very moment
                if str(link.readlink()) == TUN_DEVICE:
                    found |= _interface_of(_PROC / str(pid) / "fdinfo" / link.name)
    except OSError:
        return None
    return frozenset(found)


def _interface_of(fdinfo: Path) -> set[str]:
    lines = fdinfo.read_text().splitlines()
    return {line.removeprefix("iff:").strip() for line in lines if line.startswith("iff:")}


def _folders(guests_dir: Path) -> dict[str, frozenset[str]]:
    try:
        paths = [path for path in guests_dir.iterdir() if path.is_dir() and not path.is_symlink()]
    except OSError:
        return {}
    found = {}
    for path in paths:
        with contextlib.suppress(OSError, ValueError):  # gone in this moment; or no uuid, and so nothing of ours
            if str(UUID(path.name)) == path.name:
                found[path.name] = frozenset(entry.name for entry in path.iterdir())
    return found


def _pids_by_uid(ranges: list[range]) -> dict[int, list[int]]:
    """Processes by their uids; nothing is read where no uid is of interest."""
    found: dict[int, list[int]] = {}
    pids = [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()] if ranges else []
    for pid in sorted(pids):
        with contextlib.suppress(OSError):
            for uid in uids_of(pid):
                if any(uid in wanted for wanted in ranges):
                    found.setdefault(uid, []).append(pid)
    return found
