"""The console on a real terminal (a pty) and on pipes, against a socket that stands for QEMU's serial port."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

DEADLINE_S = 30.0
PROGRAM = "import sys; from pathlib import Path; from hostler.console import attach; "
PROGRAM += "print(attach(Path(sys.argv[1]), 'web1', until_eof='eof' in sys.argv).name, file=sys.stderr)"


class Serial:
    """The guest's side: a listening unix socket."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "serial.sock"
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(self.path))
        self.server.listen()
        self.server.settimeout(DEADLINE_S)

    def accept(self) -> socket.socket:
        connection, _ = self.server.accept()
        connection.settimeout(DEADLINE_S)
        return connection


@pytest.fixture
def serial() -> Iterator[Serial]:
    folder = Path(tempfile.mkdtemp(prefix="hst-", dir="/tmp"))
    made = Serial(folder)
    yield made
    made.server.close()
    shutil.rmtree(folder)


class Terminal:
    """A person at a terminal, with ``attach`` running on it."""

    def __init__(self, serial: Serial) -> None:
        self.keyboard, self.tty = pty.openpty()
        self.before = termios.tcgetattr(self.tty)
        command = [sys.executable, "-c", PROGRAM, str(serial.path)]
        self.process = subprocess.Popen(command, stdin=self.tty, stdout=self.tty, stderr=self.tty)

    def type(self, keys: bytes) -> None:
        os.write(self.keyboard, keys)

    def read_until(self, text: bytes) -> bytes:
        seen = b""
        while text not in seen:
            ready, _, _ = select.select([self.keyboard], [], [], DEADLINE_S)
            assert ready, f"{text!r} did not appear after {seen!r}"
            seen += os.read(self.keyboard, 4096)
        return seen

    def restored(self) -> bool:
        return termios.tcgetattr(self.tty) == self.before

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.keyboard)
        os.close(self.tty)


@pytest.fixture
def terminal(serial: Serial) -> Iterator[Terminal]:
    made = Terminal(serial)
    yield made
    made.close()


def received(guest: socket.socket, size: int) -> bytes:
    seen = b""
    while len(seen) < size and (chunk := guest.recv(size - len(seen))):
        seen += chunk
    return seen


def test_the_escape_key_is_shown_first_and_leaves(serial: Serial, terminal: Terminal) -> None:
    with serial.accept() as guest:
        assert terminal.read_until(b"Escape key is ^]\r\n").startswith(b"Connected to web1. Escape key is ^]")
        guest.sendall(b"login: ")
        terminal.read_until(b"login: ")
        terminal.type(b"\x1d")
        terminal.read_until(b"ESCAPED")
    assert terminal.process.wait(DEADLINE_S) == 0
    assert terminal.restored()


def test_keys_reach_the_guest_one_by_one_control_keys_included(serial: Serial, terminal: Terminal) -> None:
    with serial.accept() as guest:
        guest.sendall(b"ready")
        terminal.read_until(b"ready")
        for key in (b"r", b"\x03", b"\x1a", b"\x04", b"\r"):
            terminal.type(key)
            assert received(guest, 1) == key, "no line editing, no signals, no end of file: the guest gets them all"
        terminal.type(b"\x1d")
        terminal.read_until(b"ESCAPED")


def test_the_console_ends_and_the_terminal_is_restored_when_the_guest_closes(
    serial: Serial, terminal: Terminal
) -> None:
    with serial.accept() as guest:
        guest.sendall(b"bye")
        terminal.read_until(b"bye")
    terminal.read_until(b"GUEST_CLOSED")
    assert terminal.process.wait(DEADLINE_S) == 0
    assert terminal.restored()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_terminal_is_restored_when_the_console_is_told_to_end(
    serial: Serial, terminal: Terminal, number: signal.Signals
) -> None:
    with serial.accept() as guest:
        guest.sendall(b"ready")
        terminal.read_until(b"ready")
        terminal.process.send_signal(number)
        assert terminal.process.wait(DEADLINE_S) == 128 + number
    assert terminal.restored()


def test_the_escape_key_works_though_the_guest_reads_nothing(serial: Serial, terminal: Terminal) -> None:
    with serial.accept() as guest:
        guest.sendall(b"ready")
        terminal.read_until(b"ready")
        for _ in range(200):
            terminal.type(b"x" * 2048)
        terminal.type(b"\x1d")
        terminal.read_until(b"ESCAPED")
    assert terminal.restored()


def piped(serial: Serial, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PROGRAM, str(serial.path), *options]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_pipes_carry_every_byte_and_the_end_of_input_ends_nothing(serial: Serial) -> None:
    everything = bytes(range(256)) * 2000
    process = piped(serial)
    with ThreadPoolExecutor(1) as pool, serial.accept() as guest:
        user = pool.submit(process.communicate, everything, DEADLINE_S)
        assert received(guest, len(everything)) == everything, "the escape key is a byte like any other"
        guest.sendall(everything)
        guest.shutdown(socket.SHUT_RDWR)
        out, err = user.result(DEADLINE_S)
    assert out == everything
    assert err == b"Connected to web1. Escape key is ^]\nGUEST_CLOSED\n"


def test_until_eof_ends_once_the_guest_has_all_of_the_input(serial: Serial) -> None:
    everything = b"command\n" * 100_000
    process = piped(serial, "eof")
    with ThreadPoolExecutor(1) as pool, serial.accept() as guest:
        user = pool.submit(process.communicate, everything, DEADLINE_S)
        assert received(guest, len(everything)) == everything
        assert received(guest, 1) == b""
        assert user.result(DEADLINE_S)[1].endswith(b"INPUT_ENDED\n")


def test_a_socket_nobody_listens_on_is_an_error_before_the_terminal_is_touched(serial: Serial) -> None:
    serial.server.close()
    process = piped(serial)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert b"ConnectionRefusedError" in err and b"Connected" not in err
