"""QEMU's command line against golden files. That QEMU takes each line is shown by tests/node/test_golden_lines.py.

``UPDATE_GOLDEN=1 pytest tests/unit/worker/kvm/test_arguments.py`` writes the files anew; read the difference.
"""

from __future__ import annotations

import json
import os
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import ValidationError

from hostler.hvchecks import LIMITS
from hostler.hvparams import HvParams
from hostler.payloads import Disk, Nic
from tests.unit.worker.kvm.golden_cases import (
    BINARY,
    CASES,
    GOLDEN,
    ODD_NAME,
    PLACE,
    UUID,
    Case,
    disks,
    golden_file,
    nics,
    to_argv,
    to_text,
)
from worker.kvm.arguments import HostPart, build, pci_devices, render
from worker.operations.hardware import PCI_SLOTS, UNSUPPORTED

VALUES = [case.instance for case in CASES.values()]
FOR_MOVING = {"migration_port", "migration_bandwidth", "migration_downtime", "migration_mode", "migration_caps"}
NOT_IN_THE_LINE = {
    *("uefi_vars_template_path", "cpu_mask", "security_model", "security_domain", "use_chroot"),
    *LIMITS,
    *FOR_MOVING,
}
REFUSED_ON_EVERY_NODE = {"sd", "mtd", "pflash"}


def options_of(case: Case, name: str) -> list[Any]:
    return [value for option, value in case.options if option == name]


@pytest.mark.parametrize("name", CASES)
def test_a_command_line_is_as_its_golden_file_has_it(name: str) -> None:
    file = golden_file(name)
    text = to_text(CASES[name].options)
    if os.environ.get("UPDATE_GOLDEN") == "1":
        file.write_text(text)
    assert file.is_file(), "no golden file; UPDATE_GOLDEN=1 writes it"
    assert text == file.read_text()


def test_there_is_no_golden_file_without_a_case() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {golden_file(name).name for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_a_golden_file_read_back_is_the_argv(name: str) -> None:
    options = CASES[name].options
    assert [BINARY, *to_argv(to_text(options))] == render(BINARY, options)


def _choices(model: Any, field: str) -> list[Any]:
    annotation = model.model_fields[field].annotation
    if annotation is bool:
        return [False, True]
    return list(get_args(annotation)) if get_origin(annotation) is Literal else []


@pytest.mark.parametrize("field", [name for name in HvParams.model_fields if name not in NOT_IN_THE_LINE])
def test_every_value_of_every_parameter_is_in_some_golden_file(field: str) -> None:
    used = {str(getattr(instance.hvparams, field)) for instance in VALUES}
    default = HvParams.model_fields[field].get_default(call_default_factory=True)
    assert used >= {str(default), *map(str, _choices(HvParams, field))} - REFUSED_ON_EVERY_NODE
    assert len(used) > 1, "only its default"


@pytest.mark.parametrize("field", sorted(NOT_IN_THE_LINE))
def test_what_is_not_in_the_line_is_refused_on_every_node_or_done_before_or_told_when_it_moves(field: str) -> None:
    refused = {name for name, _, _ in UNSUPPORTED} | {"security_domain"}  # that one only with security_model
    assert field in refused | FOR_MOVING | {"uefi_vars_template_path", "cpu_mask", *LIMITS}


@pytest.mark.parametrize(("model", "of"), [(Disk, "disks"), (Nic, "nics")])
def test_every_choice_about_a_disk_or_card_is_in_some_golden_file(model: Any, of: str) -> None:
    for field in model.model_fields:
        used = {getattr(part, field) for instance in VALUES for part in getattr(instance, of)}
        assert used >= {*_choices(model, field)}, field


def test_every_line_names_the_guest_and_its_uuid_and_starts_it_paused_and_confined() -> None:
    for name, case in CASES.items():
        argv = render(BINARY, case.options)
        assert argv[:5] == [BINARY, "-name", case.instance.name, "-uuid", UUID], name
        assert argv.count("-S") == argv.count("-nodefaults") == argv.count("-no-user-config") == 1, name
        assert argv[argv.index("-sandbox") + 1].startswith("on,"), name
        assert "-daemonize" not in argv, name
        assert "-nographic" not in argv, name


def test_the_same_guest_has_the_same_line_each_time() -> None:
    for case in CASES.values():
        assert case.options == case.options


def test_w26_one_device_boots_first_and_none_when_a_kernel_is_given() -> None:
    for name, case in CASES.items():
        devices = options_of(case, "-device")
        first = [device["driver"] for device in devices if "bootindex" in device]
        first += [value for value in options_of(case, "-global") if "bootindex" in value]
        assert len(first) <= 1, name
        assert not (first and case.instance.hvparams.kernel_path), name
        assert "-boot" not in dict(case.options), name


def test_from_a_floppy_the_firmware_boots_by_its_controllers_word() -> None:
    assert options_of(CASES["boot-floppy"], "-global") == ["isa-fdc.bootindexA=1"]
    assert not options_of(CASES["boot-floppy-without-image"], "-global") + options_of(CASES["floppy"], "-global")


@pytest.mark.parametrize(("order", "drives"), [("disk", "disk0"), ("cdrom", "cdrom0"), ("network", "netdev0")])
def test_the_firmware_boots_from_what_boot_order_names(order: str, drives: str) -> None:
    (first,) = (device for device in options_of(CASES[f"boot-{order}"], "-device") if "bootindex" in device)
    assert drives in (first.get("drive"), first.get("netdev"))


def test_w20_a_path_of_any_characters_is_one_value_and_no_option() -> None:
    case = CASES["disk-odd-path"]
    argv = render(BINARY, case.options)
    node = json.loads(argv[argv.index("-blockdev") + 1])
    assert node["file"] == {"driver": "file", "filename": f"{PLACE}/{ODD_NAME}"}
    assert set(node) == {"node-name", "driver", "read-only", "discard", "cache", "file"}


def test_ids_are_unique_and_every_drive_and_netdev_belongs_to_one_device() -> None:
    for name, case in CASES.items():
        ids = [device["id"] for device in options_of(case, "-device")]
        assert len(ids) == len(set(ids)), name
        used = [device.get("drive") or device.get("netdev") for device in options_of(case, "-device")]
        made = [node["node-name"] for node in options_of(case, "-blockdev") if "uefi" not in node["node-name"]]
        made += [netdev["id"] for netdev in options_of(case, "-netdev")]
        assert sorted(filter(None, used)) == sorted(made), name


def test_a_line_depends_on_what_the_host_found_out_and_on_nothing_it_would_look_up() -> None:
    """The paths do not exist, and so does the accelerator's device not matter."""
    plain = Case(disks("device0"))
    device = Case(disks("device0"), block_devices=frozenset({f"{PLACE}/device0"}))
    drivers = [options_of(case, "-blockdev")[0]["file"]["driver"] for case in (plain, device)]
    assert drivers == ["file", "host_device"]


def test_a_cd_drive_of_the_host_is_opened_as_one_and_a_floppy_on_a_device_as_a_device() -> None:
    paths = {"cdrom_image_path": f"{PLACE}/sr0", "floppy_image_path": f"{PLACE}/device0"}
    instance = Case({}, paths).instance
    host = HostPart(
        uuid=UUID, accelerator="tcg", qmp_fd=3, monitor_fd=4, block_devices=frozenset(paths.values()),
        cd_drives=frozenset({f"{PLACE}/sr0"}),
    )  # fmt: skip
    images = [value for option, value in build(instance, host) if option == "-blockdev"]
    drivers = {image["file"]["filename"]: image["file"]["driver"] for image in images if isinstance(image, dict)}
    assert drivers == {f"{PLACE}/sr0": "host_cdrom", f"{PLACE}/device0": "host_device"}


def test_a_user_card_needs_no_descriptor_and_a_tap_gets_its_own() -> None:
    netdevs = options_of(Case(nics("user", "bridged", "routed")), "-netdev")
    assert netdevs == [
        {"type": "user", "id": "netdev0"},
        {"type": "tap", "id": "netdev1", "fd": "21"},
        {"type": "tap", "id": "netdev2", "fd": "22"},
    ]


def test_w27_no_option_that_newer_emulators_dropped() -> None:
    dropped = {*("-no-acpi", "-disable-kvm", "-enable-kvm", "-nographic", "-localtime", "-usbdevice", "-soundhw")}
    dropped |= {*("-drive", "-chroot", "-runas", "-daemonize", "-mem-path", "-usb", "-net")}
    for name, case in CASES.items():
        assert not dropped & {option for option, _ in case.options}, name


def test_w21_an_address_without_a_port_is_refused_and_a_password_never_asked_for_without_a_display() -> None:
    with pytest.raises(ValidationError, match="network_port: a display"):
        assert Case({}, {"vnc_bind_address": "127.0.0.1"}).instance
    with pytest.raises(ValidationError, match="network_port: a display"):
        assert Case({"network_port": 5900}, {"vnc_bind_address": "::1"}).instance
    assert not options_of(CASES["vnc-options-without-vnc"], "-object")


def test_w22_a_password_is_a_descriptor_and_its_file_is_nowhere_in_the_line() -> None:
    for name in ("vnc-password", "vnc-password-tls-x509", "spice-password"):
        argv = render(BINARY, CASES[name].options)
        assert f"{PLACE}/password" not in " ".join(argv)
        assert any("password-secret=" in word for word in argv)


def test_switching_a_device_on_moves_no_disk_or_card_to_another_slot() -> None:
    more = {"vga": "std", "usb_mouse": "tablet", "soundhw": "ac97", "balloon": True, "guest_agent": True}
    guest = disks("disk0") | nics("user")
    plain, full = (options_of(Case(guest, hvparams), "-device") for hvparams in ({}, more))
    assert full[: len(plain)] == plain
    assert len(full) > len(plain) + len(more)


def test_what_has_a_bus_of_its_own_takes_no_pci_slot() -> None:
    def slots(name: str) -> int:
        return pci_devices(CASES[name].options)

    assert [slots(name) for name in ("defaults", "disk-ide", "disks-scsi-7", "floppy-q35")] == [0, 0, 1, 1]
    assert [slots(name) for name in ("disks-paravirtual-24", "nics-8", "nics-ne2k_isa-4")] == [24, 8, 0]
    assert [slots(name) for name in ("vnc", "spice", "sound-hda", "sound-sb16")] == [2, 3, 1, 0]
    assert max(map(slots, CASES)) <= PCI_SLOTS


def test_no_path_or_name_but_the_guests_own_shows_up_in_the_line() -> None:
    """What is only for the master or the network script, such as tags, is nobody's business in ps."""
    argv = " ".join(render(BINARY, Case({"tags": ["secret-tag"], "network_port": 5999} | nics("routed")).options))
    assert "secret-tag" not in argv
    assert "5999" not in argv
    assert "192.0.2.7" not in argv
