"""QEMU's command line as data: a pure function of what the guest shall be and what the host prepared for it.

Values that hold paths travel as JSON (``-blockdev``, ``-device``, ``-netdev``), so that a comma or an equals sign in a
path is a character and not an option. What the guest sees follows Ganeti's KVM module (its disk types, NIC models and
boot orders), said in the words of QEMU 7.2 and later.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hostler.hvparams import HvParams
from hostler.payloads import Disk, Instance, Nic

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
"""Seccomp filters of qemu(1) -sandbox: no old system calls, no setuid, no fork or exec, no scheduler changes."""

NIC_MODELS = {"paravirtual": "virtio-net-pci"}
"""The other nic_type words are QEMU's own device names."""

IDE_UNITS = 4
"""An i440FX machine has two IDE buses of two units, a q35 at least four of one; the CD drive takes the fourth."""


@dataclass(frozen=True)
class HostPart:
    """What the host prepared: file descriptors QEMU inherits, and what was found out about files and accelerator."""

    uuid: str
    accelerator: str
    qmp_fd: int
    monitor_fd: int
    serial_fd: int | None = None
    tap_fds: dict[int, int] = field(default_factory=dict)
    block_devices: frozenset[str] = frozenset()


Option = tuple[str, str | dict[str, Any] | None]


def build(instance: Instance, host: HostPart) -> list[Option]:
    """The options for ``instance``, in order. Nothing is opened, looked up or changed."""
    hvparams = instance.hvparams
    return [
        *_identity(instance, host),
        *_machine(instance, host),
        *_channels(host),
        *_boot(hvparams),
        *_disks(instance, host),
        *_cdrom(hvparams),
        *_nics(instance, host),
    ]


def render(binary: str, options: list[Option]) -> list[str]:
    """The argv: objects become compact JSON."""
    argv = [binary]
    for name, value in options:
        argv.append(name)
        if isinstance(value, dict):
            argv.append(json.dumps(value, separators=(",", ":")))
        elif value is not None:
            argv.append(value)
    return argv


def _identity(instance: Instance, host: HostPart) -> Iterator[Option]:
    yield "-name", instance.name
    yield "-uuid", host.uuid
    yield "-nodefaults", None
    yield "-no-user-config", None
    yield "-S", None
    yield "-display", "none"
    yield "-vga", "none"
    yield "-sandbox", SANDBOX
    yield "-msg", "timestamp=on"


def _machine(instance: Instance, host: HostPart) -> Iterator[Option]:
    hvparams = instance.hvparams
    yield "-machine", f"{hvparams.machine_version or 'pc'},acpi={'on' if hvparams.acpi else 'off'},usb=off"
    yield "-accel", host.accelerator
    yield "-cpu", hvparams.cpu_type or ("host" if host.accelerator == "kvm" else "max")
    yield "-smp", str(instance.vcpus)
    yield "-m", f"{instance.memory_mib}M"
    yield "-rtc", f"base={'localtime' if hvparams.use_localtime else 'utc'}"


def _channels(host: HostPart) -> Iterator[Option]:
    yield "-chardev", f"socket,id=qmp,fd={host.qmp_fd},server=on,wait=off"
    yield "-mon", "chardev=qmp,mode=control"
    # Standard input holds the capabilities handshake, standard output is a file: QEMU's own record of its events, which
    # tells the next worker why a guest ended while none was there to listen.
    yield "-chardev", "stdio,id=journal,signal=off"
    yield "-mon", "chardev=journal,mode=control"
    yield "-chardev", f"socket,id=monitor,fd={host.monitor_fd},server=on,wait=off"
    yield "-mon", "chardev=monitor,mode=readline"
    if host.serial_fd is not None:
        yield "-chardev", f"socket,id=serial0,fd={host.serial_fd},server=on,wait=off"
        yield "-serial", "chardev:serial0"


def _boot(hvparams: HvParams) -> Iterator[Option]:
    if hvparams.kernel_path:
        yield "-kernel", hvparams.kernel_path
        if hvparams.initrd_path:
            yield "-initrd", hvparams.initrd_path
        console = " console=ttyS0,38400" if hvparams.serial_console else ""
        yield "-append", f"root={hvparams.root_path} {hvparams.kernel_args}{console}"


def _disks(instance: Instance, host: HostPart) -> Iterator[Option]:
    hvparams = instance.hvparams
    if hvparams.disk_type == "scsi" and instance.disks:
        yield "-device", {"driver": "lsi53c895a", "id": "scsi0"}
    for index, disk in enumerate(instance.disks):
        node = f"disk{index}"
        yield "-blockdev", _block_node(node, disk, hvparams.disk_cache, disk.path in host.block_devices)
        device = _disk_device(hvparams, index)
        device |= {"id": f"{node}-device", "drive": node}
        if disk.shared:
            device["share-rw"] = True
        if hvparams.disk_cache == "writethrough":
            device["write-cache"] = "off"
        if index == 0 and hvparams.boot_order == "disk" and not hvparams.kernel_path:
            device["bootindex"] = 1
        yield "-device", device


def _block_node(node: str, disk: Disk, cache: str, is_block_device: bool) -> dict[str, Any]:
    file: dict[str, Any] = {"driver": "host_device" if is_block_device else "file", "filename": disk.path}
    if cache == "none":
        file["cache"] = {"direct": True}
    return {
        "node-name": node,
        "driver": disk.format,
        "read-only": disk.mode == "ro",
        "discard": "unmap",
        "cache": {"direct": cache == "none"},
        "file": file,
    }


def _disk_device(hvparams: HvParams, index: int) -> dict[str, Any]:
    if hvparams.disk_type == "ide":
        return {"driver": "ide-hd"} | _ide_place(hvparams, index)
    if hvparams.disk_type == "scsi":
        return {"driver": "scsi-hd", "bus": "scsi0.0", "scsi-id": index}
    return {"driver": "virtio-blk-pci"}


def _ide_place(hvparams: HvParams, unit: int) -> dict[str, Any]:
    if "q35" in hvparams.machine_version:
        return {"bus": f"ide.{unit}", "unit": 0}
    return {"bus": f"ide.{unit // 2}", "unit": unit % 2}


def _cdrom(hvparams: HvParams) -> Iterator[Option]:
    if hvparams.cdrom_image_path:
        file = {"driver": "file", "filename": hvparams.cdrom_image_path}
        yield "-blockdev", {"node-name": "cdrom0", "driver": "raw", "read-only": True, "file": file}
        device: dict[str, Any] = {"driver": "ide-cd", "id": "cdrom0-device", "drive": "cdrom0"}
        device |= _ide_place(hvparams, IDE_UNITS - 1)
        if hvparams.boot_order == "cdrom" and not hvparams.kernel_path:
            device["bootindex"] = 1
        yield "-device", device


def _nics(instance: Instance, host: HostPart) -> Iterator[Option]:
    for index, nic in enumerate(instance.nics):
        yield "-netdev", _netdev(index, nic, host)
        hvparams = instance.hvparams
        device: dict[str, Any] = {
            "driver": NIC_MODELS.get(hvparams.nic_type, hvparams.nic_type),
            "id": f"nic{index}",
            "netdev": f"netdev{index}",
            "mac": nic.mac,
        }
        if index == 0 and hvparams.boot_order == "network" and not hvparams.kernel_path:
            device["bootindex"] = 1
        yield "-device", device


def _netdev(index: int, nic: Nic, host: HostPart) -> dict[str, Any]:
    if nic.mode == "user":
        return {"type": "user", "id": f"netdev{index}"}
    return {"type": "tap", "id": f"netdev{index}", "fd": str(host.tap_fds[index])}
