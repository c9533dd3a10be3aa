"""Network cards of a running guest: plugged in, taken out."""

from __future__ import annotations

import time

from hostler.contract import TaskName
from hostler.errors import InvalidArgument
from hostler.payloads import Instance, InstanceView, Nic, NicAddArguments, NicRemoveArguments
from models import runtime_of
from worker.errors import OperationError, QmpLost
from worker.kvm.command_line.network import netdev, nic_device, queues, uses_vhost
from worker.network import scripts
from worker.network.tap import Tap, open_tap
from worker.network.vhost import close_vhost, open_vhost
from worker.operations import hotplug
from worker.operations.context import JobContext, NodeContext
from worker.operations.guests import Guests, disconnect
from worker.operations.hotplug import Change, changed, record, require_own, saved, unplug
from worker.operations.patience import patient
from worker.operations.views import view_of


def nic_add(node: NodeContext, guests: Guests, job: JobContext, arguments: NicAddArguments) -> InstanceView:
    """Plug in a network card, as the last one.

    Raises InvalidArgument, Unsupported, NotRunning, NetworkFailed or QemuFailed; no tap is left then, and the guest is
    as before. After QmpLost the job is tried again; a tap that QEMU has by then is found at the guest's end.
    """
    nic = arguments.nic
    instance, begun = saved(node, guests, job, TaskName.INSTANCE_NIC_ADD, arguments.name)
    if begun and nic in instance.nics:
        return view_of(node, instance.name)
    change = Change(node, job, guests.need(instance.name), instance)
    number = _free_number(change, nic)
    wanted = _with_nics(instance, [*instance.numbered_nics(), (number, nic)])
    _require_hotplug(instance)
    hotplug.require_valid(node, wanted, f"nics[{len(instance.nics)}]", "nic")
    job.phase("plug", 30, f"plugging in {nic.mac} as card {number}")
    job.commit()
    if f"nic{number}" not in change.monitor.devices():
        _give_back(change, number)  # what an earlier attempt left half-done
        _plug(change, wanted, number, nic)
    return record(change, wanted)


def nic_remove(node: NodeContext, guests: Guests, job: JobContext, arguments: NicRemoveArguments) -> InstanceView:
    """Take out a card once the guest has let go of it, with its tap.

    Raises InvalidArgument, Unsupported or NotRunning, and TimedOut when the guest does not react: it keeps the card.
    """
    mac = arguments.mac
    instance, begun = saved(node, guests, job, TaskName.INSTANCE_NIC_REMOVE, arguments.name)
    left = [(number, nic) for number, nic in instance.numbered_nics() if nic.mac != mac]
    if begun and len(left) == len(instance.nics):
        return view_of(node, instance.name)
    change = Change(node, job, guests.need(instance.name), instance)
    number = _find(instance, mac)
    _require_hotplug(instance)
    job.phase("unplug", 30, f"waiting up to {arguments.timeout_s:g} s for the guest to let go of card {number}")
    job.commit()
    unplug(change, f"nic{number}", time.monotonic() + arguments.timeout_s)
    _give_back(change, number)
    return record(change, _with_nics(instance, left))


def _find(instance: Instance, mac: str) -> int:
    for number, nic in instance.numbered_nics():
        if nic.mac == mac:
            return number
    has = ", ".join(nic.mac for nic in instance.nics) or "none"
    raise InvalidArgument([{"field": "mac", "reason": f"{instance.name} has no card {mac}; its cards: {has}"}])


def _with_nics(instance: Instance, nics: list[tuple[int, Nic]]) -> Instance:
    # In its chroot a QEMU finds no ROM for a new card; and what a card has must not change with the next QEMU.
    new = {number for number, _ in nics} - {number for number, _ in instance.numbered_nics()}
    no_rom = new if instance.hvparams.use_chroot else ()
    placement = hotplug.placed(instance, instance.numbered_disks(), nics, no_rom)
    return changed(instance, "nic", nics=[nic.model_dump(mode="json") for _, nic in nics], placement=placement)


def _free_number(change: Change, nic: Nic) -> int:
    """The first number that nothing else has; the one of an earlier attempt where the guest has the card already."""
    taken = {number for number, _ in change.instance.numbered_nics()}
    for number in (number for number in range(256) if number not in taken):
        device = f"nic{number}"
        if device not in change.monitor.devices() or change.monitor.device_property(device, "mac") == nic.mac:
            return number
    raise AssertionError("an instance has few cards")


def _require_hotplug(instance: Instance) -> None:
    if instance.hvparams.nic_type == "ne2k_isa":
        hotplug.refuse("hvparams.nic_type", "cards of type ne2k_isa cannot come or go while a guest runs")
    hotplug.require_pci_hotplug(instance, "hvparams.nic_type")


def _plug(change: Change, wanted: Instance, number: int, nic: Nic) -> None:
    hvparams = wanted.hvparams
    has_tap = nic.mode != "user"
    tap = open_tap(vnet_hdr=hvparams.nic_type == "paravirtual", queues=queues(hvparams)) if has_tap else None
    vhost: tuple[int, ...] = ()
    try:
        if tap:
            vhost = open_vhost(len(tap.fds)) if uses_vhost(hvparams) else ()
            _connect(change, number, nic, tap)
        taps = {f"tap{number}-{queue}": fd for queue, fd in enumerate(tap.fds if tap else ())}
        vhosts = {f"vhost{number}-{queue}": fd for queue, fd in enumerate(vhost)}
        change.monitor.add_network(netdev(number, nic, [*taps], [*vhosts]), taps | vhosts)
        change.monitor.plug(nic_device(wanted, number, nic))
    except QmpLost:
        raise  # whether QEMU has it is not known: the next attempt asks
    except OperationError:
        _give_back(change, number)
        raise
    finally:
        close_vhost(vhost)
        if tap:
            tap.close()


def _connect(change: Change, number: int, nic: Nic, tap: Tap) -> None:
    known = {"index": number, "name": tap.name, "ifindex": tap.ifindex, **nic.model_dump()}
    _note_tap(change, number, known)
    env = scripts.environment(change.instance.name, change.instance.tags, number, nic, tap.name)
    scripts.run(change.node.ifup, tap.name, env)


def _give_back(change: Change, number: int) -> None:
    """Remove the host's side of a card that the guest does not have, where there is one."""
    change.monitor.remove_network(f"netdev{number}")
    with change.node.database.reading() as session:
        runtime = runtime_of(session, change.node.name, change.instance.name)
        taps = [tap for tap in runtime.taps if tap["index"] == number] if runtime else []
    for tap in taps:
        disconnect(change.node, change.instance.name, change.instance.tags, tap)
    if taps:
        _note_tap(change, number, None)


@patient
def _note_tap(change: Change, number: int, tap: dict[str, object] | None) -> None:
    with change.node.database.transaction() as session:
        runtime = require_own(session, change).runtime
        assert runtime
        others = [each for each in runtime.taps if each["index"] != number]
        runtime.taps = [*others, tap] if tap else others
