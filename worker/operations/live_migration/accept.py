"""The target's part: a QEMU that waits for the guest, and never runs it by itself; and giving all of it back."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import psutil
from sqlalchemy import select
from sqlalchemy.orm import Session

from hostler.errors import InvalidArgument
from hostler.payloads import Instance
from models import DiskLease, LiveMigration, Node, runtime_of
from worker.errors import MigrationFailed, TargetBusy, Unsupported
from worker.kvm.live_migration.capabilities import prepare
from worker.kvm.live_migration.incoming import Incoming
from worker.operations import checks
from worker.operations.context import JobContext, NodeContext
from worker.operations.guests import Guest, Guests
from worker.operations.live_migration import leftovers, rows, same_disk, security, storage
from worker.operations.live_migration.other_side import end_incoming
from worker.operations.live_migration.rows import Stage
from worker.operations.live_migration.tuning import tuning_of
from worker.operations.maintenance.marks import require_admission
from worker.operations.patience import patient
from worker.operations.start import Attempt, bring_up, close_network, new_runtime


def accept(node: NodeContext, guests: Guests, job: JobContext, migration_id: str) -> dict[str, Any]:
    """Make a QEMU that waits for the guest, and say where it listens.

    Raises InvalidArgument, Unsupported, MigrationFailed and what a start can raise; then nothing is left here, and the
    guest has noticed nothing.
    """
    row = rows.get(node, migration_id)
    _require_wanted(node, row)
    _require_room(node, migration_id)
    _end_earlier_attempt(node, guests, job, row.instance_name)
    leftovers.remove(node, guests, row.instance_name, for_migration=migration_id)
    instance = Instance.model_validate(row.info["instance"])
    in_tls = security.agree(node, row.info["tls"])
    with ExitStack() as undo:
        if row.info["copied"]:
            job.phase("images", 5, "making the disks to copy to")
            storage.make_images(node, row)
            undo.callback(_discard_images, node, migration_id)
            row = rows.get(node, migration_id)
        _require_fit(node, row, instance)
        found = _bring_up(node, guests, job, row, instance, in_tls)
        undo.pop_all()
    return found


def _discard_images(node: NodeContext, migration_id: str) -> None:
    storage.discard_images(node, rows.get(node, migration_id))


def _end_earlier_attempt(node: NodeContext, guests: Guests, job: JobContext, name: str) -> None:
    """Its QEMU is watched by now, and who watches sees to its end: two at once would get in each other's way."""
    if job.attempt == 1:
        return
    with node.database.reading() as session:
        runtime = runtime_of(session, node.name, name)
    if runtime and runtime.started_by == job.id:
        end_incoming(node, guests, name, runtime.uuid)


def _bring_up(
    node: NodeContext, guests: Guests, job: JobContext, row: LiveMigration, instance: Instance, in_tls: bool
) -> dict[str, Any]:
    accelerator, machine_uuid = row.info["accelerator"], row.info["machine_uuid"]
    attempt = Attempt(node, guests, job, instance, accelerator, incoming=True, machine_uuid=machine_uuid)
    with ExitStack() as undo:
        _claim(attempt, undo)
        guest = bring_up(attempt, undo)
        job.check_cancelled()
        creds = security.give_certificates(node, guest, "server") if in_tls else ""
        prepare(guest.talk(), tuning_of(row, tls_creds=creds), incoming=True)
        where = _listen(node, row, guest, instance, creds)
        where |= {"target_uuid": attempt.uuid, "info": row.info | {"tls": in_tls, "nbd_port": where.pop("nbd_port")}}
        if not rows.move_on(node, row.job_id, Stage.ACCEPTING, Stage.ACCEPTING, **where):
            raise MigrationFailed("the migration was given up meanwhile")
        undo.pop_all()
    guest.arriving = True
    guests.watch(guest)
    close_network(attempt)
    answer = {"migration_id": row.job_id, "node": node.name, "uuid": attempt.uuid, "tls": in_tls}
    return answer | {"host": where["host"], "port": where["port"]}


def _listen(node: NodeContext, row: LiveMigration, guest: Guest, instance: Instance, creds: str) -> dict[str, Any]:
    host, ports = node.migration_host, _ports(node, instance)
    return {
        "host": host,
        "port": Incoming(guest.talk()).listen(host, ports),
        "nbd_port": storage.export(row, guest, host, range(*node.settings.migration_ports), creds),
    }


def discard(node: NodeContext, guests: Guests, job: JobContext, row: LiveMigration) -> dict[str, Any]:
    """End the QEMU that waits, and give back what it had of this host; nothing happens where there is none.

    Never touches a QEMU whose guest this node owns. Raises TimedOut when it does not die; it keeps what it has then.
    """
    name = row.instance_name
    if rows.owner_of(node, name) == node.name:
        raise MigrationFailed(f"node {node.name} owns {name}; its QEMU is not ended", phase=row.stage)
    if row.stage in (Stage.FINALIZED, Stage.DONE) and not row.report.get("failure"):
        raise MigrationFailed(f"migration {row.job_id} is {row.stage}; there is nothing to discard", phase=row.stage)
    job.phase("discard", 50, "ending the QEMU that waited for the guest")
    # Of one that is done, another one may have come since.
    removed = end_incoming(node, guests, name, row.target_uuid) if row.target_uuid or row.stage != Stage.DONE else []
    storage.discard_images(node, row)
    return {"removed": removed}


def _require_wanted(node: NodeContext, row: LiveMigration) -> None:
    if row.target != node.name:
        raise InvalidArgument([{"field": "info", "reason": f"this migration goes to node {row.target}"}])
    if row.stage != Stage.ACCEPTING:
        raise MigrationFailed(f"migration {row.job_id} is {row.stage}; there is nothing to accept", phase=row.stage)


def _require_room(node: NodeContext, migration_id: str) -> None:
    """Raises TargetBusy where as many guests are on their way here as may be."""
    under_way = select(LiveMigration.instance_name).where(
        LiveMigration.target == node.name,
        LiveMigration.stage.in_((*rows.BEFORE_THE_SWITCH, Stage.SWITCHING)),
        LiveMigration.target_uuid.is_not(None),
        LiveMigration.job_id != migration_id,
    )
    with node.database.reading() as session:
        names = session.scalars(under_way).all()
    if len(names) >= node.settings.limit_incoming:
        raise TargetBusy(f"node {node.name} receives {', '.join(names)} already (HOSTLER_LIMIT_INCOMING)")


def _require_fit(node: NodeContext, row: LiveMigration, instance: Instance) -> None:
    """Raises InvalidArgument or Unsupported: as for a start here, and what memory that moves needs beside."""
    try:
        checks.require_valid(node, instance)
    except InvalidArgument as exc:
        raise InvalidArgument(
            [{**each, "reason": f"{each['reason']} (node {node.name})"} for each in exc.details["errors"]]
        ) from exc
    if row.info["accelerator"] == "kvm" and not node.kvm().works:
        raise Unsupported(f"the guest runs under KVM, which does not work on node {node.name}: {node.kvm().reason}")
    free_mib = psutil.virtual_memory().available // 2**20
    if instance.memory_mib > free_mib:
        raise InvalidArgument([{
            "field": "target", "reason": f"node {node.name} has {free_mib} MiB free, the guest {instance.memory_mib}"
        }])  # fmt: skip
    for index, disk in enumerate(row.info["disks"]):
        if disk and (problem := same_disk.difference(disk, instance.disks[index].path)):
            raise InvalidArgument([{"field": f"disks[{index}].path", "reason": f"{problem} on node {node.name}"}])


def _claim(attempt: Attempt, undo: ExitStack) -> None:
    undo.callback(_unclaim, attempt)
    claim = partial(_claim_in, attempt=attempt)
    attempt.job.phase("claim", 15, "claiming the guest's disks here", claim)


def _claim_in(session: Session, attempt: Attempt) -> None:
    node, instance = attempt.node, attempt.instance
    here = session.get(Node, node.name, with_for_update={"key_share": True}, populate_existing=True)
    runtime = runtime_of(session, node.name, instance.name)
    if runtime and runtime.uuid == attempt.uuid:
        return  # repeated after a commit whose answer was lost
    require_admission(here, f"{instance.name} cannot come here")
    held = session.scalars(select(DiskLease).where(DiskLease.node == node.name)).all()
    if taken := [*checks.conflicts(instance, [*held])]:
        raise InvalidArgument([{"field": f"instance.{place}", "reason": reason} for place, reason in taken])
    session.add(new_runtime(attempt))
    session.flush()
    session.add_all(checks.leases(node.name, instance))


@patient
def _unclaim(attempt: Attempt) -> None:
    if attempt.process and attempt.process.identity.is_alive():
        return  # it would not die and still holds its disks
    with attempt.node.database.transaction() as session:
        row = runtime_of(session, attempt.node.name, attempt.instance.name)
        if row and row.uuid == attempt.uuid:
            session.delete(row)


def _ports(node: NodeContext, instance: Instance) -> range:
    port = instance.hvparams.migration_port
    first, last = (port, port) if port else node.settings.migration_ports
    return range(first, last + 1)
