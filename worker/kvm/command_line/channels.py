"""How QEMU is talked to: monitors, the serial console, and the agents inside the guest."""

from __future__ import annotations

from collections.abc import Iterator

from hostler.hvparams import HvParams
from worker.kvm.command_line.options import HostPart, Option


def monitors(host: HostPart) -> Iterator[Option]:
    """The worker's monitor, QEMU's journal, a person's monitor."""
    yield _socket("qmp", host.qmp_fd)
    yield "-mon", "chardev=qmp,mode=control"
    # Standard input holds the capabilities handshake, standard output is a file: QEMU's own record of its events, which
    # tells the next worker why a guest ended while none was there to listen.
    yield "-chardev", "stdio,id=journal,signal=off"
    yield "-mon", "chardev=journal,mode=control"
    yield _socket("monitor", host.monitor_fd)
    yield "-mon", "chardev=monitor,mode=readline"


def serial(host: HostPart) -> Iterator[Option]:
    """The guest's first serial port."""
    if host.serial_fd is not None:
        yield _socket("serial0", host.serial_fd)
        yield "-serial", "chardev:serial0"


def agents(hvparams: HvParams, host: HostPart) -> Iterator[Option]:
    """Ports of a virtio-serial controller for programs in the guest."""
    ports = []
    if host.agent_fd is not None:
        yield _socket("agent", host.agent_fd)
        ports.append(("agent", "org.qemu.guest_agent.0"))
    if hvparams.spice_bind and hvparams.spice_use_vdagent:
        yield "-chardev", "spicevmc,id=vdagent,name=vdagent"
        ports.append(("vdagent", "com.redhat.spice.0"))
    if ports:
        yield "-device", {"driver": "virtio-serial-pci", "id": "channels"}
    for chardev, name in ports:
        place = {"id": f"{chardev}-device", "bus": "channels.0"}
        yield "-device", {"driver": "virtserialport", **place, "chardev": chardev, "name": name}


def _socket(name: str, fd: int) -> Option:
    return "-chardev", f"socket,id={name},fd={fd},server=on,wait=off"
