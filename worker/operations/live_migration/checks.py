"""Whether a migration can be done at all, as the source sees it, and what the target has to know of the guest."""

from __future__ import annotations

from typing import Any

from sqlalchemy import exists, select

from hostler.errors import InvalidArgument
from hostler.migration import MigrateArguments
from hostler.payloads import Instance
from models import Incarnation, LiveMigration, Node, runtime_of, utc_now
from models import Instance as InstanceRow
from worker.errors import NotRunning, UnknownInstance
from worker.operations.context import JobContext, NodeContext
from worker.operations.guests import Guest
from worker.operations.live_migration import same_disk, security, storage
from worker.operations.live_migration.rows import Stage
from worker.operations.maintenance.marks import why_drained

DEADLINE_S_PER_GIB, DEADLINE_MIN_S = 150.0, 60.0
"""KubeVirt's completion timeout, which its users live with (pkg/virt-config, 150 s per GiB)."""
ID_MAX = 240
"""A step's id is its job's and a name, and 255 is the most a job's id may have."""


def require_possible(node: NodeContext, job: JobContext, arguments: MigrateArguments) -> None:
    """Raises InvalidArgument or Unsupported, for what the arguments alone and SQL tell. Nothing was touched."""
    errors = [*_wrong_target(node, arguments.target)]
    if len(job.id) > ID_MAX:
        errors.append({"field": "id", "reason": f"a live migration's job id may have {ID_MAX} characters"})
    if errors:
        raise InvalidArgument(errors)


def _wrong_target(node: NodeContext, target: str) -> list[dict[str, str]]:
    if target == node.name:
        return [{"field": "target", "reason": f"the instance is on node {target} already"}]
    living = exists().where(Incarnation.node == target, Incarnation.ended_at.is_(None))
    with node.database.reading() as session:
        found = session.execute(select(Node, living).where(Node.name == target)).first()
    known, alive = found or (None, False)
    if known is None:
        return [{
            "field": "target",
            "reason": f"this node's database knows no node {target!r}; nodes that exchange guests share one database",
        }]  # fmt: skip
    if known.drained_at:
        return [{"field": "target", "reason": why_drained(known)}]
    if not alive:
        return [{"field": "target", "reason": f"node {target} has no worker; start one there first"}]
    return []


def describe(node: NodeContext, job: JobContext, arguments: MigrateArguments, guest: Guest) -> LiveMigration:
    """A new migration with all that the target has to know. Nothing is written yet. Raises NotRunning, Unsupported."""
    status = guest.talk().status(job.check_cancelled)
    if status not in ("running", "paused", "prelaunch", "postmigrate"):
        raise NotRunning(f"{guest.name} is {status}; it can be moved while it runs or is paused", state=status)
    with node.database.reading() as session:
        runtime = runtime_of(session, node.name, guest.name)
    assert runtime
    instance = Instance.model_validate(runtime.hardware)
    return LiveMigration(
        job_id=job.id,
        instance_name=guest.name,
        source=node.name,
        target=arguments.target,
        stage=Stage.ACCEPTING,
        source_uuid=runtime.uuid,
        options=arguments.model_dump(mode="json"),
        was_paused=status != "running",
        info=_info(node, runtime.accelerator, instance, arguments) | {"machine_uuid": guest.talk().machine_uuid()},
        started_at=utc_now(),
    )


def _info(node: NodeContext, accelerator: str, instance: Instance, arguments: MigrateArguments) -> dict[str, Any]:
    copied = storage.describe(node, instance, arguments.copy_storage)
    elsewhere = {disk["path"] for disk in copied}
    return {
        "instance": instance.model_dump(mode="json"),
        "accelerator": accelerator,
        "qemu_version": node.features().version_text,
        "disks": [None if disk.path in elsewhere else same_disk.fingerprint(disk.path) for disk in instance.disks],
        "copied": copied,
        "tls": security.wish(node, arguments.tls),
    }


def deadline_s(row: LiveMigration) -> float:
    """How long memory may be on its way: as asked, or by how much there is of it."""
    asked = row.options.get("deadline_s")
    return float(asked or max(DEADLINE_MIN_S, DEADLINE_S_PER_GIB * row.info["instance"]["memory_mib"] / 1024))


def instance_here(node: NodeContext, name: str) -> InstanceRow:
    """The instance's row. Raises UnknownInstance where another node has it."""
    with node.database.reading() as session:
        row = session.get(InstanceRow, name)
    if row is None or row.node != node.name:
        raise UnknownInstance(name, node.name, row.node if row else None)
    return row
