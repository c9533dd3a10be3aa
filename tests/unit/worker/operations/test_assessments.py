"""Warnings: each has a guest that provokes it, and a sober guest has none."""

from __future__ import annotations

from typing import Any

import pytest

from hostler.hvparams import HvParams
from hostler.payloads import Instance
from worker.operations.assessments import NO_EFFECT, assess

SOBER = {"machine_version": "pc-q35-7.2", "cpu_type": "qemu64"}


def warned(hvparams: dict[str, Any], **more: Any) -> list[str]:
    """The fields that are warned of."""
    spec = {"name": "web1", "memory_mib": 16, "network_port": 5999, "hvparams": SOBER | hvparams} | more
    found = assess(Instance.model_validate(spec))
    assert all(reason for _, reason in found)
    return [field.removeprefix("instance.").removeprefix("hvparams.") for field, _ in found]


TLS = {"vnc_tls": True, "vnc_x509_path": "/x509"}
WORTH_A_LOOK: list[tuple[dict[str, Any], list[str]]] = [
    ({}, []),
    ({"machine_version": ""}, ["machine_version"]),
    ({"cpu_type": ""}, ["cpu_type"]),
    ({"acpi": False}, ["acpi"]),
    ({"boot_order": "floppy"}, ["boot_order"]),
    ({"boot_order": "floppy", "floppy_image_path": "/floppy.img"}, []),
    ({"kvm_extra": ["-snapshot"]}, ["kvm_extra"]),
    ({"vnc_bind_address": "192.0.2.1"}, ["vnc_bind_address"] * 2),
    ({"vnc_bind_address": "::1"}, ["vnc_bind_address"]),
    ({"vnc_bind_address": "::1", "vnc_password_file": "/password"}, []),
    ({"vnc_bind_address": "0.0.0.0", "vnc_password_file": "/password"}, ["vnc_bind_address"]),
    ({"vnc_bind_address": "0.0.0.0", "vnc_password_file": "/password", **TLS}, []),
    ({"vnc_bind_address": "0.0.0.0", "vnc_x509_verify": True, **TLS}, []),
    ({"vnc_bind_address": "::1", "vnc_password_file": "/password", "vnc_tls": True}, ["vnc_tls"]),
    (
        {"vnc_bind_address": "::1", "vnc_x509_path": "/x", "vnc_x509_verify": True},
        ["vnc_bind_address", "vnc_x509_path"],
    ),
    ({"vnc_bind_address": "/run"}, []),
    ({"spice_bind": "::"}, ["spice_bind"] * 2),
    ({"spice_bind": "::", "spice_use_tls": True, "spice_x509_path": "/x509"}, ["spice_bind"]),
    ({"spice_bind": "127.0.0.1", "spice_password_file": "/password"}, []),
    ({"disk_cache": "unsafe"}, ["disk_cache"]),
    ({"disk_type": "nvme"}, ["disk_type"]),
    ({"usb_devices": ["tablet", "host:1234:abcd"]}, ["usb_devices"]),
    ({"migration_bandwidth": 32}, ["migration_bandwidth"]),
]


@pytest.mark.parametrize(("hvparams", "fields"), WORTH_A_LOOK, ids=str)
def test_what_is_worth_a_second_look_is_named(hvparams: dict[str, Any], fields: list[str]) -> None:
    assert warned(hvparams) == fields


IDLE: list[dict[str, Any]] = [
    {"initrd_path": "/initrd"},
    {"boot_order": "network", "kernel_path": "/kernel"},
    {"cdrom_disk_type": "ide"},
    {"vhost_net": True, "nic_type": "e1000"},
    {"virtio_net_queues": 2, "nic_type": "e1000"},
    {"vnc_tls": True},
    {"vnc_password_file": "/password"},
    {"vnc_x509_path": "/x509"},
    {"spice_x509_path": "/x509"},
    {"spice_use_tls": True, "spice_x509_path": "/x509"},
    {"spice_password_file": "/password"},
    {"keymap": "de"},
]


@pytest.mark.parametrize("hvparams", IDLE, ids=str)
def test_what_is_set_and_does_nothing_is_said_to(hvparams: dict[str, Any]) -> None:
    assert next(iter(hvparams)) in warned(hvparams)


def test_every_rule_about_idle_parameters_is_provoked_here() -> None:
    assert {field for field, _, _ in NO_EFFECT} == {next(iter(hvparams)) for hvparams in IDLE}
    assert {field for field, _, _ in NO_EFFECT} <= {*HvParams.model_fields}


def test_vncs_protection_does_nothing_on_a_unix_socket() -> None:
    protected = {"vnc_bind_address": "/run", "vnc_password_file": "/password", **TLS}
    assert warned(protected) == ["vnc_tls", "vnc_password_file"]


def test_a_shared_disk_that_is_cached_is_warned_of() -> None:
    def shared(cache: str, mode: str) -> list[str]:
        return warned({"disk_cache": cache}, disks=[{"path": "/a"}, {"path": "/b", "shared": True, "mode": mode}])

    assert shared("default", "rw") == ["disks[1].shared"]
    assert shared("none", "rw") == shared("directsync", "rw") == shared("default", "ro") == []
