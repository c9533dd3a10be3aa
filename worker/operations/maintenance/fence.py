"""``node.fence``: somebody who knows says that a node's host is off. Its guests are other nodes' to start from then on.

A node whose worker or heartbeat lives is never fenced, nor one of which this host sees a process. Once it is, no worker
starts there until its host was booted, or a person lifts the fence: so no guest of it can run twice.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from sqlalchemy import and_, func, or_, select
from sqlalchemy.orm import Session

from hostler.contract import TaskName
from hostler.errors import InvalidArgument
from hostler.maintenance import FenceArguments
from models import Incarnation, Instance, Job, LiveMigration, Runtime, utc_now
from worker.errors import NodeUnavailable
from worker.kvm.process import ProcessIdentity
from worker.operations import wanted
from worker.operations.context import JobContext, NodeContext
from worker.operations.live_migration import rows
from worker.operations.live_migration.rows import Stage
from worker.operations.maintenance import giving_up
from worker.operations.maintenance.evacuation import Evacuation, GuestVerdict, How, Leaving
from worker.operations.maintenance.giving_up import Tell
from worker.operations.maintenance.marks import mark_fenced, row_of, unmark_fenced
from worker.operations.maintenance.parts import Part, key_of, parts_of, require_short
from worker.operations.maintenance.targets import require_usable
from worker.operations.presence import ABSENT_AFTER
from worker.operations.steps import HandedOver, Step
from worker.operations.views import iso

SETTLE_S = 30.0
"""How long the other side of a migration may take to go on with its guest, or to remove what waited for it."""


def fence(
    node: NodeContext, job: JobContext, arguments: FenceArguments, answers: Callable[[str], bool], tell: Tell
) -> dict[str, Any]:
    """Give up a dead node: release in SQL what it had, and start its guests elsewhere where that was asked for.

    ``answers`` says whether a node's worker answers. Raises InvalidArgument or InstanceBusy, without effect;
    NodeUnavailable with the ``guests`` where some that were to be started were not. HandedOver while others act.
    """
    dead = arguments.node
    if row_of(node.database, dead).fenced_by != job.id:
        _require_sensible(node, job, arguments, answers)
    since = mark_fenced(node.database, dead, job.id, lambda session: _require_off(session, dead))
    job.carry_on()
    if job.attempt == 1:
        job.phase("fence", 5, f"node {dead} is fenced; releasing what it had")
    settled = _settle_migrations(node, job, dead)
    giving_up.crash_guests(node, dead, since, job.id)
    giving_up.end_jobs(node, dead, tell)
    _wait_for_others(node, job, settled)
    verdicts = _go_on(node, job, arguments, since)
    return _result(node, job, arguments, since, verdicts)


def unfence(node: NodeContext, name: str) -> dict[str, Any]:
    """A node may have a worker again. Raises InvalidArgument, InstanceBusy while it is being fenced."""
    row_of(node.database, name)
    return {"node": name, "fenced_at": iso(unmark_fenced(node.database, name))}


def _require_sensible(
    node: NodeContext, job: JobContext, arguments: FenceArguments, answers: Callable[[str], bool]
) -> None:
    require_short(job.id)
    if arguments.node == node.name:
        raise _refused(f"{node.name} is the node that was asked, and it lives; ask another one")
    require_usable(node.database, "restart_on", arguments.restart_on, arguments.node)
    if answers(arguments.node):
        raise _refused(f"the worker of node {arguments.node} lives: it answers")


def _require_off(session: Session, dead: str) -> None:
    """Raises InvalidArgument for what SQL and this host show of a node that is said to be off."""
    for worker in session.scalars(select(Incarnation).where(Incarnation.node == dead, Incarnation.ended_at.is_(None))):
        if worker.heartbeat_at >= utc_now() - ABSENT_AFTER:
            seconds = (utc_now() - worker.heartbeat_at).total_seconds()
            raise _refused(f"the worker of node {dead} gave a sign of life {seconds:.0f} s ago")
        if ProcessIdentity(worker.pid, worker.start_ticks, worker.boot_id).is_alive():
            raise _refused(f"the worker of node {dead} lives on this very host (pid {worker.pid})")
    for row in session.scalars(select(Runtime).where(Runtime.node == dead, Runtime.pid.is_not(None))):
        assert row.pid and row.start_ticks is not None
        if ProcessIdentity(row.pid, row.start_ticks, row.boot_id).is_alive():
            raise _refused(f"{row.instance_name} of node {dead} runs on this very host (pid {row.pid})")


def _refused(reason: str) -> InvalidArgument:
    return InvalidArgument([{"field": "node", "reason": f"{reason}; nothing was done"}])


def _settle_migrations(node: NodeContext, job: JobContext, dead: str) -> list[Step]:
    steps = []
    for row, success in giving_up.settle_migrations(node, dead):
        name = f"{'finalize' if success else 'discard'}.{key_of(row.instance_name)}"
        arguments = {"migration_id": row.job_id, "success": success}
        steps.append(Step(job.id, name, TaskName.MIGRATION_FINALIZE, row.target, arguments))
    return steps


def _wait_for_others(node: NodeContext, job: JobContext, steps: list[Step]) -> None:
    """Raises HandedOver until the other sides have done their part, or had time enough: they do it later then."""
    ended = {part.id: part for part in parts_of(node.database, job.id) if part.ended}
    waiting = [step for step in steps if step.id not in ended]
    waited_s = max((node.ledger.waited_s(step.id) or 0.0 for step in waiting), default=0.0)
    if waiting and waited_s < SETTLE_S:
        job.phase("migrations", 10, f"{', '.join(step.node for step in waiting)}: going on with guests on their way")
        raise HandedOver(node.ledger.hand_over(job.id, waiting, SETTLE_S - waited_s))
    for step in steps:
        if step.id in ended and ended[step.id].succeeded:
            rows.move_on(node, str(step.arguments["migration_id"]), _ENDED_BY_A_STEP, Stage.DONE)


_ENDED_BY_A_STEP = frozenset({Stage.ABORTED, Stage.FINALIZED})


def _go_on(node: NodeContext, job: JobContext, arguments: FenceArguments, since: datetime) -> list[GuestVerdict]:
    """The guests that ended with the node, and what became of them. Raises HandedOver while some start."""
    begun = {part.instance: part for part in parts_of(node.database, job.id) if part.kind == "start"}
    with node.database.reading() as session:
        crashed = and_(Instance.node == arguments.node, Instance.ended_at == since)
        found = session.scalars(select(Instance).where(or_(crashed, Instance.name.in_([*begun])))).all()
    restarted = [row for row in found if row.name in begun or row.wanted == wanted.RUNNING]
    started: list[GuestVerdict] = []
    if arguments.restart_on:
        limit = node.settings.limit_starts
        how = How(parallel=limit * len(arguments.restart_on), per_link=limit)
        guests = [_as_leaving(row, arguments.node) for row in restarted]
        started = Evacuation(node, job, arguments.node, guests, arguments.restart_on, how).go_on()
    names = {each["name"] for each in started}
    return [_said(each) for each in started] + [_crashed(row) for row in found if row.name not in names]


def _as_leaving(row: Instance, dead: str) -> Leaving:
    memory_mib = row.spec["memory_mib"]
    due = row.node == dead
    return Leaving(row.name, row.node, row.state, row.reason or "", memory_mib, row.spec, runs=False, due=due)


def _said(verdict: GuestVerdict) -> GuestVerdict:
    words = {"moved": "started", "left": "failed"}
    return {**verdict, "verdict": words.get(verdict["verdict"], verdict["verdict"])}


def _crashed(row: Instance) -> GuestVerdict:
    reason = row.reason or ""
    if row.wanted != wanted.RUNNING:
        reason += "; it was not wanted running"
    return GuestVerdict(name=row.name, verdict="crashed", node=row.node, reason=reason, job=None)


def _result(
    node: NodeContext, job: JobContext, arguments: FenceArguments, since: datetime, verdicts: list[GuestVerdict]
) -> dict[str, Any]:
    finalized = [part for part in parts_of(node.database, job.id) if part.id.startswith(f"{job.id}.finalize.")]
    guests = sorted([*verdicts, *(_moved(node, part) for part in finalized)], key=lambda each: each["name"])
    ended = select(func.count()).where(Job.node == arguments.node, Job.finished_at >= since)
    with node.database.reading() as session:
        jobs = session.scalar(ended) or 0
    result = {"node": arguments.node, "fenced_at": iso(since), "guests": guests, "jobs": jobs}
    if failed := [each for each in guests if each["verdict"] == "failed"]:
        raise NodeUnavailable(
            f"node {arguments.node} is fenced, and {len(failed)} of its guests do not run elsewhere: "
            + "; ".join(f"{each['name']}: {each['reason']}" for each in failed)
            + ". When that is mended, start them, or `hostler fence` again",
            retryable=True,
            **result,
        )
    return result


def _moved(node: NodeContext, part: Part) -> GuestVerdict:
    with node.database.reading() as session:
        name = session.get_one(LiveMigration, str(part.step.arguments["migration_id"])).instance_name
    verdict = "moved" if part.succeeded and not (part.result or {}).get("returned") else "failed"
    return GuestVerdict(name=name, verdict=verdict, node=part.place, reason=part.reason, job=part.id)
