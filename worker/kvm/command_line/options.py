"""What all subjects share: an option, what the host prepared, and what the firmware boots from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hostler.hvparams import HvParams

Value = str | dict[str, Any] | None
Option = tuple[str, Value]
"""A word and its value; a dict travels as JSON, where a comma in a path is a character and not an option."""


@dataclass(frozen=True)
class Confinement:
    """What QEMU becomes before the guest runs; empty is what it was started as."""

    run_as: str = ""
    """A login, or UID:GID."""
    chroot: str = ""
    run_with: frozenset[str] = frozenset()
    """What this QEMU's ``-run-with`` can say of it; older ones have ``-runas`` and ``-chroot``."""


@dataclass(frozen=True)
class TapFds:
    """What QEMU inherits for a card with a tap: a descriptor a queue, and as many of vhost-net where it serves them."""

    queues: tuple[int, ...] = ()
    vhost: tuple[int, ...] = ()


@dataclass(frozen=True)
class HostPart:
    """What the host prepared: file descriptors QEMU inherits, and what was found out about files and accelerator."""

    uuid: str
    accelerator: str
    qmp_fd: int
    monitor_fd: int
    serial_fd: int | None = None
    agent_fd: int | None = None
    password_fds: dict[str, int] = field(default_factory=dict)
    """Of ``vnc`` and ``spice``: memory that holds the password."""
    tap_fds: dict[int, TapFds] = field(default_factory=dict)
    block_devices: frozenset[str] = frozenset()
    """Which of the guest's disks, CDs and floppies are no files but devices of the host."""
    cd_drives: frozenset[str] = frozenset()
    """Which of these are the host's own CD drives."""
    seed_path: str = ""
    """The CD image made for cloud-init, where the guest has one."""
    confinement: Confinement = Confinement()
    machine_uuid: str = ""
    """What the guest knows as its machine's, where that is not ``uuid``: one that comes from another node keeps it."""
    incoming: bool = False
    """Whether the guest comes from another node: QEMU then waits to be told where to listen for it."""


def quoted(value: str) -> str:
    """``value`` for an option that takes no JSON: there a comma ends it unless it is doubled."""
    return value.replace(",", ",,")


def boots_first(hvparams: HvParams, order: str) -> dict[str, int]:
    """The property of the device that boot_order means; none with a kernel, which boots by itself."""
    return {"bootindex": 1} if hvparams.boot_order == order and not hvparams.kernel_path else {}
