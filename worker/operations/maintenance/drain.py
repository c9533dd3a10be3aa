"""``node.drain``: every guest of this node is moved to others, and none comes here any more.

The drain holds no thread while guests move: each move is a job of its own, a step of it, and its end wakes the drain,
which then looks at what is true. So a drain that is taken up again, or sent again, goes on with what is left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import and_, or_, select

from hostler.contract import TaskName
from hostler.maintenance import DrainArguments
from models import Instance, Job, LiveMigration, Runtime, utc_now
from worker.errors import Cancelled, MigrationFailed, NodeUnavailable
from worker.operations.context import JobContext, NodeContext
from worker.operations.live_migration.rows import ON_THE_TARGET, SOURCE_OWNS
from worker.operations.maintenance.evacuation import Evacuation, How, Leaving, not_begun
from worker.operations.maintenance.marks import mark_drained, row_of, unmark_drained
from worker.operations.maintenance.parts import parts_of, require_short
from worker.operations.maintenance.targets import all_usable, require_usable
from worker.operations.views import iso
from worker.operations.wanted import IDLE

UNDONE = ("left", "failed")


def drain(
    node: NodeContext, job: JobContext, arguments: DrainArguments, call_off: Callable[[str], object]
) -> dict[str, Any]:
    """Move every guest that runs here, and say what became of each. ``call_off`` cancels a job that has not begun.

    Raises InvalidArgument, NodeUnavailable or InstanceBusy, without effect; MigrationFailed with the ``verdicts`` where
    guests are still here; Cancelled: moves that have begun go on by themselves then, others never begin. In all but the
    first case the node stays drained. HandedOver while guests move.
    """
    try:
        targets = _targets(node, job, arguments)
        since = mark_drained(node.database, node.name, job.id)
        verdicts = _evacuation(node, job, arguments, targets).go_on()
    except Cancelled as exc:
        raise _called_off(node, job, call_off) from exc
    result = {"node": node.name, "drained_at": iso(since), "verdicts": verdicts}
    if undone := [each for each in verdicts if each["verdict"] in UNDONE]:
        raise MigrationFailed(
            f"{len(undone)} of {len(verdicts)} guests did not leave node {node.name}, which stays drained: "
            + "; ".join(f"{each['name']} ({each['verdict']}): {each['reason']}" for each in undone)
            + f". When that is mended, `hostler drain {node.name}` goes on with them",
            retryable=True,
            **result,
        )
    return result


def undrain(node: NodeContext) -> dict[str, Any]:
    """Guests may come here again, and those whose restart waited are started. Raises InstanceBusy during a drain."""
    since = unmark_drained(node.database, node.name)
    node.wake_at(utc_now())
    return {"node": node.name, "drained_at": iso(since)}


def _targets(node: NodeContext, job: JobContext, arguments: DrainArguments) -> list[str]:
    require_short(job.id)
    job.check_cancelled()
    if parts_of(node.database, job.id):
        return arguments.targets  # it has begun; whether they still can take guests is looked at each time
    if not arguments.auto:
        require_usable(node.database, "targets", arguments.targets, node.name)
        return [*dict.fromkeys(arguments.targets)]
    if found := all_usable(node.database, node.name):
        return found
    raise NodeUnavailable(f"no other node of this database can take guests of {node.name}; see: hostler nodes")


def _evacuation(node: NodeContext, job: JobContext, arguments: DrainArguments, targets: list[str]) -> Evacuation:
    limit = node.settings.limit_migrations
    how = How(
        parallel=min(arguments.parallel or limit, limit),
        per_link=node.settings.limit_incoming,  # of the targets, which are taken to be set up alike
        allow_shutdown=arguments.allow_shutdown,
        options=arguments.of_each_migration(),
    )
    return Evacuation(node, job, node.name, _leaving(node, job), targets, how)


def _leaving(node: NodeContext, job: JobContext) -> list[Leaving]:
    """All guests that run here, are about to come here, or wait to be started again here; and those that have left."""
    arriving = (
        select(LiveMigration.instance_name)
        .join(Runtime, and_(Runtime.instance_name == LiveMigration.instance_name, Runtime.node == node.name))
        .where(LiveMigration.target == node.name, LiveMigration.stage.in_(SOURCE_OWNS | ON_THE_TARGET))
    )
    # One that is about to be started again is refused that by now.
    restarts = Job.node == node.name, Job.task == TaskName.INSTANCE_RESTART, Job.finished_at.is_(None)
    due = or_(Instance.restart_at.is_not(None), Instance.name.in_(select(Job.instance_name).where(*restarts)))
    here = and_(Instance.node == node.name, or_(Instance.state.not_in(IDLE), due))
    begun = {part.instance for part in parts_of(node.database, job.id) if part.instance}
    with node.database.reading() as session:
        have_qemu = {*session.scalars(select(Runtime.instance_name).where(Runtime.node == node.name))}
        found = session.execute(
            select(Instance, due).where(or_(here, Instance.name.in_(arriving), Instance.name.in_(begun)))
        ).all()
    return [_as_leaving(row, runs=row.name in have_qemu, due=is_due) for row, is_due in found]


def _as_leaving(row: Instance, *, runs: bool, due: bool) -> Leaving:
    return Leaving(
        name=row.name,
        node=row.node,
        state=row.state,
        reason=row.reason or "",
        memory_mib=row.spec["memory_mib"],
        spec=row.spec,
        runs=runs,
        due=not runs and due,
    )


def _called_off(node: NodeContext, job: JobContext, call_off: Callable[[str], object]) -> Cancelled:
    for part in not_begun(node, job.id):
        call_off(part.id)
    under_way = [str(part.instance) for part in parts_of(node.database, job.id) if part.instance and not part.ended]
    going_on = f"; under way, to their end: {', '.join(under_way)}" if under_way else ""
    marked = row_of(node.database, node.name).drained_by == job.id
    stays = f"The node takes no guest in until: hostler undrain {node.name}" if marked else "It had not begun"
    return Cancelled(
        f"the drain of node {node.name} was cancelled{going_on}. A guest that was moved stays there. {stays}"
    )
