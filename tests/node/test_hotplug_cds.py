"""CDs of running guests: QEMU, the database and a reboot agree about what is in a drive, and a guest's lock counts."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models import DiskLease
from tests.guests import LINUX_READY, LINUX_TICK
from tests.node.test_golden_lines import loop_device
from tests.node.test_hotplug import images, leases
from tests.node.test_linux import BOOT_S, ask, linux
from tests.nodes import TestNode, tiny_instance
from tests.services import missing

__all__ = ["linux"]

pytestmark = pytest.mark.node

EMPTY = {"cdrom_drive": True}


@pytest.fixture
def n1(n1: TestNode) -> Iterator[TestNode]:
    yield n1
    n1.end_guests()
    for path in n1.root.glob("*.iso"):
        path.unlink()


def iso(n1: TestNode, name: str = "first,=1.iso", content: bytes = b"first") -> str:
    path = n1.root / name
    path.write_bytes(content.ljust(2**20, b"\0"))
    return str(path)


def start(n1: TestNode, name: str = "web1", **hvparams: Any) -> str:
    """The path of its disk."""
    view = n1.start(tiny_instance(n1.root, name, hvparams=hvparams))
    return str(view["disks"][0]["path"])


def drive(n1: TestNode, device: str = "cdrom0-device", name: str = "web1") -> str:
    """What QEMU tells of a drive."""
    drives = re.split(r"\n\s*\n", n1.monitor(name, "info block"))
    (found,) = (each for each in drives if device in each)
    return found


def has(n1: TestNode, disk: str, *cds: str, name: str = "web1", field: str = "cdrom_image_path") -> None:
    """Insist that QEMU, the instance, the runtime and the leases have these CDs, the last one in the drive."""
    row = n1.row(name)
    assert row and row.runtime
    for spec in (row.spec, row.runtime.hardware):
        assert spec["hvparams"][field] == (cds[-1] if cds else "")
    assert leases(n1, name) == {disk, *cds}
    shown = images(n1, name)
    assert [cd for cd in cds if cd not in shown] == []
    assert shown.count(".iso (raw") == len(cds)
    assert n1.do("node.audit")["findings"] == []


@pytest.mark.parametrize("kind", ["ide", "scsi", "virtio-scsi"])
def test_an_empty_drive_gets_a_cd_another_one_and_none_and_a_reboot_keeps_each(n1: TestNode, kind: str) -> None:
    disk, first, second = start(n1, cdrom_disk_type=kind, **EMPTY), iso(n1), iso(n1, "second.iso", b"second")
    assert "[not inserted]" in drive(n1)
    has(n1, disk)
    for cds in ([first], [second], []):
        if cds:
            n1.do("instance.cd_insert", name="web1", path=cds[0])
        else:
            n1.do("instance.cd_eject", name="web1")
        has(n1, disk, *cds)
        assert "tray open" not in drive(n1)
        n1.do("instance.reboot", name="web1", mode="hard")
        has(n1, disk, *cds)
    n1.do("instance.cd_eject", name="web1")
    has(n1, disk)


def test_a_drive_that_had_a_cd_from_the_start_is_there_when_it_is_empty(n1: TestNode) -> None:
    cd = iso(n1)
    disk = start(n1, cdrom_image_path=cd, boot_order="cdrom")
    has(n1, disk, cd)
    n1.do("instance.cd_eject", name="web1")
    has(n1, disk)
    n1.do("instance.reboot", name="web1", mode="hard")
    assert "[not inserted]" in drive(n1)
    n1.do("instance.cd_insert", name="web1", path=cd)
    has(n1, disk, cd)
    with n1.serial("web1") as serial:
        assert serial.tick() < serial.tick()


def test_each_of_two_drives_has_its_own_cd(n1: TestNode) -> None:
    disk, first, second = start(n1, cdrom2_drive=True, **EMPTY), iso(n1), iso(n1, "second.iso")
    n1.do("instance.cd_insert", name="web1", path=first, drive="cdrom2")
    has(n1, disk, first, field="cdrom2_image_path")
    assert first in drive(n1, "cdrom1-device") and "[not inserted]" in drive(n1)
    n1.do("instance.cd_insert", name="web1", path=second)
    n1.do("instance.cd_eject", name="web1", drive="cdrom2")
    has(n1, disk, second)


def test_a_cd_may_be_a_block_device_of_the_host(n1: TestNode) -> None:
    if os.geteuid() != 0:
        missing("A loop device", "needs root")
    with loop_device(Path(iso(n1, "backing.img"))) as device:
        start(n1, **EMPTY)
        n1.do("instance.cd_insert", name="web1", path=device)
        assert device in drive(n1)
        n1.do("instance.reboot", name="web1", mode="hard")
        assert device in drive(n1)
        n1.do("instance.cd_eject", name="web1")
        n1.do("instance.stop", name="web1", force=True)


def test_the_same_file_is_read_anew_when_it_is_inserted_again(n1: TestNode) -> None:
    disk, cd = start(n1, **EMPTY), iso(n1)
    n1.do("instance.cd_insert", name="web1", path=cd)
    iso(n1, content=b"x" * 2**21)
    n1.do("instance.cd_insert", name="web1", path=cd)
    has(n1, disk, cd)


def test_guests_share_a_cd_but_none_may_write_to_it(n1: TestNode) -> None:
    cd = iso(n1)
    for name in ("web1", "web2"):
        start(n1, name, **EMPTY)
        n1.do("instance.cd_insert", name=name, path=cd)
    built = tiny_instance(n1.root, "web3")
    refused = n1.failure("instance.start", instance=built | {"disks": [{"path": cd}]})
    assert (refused.code, "in use by instance web" in refused.message) == ("INVALID_ARGUMENT", True)
    n1.do("instance.cd_eject", name="web1")
    n1.do("instance.cd_eject", name="web2")
    n1.start(built | {"disks": [{"path": cd}]})
    refused = n1.failure("instance.cd_insert", name="web1", path=cd)
    assert (refused.code, refused.details["errors"][0]["field"]) == ("INVALID_ARGUMENT", "path")
    assert "in use by instance web3" in refused.message
    refused = n1.failure("instance.start", instance=tiny_instance(n1.root, "web4", hvparams={"cdrom_image_path": cd}))
    assert [each["field"] for each in refused.details["errors"]] == ["instance.hvparams.cdrom_image_path"]


def test_a_cd_that_qemu_refuses_leaves_the_one_that_is_in_the_drive(n1: TestNode) -> None:
    cd = iso(n1)
    disk = start(n1, cdrom_image_path=cd)
    locked = iso(n1, "locked.iso")
    with Path(locked).open("rb+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        failed = n1.failure("instance.cd_insert", name="web1", path=locked)
    assert (failed.code, "lock" in failed.message) == ("QEMU_FAILED", True)
    has(n1, disk, cd)
    assert cd in drive(n1)


@pytest.mark.parametrize(
    ("hvparams", "task", "arguments", "code", "field"),
    [
        (EMPTY, "cd_insert", {"path": "/nowhere.iso"}, "INVALID_ARGUMENT", "path"),
        (EMPTY, "cd_insert", {"path": "relative"}, "INVALID_ARGUMENT", "path"),
        (EMPTY, "cd_eject", {"drive": "cdrom2"}, "UNSUPPORTED", "hvparams.cdrom2_drive"),
        ({}, "cd_eject", {}, "UNSUPPORTED", "hvparams.cdrom_drive"),
        ({"cdrom_disk_type": "paravirtual"}, "cd_eject", {}, "UNSUPPORTED", "hvparams.cdrom_disk_type"),
    ],
    ids=["missing", "relative", "no second drive", "no drive", "no drive but a disk"],
)
def test_what_cannot_be_is_refused_before_anything_happens(
    n1: TestNode, hvparams: dict[str, Any], task: str, arguments: dict[str, Any], code: str, field: str
) -> None:
    cds = [iso(n1)] if "cdrom_disk_type" in hvparams else []
    disk = start(n1, **hvparams, **({"cdrom_image_path": cds[0]} if cds else {}))
    failed = n1.failure(f"instance.{task}", name="web1", **arguments)
    assert (failed.code, [each["field"] for each in failed.details["errors"]]) == (code, [field])
    has(n1, disk, *cds)


def test_a_mounted_cd_stays_where_it_is_unless_it_is_forced_out(n1: TestNode, linux: dict[str, Any]) -> None:
    first, second = iso(n1), iso(n1, "second.iso", b"second")
    n1.start(linux | {"hvparams": linux["hvparams"] | {"cdrom_image_path": first}})
    with n1.serial("linux1") as serial:
        serial.read_until(LINUX_READY, BOOT_S)
        serial.read_until(LINUX_TICK + b"2")
        serial.send(b"\nexec 3</dev/sr0\n")  # an open drive is locked
        ask(serial, "head -c 5 <&3", b"first")
        for task, more in (("cd_eject", {}), ("cd_insert", {"path": second})):
            failed = n1.failure(f"instance.{task}", name="linux1", timeout_s=0.3, **more)
            assert (failed.code, failed.details["retryable"]) == ("TIMED_OUT", True)
            assert "keeps the tray of its drive cdrom locked" in failed.message
            has(n1, linux["disks"][0]["path"], first, name="linux1")
            assert "(locked)" not in drive(n1, name="linux1") and "locked" in drive(n1, name="linux1")
        job = n1.send("instance.cd_insert", name="linux1", path=second, timeout_s=30)
        serial.send(b"exec 3<&-\n")  # it unlocks it
        job.wait(30)
        serial.send(b"until [ x$(head -c 6 /dev/sr0 2>/dev/null) = xsecond ]; do :; done; dmesg -n 1\n")
        ask(serial, "head -c 6 /dev/sr0", b"second")
        serial.send(b"exec 3</dev/sr0\n")
        ask(serial, "head -c 6 <&3", b"second")
        n1.do("instance.cd_eject", name="linux1", force=True)
        has(n1, linux["disks"][0]["path"], name="linux1")
        serial.send(b"exec 3<&-\n")
        n1.do("instance.cd_insert", name="linux1", path=first)
        serial.send(b"until [ x$(head -c 5 /dev/sr0 2>/dev/null) = xfirst ]; do :; done\n")
        ask(serial, "head -c 5 /dev/sr0", b"first")


def test_only_a_guest_that_runs_has_its_cds_changed(n1: TestNode) -> None:
    assert n1.failure("instance.cd_eject", name="nobody").code == "UNKNOWN_INSTANCE"
    start(n1, **EMPTY)
    n1.do("instance.stop", name="web1", force=True)
    assert n1.failure("instance.cd_eject", name="web1").code == "NOT_RUNNING"
    with n1.reading() as session:
        assert session.query(DiskLease).count() == 0


def test_everything_works_from_the_command_line(n1: TestNode) -> None:
    disk, cd = start(n1, **EMPTY), iso(n1)
    assert n1.cli("cd", "insert", "web1", cd).returncode == 0
    has(n1, disk, cd)
    assert n1.cli("cd", "eject", "web1", "--force").returncode == 0
    has(n1, disk)
    assert "UNSUPPORTED" in n1.cli("cd", "eject", "web1", "--drive", "cdrom2").stderr
