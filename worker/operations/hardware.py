"""Whether this host and its QEMU can build the virtual hardware that the hypervisor parameters ask for."""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hostler.cpu_mask import expand, split
from hostler.hvparams import HvParams
from hostler.payloads import Instance
from worker.errors import QemuFailed
from worker.kvm import cloud_init
from worker.kvm.arguments import HostPart, build, pci_devices
from worker.kvm.command_line.disks import CDROMS, IDE_UNITS, SCSI_DISKS, cdrom_types
from worker.kvm.command_line.display import socket_path
from worker.kvm.command_line.network import ISA_IRQS, uses_vhost
from worker.kvm.cpu_mask import online
from worker.kvm.emulator import Features
from worker.kvm.prepared import password_files, read_password

Problem = tuple[str, str]

PCI_SLOTS = 30
"""The bus has 32; the machine takes the first for its bridge and another for its chip set."""
VHOST_DEVICE = Path("/dev/vhost-net")
CERTIFICATES = ("ca-cert.pem", "server-cert.pem", "server-key.pem")
READABLE = ("kernel_path", "initrd_path", *CDROMS, "uefi_code_path", "uefi_vars_template_path")
WRITABLE_FOLDERS = ("mem_path", "vnc_bind_address", "spice_bind")
NO_BUS = frozenset({"sd", "mtd", "pflash"})
NO_BUS_REASON = "no machine that hostler builds has a bus for disks of type sd, mtd or pflash"

NOT_ROOT = "a worker that does not run as root cannot give QEMU other rights than its own"

_DEVICE_FIELDS = {"disk": "disk_type", "scsi0": "disk_type", "virtio-scsi0": "disk_type", "cdrom": "cdrom_disk_type",
                  "floppy": "floppy_image_path", "fdc": "floppy_image_path", "nic": "nic_type", "vga": "vga",
                  "usb-device": "usb_devices", "xhci": "usb_devices", "usb": "usb_mouse", "pointer": "usb_mouse",
                  "sound": "soundhw", "hda": "soundhw", "balloon": "balloon", "vdagent": "spice_use_vdagent",
                  "agent": "guest_agent", "channels": "guest_agent"}  # fmt: skip
"""The parameter that brought a device in, by how the device's id begins."""


UNSUPPORTED: list[tuple[str, Callable[[HvParams], object], str]] = [
    ("disk_type", lambda hv: hv.disk_type in NO_BUS, NO_BUS_REASON),
    ("cdrom_disk_type", lambda hv: hv.cdrom_disk_type in NO_BUS, NO_BUS_REASON),
    ("security_model", lambda hv: hv.security_model != "none" and os.geteuid() != 0, NOT_ROOT),
    ("use_chroot", lambda hv: hv.use_chroot and os.geteuid() != 0, NOT_ROOT),
]
"""(field, when, why): what is understood and cannot be done yet. It is refused, never ignored."""


def unsupported(instance: Instance) -> list[Problem]:
    """Every parameter that this version cannot carry out."""
    hvparams = instance.hvparams
    return [
        (f"hvparams.{field}", f"{getattr(hvparams, field)!r} is not supported: {why}")
        for field, asked, why in UNSUPPORTED
        if asked(hvparams)
    ]


def problems(instance: Instance, features: Features) -> list[Problem]:
    """Everything that keeps this host from building it."""
    hvparams = instance.hvparams
    found = [*_files(hvparams), *_folders(hvparams), *_passwords(hvparams), *_host_features(instance, features)]
    found += [*_processors(hvparams), *_user_data(hvparams)]
    found = [(f"hvparams.{field}", reason) for field, reason in found]
    crowded = [*_buses(instance)]
    return found + crowded if crowded else [*found, *_devices(instance, features)]


def unreadable(path: Path) -> str:
    """Why ``path`` cannot be a disk or another image; empty if it can."""
    try:
        mode = path.stat().st_mode
    except OSError as exc:
        return f"{str(path)!r}: {exc.strerror}"
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        return f"{str(path)!r} is neither a file nor a block device"
    return "" if os.access(path, os.R_OK) else f"{str(path)!r} cannot be read by the worker"


def unwritable(path: Path) -> str:
    """Likewise of one that the guest writes to."""
    reason = unreadable(path)
    return reason or ("" if os.access(path, os.W_OK) else f"{str(path)!r} cannot be written by the worker")


def _files(hvparams: HvParams) -> Iterator[Problem]:
    for field in READABLE:
        path = getattr(hvparams, field)
        if path and (reason := unreadable(Path(path))):
            yield field, reason
    if hvparams.floppy_image_path and (reason := unwritable(Path(hvparams.floppy_image_path))):
        yield "floppy_image_path", reason
    store = Path(hvparams.uefi_vars_path)
    if hvparams.uefi_vars_path and not (hvparams.uefi_vars_template_path and not store.exists()):
        if reason := unwritable(store):
            yield "uefi_vars_path", reason
    elif hvparams.uefi_vars_path and (reason := _no_folder(store.parent)):
        yield "uefi_vars_path", reason


def _folders(hvparams: HvParams) -> Iterator[Problem]:
    for field in WRITABLE_FOLDERS:
        path = getattr(hvparams, field)
        if path.startswith("/") and (reason := _no_folder(Path(path))):
            yield field, reason
    for field, used in (("vnc_x509_path", hvparams.vnc_tls), ("spice_x509_path", hvparams.spice_use_tls)):
        folder = getattr(hvparams, field)
        if folder and not Path(folder).is_dir():
            yield field, f"{folder!r} is no folder"
        elif folder and used:
            reasons = (unreadable(Path(folder, name)) for name in CERTIFICATES)
            yield from ((field, reason) for reason in reasons if reason)


def _no_folder(path: Path) -> str:
    if not path.is_dir():
        return f"{str(path)!r} is no folder"
    return "" if os.access(path, os.W_OK | os.X_OK) else f"{str(path)!r} cannot be written by the worker"


def _passwords(hvparams: HvParams) -> Iterator[Problem]:
    for display, file in password_files(hvparams).items():
        try:
            read_password(Path(file))
        except QemuFailed as exc:
            yield f"{display}_password_file", exc.message


def _processors(hvparams: HvParams) -> Iterator[Problem]:
    there = online()
    wanted = frozenset[int]().union(*(expand(listed, there) for listed in split(hvparams.cpu_mask)))
    if missing := sorted(wanted - there):
        yield "cpu_mask", f"this host has no processor {', '.join(map(str, missing))} (it has {len(there)})"


def _user_data(hvparams: HvParams) -> Iterator[Problem]:
    try:
        cloud_init.user_data(hvparams)
    except QemuFailed as exc:
        yield "cloud_init_user_data_path", exc.message


def _host_features(instance: Instance, features: Features) -> Iterator[Problem]:
    hvparams = instance.hvparams
    if hvparams.security_model == "user":
        try:
            if pwd.getpwnam(hvparams.security_domain).pw_uid == 0:
                yield "security_domain", f"{hvparams.security_domain} is root, which would keep nothing away"
        except (KeyError, ValueError):
            yield "security_domain", f"Unknown security domain user {hvparams.security_domain}"
    if hvparams.disk_aio and hvparams.disk_aio not in features.aio:
        yield "disk_aio", f"QEMU {features.version_text} has no {hvparams.disk_aio}"
    if hvparams.spice_bind and not features.spice:
        yield "spice_bind", f"QEMU {features.version_text} has no SPICE"
    display = socket_path(instance)
    if display and display.exists() and not display.is_socket():
        field = "vnc_bind_address" if hvparams.vnc_bind_address else "spice_bind"
        yield field, f"{str(display)!r} is in the way of the display's socket"  # QEMU would delete it, whatever it is
    has_tap = any(nic.mode != "user" for nic in instance.nics)
    if has_tap and uses_vhost(hvparams) and not os.access(VHOST_DEVICE, os.R_OK | os.W_OK):
        yield "vhost_net", f"{VHOST_DEVICE} cannot be opened; is the kernel's module vhost_net loaded?"


def _buses(instance: Instance) -> Iterator[Problem]:
    kind = instance.hvparams.disk_type
    cds = [*cdrom_types(instance.hvparams).values()]
    for bus, limit in (("ide", IDE_UNITS), ("scsi", SCSI_DISKS)):
        if kind == bus and len(instance.disks) > limit - cds.count(bus):
            room = limit - cds.count(bus)
            yield "disks", f"{len(instance.disks)} are more than disk_type {bus} can connect ({room})"
    if instance.hvparams.nic_type == "ne2k_isa" and len(instance.nics) > len(ISA_IRQS):
        yield "nics", f"{len(instance.nics)} are more than nic_type ne2k_isa can have ({len(ISA_IRQS)})"


def _devices(instance: Instance, features: Features) -> Iterator[Problem]:
    agent_fd = 0 if instance.hvparams.guest_agent else None
    host = HostPart(uuid="", accelerator="", qmp_fd=0, monitor_fd=0, agent_fd=agent_fd)
    options = build(instance, host)
    if (number := pci_devices(options)) > PCI_SLOTS:
        yield "disks", f"with all disks, cards and other devices {number} PCI slots are needed; there are {PCI_SLOTS}"
    devices = [value for name, value in options if name == "-device" and isinstance(value, dict)]
    for driver, device in {device["driver"]: device for device in devices}.items():
        if driver not in features.devices:
            yield f"hvparams.{_field(device)}", f"QEMU {features.version_text} has no device {driver}"


def _field(device: dict[str, Any]) -> str:
    return next(field for beginning, field in _DEVICE_FIELDS.items() if device["id"].startswith(beginning))
