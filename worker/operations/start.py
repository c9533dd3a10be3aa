"""Starting a guest: every step is recorded before it acts and pushes its undo; success keeps, failure unwinds.

validate -> claim -> network -> sockets -> spawn -> greeting -> continue -> record
"""

from __future__ import annotations

import uuid as uuids
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import structlog
from sqlalchemy import select

from hostler.contract import InstanceState
from hostler.errors import InvalidArgument
from hostler.payloads import Instance, InstanceView
from models import DiskLease, Node, Runtime, utc_now
from models import Instance as InstanceRow
from worker.errors import AlreadyRunning, NetworkFailed
from worker.kvm.folder import GuestFolder
from worker.kvm.launch import Sockets, greet, spawn
from worker.kvm.process import QemuProcess, boot_id
from worker.network import scripts
from worker.network.tap import Tap, open_tap
from worker.operations import checks
from worker.operations.context import JobContext, NodeContext
from worker.operations.ending import Ending
from worker.operations.guests import Guest, Guests, identity_of, release
from worker.operations.patience import patient
from worker.operations.views import instance_view

log = structlog.get_logger(__name__)

STARTABLE = frozenset({InstanceState.STOPPED, InstanceState.CRASHED})


@dataclass
class _Attempt:
    """One try to start one guest: what it has been given so far."""

    node: NodeContext
    guests: Guests
    job: JobContext
    instance: Instance
    accelerator: str
    uuid: str = field(default_factory=lambda: str(uuids.uuid4()))
    taps: dict[int, Tap] = field(default_factory=dict)
    process: QemuProcess | None = None

    @property
    def folder(self) -> GuestFolder:
        return GuestFolder.of(self.node.settings.run_dir, self.uuid)


def start(node: NodeContext, guests: Guests, job: JobContext, instance: Instance, *, paused: bool) -> InstanceView:
    """Start a guest; with ``paused`` it is left before its first instruction.

    Raises InvalidArgument, AlreadyRunning, NetworkFailed or QemuFailed. After any of them no process, tap, folder or
    runtime is left, and an instance that was not known before is not known afterwards.
    """
    if done := finish_interrupted(node, instance.name, job):
        return done
    job.phase("validate", 5, "checking the instance against this host")
    checks.require_valid(node, instance)
    instance = checks.resolve(instance, node.features())
    return build(node, guests, job, instance, accelerator=choose_accelerator(node, instance), paused=paused)


def choose_accelerator(node: NodeContext, instance: Instance) -> str:
    """``kvm`` or ``tcg``: as kvm_flag says, by default KVM where it really runs a guest."""
    flag = instance.hvparams.kvm_flag
    return "kvm" if flag == "enabled" or (not flag and node.kvm().works) else "tcg"


def build(
    node: NodeContext, guests: Guests, job: JobContext, instance: Instance, *, accelerator: str, paused: bool
) -> InstanceView:
    """The start itself, of an instance that was found valid and whose hardware is decided."""
    attempt = _Attempt(node, guests, job, instance, accelerator)
    with ExitStack() as undo:
        _claim(attempt, undo)
        _open_network(attempt, undo)
        job.phase("sockets", 30, "preparing the monitor and console sockets")
        undo.callback(attempt.folder.remove)
        attempt.folder.create()
        guest = _launch(attempt, undo)
        job.phase("greeting", 60, f"QEMU runs as pid {guest.process.pid}; waiting for its monitor")
        guest.monitor = greet(
            node.loop,
            guest.process,
            guest.folder,
            node.settings.qemu_timeout_s,
            lambda event: guests.on_event(guest, event),
            job.check_cancelled,
        )
        undo.callback(guest.monitor.close)
        job.phase("continue", 80, "starting the guest's processors" if not paused else "leaving the guest paused")
        job.commit()
        if not paused:
            guest.monitor.continue_vcpus()
        job.phase("record", 90, "recording the running guest")
        view = _record(attempt, guest, paused=paused)
        undo.pop_all()
    guests.watch(guest)
    guests.observe(guest)  # an event between the record and the watch had nobody to hear it
    for tap in attempt.taps.values():
        tap.close()
    return view


def _claim(attempt: _Attempt, undo: ExitStack) -> None:
    attempt.job.phase("claim", 15, "claiming the instance and its disks")
    node, instance = attempt.node, attempt.instance
    with node.database.transaction() as session:
        # The node's row serialises decisions about its disks; the instance's row, those about the instance anywhere.
        session.get(Node, node.name, with_for_update=True)
        row = session.get(InstanceRow, instance.name, with_for_update=True, populate_existing=True)
        _require_startable(row, node.name)
        previous = _snapshot(row)
        held = session.scalars(select(DiskLease).where(DiskLease.node == node.name)).all()
        if taken := [*checks.conflicts(instance, [*held])]:
            raise InvalidArgument([{"field": f"instance.{place}", "reason": reason} for place, reason in taken])
        if row is None:
            row = InstanceRow(name=instance.name, node=node.name)
            session.add(row)
        row.node, row.state, row.reason = node.name, InstanceState.STARTING, None
        row.spec = instance.model_dump(mode="json")
        row.runtime = _new_runtime(attempt)
        session.flush()
        for disk in instance.disks:
            lease = DiskLease(node=node.name, instance_name=instance.name, path=disk.path)
            lease.file_id, lease.shared, lease.read_only = checks.file_id(disk.path), disk.shared, disk.mode == "ro"
            session.add(lease)
    undo.callback(_unclaim, attempt, previous)


def _require_startable(row: InstanceRow | None, node: str) -> None:
    if row is None or row.state in STARTABLE:
        return
    where = "here" if row.node == node else f"on node {row.node}"
    raise AlreadyRunning(f"Failed to start instance {row.name}: already running {where}", state=row.state)


def _snapshot(row: InstanceRow | None) -> dict[str, Any] | None:
    if row is None:
        return None
    return {name: getattr(row, name) for name in ("node", "state", "reason", "spec", "ended_at")}


def _new_runtime(attempt: _Attempt) -> Runtime:
    return Runtime(
        node=attempt.node.name,
        uuid=attempt.uuid,
        boot_id=boot_id(),
        executable=str(attempt.node.qemu_binary),
        machine=attempt.instance.hvparams.machine_version,
        accelerator=attempt.accelerator,
        run_dir=str(attempt.folder.path),
        hardware=attempt.instance.model_dump(mode="json"),
        taps=[],
    )


@patient
def _unclaim(attempt: _Attempt, previous: dict[str, Any] | None) -> None:
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


def _open_network(attempt: _Attempt, undo: ExitStack) -> None:
    cards = [(index, nic) for index, nic in enumerate(attempt.instance.nics) if nic.mode != "user"]
    if not cards:
        return
    attempt.job.phase("network", 20, f"opening {len(cards)} tap(s)")
    for index, _ in cards:
        attempt.taps[index] = tap = open_tap(vnet_hdr=attempt.instance.hvparams.nic_type == "paravirtual")
        undo.callback(tap.close)
    with attempt.node.database.transaction() as session:
        row = session.get_one(Runtime, attempt.instance.name)
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
        tap_name = attempt.taps[index].name
        env = scripts.environment(attempt.instance.name, attempt.instance.tags, index, nic, tap_name)
        undo.callback(_ifdown, attempt.node, tap_name, env)
        scripts.run(attempt.node.ifup, tap_name, env, check=attempt.job.check_cancelled)


def _ifdown(node: NodeContext, tap: str, env: dict[str, str]) -> None:
    try:
        scripts.run(node.ifdown, tap, env)
    except NetworkFailed as exc:
        log.warning("ifdown failed in the undo of a start", tap=tap, reason=str(exc))


def _launch(attempt: _Attempt, undo: ExitStack) -> Guest:
    node, instance, folder = attempt.node, attempt.instance, attempt.folder
    sockets = Sockets.bind(folder, serial=instance.hvparams.serial_console)
    try:
        attempt.job.phase("spawn", 45, "starting QEMU")
        tap_fds = {index: tap.fd for index, tap in attempt.taps.items()}
        attempt.process = process = spawn(
            node.qemu_binary,
            instance,
            folder,
            sockets,
            tap_fds,
            uuid=attempt.uuid,
            accelerator=attempt.accelerator,
        )
    finally:
        sockets.close()
    undo.callback(process.close)
    undo.callback(process.kill, grace_s=0.5)
    with node.database.transaction() as session:
        row = session.get_one(Runtime, instance.name)
        row.pid, row.start_ticks = process.identity.pid, process.identity.start_ticks
    return Guest(instance.name, attempt.uuid, process, folder)


@patient
def _record(attempt: _Attempt, guest: Guest, *, paused: bool) -> InstanceView:
    with attempt.node.database.transaction() as session:
        row = session.get_one(InstanceRow, attempt.instance.name, with_for_update=True, populate_existing=True)
        runtime = session.get_one(Runtime, attempt.instance.name)
        runtime.qemu_version = guest.talk().version
        runtime.started_at = utc_now()
        row.state = InstanceState.PAUSED if paused else InstanceState.RUNNING
        row.ended_at = None
        session.flush()
        return instance_view(row)


def finish_interrupted(node: NodeContext, name: str, job: JobContext) -> InstanceView | None:
    """Look at what an earlier attempt of this very job left when its worker died.

    None on a first attempt. A start that got as far as its record is done: its view is returned. A half-started QEMU
    has run no guest that anybody was told of: it is ended, all it had is given back, and the start begins anew.
    """
    if job.attempt == 1:
        return None
    with node.database.reading() as session:
        row = session.get(Runtime, name)
        if row is None or row.node != node.name:
            return None
        if row.instance.state != InstanceState.STARTING:
            return instance_view(row.instance) if "record" in job.earlier_phases() else None
        identity, runtime_uuid = identity_of(row), row.uuid
    if identity and (process := QemuProcess.adopt(identity)):
        process.kill(grace_s=0.5)
    release(node, name, runtime_uuid, Ending(InstanceState.STOPPED, "its start was interrupted", "killed"))
    return None
