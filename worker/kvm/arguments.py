"""QEMU's command line as data: a pure function of what the guest shall be and what the host prepared for it.

Values that hold paths travel as JSON (``-blockdev``, ``-device``, ``-netdev``, ``-object``), so that a comma or an
equals sign in a path is a character and not an option. What the guest sees follows Ganeti's KVM module (its disk types,
NIC models and boot orders), said in the words of QEMU 7.2 and later. Each subject has its module in ``command_line``.
"""

from __future__ import annotations

import json
from typing import Any

from hostler.payloads import Instance, Placement
from worker.kvm.command_line.channels import agents, monitors, serial
from worker.kvm.command_line.confinement import confinement
from worker.kvm.command_line.disks import cdroms, disks, floppy
from worker.kvm.command_line.display import graphics, servers
from worker.kvm.command_line.machine import identity, kernel, machine
from worker.kvm.command_line.network import nics
from worker.kvm.command_line.options import HostPart, Option, TapFds, Value
from worker.kvm.command_line.peripherals import balloon, sound, usb

__all__ = ["HostPart", "Option", "TapFds", "build", "pci_devices", "render"]


def build(instance: Instance, host: HostPart) -> list[Option]:
    """The options for ``instance``, in order. Nothing is opened, looked up or changed."""
    hvparams = instance.hvparams
    options = [
        *identity(instance, host),
        *machine(instance, host),
        *monitors(host),
        *serial(host),
        *servers(instance, host),
        *kernel(hvparams),
        *disks(instance, host),
        *cdroms(instance, host),
        *floppy(hvparams, host),
        *nics(instance, host),
        *graphics(hvparams),
        *usb(hvparams),
        *sound(hvparams),
        *balloon(hvparams),
        *agents(hvparams, host),
        *confinement(host),
        *((word, None) for word in hvparams.kvm_extra),
    ]
    return [(name, _placed(value, instance.placement)) for name, value in options]


def _placed(value: Value, placement: Placement | None) -> Value:
    """A device where hotplug has put it, or has left it when others went."""
    if placement is None or not isinstance(value, dict):
        return value
    place: dict[str, Any] = {}
    if (slot := placement.slots.get(value.get("id", ""))) is not None:
        place["addr"] = f"{slot:x}"
    if (scsi_id := placement.scsi_ids.get(value.get("id", ""))) is not None:
        place["scsi-id"] = scsi_id
    return value | place


def render(binary: str, options: list[Option]) -> list[str]:
    """The argv: objects become compact JSON."""
    argv = [binary]
    for name, value in options:
        argv.append(name)
        if isinstance(value, dict):
            argv.append(json.dumps(value, separators=(",", ":")))
        elif value is not None:
            argv.append(value)
    return argv


def pci_devices(options: list[Option]) -> int:
    """How many slots of the machine's PCI bus the devices take."""
    isa = {"isa-fdc", "ne2k_isa", "sb16", "floppy"}
    devices = [value for name, value in options if name == "-device" and isinstance(value, dict)]
    return sum("bus" not in device and device["driver"] not in isa for device in devices)
