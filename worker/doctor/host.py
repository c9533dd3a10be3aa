"""Checks of the machine and the installation, which need no settings, and of the folders, which do."""

from __future__ import annotations

import os
import platform
import pwd
import shutil
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from hostler.settings import Settings
from worker.doctor.check import Check, Status, install
from worker.isolation import cgroups

PYTHON_MIN = (3, 11)
PINNED = {"celery": "5.6.3", "kombu": "5.6.2", "redis": "6.4.0"}
"""As in pyproject.toml, which says why; a test compares the two."""
SPACE_WARN_BYTES = 1024**3
SPACE_FAIL_BYTES = 64 * 1024**2
"""Room for one rewrite of the broker's append-only file."""

_CAPABILITIES = {0: "CAP_CHOWN", 5: "CAP_KILL", 6: "CAP_SETGID", 7: "CAP_SETUID", 12: "CAP_NET_ADMIN",
                 18: "CAP_SYS_CHROOT"}  # fmt: skip
"""What a node uses of root's rights, by bit number (linux/capability.h)."""
_NET_ADMIN = "CAP_NET_ADMIN"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_TUN = Path("/dev/net/tun")


def python() -> Check:
    """The interpreter."""
    ok = sys.version_info >= PYTHON_MIN
    wanted = ".".join(map(str, PYTHON_MIN))
    fix = "" if ok else f"make the environment anew with Python {wanted} or newer, and pip install hostler in it"
    return Check("python", "ok" if ok else "fail", f"{platform.python_version()} ({sys.executable})", fix)


def packages() -> Check:
    """The three that must fit together to survive a restart of the broker."""
    found = {name: _version(name) for name in PINNED}
    wrong = [f"{name} {found[name] or 'is missing'}, not {wanted}" for name, wanted in PINNED.items()
             if found[name] != wanted]  # fmt: skip
    if not wrong:
        return Check("packages", "ok", ", ".join(f"{name} {number}" for name, number in found.items()))
    wanted = " ".join(f"{name}=={number}" for name, number in PINNED.items())
    return Check("packages", "fail", "; ".join(wrong), f"{sys.executable} -m pip install {wanted}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def control_groups(settings: Settings) -> Check:
    """Whether guests can be given limits of memory and processor time."""
    return Check("cgroups", "ok", cgroups.of_host(settings.cgroups).about)


def hardware() -> Check:
    """Facts: processors and memory."""
    memory = psutil.virtual_memory()
    return Check(
        "hardware", "ok",
        f"{os.cpu_count()} CPUs ({platform.machine()}), {memory.total >> 20} MiB memory, "
        f"{memory.available >> 20} MiB of it available; Linux {platform.release()}",
    )  # fmt: skip


def rights() -> Check:
    """Root, or what an ordinary user may do here."""
    missing = sorted(set(_CAPABILITIES.values()) - capabilities())
    user = user_name()
    if not missing:
        return Check("rights", "ok", f"{user}, with every capability a node uses")
    lack = f"{user}, without {', '.join(missing)}: guests cannot get taps, or a user and root folder of their own"
    if os.geteuid():
        return Check("rights", "warn", lack, "run the worker as root (guests never run as root)")
    return Check("rights", "warn", lack, "give the container or service these capabilities "
                 f"(docker run {' '.join(f'--cap-add {name[4:]}' for name in missing)} ...)")  # fmt: skip


def user_name() -> str:
    """Whose rights this process has."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # containers run as numbers
        return f"uid {os.geteuid()}"


def capabilities() -> set[str]:
    """Which of the capabilities a node uses this process has in effect (CapEff in proc(5))."""
    status = Path("/proc/self/status").read_text()
    bits = int(next(line for line in status.splitlines() if line.startswith("CapEff:")).split()[1], 16)
    return {name for bit, name in _CAPABILITIES.items() if bits >> bit & 1}


def tun() -> Check:
    """Taps, for bridged and routed cards."""
    needed = "bridged and routed network cards need it, user-mode ones do not"
    try:
        os.close(os.open(_TUN, os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        fix = "modprobe tun" if not _TUN.exists() or not os.geteuid() else "run the worker as root"
        return Check("tun", "warn", f"{_TUN} cannot be opened: {exc.strerror}; {needed}", fix)
    if _NET_ADMIN not in capabilities():
        return Check("tun", "warn", f"{_NET_ADMIN} is missing; {needed}", "run the worker as root, or in a container "
                     "with --cap-add NET_ADMIN")  # fmt: skip
    return Check("tun", "ok", f"{_TUN} opens, and {_NET_ADMIN} is there")


def ip_command() -> Check:
    """What the shipped network scripts call."""
    return _tool("ip", "the shipped network scripts need it", install("iproute2", "iproute"))


def socat_command() -> Check:
    """What `instance.console` names for people without hostler's own console."""
    return _tool("socat", "the command that instance.console prints needs it", install("socat", "socat"))


def qemu_img_command() -> Check:
    """What snapshots and backups call."""
    return _tool("qemu-img", "snapshots and backups need it", install("qemu-utils", "qemu-img"))


def _tool(name: str, purpose: str, fix: str) -> Check:
    found = shutil.which(name)
    return Check(name, "ok", found) if found else Check(name, "warn", f"not on PATH; {purpose}", fix)


def boot_id() -> Check:
    """By it and the clock since boot, a process is told from a later one with the same number."""
    try:
        text = _BOOT_ID.read_text().strip()
        since_boot_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    except OSError as exc:
        return Check("boot_id", "fail", f"{_BOOT_ID}: {exc.strerror}", "mount proc: mount -t proc proc /proc")
    return Check("boot_id", "ok", f"{text}, up for {since_boot_s:.0f} s")


def state_dir(settings: Settings) -> Check:
    """Durable files: is there room, and do they last?"""
    path = settings.state_dir
    if _filesystem(path) in ("tmpfs", "ramfs"):
        return Check("state_dir", "warn", f"{path} is in memory: jobs, guests and queue are forgotten at a reboot",
                     "set HOSTLER_STATE_DIR to a folder on a disk")  # fmt: skip
    return _directory("state_dir", path)


def run_dir(settings: Settings) -> Check:
    """Sockets and chroots."""
    return _directory("run_dir", settings.run_dir)


def _directory(name: str, path: Path) -> Check:
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    variable = f"HOSTLER_{name.upper()}"
    if not existing.is_dir():
        return Check(name, "fail", f"{existing} is not a folder", f"remove it, or set {variable} to another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        return Check(name, "fail", f"{existing} cannot be written by {user_name()}",
                     f"install -d -m 0700 -o {user_name()} {path} (as root), or set {variable}")  # fmt: skip
    free = shutil.disk_usage(existing).free
    made = "" if existing == path else ", made by the first worker"
    detail = f"{path}{made}; {free >> 20} MiB free, {_filesystem(existing)}"
    status: Status = "ok" if free >= SPACE_WARN_BYTES else "warn" if free >= SPACE_FAIL_BYTES else "fail"
    fix = "" if status == "ok" else f"free some space there, or set {variable} to a folder on another disk"
    return Check(name, status, detail, fix)


def _filesystem(path: Path) -> str:
    """The kind of filesystem ``path`` lies on, or will."""
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    resolved = path.resolve()
    return next((mounts[folder] for folder in (resolved, *resolved.parents) if folder in mounts), "unknown filesystem")
