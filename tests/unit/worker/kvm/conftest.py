"""Fixtures for the tests of the QEMU driver."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.services import missing
from worker.kvm.folder import GuestFolder
from worker.kvm.qmp import EventLoop

QEMU = "qemu-system-x86_64"


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A folder whose name leaves room for a unix socket's path."""
    folder = Path(tempfile.mkdtemp(prefix="hst-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    """A loop for monitors, stopped at the test's end."""
    made = EventLoop()
    yield made
    made.close()


@pytest.fixture
def qemu_binary() -> Path:
    """The emulator of this host."""
    found = shutil.which(QEMU)
    return Path(found) if found else missing(QEMU, "not on PATH")


@pytest.fixture
def qemu(qemu_binary: Path, short_dir: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a QEMU without a guest, its monitor at the given socket, gone at the test's end."""
    running: list[subprocess.Popen[bytes]] = []

    def start(monitor: Path, *options: str) -> subprocess.Popen[bytes]:
        argv = [str(qemu_binary), "-nodefaults", "-display", "none", "-S", *(options or ("-machine", "none"))]
        with GuestFolder(short_dir).listen(monitor) as listener:  # as the worker does: whoever connects now, waits
            fd = listener.fileno()
            argv += ["-chardev", f"socket,id=qmp,fd={fd},server=on,wait=off", "-mon", "chardev=qmp,mode=control"]
            running.append(subprocess.Popen(argv, cwd=short_dir, env={"PATH": os.defpath}, pass_fds=[fd]))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()
