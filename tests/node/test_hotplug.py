"""Changing running guests: what QEMU has, what the database has, and what a reboot makes of it agree."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from models import DiskLease
from tests.node.test_displays import free_port, logs_in, with_password
from tests.nodes import TestNode, tiny_instance, until

pytestmark = pytest.mark.node

MIB = 2**20
MAC = "52:54:00:00:00:21"
USER_NIC = {"mac": MAC, "mode": "user"}
SCSI = {"disk_type": "virtio-scsi"}
"""Its disks come and go without the guest's help."""


@pytest.fixture
def n1(n1: TestNode) -> Iterator[TestNode]:
    yield n1
    n1.end_guests()
    for path in n1.root.glob("extra*"):
        path.unlink()


def extra(n1: TestNode, name: str = "extra,=1.img", size_mib: int = 4) -> dict[str, Any]:
    """A disk to plug in."""
    path = n1.root / name
    path.write_bytes(b"\0" * size_mib * MIB)
    return {"path": str(path)}


def start(n1: TestNode, name: str = "web1", **hvparams: Any) -> Any:
    return n1.start(tiny_instance(n1.root, name, hvparams=SCSI | hvparams))


def devices(n1: TestNode, name: str = "web1") -> set[str]:
    lines = n1.monitor(name, "qom-list /machine/peripheral").splitlines()
    return {line.split()[0] for line in lines if "child<" in line}


def images(n1: TestNode, name: str = "web1") -> str:
    return n1.monitor(name, "info block -n")


def leases(n1: TestNode, name: str = "web1") -> set[str]:
    with n1.reading() as session:
        return {*session.scalars(select(DiskLease.path).where(DiskLease.instance_name == name))}


def agrees(n1: TestNode, paths: list[str], name: str = "web1", cds: tuple[str, ...] = ()) -> None:
    """Insist that record, runtime and leases have these disks, and that the audit finds nothing."""
    row = n1.row(name)
    assert row and row.runtime
    assert [disk["path"] for disk in row.spec["disks"]] == paths
    assert [disk["path"] for disk in row.runtime.hardware["disks"]] == paths
    assert leases(n1, name) == {*paths, *cds}
    assert n1.do("node.audit")["findings"] == []


def places(n1: TestNode, name: str = "web1") -> dict[str, str]:
    """Where QEMU has each device: its address on its bus, by its id."""
    tree, found, current = n1.monitor(name, "info qtree").splitlines(), {}, ""
    for line in map(str.strip, tree):
        if line.startswith("dev: "):
            current = line.partition('id "')[2].rstrip('"')
        elif current and line.startswith(("addr = ", "scsi-id = ")):
            found[current] = line
    return found


def test_a_disk_is_plugged_in_and_stays_where_it_is_over_a_reboot(n1: TestNode) -> None:
    boot, disk = start(n1)["disks"][0]["path"], extra(n1)
    view = n1.do("instance.disk_add", name="web1", disk=disk)
    assert [each["path"] for each in view["disks"]] == [boot, disk["path"]]
    assert "disk1-device" in devices(n1)
    assert disk["path"] in images(n1)
    agrees(n1, [boot, disk["path"]])
    before = places(n1)
    n1.do("instance.reboot", name="web1", mode="hard")
    assert places(n1) == before
    agrees(n1, [boot, disk["path"]])


def test_when_one_in_the_middle_goes_the_others_keep_their_names_and_places_over_a_reboot(n1: TestNode) -> None:
    cd = extra(n1, "extra.iso")["path"]
    boot = start(n1, cdrom_image_path=cd)["disks"][0]["path"]
    first, second = (extra(n1, f"extra{number}.img") for number in (1, 2))
    for disk in (first, second):
        n1.do("instance.disk_add", name="web1", disk=disk)
    n1.do("instance.disk_remove", name="web1", path=first["path"])
    assert devices(n1) >= {"disk0-device", "disk3-device"}  # a CD drive has the place in between
    assert not {"disk1-device", "disk2-device"} & devices(n1)
    assert first["path"] not in images(n1)
    agrees(n1, [boot, second["path"]], cds=(cd,))
    before = places(n1)
    n1.do("instance.reboot", name="web1", mode="hard")
    assert places(n1) == before
    n1.do("instance.disk_add", name="web1", disk=first)
    assert "disk2-device" in devices(n1)
    agrees(n1, [boot, second["path"], first["path"]], cds=(cd,))


def test_the_last_disk_that_goes_leaves_its_controller_for_the_next_one(n1: TestNode) -> None:
    boot = start(n1)["disks"][0]["path"]
    n1.do("instance.disk_remove", name="web1", path=boot)
    agrees(n1, [])
    n1.do("instance.reboot", name="web1", mode="hard")
    n1.do("instance.disk_add", name="web1", disk={"path": boot})
    agrees(n1, [boot])


def test_a_disk_that_was_taken_out_is_free_for_others(n1: TestNode) -> None:
    disk = extra(n1)
    start(n1)
    start(n1, "web2")
    n1.do("instance.disk_add", name="web1", disk=disk)
    refused = n1.failure("instance.disk_add", name="web2", disk=disk)
    assert (refused.code, refused.details["errors"][0]["field"]) == ("INVALID_ARGUMENT", "disk.path")
    assert "in use by instance web1" in refused.message
    assert disk["path"] not in leases(n1, "web2")
    n1.do("instance.disk_remove", name="web1", path=disk["path"])
    n1.do("instance.disk_add", name="web2", disk=disk)
    n1.do("instance.stop", name="web1", force=True)
    n1.do("instance.stop", name="web2", force=True)
    n1.nothing_is_left()


def test_a_guest_that_does_not_react_keeps_its_disk_and_the_job_says_so(n1: TestNode) -> None:
    disk = extra(n1)
    boot = start(n1, disk_type="paravirtual")["disks"][0]["path"]
    n1.do("instance.disk_add", name="web1", disk=disk)
    failed = n1.failure("instance.disk_remove", name="web1", path=disk["path"], timeout_s=0.2)
    assert (failed.code, failed.details["retryable"]) == ("TIMED_OUT", True)
    assert "did not let go of disk1-device" in failed.message
    agrees(n1, [boot, disk["path"]])
    n1.monitor("web1", "system_reset")  # at which QEMU takes out what it was asked for
    until(lambda: "disk1-device" not in devices(n1))
    n1.do("instance.disk_remove", name="web1", path=disk["path"])
    assert disk["path"] not in images(n1)
    agrees(n1, [boot])


@pytest.mark.parametrize(
    ("disk", "field"),
    [
        ({"path": "/nowhere"}, "disk.path"),
        ({"path": "web1.img"}, "disk"),
        ({"path": "link.img"}, "disk.path"),
        ({"path": "web2.img"}, "disk.path"),
    ],
    ids=["missing", "its own", "its own by another name", "another one's"],
)
def test_a_disk_that_cannot_be_is_refused_before_anything_happens(
    n1: TestNode, disk: dict[str, Any], field: str
) -> None:
    boot = start(n1)["disks"][0]["path"]
    start(n1, "web2")
    link = n1.root / "link.img"
    if not link.exists():
        link.symlink_to(boot)
    refused = n1.failure("instance.disk_add", name="web1", disk={"path": str(n1.root / disk["path"])})
    assert (refused.code, [each["field"] for each in refused.details["errors"]]) == ("INVALID_ARGUMENT", [field])
    assert devices(n1) == {"virtio-scsi0", "disk0-device"}
    agrees(n1, [boot])


def test_a_disk_that_qemu_refuses_is_given_back(n1: TestNode) -> None:
    boot, disk = start(n1)["disks"][0]["path"], extra(n1)
    failed = n1.failure("instance.disk_add", name="web1", disk=disk | {"format": "qcow2"})
    assert (failed.code, "not in qcow2 format" in failed.message) == ("QEMU_FAILED", True)
    agrees(n1, [boot])
    n1.do("instance.disk_add", name="web1", disk=disk)
    agrees(n1, [boot, disk["path"]])


def test_an_image_whose_device_qemu_refuses_is_closed_again(n1: TestNode) -> None:
    boot, disk = start(n1, disk_type="paravirtual")["disks"][0]["path"], extra(n1)
    for slot in range(3, 32):
        n1.monitor("web1", f"device_add virtio-rng-pci,addr={slot:x}")
    failed = n1.failure("instance.disk_add", name="web1", disk=disk)
    assert (failed.code, "PCI" in failed.message) == ("QEMU_FAILED", True)
    assert disk["path"] not in images(n1)
    agrees(n1, [boot])


@pytest.mark.parametrize(
    ("hvparams", "field"),
    [
        ({"disk_type": "ide"}, "hvparams.disk_type"),
        ({"disk_type": "paravirtual", "machine_version": "q35"}, "hvparams.disk_type"),
        ({"disk_type": "paravirtual", "acpi": False}, "hvparams.disk_type"),
    ],
    ids=["ide", "q35", "without ACPI"],
)
def test_what_a_machine_cannot_do_is_refused_before_anything_happens(
    n1: TestNode, hvparams: dict[str, Any], field: str
) -> None:
    boot = start(n1, **hvparams)["disks"][0]["path"]
    for failed in (
        n1.failure("instance.disk_add", name="web1", disk=extra(n1)),
        n1.failure("instance.disk_remove", name="web1", path=boot),
    ):
        assert (failed.code, failed.details["errors"][0]["field"]) == ("UNSUPPORTED", field)
    agrees(n1, [boot])


def test_a_disk_grows_and_never_shrinks(n1: TestNode) -> None:
    boot = start(n1)["disks"][0]["path"]
    n1.do("instance.disk_resize", name="web1", path=boot, size_mib=8)
    assert Path(boot).stat().st_size == 8 * MIB
    n1.do("instance.disk_resize", name="web1", path=boot, size_mib=8)
    refused = n1.failure("instance.disk_resize", name="web1", path=boot, size_mib=7)
    assert (refused.code, refused.details["errors"][0]["field"]) == ("INVALID_ARGUMENT", "size_mib")
    refused = n1.failure("instance.disk_resize", name="web1", path="/other", size_mib=9)
    assert (refused.code, refused.details["errors"][0]["field"]) == ("INVALID_ARGUMENT", "path")
    n1.do("instance.disk_add", name="web1", disk=extra(n1) | {"mode": "ro"})
    refused = n1.failure("instance.disk_resize", name="web1", path=extra(n1)["path"], size_mib=9)
    assert refused.code == "INVALID_ARGUMENT"
    assert Path(boot).stat().st_size == 8 * MIB
    Path(boot).unlink()


@pytest.mark.parametrize(
    ("task", "arguments"),
    [
        ("disk_add", {"disk": {"path": "/disk"}}),
        ("disk_remove", {"path": "/disk"}),
        ("disk_resize", {"path": "/disk", "size_mib": 9}),
        ("nic_add", {"nic": USER_NIC}),
        ("nic_remove", {"mac": MAC}),
        ("set_memory", {"memory_mib": 8}),
        ("set_password", {"kind": "vnc", "password_file": "/disk"}),
    ],
)
def test_only_a_guest_that_runs_is_changed(n1: TestNode, task: str, arguments: dict[str, Any]) -> None:
    assert n1.failure(f"instance.{task}", name="nobody", **arguments).code == "UNKNOWN_INSTANCE"
    start(n1)
    n1.do("instance.stop", name="web1", force=True)
    assert n1.failure(f"instance.{task}", name="web1", **arguments).code == "NOT_RUNNING"


def test_a_card_is_plugged_in_and_stays_over_a_reboot(n1: TestNode) -> None:
    start(n1, vga="std")
    view = n1.do("instance.nic_add", name="web1", nic=USER_NIC)
    assert [(nic["mac"], nic["mode"]) for nic in view["nics"]] == [(MAC, "user")]
    assert "nic0" in devices(n1)
    before = places(n1)
    n1.do("instance.reboot", name="web1", mode="hard")
    assert places(n1) == before
    refused = n1.failure("instance.nic_add", name="web1", nic=USER_NIC)
    assert (refused.code, refused.details["errors"][0]["field"]) == ("INVALID_ARGUMENT", "nic")


def test_a_card_that_goes_leaves_nothing_and_moves_no_other_device(n1: TestNode) -> None:
    other = "52:54:00:00:00:22"
    n1.start(
        tiny_instance(n1.root, hvparams=SCSI | {"vga": "std"}) | {"nics": [USER_NIC, {"mac": other, "mode": "user"}]}
    )
    assert n1.failure("instance.nic_remove", name="web1", mac=MAC, timeout_s=0.2).code == "TIMED_OUT"
    assert "netdev0" in n1.monitor("web1", "info network")
    n1.monitor("web1", "system_reset")
    until(lambda: "nic0" not in devices(n1))
    view = n1.do("instance.nic_remove", name="web1", mac=MAC)
    assert [nic["mac"] for nic in view["nics"]] == [other]
    assert "netdev0" not in n1.monitor("web1", "info network")
    before = places(n1)
    n1.do("instance.reboot", name="web1", mode="hard")
    assert places(n1) == before
    assert "nic1" in before


def test_a_balloon_that_nobody_answers_is_taken_back(n1: TestNode) -> None:
    n1.start(tiny_instance(n1.root, memory_mib=32, hvparams={"balloon": True}))
    failed = n1.failure("instance.set_memory", name="web1", memory_mib=16, timeout_s=0.2)
    assert (failed.code, "still had 32 MiB" in failed.message) == ("TIMED_OUT", True)
    assert n1.info("web1")["memory_mib"] == 32
    refused = n1.failure("instance.set_memory", name="web1", memory_mib=33)
    assert (refused.code, refused.details["errors"][0]["field"]) == ("INVALID_ARGUMENT", "memory_mib")


def test_memory_cannot_change_without_a_balloon(n1: TestNode) -> None:
    start(n1)
    failed = n1.failure("instance.set_memory", name="web1", memory_mib=8)
    assert (failed.code, failed.details["errors"][0]["field"]) == ("UNSUPPORTED", "hvparams.balloon")


def test_a_display_s_password_changes_at_once_and_stays_over_a_reboot(n1: TestNode) -> None:
    port, file = free_port(), n1.root / "extra-password"
    n1.start(with_password(n1, port, "old"))
    file.write_text("seCret9\n")
    n1.do("instance.set_password", name="web1", kind="vnc", password_file=str(file))
    assert not logs_in(port, b"old")
    assert logs_in(port, b"seCret9")
    n1.do("instance.reboot", name="web1", mode="hard")
    assert logs_in(port, b"seCret9")
    kept = [n1.root / "worker.log", *(n1.root / "state").rglob("*"), *(n1.root / "run").rglob("*")]
    assert not [path for path in kept if path.is_file() and b"seCret9" in path.read_bytes()]
    refused = n1.failure("instance.set_password", name="web1", kind="vnc", password_file="/nowhere")
    assert (refused.code, refused.details["errors"][0]["field"]) == ("INVALID_ARGUMENT", "password_file")
    refused = n1.failure("instance.set_password", name="web1", kind="spice", password_file=str(file))
    assert (refused.code, refused.details["errors"][0]["field"]) == ("UNSUPPORTED", "hvparams.spice_password_file")


def test_everything_works_from_the_command_line(n1: TestNode) -> None:
    start(n1)
    disk = extra(n1)["path"]
    assert n1.cli("disk", "add", "web1", disk, "--ro").returncode == 0
    assert n1.cli_json("info", "web1")["disks"][1] == {"path": disk, "mode": "ro", "shared": False, "format": "raw"}
    assert n1.cli("disk", "remove", "web1", disk).returncode == 0
    assert n1.cli("nic", "add", "web1", MAC, "--mode", "user").returncode == 0
    assert [nic["mac"] for nic in n1.cli_json("info", "web1")["nics"]] == [MAC]
    failed = n1.cli("nic", "remove", "web1", MAC, "--guest-timeout", "0.1")
    assert (failed.returncode, "did not let go" in failed.stderr) == (1, True)
    assert "UNSUPPORTED" in n1.cli("memory", "web1", "8").stderr
    assert "UNSUPPORTED" in n1.cli("password", "web1", "vnc", disk).stderr
