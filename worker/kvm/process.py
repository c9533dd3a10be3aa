"""QEMU processes: started, recognised, waited for, ended. Never by a bare pid.

A pid is used again; pid, start time and boot id together are not (fields of proc(5)). The uuid in QEMU's own arguments
finds a process whose pid was never written down.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from worker.errors import TimedOut

_PROC = Path("/proc")
_STATE, _START_TICKS = 0, 19  # positions after the command's closing parenthesis in /proc/PID/stat: fields 3 and 22


@cache
def boot_id() -> str:
    """The id the kernel gave itself at this boot; pids mean nothing beyond it."""
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


@dataclass(frozen=True)
class ProcessIdentity:
    """One process of this boot, and no later one that happens to get its pid."""

    pid: int
    start_ticks: int
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity | None:
        """The identity of the process that has ``pid`` now; None where there is none (a zombie is none)."""
        ticks = _start_ticks(pid)
        return cls(pid, ticks, boot_id()) if ticks is not None else None

    def is_alive(self) -> bool:
        """Whether this very process still runs. A zombie does not."""
        return self.boot_id == boot_id() and _start_ticks(self.pid) == self.start_ticks

    def open(self) -> int | None:
        """A pidfd for this process (the caller closes it), None when it is gone.

        The identity is checked after the fd exists, so that the fd cannot mean a stranger.
        """
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        if self.is_alive():
            return pidfd
        os.close(pidfd)
        return None


def _start_ticks(pid: int) -> int | None:
    try:
        stat = (_PROC / str(pid) / "stat").read_bytes()  # the command may be any bytes
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(b")")[2].split()
    return int(fields[_START_TICKS]) if fields[_STATE] not in b"ZX" else None


def arguments_of(pid: int) -> list[str]:
    """The argv of ``pid``; empty when it is gone or may not be read."""
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().decode(errors="surrogateescape").split("\0")[:-1]
    except OSError:
        return []


def find_by_uuid(uuid: str) -> ProcessIdentity | None:
    """The process that was started with ``-uuid UUID``: how a QEMU is found whose pid was never recorded."""
    return next((identity for found, identity in qemu_processes() if found == uuid), None)


def qemu_processes() -> Iterator[tuple[str, ProcessIdentity]]:
    """Every process of this host that has ``-uuid VALUE`` among its arguments, with that value."""
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            arguments = arguments_of(int(entry.name))
            if "-uuid" in arguments[:-1] and (identity := ProcessIdentity.of(int(entry.name))):
                yield arguments[arguments.index("-uuid") + 1], identity


class QemuProcess:
    """A QEMU, our own child or one adopted from a dead worker. Holds a pidfd."""

    def __init__(self, identity: ProcessIdentity, pidfd: int, child: subprocess.Popen[bytes] | None = None) -> None:
        self.identity = identity
        self.pidfd = pidfd
        self._child = child
        # Closed with the last reference: a thread may still wait on it while another handles the process's end.
        self._closer = weakref.finalize(self, os.close, pidfd)

    @classmethod
    def spawn(
        cls, argv: Sequence[str], *, pass_fds: Sequence[int], stdin: int, stdout: int, stderr: int
    ) -> QemuProcess:
        """Start ``argv`` in a session of its own, so that no signal meant for the worker reaches the guest.

        Raises OSError when it cannot be executed; then there is no process.
        """
        child = subprocess.Popen(
            list(argv),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=tuple(pass_fds),
            start_new_session=True,
            cwd="/",
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
        )
        pidfd = os.pidfd_open(child.pid)  # our own unreaped child: the pid cannot have been used again
        identity = ProcessIdentity.of(child.pid) or ProcessIdentity(child.pid, -1, boot_id())
        return cls(identity, pidfd, child)

    @classmethod
    def adopt(cls, identity: ProcessIdentity) -> QemuProcess | None:
        """The running process of this identity, None when it has ended."""
        pidfd = identity.open()
        return cls(identity, pidfd) if pidfd is not None else None

    @property
    def pid(self) -> int:
        """The process's pid, for people to read; never used to signal."""
        return self.identity.pid

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended within ``timeout_s``."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(max(0, round(timeout_s * 1000))))

    def exit_status(self) -> int | None:
        """Exit code, or the negated signal; None while it runs, or where another worker was the parent."""
        return self._child.poll() if self._child else None

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to this very process; nothing happens when it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def kill(self, grace_s: float = 5.0, deadline_s: float = 30.0) -> None:
        """End it: SIGTERM, which lets QEMU flush its disks, after ``grace_s`` SIGKILL. Returns when it has ended.

        Raises TimedOut when even SIGKILL does not end it (a process stuck in the kernel, on dead storage for example);
        it still holds its disks then.
        """
        for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, deadline_s)):
            self.send_signal(number)
            if self.wait(wait_s):
                self.exit_status()
                return
        raise TimedOut(
            f"QEMU (pid {self.pid}) did not end {deadline_s:.0f} s after SIGKILL; it hangs in the kernel, "
            "most likely on storage that does not answer, and still holds its disks"
        )

    def close(self) -> None:
        """Give the pidfd back. The process is not touched."""
        self._closer()
