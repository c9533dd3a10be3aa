"""Disk images as files: made, measured, copied and merged by qemu-img while no QEMU writes to them.

A process that was left behind by a dead worker is ended by ``end_strays`` before anybody begins anew.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from worker.errors import QemuFailed
from worker.kvm.process import ProcessIdentity, QemuProcess, arguments_of

Watch = Callable[[float], None]
"""Told several times a second which part of the work is done, from 0 to 1; what it raises ends the work."""

TOOL = "qemu-img"
QCOW2_MAGIC = b"QFI\xfb"
HEADER_MAX = 65536
"""Of a qcow2 file, with its extensions and the name of the file below: all of it lies in the first cluster."""
BACKING_FORMAT = 0xE2792ACA
"""The extension that says in which format the file below is."""
LAYERS_MAX = 200
"""Of files upon files; a longer chain is a circle."""
_TICK_S = 0.1
_PROGRESS = re.compile(rb"\(\s*([0-9.]+)/100%\)")


def find() -> str:
    """The program. Raises QemuFailed, saying what to install."""
    if found := shutil.which(TOOL):
        return found
    raise QemuFailed(f"no {TOOL} on PATH; install it (Debian, Ubuntu: apt install qemu-utils; Fedora: qemu-img)")


def virtual_size(path: str, format: str) -> int:
    """How large the guest's disk is, in bytes. Raises QemuFailed."""
    return int(_ask("info", "-U", "-f", format, path)["virtual-size"])


def holds_data(overlay: str) -> bool:
    """Whether anything was written to an overlay since it was made; False where there is none. Raises QemuFailed."""
    if not Path(overlay).exists():
        return False
    return any(extent["depth"] == 0 for extent in _ask("map", "-U", "-f", "qcow2", overlay))


def create(path: str, format: str, size_bytes: int) -> None:
    """A new empty image of its owner's alone. Raises QemuFailed, also where there is a file already: it is kept."""
    _reserve(path)
    _run("create", "-q", "-f", format, path, str(size_bytes))


def room_bytes(size_bytes: int) -> int:
    """How large a qcow2 file can become whose guest writes to all of its disk of ``size_bytes``. Raises QemuFailed."""
    return int(_ask("measure", "-O", "qcow2", "--size", str(size_bytes))["fully-allocated"])


def format_device(path: str, size_bytes: int, backing: tuple[str, str] | None = None) -> None:
    """An empty qcow2 image in a block device that is there; what was in it is lost. Raises QemuFailed."""
    # -u: it does not look into the file below, which a running QEMU may have locked.
    below = ["-u", "-b", backing[0], "-F", backing[1]] if backing else []
    _run("create", "-q", "-f", "qcow2", *below, path, str(size_bytes))


def blank_device(path: str, size_bytes: int) -> None:
    """Write zeros to the beginning of a block device. Raises QemuFailed, also where a QEMU has it open."""
    with tempfile.NamedTemporaryFile() as zeros:
        zeros.truncate(size_bytes)
        _run("convert", "-n", "-f", "raw", "-O", "raw", zeros.name, path)


def create_overlay(path: str, base: str, base_format: str, size_bytes: int | None = None) -> None:
    """A new qcow2 file on top of ``base``, with its owner and mode. Raises QemuFailed as ``create`` does.

    Without ``size_bytes`` it is as large as ``base``.
    """
    size_bytes = size_bytes or virtual_size(base, base_format)
    _reserve(path)
    found = Path(base).stat()
    if os.geteuid() == 0:
        os.chown(path, found.st_uid, found.st_gid)
    Path(path).chmod(found.st_mode & 0o777)
    # -u: it does not look into the base, which a running QEMU has locked.
    _run("create", "-q", "-f", "qcow2", "-u", "-b", base, "-F", base_format, path, str(size_bytes))
    make_durable(path)


def convert(source: str, source_format: str, target: str, target_format: str, watch: Watch) -> None:
    """Copy a whole disk into an image that is there already. Raises QemuFailed, and what ``watch`` raises."""
    _run("convert", "-p", "-n", "-f", source_format, "-O", target_format, source, target, watch=watch)


def commit(overlay: str, watch: Watch) -> None:
    """Write all that an overlay has into the file below it; the overlay is kept, so that it may be done again."""
    _run("commit", "-p", "-d", "-f", "qcow2", overlay, watch=watch)


def rebase(overlay: str, base: str, base_format: str) -> None:
    """Say in an overlay that it lies on another file, with the same content. Raises QemuFailed."""
    _run("rebase", "-u", "-f", "qcow2", "-b", base, "-F", base_format, overlay)
    make_durable(overlay)


def backing_files(path: str) -> list[str]:
    """The files that a qcow2 image lies on, the nearest first; none below another image. Raises OSError."""
    found: list[str] = []
    while (below := backing_file(path)) and len(found) < LAYERS_MAX:
        found.append(path := below[0])
    return found


def make_durable(path: str) -> None:
    """Have a file and its name outlive a power cut. Raises OSError."""
    for each in (path, str(Path(path).parent)):
        fd = os.open(each, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def end_strays(paths: Iterable[str]) -> None:
    """End every qemu-img that a worker before us left at work on one of these files."""
    wanted = {*paths}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        arguments = arguments_of(int(entry.name))
        if arguments and Path(arguments[0]).name == TOOL and wanted & {*arguments}:
            _end(ProcessIdentity.of(int(entry.name)))


def _end(identity: ProcessIdentity | None) -> None:
    if identity and (process := QemuProcess.adopt(identity)):
        try:
            process.kill(grace_s=0)
        finally:
            process.close()


def backing_file(path: str) -> tuple[str, str] | None:
    """The file that a qcow2 image lies on, and its format, empty where it is not said. Raises OSError."""
    # Of the header alone (docs/interop/qcow2.txt): leases are taken at every start, which no program should delay.
    with Path(path).open("rb") as file:
        header = file.read(HEADER_MAX)
    if len(header) < 104 or header[:4] != QCOW2_MAGIC:
        return None
    version, offset, size = struct.unpack(">IQI", header[4:20])
    name = os.fsdecode(header[offset : offset + size]) if offset else ""
    if not name or name.startswith("json:") or re.match(r"[a-z0-9+.-]+:", name):
        return None
    extensions = struct.unpack(">I", header[100:104])[0] if version > 2 else 72
    return str(Path(path).parent / name), _backing_format(header, extensions)


def _backing_format(header: bytes, at: int) -> str:
    while at + 8 <= len(header):
        kind, size = struct.unpack(">II", header[at : at + 8])
        if kind == BACKING_FORMAT:
            return header[at + 8 : at + 8 + size].decode(errors="replace")
        if kind == 0:
            break
        at += 8 + (size + 7) // 8 * 8
    return ""


def _reserve(path: str) -> None:
    # qemu-img would overwrite what is there.
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except OSError as exc:
        raise QemuFailed(f"{path} cannot be made: {exc.strerror}") from exc


def _ask(*arguments: str) -> Any:
    return json.loads(_run(arguments[0], "--output=json", *arguments[1:]))


def _run(*arguments: str, watch: Watch | None = None) -> bytes:
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            [find(), *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr
        )
        try:
            said = b"".join(_read(process, watch))
            status = process.wait()
        finally:
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()
        if status:
            stderr.seek(0)
            reason = stderr.read(2000).decode(errors="replace").strip() or f"exit status {status}"
            with suppress(ValueError):
                reason = f"signal {signal.Signals(-status).name}" if status < 0 else reason
            raise QemuFailed(f"{TOOL} {arguments[0]} failed: {reason}")
        return said


def _read(process: subprocess.Popen[bytes], watch: Watch | None) -> Iterator[bytes]:
    assert process.stdout
    done = 0.0
    while True:
        if select.select([process.stdout], [], [], _TICK_S)[0]:
            if not (received := os.read(process.stdout.fileno(), 65536)):
                return
            yield received
            if percents := _PROGRESS.findall(received):
                done = max(done, float(percents[-1]) / 100)
        if watch:
            watch(done)
