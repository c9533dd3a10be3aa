"""What must hold between hypervisor parameters, and between them and the rest of the instance. Needs no host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from pydantic_core import PydanticCustomError

from hostler import cpu_mask

if TYPE_CHECKING:
    from hostler.hvparams import HvParams
    from hostler.payloads import Instance

CROSS_CHECK = "cross_check"
"""The type of pydantic's error; its context's ``problems`` are (field, reason), all that were found."""

FIRST_DISPLAY_PORT = 5900
SOCKET_PATH_MAX_BYTES = 107
"""sun_path of unix(7) is 108 bytes with its NUL."""

LIMITS = ("cgroup_memory_max_mib", "cgroup_cpu_max_percent", "cgroup_cpu_weight")
QEMU_ITSELF_MIB = 64
"""What a QEMU needs beside the memory of its guest, at least: 37 to 42 MiB were seen of 7.2, hardly any the guest's."""

SEED_PARTS = (
    "cloud_init_user_data", "cloud_init_user_data_path", "cloud_init_meta_data", "cloud_init_network_config"
)  # fmt: skip
"""Any of these has the node make a seed for cloud-init."""

_NO_DRIVE = "a CD of cdrom_disk_type paravirtual is a disk, which cannot be taken out"

CROSS_CHECKS: list[tuple[str, Callable[[HvParams], object], str]] = [
    ("root_path", lambda hv: hv.kernel_path and not hv.root_path,
     "Need a root partition for the instance, if a kernel is defined"),
    ("vnc_x509_path", lambda hv: hv.vnc_x509_verify and not hv.vnc_x509_path,
     "vnc_x509_path must be defined, if vnc_x509_verify is"),
    ("cdrom_image_path", lambda hv: hv.boot_order == "cdrom" and not (hv.cdrom_image_path or hv.cdrom_drive),
     "Cannot boot from cdrom without an ISO path"),
    ("cdrom_drive", lambda hv: hv.cdrom_drive and hv.cdrom_disk_type == "paravirtual", _NO_DRIVE),
    ("cdrom2_drive", lambda hv: hv.cdrom2_drive and hv.cdrom_disk_type == "paravirtual", _NO_DRIVE),
    ("balloon", lambda hv: (hv.memory_min_mib or hv.memory_max_mib) and not hv.balloon,
     "memory_min_mib and memory_max_mib are bounds of a balloon"),
    ("security_domain", lambda hv: hv.security_model == "user" and not hv.security_domain,
     "A security domain (user to run kvm as) must be specified"),
    ("security_domain", lambda hv: hv.security_model != "user" and hv.security_domain,
     "Cannot have a security domain when the security model is 'none' or 'pool'"),
    ("spice_bind", lambda hv: hv.vnc_bind_address and hv.spice_bind,
     "an instance has one display: VNC or SPICE, not both"),
    ("spice_x509_path", lambda hv: hv.spice_use_tls and not hv.spice_x509_path,
     "spice_x509_path must be defined, if spice_use_tls is"),
    ("spice_use_tls", lambda hv: hv.spice_use_tls and hv.spice_bind.startswith("/"),
     "SPICE has no TLS on a unix socket"),
    ("disk_cache", lambda hv: hv.disk_aio == "native" and hv.disk_cache not in ("none", "directsync"),
     "disk_aio native needs disk_cache none or directsync"),
    ("cloud_init_user_data_path", lambda hv: hv.cloud_init_user_data and hv.cloud_init_user_data_path,
     "user data are either inline or in a file"),
    ("cloud_init_image_path", lambda hv: hv.cloud_init_image_path and hv.has_seed,
     "a seed is either an image or made from data"),
    ("uefi_vars_path", lambda hv: hv.uefi_code_path and not hv.uefi_vars_path,
     "UEFI needs a variable store of the guest's own"),
    ("uefi_code_path", lambda hv: hv.uefi_vars_path and not hv.uefi_code_path,
     "a variable store needs its firmware"),
    ("uefi_vars_path", lambda hv: hv.uefi_vars_template_path and not hv.uefi_vars_path,
     "a template of a variable store needs a place to copy it to"),
]  # fmt: skip
"""(field, what is wrong, reason) of what the parameters say to each other."""


def cross_check(hvparams: HvParams) -> None:
    """Raises PydanticCustomError with everything in :data:`CROSS_CHECKS` that is wrong."""
    _refuse((field, reason) for field, wrong, reason in CROSS_CHECKS if wrong(hvparams))


def check_instance(instance: Instance) -> None:
    """Likewise of what the parameters ask of the instance's other fields."""
    _refuse(_instance_problems(instance))


def _instance_problems(instance: Instance) -> Iterator[tuple[str, str]]:
    hvparams, port = instance.hvparams, instance.network_port or 0
    for field, ending in (("vnc_bind_address", "vnc"), ("spice_bind", "spice")):
        address = getattr(hvparams, field)
        if address.startswith("/"):
            path = f"{address}/{instance.name}.{ending}"
            if len(path.encode()) > SOCKET_PATH_MAX_BYTES:
                yield f"hvparams.{field}", f"{path} is longer than a socket's path can be ({SOCKET_PATH_MAX_BYTES})"
        elif address and port <= FIRST_DISPLAY_PORT:
            yield "network_port", f"a display ({field}) needs a port above {FIRST_DISPLAY_PORT}"
    topology = (hvparams.cpu_sockets, hvparams.cpu_cores, hvparams.cpu_threads)
    sockets, cores, threads = (number or 1 for number in topology)
    if any(topology) and sockets * cores * threads != instance.vcpus:
        reason = f"{sockets} sockets x {cores} cores x {threads} threads are not {instance.vcpus} vcpus"
        yield "hvparams.cpu_sockets", reason
    if hvparams.memory_min_mib > instance.memory_mib:
        yield "hvparams.memory_min_mib", f"{hvparams.memory_min_mib} is more than memory_mib ({instance.memory_mib})"
    if 0 < hvparams.memory_max_mib < instance.memory_mib:
        yield "hvparams.memory_max_mib", f"{hvparams.memory_max_mib} is less than memory_mib ({instance.memory_mib})"
    least_mib = max(instance.memory_mib, hvparams.memory_max_mib) + QEMU_ITSELF_MIB
    if 0 < hvparams.cgroup_memory_max_mib < least_mib:
        yield (
            "hvparams.cgroup_memory_max_mib",
            f"{hvparams.cgroup_memory_max_mib} is less than {least_mib}, the guest's memory and {QEMU_ITSELF_MIB} MiB "
            "for QEMU itself, and the kernel kills a QEMU that needs more",
        )
    if (lists := len(cpu_mask.split(hvparams.cpu_mask))) > 1 and lists != instance.vcpus:
        yield "hvparams.cpu_mask", f"has {lists} lists of processors for {instance.vcpus} vcpus; give each its own"


def _refuse(problems: Iterable[tuple[str, str]]) -> None:
    if found := [*problems]:
        text = "; ".join(f"{field}: {reason}" for field, reason in found)
        raise PydanticCustomError(CROSS_CHECK, "{text}", {"text": text, "problems": found})
