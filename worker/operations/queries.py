"""What can be asked without changing anything."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from hostler.contract import InstanceState
from hostler.payloads import CHANGING_TASKS, Instance, InstanceView, JobListArguments
from models import Instance as InstanceRow
from models import Job
from worker.errors import OperationError, UnknownJob
from worker.operations import checks
from worker.operations.context import NodeContext
from worker.operations.guests import RUN_STATES, Guests
from worker.operations.views import instance_view, job_view, view_of

INFO_TIMEOUT_S = 2.0
"""How long ``instance.info`` waits for a QEMU that is busy, before it calls the state unknown."""


def info(node: NodeContext, guests: Guests, name: str) -> InstanceView:
    """An instance, its state asked of QEMU itself; ``unknown`` when QEMU keeps silent. Raises UnknownInstance."""
    view = view_of(node, name)
    guest = guests.get(name)
    if guest and view["state"] in (InstanceState.RUNNING, InstanceState.PAUSED, InstanceState.UNKNOWN):
        try:
            word = guest.talk().execute("query-status", timeout_s=INFO_TIMEOUT_S)["status"]
            view["state"] = RUN_STATES.get(word, InstanceState.PAUSED)
        except OperationError as exc:
            if guest.process.wait(0) and guest.ended.wait(INFO_TIMEOUT_S):
                return view_of(node, name)
            view["state"], view["reason"] = InstanceState.UNKNOWN, exc.message
    return view


def list_instances(node: NodeContext) -> list[InstanceView]:
    """All instances of this node, by name, as last recorded; one query, whatever their number."""
    with node.database.reading() as session:
        rows = session.scalars(select(InstanceRow).where(InstanceRow.node == node.name).order_by(InstanceRow.name))
        return [instance_view(row) for row in rows]


def check(node: NodeContext, instance: Instance) -> dict[str, Any]:
    """Everything that would keep this host from starting the instance, and what is worth a second look."""
    errors, warnings = checks.check(node, instance)
    as_fields = [[{"field": field, "reason": reason} for field, reason in found] for found in (errors, warnings)]
    return {"errors": as_fields[0], "warnings": as_fields[1]}


def list_jobs(node: NodeContext, arguments: JobListArguments) -> list[dict[str, Any]]:
    """This node's latest jobs, newest first."""
    # By time: to go back along the primary key is tempting, and for a node that was quiet lately it goes back very far.
    newest_first = Job.received_at.desc(), Job.sequence.desc()
    query = select(Job).where(Job.node == node.name).order_by(*newest_first).limit(arguments.limit)
    if not arguments.queries:
        query = query.where(Job.task.in_([*CHANGING_TASKS]))
    if arguments.instance:
        query = query.where(Job.instance_name == arguments.instance)
    if arguments.states:
        query = query.where(Job.state.in_(arguments.states))
    with node.database.reading() as session:
        return [job_view(row, whole=False) for row in session.scalars(query)]


def job_info(node: NodeContext, job_id: str) -> dict[str, Any]:
    """One job with arguments, result and the history of its phases. Raises UnknownJob."""
    with node.database.reading() as session:
        row = session.scalar(select(Job).where(Job.id == job_id, Job.node == node.name))
        if row is None:
            raise UnknownJob(job_id, node.name)
        return job_view(row, whole=True)
