"""Which emulator this host has, and what it can do: asked of the program itself, by QMP, once per binary.

Help texts and version numbers decide nothing: distributions compile parts out and carry parts in.
"""

from __future__ import annotations

import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from worker.errors import QemuFailed

PROBE_TIMEOUT_S = 10.0
"""An idle host answers in 0.1 s."""
RHEL_BINARY = Path("/usr/libexec/qemu-kvm")
"""Where RHEL and its rebuilds keep their only emulator, off PATH."""
_QUOTE_MAX_BYTES = 1000
_SETTLE_S = 1.0
_LINE_MAX_BYTES = 16 * 1024 * 1024
_QMP_ARGV = ("-no-user-config", "-nodefaults", "-display", "none", "-S", "-machine", "none", "-qmp", "stdio")
# What QEMU calls an architecture where its name differs from what uname(2) says.
_DEBIAN_PACKAGE = {"x86_64": "x86", "i386": "x86", "aarch64": "arm", "s390x": "s390x"}
_QEMU_ARCH = {"i586": "i386", "i686": "i386", "ppc64le": "ppc64", "armv7l": "arm", "armv6l": "arm", "arm64": "aarch64"}

_DIES_WITH_US = """\
import ctypes, os, sys
parent, argv = int(sys.argv[1]), sys.argv[2:]
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != parent:
    sys.exit("the worker has ended")
try:
    os.execv(argv[0], argv)
except OSError as exc:
    sys.exit(f"{argv[0]} cannot be run: {exc.strerror}")
"""
"""PR_SET_PDEATHSIG, SIGKILL: a worker that is killed ends nothing, and no QEMU ends because its monitor is closed.

Set by a program of its own: between fork and exec of a process with threads nothing may be done. It outlives the exec,
and is sent when the thread ends that started the process, which waits for it."""


class EmulatorMissing(QemuFailed):
    """There is no emulator to run. Nothing was started; the text says what to install or set."""


class EmulatorBroken(QemuFailed):
    """The emulator did not answer as QEMU does. Its process is gone; the text quotes what it said."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Machine(_Frozen):
    """A machine type. An alias (``pc``) is listed beside the type it stands for, with the same content."""

    name: str
    alias: str | None
    cpu_max: int
    is_default: bool
    deprecated: bool


class Features(_Frozen):
    """What one emulator binary can do, on any host it would run on."""

    version: tuple[int, int, int]
    version_text: str
    """Version and the distribution's package, such as ``7.2.22 (Debian 1:7.2+dfsg-7)``."""
    arch: str
    """QEMU's name of the guests' architecture, such as ``x86_64``."""
    machines: dict[str, Machine]
    """By name and by alias."""
    cpu_models: frozenset[str]
    """Names for ``-cpu``. That one is listed does not say that this host can run it."""
    kvm_compiled: bool
    """Whether KVM is compiled in; whether it works here, only a booted guest shows (``accelerator``)."""
    sandbox: bool
    """Whether ``-sandbox`` (seccomp) is there."""
    devices: frozenset[str]
    """Names for ``-device``."""
    aio: frozenset[str]
    """How it can read and write files: ``threads``, ``native``, ``io_uring``."""
    spice: bool
    """Whether SPICE is compiled in and its module installed."""
    run_with: frozenset[str] = frozenset()
    """What ``-run-with`` takes, such as ``chroot`` and ``user``; empty where it is ``-chroot`` and ``-runas``."""


class _CacheEntry(_Frozen):
    identity: list[str | int]
    features: Features


def find(settings_binary: str = "") -> Path:
    """The emulator: ``settings_binary`` (a path, or a name on PATH) if given, else the host's own from PATH.

    Raises EmulatorMissing.
    """
    if settings_binary:
        return _required(shutil.which(settings_binary), f"HOSTLER_QEMU_BINARY: no program {settings_binary!r}")
    name = f"qemu-system-{host_arch()}"  # Debian and Fedora build one per architecture of guests
    rhel = str(RHEL_BINARY) if os.access(RHEL_BINARY, os.X_OK) else None
    return _required(shutil.which(name) or rhel, f"no {name} on PATH, and no {RHEL_BINARY}")


def host_arch() -> str:
    """This host's architecture by QEMU's name."""
    machine = platform.machine()
    return _QEMU_ARCH.get(machine, machine)


def debian_package() -> str:
    """What to install on Debian for guests of this host's architecture."""
    arch = host_arch()
    return f"qemu-system-{_DEBIAN_PACKAGE.get(arch, arch)}"


def _required(found: str | None, problem: str) -> Path:
    if found is None:
        raise EmulatorMissing(
            f"{problem}. Install QEMU (Debian, Ubuntu: `apt install {debian_package()}`; Fedora, RHEL: "
            "`dnf install qemu-kvm`) or set HOSTLER_QEMU_BINARY to it"
        )
    return Path(found).absolute()


def probe(binary: Path, cache_dir: Path, timeout_s: float = PROBE_TIMEOUT_S) -> Features:
    """What ``binary`` can do. Starts it, without a machine, unless ``cache_dir`` knows the same file already.

    The answer is kept in ``cache_dir`` (created if missing) as long as the file's path, inode, size and time of change
    stay; a cache that is damaged is replaced, one that cannot be written is done without. Raises EmulatorMissing if
    there is no such file, and EmulatorBroken.
    """
    identity = binary_identity(binary)
    cache = cache_dir / f"emulator-{sha256(str(binary).encode()).hexdigest()[:16]}.json"
    with suppress(OSError, ValidationError):
        entry = _CacheEntry.model_validate_json(cache.read_bytes())
        if entry.identity == identity:
            return entry.features
    features = _ask(binary, timeout_s)
    write_atomically(cache, _CacheEntry(identity=identity, features=features).model_dump_json())
    return features


def binary_identity(binary: Path) -> list[str | int]:
    """What changes when the program at this path is exchanged. Raises EmulatorMissing if it is not there."""
    try:
        info = binary.stat()
    except OSError as exc:
        raise EmulatorMissing(f"{binary}: {exc.strerror}") from exc
    return [str(binary), info.st_ino, info.st_mtime_ns, info.st_size]


def write_atomically(path: Path, text: str) -> None:
    """Put ``text`` at ``path`` in one step, so that no reader sees half of it; do without if that is not possible."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}-", delete=False)  # noqa: SIM115
        try:
            with file:
                file.write(text)
            Path(file.name).replace(path)
        except OSError:
            Path(file.name).unlink(missing_ok=True)


@contextmanager
def short_lived(
    argv: Sequence[str], timeout_s: float, stderr: IO[bytes], cwd: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process with pipes on stdin and stdout that is gone, reaped, and its whole session with it, on leaving.

    After ``timeout_s`` it is killed, which ends any read that waits for it; also when this process is killed. Do not
    reap it inside. One that cannot be run ends at once and says so on ``stderr``. Raises EmulatorBroken if nothing can
    be started at all.
    """
    dying = (sys.executable, "-IS", "-c", _DIES_WITH_US, str(os.getpid()))
    try:
        process = subprocess.Popen(
            (*dying, *argv),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
            cwd=cwd,
        )
    except OSError as exc:
        raise EmulatorBroken(f"{argv[0]} cannot be run: {exc.strerror}") from exc
    timer = threading.Timer(timeout_s, _kill_group, (process.pid,))
    timer.start()
    try:
        yield process
    finally:
        timer.cancel()
        timer.join()
        _kill_group(process.pid)  # not reaped yet, so the number is still its own
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # a write that it never read
                if pipe:
                    pipe.close()


def settle(process: subprocess.Popen[bytes]) -> None:
    """Let a process that has closed its output exit by itself, so that its exit code is its own, not our kill's."""
    try:
        handle = os.pidfd_open(process.pid)
    except OSError:
        return
    try:
        select.select([handle], [], [], _SETTLE_S)
    finally:
        os.close(handle)


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _ask(binary: Path, timeout_s: float) -> Features:
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryFile() as stderr:
        try:
            with short_lived((str(binary), *_QMP_ARGV), timeout_s, stderr) as process:
                try:
                    return _features(_Monitor(process))
                except (_Ended, OSError):
                    settle(process)
                    raise
        except (_Ended, OSError):
            reason = f"it exited with {process.returncode}"
        except _NotQmp as exc:
            reason = str(exc)
        except (ValueError, LookupError, TypeError, AttributeError) as exc:  # JSON of another shape than QEMU's
            reason = f"its answer is not QEMU's: {exc!r}"
        if time.monotonic() >= deadline:  # it was killed, perhaps in the middle of a line
            reason = f"no answer within {timeout_s:g} s"
        raise EmulatorBroken(f"{binary} does not work as QEMU: {reason}{_quoted(stderr)}")


def said(stderr: IO[bytes]) -> str:
    """The beginning of what a process wrote to the file ``stderr``, in one line; empty if it was silent."""
    stderr.seek(0)
    return "; ".join(stderr.read(_QUOTE_MAX_BYTES).decode(errors="replace").strip().splitlines())


def _quoted(stderr: IO[bytes]) -> str:
    text = said(stderr)
    return f"; it said: {text}" if text else ""


def _features(monitor: _Monitor) -> Features:
    version = monitor.execute("query-version")
    number = version["qemu"]
    triple = (number["major"], number["minor"], number["micro"])
    text = ".".join(map(str, triple)) + (f" ({version['package']})" if version.get("package") else "")
    machines = [_machine(entry) for entry in monitor.execute("query-machines")]
    return Features(
        version=triple,
        version_text=text,
        arch=monitor.execute("query-target")["arch"],
        machines={name: machine for machine in machines for name in (machine.name, machine.alias) if name},
        cpu_models=frozenset(entry["name"] for entry in monitor.execute("query-cpu-definitions")),
        kvm_compiled=monitor.execute("query-kvm")["present"],
        sandbox=monitor.knows_option("sandbox"),
        devices=_types(monitor, "device"),
        aio=_aio(monitor),
        spice="chardev-spicevmc" in _types(monitor, "chardev"),
        run_with=monitor.parameters_of("run-with"),
    )


def _types(monitor: _Monitor, kind: str) -> frozenset[str]:
    return frozenset(entry["name"] for entry in monitor.execute("qom-list-types", implements=kind))


def _aio(monitor: _Monitor) -> frozenset[str]:
    # The schema numbers its types: the one that is meant is known by what is always in it.
    enums = (entry["values"] for entry in monitor.execute("query-qmp-schema") if entry["meta-type"] == "enum")
    return frozenset(next((values for values in enums if {"threads", "native"} <= {*values}), ()))


def _machine(entry: dict[str, Any]) -> Machine:
    return Machine(
        name=entry["name"],
        alias=entry.get("alias"),
        cpu_max=entry["cpu-max"],
        is_default=entry.get("is-default", False),
        deprecated=entry["deprecated"],
    )


class _Ended(Exception):
    """It closed its output."""


class _NotQmp(Exception):
    """It said something else."""


class _Monitor:
    """As much of QMP as a probe needs: one question at a time on two pipes. Running guests are talked to elsewhere."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._to, self._from = process.stdin, process.stdout
        if "QMP" not in self._message():
            raise _NotQmp("it does not greet as QMP does")
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: str) -> Any:
        answer = self._exchange(command, arguments)
        if "return" not in answer:
            raise _NotQmp(f"{command} failed: {answer.get('error')}")
        return answer["return"]

    def knows_option(self, name: str) -> bool:
        return "return" in self._exchange("query-command-line-options", {"option": name})

    def parameters_of(self, option: str) -> frozenset[str]:
        answer = self._exchange("query-command-line-options", {"option": option})
        return frozenset(each["name"] for found in answer.get("return", ()) for each in found["parameters"])

    def _exchange(self, command: str, arguments: dict[str, str]) -> dict[str, Any]:
        self._to.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self._to.flush()
        while "event" in (message := self._message()):
            pass
        return message

    def _message(self) -> dict[str, Any]:
        line = self._from.readline(_LINE_MAX_BYTES)
        if not line:
            raise _Ended
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise _NotQmp(f"its answer is not QMP: {line[:80]!r}")
        return message
