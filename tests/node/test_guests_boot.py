"""Both guests of the node tests boot on a bare QEMU and do what the other tests rely on."""

import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from tests.guests import LINUX_ARGUMENTS, LINUX_MEMORY_MIB, LINUX_READY, LINUX_TICK, linux_guest
from worker.kvm.tiny_guest import (
    BANNER,
    BYE_MESSAGE,
    COUNTER_ADDRESS,
    IGNORE_KEY,
    IGNORING_MESSAGE,
    POWER_BUTTON_MESSAGE,
    POWER_OFF_KEY,
    RESET_KEY,
    TICK_PREFIX,
    write_disk,
)

pytestmark = pytest.mark.node

DEADLINE_S = 60.0
TICK_LINE = re.compile(rb"(?m)^" + TICK_PREFIX + rb"([0-9a-f]{8})\r\n")
SERIAL = ("-chardev", "socket,id=com1,path=serial,server=on,wait=off", "-serial", "chardev:com1")


class Socket:
    """A unix socket that is read up to what one waits for."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._unread = b""

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def read_until(self, pattern: bytes | re.Pattern[bytes]) -> re.Match[bytes]:
        """The first match; what stands before it is dropped, what follows is kept for the next call."""
        deadline = time.monotonic() + DEADLINE_S
        wanted = re.compile(re.escape(pattern)) if isinstance(pattern, bytes) else pattern
        while not (found := wanted.search(self._unread)):
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                received = self._socket.recv(4096)
            except TimeoutError:
                received = b""
            assert received, f"{wanted.pattern!r} did not come; unread: {self._unread!r}"
            self._unread += received
        self._unread = self._unread[found.end() :]
        return found

    def close(self) -> None:
        self._socket.close()


class Machine:
    """A QEMU of our own, stopped before its first instruction; QMP and COM1 are unix sockets in its folder."""

    def __init__(self, folder: Path, *options: str, serial: tuple[str, ...] = SERIAL) -> None:
        self.folder = folder
        base = ("-S", "-nodefaults", "-display", "none", "-qmp", "unix:qmp,server=on,wait=off", *serial)
        self.process = subprocess.Popen(("qemu-system-x86_64", *base, *options), cwd=folder)
        self._open = ExitStack()
        self._open.callback(self._kill)
        self.events: list[dict[str, Any]] = []

    def connect(self) -> None:
        self._qmp = self._socket("qmp")
        self._message()
        self.execute("qmp_capabilities")

    def serial(self) -> Socket:
        return self._socket("serial")

    def execute(self, command: str, **arguments: object) -> Any:
        self._qmp.send(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            answer = self._message()
            assert "error" not in answer, answer
            if "return" in answer:
                return answer["return"]

    def wait_for_event(self, name: str) -> dict[str, Any]:
        """The data of the first event of that name, past or to come."""
        while not (found := [event for event in self.events if event["event"] == name]):
            self._message()
        return dict(found[0].get("data", {}))

    def wait_for_power_off(self) -> None:
        """The guest has shut itself down and QEMU has ended well."""
        assert self.wait_for_event("SHUTDOWN") == {"guest": True, "reason": "guest-shutdown"}
        assert self.process.wait(DEADLINE_S) == 0

    def memory(self, address: int, length: int) -> bytes:
        self.execute("pmemsave", val=address, size=length, filename="memory")
        return (self.folder / "memory").read_bytes()

    def close(self) -> None:
        self._open.close()

    def _kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _message(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._qmp.read_until(re.compile(rb"[^\n]*\n"))[0])
        if "event" in message:
            self.events.append(message)
        return message

    def _socket(self, name: str) -> Socket:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                return self._open.enter_context(closing(Socket(self.folder / name)))
            except OSError:  # not listening yet
                assert self.process.poll() is None, f"QEMU exited with {self.process.returncode}"
                assert time.monotonic() < deadline, f"QEMU never opened its socket {name}"
                time.sleep(0.01)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hst-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def boot(folder: Path) -> Iterator[Callable[..., Machine]]:
    """Starts a QEMU under TCG with the given options, connected but not running yet."""
    if not shutil.which("qemu-system-x86_64"):
        message = "qemu-system-x86_64 is not on PATH: install qemu-system-x86"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    with ExitStack() as machines:

        def start(*options: str, serial: tuple[str, ...] = SERIAL) -> Machine:
            machine = machines.enter_context(closing(Machine(folder, *options, serial=serial)))
            machine.connect()
            return machine

        yield start


@pytest.fixture
def boot_tiny(folder: Path, boot: Callable[..., Machine]) -> Callable[..., Machine]:
    """Starts a QEMU with the tiny guest on its disk, connected but not running yet."""

    def start(machine: str = "pc", serial: tuple[str, ...] = SERIAL) -> Machine:
        write_disk(folder / "disk")
        disk = ("-drive", "file=disk,format=raw,if=none,id=disk", "-device", "virtio-blk-pci,drive=disk")
        return boot("-machine", f"{machine},accel=tcg", "-m", "16", *disk, serial=serial)

    return start


def next_tick(com1: Socket) -> int:
    return int(com1.read_until(TICK_LINE)[1], 16)


def counter(machine: Machine) -> int:
    return int.from_bytes(machine.memory(COUNTER_ADDRESS, 4), "little")


def wait_until_it_counts(machine: Machine) -> None:
    """For a guest that cannot be heard: its memory shows when it has booted (before that, the place is zero)."""
    deadline = time.monotonic() + DEADLINE_S
    while not counter(machine):
        assert time.monotonic() < deadline, "the guest never counted"
        time.sleep(0.05)


@pytest.mark.parametrize("interface", ["ide", "virtio"])
def test_the_tiny_guest_prints_its_banner_and_counts_from_one(
    folder: Path, boot: Callable[..., Machine], interface: str
) -> None:
    write_disk(folder / "disk")
    machine = boot("-machine", "pc,accel=tcg", "-m", "16", "-drive", f"file=disk,format=raw,if={interface}")
    com1 = machine.serial()
    machine.execute("cont")
    com1.read_until(BANNER)
    assert [next_tick(com1) for _ in range(20)] == list(range(1, 21))


def test_the_counter_lives_in_memory(boot_tiny: Callable[..., Machine]) -> None:
    machine = boot_tiny()
    com1 = machine.serial()
    machine.execute("cont")
    while next_tick(com1) < 3:
        pass
    machine.execute("stop")
    stopped_at = counter(machine)
    assert stopped_at >= 3
    machine.execute("cont")
    while (tick := next_tick(com1)) < stopped_at:
        pass
    assert tick in (stopped_at, stopped_at + 1)  # it may have been stopped after counting, before printing


@pytest.mark.parametrize("kind", ["pc", "q35"])
def test_the_power_button_powers_the_tiny_guest_off(boot_tiny: Callable[..., Machine], kind: str) -> None:
    machine = boot_tiny(kind)
    com1 = machine.serial()
    machine.execute("cont")
    next_tick(com1)
    machine.execute("system_powerdown")
    com1.read_until(POWER_BUTTON_MESSAGE)
    machine.wait_for_power_off()


def test_the_tiny_guest_powers_off_from_inside(boot_tiny: Callable[..., Machine]) -> None:
    machine = boot_tiny()
    com1 = machine.serial()
    machine.execute("cont")
    next_tick(com1)
    com1.send(POWER_OFF_KEY)
    com1.read_until(BYE_MESSAGE)
    machine.wait_for_power_off()


def test_the_tiny_guest_ignores_the_power_button_when_told_to(boot_tiny: Callable[..., Machine]) -> None:
    machine = boot_tiny()
    com1 = machine.serial()
    machine.execute("cont")
    next_tick(com1)
    com1.send(IGNORE_KEY)
    com1.read_until(IGNORING_MESSAGE)
    machine.execute("system_powerdown")
    machine.wait_for_event("POWERDOWN")
    pressed_at = next_tick(com1)
    assert [next_tick(com1) for _ in range(5)] == list(range(pressed_at + 1, pressed_at + 6))
    com1.send(POWER_OFF_KEY)
    machine.wait_for_power_off()


def test_a_reset_starts_the_counter_and_the_power_button_again(boot_tiny: Callable[..., Machine]) -> None:
    machine = boot_tiny()
    com1 = machine.serial()
    machine.execute("cont")
    next_tick(com1)
    com1.send(IGNORE_KEY)
    com1.read_until(IGNORING_MESSAGE)
    while next_tick(com1) < 3:
        pass
    com1.send(RESET_KEY)
    assert machine.wait_for_event("RESET") == {"guest": True, "reason": "guest-reset"}
    com1.read_until(BANNER)
    assert next_tick(com1) == 1
    machine.execute("system_powerdown")
    machine.wait_for_power_off()


def test_the_tiny_guest_echoes_what_is_no_command(boot_tiny: Callable[..., Machine]) -> None:
    machine = boot_tiny()
    com1 = machine.serial()
    machine.execute("cont")
    next_tick(com1)
    flood = b"".join(b"<%03d>" % number for number in range(50))  # many times what the UART's FIFO holds
    com1.send(flood)
    echoed = b""
    while len(echoed) < len(flood):
        # the echo comes between the tick lines, never inside one
        echoed += com1.read_until(re.compile(rb"([^\n]*)" + TICK_PREFIX + rb"[0-9a-f]{8}\r\n"))[1]
    assert echoed == flood


def test_nobody_needs_to_listen_to_the_tiny_guest(boot_tiny: Callable[..., Machine]) -> None:
    machine = boot_tiny()
    machine.execute("cont")
    wait_until_it_counts(machine)
    assert next_tick(machine.serial()) > 0
    machine.execute("system_powerdown")
    machine.wait_for_power_off()


def test_the_tiny_guest_needs_no_serial_port(boot_tiny: Callable[..., Machine]) -> None:
    machine = boot_tiny(serial=())
    machine.execute("cont")
    wait_until_it_counts(machine)
    machine.execute("system_powerdown")
    machine.wait_for_power_off()


def test_a_listener_who_does_not_read_cannot_stop_the_tiny_guest(
    folder: Path, boot_tiny: Callable[..., Machine]
) -> None:
    os.mkfifo(folder / "com1.in")
    os.mkfifo(folder / "com1.out")
    full = os.open(folder / "com1.out", os.O_RDWR)
    try:
        os.write(full, bytes(fcntl.fcntl(full, fcntl.F_GETPIPE_SZ)))
        machine = boot_tiny(serial=("-chardev", "pipe,id=com1,path=com1", "-serial", "chardev:com1"))
        machine.execute("cont")
        wait_until_it_counts(machine)
        machine.execute("system_powerdown")
        machine.wait_for_power_off()
    finally:
        os.close(full)


def test_a_machine_without_acpi_counts_on(boot_tiny: Callable[..., Machine]) -> None:
    machine = boot_tiny("pc,acpi=off")
    com1 = machine.serial()
    machine.execute("cont")
    com1.read_until(BANNER)
    machine.execute("system_powerdown")
    assert [next_tick(com1) for _ in range(5)] == [1, 2, 3, 4, 5]


@pytest.fixture
def boot_linux(folder: Path, boot: Callable[..., Machine]) -> Callable[..., Machine]:
    """Starts a QEMU with the Linux guest, a disk and a NIC, connected but not running yet."""
    guest = linux_guest()

    def start() -> Machine:
        write_disk(folder / "disk")
        disk = "file=disk,format=raw,readonly=on,if=none,id="
        return boot(
            *("-machine", "pc,accel=tcg", "-m", str(LINUX_MEMORY_MIB)),
            *("-kernel", str(guest.kernel), "-initrd", str(guest.initrd), "-append", LINUX_ARGUMENTS),
            *("-drive", f"{disk}one", "-device", "virtio-blk-pci,drive=one"),
            *("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net"),
        )

    return start


def test_the_linux_guest_boots_counts_and_powers_off_by_acpi(boot_linux: Callable[..., Machine]) -> None:
    machine = boot_linux()
    com1 = machine.serial()
    machine.execute("cont")
    com1.read_until(LINUX_READY)
    for number in (1, 2, 3):
        com1.read_until(LINUX_TICK + b"%d" % number)
    machine.execute("system_powerdown")
    machine.wait_for_power_off()


def test_the_linux_guest_has_a_shell_that_sees_its_disk_and_nic(boot_linux: Callable[..., Machine]) -> None:
    machine = boot_linux()
    com1 = machine.serial()
    machine.execute("cont")
    com1.read_until(b"# ")
    com1.send(b"echo disks $(ls /sys/block), nics $(ls /sys/class/net) end\n")
    found = com1.read_until(re.compile(rb"\ndisks ([^$]*), nics ([^$]*) end\r"))
    assert b"vda" in found[1]
    assert b"eth0" in found[2]
    com1.send(b"poweroff -f\n")
    machine.wait_for_power_off()
