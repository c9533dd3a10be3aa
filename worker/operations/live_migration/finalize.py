"""The last part, on the target: the guest runs on there; or, its memory did not arrive, it is the source's again."""

from __future__ import annotations

import time
from datetime import datetime
from functools import partial
from typing import Any

from sqlalchemy.orm import Session

from hostler.contract import InstanceState
from hostler.payloads import Nic
from models import Instance as InstanceRow
from models import LiveMigration, runtime_of, utc_now
from worker.errors import MigrationFailed, OperationError, QemuFailed, QmpLost
from worker.kvm.live_migration.incoming import Incoming
from worker.kvm.live_migration.sample import FAILED, HANDED_ON
from worker.network import scripts
from worker.operations.context import JobContext, NodeContext
from worker.operations.guests import Guest, Guests
from worker.operations.live_migration import rows, security, storage
from worker.operations.live_migration.other_side import end_incoming
from worker.operations.live_migration.rows import Stage
from worker.operations.patience import patient
from worker.operations.wanted_rows import note_moved

ARRIVE_S = 30.0
"""How long the target's QEMU may take to load what the source's has sent: the devices' state, some megabytes."""
LOOK_S = 0.005


def finalize(node: NodeContext, guests: Guests, job: JobContext, row: LiveMigration) -> dict[str, Any]:
    """Continue the guest here, which this node owns since the source's QEMU sent all of it.

    Where its memory did not arrive whole, this node's QEMU is ended, and the source owns the guest again: the result's
    ``returned`` then says why. Raises QmpLost when QEMU keeps silent; nothing is concluded from that.
    """
    if row.stage in (Stage.FINALIZED, Stage.DONE):
        return _resumed(row, row.resumed_at)
    if row.stage not in rows.ON_THE_TARGET or rows.owner_of(node, row.instance_name) != node.name:
        raise MigrationFailed(f"migration {row.job_id} is {row.stage}; there is nothing to finalize", phase=row.stage)
    guest = guests.get(row.instance_name)
    if row.stage == Stage.MOVED and (why := _cannot_go_on_here(node, row, guest)):
        return give_back(node, guests, row, why)
    job.carry_on()  # too late for a cancel: nobody else could let the guest go on
    message = "letting the guest go on here" if not row.was_paused else "the guest is here, paused"
    try:
        job.phase("finalize", 90, message, partial(_decide_to_continue, row=row))
    except _GoesOnAlready:
        return _resumed(row, rows.get(node, row.job_id).resumed_at)
    if guest is None:
        return _ended_here(node, row)
    if not row.was_paused and (why := _continue(guest, first=row.stage == Stage.MOVED)):
        return give_back(node, guests, row, why)
    resumed_at, stopped_at = utc_now(), guest.stopped_at
    guests.soon(_announce, guest)
    _record(node, guest, row, resumed_at)
    guest.arriving = False
    if guest.stopped_at != stopped_at:  # it stopped again before that was for all to see
        guests.soon(guests.observe, guest)
    if row.info["tls"] and not row.report.get("postcopy"):
        security.take_certificates(guest)
    return _resumed(row, resumed_at)


class _GoesOnAlready(Exception):
    """Somebody else has finalized it meanwhile: a master, or who gives up the source's node."""


def _decide_to_continue(session: Session, row: LiveMigration) -> None:
    """From here on the guest may have run here. Raises MigrationFailed where it was given back meanwhile."""
    if rows.enter(session, row.job_id, Stage.MOVED, Stage.CONTINUING):
        return
    now = session.get_one(LiveMigration, row.job_id)
    if now.stage in (Stage.FINALIZED, Stage.DONE) and not (now.report or {}).get("failure"):
        raise _GoesOnAlready
    raise MigrationFailed("the guest was given back meanwhile", phase="finalize")


def _cannot_go_on_here(node: NodeContext, row: LiveMigration, guest: Guest | None) -> str | None:
    """None when all is here for the guest to go on; else why it goes back. Raises what is transient."""
    if reason := _wait_until_arrived(guest):
        return reason
    assert guest
    try:
        connect_routed(node, row.instance_name)  # from here on this host attracts what is sent to the guest
        storage.close(row, guest)
    except OperationError as exc:
        if exc.transient:
            raise
        return exc.message
    return None


def _continue(guest: Guest, *, first: bool) -> str | None:
    """None when the guest runs; else why it goes back, which it can when this was the first time that it was tried."""
    try:
        guest.talk().continue_vcpus()
    except QemuFailed as exc:
        if not first or guest.talk().status() == "running":
            raise
        return exc.message
    return None


def _announce(guest: Guest) -> None:
    Incoming(guest.talk()).announce()


def _ended_here(node: NodeContext, row: LiveMigration) -> dict[str, Any]:
    """It may have run here, so it never goes back: its end is that of a guest of this node."""
    why = MigrationFailed(f"{row.instance_name} ended on node {node.name} when it was to go on there")
    report = row.report | {"failure": rows.as_failure(why, "finalize")}
    rows.note_gone(node, row.instance_name)
    rows.move_on(node, row.job_id, Stage.CONTINUING, Stage.FINALIZED, report=report)
    return _resumed(row, row.resumed_at)


def listen_again(node: NodeContext, guests: Guests, row: LiveMigration) -> dict[str, Any]:
    """Post-copy whose connection broke: open a port for the source to send the rest. Raises MigrationFailed."""
    guest = guests.need(row.instance_name)
    first, last = node.settings.migration_ports
    port = Incoming(guest.talk()).recover(str(row.host), range(first, last + 1))
    return {"host": row.host, "port": port}


def _wait_until_arrived(guest: Guest | None) -> str | None:
    """None when the guest is here whole; else why it never will be."""
    deadline = time.monotonic() + ARRIVE_S
    while guest and not guest.process.wait(0):
        try:
            sample = Incoming(guest.talk()).query()
        except OperationError:
            if guest.process.wait(1.0):
                break
            raise
        if sample.status in HANDED_ON:
            return None
        if sample.status == FAILED:
            return sample.error or "the target's QEMU could not load it"
        if time.monotonic() > deadline:
            raise QmpLost(f"the target's QEMU has not loaded the guest after {ARRIVE_S:g} s (it is {sample.status})")
        time.sleep(LOOK_S)
    return "the target's QEMU ended: " + (guest.folder.log_tail() if guest else "it was gone already")


def connect_routed(node: NodeContext, name: str) -> None:
    """Run ifup for the cards that were left out while the guest ran elsewhere. Raises NetworkFailed."""
    with node.database.reading() as session:
        runtime = runtime_of(session, node.name, name)
    assert runtime
    for tap in runtime.taps:
        if tap["mode"] == "routed":
            nic = Nic.model_validate({key: tap[key] for key in Nic.model_fields if key in tap})
            tags = runtime.hardware["tags"]
            env = scripts.environment(name, tags, int(tap["index"]), nic, str(tap["name"]))
            scripts.run(node.ifup, str(tap["name"]), env)


def give_back(node: NodeContext, guests: Guests, row: LiveMigration, reason: str) -> dict[str, Any]:
    """The guest is the source's again. The proof first: with its QEMU gone nothing here can ever run it."""
    end_incoming(node, guests, row.instance_name)
    rows.give_back(node, row.job_id, MigrationFailed(f"the guest's memory did not arrive: {reason}"))
    storage.discard_images(node, rows.get(node, row.job_id))
    return {"returned": reason, "node": row.source}


@patient
def _record(node: NodeContext, guest: Guest, row: LiveMigration, resumed_at: datetime) -> None:
    with node.database.transaction() as session:
        instance = session.get_one(InstanceRow, guest.name, with_for_update=True, populate_existing=True)
        runtime = runtime_of(session, node.name, guest.name)
        if runtime is None or instance.node != node.name:
            raise MigrationFailed(f"{guest.name} is not this node's any more", phase=row.stage)
        runtime.qemu_version = guest.talk().version
        runtime.started_at = runtime.started_at or row.started_at
        instance.state = InstanceState.PAUSED if row.was_paused else InstanceState.RUNNING
        note_moved(instance)
        rows.enter(session, row.job_id, Stage.CONTINUING, Stage.FINALIZED, resumed_at=resumed_at)


def _resumed(row: LiveMigration, resumed_at: datetime | None) -> dict[str, Any]:
    return {"returned": None, "node": row.target, "resumed_at": resumed_at and resumed_at.isoformat()}
