"""What is put aside is an archive that nothing can act from, whatever a broken-out guest has left."""

from __future__ import annotations

import os
import socket
import stat
import tarfile
from pathlib import Path

import pytest

from worker.isolation import quarantine
from worker.isolation.quarantine import put_aside


@pytest.fixture
def chroot(tmp_path: Path) -> Path:
    made = tmp_path / "chroot"
    made.mkdir()
    return made


def test_an_empty_folder_and_a_missing_one_are_nothing_to_put_aside(chroot: Path, tmp_path: Path) -> None:
    assert not put_aside(chroot, tmp_path / "q" / "a.tar")
    assert not put_aside(tmp_path / "none", tmp_path / "q" / "a.tar")
    assert not (tmp_path / "q").exists()


def test_everything_is_kept_as_what_it_is_and_nothing_is_opened_that_would_not_end(
    chroot: Path, tmp_path: Path
) -> None:
    (chroot / "sub").mkdir()
    (chroot / "sub" / "program").write_text("#!/bin/sh\n")
    (chroot / "sub" / "program").chmod(0o4755)
    (chroot / "passwd").symlink_to("/etc/passwd")
    (chroot / "again").hardlink_to(chroot / "sub" / "program")
    os.mkfifo(chroot / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(chroot)  # a socket's path is short
        listener.bind("socket")
        os.chdir("/")
    archive = tmp_path / "q" / "a.tar"
    assert put_aside(chroot, archive)
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    assert stat.S_IMODE(archive.parent.stat().st_mode) == 0o700
    with tarfile.open(archive) as tar:
        members = {member.name: member for member in tar}
        program = next(name for name in ("again", "sub/program") if members[name].isreg())
        content = tar.extractfile(program)
        assert content and content.read() == b"#!/bin/sh\n"
    assert {*members} == {"sub", "sub/program", "passwd", "again", "pipe"}
    assert members[program].mode == 0o4755
    assert members["passwd"].issym() and members["passwd"].linkname == "/etc/passwd"
    assert members["pipe"].isfifo()


def test_of_a_file_without_end_the_beginning_is_kept(
    chroot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "PART_MAX_BYTES", 5)
    with (chroot / "large").open("wb") as large:
        large.write(b"0123456789")
        large.truncate(2**40)
    archive = tmp_path / "a.tar"
    assert put_aside(chroot, archive)
    with tarfile.open(archive) as tar:
        content = tar.extractfile("large")
        assert content and content.read() == b"01234"
        assert tar.getmember("large").pax_headers["HOSTLER.size"] == str(2**40)


def test_what_cannot_be_archived_leaves_no_half_archive(
    chroot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (chroot / "file").write_text("x")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quarantine, "_add", full)
    with pytest.raises(OSError):
        put_aside(chroot, tmp_path / "q" / "a.tar")
    assert [*(tmp_path / "q").iterdir()] == []
    assert (chroot / "file").exists()
