"""Where the threads of a QEMU may run: ``cpu_mask`` carried out on a process that is there."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from hostler.cpu_mask import expand, split
from worker.errors import QemuFailed
from worker.kvm.qmp import Monitor

ONLINE = Path("/sys/devices/system/cpu/online")


def online() -> frozenset[int]:
    """The host's processors; also those that the worker itself is kept from (isolcpus, CPUAffinity)."""
    return expand(ONLINE.read_text().strip(), frozenset())


def bind(monitor: Monitor, pid: int, mask: str) -> None:
    """Have the QEMU ``pid``, before its guest runs, stay on the processors of ``mask``.

    Raises QmpLost; QemuFailed where the host does not let it run on one of them. Some threads may be bound then.
    """
    there, none = online(), frozenset[int]()
    # Each list as (what is wished for, what must be had): of "all", as much as the worker's cpuset leaves is meant.
    lists = [(expand(listed, there), expand(listed, none)) for listed in split(mask)]
    try:
        if lists:
            wished, needed = zip(*lists, strict=True)
            _bind_all(pid, none.union(*wished), none.union(*needed))
        if len(lists) > 1:
            for index, thread in monitor.vcpu_threads().items():
                _bind(thread, *lists[index])
    except OSError as exc:
        raise QemuFailed(f"QEMU cannot be bound to the processors {mask}: {exc.strerror}") from exc


def _bind_all(pid: int, wished: frozenset[int], needed: frozenset[int]) -> None:
    # The first thread first: those that QEMU starts from now on run where it does.
    threads = sorted((int(path.name) for path in Path(f"/proc/{pid}/task").iterdir()), key=lambda thread: thread != pid)
    for thread in threads:
        with suppress(ProcessLookupError):
            _bind(thread, wished, needed)


def _bind(thread: int, wished: frozenset[int], needed: frozenset[int]) -> None:
    os.sched_setaffinity(thread, wished)
    if missing := needed - os.sched_getaffinity(thread):  # Linux leaves out what a cpuset forbids, and says nothing
        raise QemuFailed(f"QEMU may not run on the processors {sorted(missing)}: a cpuset of the worker forbids it")
