"""Attach this terminal to a guest's serial console: a unix socket that its QEMU listens on.

On a terminal, keys go to the guest one by one (raw mode) and the escape key leaves. Without one, standard input and
output are pipes: bytes pass unchanged, the escape key means nothing, and the end of the input does not end the
console, so that ``hostler console web1 < /dev/null`` shows what the guest prints.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import termios
import threading
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import FrameType

from hostler.contract import ESCAPE_KEY

ESCAPE = b"\x1d"
"""The byte of the key :data:`hostler.contract.ESCAPE_KEY`."""
_CHUNK = 64 * 1024
_PENDING_MAX = 64 * 1024
"""Piped input waits in its pipe while the guest has this much unread; a person's keys are always taken."""


class Ending(StrEnum):
    """Why a console ended."""

    ESCAPED = "left by the escape key"
    GUEST_CLOSED = "closed by the guest"
    INPUT_ENDED = "end of input"


def attach(
    path: Path,
    name: str,
    *,
    until_eof: bool = False,
    stdin: int | None = None,
    stdout: int | None = None,
) -> Ending:
    """Connect ``stdin`` and ``stdout`` (file descriptors, the process's own by default) to the socket at ``path``.

    Says on standard error how to leave, first of all. ``until_eof`` ends at the end of the input, once the guest has
    taken all of it. Returns why it ended; raises OSError if the socket cannot be connected. The terminal is restored
    in any case, SIGTERM and SIGHUP included.
    """
    stdin = sys.stdin.fileno() if stdin is None else stdin
    stdout = sys.stdout.fileno() if stdout is None else stdout
    with socket.socket(socket.AF_UNIX) as guest:
        guest.connect(str(path))
        guest.setblocking(False)
        print(f"Connected to {name}. Escape key is {ESCAPE_KEY}", file=sys.stderr, flush=True)
        with _raw_terminal(stdin):
            return _relay(guest, stdin, stdout, until_eof)


@contextmanager
def _raw_terminal(stdin: int) -> Iterator[None]:
    if not os.isatty(stdin):
        yield
        return
    saved = termios.tcgetattr(stdin)
    with _signals_as_exceptions():
        try:
            tty.setraw(stdin)
            yield
        finally:
            termios.tcsetattr(stdin, termios.TCSADRAIN, saved)


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack; their default would leave the terminal raw."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _relay(guest: socket.socket, stdin: int, stdout: int, until_eof: bool) -> Ending:
    person = os.isatty(stdin)
    until_eof = until_eof or person  # a terminal's end of input is its hangup
    pending = bytearray()
    reading = True
    while reading or pending or not until_eof:
        take_input = reading and (person or len(pending) < _PENDING_MAX)
        sources: list[socket.socket | int] = [guest, stdin] if take_input else [guest]
        readable, writable, _ = select.select(sources, [guest] if pending else [], [])
        if guest in readable:
            output = _received(guest)
            if not output:
                return Ending.GUEST_CLOSED
            _write_all(stdout, output)
        if stdin in readable:
            typed = _typed(stdin)
            reading = bool(typed)
            if person and ESCAPE in typed:
                return Ending.ESCAPED
            pending += typed
        if writable and not _flush(guest, pending):
            return Ending.GUEST_CLOSED
    return Ending.INPUT_ENDED


def _received(guest: socket.socket) -> bytes:
    try:
        return guest.recv(_CHUNK)
    except ConnectionResetError:
        return b""


def _typed(stdin: int) -> bytes:
    try:
        return os.read(stdin, _CHUNK)
    except OSError:  # EIO: the terminal has gone
        return b""


def _flush(guest: socket.socket, pending: bytearray) -> bool:
    try:
        del pending[: guest.send(pending)]
    except BlockingIOError:
        return True
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


def _write_all(stdout: int, output: bytes) -> None:
    while output:
        output = output[os.write(stdout, output) :]
