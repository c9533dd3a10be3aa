"""What SQL knows of snapshots: the layers of each disk, and which of them its guest writes to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from hostler.errors import InvalidArgument
from hostler.payloads import Instance
from models import DiskLease, Node, Runtime, Snapshot, runtime_of
from models import Instance as InstanceRow
from worker.operations import checks
from worker.operations.context import NodeContext
from worker.operations.patience import patient
from worker.operations.views import iso

CREATING, READY, DELETING, PIVOTING = "creating", "ready", "deleting", "pivoting"


@dataclass(frozen=True)
class Layer:
    """One disk of a snapshot, as ``models.Snapshot`` describes it."""

    path: str
    base: str
    base_format: str
    root: str


@dataclass(frozen=True)
class File:
    """What a disk of an instance is."""

    path: str
    format: str


def layers_of(row: Snapshot) -> list[Layer]:
    """The snapshot's disks."""
    return [Layer(**layer) for layer in row.layers]


def snapshots_of(node: NodeContext, name: str) -> list[Snapshot]:
    """All snapshots of an instance, the oldest first."""
    with node.database.reading() as session:
        return [*session.scalars(select(Snapshot).where(Snapshot.instance_name == name).order_by(Snapshot.id))]


def saved(node: NodeContext, name: str) -> Instance:
    """The instance as its next start would build it."""
    with node.database.reading() as session:
        return Instance.model_validate(session.get_one(InstanceRow, name).spec)


def snapshot_view(row: Snapshot) -> dict[str, Any]:
    """A snapshot as its jobs show it."""
    disks = [{key: layer[key] for key in ("path", "base", "base_format")} for layer in row.layers]
    return {
        "name": row.instance_name,
        "snapshot": row.name,
        "state": row.state,
        "created_at": iso(row.created_at),
        "disks": disks,
    }


@patient
def insert(node: NodeContext, name: str, snapshot: str, job_id: str, layers: list[Layer]) -> None:
    """Write down what is about to be made. Doing it again for the same job changes nothing."""
    with node.database.transaction() as session:
        session.get(InstanceRow, name, with_for_update=True)
        if _find(session, name, snapshot) is None:
            documents = [asdict(layer) for layer in layers]
            session.add(
                Snapshot(instance_name=name, name=snapshot, state=CREATING, job_id=job_id, layers=documents)
            )  # fmt: skip


@patient
def set_state(node: NodeContext, row: Snapshot, state: str) -> None:
    """Record how far a snapshot has come."""
    with node.database.transaction() as session:
        session.get_one(Snapshot, row.id, with_for_update=True).state = state


@patient
def forget(node: NodeContext, row: Snapshot) -> None:
    """Delete a snapshot's row; its files are gone by then."""
    with node.database.transaction() as session:
        session.execute(delete(Snapshot).where(Snapshot.id == row.id))


@patient
def rest_on(node: NodeContext, row: Snapshot, changed: Layer) -> None:
    """Record that a disk of a snapshot lies on another file now."""
    with node.database.transaction() as session:
        found = session.get_one(Snapshot, row.id, with_for_update=True)
        found.layers = [asdict(changed) if layer["path"] == changed.path else layer for layer in found.layers]


@patient
def exchange(node: NodeContext, name: str, files: dict[str, File], state: dict[int, str] | None = None) -> None:
    """Record that disks are other files now (by the path before): in the spec, in the runtime, and as leases.

    ``state`` sets states of snapshots (by id) in the same transaction. What is exchanged already stays.
    """
    with node.database.transaction() as session:
        session.get(Node, node.name, with_for_update=True)
        row = session.get_one(InstanceRow, name, with_for_update=True, populate_existing=True)
        row.spec = _exchanged(row.spec, files)
        if row.runtime:
            row.runtime.hardware = _exchanged(row.runtime.hardware, files)
            _lease_anew(session, node, row.runtime, writable=frozenset())
        for snapshot, value in (state or {}).items():
            session.get_one(Snapshot, snapshot).state = value


def lease_for_merge(node: NodeContext, name: str, base: str) -> None:
    """Keep a file below a disk for this instance alone, to write to it. Raises InvalidArgument when others have it."""
    with node.database.transaction() as session:
        session.get(Node, node.name, with_for_update=True)
        others = select(DiskLease).where(
            DiskLease.node == node.name, DiskLease.instance_name != name, DiskLease.file_id == checks.file_id(base)
        )
        if other := session.scalars(others).first():
            reason = f"{base} cannot be merged into: instance {other.instance_name} has it open"
            raise InvalidArgument([{"field": "snapshot", "reason": reason}])
        if runtime := runtime_of(session, node.name, name):
            _lease_anew(session, node, runtime, writable=frozenset({checks.file_id(base)}))


def _lease_anew(session: Session, node: NodeContext, runtime: Runtime, *, writable: frozenset[str]) -> None:
    name = runtime.instance_name
    mine = session.scalars(select(DiskLease).where(DiskLease.node == node.name, DiskLease.instance_name == name)).all()
    wanted = {each.file_id: each for each in checks.leases(node.name, Instance.model_validate(runtime.hardware))}
    for lease in mine:
        if (new := wanted.pop(lease.file_id, None)) is None:
            session.delete(lease)
        else:
            lease.path, lease.shared, lease.read_only = new.path, new.shared, new.read_only
            lease.read_only = lease.read_only and lease.file_id not in writable
    session.add_all(wanted.values())


def _exchanged(document: dict[str, Any], files: dict[str, File]) -> dict[str, Any]:
    disks = [
        disk | {"path": files[disk["path"]].path, "format": files[disk["path"]].format}
        if disk["path"] in files
        else disk
        for disk in document["disks"]
    ]
    return document | {"disks": disks}


def _find(session: Session, name: str, snapshot: str) -> Snapshot | None:
    return session.scalar(select(Snapshot).where(Snapshot.instance_name == name, Snapshot.name == snapshot))
