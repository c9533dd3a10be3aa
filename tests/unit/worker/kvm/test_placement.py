"""Devices keep their names and places on the command line after some of them came or went."""

from __future__ import annotations

from typing import Any

import pytest

from hostler.errors import InvalidArgument
from hostler.payloads import Instance, parse
from worker.kvm.arguments import HostPart, build

HOST = HostPart(uuid="u", accelerator="tcg", qmp_fd=3, monitor_fd=4)
DISKS = [{"path": "/a"}, {"path": "/b"}]
NICS = [{"mac": "52:54:00:00:00:01", "mode": "user"}]


def devices(**changes: Any) -> dict[str, dict[str, Any]]:
    instance = parse(Instance, {"name": "web1", "memory_mib": 16, "disks": DISKS, "nics": NICS} | changes)
    built = [value for name, value in build(instance, HOST) if name == "-device" and isinstance(value, dict)]
    return {device["id"]: device for device in built}


def test_without_a_placement_devices_are_numbered_by_their_order_and_have_no_address() -> None:
    assert [*devices()] == ["disk0-device", "disk1-device", "nic0"]
    assert not any("addr" in device for device in devices().values())


def test_with_a_placement_each_device_is_where_hotplug_left_it() -> None:
    slots = {"disk0-device": 2, "disk4-device": 17, "nic1": 5}
    placed = devices(placement={"disks": [0, 4], "nics": [1], "slots": slots})
    assert {name: int(device["addr"], 16) for name, device in placed.items()} == slots
    assert placed["disk4-device"]["drive"] == "disk4"
    assert placed["nic1"]["netdev"] == "netdev1"


def test_only_the_first_disk_of_the_list_is_booted_from_whatever_its_number() -> None:
    placed = devices(placement={"disks": [4, 2], "nics": [0]})
    assert [name for name, device in placed.items() if "bootindex" in device] == ["disk4-device"]


def test_a_cd_drive_keeps_its_place_on_a_scsi_bus_when_disks_come_and_go() -> None:
    hvparams = {"disk_type": "virtio-scsi", "cdrom_image_path": "/cd"}
    assert devices(hvparams=hvparams)["cdrom0-device"]["scsi-id"] == 2
    placement = {"disks": [], "nics": [0], "slots": {"virtio-scsi0": 3}, "scsi_ids": {"cdrom0-device": 2}}
    placed = devices(disks=[], hvparams=hvparams, placement=placement)
    assert (placed["cdrom0-device"]["scsi-id"], placed["virtio-scsi0"]["addr"]) == (2, "3")


def test_a_controller_stays_when_its_last_disk_went() -> None:
    hvparams, placement = {"disk_type": "virtio-scsi"}, {"nics": [0], "slots": {"virtio-scsi0": 3}}
    assert "virtio-scsi0" not in devices(disks=[], hvparams=hvparams)
    assert "virtio-scsi0" in devices(disks=[], hvparams=hvparams, placement=placement)


@pytest.mark.parametrize("disks", [[0], [0, 0], [0, 1, 2], [0, -1], [0, 256]])
def test_a_placement_has_one_number_for_each_device(disks: list[int]) -> None:
    with pytest.raises(InvalidArgument, match="placement"):
        devices(placement={"disks": disks, "nics": [0]})
