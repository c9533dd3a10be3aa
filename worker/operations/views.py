"""What a node tells of its instances and jobs: rows of the database as the payloads of the contract."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from hostler.hidden import without_secrets
from hostler.payloads import InstanceView, NicView
from models import Instance, Job, Runtime
from worker.errors import UnknownInstance
from worker.operations.context import NodeContext


def view_of(node: NodeContext, name: str) -> InstanceView:
    """The instance as this node knows it. Raises UnknownInstance, also for one that another node has."""
    with node.database.reading() as session:
        row = session.get(Instance, name)
        if row is None or row.node != node.name:
            raise UnknownInstance(name, node.name, row.node if row else None)
        return instance_view(row)


def instance_view(row: Instance) -> InstanceView:
    """An instance as ``instance.info`` shows it; what only a running QEMU has is null without one."""
    runtime = row.runtime
    spec: dict[str, Any] = row.spec
    return {
        "name": row.name,
        "node": row.node,
        "state": row.state,
        "pid": runtime.pid if runtime else None,
        "memory_mib": spec["memory_mib"],
        "vcpus": spec["vcpus"],
        "uid": runtime.uid if runtime else None,
        "nics": [_nic_view(runtime, nic) for nic in spec["nics"]],
        "disks": spec["disks"],
        "tags": spec["tags"],
        "started_at": iso(runtime.started_at) if runtime else None,
        "ended_at": iso(row.ended_at),
        "reason": row.reason,
        "wanted": row.wanted,
        "autostart": spec.get("autostart", False),
        "restart_policy": spec.get("restart_policy", "never"),
        "restarts": row.restarts,
        "restart_at": iso(row.restart_at),
        "qemu_version": runtime.qemu_version if runtime else None,
        "machine": runtime.machine if runtime else None,
        "accelerator": runtime.accelerator if runtime else None,
        "uuid": runtime.uuid if runtime else None,
        "run_dir": runtime.run_dir if runtime else None,
    }


def _nic_view(runtime: Runtime | None, nic: dict[str, Any]) -> NicView:
    taps = runtime.taps if runtime else []
    tap = next((tap["name"] for tap in taps if tap["mac"] == nic["mac"]), "")
    vlan = nic.get("vlan", 0)
    return {"mac": nic["mac"], "mode": nic["mode"], "link": nic["link"], "ip": nic["ip"], "vlan": vlan, "tap": tap}


def job_view(row: Job, *, whole: bool) -> dict[str, Any]:
    """A job as the ledger has it; ``whole`` adds arguments, result and the history of its phases."""
    view: dict[str, Any] = {
        "id": row.id,
        "task": row.task,
        "instance": row.instance_name or _named(row.arguments),
        "node": row.node,
        "state": row.state,
        "phase": row.phase,
        "percent": row.percent,
        "message": row.message,
        "attempts": row.attempts,
        "waiting_for": row.waiting_for,
        "error": row.error,
        "received_at": iso(row.received_at),
        "started_at": iso(row.started_at),
        "updated_at": iso(row.updated_at),
        "finished_at": iso(row.finished_at),
    }
    if whole:
        view |= {"arguments": without_secrets(row.arguments), "result": row.result, "phases": row.phases}
    return view


def _named(arguments: dict[str, Any]) -> str | None:
    name = arguments.get("name")
    return name if isinstance(name, str) else None


def iso(value: datetime | None) -> str | None:
    """A time as ISO 8601 in UTC."""
    return value.isoformat() if value else None
