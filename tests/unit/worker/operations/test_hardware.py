"""What this host and its QEMU can build of what the hypervisor parameters ask for; all problems at once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from hostler.hvparams import HvParams
from hostler.payloads import Instance
from tests.services import missing
from tests.unit.worker.kvm.golden_cases import CASES, disks, nics, numbered
from worker.kvm import emulator
from worker.kvm.emulator import Features
from worker.operations import hardware


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Features:
    """Of this host's real QEMU."""
    if not shutil.which("qemu-system-x86_64"):
        missing("qemu-system-x86_64", "not on PATH")
    return emulator.probe(emulator.find(), tmp_path_factory.mktemp("cache"))


def guest(hvparams: dict[str, Any], **more: Any) -> Instance:
    spec = {"name": "web1", "memory_mib": 16, "network_port": 5999} | more
    return Instance.model_validate(spec | {"hvparams": hvparams})


def wrong(features: Features, hvparams: dict[str, Any], **more: Any) -> dict[str, str]:
    found = hardware.problems(guest(hvparams, **more), features)
    return {field.removeprefix("hvparams."): reason for field, reason in found}


FILES = {
    *("kernel_path", "initrd_path", "floppy_image_path", "cdrom_image_path", "cdrom2_image_path"),
    *("cloud_init_image_path", "uefi_code_path", "uefi_vars_path"),
}


def test_files_and_folders_that_are_not_there_are_all_named_at_once(features: Features, tmp_path: Path) -> None:
    password = {"vnc_password_file": "/no/password"}
    folders = {"vnc_x509_path": "/no/x509", "spice_x509_path": "/no/x509", "mem_path": "/no/memory"}
    hvparams = dict.fromkeys(FILES, "/no/file") | folders | password | {"vnc_bind_address": "::1"}
    assert wrong(features, hvparams).keys() == FILES | folders.keys() | password.keys()
    assert wrong(features, {name: str(tmp_path) for name in FILES}).keys() == FILES, "a folder is no file"
    assert wrong(features, {"vnc_bind_address": "/no/folder"}).keys() == {"vnc_bind_address"}
    assert wrong(features, {"spice_bind": "/dev/null"}).keys() == {"spice_bind"}


def test_what_is_there_is_right(features: Features, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("secret\n")
    for name in hardware.CERTIFICATES:
        (tmp_path / name).touch()
    paths = dict.fromkeys(FILES, str(file)) | {"vnc_password_file": str(file)}
    folders = {"vnc_x509_path": str(tmp_path), "mem_path": str(tmp_path)}
    assert wrong(features, paths | folders | {"vnc_bind_address": "::1", "vnc_tls": True}) == {}
    assert wrong(features, {"vnc_bind_address": str(tmp_path)}) == {}


def test_certificates_are_looked_for_where_they_are_used(features: Features, tmp_path: Path) -> None:
    vnc = {"vnc_bind_address": "::1", "vnc_x509_path": str(tmp_path)}
    assert wrong(features, vnc) == {}
    assert wrong(features, vnc | {"vnc_tls": True}).keys() == {"vnc_x509_path"}
    spice = {"spice_bind": "::1", "spice_use_tls": True, "spice_x509_path": str(tmp_path)}
    assert wrong(features, spice).keys() == {"spice_x509_path"}


def test_a_variable_store_may_be_missing_where_there_is_a_template_and_a_folder(
    features: Features, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    code = {"uefi_code_path": str(file)}
    new = code | {"uefi_vars_path": str(tmp_path / "vars.fd")}
    assert wrong(features, new).keys() == {"uefi_vars_path"}
    assert wrong(features, new | {"uefi_vars_template_path": str(file)}) == {}
    assert wrong(features, new | {"uefi_vars_template_path": "/no/file"}).keys() == {"uefi_vars_template_path"}
    nowhere = code | {"uefi_vars_path": "/no/vars.fd", "uefi_vars_template_path": str(file)}
    assert wrong(features, nowhere).keys() == {"uefi_vars_path"}


def test_a_security_domain_that_is_no_login_is_named(features: Features) -> None:
    unknown = wrong(features, {"security_model": "user", "security_domain": "nobody-at-all"})
    assert unknown == {"security_domain": "Unknown security domain user nobody-at-all"}
    root = wrong(features, {"security_model": "user", "security_domain": "root"})
    assert root == {"security_domain": "root is root, which would keep nothing away"}
    assert wrong(features, {"security_model": "user", "security_domain": "nobody"}) == {}


@pytest.mark.parametrize(
    ("hvparams", "spec", "field"),
    [
        ({"disk_type": "ide"}, disks(*numbered(5)), "disks"),
        ({"disk_type": "ide", "cdrom_image_path": "/dev/null"}, disks(*numbered(4)), "disks"),
        ({"disk_type": "scsi"}, disks(*numbered(8)), "disks"),
        ({"disk_type": "scsi", "cdrom2_image_path": "/dev/null"}, disks(*numbered(7)), "disks"),
        ({"nic_type": "ne2k_isa"}, nics(*["user"] * 5), "nics"),
        ({}, disks(*numbered(24)) | nics(*["user"] * 7), "disks"),
        ({"disk_type": "nvme", "vga": "std"}, disks(*numbered(24)) | nics(*["user"] * 6), "disks"),
    ],
)
def test_what_finds_no_place_on_its_bus_is_named(
    features: Features, hvparams: dict[str, Any], spec: dict[str, Any], field: str
) -> None:
    assert field in wrong(features, hvparams, **spec)


def test_as_many_as_there_are_places_fit(features: Features) -> None:
    assert wrong(features, {"disk_type": "ide"}, **disks(*numbered(4))) == {}
    assert wrong(features, {"disk_type": "scsi"}, **disks(*numbered(7))) == {}
    assert wrong(features, {}, **(disks(*numbered(24)) | nics(*["user"] * 6))) == {}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "vhost" not in name])
def test_this_qemu_has_every_device_of_the_golden_lines(features: Features, name: str) -> None:
    assert [*hardware._devices(CASES[name].instance, features)] == []


@pytest.mark.parametrize(
    ("driver", "hvparams", "field"),
    [
        ("virtio-blk-pci", {}, "disk_type"),
        ("lsi53c895a", {"disk_type": "scsi"}, "disk_type"),
        ("ide-cd", {"cdrom_image_path": "/cd.iso"}, "cdrom_disk_type"),
        ("floppy", {"floppy_image_path": "/floppy.img"}, "floppy_image_path"),
        ("e1000", {"nic_type": "e1000"}, "nic_type"),
        ("qxl-vga", {"spice_bind": "::1"}, "vga"),
        ("usb-tablet", {"vnc_bind_address": "::1"}, "usb_mouse"),
        ("usb-host", {"usb_devices": ["host:1234:abcd"]}, "usb_devices"),
        ("AC97", {"soundhw": "ac97"}, "soundhw"),
        ("virtio-balloon-pci", {"balloon": True}, "balloon"),
        ("virtserialport", {"guest_agent": True}, "guest_agent"),
    ],
)
def test_a_device_that_was_left_out_of_this_qemu_is_named_by_its_parameter(
    features: Features, driver: str, hvparams: dict[str, Any], field: str
) -> None:
    poorer = features.model_copy(update={"devices": features.devices - {driver}})
    instance = guest(hvparams, **(disks("disk0") | nics("user")))
    ((found, reason),) = hardware._devices(instance, poorer)
    assert (found, driver in reason) == (f"hvparams.{field}", True)


def test_what_this_qemu_was_built_without_is_named(features: Features) -> None:
    poorer = features.model_copy(update={"aio": frozenset({"threads"}), "spice": False})
    assert wrong(poorer, {"disk_aio": "io_uring"}).keys() == {"disk_aio"}
    assert wrong(poorer, {"spice_bind": "::1"}).keys() == {"spice_bind"}
    assert {"threads", "native"} <= features.aio


def test_vhost_needs_the_kernels_device_for_a_virtio_card_with_a_tap(
    features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "VHOST_DEVICE", Path("/no/vhost-net"))
    assert wrong(features, {"vhost_net": True}, **nics("routed")).keys() == {"vhost_net"}
    assert wrong(features, {"vhost_net": True}, **nics("user")) == {}
    assert wrong(features, {"vhost_net": True, "nic_type": "e1000"}, **nics("routed")) == {}


@pytest.mark.parametrize("bound", ["vnc_bind_address", "spice_bind"])
def test_a_file_where_a_displays_socket_shall_be_is_not_deleted_but_named(
    features: Features, tmp_path: Path, bound: str
) -> None:
    (tmp_path / f"web1.{bound.split('_', maxsplit=1)[0]}").write_text("somebody's")
    assert wrong(features, {bound: str(tmp_path)}).keys() == {bound}


def test_a_processor_that_the_host_has_not_is_named(features: Features) -> None:
    assert wrong(features, {"cpu_mask": "all,^0"}) == wrong(features, {"cpu_mask": "0"}) == {}
    assert "no processor 4095" in wrong(features, {"cpu_mask": "0,4095"})["cpu_mask"]
    assert wrong(features, {"cpu_mask": "0:4095"}, vcpus=2).keys() == {"cpu_mask"}


def test_user_data_that_cannot_be_read_are_named_and_not_shown(features: Features, tmp_path: Path) -> None:
    file = tmp_path / "user-data"
    assert wrong(features, {"cloud_init_user_data_path": str(file)}).keys() == {"cloud_init_user_data_path"}
    file.write_bytes(b"secret" * 200_000)
    reason = wrong(features, {"cloud_init_user_data_path": str(file)})["cloud_init_user_data_path"]
    assert "1048576" in reason and "secret" not in reason
    file.write_bytes(b"")
    assert wrong(features, {"cloud_init_user_data_path": str(file)}) == {}


NOT_YET: list[dict[str, Any]] = [
    *({name: kind} for name in ("disk_type", "cdrom_disk_type") for kind in ("sd", "mtd", "pflash")),
]
NEEDS_ROOT: list[dict[str, Any]] = [
    *({"security_model": "pool"}, {"use_chroot": True}, {"security_model": "user", "security_domain": "nobody"}),
]


@pytest.mark.parametrize("hvparams", NOT_YET, ids=str)
def test_what_cannot_be_done_yet_is_refused_by_name(hvparams: dict[str, Any]) -> None:
    ((field, reason),) = hardware.unsupported(guest(hvparams))
    name = next(iter(hvparams))
    assert (field, "is not supported" in reason) == (f"hvparams.{name}", True)


@pytest.mark.parametrize("hvparams", NEEDS_ROOT, ids=str)
def test_only_a_worker_that_is_root_can_give_qemu_other_rights(
    hvparams: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert hardware.unsupported(guest(hvparams)) == []
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    ((field, reason),) = hardware.unsupported(guest(hvparams))
    assert field == f"hvparams.{next(iter(hvparams))}"
    assert "a worker that does not run as root" in reason


def test_what_is_asked_for_and_in_no_line_is_refused_and_a_default_never_is() -> None:
    assert hardware.unsupported(guest({})) == []
    assert {name for name, _, _ in hardware.UNSUPPORTED} <= {*HvParams.model_fields}
    for name, case in CASES.items():
        assert hardware.unsupported(case.instance) == [], name
