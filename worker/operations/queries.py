"""What can be asked without changing anything."""

from __future__ import annotations

import os
import platform
import socket
from typing import Any

import psutil
from sqlalchemy import func, select

from hostler.contract import InstanceState
from hostler.payloads import EXCLUSIVE_TASKS, Instance, InstanceView, JobListArguments
from models import Instance as InstanceRow
from models import Job
from worker.errors import NotRunning, OperationError, UnknownJob
from worker.operations import checks
from worker.operations.context import NodeContext
from worker.operations.guests import RUN_STATES, Guests
from worker.operations.lifecycle import view_of
from worker.operations.views import instance_view, job_view

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


def console(node: NodeContext, guests: Guests, name: str) -> dict[str, Any]:
    """How to reach the guest's console. Raises UnknownInstance, NotRunning."""
    view_of(node, name)
    guest = guests.get(name)
    if guest is None:
        raise NotRunning(f"{name} is not running, so it has no console")
    if not guest.folder.serial.exists():
        return {"kind": "message", "instance": name, "message": f"No serial shell for instance {name}"}
    path = str(guest.folder.serial)
    command = ["socat", "STDIO,raw,echo=0,escape=0x1d", f"UNIX-CONNECT:{path}"]
    return {"kind": "serial", "instance": name, "host": socket.gethostname(), "command": command, "path": path}


def check(node: NodeContext, instance: Instance) -> dict[str, Any]:
    """Everything that would keep this host from starting the instance, and what is worth a second look."""
    errors, warnings = checks.check(node, instance)
    as_fields = [[{"field": field, "reason": reason} for field, reason in found] for found in (errors, warnings)]
    return {"errors": as_fields[0], "warnings": as_fields[1]}


def node_info(node: NodeContext) -> dict[str, Any]:
    """Facts about this host, in the words of /proc."""
    memory = psutil.virtual_memory()
    with node.database.reading() as session:
        by_state = select(InstanceRow.state, func.count().label("number")).where(InstanceRow.node == node.name)
        counted = {row.state: row.number for row in session.execute(by_state.group_by(InstanceRow.state))}
    features = node.features()
    return {
        "node": node.name,
        "host": socket.gethostname(),
        "kernel": platform.release(),
        "memory_total_mib": memory.total // 2**20,
        "memory_free_mib": memory.available // 2**20,
        "cpu_total": os.cpu_count(),
        "qemu_version": features.version_text,
        "qemu_binary": str(node.qemu_binary),
        "kvm_works": node.kvm().works,
        "kvm_reason": node.kvm().reason,
        "instances": counted,
    }


def list_jobs(node: NodeContext, arguments: JobListArguments) -> list[dict[str, Any]]:
    """This node's latest jobs, newest first."""
    query = select(Job).where(Job.node == node.name).order_by(Job.sequence.desc()).limit(arguments.limit)
    if not arguments.queries:
        query = query.where(Job.task.in_([*EXCLUSIVE_TASKS]))
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
