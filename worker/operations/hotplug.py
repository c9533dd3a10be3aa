"""Changing a running guest: what the changes have in common.

Each looks first, then records its phase, and from there on it finishes: a job that is taken up again asks QEMU what
there is already, and does what is missing. What was changed is written into the instance's row and its runtime, with
the places of all devices, so that the next QEMU is built with each device where the guest knows it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, or_, select
from sqlalchemy.orm import Session

from hostler.contract import InstanceState, TaskName
from hostler.errors import InvalidArgument
from hostler.payloads import Disk, Instance, InstanceView, Nic, Placement, parse
from models import DiskLease, Node
from models import Instance as InstanceRow
from worker.errors import NotRunning, QemuFailed, TimedOut, Unsupported
from worker.kvm.arguments import HostPart, build
from worker.kvm.qmp import Monitor
from worker.operations import checks
from worker.operations.context import JobContext, NodeContext
from worker.operations.guests import Guest, Guests
from worker.operations.patience import patient
from worker.operations.recovery import recover
from worker.operations.views import instance_view, view_of

LOOK_S = 0.5
"""How often it is looked whether a guest has let go, beside when QEMU says so."""
CLOSED_S = 5.0
"""QEMU lets go of an image a moment after its device went."""


@dataclass(frozen=True)
class Change:
    """One change of one running guest. ``instance`` is how it was before."""

    node: NodeContext
    job: JobContext
    guest: Guest
    instance: Instance

    @property
    def monitor(self) -> Monitor:
        """QEMU's. Raises QmpLost."""
        return self.guest.talk()


def saved(node: NodeContext, guests: Guests, job: JobContext, task: TaskName, name: str) -> tuple[Instance, bool]:
    """The instance as it is on record, and whether an earlier attempt of this job had begun to change it.

    Raises UnknownInstance, and QmpLost where the earlier attempt left a QEMU that is silent.
    """
    view_of(node, name)
    begun = recover(node, guests, job, task, name).phase != "received"
    with node.database.reading() as session:
        return Instance.model_validate(session.get_one(InstanceRow, name).spec), begun


def changed(instance: Instance, argument: str, **changes: Any) -> Instance:
    """``instance`` with some of its fields replaced. Raises InvalidArgument that names the job's ``argument``."""
    try:
        return parse(Instance, instance.model_dump(mode="json") | changes)
    except InvalidArgument as exc:
        raise InvalidArgument([{**error, "field": argument} for error in exc.details["errors"]]) from None


def require_valid(node: NodeContext, instance: Instance, place: str, argument: str) -> None:
    """Raises InvalidArgument with all that this host finds wrong with what is new, at ``place`` of ``instance``."""
    whole = f"instance.{place}"
    crowded = ("instance.disks", "instance.nics")
    found = [
        {"field": field.replace(whole, argument) if field.startswith(whole) else argument, "reason": reason}
        for field, reason in checks.check(node, instance)[0]
        if field.startswith(whole) or field in crowded
    ]
    if found:
        raise InvalidArgument(found)


def require_pci_hotplug(instance: Instance, field: str) -> None:
    """Raises Unsupported where devices cannot come and go on the machine's PCI bus."""
    hvparams = instance.hvparams
    if "i440fx" not in hvparams.machine_version:
        refuse(field, f"machine {hvparams.machine_version} has no PCI slots for hotplug; only pc (i440fx) has")
    if not hvparams.acpi:
        refuse(field, "the guest was started without ACPI, through which it would hear of it")


def refuse(field: str, reason: str) -> None:
    """Raises Unsupported."""
    raise Unsupported(f"{field}: {reason}", errors=[{"field": field, "reason": reason}])


def require_own(session: Session, change: Change) -> InstanceRow:
    """The instance's row, locked. Raises NotRunning when the guest has ended meanwhile."""
    row = session.get_one(InstanceRow, change.instance.name, with_for_update=True, populate_existing=True)
    if row.runtime is None or row.runtime.uuid != change.guest.uuid:
        raise NotRunning(f"{row.name} ended while it was changed; the change is lost", state=row.state)
    return row


def unplug(change: Change, device: str, deadline: float) -> None:
    """Ask the guest to give up a device and wait until it has.

    Raises TimedOut: the device is as it was, though the guest may still let go of it.
    """
    monitor, guest = change.monitor, change.guest
    guest.unplugged.clear()
    if device in monitor.devices():
        monitor.ask_to_unplug(device)
    while device in monitor.devices():
        if (left_s := deadline - time.monotonic()) <= 0:
            raise TimedOut(
                f"{guest.name} did not let go of {device} in time: its system has no hotplug, is not up yet, or is "
                "paused. Nothing was changed, the device stays in use. The guest was asked, and may still let go of "
                "it, at its next reset at the latest; then send the job again, or stop and start the guest without it",
                state=InstanceState.RUNNING,
            )
        change.job.wait(guest.unplugged, min(LOOK_S, left_s))
        guest.unplugged.clear()


def record(change: Change, instance: Instance) -> InstanceView:
    """Write down how the guest is now. Its memory in ``hardware`` stays what its QEMU was built with."""
    numbers = placed(instance, instance.numbered_disks(), instance.numbered_nics())
    places = {"slots": change.monitor.pci_slots(), "scsi_ids": cd_scsi_ids(change.instance)}
    placement = Placement.model_validate(numbers | places)
    return write_down(change, instance.model_copy(update={"placement": placement}))


def placed(
    instance: Instance, disks: Iterable[tuple[int, Disk]], nics: Iterable[tuple[int, Nic]], no_rom: Iterable[int] = ()
) -> dict[str, Any]:
    """A placement of these numbered disks and cards; those in ``no_rom``, and those that were in it, have no ROM."""
    numbers = [number for number, _ in nics]
    without = {*no_rom, *(instance.placement.no_rom if instance.placement else ())}
    return {
        "disks": [number for number, _ in disks],
        "nics": numbers,
        "no_rom": [number for number in numbers if number in without],
    }


@patient
def write_down(change: Change, instance: Instance) -> InstanceView:
    """Record the instance and which disks and CDs it has. Raises NotRunning when the guest has ended meanwhile."""
    left = [*checks.opened(instance).values()]
    node, gone = change.node, [disk for disk in checks.opened(change.instance).values() if disk not in left]
    freed = file_ids(change, gone) - file_ids(change, left)
    with node.database.transaction() as session:
        session.get(Node, node.name, with_for_update=True)
        row = require_own(session, change)
        assert row.runtime
        row.spec = instance.model_dump(mode="json")
        row.runtime.hardware = row.spec | {"memory_mib": row.runtime.hardware["memory_mib"]}
        free(session, change, freed, {disk.path for disk in gone} - {disk.path for disk in left})
        session.flush()
        return instance_view(row)


def file_ids(change: Change, disks: Iterable[Disk]) -> set[str]:
    """The files of disks, and those that these lie on, as leases name them; what cannot be looked at is left out."""
    found: set[str] = set()
    for disk in disks:
        with suppress(OSError):
            alone = checks.alone(change.instance, disk)
            found.update(lease.file_id for lease in checks.leases(change.node.name, alone))
    return found


@patient
def lease(change: Change, disk: Disk, argument: str) -> None:
    """Keep a disk or CD from others. Raises InvalidArgument that names ``argument``, when another instance has it."""
    node, name = change.node.name, change.instance.name
    alone = checks.alone(change.instance, disk)
    with change.node.database.transaction() as session:
        session.get(Node, node, with_for_update=True)
        require_own(session, change)
        held = session.scalars(select(DiskLease).where(DiskLease.node == node)).all()
        others = [lease for lease in held if lease.instance_name != name]
        if taken := [*checks.conflicts(alone, others)]:
            raise InvalidArgument([{"field": argument, "reason": taken[0][1]}])
        own = {lease.file_id for lease in held if lease.instance_name == name}
        session.add_all(lease for lease in checks.leases(node, alone) if lease.file_id not in own)


@patient
def release(change: Change, disk: Disk) -> None:
    """Let others have a disk or CD again that was leased and did not come to be the guest's."""
    kept = [*checks.opened(change.instance).values()]
    files = file_ids(change, [disk]) - file_ids(change, kept)
    with change.node.database.transaction() as session:
        session.get(Node, change.node.name, with_for_update=True)
        free(session, change, files, {disk.path} - {each.path for each in kept})


def close_image(change: Change, node_name: str) -> None:
    """Have QEMU close an image once nothing uses it. Raises TimedOut, and the image is open then."""
    deadline = time.monotonic() + CLOSED_S
    while node_name in change.monitor.block_nodes():
        try:
            change.monitor.remove_block_node(node_name)
        except QemuFailed as exc:
            if time.monotonic() > deadline:
                raise TimedOut(
                    f"{change.guest.name} has let go of {node_name}, but QEMU still has its image open "
                    f"({exc.message}); it stays on record. Send the job again",
                    state=InstanceState.RUNNING,
                ) from exc
            change.job.wait(change.guest.unplugged, 0.1)
            change.guest.unplugged.clear()


def free(session: Session, change: Change, ids: Iterable[str], paths: Iterable[str]) -> None:
    """Let others have files, by what they are and by what they were called: a file may be deleted by now."""
    them = or_(DiskLease.file_id.in_([*ids]), DiskLease.path.in_([*paths]))
    own = DiskLease.node == change.node.name, DiskLease.instance_name == change.instance.name
    session.execute(delete(DiskLease).where(*own, them))


def cd_scsi_ids(instance: Instance) -> dict[str, int]:
    """Which places on a SCSI bus the CD drives have: the first ones behind the disks that there were at the start."""
    host = HostPart(uuid="", accelerator="", qmp_fd=0, monitor_fd=0, agent_fd=0)
    devices = [value for name, value in build(instance, host) if name == "-device" and isinstance(value, dict)]
    return {each["id"]: each["scsi-id"] for each in devices if "scsi-id" in each and each["id"].startswith("cdrom")}
