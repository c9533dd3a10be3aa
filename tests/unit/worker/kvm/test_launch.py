"""Bringing QEMU to life, and what becomes of those that do not live."""

from __future__ import annotations

import os
import stat
import sys
import textwrap
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from hostler.payloads import Instance
from tests.nodes import until
from worker.errors import QemuFailed
from worker.kvm.folder import GuestFolder
from worker.kvm.launch import Sockets, describe_exit, greet, spawn
from worker.kvm.process import QemuProcess, arguments_of, find_by_uuid
from worker.kvm.qmp import Event, EventLoop, Monitor

DEADLINE_S = 30.0
WEB1 = Instance.model_validate({"name": "web1", "memory_mib": 16, "hvparams": {"kvm_flag": "disabled"}})
FAKE = """\
#!{python} -IS
import re, socket, sys, time
fd = next(int(m[1]) for a in sys.argv if (m := re.match("socket,id=qmp,fd=([0-9]+)", a)))
listener = socket.socket(fileno=fd)
"""


class Launcher:
    """Starts whatever calls itself QEMU, in a folder of its own."""

    def __init__(self, folder: GuestFolder, loop: EventLoop, ends: ExitStack) -> None:
        self.folder, self.loop, self._ends = folder, loop, ends
        self.events: list[Event] = []
        self.uuid = str(uuid.uuid4())

    def spawn(self, binary: Path, instance: Instance = WEB1) -> QemuProcess:
        sockets = Sockets.bind(self.folder, serial=instance.hvparams.serial_console)
        try:
            process = spawn(binary, instance, self.folder, sockets, {}, uuid=self.uuid, accelerator="tcg")
        finally:
            sockets.close()
        self._ends.callback(process.close)
        self._ends.callback(process.kill, grace_s=0)
        return process

    def greet(self, process: QemuProcess, timeout_s: float = DEADLINE_S, **more: Any) -> Monitor:
        monitor = greet(self.loop, process, self.folder, timeout_s, self.events.append, **more)
        self._ends.callback(monitor.close)
        return monitor

    def fails(self, binary: Path, timeout_s: float = DEADLINE_S) -> str:
        """Why it did not come to life."""
        process = self.spawn(binary)
        with pytest.raises(QemuFailed) as failed:
            self.greet(process, timeout_s)
        return failed.value.message


@pytest.fixture
def launcher(short_dir: Path, loop: EventLoop) -> Iterator[Launcher]:
    folder = GuestFolder.of(short_dir, "guest")
    folder.create()
    with ExitStack() as ends:
        yield Launcher(folder, loop, ends)


@pytest.fixture
def fake(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a program that is started as QEMU is and then does what its lines say, with the monitor as ``listener``."""

    def write(lines: str) -> Path:
        path = tmp_path / "qemu"
        path.write_text(FAKE.format(python=sys.executable) + textwrap.dedent(lines))
        path.chmod(0o755)
        return path

    return write


def descriptors() -> dict[str, str]:
    """What this process has open, apart from the folder that lists it."""
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found[link.name] = str(link.readlink())
    return {fd: target for fd, target in found.items() if "/proc/" not in target}


def test_a_real_qemu_comes_to_life_paused_and_confined(launcher: Launcher, qemu_binary: Path) -> None:
    process = launcher.spawn(qemu_binary)
    monitor = launcher.greet(process)
    assert monitor.status() == "prelaunch"
    status = Path(f"/proc/{process.pid}/status").read_text()
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
    assert os.getsid(process.pid) == process.pid
    assert find_by_uuid(launcher.uuid) == process.identity
    assert arguments_of(process.pid)[:3] == [str(qemu_binary), "-name", "web1"]


def test_its_sockets_are_its_owners_alone_and_its_journal_has_its_end(launcher: Launcher, qemu_binary: Path) -> None:
    process = launcher.spawn(qemu_binary)
    monitor = launcher.greet(process)
    for path in (launcher.folder.qmp, launcher.folder.monitor, launcher.folder.serial):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    monitor.execute("quit")
    assert process.wait(DEADLINE_S)
    assert process.exit_status() == 0
    assert monitor.wait_closed(DEADLINE_S)
    said = {"guest": False, "reason": "host-qmp-quit"}
    assert [event["data"] for event in launcher.events if event["event"] == "SHUTDOWN"] == [said]
    written = launcher.folder.last_event("SHUTDOWN")
    assert written
    assert written["data"] == said


def test_the_journal_hears_of_an_end_that_no_worker_saw(launcher: Launcher, qemu_binary: Path) -> None:
    process = launcher.spawn(qemu_binary)
    launcher.greet(process).close()
    until(lambda: b'"return"' in launcher.folder.journal.read_bytes())  # QEMU has read the journal's handshake
    process.kill()
    written = launcher.folder.last_event("SHUTDOWN")
    assert written
    assert written["data"] == {"guest": False, "reason": "host-signal"}
    assert launcher.events == []


def test_without_a_serial_console_there_is_no_socket_for_one(launcher: Launcher, qemu_binary: Path) -> None:
    silent = WEB1.model_copy(update={"hvparams": WEB1.hvparams.model_copy(update={"serial_console": False})})
    launcher.greet(launcher.spawn(qemu_binary, silent))
    assert not launcher.folder.serial.exists()


def test_nothing_stays_open_here_whether_it_lives_or_not(launcher: Launcher, qemu_binary: Path, tmp_path: Path) -> None:
    before = descriptors()
    process = launcher.spawn(qemu_binary)
    for path in (launcher.folder.qmp, launcher.folder.monitor, launcher.folder.serial):
        path.unlink()
    with pytest.raises(QemuFailed):
        launcher.spawn(tmp_path / "no-such-qemu")
    assert descriptors().keys() - before.keys() == {str(process.pidfd)}


@pytest.mark.parametrize(
    ("mode", "text", "reason"),
    [(0o644, "#!/bin/sh\n", "Permission denied"), (0o755, "#!/no/such/shell\n", "No such file or directory")],
)
def test_a_program_that_cannot_be_executed_is_named_with_the_reason(
    launcher: Launcher, tmp_path: Path, mode: int, text: str, reason: str
) -> None:
    binary = tmp_path / "qemu"
    binary.write_text(text)
    binary.chmod(mode)
    with pytest.raises(QemuFailed, match=f"cannot execute {binary}: {reason}"):
        launcher.spawn(binary)


def test_a_real_qemu_that_refuses_its_line_is_quoted(launcher: Launcher, qemu_binary: Path) -> None:
    wrong = WEB1.model_copy(update={"hvparams": WEB1.hvparams.model_copy(update={"machine_version": "pc-i440fx-0"})})
    process = launcher.spawn(qemu_binary, wrong)
    with pytest.raises(QemuFailed, match=r"QEMU ended \(exit code 1\); its log: .*unsupported machine type"):
        launcher.greet(process)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("sys.exit('no memory')", "QEMU ended (exit code 1); its log: no memory"),
        ("sys.exit(0)", "QEMU ended (exit code 0); its log: (empty)"),
        ("import os; os.kill(os.getpid(), 9)", "QEMU ended (signal 9); its log: (empty)"),
        ("listener.accept(); sys.exit('as soon as asked')", "QEMU ended (exit code 1); its log: as soon as asked"),
    ],
)
def test_a_qemu_that_ends_at_once_is_told_with_how_and_its_last_words(
    launcher: Launcher, fake: Callable[[str], Path], lines: str, words: str
) -> None:
    assert launcher.fails(fake(lines)) == words


@pytest.mark.parametrize("lines", ["time.sleep(600)", "connection, _ = listener.accept()\ntime.sleep(600)"])
def test_a_qemu_that_hangs_before_its_greeting_is_told_and_left_to_the_caller(
    launcher: Launcher, fake: Callable[[str], Path], lines: str
) -> None:
    process = launcher.spawn(fake(lines))
    with pytest.raises(QemuFailed, match=r"QEMU did not greet on its monitor within 0\.3 s"):
        launcher.greet(process, 0.3)
    assert process.identity.is_alive()


@pytest.mark.parametrize("said", ["HTTP/1.1 400 Bad Request\\r\\n\\r\\n", "[]\\n", "\\xff\\xfe\\n"])
def test_a_qemu_that_answers_garbage_does_not_speak_qmp(
    launcher: Launcher, fake: Callable[[str], Path], said: str
) -> None:
    program = fake(f"connection, _ = listener.accept()\nconnection.sendall(b'{said}')\ntime.sleep(600)")
    assert "what answers on QEMU's monitor does not speak QMP" in launcher.fails(program)


def test_who_waits_for_a_greeting_can_give_up(launcher: Launcher, fake: Callable[[str], Path]) -> None:
    class GiveUp(Exception):
        pass

    def check() -> None:
        raise GiveUp

    process = launcher.spawn(fake("time.sleep(600)"))
    with pytest.raises(GiveUp):
        launcher.greet(process, check=check)
    assert process.identity.is_alive()


def test_a_socket_that_cannot_be_made_leaves_no_other_one_open(launcher: Launcher) -> None:
    before = descriptors()
    launcher.folder.monitor.mkdir()
    with pytest.raises(OSError, match="in use"):
        Sockets.bind(launcher.folder, serial=True)
    assert descriptors() == before


@pytest.mark.parametrize(
    ("status", "words"), [(0, "exit code 0"), (1, "exit code 1"), (-9, "signal 9"), (None, "exit status unknown")]
)
def test_an_exit_status_is_said_in_words(status: int | None, words: str) -> None:
    assert describe_exit(status) == words
