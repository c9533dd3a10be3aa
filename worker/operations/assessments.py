"""What is allowed and worth a second look: warnings of ``instance.check``. Nothing here looks at the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import ip_address

from hostler.hvparams import HvParams
from hostler.payloads import Instance
from worker.kvm.command_line.disks import BYPASS, cdrom_types

Problem = tuple[str, str]

SLOW_MIGRATION_MIB_PER_S = 100
"""A gigabit; many a guest writes to its memory faster, and such a one never arrives."""

_ON_A_SOCKET = "has no effect on a unix socket, whose folder's rights protect it"


def _vnc_unused(hv: HvParams) -> str:
    return _ON_A_SOCKET if hv.vnc_bind_address else "has no effect without vnc_bind_address"


NO_EFFECT: list[tuple[str, Callable[[HvParams], object], Callable[[HvParams], str]]] = [
    ("initrd_path", lambda hv: not hv.kernel_path, lambda hv: "has no effect without kernel_path"),
    ("boot_order", lambda hv: hv.boot_order != "disk" and hv.kernel_path, lambda hv: "has no effect with kernel_path"),
    ("cdrom_disk_type", lambda hv: not cdrom_types(hv), lambda hv: "has no effect without a CD"),
    ("vhost_net", lambda hv: hv.nic_type != "paravirtual", lambda hv: f"has no effect on nic_type {hv.nic_type}"),
    ("virtio_net_queues", lambda hv: hv.virtio_net_queues > 1 and hv.nic_type != "paravirtual",
     lambda hv: f"has no effect on nic_type {hv.nic_type}"),
    *((name, lambda hv: not hv.vnc_bind_address or hv.vnc_bind_address.startswith("/"), _vnc_unused)
      for name in ("vnc_tls", "vnc_password_file")),
    ("vnc_x509_path", lambda hv: not hv.vnc_tls, lambda hv: "has no effect without vnc_tls"),
    ("spice_x509_path", lambda hv: not hv.spice_use_tls, lambda hv: "has no effect without spice_use_tls"),
    *((name, lambda hv: not hv.spice_bind, lambda hv: "has no effect without spice_bind")
      for name in ("spice_use_tls", "spice_password_file")),
    ("keymap", lambda hv: not hv.vnc_bind_address, lambda hv: "has no effect without vnc_bind_address"),
]  # fmt: skip
"""(field, when, why) of parameters that are set and do nothing."""


def assess(instance: Instance) -> list[Problem]:
    """Every warning, as (field, reason)."""
    hvparams = instance.hvparams
    about_hvparams = [
        *_machine(hvparams),
        *_display(hvparams),
        *_data(hvparams),
        *_migration(hvparams),
        *((field, why(hvparams)) for field, idle, why in NO_EFFECT if getattr(hvparams, field) and idle(hvparams)),
    ]
    found = [*((f"hvparams.{field}", reason) for field, reason in about_hvparams), *_shared_disks(instance)]
    return [(f"instance.{field}", reason) for field, reason in found]


def _machine(hvparams: HvParams) -> Iterator[Problem]:
    if not hvparams.machine_version:
        yield "machine_version", "unset: pinned to this QEMU's newest at the first start"
    if not hvparams.cpu_type:
        yield (
            "cpu_type",
            "unset: the guest sees this host's processor, and can live_migrate only to one that has it all",
        )
    if not hvparams.acpi:
        yield "acpi", "off: the guest cannot be asked to shut down and will be killed"
    if hvparams.boot_order == "floppy" and not hvparams.floppy_image_path:
        yield "boot_order", "floppy without floppy_image_path: the firmware looks for something else to boot"
    if hvparams.kvm_extra:
        yield "kvm_extra", "is passed to QEMU unchecked: it can open any file and take the guest out of hostler's sight"


def _display(hvparams: HvParams) -> Iterator[Problem]:
    displays = (
        ("vnc", hvparams.vnc_bind_address, hvparams.vnc_tls, hvparams.vnc_password_file, "vnc_bind_address"),
        ("spice", hvparams.spice_bind, hvparams.spice_use_tls, hvparams.spice_password_file, "spice_bind"),
    )
    for name, address, tls, password, field in displays:
        if not address or address.startswith("/"):
            continue
        if not tls and not ip_address(address).is_loopback:
            yield field, f"{name} without TLS: what is typed can be read on the network"
        verified = name == "vnc" and tls and hvparams.vnc_x509_verify
        if not password and not verified:
            yield field, f"{name} without a password: whoever reaches the port sits at the guest's keyboard"
    if hvparams.vnc_bind_address and hvparams.vnc_tls and not hvparams.vnc_x509_path:
        yield "vnc_tls", "without vnc_x509_path the clients cannot know whom they talk to"


def _data(hvparams: HvParams) -> Iterator[Problem]:
    if hvparams.disk_cache == "unsafe":
        yield "disk_cache", "unsafe: the guest's flushes are ignored, a crash of the host destroys its file systems"


def _shared_disks(instance: Instance) -> Iterator[Problem]:
    for index, disk in enumerate(instance.disks):
        if disk.shared and disk.mode == "rw" and instance.hvparams.disk_cache not in BYPASS:
            yield f"disks[{index}].shared", "other hosts do not see what this one caches; use disk_cache none"


def _migration(hvparams: HvParams) -> Iterator[Problem]:
    if hvparams.disk_type == "nvme":
        yield "disk_type", "nvme: QEMU cannot live_migrate a guest with NVMe disks"
    if any(device.startswith("host:") for device in hvparams.usb_devices):
        yield "usb_devices", "a guest with a device of its host cannot be live_migrated"
    if hvparams.migration_bandwidth < SLOW_MIGRATION_MIB_PER_S:
        yield "migration_bandwidth", f"below {SLOW_MIGRATION_MIB_PER_S} MiB/s a busy guest's migration may never end"
