"""Facts about this host, as /proc and /sys have them; the names say the unit."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from hostler import __version__
from models import Instance
from worker.kvm.emulator import EmulatorBroken, EmulatorMissing
from worker.kvm.process import boot_id
from worker.operations.context import NodeContext

PROC = Path("/proc")
SYSFS = Path("/sys")
_KIB_LINE = re.compile(r"(\S+):\s+([0-9]+) kB")


def node_info(node: NodeContext) -> dict[str, Any]:
    """What this host is and has left. One without a working QEMU is told of too: ``qemu_problem`` says why."""
    return {
        "node": node.name,
        "host": socket.gethostname(),
        "kernel": platform.release(),
        "arch": platform.machine(),
        "boot_id": boot_id(),
        "uptime_s": int(time.clock_gettime(time.CLOCK_BOOTTIME)),
        **dict(
            zip(("load_1min", "load_5min", "load_15min"), (round(load, 2) for load in os.getloadavg()), strict=True)
        ),
        **memory(),
        **processors(),
        "numa_nodes": numa_nodes(),
        "hugepages": hugepages(),
        **_emulator(node),
        **_space("state_dir", node.settings.state_dir),
        **_space("run_dir", node.settings.run_dir),
        "worker_version": __version__,
        "worker_pid": os.getpid(),
        "powercycle_allowed": node.settings.allow_powercycle,
        "instances": _instances(node),
    }


def memory(proc: Path = PROC) -> dict[str, int]:
    """``free`` is what nobody uses and what merely caches files; ``available`` is the kernel's own estimate of it."""
    kib = _kib(proc / "meminfo")
    return {
        "memory_total_mib": kib["MemTotal"] >> 10,
        "memory_free_mib": (kib["MemFree"] + kib["Buffers"] + kib["Cached"]) >> 10,
        "memory_available_mib": kib["MemAvailable"] >> 10,
        "memory_active_mib": kib["Active"] >> 10,
    }


def processors(sysfs: Path = SYSFS) -> dict[str, int]:
    """How many processors, in how many sockets and NUMA nodes; a kernel that tells nothing of these has one."""
    ids = (sysfs / "devices/system/cpu").glob("cpu[0-9]*/topology/physical_package_id")
    return {
        "cpu_total": os.cpu_count() or 1,
        "cpu_sockets": len({path.read_text() for path in ids}) or 1,
        "cpu_nodes": len(_numa_folders(sysfs)) or 1,
    }


def numa_nodes(sysfs: Path = SYSFS) -> list[dict[str, Any]]:
    """Each NUMA node with its memory and its processors (``0-3,8``); empty where the kernel has no NUMA."""
    return [_numa_node(folder) for folder in _numa_folders(sysfs)]


def _numa_folders(sysfs: Path) -> list[Path]:
    return sorted((sysfs / "devices/system/node").glob("node[0-9]*"), key=lambda folder: int(folder.name[4:]))


def _numa_node(folder: Path) -> dict[str, Any]:
    kib = _kib(folder / "meminfo")
    return {
        "node": int(folder.name[4:]),
        "memory_total_mib": kib["MemTotal"] >> 10,
        "memory_free_mib": (kib["MemFree"] + kib["FilePages"]) >> 10,
        "cpus": (folder / "cpulist").read_text().strip(),
    }


def hugepages(sysfs: Path = SYSFS) -> list[dict[str, int]]:
    """Each size of huge pages this kernel has, with how many are set aside and how many of those are free."""
    folders = sorted((sysfs / "kernel/mm/hugepages").glob("hugepages-*kB"), key=_page_size_kib)
    return [
        {
            "size_kib": _page_size_kib(folder),
            "total": int((folder / "nr_hugepages").read_text()),
            "free": int((folder / "free_hugepages").read_text()),
        }
        for folder in folders
    ]


def _page_size_kib(folder: Path) -> int:
    return int(folder.name.removeprefix("hugepages-").removesuffix("kB"))


def _kib(meminfo: Path) -> dict[str, int]:
    return {name: int(kib) for name, kib in _KIB_LINE.findall(meminfo.read_text())}


def _emulator(node: NodeContext) -> dict[str, Any]:
    facts = dict.fromkeys(("qemu_version", "qemu_binary", "qemu_problem", "accelerator", "accelerator_reason"))
    try:
        facts["qemu_binary"] = str(node.qemu_binary)
        facts["qemu_version"] = node.features().version_text
    except (EmulatorMissing, EmulatorBroken) as exc:
        return facts | {"qemu_problem": exc.message, "kvm_works": False, "kvm_reason": "not tried: QEMU does not work"}
    kvm = node.kvm()
    why = kvm.reason if kvm.works else f"emulation, many times slower: {kvm.reason}"
    facts |= {"accelerator": "kvm" if kvm.works else "tcg", "accelerator_reason": why}
    return facts | {"kvm_works": kvm.works, "kvm_reason": kvm.reason}


def _space(name: str, folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {name: str(folder), f"{name}_total_mib": None, f"{name}_free_mib": None}
    with suppress(OSError):  # somebody removed it; node.verify says what to do about that
        usage = shutil.disk_usage(folder)
        facts |= {f"{name}_total_mib": usage.total >> 20, f"{name}_free_mib": usage.free >> 20}
    return facts


def _instances(node: NodeContext) -> dict[str, int]:
    by_state = select(Instance.state, func.count().label("number")).where(Instance.node == node.name)
    with node.database.reading() as session:
        return {row.state: row.number for row in session.execute(by_state.group_by(Instance.state))}
