"""A guest's folder: who may enter it, and what is read back from what QEMU left there."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostler.settings import DIR_MAX
from worker.kvm.folder import GuestFolder

UUID = "0a4c5b0e-2f6d-4d0e-9a53-6f1d5f3f7a11"


@pytest.fixture
def run_dir() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="hst-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def folder(run_dir: Path) -> GuestFolder:
    made = GuestFolder.of(run_dir, UUID)
    made.create()
    return made


def test_a_guests_folder_is_its_owners_alone_and_new_each_time(run_dir: Path) -> None:
    folder = GuestFolder.of(run_dir, UUID)
    folder.create()
    assert folder.path == run_dir / "guests" / UUID
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    with pytest.raises(FileExistsError):
        folder.create()


def test_a_socket_is_its_owners_alone_and_takes_connections(folder: GuestFolder) -> None:
    with folder.listen(folder.qmp) as listener, socket.socket(socket.AF_UNIX) as client:
        assert stat.S_IMODE(folder.qmp.stat().st_mode) == 0o600
        assert not listener.get_inheritable()
        client.connect(str(folder.qmp))
    with pytest.raises(OSError, match="in use"):
        folder.listen(folder.qmp)


def test_the_longest_run_folder_the_settings_allow_still_holds_every_socket(run_dir: Path) -> None:
    longest = run_dir / ("d" * (DIR_MAX - len(str(run_dir)) - 1))
    folder = GuestFolder.of(longest, UUID)
    folder.create()
    for path in (folder.qmp, folder.monitor, folder.serial):
        folder.listen(path).close()


def test_a_file_cut_while_qemu_writes_it_goes_on_at_its_new_end(folder: GuestFolder) -> None:
    fd = folder.open_for_append(folder.journal)
    try:
        os.write(fd, b"x" * 1000)
        folder.trim_journal(limit_bytes=1000)
        assert folder.journal.stat().st_size == 1000
        folder.trim_journal(limit_bytes=999)
        os.write(fd, b"new")
    finally:
        os.close(fd)
    assert folder.journal.read_bytes() == b"new"
    assert stat.S_IMODE(folder.journal.stat().st_mode) == 0o600
    assert not folder.log.exists()


def test_the_last_event_of_a_name_is_found_whatever_stands_around_it(folder: GuestFolder) -> None:
    events = [
        {"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-reset"}},
        {"event": "STOP"},
        {"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-shutdown"}},
        {"event": "RESUME"},
    ]
    noise = [b"", b"5", b"[]", b'"SHUTDOWN"', b"null", b"\xff\xfe", b'{"return": {}}', b"{" * 5000, b'{"event": "SHU']
    lines = [line for event in events for line in (*noise, json.dumps(event).encode())]
    folder.journal.write_bytes(b"\r\n".join([*lines, *noise]))
    assert folder.last_event("SHUTDOWN") == events[2]
    assert folder.last_event("STOP") == events[1]
    assert folder.last_event("GUEST_PANICKED") is None


def test_a_guest_without_a_journal_or_log_said_nothing(folder: GuestFolder) -> None:
    assert folder.last_event("SHUTDOWN") is None
    assert folder.log_tail() == ""
    folder.trim_journal()
    folder.journal.write_bytes(b"")
    assert folder.last_event("SHUTDOWN") is None


def test_the_end_of_the_log_is_text_that_any_database_can_keep(folder: GuestFolder) -> None:
    folder.log.write_bytes(b"early\n" + b"x" * 3000 + b"\nqemu: caf\xc3\xa9 \xff\0 broke\n\n")
    tail = folder.log_tail()
    assert tail.endswith("\nqemu: café \N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER} broke")
    assert "early" not in tail
    assert len(tail) <= 2000


def test_removing_takes_all_of_it_and_says_whether_there_was_any(folder: GuestFolder) -> None:
    folder.listen(folder.qmp).close()
    folder.log.write_text("x")
    assert folder.remove() is True
    assert not folder.path.exists()
    assert folder.path.parent.is_dir()
    assert folder.remove() is False
