"""Whether KVM works on this host: shown by a guest that runs, because a device file alone promises nothing.

In a virtual machine, ``/dev/kvm`` can be there, QEMU can start with it, and the guest still never executes anything.
"""

from __future__ import annotations

import os
import signal
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from worker.kvm.emulator import EmulatorBroken, binary_identity, host_arch, said, settle, short_lived, write_atomically
from worker.kvm.tiny_guest import BANNER, write_disk

BOOT_TIMEOUT_S = 3.0
"""TCG, which interprets, is there in 0.1 s. A "KVM" emulated inside a virtual machine was seen to take 3.7 s, and not
to boot Linux at all: one that is slower than TCG is none."""
KVM_DEVICE = Path("/dev/kvm")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_OUTPUT_MAX_BYTES = 64 * 1024


@dataclass(frozen=True)
class KvmProbe:
    """The answer, and what it rests on in words for people."""

    works: bool
    reason: str


class _CacheEntry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    key: list[str | int]
    works: bool
    reason: str


def kvm_works(binary: Path, cache_dir: Path, timeout_s: float = BOOT_TIMEOUT_S, *, use_cache: bool = True) -> KvmProbe:
    """Whether a guest of ``binary`` runs under KVM here: boots one of 512 bytes and waits for its greeting.

    What a boot has shown is kept in ``cache_dir`` until the host boots again or the binary changes. ``use_cache=False``
    tries anew and replaces what is kept: a host under heavy load can fail the test once. That the device is missing or
    may not be opened is looked at each time. QEMU and its disk file are gone when this returns. Raises EmulatorMissing
    if ``binary`` is not there.
    """
    identity = binary_identity(binary)
    if problem := _device_problem():
        return KvmProbe(False, problem)
    key = [BOOT_ID.read_text().strip(), *identity]
    cache = cache_dir / "kvm.json"
    if use_cache and (known := _cached(cache, key)):
        return known
    probed = _boot(binary, timeout_s)
    write_atomically(cache, _CacheEntry(key=key, works=probed.works, reason=probed.reason).model_dump_json())
    return probed


def _device_problem() -> str:
    try:
        os.close(os.open(KVM_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        return f"{KVM_DEVICE} cannot be opened: {exc.strerror}"
    # The guest is a PC's boot sector: elsewhere it can prove nothing.
    return "" if host_arch() in ("x86_64", "i386") else f"KVM is only proven on x86 hosts, this is {host_arch()}"


def _cached(cache: Path, key: list[str | int]) -> KvmProbe | None:
    with suppress(OSError, ValidationError):
        entry = _CacheEntry.model_validate_json(cache.read_bytes())
        if entry.key == key:
            return KvmProbe(entry.works, entry.reason)
    return None


def _boot(binary: Path, timeout_s: float) -> KvmProbe:
    with tempfile.TemporaryDirectory(prefix="hostler-kvm-") as folder, tempfile.TemporaryFile() as stderr:
        disk = Path(folder, "disk")
        write_disk(disk)
        argv = (
            str(binary), "-no-user-config", "-nodefaults", "-display", "none", "-machine", "pc", "-m", "16",
            "-accel", "kvm", "-cpu", "host", "-serial", "stdio", "-monitor", "none",
            "-drive", f"file={disk},format=raw,if=ide",
        )  # fmt: skip
        try:
            with short_lived(argv, timeout_s, stderr, cwd=Path(folder)) as process:
                assert process.stdout is not None
                output = b""
                while BANNER not in output and (line := process.stdout.readline(_OUTPUT_MAX_BYTES)):
                    output = line
                if BANNER not in output:
                    settle(process)
        except EmulatorBroken as exc:
            return KvmProbe(False, str(exc))
        if BANNER in output:
            return KvmProbe(True, "a guest booted under KVM")
        return KvmProbe(False, _failure(process.returncode, said(stderr), timeout_s))


def _failure(returncode: int, said_by_qemu: str, timeout_s: float) -> str:
    if returncode == -signal.SIGKILL:  # by us: it was still trying
        return f"the guest did not run within {timeout_s:g} s"
    return f"QEMU ended instead of running the guest: {said_by_qemu or f'exit code {returncode}'}"
