"""Who the guest is, its processors, its memory, and what it starts with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hostler.hvparams import HvParams
from hostler.payloads import Instance
from worker.kvm.command_line.options import HostPart, Option

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
"""Seccomp filters of qemu(1) -sandbox: no old system calls, no setuid, no fork or exec, no scheduler changes."""
NEW_USER = ("elevateprivileges=deny", "elevateprivileges=allow")


def identity(instance: Instance, host: HostPart) -> Iterator[Option]:
    """Name, uuid, and a QEMU that adds nothing by itself."""
    yield "-name", instance.name
    yield "-uuid", host.uuid
    if host.machine_uuid:
        yield "-uuid", host.machine_uuid  # the last one counts for QEMU and the guest, the first one for us
    yield "-nodefaults", None
    yield "-no-user-config", None
    yield "-S", None
    if host.incoming:
        yield "-incoming", "defer"
    yield "-display", "none"
    yield "-vga", "none"
    # QEMU itself has to call setuid, once; the filter sets no_new_privs too, so that it gets no rights back.
    yield "-sandbox", SANDBOX.replace(*NEW_USER) if host.confinement.run_as else SANDBOX
    yield "-msg", "timestamp=on"


def machine(instance: Instance, host: HostPart) -> Iterator[Option]:
    """Machine type, accelerator, processors, memory, clock."""
    hvparams = instance.hvparams
    if hvparams.mem_path:
        yield "-object", _memory_backend(instance)
    yield from _firmware(hvparams)
    yield "-machine", ",".join(_machine_words(hvparams))
    yield "-accel", host.accelerator
    yield "-cpu", _cpu(hvparams, host)
    yield "-smp", _smp(instance)
    yield "-m", f"{memory_mib(instance)}M"
    yield "-rtc", f"base={'localtime' if hvparams.use_localtime else 'utc'}"


def memory_mib(instance: Instance) -> int:
    """What the machine is built with; the balloon holds what the guest shall not have of it."""
    return instance.hvparams.memory_max_mib or instance.memory_mib


def kernel(hvparams: HvParams) -> Iterator[Option]:
    """A kernel that QEMU loads in place of the guest's boot loader."""
    if hvparams.kernel_path:
        yield "-kernel", hvparams.kernel_path
        if hvparams.initrd_path:
            yield "-initrd", hvparams.initrd_path
        console = f" console=ttyS0,{hvparams.serial_speed}" if hvparams.serial_console else ""
        yield "-append", f"root={hvparams.root_path} {hvparams.kernel_args}{console}"


def _machine_words(hvparams: HvParams) -> Iterator[str]:
    yield hvparams.machine_version or "pc"
    yield f"acpi={'on' if hvparams.acpi else 'off'}"
    yield "usb=off"
    if hvparams.mem_path:
        yield "memory-backend=ram"
    if hvparams.uefi_code_path:
        yield "pflash0=uefi-code"
        yield "pflash1=uefi-vars"


def _memory_backend(instance: Instance) -> dict[str, Any]:
    return {
        "qom-type": "memory-backend-file",
        "id": "ram",
        "mem-path": instance.hvparams.mem_path,
        "size": memory_mib(instance) * 2**20,
        "prealloc": True,
    }


def _firmware(hvparams: HvParams) -> Iterator[Option]:
    if hvparams.uefi_code_path:
        for node, path, read_only in (
            ("uefi-code", hvparams.uefi_code_path, True),
            ("uefi-vars", hvparams.uefi_vars_path, False),
        ):
            file = {"driver": "file", "filename": path}
            yield "-blockdev", {"node-name": node, "driver": "raw", "read-only": read_only, "file": file}


def _cpu(hvparams: HvParams, host: HostPart) -> str:
    model = hvparams.cpu_type or ("host" if host.accelerator == "kvm" else "max")
    switches = [f"{feature[1:]}={'on' if feature[0] == '+' else 'off'}" for feature in hvparams.cpu_features]
    return ",".join([model, *switches])


def _smp(instance: Instance) -> str:
    hvparams = instance.hvparams
    topology = {"sockets": hvparams.cpu_sockets, "cores": hvparams.cpu_cores, "threads": hvparams.cpu_threads}
    if not any(topology.values()):
        return str(instance.vcpus)
    return ",".join([f"cpus={instance.vcpus}", *(f"{name}={number or 1}" for name, number in topology.items())])
