"""Snapshots of real disks: what a guest wrote before and after, seen through QEMU and in the files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from models import DiskLease, Runtime
from tests.nodes import TestNode, tiny_instance, until
from tests.services import missing
from worker.kvm import images

pytestmark = pytest.mark.node
DISK_MIB = 4
AT = 1024 * 1024
"""Where the tests write: behind the guest's boot sector."""


@pytest.fixture(autouse=True)
def _qemu_img() -> None:
    try:
        images.find()
    except Exception as exc:
        missing("qemu-img", str(exc))


@pytest.fixture
def web1(n1: TestNode, request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """An instance with a raw disk and a qcow2 disk, not started; its name is the test's own."""
    name = f"g{abs(hash(request.node.name)) % 10**9}"
    return two_disks(tmp_path, name)


def two_disks(folder: Path, name: str) -> dict[str, Any]:
    instance = tiny_instance(folder, name)
    raw = Path(instance["disks"][0]["path"])
    os.truncate(raw, DISK_MIB * 2**20)
    qcow2 = folder / f"{name}, data.qcow2"
    images.create(str(qcow2), "qcow2", DISK_MIB * 2**20)
    instance["disks"].append({"path": str(qcow2), "format": "qcow2"})
    return instance


def io(n1: TestNode, name: str, disk: int, command: str) -> str:
    """Write and read as the guest would, through its disk's device."""
    said = n1.monitor(name, f'qemu-io -d disk{disk}-device "{command}"')
    assert "fail" not in said.lower() and "error" not in said.lower(), said
    return said


def write(n1: TestNode, name: str, byte: int) -> None:
    for disk in (0, 1):
        io(n1, name, disk, f"write -P {byte} {AT} 64k")


def reads(n1: TestNode, name: str, byte: int) -> bool:
    for disk in (0, 1):
        io(n1, name, disk, f"read -P {byte} {AT} 64k")
    return True


def content(path: str, format: str) -> int:
    """The byte at the place where tests write, of a disk that is not open."""
    for byte in (0, *range(0x11, 0x100, 0x11)):
        done = subprocess.run(
            ["qemu-io", "-U", "-r", "-f", format, "-c", f"read -P {byte} {AT} 64k", path],
            capture_output=True,
            text=True,
        )
        if "verification failed" not in done.stdout and done.returncode == 0:
            return byte
    raise AssertionError(f"{path}: {done.stdout}{done.stderr}")


def disks(n1: TestNode, name: str) -> list[tuple[str, str]]:
    row = n1.row(name)
    assert row
    return [(disk["path"], disk["format"]) for disk in row.spec["disks"]]


def leases(n1: TestNode, name: str) -> dict[str, bool]:
    """The files an instance has, and whether only for reading."""
    with n1.reading() as session:
        found = session.scalars(select(DiskLease).where(DiskLease.instance_name == name)).all()
        return {lease.path: lease.read_only for lease in found}


def overlay(base: str, snapshot: str) -> str:
    return f"{base}.{snapshot}.qcow2"


@pytest.fixture
def paths(web1: dict[str, Any]) -> list[str]:
    return [disk["path"] for disk in web1["disks"]]


@pytest.fixture
def stopped(n1: TestNode, web1: dict[str, Any]) -> Iterator[str]:
    """The instance, known to the node and stopped."""
    n1.start(web1, paused=True)
    write(n1, web1["name"], 0x11)
    n1.do("instance.stop", name=web1["name"], force=True)
    yield web1["name"]


def test_a_running_guests_writes_after_a_snapshot_do_not_touch_it_and_its_revert_brings_the_old_content_back(
    n1: TestNode, web1: dict[str, Any], paths: list[str]
) -> None:
    name = web1["name"]
    n1.start(web1)
    write(n1, name, 0x11)
    made = n1.do("snapshot.create", name=name, snapshot="s1")
    assert (made["snapshot"], made["state"]) == ("s1", "ready")
    assert [disk["base"] for disk in made["disks"]] == paths
    assert n1.info(name)["state"] == "running"
    write(n1, name, 0x22)
    tops = [overlay(path, "s1") for path in paths]
    assert disks(n1, name) == [(top, "qcow2") for top in tops]
    assert leases(n1, name) == dict.fromkeys(tops, False) | dict.fromkeys(paths, True)
    with n1.reading() as session:
        assert [disk["path"] for disk in session.get_one(Runtime, (name, n1.name)).hardware["disks"]] == tops
    assert n1.failure("snapshot.revert", name=name, snapshot="s1").code == "ALREADY_RUNNING"
    assert n1.do("instance.reboot", name=name, mode="hard")["state"] == "running"
    assert reads(n1, name, 0x22)
    assert leases(n1, name) == dict.fromkeys(tops, False) | dict.fromkeys(paths, True)
    assert n1.do("node.audit")["findings"] == []
    n1.do("instance.stop", name=name, force=True)
    assert [content(paths[0], "raw"), content(paths[1], "qcow2")] == [0x11, 0x11]
    n1.do("snapshot.revert", name=name, snapshot="s1")
    assert [content(top, "qcow2") for top in tops] == [0x11, 0x11]
    n1.do("instance.restart", name=name)
    assert reads(n1, name, 0x11)
    assert [each["snapshot"] for each in n1.do("snapshot.list", name=name)] == ["s1"]


@pytest.mark.parametrize("order", [("s1", "s2"), ("s2", "s1")])
@pytest.mark.parametrize("live", [True, False], ids=["live", "stopped"])
def test_deleting_snapshots_merges_what_was_written_after_them(
    n1: TestNode, web1: dict[str, Any], paths: list[str], order: tuple[str, str], live: bool
) -> None:
    name = web1["name"]
    n1.start(web1)
    write(n1, name, 0x11)
    n1.do("snapshot.create", name=name, snapshot="s1")
    write(n1, name, 0x22)
    n1.do("snapshot.create", name=name, snapshot="s2")
    assert disks(n1, name) == [(overlay(path, "s2"), "qcow2") for path in paths]
    for disk in (0, 1):
        io(n1, name, disk, f"write -P 0x33 {2 * AT} 64k")
    if not live:
        n1.do("instance.stop", name=name, force=True)
    for number, snapshot in enumerate(order):
        n1.do("snapshot.delete", name=name, snapshot=snapshot)
        assert not any(Path(overlay(path, snapshot)).exists() for path in paths)
        if not number:
            kept = n1.do("snapshot.list", name=name)
            assert [each["snapshot"] for each in kept] == [order[1]]
            assert [disk["base"] for disk in kept[0]["disks"]] == paths
            assert disks(n1, name) == [(overlay(path, order[1]), "qcow2") for path in paths]
    assert disks(n1, name) == [(paths[0], "raw"), (paths[1], "qcow2")]
    if live:
        assert n1.info(name)["state"] == "running"
        assert leases(n1, name) == dict.fromkeys(paths, False)
        assert reads(n1, name, 0x22)
        assert not [node for node in n1.monitor(name, "info block -n").split() if node.startswith("snapshot-")]
        assert "No active jobs" in n1.monitor(name, "info block-jobs")
        write(n1, name, 0x44)
        n1.do("instance.stop", name=name, force=True)
        assert [content(paths[0], "raw"), content(paths[1], "qcow2")] == [0x44, 0x44]
    n1.do("instance.start", instance=web1, paused=True)
    for disk in (0, 1):
        io(n1, name, disk, f"read -P 0x33 {2 * AT} 64k")


def test_a_guest_that_was_paused_stays_paused_when_a_snapshot_is_taken_and_deleted(
    n1: TestNode, web1: dict[str, Any]
) -> None:
    name = web1["name"]
    n1.start(web1, paused=True)
    n1.do("snapshot.create", name=name, snapshot="s1")
    write(n1, name, 0x22)
    n1.do("snapshot.delete", name=name, snapshot="s1")
    assert n1.info(name)["state"] == "paused"
    assert reads(n1, name, 0x22)


def test_a_stopped_instance_can_have_snapshots_too_and_only_the_latest_is_reverted_to(
    n1: TestNode, stopped: str, paths: list[str]
) -> None:
    for snapshot in ("s1", "s2"):
        assert n1.do("snapshot.create", name=stopped, snapshot=snapshot)["state"] == "ready"
    failure = n1.failure("snapshot.revert", name=stopped, snapshot="s1")
    assert failure.code == "INVALID_ARGUMENT" and "s2 were taken later" in str(failure)
    n1.do("snapshot.revert", name=stopped, snapshot="s2")
    assert [content(overlay(path, "s2"), "qcow2") for path in paths] == [0x11, 0x11]


def test_a_start_with_a_disk_that_snapshots_rest_on_is_refused_and_told_what_the_disk_is_now(
    n1: TestNode, stopped: str, web1: dict[str, Any], paths: list[str]
) -> None:
    n1.do("snapshot.create", name=stopped, snapshot="s1")
    before = [Path(path).read_bytes() for path in paths]
    failure = n1.failure("instance.start", instance=web1)
    errors = failure.details["errors"]
    assert [error["field"] for error in errors] == ["instance.disks[0].path", "instance.disks[1].path"]
    assert overlay(paths[0], "s1") in errors[0]["reason"]
    link = Path(f"{paths[0]}.link")
    link.symlink_to(paths[0])
    linked = web1 | {"disks": [{"path": str(link)}]}
    assert n1.failure("instance.start", instance=linked).details["errors"][0]["field"] == "instance.disks[0].path"
    as_raw = web1 | {"disks": [{"path": overlay(paths[0], "s1")}]}
    assert n1.failure("instance.start", instance=as_raw).details["errors"][0]["field"] == "instance.disks[0].format"
    assert [Path(path).read_bytes() for path in paths] == before
    right = web1 | {"disks": [{"path": overlay(path, "s1"), "format": "qcow2"} for path in paths]}
    n1.start(right, paused=True)
    assert reads(n1, stopped, 0x11)


def test_another_instance_can_read_a_base_of_a_running_guest_and_not_write_to_it(
    n1: TestNode, web1: dict[str, Any], paths: list[str], tmp_path: Path
) -> None:
    name = web1["name"]
    n1.start(web1, paused=True)
    n1.do("snapshot.create", name=name, snapshot="s1")
    other = tiny_instance(tmp_path, f"{name}-b", disks=[{"path": paths[0]}])
    failure = n1.failure("instance.start", instance=other)
    assert f"in use by instance {name}" in failure.details["errors"][0]["reason"]
    reader = other | {"disks": [{"path": paths[0], "mode": "ro"}], "hvparams": {"kvm_flag": "disabled"}}
    n1.start(reader, paused=True)
    failure = n1.failure("snapshot.delete", name=name, snapshot="s1")
    assert failure.code == "INVALID_ARGUMENT" and f"instance {name}-b has it open" in str(failure)
    n1.do("instance.stop", name=f"{name}-b", force=True)
    n1.do("snapshot.delete", name=name, snapshot="s1")


def test_what_cannot_be_is_refused_before_anything_is_made(
    n1: TestNode, stopped: str, web1: dict[str, Any], paths: list[str]
) -> None:
    folder = Path(paths[0]).parent
    Path(overlay(paths[1], "taken")).write_text("somebody's")
    before = sorted(folder.iterdir())
    for task, snapshot in (("create", "taken"), ("create", "../x"), ("revert", "none"), ("delete", "none")):
        failure = n1.failure(f"snapshot.{task}", name=stopped, snapshot=snapshot)
        assert [error["field"] for error in failure.details["errors"]] == ["snapshot"], failure
    assert n1.failure("snapshot.create", name="nobody", snapshot="s").code == "UNKNOWN_INSTANCE"
    n1.start(web1 | {"disks": [web1["disks"][0] | {"shared": True}]}, paused=True)
    assert n1.failure("snapshot.create", name=stopped, snapshot="s1").code == "UNSUPPORTED"
    assert sorted(folder.iterdir()) == before
    assert n1.do("snapshot.list", name=stopped) == []


def test_a_snapshot_that_qemu_refuses_leaves_nothing_of_it(
    n1: TestNode, web1: dict[str, Any], paths: list[str]
) -> None:
    name = web1["name"]
    n1.start(web1, paused=True)
    # The first snapshot of this database's next number: QEMU has a node of that name already.
    for number in range(1, 60):
        n1.monitor(name, f"drive_add 0 if=none,node-name=snapshot-{number}-1,driver=null-co")
    failure = n1.failure("snapshot.create", name=name, snapshot="s1")
    assert failure.code == "QEMU_FAILED", failure
    assert disks(n1, name) == [(paths[0], "raw"), (paths[1], "qcow2")]
    assert leases(n1, name) == dict.fromkeys(paths, False)
    assert not any(Path(overlay(path, "s1")).exists() for path in paths)
    assert n1.do("snapshot.list", name=name) == []
    write(n1, name, 0x22)


@pytest.mark.parametrize("phase", ["snapshot", "merge"])
def test_a_worker_killed_at_work_on_a_snapshot_loses_no_write(
    n1: TestNode, web1: dict[str, Any], paths: list[str], phase: str
) -> None:
    name = web1["name"]
    n1.start(web1)
    write(n1, name, 0x11)
    task = "snapshot.create"
    if phase == "merge":
        n1.do("snapshot.create", name=name, snapshot="s1")
        write(n1, name, 0x22)
        task = "snapshot.delete"
    job = n1.send(task, name=name, snapshot="s1")
    until(lambda: (job.progress and job.progress.get("phase") == phase) or job.state == "SUCCESS")
    n1.kill_worker(signal.SIGKILL)
    byte = 0x22 if phase == "merge" else 0x11
    assert reads(n1, name, byte)
    n1.start_worker()
    job.wait(30)
    assert n1.info(name)["state"] == "running"
    assert reads(n1, name, byte)
    n1.do("instance.stop", name=name, force=True)
    assert all(content(*disk) == byte for disk in disks(n1, name))
    expected = [] if phase == "merge" else ["s1"]
    assert [each["snapshot"] for each in n1.do("snapshot.list", name=name)] == expected
    assert all(Path(overlay(path, "s1")).exists() == bool(expected) for path in paths)


def test_the_commands_take_list_revert_and_delete_snapshots(n1: TestNode, stopped: str) -> None:
    assert f"snapshot s1 of {stopped} is ready" in n1.cli("snapshot", "create", stopped, "s1").stdout
    assert json.loads(n1.cli("snapshot", "list", stopped, "--json").stdout)[0]["snapshot"] == "s1"
    assert "ready" in n1.cli("snapshot", "list", stopped).stdout
    assert n1.cli("snapshot", "revert", stopped, "s1").returncode == 0
    assert "is deleted" in n1.cli("snapshot", "delete", stopped, "s1").stdout
    assert "No snapshots." in n1.cli("snapshot", "list", stopped).stdout
