"""Checks of the emulator and of KVM: both are started."""

from __future__ import annotations

import grp
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hostler.settings import Settings
from worker.doctor.check import Check, install
from worker.doctor.host import user_name
from worker.kvm import accelerator, emulator


def qemu(settings: Settings) -> Check:
    """The emulator starts, and answers what it can do."""
    try:
        binary, found = _probed(settings)
    except (emulator.EmulatorMissing, emulator.EmulatorBroken) as exc:
        fix = install(emulator.debian_package(), "qemu-kvm")
        if settings.qemu_binary:
            fix = f"set HOSTLER_QEMU_BINARY to QEMU, or unset it and {fix}"
        return Check("qemu", "fail", str(exc), fix)
    kvm = "with KVM" if found.kvm_compiled else "without KVM"
    detail = f"{binary}: {found.version_text}, {found.arch}, {len(found.machines)} machine types, {kvm}"
    if not found.sandbox:
        return Check("qemu", "warn", f"{detail}, without -sandbox: guests' processes are less confined",
                     "use a QEMU built with seccomp, as distributions' are")  # fmt: skip
    return Check("qemu", "ok", detail)


def _probed(settings: Settings) -> tuple[Path, emulator.Features]:
    binary = emulator.find(settings.qemu_binary)
    with tempfile.TemporaryDirectory(prefix="hostler-") as nothing_known:  # a doctor looks at the patient
        return binary, emulator.probe(binary, Path(nothing_known))


def kvm(settings: Settings) -> Check:
    """A guest runs under KVM. Without, guests run under TCG, many times slower."""
    try:
        binary, _ = _probed(settings)
    except (emulator.EmulatorMissing, emulator.EmulatorBroken):
        return Check("kvm", "warn", "not tried, for want of an emulator", "see qemu above")
    with _cache_dir(settings) as cache_dir:
        probed = accelerator.kvm_works(binary, cache_dir, use_cache=False)
    if probed.works:
        return Check("kvm", "ok", probed.reason)
    return Check("kvm", "warn", f"{probed.reason}; guests run under TCG, many times slower", _kvm_fix())


def _kvm_fix() -> str:
    device = accelerator.KVM_DEVICE
    if not device.exists():
        return (
            "modprobe kvm_intel || modprobe kvm_amd; if that fails, switch on virtualization in the firmware, "
            "or on a virtual machine nested virtualization on its host"
        )
    if not os.access(device, os.R_OK | os.W_OK):
        return _access_fix(device)
    return "nothing to install: KVM is offered here but runs no guest; a virtual machine needs a host with nested KVM"


def _access_fix(device: Path) -> str:
    """Distributions let the group kvm open it; elsewhere it may be root's alone."""
    group, for_group = device.stat().st_gid, device.stat().st_mode & stat.S_IWGRP
    if not for_group or not group:
        return "run the worker as root"
    return f"usermod -aG {grp.getgrgid(group).gr_name} {user_name()}, and log in again; or run the worker as root"


@contextmanager
def _cache_dir(settings: Settings) -> Iterator[Path]:
    """The worker's own, so that it uses the new finding; where there was no worker yet, nothing is made."""
    cache = settings.state_dir / "cache"
    if os.access(cache, os.W_OK | os.X_OK):
        yield cache
        return
    with tempfile.TemporaryDirectory(prefix="hostler-") as name:
        yield Path(name)
