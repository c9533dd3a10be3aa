"""Two real QEMUs on one machine, with a guest that goes from one to the other."""

from __future__ import annotations

import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from tests import dirtying_guest
from tests.nodes import QEMU, until
from worker.kvm import tiny_guest
from worker.kvm.live_migration.capabilities import Tuning, prepare
from worker.kvm.live_migration.follow import EVENTS, follow
from worker.kvm.live_migration.incoming import Incoming, uri
from worker.kvm.live_migration.outgoing import Outgoing
from worker.kvm.live_migration.sample import PRE_SWITCHOVER, Sample
from worker.kvm.qmp import Event, EventLoop, Monitor

HOST = "127.0.0.1"
PORTS = range(47100, 47164)
MIB = 2**20
DEADLINE_S = 30.0
TICK = re.compile(rb"tick ([0-9a-f]{8})\r\n")


class Com1:
    """What a guest prints, all of it. It is read at once: a socket takes no more than 277 bytes one by one."""

    def __init__(self, path: Path) -> None:
        self.heard = b""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def ticks(self) -> list[int]:
        """The numbers counted so far."""
        return [int(number, 16) for number in TICK.findall(self.heard)]

    def wait_for_ticks(self, more: int) -> None:
        """Until so many more have been counted."""
        wanted = len(self.ticks()) + more
        until(lambda: len(self.ticks()) >= wanted, what=f"{more} more ticks")

    def send(self, data: bytes) -> None:
        """Type at the guest's console."""
        self._socket.sendall(data)

    def close(self) -> None:
        """After QEMU has ended."""
        self._reader.join(DEADLINE_S)
        self._socket.close()

    def _read(self) -> None:
        with suppress(ConnectionResetError):
            while received := self._socket.recv(4096):
                self.heard += received


class Side:
    """A QEMU, stopped before its first instruction or waiting for a guest, with all its monitor said."""

    def __init__(self, loop: EventLoop, folder: Path, name: str, *options: str, user: int = 0) -> None:
        self.changed = threading.Event()
        self.events: list[tuple[float, Event]] = []
        self.samples: list[Sample] = []
        qmp, com1 = folder / f"{name}.qmp", folder / f"{name}.com1"
        self.process = subprocess.Popen(
            (["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else [])
            + [QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-S", "-machine", "pc,accel=tcg"]
            + ["-qmp", f"unix:{qmp},server=on,wait=off", "-serial", f"unix:{com1},server=on,wait=off", *options]
        )
        until(lambda: com1.exists() and qmp.exists(), what=f"the sockets of {name}")
        self.monitor = Monitor.connect(loop, qmp, DEADLINE_S, self._heard)
        self.com1 = Com1(com1)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.com1.close()
        self.monitor.close()

    def said(self, word: str) -> float | None:
        """When the monitor last spoke of an event, or of a migration's status (monotonic seconds)."""
        return next((at for at, e in reversed(self.events) if word in (e["event"], e["data"].get("status"))), None)

    def wait_for(self, word: str) -> float:
        """When the monitor spoke of it, waiting until it does."""
        return until(lambda: self.said(word), what=word)

    def follow(self, migration: Outgoing | Incoming, *wanted: str) -> Sample:
        """Until the end or one of the statuses wanted; gives up rather than watching for ever."""
        return follow(migration, self.changed, self.samples.append, _clock(), frozenset(wanted))

    def _heard(self, event: Event) -> None:
        self.events.append((time.monotonic(), {"data": {}, **event}))
        if event["event"] in EVENTS:
            self.changed.set()


class Pair:
    """A guest that runs at the source, and a target that waits for it."""

    def __init__(self, source: Side, target: Side) -> None:
        self.source, self.target = source, target
        self.outgoing, self.incoming = Outgoing(source.monitor), Incoming(target.monitor)

    def boot(self) -> None:
        """Let it run until it counts."""
        self.source.monitor.continue_vcpus()
        self.source.com1.wait_for_ticks(3)

    def start(self, **tuning: Any) -> None:
        """Begin the transfer."""
        self.prepare(Tuning(**tuning))
        port = self.incoming.listen(HOST, PORTS)
        self.outgoing.start(uri(HOST, port))

    def prepare(self, tuning: Tuning) -> None:
        prepare(self.target.monitor, tuning, incoming=True)
        prepare(self.source.monitor, tuning, incoming=False)

    def stop_for_switchover(self) -> None:
        """Go on until the source stands still, waiting to be told to switch over."""
        assert self.source.follow(self.outgoing, PRE_SWITCHOVER).status == PRE_SWITCHOVER

    def finish(self) -> Sample:
        """From the transfer's beginning to the guest running at the target; the source's last sample."""
        self.stop_for_switchover()
        self.outgoing.switch_over()
        last = self.source.follow(self.outgoing)
        assert last.status == "completed", last
        assert self.target.follow(self.incoming).status == "completed"
        self.target.monitor.continue_vcpus()
        return self.outgoing.totals()

    def goes_on(self, ticks: int = 4) -> list[int]:
        """What was counted at the source and then at the target: without gap or repeat."""
        self.target.com1.wait_for_ticks(ticks)
        return consecutive(self.source.com1.heard + self.target.com1.heard)

    def source_counts(self) -> None:
        """The guest runs at the source, and has lost nothing."""
        assert self.source.monitor.status() == "running"
        self.source.com1.wait_for_ticks(3)
        consecutive(self.source.com1.heard)
        assert not self.target.com1.heard


def consecutive(heard: bytes) -> list[int]:
    """The numbers of the ticks in ``heard``; each is the one before plus 1, and no line is damaged."""
    assert dirtying_guest.CORRUPT_MESSAGE not in heard
    numbers = [int(number, 16) for number in TICK.findall(heard)]
    assert numbers and numbers == list(range(numbers[0], numbers[0] + len(numbers))), heard
    return numbers


@contextmanager
def pair(
    loop: EventLoop, folder: Path, memory_mib: int = 32, mib_per_s: float = 0, range_mib: int = 0
) -> Iterator[Pair]:
    """A source and a target of the same hardware; the guest writes ``mib_per_s``, or nothing but its counter."""
    disk = folder / "disk"
    if mib_per_s:
        dirtying_guest.write_disk(disk, mib_per_s, range_mib)
    else:
        tiny_guest.write_disk(disk)
    options = ["-m", str(memory_mib), "-blockdev", f"driver=raw,node-name=disk0,file.driver=file,file.filename={disk}"]
    options += ["-device", "virtio-blk-pci,drive=disk0,id=disk0-device"]
    with ExitStack() as stack:
        sides = []
        for name, more in (("source", ()), ("target", ("-incoming", "defer"))):
            sides.append(Side(loop, folder, name, *options, *more))
            stack.callback(sides[-1].close)
        yield Pair(*sides)


def _clock() -> Callable[[], None]:
    end = time.monotonic() + 2 * DEADLINE_S

    def check() -> None:
        assert time.monotonic() < end, "the migration did not get anywhere"

    return check
