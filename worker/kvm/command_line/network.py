"""Network cards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hostler.hvparams import HvParams
from hostler.payloads import Instance, Nic
from worker.kvm.command_line.options import HostPart, Option, TapFds, boots_first

NIC_MODELS = {"paravirtual": "virtio-net-pci"}
"""The other nic_type words are QEMU's own device names."""

ISA_IRQS = (9, 10, 11, 5)
"""Of ne2k_isa cards: an ISA card cannot be asked, the first has what QEMU gives it, the others what is free in a PC."""


def nics(instance: Instance, host: HostPart) -> Iterator[Option]:
    """The instance's cards, in their order."""
    for number, nic in instance.numbered_nics():
        fds = host.tap_fds.get(number, TapFds())
        yield "-netdev", netdev(number, nic, fds.queues, fds.vhost)
        yield "-device", nic_device(instance, number, nic)


def nic_device(instance: Instance, number: int, nic: Nic) -> dict[str, Any]:
    """What the guest sees of a card."""
    hvparams = instance.hvparams
    device: dict[str, Any] = {
        "driver": NIC_MODELS.get(hvparams.nic_type, hvparams.nic_type),
        "id": f"nic{number}",
        "netdev": f"netdev{number}",
        "mac": nic.mac,
    }
    if nic.mode != "user" and (count := queues(hvparams)) > 1:
        # An interrupt for each queue's two directions, one for changes of the card's state, one for its control.
        device |= {"mq": True, "vectors": 2 * count + 2}
    if hvparams.nic_type == "ne2k_isa":
        device |= {"iobase": 0x300 + 0x20 * number, "irq": ISA_IRQS[number]}
    if instance.placement and number in instance.placement.no_rom:
        device["romfile"] = ""
    return device | (boots_first(hvparams, "network") if nic == instance.nics[0] else {})


def netdev(number: int, nic: Nic, fds: Sequence[int | str], vhost: Sequence[int | str] = ()) -> dict[str, Any]:
    """The host's side of a card: its tap's queues, and vhost-net's where it serves them.

    Each is the number or the name of a descriptor that QEMU has.
    """
    if nic.mode == "user":
        return {"type": "user", "id": f"netdev{number}"}
    backend = {"type": "tap", "id": f"netdev{number}"} | _descriptors("fd", fds)
    return backend | ({"vhost": True} | _descriptors("vhostfd", vhost) if vhost else {})


def _descriptors(option: str, fds: Sequence[int | str]) -> dict[str, Any]:
    return {f"{option}s" if len(fds) > 1 else option: ":".join(map(str, fds))}


def queues(hvparams: HvParams) -> int:
    """How many queues the cards that have a tap get; only virtio-net has more than one."""
    return hvparams.virtio_net_queues if hvparams.nic_type == "paravirtual" else 1


def uses_vhost(hvparams: HvParams) -> bool:
    """Whether the cards that have a tap shall be driven by the host's kernel."""
    return hvparams.vhost_net and hvparams.nic_type == "paravirtual"
