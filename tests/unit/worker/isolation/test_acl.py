"""A uid's right to a file, given and taken back, seen by a process that has the uid and nothing else."""

from __future__ import annotations

import os
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.services import missing
from worker.isolation import acl

UID, OTHER = 3_900_000_100, 3_900_000_101


@pytest.fixture
def file(tmp_path: Path) -> Path:
    if os.geteuid() != 0:
        missing("Another uid", "needs root")
    made = tmp_path / "disk"
    made.write_bytes(b"x")
    made.chmod(0o640)
    tmp_path.chmod(0o711)
    return made


def rights(file: Path, uid: int) -> str:
    """What a process of ``uid`` may do with the file: ``r``, ``rw`` or nothing. It inherits the folder."""
    script = "(: <disk) && printf r; (: >>disk) && printf w; true"
    done = subprocess.run(
        ["/bin/sh", "-c", script],
        cwd=file.parent,
        user=uid,
        group=uid,
        extra_groups=[],
        capture_output=True,
        check=True,
    )
    return done.stdout.decode()


def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def test_a_uid_gets_just_the_right_it_is_given_and_nobody_else_does(file: Path) -> None:
    acl.grant(file, UID, write=True)
    assert (rights(file, UID), rights(file, OTHER)) == ("rw", "")
    acl.grant(file, UID, write=False)
    assert rights(file, UID) == "r"


@pytest.mark.parametrize("before", [0o600, 0o640, 0o644, 0o666, 0o400])
def test_the_file_is_afterwards_as_it_was(file: Path, before: int) -> None:
    file.chmod(before)
    acl.grant(file, UID, write=True)
    acl.grant(file, OTHER, write=False)
    assert acl.revoke(file, UID) and acl.revoke(file, OTHER)
    assert mode(file) == before
    assert os.listxattr(file) == []


def test_what_was_not_given_cannot_be_taken_and_nothing_changes(file: Path) -> None:
    assert not acl.revoke(file, UID)
    assert (mode(file), os.listxattr(file)) == (0o640, [])


def test_two_guests_share_a_disk_and_the_end_of_one_leaves_it_to_the_other(file: Path) -> None:
    acl.grant(file, UID, write=True)
    acl.grant(file, OTHER, write=True)
    acl.revoke(file, UID)
    assert (rights(file, UID), rights(file, OTHER)) == ("", "rw")


def test_the_owning_group_gets_no_more_than_it_had(file: Path) -> None:
    acl.grant(file, UID, write=True)
    entries = acl._read(file)
    assert entries[acl._GROUP, acl._NO_ID] == acl.READ


def test_many_at_once_lose_none_of_each_others_rights(file: Path) -> None:
    uids = range(UID, UID + 40)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda uid: acl.grant(file, uid, write=True), uids))
    assert {number for tag, number in acl._read(file) if tag == acl._USER} == {*uids}
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda uid: acl.revoke(file, uid), uids))
    assert mode(file) == 0o640


def test_a_file_system_without_access_lists_is_an_error() -> None:
    if os.geteuid() != 0:
        missing("Another uid", "needs root")
    with pytest.raises(OSError):
        acl.grant(Path("/proc/self/status"), UID, write=True)
