"""What SQL knows of a migration: its stage, recorded before what belongs to it, and who owns the guest."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from sqlalchemy import Update, delete, func, select, update
from sqlalchemy.orm import Session

from hostler.contract import ErrorCode, InstanceState
from hostler.errors import OperationFailed
from models import Instance, LiveMigration, MigrationSample, Node, utc_now
from worker.errors import MigrationFailed, OperationError
from worker.operations.context import NodeContext
from worker.operations.ending import Ending
from worker.operations.patience import patient
from worker.operations.wanted_rows import note_end

SAMPLES_MAX = 2000
"""At four a second eight minutes; of a longer migration, every other one is forgotten then."""


class Stage(StrEnum):
    """How far a migration is. Up to ``switching`` the source owns the guest, from ``moved`` on the target."""

    ACCEPTING = "accepting"
    """The target makes a QEMU that waits."""
    TRANSFERRING = "transferring"
    """Memory is on its way; the guest runs on the source."""
    SWITCHING = "switching"
    """The guest stands still; the source's QEMU sends the rest. It is decided: no cancel from here on."""
    MOVED = "moved"
    """The source's QEMU has sent all: the target owns the guest. It has not run there, and may still go back."""
    CONTINUING = "continuing"
    """The target continues the guest: it may have run there, and never goes back."""
    FINALIZED = "finalized"
    """The guest runs on the target. What is left on the source is to be removed."""
    ABORTED = "aborted"
    """The guest is on the source. What was made on the target is to be removed."""
    DONE = "done"
    """Nothing is left to do."""


BEFORE_THE_SWITCH = frozenset({Stage.ACCEPTING, Stage.TRANSFERRING})
SOURCE_OWNS = BEFORE_THE_SWITCH | {Stage.SWITCHING}
ON_THE_TARGET = frozenset({Stage.MOVED, Stage.CONTINUING})
"""It has been sent, and is not yet known to run there."""


def find(node: NodeContext, migration_id: str) -> LiveMigration | None:
    """The migration of this id."""
    with node.database.reading() as session:
        return session.get(LiveMigration, migration_id)


def get(node: NodeContext, migration_id: str) -> LiveMigration:
    """As ``find``. Raises MigrationFailed where there is none in this node's database."""
    if row := find(node, migration_id):
        return row
    raise MigrationFailed(f"node {node.name} knows no migration {migration_id}; do both nodes share one database?")


@patient
def note(node: NodeContext, migration_id: str, **values: Any) -> None:
    """Write down something about a migration, whatever its stage."""
    with node.database.transaction() as session:
        row = session.get_one(LiveMigration, migration_id, with_for_update=True)
        for name, value in values.items():
            setattr(row, name, value)


@patient
def move_on(node: NodeContext, migration_id: str, before: frozenset[Stage] | Stage, to: Stage, **values: Any) -> bool:
    """Enter a stage, from ``before`` alone; whether it is in it now. Safe to repeat."""
    with node.database.transaction() as session:
        return enter(session, migration_id, before, to, **values)


def enter(session: Session, migration_id: str, before: frozenset[Stage] | Stage, to: Stage, **values: Any) -> bool:
    """As ``move_on``, in a transaction of the caller's."""
    allowed = {before} if isinstance(before, Stage) else before
    if to in (Stage.DONE, Stage.ABORTED):
        values["ended_at"] = utc_now()
    this = LiveMigration.job_id == migration_id
    entering = update(LiveMigration).where(this, LiveMigration.stage.in_(allowed)).values(stage=to, **values)
    if session.execute(entering.execution_options(synchronize_session=False)).rowcount:  # type: ignore[attr-defined]
        return True
    now = session.scalars(select(LiveMigration.stage).where(this).with_for_update()).one()
    return now == to


@patient
def give_to_target(node: NodeContext, migration_id: str, report: dict[str, Any]) -> None:
    """The guest is the target's. To be called when the source's QEMU can never continue by itself any more.

    Raises MigrationFailed where the target was fenced: it has not run the guest and never will.
    """
    with node.database.transaction() as session:
        give(session, migration_id, report)


def give(session: Session, migration_id: str, report: dict[str, Any]) -> None:
    """As ``give_to_target``, in a transaction of the caller's."""
    _change_owner(session, migration_id, frozenset({Stage.TRANSFERRING, Stage.SWITCHING}), Stage.MOVED, report)


def _require_not_fenced(session: Session, target: str) -> None:
    """Who fences it from now on waits for this transaction, and sees to what it made the target's."""
    if session.get_one(Node, target, with_for_update={"read": True}, populate_existing=True).fenced_at:
        raise MigrationFailed(f"node {target} was fenced before it had all of the guest", phase="transfer")


@patient
def give_back(node: NodeContext, migration_id: str, why: OperationError) -> None:
    """The guest is the source's again. To be called when the target's QEMU is gone and never ran the guest."""
    with node.database.transaction() as session:
        _change_owner(session, migration_id, ON_THE_TARGET, Stage.ABORTED, {"failure": as_failure(why, "finalize")})


def _change_owner(
    session: Session, migration_id: str, before: frozenset[Stage], after: Stage, report: dict[str, Any]
) -> None:
    row = session.get_one(LiveMigration, migration_id, with_for_update=True)
    if row.stage not in before:
        return
    to_target = after == Stage.MOVED
    if to_target:
        _require_not_fenced(session, row.target)
        row.switched_at = utc_now()
    row.stage = after
    row.report = (row.report or {}) | report
    owner, other = (row.target, row.source) if to_target else (row.source, row.target)
    moved = {"node": owner, "state": InstanceState.MIGRATING, "reason": None, "ended_at": None, "restart_at": None}
    session.execute(_of(row.instance_name, other).values(moved))


def _of(name: str, owner: str) -> Update:
    """To change an instance of a node, in one statement, not through the object: it must not touch the runtimes."""
    mine = update(Instance).where(Instance.name == name, Instance.node == owner)
    return mine.execution_options(synchronize_session=False)


def as_failure(exc: Exception, phase: str) -> dict[str, Any]:
    """Why a migration came to nothing, as its report keeps it; ``phase`` is where no other one is known."""
    if isinstance(exc, OperationError | OperationFailed):
        return {"code": str(exc.code), "message": exc.message, "details": {"phase": phase} | exc.details}
    return {"code": str(ErrorCode.INTERNAL), "message": f"{type(exc).__name__}: {exc}", "details": {"phase": phase}}


def note_gone(node: NodeContext, name: str) -> None:
    """An instance of this node whose QEMU ended while another node owned it: nobody could record that as its end."""
    with node.database.transaction() as session:
        row = session.get(Instance, name, with_for_update=True, populate_existing=True)
        if row and row.node == node.name and row.state == InstanceState.MIGRATING and row.runtime is None:
            ending = Ending(InstanceState.CRASHED, "its QEMU ended during a live migration", "killed")
            row.reason = note_end(row, ending)
            row.state, row.ended_at = ending.state, utc_now()


def owner_of(node: NodeContext, name: str) -> str | None:
    """The node that owns an instance."""
    with node.database.reading() as session:
        return session.scalar(select(Instance.node).where(Instance.name == name))


def state_of(node: NodeContext, name: str) -> str:
    """The state of an instance, whichever node owns it."""
    with node.database.reading() as session:
        return session.scalar(select(Instance.state).where(Instance.name == name)) or InstanceState.UNKNOWN


def state_and_samples(node: NodeContext, row: LiveMigration) -> tuple[str, int]:
    """As ``state_of`` and ``count_samples``, at once."""
    kept = select(func.count()).where(MigrationSample.job_id == row.job_id).scalar_subquery()
    with node.database.reading() as session:
        found = session.execute(select(Instance.state, kept).where(Instance.name == row.instance_name)).first()
    return (found[0], found[1]) if found else (InstanceState.UNKNOWN, 0)


def count_samples(node: NodeContext, migration_id: str) -> int:
    """How many looks were kept."""
    query = select(func.count()).select_from(MigrationSample).where(MigrationSample.job_id == migration_id)
    with node.database.reading() as session:
        return session.scalar(query) or 0


def set_state(node: NodeContext, name: str, state: InstanceState) -> None:
    """The state of an instance that this node owns."""
    with node.database.transaction() as session:
        set_state_in(session, node.name, name, state)


def set_state_in(session: Session, owner: str, name: str, state: InstanceState) -> None:
    """As ``set_state`` of node ``owner``, in a transaction of the caller's."""
    session.execute(_of(name, owner).values(state=state))


def thin_out_samples(node: NodeContext, migration_id: str) -> None:
    """Forget every other look, so that a migration of hours is no burden."""
    with node.database.transaction() as session:
        ids = session.scalars(select(MigrationSample.id).where(MigrationSample.job_id == migration_id)).all()
        session.execute(delete(MigrationSample).where(MigrationSample.id.in_(ids[1::2])))


def samples(node: NodeContext, migration_id: str) -> list[dict[str, Any]]:
    """All looks at a migration, in order."""
    query = select(MigrationSample).where(MigrationSample.job_id == migration_id).order_by(MigrationSample.id)
    with node.database.reading() as session:
        return [{"at": row.at.isoformat(), **row.data} for row in session.scalars(query)]
