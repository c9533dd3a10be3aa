"""Jobs about the node itself."""

from __future__ import annotations

from typing import Any

from celery import current_app

from hostler.contract import TaskName
from hostler.job_arguments import NoArguments
from hostler.payloads import PowercycleArguments, RepairArguments
from tasks import outcome
from tasks.boundary import operation
from worker.doctor import node as node_doctor
from worker.operations import node_facts, powercycle, presence
from worker.operations.audit import auditing, repairing
from worker.operations.context import JobContext
from worker.operations.service import Service


@operation(TaskName.NODE_INFO)
def info(service: Service, job: JobContext, arguments: NoArguments) -> Any:
    """Facts about this host."""
    return node_facts.node_info(service.node)


@operation(TaskName.NODE_LIST)
def list_all(service: Service, job: JobContext, arguments: NoArguments) -> Any:
    """All nodes of this node's database: worker, guests by state, open jobs."""
    return presence.list_nodes(service.node, job.id)


@operation(TaskName.NODE_AUDIT)
def audit(service: Service, job: JobContext, arguments: NoArguments) -> Any:
    """Where the database and this host disagree. Changes nothing."""
    return auditing.audit(service.node, service.guests, job)


@operation(TaskName.NODE_REPAIR)
def repair(service: Service, job: JobContext, arguments: RepairArguments) -> Any:
    """Act on findings of an audit that still hold; without ``dry_run=false`` only say what would be done."""
    report, ended = repairing.repair(service.node, service.guests, job, arguments)
    outcome.carry_out(current_app, ended)
    return report


@operation(TaskName.NODE_VERIFY)
def verify(service: Service, job: JobContext, arguments: NoArguments) -> Any:
    """All that is wrong with this node, errors and warnings, each with what to do. Changes nothing."""
    return node_doctor.verify(service.node, job)


@operation(TaskName.NODE_POWERCYCLE)
def reboot_host(service: Service, job: JobContext, arguments: PowercycleArguments) -> Any:
    """Reboot this host at once, its guests' power cut; the job ends first (`HOSTLER_ALLOW_POWERCYCLE`)."""
    powercycle.powercycle(service.node, job, arguments)
