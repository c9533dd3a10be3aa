"""Binding a process to processors, and what the host says to it. On a real QEMU: tests/node/test_cpu_mask.py."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from worker.errors import QemuFailed
from worker.kvm.cpu_mask import bind, online

NO_MONITOR: Any = None


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    made = subprocess.Popen(["sleep", "60"])
    yield made
    made.kill()
    made.wait()


def test_this_processs_processors_are_online() -> None:
    assert online() >= os.sched_getaffinity(0)


def test_an_empty_mask_binds_nothing_and_all_binds_to_all_there_are(process: subprocess.Popen[bytes]) -> None:
    before = os.sched_getaffinity(process.pid)
    bind(NO_MONITOR, process.pid, "")
    assert os.sched_getaffinity(process.pid) == before
    os.sched_setaffinity(process.pid, {min(before)})
    bind(NO_MONITOR, process.pid, "all")
    assert os.sched_getaffinity(process.pid) >= before


def test_a_processor_that_linux_leaves_out_is_said(process: subprocess.Popen[bytes]) -> None:
    usable = min(os.sched_getaffinity(0))
    with pytest.raises(QemuFailed, match=r"processors \[4095\]"):
        bind(NO_MONITOR, process.pid, f"{usable},4095")
    with pytest.raises(QemuFailed, match="4095: Invalid argument"):
        bind(NO_MONITOR, process.pid, "4095")


def test_a_process_that_is_gone_is_said(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    with pytest.raises(QemuFailed, match="cannot be bound"):
        bind(NO_MONITOR, process.pid, "0")
