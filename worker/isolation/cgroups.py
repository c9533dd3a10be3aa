"""Control groups: each guest's QEMU in one of its own, with the memory and the processor time that it may have.

Version 2 only (Documentation/admin-guide/cgroup-v2.rst of Linux). Where systemd runs the host the groups are its own to
make, and a guest gets a scope; elsewhere it gets a folder below the mounted hierarchy. QEMU is in its group before it
is executed: memory that a process has touched stays with the group in which it did.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from uuid import uuid4

CONTROLLERS = ("cpu", "memory")
SLICE = "hostler"
GONE_S = 1.0
"""How long a process may stay in its group after its pidfd has told of its end."""
PROBE_S = 10.0
PERIOD_US = 100_000
"""The kernel's own for cpu.max, and systemd's for CPUQuota."""

_ENTER = 'echo $$ >"$0" && exec "$@"'
"""The shell has the pid that QEMU will have, and writes it to its first argument: the group's cgroup.procs."""


_LOOK = 'group=$(sed -n "s/^0:://p" /proc/self/cgroup); echo "$group"; cat "/sys/fs/cgroup$group/cgroup.controllers"'
"""The group that the shell is in, and its controllers."""


@dataclass(frozen=True)
class Limits:
    """What one QEMU may have at most; None is as much as there is."""

    memory_max_bytes: int | None = None
    cpu_max_percent: int | None = None
    cpu_weight: int | None = None


class Groups(Protocol):
    """How this host puts guests into groups."""

    @property
    def about(self) -> str:
        """For people: which kind, or why there is none."""

    @property
    def limits(self) -> bool:
        """Whether a limit can be set here."""

    def enter(self, uuid: str, limits: Limits) -> list[str]:
        """Make the group of a guest; what to put before QEMU's command line, for it to run in there. Raises OSError."""

    def remove(self, uuid: str) -> bool:
        """Remove the group of a guest whose QEMU has ended; False where there is none. Raises OSError."""

    def uuids(self) -> Iterator[str]:
        """The groups that have no process, by the uuid of their guests."""


@dataclass(frozen=True)
class NoGroups:
    """QEMU stays in the group of its worker, without limits."""

    about: str
    limits: bool = False

    def enter(self, uuid: str, limits: Limits) -> list[str]:
        """Nothing is made."""
        return []

    def remove(self, uuid: str) -> bool:
        """There is none."""
        return False

    def uuids(self) -> Iterator[str]:
        """None."""
        yield from ()


@dataclass(frozen=True)
class Scopes:
    """systemd's, below ``hostler.slice``. A scope ends with its last process; systemd removes it."""

    program: str
    limits: bool = True

    @property
    def about(self) -> str:
        """Where they are."""
        can = "" if self.limits else ", without limits: it has not got the controllers cpu and memory"
        return f"a systemd scope for each guest, below {SLICE}.slice{can}"

    def enter(self, uuid: str, limits: Limits) -> list[str]:
        """systemd-run makes the scope around itself, and then executes QEMU in its place, with its pid and files."""
        properties = {"MemoryMax": limits.memory_max_bytes, "CPUWeight": limits.cpu_weight}
        given = [f"--property={name}={value}" for name, value in properties.items() if value is not None]
        if limits.cpu_max_percent is not None:
            given.append(f"--property=CPUQuota={limits.cpu_max_percent}%")
        scope = ["--scope", "--quiet", "--collect", f"--slice={SLICE}", f"--unit=hostler-{uuid}"]
        return [self.program, *scope, *given, "--"]

    def remove(self, uuid: str) -> bool:
        """Nothing is to be done."""
        return False

    def uuids(self) -> Iterator[str]:
        """None: systemd leaves no empty ones."""
        yield from ()


@dataclass(frozen=True)
class Folders:
    """Our own, below ``root``: one for each guest, named by its uuid."""

    root: Path
    limits: bool = True

    @property
    def about(self) -> str:
        """Where they are."""
        return f"a group for each guest in {self.root}"

    def enter(self, uuid: str, limits: Limits) -> list[str]:
        """Make the folder. Of a failure nothing is left."""
        folder = self.root / uuid
        if not self.root.is_dir():
            _prepare(self.root.parent)  # somebody has tidied up
        folder.mkdir()
        try:
            for name, value in _values(limits).items():
                _write(folder / name, value)
        except OSError:
            folder.rmdir()
            raise
        return ["/bin/sh", "-c", _ENTER, str(folder / "cgroup.procs")]

    def remove(self, uuid: str) -> bool:
        """Raises OSError (EBUSY) while a process is in it; none is ever killed by this."""
        deadline = time.monotonic() + GONE_S
        while True:
            try:
                (self.root / uuid).rmdir()
            except FileNotFoundError:
                return False
            except OSError as exc:
                if exc.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
                time.sleep(GONE_S / 50)
            else:
                return True

    def uuids(self) -> Iterator[str]:
        """A folder with no process; it may have been made a moment ago, for one that comes."""
        for procs in self.root.glob("*/cgroup.procs"):
            with suppress(OSError):  # gone meanwhile
                if not procs.read_text():
                    yield procs.parent.name


def of_host(wanted: str) -> Groups:
    """What HOSTLER_CGROUPS, ``auto`` or ``off``, comes to on this host."""
    off = NoGroups("no control groups for guests: HOSTLER_CGROUPS is off")
    return off if wanted == "off" else detect(Path("/"))


def detect(root: Path) -> Groups:
    """How this host has it. Our folder is made, and the controllers switched on for it: nothing less tells."""
    if os.geteuid() != 0:
        return NoGroups("no control groups for guests: the worker does not run as root")
    if (root / "run/systemd/system").is_dir():  # sd_booted(3)
        program = shutil.which("systemd-run")
        return _tried(program) if program else NoGroups("no control groups for guests: there is no systemd-run")
    mount = _mount(root)
    if mount is None:
        return NoGroups("no control groups for guests: no hierarchy of version 2 has both cpu and memory")
    try:
        return Folders(_prepare(mount))
    except OSError as exc:
        return NoGroups(f"no control groups for guests: {exc.filename}: {exc.strerror}")


def _tried(program: str) -> Groups:
    """Scopes where one can be made: not in a container that only sees the host's systemd, or may change no groups."""
    scopes = Scopes(program)
    through = scopes.enter(f"probe-{uuid4()}", Limits(memory_max_bytes=2**30, cpu_weight=100))
    try:
        argv = [*through, "/bin/sh", "-c", _LOOK]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=PROBE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as exc:
        return NoGroups(f"no control groups for guests: {exc}")
    group, _, controllers = done.stdout.partition("\n")
    if f"/{SLICE}.slice/" not in group:
        return NoGroups(f"no control groups for guests: systemd-run made no scope: {done.stderr.strip() or group}")
    return Scopes(program, limits={*CONTROLLERS} <= {*controllers.split()})


def _values(limits: Limits) -> dict[str, str]:
    values: dict[str, str] = {}
    if limits.memory_max_bytes is not None:
        values["memory.max"] = str(limits.memory_max_bytes)
    if limits.cpu_max_percent is not None:
        values["cpu.max"] = f"{limits.cpu_max_percent * PERIOD_US // 100} {PERIOD_US}"
    if limits.cpu_weight is not None:
        values["cpu.weight"] = str(limits.cpu_weight)
    return values


def _mount(root: Path) -> Path | None:
    """Where version 2 is mounted with our controllers, from proc(5)'s mountinfo; spaces in paths are octal there."""
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.split()[0] == "cgroup2":
            mount = root / before.split()[4].replace("\\040", " ").lstrip("/")
            with suppress(OSError):
                if {*CONTROLLERS} <= {*(mount / "cgroup.controllers").read_text().split()}:
                    return mount
    return None


def _prepare(mount: Path) -> Path:
    """Our folder, whose own folders have the controllers. Raises OSError, as in a container without rights to it."""
    ours = mount / SLICE
    for folder in (mount, ours):
        folder.mkdir(exist_ok=True)
        _write(folder / "cgroup.subtree_control", " ".join(f"+{name}" for name in CONTROLLERS))
    return ours


def _write(path: Path, text: str) -> None:
    """The kernel refuses what is written, not that the file is opened; the error is to name the file all the same."""
    try:
        path.write_text(text)
    except OSError as exc:
        exc.filename = exc.filename or str(path)
        raise
