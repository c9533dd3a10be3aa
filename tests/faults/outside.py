"""The host as anybody sees it who is no part of hostler: QEMUs, what they have open, what they say at their monitor."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.nodes import Serial, TestNode
from worker.kvm.tiny_guest import COUNTER_ADDRESS

LISTEN = "0A"
"""A socket's state, as /proc/net/tcp has it."""
MONITOR_S = 2.0
"""A QEMU that says nothing for so long does not answer; it may be stopped on purpose."""


@dataclass(frozen=True)
class Qemu:
    pid: int
    name: str
    uuid: str
    uids: frozenset[int]
    disks: frozenset[str]
    taps: frozenset[str]
    folder: Path


def qemu_of(pid: int) -> Qemu | None:
    """A QEMU as its process shows it; None when it has just ended."""
    with suppress(psutil.NoSuchProcess, OSError, ValueError):
        process, folder = psutil.Process(pid), Path(f"/proc/{pid}/fd/1").readlink().parent
        argv = process.cmdline()
        name, uuid = (argv[argv.index(option) + 1] for option in ("-name", "-uuid"))
        disks, taps = frozenset(_disks(pid, folder)), frozenset(open_taps(pid))
        return Qemu(pid, name, uuid, frozenset(process.uids()), disks, taps, folder)
    return None


def _descriptors(pid: int) -> Iterator[tuple[Path, str]]:
    with suppress(OSError):
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                yield path, (path.parent.parent / "fdinfo" / path.name).read_text()


def _disks(pid: int, folder: Path) -> Iterator[str]:
    """The files and block devices that a process may write, by identity as in disk leases; not its own folder's."""
    for path, info in _descriptors(pid):
        with suppress(OSError):
            found, flags = path.stat(), int(info.partition("flags:")[2].split()[0], 8)
            if flags & os.O_ACCMODE and path.readlink().parent != folder:
                if stat.S_ISBLK(found.st_mode):
                    yield f"block:{found.st_rdev:x}"
                elif stat.S_ISREG(found.st_mode):
                    yield f"file:{found.st_dev:x}:{found.st_ino}"


def open_taps(pid: int) -> set[str]:
    """The interfaces behind a process's open taps; the kernel names them beside the descriptor."""
    return {found[1] for _, info in _descriptors(pid) if (found := re.search(r"(?m)^iff:\s*(\S+)", info))}


def taps_of(node: TestNode) -> set[str]:
    """The taps of the node's network namespace."""
    script = "cd /sys/class/net && ls -d */tun_flags 2>/dev/null"
    done = subprocess.run([*node.prefix, "sh", "-c", script], capture_output=True, text=True)
    return {line.partition("/")[0] for line in done.stdout.splitlines()}


def migration_ports(node: TestNode) -> list[int]:
    """The ports for guests that come in on which anybody listens, in the network namespace of the node's worker."""
    assert node.worker
    first, last = node.settings.migration_ports
    rows = [line.split() for line in Path(f"/proc/{node.worker.pid}/net/tcp").read_text().splitlines()[1:]]
    listening = {int(row[1].partition(":")[2], 16) for row in rows if row[3] == LISTEN}
    return sorted(port for port in listening if first <= port <= last)


def born(pid: int) -> float | None:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).create_time()
    return None


def counter(node: TestNode, name: str) -> int:
    """Where the tiny guest's counter is, read from its memory through the monitor for people; 0 where none answers."""
    row = node.row(name)
    said = ask(Path(row.runtime.run_dir), f"xp /1wx {COUNTER_ADDRESS:#x}") if row and row.runtime else None
    return int(found[1], 16) if said and (found := re.search(r": 0x([0-9a-f]{8})", said)) else 0


def ask(folder: Path, command: str) -> str | None:
    """What QEMU answers at its monitor for people; None when it keeps silent."""
    with suppress(OSError, AssertionError), Serial(folder / "monitor") as monitor:
        monitor.read_until(b"(qemu) ", MONITOR_S)
        monitor.send(command.encode() + b"\n")
        return monitor.read_until(re.compile(rb"\n((?s:.*))\(qemu\) "), MONITOR_S)[1].decode()
    return None
