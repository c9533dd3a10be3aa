"""Bring a QEMU to life, paused, with a monitor that answers."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hostler.payloads import Instance
from worker.errors import QemuFailed, QmpLost
from worker.kvm.arguments import HostPart, TapFds, build, render
from worker.kvm.command_line.disks import images_of
from worker.kvm.command_line.options import Confinement
from worker.kvm.devices import driver_of
from worker.kvm.folder import GuestFolder
from worker.kvm.prepared import prepare
from worker.kvm.process import QemuProcess
from worker.kvm.qmp import Event, EventLoop, Monitor

_HANDSHAKE = b'{"execute":"qmp_capabilities"}\n'


@dataclass(frozen=True)
class Sockets:
    """Listening sockets that QEMU inherits. Closed here once it has them, or when it comes to nothing."""

    qmp: socket.socket
    monitor: socket.socket
    serial: socket.socket | None

    @classmethod
    def bind(cls, folder: GuestFolder, *, serial: bool) -> Sockets:
        """Bind all of them below ``folder``. Raises OSError."""
        return cls(
            folder.listen(folder.qmp), folder.listen(folder.monitor), folder.listen(folder.serial) if serial else None
        )

    def close(self) -> None:
        """Close our copies; the paths stay."""
        for listener in (self.qmp, self.monitor, self.serial):
            if listener:
                listener.close()


def spawn(
    binary: Path,
    instance: Instance,
    folder: GuestFolder,
    sockets: Sockets,
    tap_fds: dict[int, TapFds],
    *,
    uuid: str,
    accelerator: str,
    confinement: Confinement = Confinement(),  # noqa: B008  (frozen)
    through: Sequence[str] = (),
    incoming: bool = False,
    machine_uuid: str = "",
) -> QemuProcess:
    """Start QEMU with the guest stopped before its first instruction. Raises QemuFailed when it cannot be executed.

    ``through``: a program and its arguments that prepares its process and then executes QEMU in it.
    ``incoming``: it waits for a guest of another node, see ``worker.kvm.live_migration``, whose machine has
    ``machine_uuid``.
    """
    prepared = prepare(instance, folder)
    drivers = {path: driver_of(path) for path in images_of(instance)}
    host = HostPart(
        uuid=uuid,
        accelerator=accelerator,
        qmp_fd=sockets.qmp.fileno(),
        monitor_fd=sockets.monitor.fileno(),
        serial_fd=sockets.serial.fileno() if sockets.serial else None,
        agent_fd=prepared.agent_fd,
        password_fds=prepared.password_fds,
        tap_fds=tap_fds,
        block_devices=frozenset(path for path, driver in drivers.items() if driver != "file"),
        cd_drives=frozenset(path for path, driver in drivers.items() if driver == "host_cdrom"),
        confinement=confinement,
        seed_path=str(folder.seed),
        incoming=incoming,
        machine_uuid=machine_uuid,
    )
    inherited = [fd for fd in (host.qmp_fd, host.monitor_fd, host.serial_fd, *prepared.fds) if fd is not None]
    inherited += [fd for each in tap_fds.values() for fd in (*each.queues, *each.vhost)]
    argv = render(str(binary), build(instance, host))
    opened = [
        _handshake(), folder.open_for_append(folder.journal), folder.open_for_append(folder.log), *prepared.fds
    ]  # fmt: skip
    try:
        return QemuProcess.spawn(
            [*through, *argv], pass_fds=inherited, stdin=opened[0], stdout=opened[1], stderr=opened[2]
        )
    except OSError as exc:
        raise QemuFailed(f"cannot execute {[*through, str(binary)][0]}: {exc.strerror}") from exc
    finally:
        for fd in opened:
            os.close(fd)


def greet(
    loop: EventLoop,
    process: QemuProcess,
    folder: GuestFolder,
    timeout_s: float,
    on_event: Callable[[Event], None],
    check: Callable[[], None] = lambda: None,
) -> Monitor:
    """Connect to the QEMU just spawned.

    Raises QemuFailed with the last lines of its log when it ended, hung or talked nonsense. The process is left to the
    caller in every case. ``check`` is called while waiting; what it raises ends the waiting.
    """
    began = time.monotonic()
    try:
        return Monitor.connect(loop, folder.qmp, timeout_s, on_event, check)
    except (QmpLost, QemuFailed) as exc:
        # A process that dies closes its monitor a moment before it can be seen to have ended.
        ended = process.wait(1.0) if isinstance(exc, QmpLost) else process.wait(0)
        waited_s = time.monotonic() - began
        what = f"QEMU ended ({describe_exit(process.exit_status())})" if ended else f"{exc} ({waited_s:.1f} s)"
        raise QemuFailed(f"{what}; its log: {folder.log_tail() or '(empty)'}") from exc


def describe_exit(status: int | None) -> str:
    """An exit status in words: ``exit code 1``, ``signal 9``; unknown where another worker was the parent."""
    if status is None:
        return "exit status unknown"
    return f"signal {-status}" if status < 0 else f"exit code {status}"


def _handshake() -> int:
    fd = os.memfd_create("hostler-handshake")
    os.write(fd, _HANDSHAKE)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
