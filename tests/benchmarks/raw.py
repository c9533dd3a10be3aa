"""The bare limit of QEMU: the argv that a start job would run, in the same kind of folder, run by hand."""

from __future__ import annotations

import asyncio
import os
import re
import select
import subprocess
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from qemu.qmp import QMPClient, QMPError

from hostler.payloads import Instance, parse
from tests.nodes import TestNode
from worker.kvm import emulator
from worker.kvm.arguments import HostPart, build, render
from worker.kvm.folder import GuestFolder
from worker.kvm.launch import Sockets
from worker.kvm.process import arguments_of
from worker.operations.checks import resolve

END_TIMEOUT_MS = 30_000
_CHANGING = re.compile(r"fd=\d+|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""What differs between two starts of one instance: descriptors and the uuid."""


@dataclass(frozen=True)
class Started:
    """How long a start took from just before exec."""

    greeting_ms: float
    """To the end of QMP's negotiation."""
    total_ms: float
    """To the answer of ``cont``."""


class RawGuest:
    """A guest without hostler. All that can be prepared is made here: folder, bound sockets, files, argv."""

    def __init__(self, node: TestNode, spec: dict[str, Any]) -> None:
        binary = emulator.find()
        instance = resolve(parse(Instance, spec), emulator.probe(binary, node.settings.state_dir / "cache"))
        own_uuid = str(uuid.uuid4())
        self._folder = GuestFolder.of(node.settings.run_dir, own_uuid)
        self._folder.create()
        self._sockets = Sockets.bind(self._folder, serial=True)
        qmp, monitor, serial = (sock.fileno() for sock in self._listeners)
        host = HostPart(uuid=own_uuid, accelerator="tcg", qmp_fd=qmp, monitor_fd=monitor, serial_fd=serial)
        self.argv = render(str(binary), build(instance, host))
        self._files = [_handshake(), *map(self._folder.open_for_append, (self._folder.journal, self._folder.log))]
        self._client = QMPClient(own_uuid)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def _listeners(self) -> list[Any]:
        return [self._sockets.qmp, self._sockets.monitor, self._sockets.serial]

    async def start(self) -> Started:
        """Run it, and let the guest run; the connection to its monitor is kept."""
        began = time.perf_counter()
        self.process = subprocess.Popen(
            self.argv,
            stdin=self._files[0],
            stdout=self._files[1],
            stderr=self._files[2],
            pass_fds=[sock.fileno() for sock in self._listeners],
            start_new_session=True,
            cwd="/",
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
        )
        await self._client.connect(str(self._folder.qmp))
        greeted = time.perf_counter()
        await self._client.execute("cont")
        answered = time.perf_counter()
        return Started((greeted - began) * 1000, (answered - began) * 1000)

    async def clean_up(self) -> None:
        """Give everything back, of a process that has ended."""
        with suppress(QMPError, EOFError, OSError):
            await self._client.disconnect()
        self._sockets.close()
        for fd in self._files:
            os.close(fd)
        self._folder.remove()


async def start_all(guests: Sequence[RawGuest]) -> list[Started]:
    """Start them at once."""
    return await asyncio.gather(*(guest.start() for guest in guests))


async def end_all(guests: Sequence[RawGuest]) -> float:
    """SIGTERM to all at once; milliseconds until the last one has exited. Cleans up after them."""
    processes = [guest.process for guest in guests if guest.process]
    pidfds = [os.pidfd_open(process.pid) for process in processes]
    began = time.perf_counter()
    for process in processes:
        process.terminate()
    for pidfd in pidfds:
        _wait_for_end(pidfd)
    took_ms = (time.perf_counter() - began) * 1000
    for process, pidfd in zip(processes, pidfds, strict=True):
        process.wait()
        os.close(pidfd)
    for guest in guests:
        await guest.clean_up()
    return took_ms


def require_same_argv(guest: RawGuest, node: TestNode, name: str) -> None:
    """Raises AssertionError unless the instance's QEMU was started with this guest's argv."""
    of_the_job = arguments_of(node.pid(name))
    assert _comparable(guest.argv) == _comparable(of_the_job), f"{guest.argv} is not {of_the_job}"


def _comparable(argv: list[str]) -> list[str]:
    return [_CHANGING.sub("...", argument) for argument in argv]


def _wait_for_end(pidfd: int) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    if not poll.poll(END_TIMEOUT_MS):
        raise TimeoutError(f"QEMU did not end {END_TIMEOUT_MS / 1000:g} s after SIGTERM")


def _handshake() -> int:
    fd = os.memfd_create("benchmark-handshake")
    os.write(fd, b'{"execute":"qmp_capabilities"}\n')
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
