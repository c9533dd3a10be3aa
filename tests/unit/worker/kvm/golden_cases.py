"""The guests whose command lines are kept as golden files, and how such a file is read and written.

Paths lie below :data:`PLACE`, which does not exist: a test that starts a line puts a folder of its own there. File
descriptors are fixed numbers, to be exchanged likewise.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hostler.payloads import Instance
from worker.kvm.arguments import HostPart, Option, build

GOLDEN = Path(__file__).parent / "golden"
PLACE = "/golden"
BINARY = "qemu-system-x86_64"
UUID = "5b8f1c9a-3c37-4b57-9d2e-8f0f5a3c6d10"
QMP_FD, MONITOR_FD, SERIAL_FD, FIRST_TAP_FD = 10, 11, 12, 20
ODD_NAME = "a,b=c 'd' \"e\" \\f,,{g} ü🚀"
"""Everything that QEMU's option syntax, JSON or a shell could take for something else."""


@dataclass(frozen=True)
class Case:
    """One guest. ``block_devices`` are those of its disks that are devices of the host."""

    spec: dict[str, Any] = field(default_factory=dict)
    hvparams: dict[str, Any] = field(default_factory=dict)
    accelerator: str = "tcg"
    block_devices: frozenset[str] = frozenset()

    @property
    def instance(self) -> Instance:
        return Instance.model_validate({"name": "web1", "memory_mib": 32, **self.spec, "hvparams": self.hvparams})

    @property
    def options(self) -> list[Option]:
        instance = self.instance
        taps = [index for index, nic in enumerate(instance.nics) if nic.mode != "user"]
        host = HostPart(
            uuid=UUID,
            accelerator=self.accelerator,
            qmp_fd=QMP_FD,
            monitor_fd=MONITOR_FD,
            serial_fd=SERIAL_FD if instance.hvparams.serial_console else None,
            tap_fds={index: FIRST_TAP_FD + index for index in taps},
            block_devices=self.block_devices,
        )
        return build(instance, host)


def disks(*names: str, **more: Any) -> dict[str, Any]:
    return {"disks": [{"path": f"{PLACE}/{name}", **more} for name in names]}


def nics(*modes: str) -> dict[str, Any]:
    links = {"bridged": "br0", "routed": "100", "user": ""}
    addresses = {"bridged": "", "routed": "192.0.2.7", "user": ""}
    return {
        "nics": [
            {"mac": f"52:54:00:00:00:{index:02x}", "mode": mode, "link": links[mode], "ip": addresses[mode]}
            for index, mode in enumerate(modes)
        ]
    }


def numbered(count: int) -> list[str]:
    return [f"disk{index}" for index in range(count)]


KERNEL = {"kernel_path": f"{PLACE}/vmlinuz"}
INITRD = KERNEL | {"initrd_path": f"{PLACE}/initrd"}
CDROM = {"cdrom_image_path": f"{PLACE}/cd.iso"}
NIC_TYPES = ("paravirtual", "e1000", "rtl8139", "ne2k_pci", "i82551", "i82557b", "i82559er", "pcnet")

CASES: dict[str, Case] = {
    "defaults": Case(),
    "size": Case(
        {"name": "db-1.example_site.org", "memory_mib": 1024, "vcpus": 4, "tags": ["a"], "network_port": 5901}
    ),
    "longest-name": Case({"name": "n" * 255}),
    # disks: every type, every cache mode, every property
    **{f"disk-{kind}": Case(disks("disk0", "disk1"), {"disk_type": kind}) for kind in ("paravirtual", "ide", "scsi")},
    **{
        f"cache-{mode}-{kind}": Case(disks("disk0"), {"disk_cache": mode, "disk_type": kind})
        for mode in ("default", "none", "writethrough", "writeback")
        for kind in ("paravirtual", "ide", "scsi")
    },
    "disk-qcow2": Case(disks("disk0.qcow2", format="qcow2")),
    "disk-read-only": Case(disks("disk0", mode="ro")),
    "disk-read-only-scsi": Case(disks("disk0", mode="ro"), {"disk_type": "scsi"}),
    **{
        f"disk-shared-{kind}": Case(disks("disk0", shared=True), {"disk_type": kind})
        for kind in ("paravirtual", "ide", "scsi")
    },
    "disk-shared-read-only": Case(disks("disk0", shared=True, mode="ro")),
    "disk-odd-path": Case(disks(ODD_NAME)),
    "disk-odd-path-scsi-cache-none": Case(disks(ODD_NAME), {"disk_type": "scsi", "disk_cache": "none"}),
    "disk-block-device": Case(
        disks("device0", "disk1"), {"disk_cache": "none"}, block_devices=frozenset({f"{PLACE}/device0"})
    ),
    "disk-block-device-odd-path": Case(disks(ODD_NAME), block_devices=frozenset({f"{PLACE}/{ODD_NAME}"})),
    "disks-ide-4": Case(disks(*numbered(4)), {"disk_type": "ide"}),
    "disks-ide-3-and-cdrom": Case(disks(*numbered(3)), {"disk_type": "ide"} | CDROM),
    "disks-scsi-7": Case(disks(*numbered(7)), {"disk_type": "scsi"}),
    "disks-paravirtual-24": Case(disks(*numbered(24))),
    # network cards: every model, every mode
    **{f"nic-{kind}-user": Case(nics("user"), {"nic_type": kind}) for kind in NIC_TYPES},
    **{f"nic-{kind}-tap": Case(nics("bridged"), {"nic_type": kind}) for kind in NIC_TYPES},
    "nics-every-mode": Case(nics("bridged", "routed", "user")),
    "nics-8": Case(nics(*["user", "routed"] * 4)),
    # what it boots from
    **{
        f"boot-{order}": Case(disks("disk0", "disk1") | nics("user", "user"), {"boot_order": order} | CDROM)
        for order in ("disk", "cdrom", "network")
    },
    "boot-cdrom-without-disk": Case({}, {"boot_order": "cdrom"} | CDROM),
    "boot-network-routed": Case(nics("routed"), {"boot_order": "network"}),
    "cdrom-odd-path": Case({}, {"cdrom_image_path": f"{PLACE}/{ODD_NAME}"}),
    "kernel": Case(disks("disk0"), KERNEL),
    "kernel-without-serial-console": Case(disks("disk0"), KERNEL | {"serial_console": False}),
    "kernel-initrd-root-args": Case(
        disks("disk0"), INITRD | {"root_path": "UUID=1-2,3", "kernel_args": "ro quiet init=/bin/sh -- 'a b', \"c\" ü🚀"}
    ),
    "kernel-odd-path": Case({}, {"kernel_path": f"{PLACE}/{ODD_NAME}", "kernel_args": ""}),
    **{
        f"kernel-boot-order-{order}": Case(disks("disk0") | nics("user"), INITRD | CDROM | {"boot_order": order})
        for order in ("disk", "cdrom", "network")
    },
    "initrd-without-kernel": Case({}, {"initrd_path": f"{PLACE}/initrd"}),
    # the machine
    "acpi-off": Case(disks("disk0"), {"acpi": False}),
    "serial-console-off": Case(disks("disk0"), {"serial_console": False}),
    "localtime": Case({}, {"use_localtime": True}),
    "kvm-enabled": Case(disks("disk0"), {"kvm_flag": "enabled"}, accelerator="kvm"),
    "kvm-disabled": Case(disks("disk0"), {"kvm_flag": "disabled"}),
    "kvm-by-default": Case(disks("disk0"), accelerator="kvm"),
    "cpu-under-tcg": Case({}, {"cpu_type": "qemu64"}),
    "cpu-under-kvm": Case({}, {"cpu_type": "max"}, accelerator="kvm"),
    "machine-pinned": Case(disks("disk0"), {"machine_version": "pc-i440fx-7.2"}),
    **{
        f"machine-q35-{kind}": Case(disks("disk0", "disk1", "disk2"), {"machine_version": "q35", "disk_type": kind})
        for kind in ("paravirtual", "ide", "scsi")
    },
    "machine-q35-cdrom": Case(
        disks("disk0", "disk1", "disk2") | nics("user"),
        {"machine_version": "pc-q35-7.2", "disk_type": "ide", "boot_order": "cdrom"} | CDROM,
    ),
    "everything": Case(
        {"vcpus": 2, "disks": disks("disk0")["disks"] + disks("disk1", mode="ro", shared=True)["disks"]}
        | nics("bridged", "user"),
        INITRD
        | CDROM
        | {"disk_cache": "writeback", "cpu_type": "max", "machine_version": "pc", "nic_type": "e1000", "acpi": True},
    ),
}


def to_text(options: list[Option]) -> str:
    """One option a line, as QEMU gets it."""
    lines = []
    for name, value in options:
        text = json.dumps(value, separators=(",", ":")) if isinstance(value, dict) else value
        lines.append(name if text is None else f"{name} {text}")
    return "\n".join(lines) + "\n"


def to_argv(text: str) -> list[str]:
    """The words of a golden file, without the program."""
    return [word for line in text.splitlines() for word in line.split(" ", 1)]


def golden_file(name: str) -> Path:
    return GOLDEN / f"{name}.txt"
