"""Guests whose QEMU may open no files are changed all the same: it is handed descriptors of what it needs, no more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, select

from models import DiskLease, Snapshot, UidLease
from tests.nodes import TestNode, tiny_instance, until
from tests.services import missing
from worker.kvm import images

pytestmark = pytest.mark.node

MIB = 2**20
FIRST = 2_000_000_000 + 100 * os.getpid()
"""A uid without a login, which no process of the host has but a guest of this test process."""
SCSI = {"disk_type": "virtio-scsi", "cdrom_drive": True}
POOL = {"security_model": "pool"}
CHROOT = {"use_chroot": True}
MODELS = [CHROOT, POOL, POOL | CHROOT]
confined = pytest.mark.parametrize("model", MODELS, ids=["chroot", "pool", "pool and chroot"])


@pytest.fixture(scope="module", autouse=True)
def _root() -> None:
    if os.geteuid() != 0:
        missing("Other uids", "needs root")


@pytest.fixture
def n1(n1: TestNode) -> Iterator[TestNode]:
    n1.do("uid_pool.add", ranges=f"{FIRST}-{FIRST + 3}")
    yield n1
    n1.end_guests()
    n1.do("uid_pool.remove", ranges=f"{FIRST}-{FIRST + 3}")
    with n1.database().transaction() as session:
        for table in (UidLease, Snapshot):
            session.execute(delete(table))
    for path in [*n1.root.glob("web1*"), *n1.root.glob("extra*")]:
        path.unlink()


def start(n1: TestNode, model: dict[str, Any]) -> str:
    """The path of its disk, which nobody but root may open."""
    built = tiny_instance(n1.root, hvparams=SCSI | model)
    Path(built["disks"][0]["path"]).chmod(0o600)
    return str(n1.start(built)["disks"][0]["path"])


def file(n1: TestNode, name: str = "extra,=1.img", content: bytes = b"") -> str:
    path = n1.root / name
    path.write_bytes(content.ljust(4 * MIB, b"\0"))
    path.chmod(0o600)
    return str(path)


def overlay(n1: TestNode, name: str, base: str, base_format: str) -> str:
    path = str(n1.root / name)
    images.create_overlay(path, base, base_format)
    return path


def is_well(n1: TestNode, *paths: str) -> None:
    """Insist that the guest runs, with these disks and CDs on record and leased, and that the audit finds nothing."""
    row = n1.row("web1")
    assert row and row.runtime
    has = [disk["path"] for disk in row.spec["disks"]] + [row.spec["hvparams"]["cdrom_image_path"]]
    assert [path for path in has if path] == [*paths]
    with n1.reading() as session:
        assert {*session.scalars(select(DiskLease.path))} >= {*paths}
    assert n1.do("node.audit")["findings"] == []
    with n1.serial("web1") as serial:
        assert serial.tick() < serial.tick()


def opened(n1: TestNode) -> list[str]:
    """The files below the node's folder that QEMU has open for the guest."""
    found = set()
    for link in Path(f"/proc/{n1.pid('web1')}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.add(str(link.readlink()))
    return sorted(Path(link).name for link in found if link.startswith(f"{n1.root}/") and "/run/" not in link)


def may_write(n1: TestNode, path: str) -> bool:
    """Whether one of QEMU's descriptors of a file is writable."""
    folder = Path(f"/proc/{n1.pid('web1')}")
    fds = [link.name for link in (folder / "fd").iterdir() if str(link.readlink()) == path]
    flags = [(folder / "fdinfo" / fd).read_text().split("flags:\t")[1].split()[0] for fd in fds]
    return any(int(each, 8) & os.O_ACCMODE == os.O_RDWR for each in flags)


def roms(n1: TestNode) -> list[tuple[str, str]]:
    """The cards' ROMs by their places, with their sizes; a guest cannot be moved to a QEMU where they differ."""
    lines = [line.split() for line in n1.monitor("web1", "info ramblock").splitlines() if "virtio-net-pci.rom" in line]
    return [(line[0], line[-1]) for line in lines]


@confined
def test_disks_come_grow_and_go_and_a_reboot_finds_them(n1: TestNode, model: dict[str, Any]) -> None:
    boot, disk, golden = start(n1, model), file(n1), file(n1, "extra-golden.img")
    top = overlay(n1, "extra-top.qcow2", golden, "raw")
    n1.do("instance.disk_add", name="web1", disk={"path": disk})
    n1.do("instance.disk_add", name="web1", disk={"path": top, "format": "qcow2"})
    is_well(n1, boot, disk, top)
    assert may_write(n1, top) and not may_write(n1, golden)
    n1.do("instance.disk_resize", name="web1", path=disk, size_mib=6)
    assert Path(disk).stat().st_size == 6 * MIB
    n1.do("instance.reboot", name="web1", mode="hard")
    is_well(n1, boot, disk, top)
    n1.do("instance.disk_remove", name="web1", path=disk)
    n1.do("instance.disk_add", name="web1", disk={"path": disk, "mode": "ro"})
    assert not may_write(n1, disk)
    is_well(n1, boot, top, disk)
    n1.do("instance.disk_remove", name="web1", path=disk)
    n1.do("instance.disk_remove", name="web1", path=top)
    is_well(n1, boot)
    until(lambda: opened(n1) == ["web1.img"], what="nothing else is open")


@confined
def test_a_disk_that_qemu_refuses_leaves_no_descriptor(n1: TestNode, model: dict[str, Any]) -> None:
    boot, disk = start(n1, model), file(n1)
    failed = n1.failure("instance.disk_add", name="web1", disk={"path": disk, "format": "qcow2"})
    assert (failed.code, "not in qcow2 format" in failed.message) == ("QEMU_FAILED", True)
    is_well(n1, boot)
    assert opened(n1) == ["web1.img"]


@confined
def test_cds_come_and_go(n1: TestNode, model: dict[str, Any]) -> None:
    boot, first, second = start(n1, model), file(n1, "extra1.iso"), file(n1, "extra2.iso")
    for cd in (first, second):
        n1.do("instance.cd_insert", name="web1", path=cd)
        is_well(n1, boot, cd)
        assert opened(n1) == [Path(cd).name, "web1.img"]
        assert not may_write(n1, cd)
    n1.do("instance.reboot", name="web1", mode="hard")
    is_well(n1, boot, second)
    n1.do("instance.cd_eject", name="web1")
    is_well(n1, boot)
    assert opened(n1) == ["web1.img"]


@confined
def test_cards_come_and_go(n1: TestNode, model: dict[str, Any]) -> None:
    boot, nic = start(n1, model), {"mac": "52:54:00:00:00:41", "mode": "user"}
    assert [each["mac"] for each in n1.do("instance.nic_add", name="web1", nic=nic)["nics"]] == [nic["mac"]]
    is_well(n1, boot)
    before = roms(n1)
    n1.do("instance.reboot", name="web1", mode="hard")
    is_well(n1, boot)
    assert roms(n1) == before
    n1.monitor("web1", "device_del nic0")
    n1.monitor("web1", "system_reset")
    assert n1.do("instance.nic_remove", name="web1", mac=nic["mac"])["nics"] == []
    is_well(n1, boot)


@confined
def test_a_snapshot_is_taken_and_given_up_while_the_guest_runs(n1: TestNode, model: dict[str, Any]) -> None:
    boot, disk = start(n1, model), file(n1)
    n1.do("instance.disk_add", name="web1", disk={"path": disk})
    for name in ("s1", "s2"):
        n1.do("snapshot.create", name="web1", snapshot=name)
    is_well(n1, f"{boot}.s2.qcow2", f"{disk}.s2.qcow2")
    n1.do("snapshot.delete", name="web1", snapshot="s1")
    is_well(n1, f"{boot}.s2.qcow2", f"{disk}.s2.qcow2")
    assert images.backing_file(f"{disk}.s2.qcow2") == (disk, "raw")
    n1.do("snapshot.delete", name="web1", snapshot="s2")
    is_well(n1, boot, disk)
    assert n1.do("snapshot.list", name="web1") == []
    assert opened(n1) == ["extra,=1.img", "web1.img"]
    n1.do("instance.reboot", name="web1", mode="hard")
    is_well(n1, boot, disk)


@confined
def test_a_snapshot_from_before_the_guest_was_started_waits_until_it_is_stopped(
    n1: TestNode, model: dict[str, Any]
) -> None:
    boot = start(n1, model)
    n1.do("snapshot.create", name="web1", snapshot="s1")
    n1.do("instance.reboot", name="web1", mode="hard")
    is_well(n1, f"{boot}.s1.qcow2")
    failed = n1.failure("snapshot.delete", name="web1", snapshot="s1")
    assert (failed.code, "Stop the instance first" in failed.message) == ("UNSUPPORTED", True)
    is_well(n1, f"{boot}.s1.qcow2")
    assert [each["state"] for each in n1.do("snapshot.list", name="web1")] == ["ready"]
    n1.do("instance.stop", name="web1", force=True)
    n1.do("snapshot.revert", name="web1", snapshot="s1")
    n1.do("snapshot.delete", name="web1", snapshot="s1")
    n1.do("instance.restart", name="web1")
    is_well(n1, boot)


def test_a_snapshot_is_given_up_where_qemu_still_reaches_the_file(n1: TestNode) -> None:
    n1.root.chmod(0o711)
    try:
        boot = start(n1, POOL)
        for name in ("s1", "s2", "s3"):
            n1.do("snapshot.create", name="web1", snapshot=name)
        n1.do("instance.reboot", name="web1", mode="hard")
        for name in ("s1", "s2", "s3"):
            n1.do("snapshot.delete", name="web1", snapshot=name)
        is_well(n1, boot)
        n1.do("instance.stop", name="web1", force=True)
        assert os.listxattr(boot) == []
    finally:
        n1.root.chmod(0o700)


@confined
def test_a_backup_is_made_while_the_guest_runs(n1: TestNode, model: dict[str, Any]) -> None:
    boot, disk = start(n1, model), file(n1, content=b"contents")
    n1.do("instance.disk_add", name="web1", disk={"path": disk})
    targets = [str(n1.root / f"extra-copy{number}") for number in (0, 1)]
    done = n1.do("instance.backup", name="web1", targets=targets, format="raw")
    assert done["how"] == "live"
    assert Path(targets[1]).read_bytes() == Path(disk).read_bytes()
    is_well(n1, boot, disk)
    assert opened(n1) == ["extra,=1.img", "web1.img"]


def test_the_next_worker_knows_the_files_by_their_paths(n1: TestNode) -> None:
    boot, disk = start(n1, POOL | CHROOT), file(n1)
    n1.do("instance.disk_add", name="web1", disk={"path": disk})
    n1.restart_worker()
    n1.do("snapshot.create", name="web1", snapshot="s1")
    n1.restart_worker()
    n1.do("snapshot.delete", name="web1", snapshot="s1")
    n1.do("instance.disk_resize", name="web1", path=disk, size_mib=5)
    is_well(n1, boot, disk)
