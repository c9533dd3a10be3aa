"""What a guest's QEMU is given beside its monitors and taps: agent socket, passwords, UEFI variable store, seed."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from hostler.hvparams import HvParams
from hostler.payloads import Instance
from worker.errors import QemuFailed
from worker.kvm import cloud_init
from worker.kvm.command_line.display import socket_path
from worker.kvm.folder import GuestFolder

PASSWORD_MAX_BYTES = 4096


@dataclass(frozen=True)
class Prepared:
    """Descriptors for QEMU to inherit. They are closed here once it has them."""

    agent_fd: int | None = None
    password_fds: dict[str, int] = field(default_factory=dict)

    @property
    def fds(self) -> list[int]:
        """All of them."""
        return [*self.password_fds.values(), *([] if self.agent_fd is None else [self.agent_fd])]


def prepare(instance: Instance, folder: GuestFolder) -> Prepared:
    """Open and create what ``instance`` asks for. Raises QemuFailed or OSError; then no descriptor is left open."""
    hvparams = instance.hvparams
    provide_variable_store(hvparams)
    if hvparams.has_seed:
        cloud_init.write_seed(instance, folder.seed)
    if path := socket_path(instance):
        folder.adopt_socket(path)
    with ExitStack() as undo:
        passwords = {}
        for name, file in password_files(hvparams).items():
            passwords[name] = fd = _in_memory(read_password(Path(file)))
            undo.callback(os.close, fd)
        agent_fd = folder.listen(folder.agent).detach() if hvparams.guest_agent else None
        undo.pop_all()
    return Prepared(agent_fd, passwords)


def password_files(hvparams: HvParams) -> dict[str, str]:
    """The files that are read, by display: those of the display that there is."""
    files = {
        "vnc": hvparams.vnc_password_file if hvparams.vnc_bind_address else "",
        "spice": hvparams.spice_password_file if hvparams.spice_bind else "",
    }
    on_a_socket = hvparams.vnc_bind_address.startswith("/")  # its folder's rights protect it
    return {name: file for name, file in files.items() if file and not (name == "vnc" and on_a_socket)}


def read_password(file: Path) -> bytes:
    """The file's only line. Raises QemuFailed, which says what is wrong with the file and never what is in it."""
    try:
        with file.open("rb") as opened:
            content = opened.read(PASSWORD_MAX_BYTES + 1)
    except OSError as exc:
        raise QemuFailed(f"Failed to open password file {file}: {exc.strerror}") from exc
    lines = content.split(b"\n")
    if len(content) > PASSWORD_MAX_BYTES or b"\0" in content or len(lines) > 2 or lines[1:] not in ([], [b""]):
        raise QemuFailed(f"password file {file} must hold one line of at most {PASSWORD_MAX_BYTES} bytes")
    if not lines[0]:
        raise QemuFailed(f"password file {file} is empty")
    return lines[0]


def provide_variable_store(hvparams: HvParams) -> None:
    """Copy the UEFI variable store from its template, where the guest has none yet. Raises QemuFailed.

    It is the guest's own from then on, as its disks are, and removed by nobody here.
    """
    store, template = Path(hvparams.uefi_vars_path), hvparams.uefi_vars_template_path
    if not template or store.exists():
        return
    unfinished = store.with_name(f"{store.name}.new")
    try:
        with Path(template).open("rb") as source, unfinished.open("wb") as copy:
            os.fchmod(copy.fileno(), 0o600)
            shutil.copyfileobj(source, copy)
            copy.flush()
            os.fsync(copy.fileno())
        unfinished.replace(store)
    except OSError as exc:
        with suppress(OSError):
            unfinished.unlink()
        raise QemuFailed(f"the UEFI variable store cannot be copied from {template} to {store}: {exc}") from exc


def _in_memory(secret: bytes) -> int:
    fd = os.memfd_create("hostler-password", os.MFD_CLOEXEC)
    os.write(fd, secret)
    return fd
