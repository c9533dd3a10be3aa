"""Moving an instance that does not run: from now on it belongs to the other node, and is started there."""

from __future__ import annotations

from typing import Any

from sqlalchemy import update

from hostler.contract import InstanceState
from hostler.errors import InvalidArgument
from hostler.migration import MigrateArguments
from models import Instance as InstanceRow
from worker.errors import NotRunning, Unsupported
from worker.operations.context import JobContext, NodeContext

MOVABLE = (InstanceState.STOPPED, InstanceState.CRASHED)


def move_stopped(node: NodeContext, job: JobContext, arguments: MigrateArguments) -> dict[str, Any]:
    """One row changes its owner; the disks have to be shared. Returns the report.

    Raises Unsupported where disks would have to be copied, InvalidArgument for a dry run: there is nothing to sample.
    """
    if arguments.copy_storage != "none":
        raise Unsupported("the disks of an instance that does not run are not copied; start it first")
    if arguments.dry_run:
        raise InvalidArgument([{"field": "dry_run", "reason": f"{arguments.name} does not run: nothing would be sent"}])
    with node.database.reading() as session:
        state = session.get_one(InstanceRow, arguments.name).state
    if state not in MOVABLE:
        raise NotRunning(f"{arguments.name} is {state}; it is moved while it runs, is paused or stopped", state=state)
    job.phase("move", 50, f"giving {arguments.name} to node {arguments.target}")
    job.commit()
    with node.database.transaction() as session:
        session.execute(
            update(InstanceRow)
            .where(InstanceRow.name == arguments.name, InstanceRow.node == node.name, InstanceRow.state.in_(MOVABLE))
            .values(node=arguments.target, restart_at=None)
            .execution_options(synchronize_session=False)
        )
    return _report(node, arguments, state)


def was_moved(node: NodeContext, arguments: MigrateArguments) -> dict[str, Any] | None:
    """The report of a move that was recorded just before its worker died; None where it was not."""
    with node.database.reading() as session:
        row = session.get(InstanceRow, arguments.name)
        return _report(node, arguments, row.state) if row and row.node == arguments.target else None


def _report(node: NodeContext, arguments: MigrateArguments, state: str) -> dict[str, Any]:
    return {
        "name": arguments.name,
        "source": node.name,
        "target": arguments.target,
        "node": arguments.target,
        "kind": "cold",
        "state": state,
        "decisions": [],
        "samples": 0,
    }
