"""Starting a guest: every step is recorded before it acts and pushes its undo; success keeps, failure unwinds.

validate -> claim -> uid -> network -> sockets -> spawn -> greeting -> continue -> record
"""

from __future__ import annotations

import uuid as uuids
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from hostler.contract import InstanceState, TaskName
from hostler.errors import InvalidArgument
from hostler.payloads import Instance, InstanceView
from models import DiskLease, Node, Runtime, runtime_of, utc_now
from models import Instance as InstanceRow
from worker.errors import AlreadyRunning, NetworkFailed
from worker.kvm.command_line.machine import memory_mib
from worker.kvm.command_line.network import queues, uses_vhost
from worker.kvm.command_line.options import TapFds
from worker.kvm.cpu_mask import bind
from worker.kvm.folder import GuestFolder
from worker.kvm.launch import Sockets, greet, spawn
from worker.kvm.process import QemuProcess, boot_id
from worker.network import scripts
from worker.network.tap import Tap, open_tap
from worker.network.vhost import close_vhost, open_vhost
from worker.operations import checks, isolating
from worker.operations.context import JobContext, NodeContext
from worker.operations.guests import Guest, Guests, how_it_ended, release
from worker.operations.maintenance.marks import require_admission
from worker.operations.patience import patient
from worker.operations.recovery import recover
from worker.operations.recovery_table import Action
from worker.operations.views import instance_view, view_of
from worker.operations.wanted_rows import note_running

log = structlog.get_logger(__name__)

STARTABLE = frozenset({InstanceState.STOPPED, InstanceState.CRASHED})


@dataclass
class Attempt:
    """One try to bring up one QEMU: what it has been given so far.

    ``incoming`` is one that waits for a guest, ``again`` one in the place of another that the guest had here.
    """

    node: NodeContext
    guests: Guests
    job: JobContext
    instance: Instance
    accelerator: str
    restarts: int = 0
    incoming: bool = False
    again: bool = False
    machine_uuid: str = ""
    uuid: str = field(default_factory=lambda: str(uuids.uuid4()))
    taps: dict[int, Tap] = field(default_factory=dict)
    vhost: dict[int, tuple[int, ...]] = field(default_factory=dict)
    uid: int | None = None
    process: QemuProcess | None = None

    @property
    def folder(self) -> GuestFolder:
        return GuestFolder.of(self.node.settings.run_dir, self.uuid)


def start(node: NodeContext, guests: Guests, job: JobContext, instance: Instance, *, paused: bool) -> InstanceView:
    """Start a guest; with ``paused`` it is left before its first instruction.

    Raises InvalidArgument, AlreadyRunning, NetworkFailed or QemuFailed. After any of them no process, tap, folder or
    runtime is left, and an instance that was not known before is not known afterwards.
    """
    if recover(node, guests, job, TaskName.INSTANCE_START, instance.name).action is Action.COMPLETE:
        return complete(node, guests, instance.name, paused=paused)
    job.phase("validate", 5, "checking the instance against this host")
    checks.require_valid(node, instance)
    instance = checks.resolve(instance, node.features())
    return build(node, guests, job, instance, accelerator=choose_accelerator(node, instance), paused=paused)


def choose_accelerator(node: NodeContext, instance: Instance) -> str:
    """``kvm`` or ``tcg``: as kvm_flag says, by default KVM where it really runs a guest."""
    flag = instance.hvparams.kvm_flag
    return "kvm" if flag == "enabled" or (not flag and node.kvm().works) else "tcg"


def build(
    node: NodeContext,
    guests: Guests,
    job: JobContext,
    instance: Instance,
    *,
    accelerator: str,
    paused: bool,
    restarts: int = 0,
    again: bool = False,
) -> InstanceView:
    """The start itself, of an instance that was found valid and whose hardware is decided.

    ``restarts`` is how many hostler began by itself in a row, with this one; 0 where somebody asked for it. ``again``:
    it is part of a reboot, which a drained node does not refuse.
    """
    attempt = Attempt(node, guests, job, instance, accelerator, restarts, again=again)
    with ExitStack() as undo:
        _claim(attempt, undo)
        guest = bring_up(attempt, undo)
        job.phase("continue", 80, "starting the guest's processors" if not paused else "leaving the guest paused")
        job.commit()
        if not paused:
            guest.talk().continue_vcpus()
        job.phase("record", 90, "recording the running guest")
        view = _record(node, guest, paused=paused, restarts=restarts)
        undo.pop_all()
    guests.watch(guest)
    guests.observe(guest)  # an event between the record and the watch had nobody to hear it
    close_network(attempt)
    return view


def bring_up(attempt: Attempt, undo: ExitStack) -> Guest:
    """From a claimed runtime to a QEMU whose monitor answers and whose guest has not run. Raises as ``start`` does."""
    node, job, instance = attempt.node, attempt.job, attempt.instance
    _take_uid(attempt, undo)
    _open_network(attempt, undo)
    job.phase("sockets", 30, "preparing the monitor and console sockets")
    undo.callback(isolating.remove_folder, node, instance.name, attempt.folder)
    attempt.folder.create()
    guest = _launch(attempt, undo)
    message = f"QEMU runs as pid {guest.process.pid}; waiting for its monitor"
    job.phase("greeting", 60, message, partial(_note_process, attempt=attempt))
    guest.monitor = greet(
        node.loop,
        guest.process,
        guest.folder,
        node.settings.qemu_timeout_s,
        lambda event: attempt.guests.on_event(guest, event),
        job.check_cancelled,
    )
    undo.callback(guest.monitor.close)
    bind(guest.monitor, guest.process.identity.pid, instance.hvparams.cpu_mask)
    if instance.memory_mib < memory_mib(instance):
        guest.monitor.inflate_balloon(instance.memory_mib * 2**20)  # the guest's driver finds it when it comes
    return guest


def close_network(attempt: Attempt) -> None:
    """Close our copies of what QEMU has by now."""
    for tap in attempt.taps.values():
        tap.close()
    for fds in attempt.vhost.values():
        close_vhost(fds)


def _claim(attempt: Attempt, undo: ExitStack) -> None:
    attempt.job.phase("claim", 15, "claiming the instance and its disks")
    node, instance = attempt.node, attempt.instance
    with node.database.transaction() as session:
        # The node's row serialises decisions about its disks; the instance's row, those about the instance anywhere.
        here = session.get(Node, node.name, with_for_update=True, populate_existing=True)
        if not attempt.again:
            require_admission(here, f"Failed to start instance {instance.name}")
        row = session.get(InstanceRow, instance.name, with_for_update=True, populate_existing=True)
        _require_startable(session, row, node.name)
        previous = _snapshot(row)
        held = session.scalars(select(DiskLease).where(DiskLease.node == node.name)).all()
        if taken := [*checks.conflicts(instance, [*held])]:
            raise InvalidArgument([{"field": f"instance.{place}", "reason": reason} for place, reason in taken])
        if row is None:
            row = InstanceRow(name=instance.name, node=node.name)
            session.add(row)
        row.node, row.state, row.reason = node.name, InstanceState.STARTING, None
        row.spec = instance.model_dump(mode="json")
        row.runtime = new_runtime(attempt)
        session.flush()
        session.add_all(checks.leases(node.name, instance))
    undo.callback(_unclaim, attempt, previous)


def _require_startable(session: Session, row: InstanceRow | None, node: str) -> None:
    if row is None:
        return
    if row.state not in STARTABLE:
        where = "here" if row.node == node else f"on node {row.node}"
        raise AlreadyRunning(f"Failed to start instance {row.name}: already running {where}", state=row.state)
    if row.node != node and runtime_of(session, node, row.name):
        raise AlreadyRunning(
            f"Failed to start instance {row.name}: node {row.node} owns it, and what {node} had of it in a migration"
            f" is not given back yet; ask again later, or see hostler audit -n {node}",
            state=row.state,
        )


def _snapshot(row: InstanceRow | None) -> dict[str, Any] | None:
    if row is None:
        return None
    return {name: getattr(row, name) for name in ("node", "state", "reason", "spec", "ended_at")}


def new_runtime(attempt: Attempt) -> Runtime:
    """The runtime of the QEMU that this attempt makes, to be written before anything of it is there."""
    return Runtime(
        instance_name=attempt.instance.name,
        node=attempt.node.name,
        uuid=attempt.uuid,
        started_by=attempt.job.id,
        boot_id=boot_id(),
        executable=str(attempt.node.qemu_binary),
        machine=attempt.instance.hvparams.machine_version,
        accelerator=attempt.accelerator,
        run_dir=str(attempt.folder.path),
        hardware=attempt.instance.model_dump(mode="json"),
        taps=[],
    )


@patient
def _unclaim(attempt: Attempt, previous: dict[str, Any] | None) -> None:
    with attempt.node.database.transaction() as session:
        row = session.get(InstanceRow, attempt.instance.name, with_for_update=True)
        if row is None or row.runtime is None or row.runtime.uuid != attempt.uuid:
            return
        if attempt.process and attempt.process.identity.is_alive():
            # It would not die and still holds its disks: nothing may be handed out again.
            row.state, row.reason = InstanceState.UNKNOWN, "its start failed and its QEMU could not be ended"
            return
        if previous is None:
            session.delete(row)
            return
        row.runtime = None
        for name, value in previous.items():
            setattr(row, name, value)


def _take_uid(attempt: Attempt, undo: ExitStack) -> None:
    model = attempt.instance.hvparams.security_model
    if model == "none":
        return
    attempt.job.phase("uid", 18, "taking a uid of the pool" if model == "pool" else "giving the disks to the user")
    attempt.uid = isolating.assign_uid(attempt.node, attempt.instance, attempt.uuid)
    undo.callback(_give_uid_back, attempt)
    isolating.grant_files(attempt.instance, attempt.uid)


@patient
def _give_uid_back(attempt: Attempt) -> None:
    if not (attempt.process and attempt.process.identity.is_alive()):  # one that would not die keeps all it has
        isolating.take_back(attempt.node, attempt.instance, attempt.uuid, attempt.uid)


def _open_network(attempt: Attempt, undo: ExitStack) -> None:
    cards = [(index, nic) for index, nic in attempt.instance.numbered_nics() if nic.mode != "user"]
    if not cards:
        return
    attempt.job.phase("network", 20, f"opening {len(cards)} tap(s)")
    hvparams = attempt.instance.hvparams
    for index, _ in cards:
        attempt.taps[index] = tap = open_tap(vnet_hdr=hvparams.nic_type == "paravirtual", queues=queues(hvparams))
        undo.callback(tap.close)
        if uses_vhost(hvparams):
            attempt.vhost[index] = fds = open_vhost(len(tap.fds))
            undo.callback(close_vhost, fds)
    with attempt.node.database.transaction() as session:
        row = session.get_one(Runtime, (attempt.instance.name, attempt.node.name))
        row.taps = [
            {
                "index": index,
                "name": attempt.taps[index].name,
                "ifindex": attempt.taps[index].ifindex,
                **nic.model_dump(),
            }
            for index, nic in cards
        ]
    for index, nic in cards:
        if attempt.incoming and nic.mode == "routed":
            continue  # its address would attract what is sent to the guest, which runs elsewhere still
        tap_name = attempt.taps[index].name
        env = scripts.environment(attempt.instance.name, attempt.instance.tags, index, nic, tap_name)
        undo.callback(_ifdown, attempt.node, tap_name, env)
        scripts.run(attempt.node.ifup, tap_name, env, check=attempt.job.check_cancelled)


def _ifdown(node: NodeContext, tap: str, env: dict[str, str]) -> None:
    try:
        scripts.run(node.ifdown, tap, env)
    except NetworkFailed as exc:
        log.warning("ifdown failed in the undo of a start", tap=tap, reason=str(exc))


def _launch(attempt: Attempt, undo: ExitStack) -> Guest:
    node, instance, folder = attempt.node, attempt.instance, attempt.folder
    sockets = Sockets.bind(folder, serial=instance.hvparams.serial_console)
    try:
        attempt.job.phase("spawn", 45, "starting QEMU")
        tap_fds = {index: TapFds(tap.fds, attempt.vhost.get(index, ())) for index, tap in attempt.taps.items()}
        attempt.process = process = spawn(
            node.qemu_binary,
            instance,
            folder,
            sockets,
            tap_fds,
            uuid=attempt.uuid,
            accelerator=attempt.accelerator,
            incoming=attempt.incoming,
            machine_uuid=attempt.machine_uuid,
            confinement=isolating.confinement_of(instance, node.features(), folder, attempt.uid),
            through=isolating.enter_group(node, instance, attempt.uuid),
        )
    finally:
        sockets.close()
    undo.callback(process.close)
    undo.callback(process.kill, grace_s=0.5)
    return Guest(instance.name, attempt.uuid, process, folder)


def _note_process(session: Session, attempt: Attempt) -> None:
    assert attempt.process
    row = session.get_one(Runtime, (attempt.instance.name, attempt.node.name))
    row.pid, row.start_ticks = attempt.process.identity.pid, attempt.process.identity.start_ticks


def complete(node: NodeContext, guests: Guests, name: str, *, paused: bool, restarts: int = 0) -> InstanceView:
    """Finish a start whose worker died when the guest ran or was about to: its QEMU is kept, continued and recorded.

    A guest that has shut itself down meanwhile was started and is stopped. Raises UnknownInstance, QmpLost.
    """
    with node.database.reading() as session:
        runtime = runtime_of(session, node.name, name)
    guest = guests.get(name) or (guests.adopt(runtime, killed_by_us=False) if runtime else None)
    if guest is None:
        if runtime:
            release(node, name, runtime.uuid, how_it_ended(runtime, killed_by_us=False))
        return view_of(node, name)
    if not paused:
        guest.talk().continue_vcpus()
    view = _record(node, guest, paused=paused, restarts=restarts)
    guests.observe(guest)
    return view


@patient
def _record(node: NodeContext, guest: Guest, *, paused: bool, restarts: int) -> InstanceView:
    with node.database.transaction() as session:
        row = session.get_one(InstanceRow, guest.name, with_for_update=True, populate_existing=True)
        runtime = session.get_one(Runtime, (guest.name, node.name))
        runtime.pid, runtime.start_ticks = guest.process.identity.pid, guest.process.identity.start_ticks
        runtime.qemu_version = guest.talk().version
        runtime.started_at = runtime.started_at or utc_now()
        row.state = InstanceState.PAUSED if paused else InstanceState.RUNNING
        row.ended_at = None
        note_running(row, restarts)
        session.flush()
        return instance_view(row)
