"""What the measurements were made on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sqlite3
import subprocess
from pathlib import Path

import psutil

from hostler import embedded
from worker.kvm import emulator


def describe() -> dict[str, str]:
    """The machine and the versions that decide the figures, each in a few words."""
    virtual = " (itself a virtual machine)" if "hypervisor" in _cpuinfo("flags").split() else ""
    return {
        "CPU": f"{_cpuinfo('model name')}, {len(os.sched_getaffinity(0))} cores{virtual}",
        "RAM": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "kernel": platform.release(),
        "QEMU": f"{_said(str(emulator.find()), '--version')}, accelerator TCG",
        "Python": platform.python_version(),
        "Celery": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("celery", "kombu", "redis")),
        "broker and results": f"{_broker()} on a unix socket, appendfsync always",
        "database": f"SQLite {sqlite3.sqlite_version}, WAL, synchronous FULL, unless another is named",
        "folders": _file_system(Path("/tmp")),
    }


def load() -> str:
    """How busy the machine is, all programs together: the benchmarks alone are part of it once they run."""
    return ", ".join(f"{value:.2f}" for value in os.getloadavg())


def _cpuinfo(field: str) -> str:
    found = re.search(rf"(?m)^{field}\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def _said(*command: str) -> str:
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return lines[0].removeprefix("QEMU emulator version ") if lines else ""


def _broker() -> str:
    binary = embedded.server_binary()
    found = re.search(r"v=(\S+)", _said(str(binary), "--version")) if binary else None
    return f"{binary.name if binary else 'no server'} {found[1] if found else ''}".strip()


def _file_system(path: Path) -> str:
    mounts = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    place = next(parent for parent in (path, *path.parents) if str(parent) in mounts)
    return f"below {path}, on {mounts[str(place)]}"
