"""Backups of real disks: of one moment, whole or not there at all."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hostler.errors import OperationFailed
from tests.nodes import TestNode, tiny_instance, until
from tests.services import missing
from worker.kvm import images

pytestmark = pytest.mark.node
DISK_MIB = 8
LARGE_MIB = 256


@pytest.fixture(autouse=True)
def _qemu_img() -> None:
    try:
        images.find()
    except Exception as exc:
        missing("qemu-img", str(exc))


def instance(folder: Path, name: str, size_mib: int = DISK_MIB, **more: Any) -> dict[str, Any]:
    """A guest with a disk that is full of content, and an empty one."""
    made = tiny_instance(folder, name, **more)
    with Path(made["disks"][0]["path"]).open("r+b") as disk:
        for place in range(1, size_mib):
            disk.seek(place * 2**20)
            disk.write(bytes([place % 255 + 1]) * 2**20)
    second = folder / f"{name}-2.qcow2"
    images.create(str(second), "qcow2", DISK_MIB * 2**20)
    made["disks"].append({"path": str(second), "format": "qcow2"})
    return made


def same(one: str, one_format: str, other: str, other_format: str) -> bool:
    command = ["qemu-img", "compare", "-U", "-f", one_format, "-F", other_format, one, other]
    return subprocess.run(command, capture_output=True).returncode == 0


def throttle(n1: TestNode, name: str, mib_per_s: int) -> None:
    """Let the copying be slow, as storage is: only QEMU's own jobs are."""
    for disk in ("0", "1"):
        n1.monitor(name, f"block_job_set_speed backup-{disk} {mib_per_s}")


def nothing_is_left_in(n1: TestNode, folder: Path, name: str | None = None) -> None:
    assert list(folder.iterdir()) == []
    if name:
        assert "No active jobs" in n1.monitor(name, "info block-jobs")
        assert "backup-" not in n1.monitor(name, "info block -n")


def slow_backup(n1: TestNode, web1: dict[str, Any], folder: Path) -> Any:
    """A backup that is at work and will be for long."""
    job = n1.send("instance.backup", name=web1["name"], target_dir=str(folder))
    until(lambda: "Type backup" in n1.monitor(web1["name"], "info block-jobs"), what="QEMU copies")
    throttle(n1, web1["name"], 1)
    return job


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "to"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_a_backup_of_a_running_guest_is_its_disks_at_the_beginning_while_writes_go_on(
    n1: TestNode, tmp_path: Path, target: Path, format: str
) -> None:
    web1 = instance(tmp_path, "web1", LARGE_MIB)
    raw, second = (disk["path"] for disk in web1["disks"])
    n1.start(web1)
    for command in ("write -P 0x11 0 64k", "flush"):
        n1.monitor("web1", f'qemu-io -d disk1-device "{command}"')
    seen: list[dict[str, Any]] = []
    for source, kind, name in ((raw, "raw", "a"), (second, "qcow2", "b")):
        command = ["qemu-img", "convert", "-U", "-f", kind, "-O", "raw", source, str(tmp_path / name)]
        subprocess.run(command, check=True)
    job = n1.send("instance.backup", name="web1", target_dir=str(target), format=format)
    until(lambda: "Type backup" in n1.monitor("web1", "info block-jobs") or job.state == "SUCCESS")
    throttle(n1, "web1", 1)
    for disk in (0, 1):
        n1.monitor("web1", f'qemu-io -d disk{disk}-device "write -P 0xee 3M 1M"')
    n1.monitor("web1", f'qemu-io -d disk0-device "write -P 0xee {LARGE_MIB - 2}M 1M"')
    throttle(n1, "web1", 0)
    result = job.wait(60, seen.append)
    assert result["how"] == "live" and result["consistent_at"]
    assert [file["path"] for file in result["files"]] == [str(target / f"web1.disk{n}.{format}") for n in (0, 1)]
    for file, before in zip(result["files"], ("a", "b"), strict=True):
        assert same(file["path"], format, str(tmp_path / before), "raw")
        assert Path(file["path"]).stat().st_mode & 0o777 == 0o600
    assert not same(result["files"][0]["path"], format, raw, "raw")
    assert format == "raw" or result["files"][1]["allocated_bytes"] < 2**20
    percents = [meta["percent"] for meta in seen]
    assert percents == sorted(percents)
    assert sorted(path.name for path in target.iterdir()) == [f"web1.disk{n}.{format}" for n in (0, 1)]
    assert "backup-" not in n1.monitor("web1", "info block -n")
    assert n1.do("node.audit")["findings"] == []


def test_a_backup_of_a_stopped_instance_is_its_disks(n1: TestNode, tmp_path: Path, target: Path) -> None:
    web1 = instance(tmp_path, "web2")
    n1.start(web1, paused=True)
    n1.do("instance.stop", name="web2", force=True)
    said = n1.cli("backup", "web2", "--to", str(target), "--format", "raw")
    assert said.returncode == 0 and "stopped" in said.stdout, said
    for number, disk in enumerate(web1["disks"]):
        assert same(str(target / f"web2.disk{number}.raw"), "raw", disk["path"], disk.get("format", "raw"))


def test_a_snapshot_and_what_was_written_after_it_are_both_in_a_backup(
    n1: TestNode, tmp_path: Path, target: Path
) -> None:
    web1 = instance(tmp_path, "web3")
    n1.start(web1, paused=True)
    n1.do("snapshot.create", name="web3", snapshot="s1")
    n1.monitor("web3", 'qemu-io -d disk0-device "write -P 0x77 2M 64k"')
    chosen = [str(target / "a"), str(target / "b, c")]
    result = n1.do("instance.backup", name="web3", targets=chosen)
    assert [file["path"] for file in result["files"]] == chosen
    n1.do("instance.stop", name="web3", force=True)
    top = f"{web1['disks'][0]['path']}.s1.qcow2"
    assert result["files"][0]["disk"] == top
    assert same(chosen[0], "qcow2", top, "qcow2")
    assert not same(chosen[0], "qcow2", web1["disks"][0]["path"], "raw")


def test_a_cancelled_backup_leaves_no_file_and_no_job_in_qemu(n1: TestNode, tmp_path: Path, target: Path) -> None:
    web1 = instance(tmp_path, "web4", LARGE_MIB)
    n1.start(web1)
    job = slow_backup(n1, web1, target)
    reported = until(lambda: job.progress if "MiB" in str((job.progress or {}).get("message")) else None)
    assert reported["phase"] == "copy" and f"of {LARGE_MIB + DISK_MIB} MiB" in reported["message"]
    job.cancel()
    with pytest.raises(OperationFailed, match="CANCELLED"):
        job.wait(30)
    nothing_is_left_in(n1, target, "web4")
    assert n1.info("web4")["state"] == "running"


def test_a_worker_killed_at_work_on_a_backup_begins_it_anew_and_leaves_nothing_else(
    n1: TestNode, tmp_path: Path, target: Path
) -> None:
    web1 = instance(tmp_path, "web5", LARGE_MIB)
    n1.start(web1, paused=True)
    job = slow_backup(n1, web1, target)
    n1.kill_worker(signal.SIGKILL)
    assert [path.suffix for path in target.iterdir()] == [".part"] * 2
    n1.start_worker()
    result = job.wait(60)
    assert same(result["files"][0]["path"], "qcow2", web1["disks"][0]["path"], "raw")
    assert sorted(path.name for path in target.iterdir()) == ["web5.disk0.qcow2", "web5.disk1.qcow2"]
    assert "No active jobs" in n1.monitor("web5", "info block-jobs")


def test_a_guest_that_ends_in_mid_backup_is_backed_up_stopped(n1: TestNode, tmp_path: Path, target: Path) -> None:
    web1 = instance(tmp_path, "web6", LARGE_MIB)
    n1.start(web1, paused=True)
    job = slow_backup(n1, web1, target)
    os.kill(n1.pid("web6"), signal.SIGKILL)
    result = job.wait(60)
    assert result["how"] == "stopped"
    assert same(result["files"][0]["path"], "qcow2", web1["disks"][0]["path"], "raw")


def test_a_backup_with_no_room_for_it_fails_and_leaves_nothing(n1: TestNode, tmp_path: Path, target: Path) -> None:
    if os.geteuid():
        missing("A small file system", "needs root")
    web1 = instance(tmp_path, "web7", 64)
    n1.start(web1)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(target)], capture_output=True)
    if mounted.returncode:
        missing("A small file system", mounted.stderr.decode())
    try:
        failure = n1.failure("instance.backup", name="web7", target_dir=str(target))
        assert failure.code == "QEMU_FAILED" and "No space left" in str(failure)
        nothing_is_left_in(n1, target, "web7")
        n1.do("instance.stop", name="web7", force=True)
        failure = n1.failure("instance.backup", name="web7", target_dir=str(target))
        assert failure.code == "QEMU_FAILED" and "No space left" in str(failure)
        nothing_is_left_in(n1, target)
    finally:
        subprocess.run(["umount", str(target)], check=True)


def test_what_cannot_be_is_refused_and_nothing_is_overwritten(n1: TestNode, tmp_path: Path, target: Path) -> None:
    web1 = instance(tmp_path, "web8")
    n1.start(web1, paused=True)
    (target / "web8.disk1.qcow2").write_text("precious")
    for arguments, field in (
        ({"target_dir": str(target)}, "target_dir"),
        ({"target_dir": str(target / "no")}, "target_dir"),
        ({"targets": [str(target / "a")]}, "targets"),
        ({"targets": [str(target / "a"), str(target / "web8.disk1.qcow2")]}, "targets[1]"),
        ({"targets": [str(target / "a"), str(target / "a")]}, "targets"),
        ({}, "target_dir"),
        ({"target_dir": "to"}, "target_dir"),
    ):
        failure = n1.failure("instance.backup", name="web8", **arguments)
        assert {error["field"] for error in failure.details["errors"]} == {field}, failure
    assert [(path.name, path.read_text()) for path in target.iterdir()] == [("web8.disk1.qcow2", "precious")]
