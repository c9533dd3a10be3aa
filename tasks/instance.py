"""Jobs about instances."""

from __future__ import annotations

from typing import Any

from hostler.contract import TaskName
from hostler.payloads import (
    InstanceArguments,
    NameArguments,
    NoArguments,
    RebootArguments,
    StartArguments,
    StopArguments,
)
from tasks.boundary import operation
from worker.operations import lifecycle, queries
from worker.operations.context import JobContext
from worker.operations.service import Service
from worker.operations.start import start as start_instance


@operation(TaskName.INSTANCE_START)
def start(service: Service, job: JobContext, arguments: StartArguments) -> Any:
    """Start a guest."""
    return start_instance(service.node, service.guests, job, arguments.instance, paused=arguments.paused)


@operation(TaskName.INSTANCE_STOP)
def stop(service: Service, job: JobContext, arguments: StopArguments) -> Any:
    """Stop a guest, by ACPI or by force."""
    return lifecycle.stop(service.node, service.guests, job, arguments)


@operation(TaskName.INSTANCE_REBOOT)
def reboot(service: Service, job: JobContext, arguments: RebootArguments) -> Any:
    """Reboot a guest, softly, hard, or by its reset line."""
    return lifecycle.reboot(service.node, service.guests, job, arguments)


@operation(TaskName.INSTANCE_PAUSE)
def pause(service: Service, job: JobContext, arguments: NameArguments) -> Any:
    """Stop a guest's processors."""
    return lifecycle.pause(service.node, service.guests, job, arguments.name)


@operation(TaskName.INSTANCE_RESUME)
def resume(service: Service, job: JobContext, arguments: NameArguments) -> Any:
    """Let a paused guest run on."""
    return lifecycle.resume(service.node, service.guests, job, arguments.name)


@operation(TaskName.INSTANCE_CLEANUP)
def cleanup(service: Service, job: JobContext, arguments: NameArguments) -> Any:
    """Give back what is left of a guest that does not run."""
    return lifecycle.cleanup(service.node, service.guests, job, arguments.name)


@operation(TaskName.INSTANCE_INFO)
def info(service: Service, job: JobContext, arguments: NameArguments) -> Any:
    """One instance."""
    return queries.info(service.node, service.guests, arguments.name)


@operation(TaskName.INSTANCE_LIST)
def list_all(service: Service, job: JobContext, arguments: NoArguments) -> Any:
    """All instances of this node."""
    return queries.list_instances(service.node)


@operation(TaskName.INSTANCE_CONSOLE)
def console(service: Service, job: JobContext, arguments: NameArguments) -> Any:
    """How to reach a guest's console."""
    return queries.console(service.node, service.guests, arguments.name)


@operation(TaskName.INSTANCE_CHECK)
def check(service: Service, job: JobContext, arguments: InstanceArguments) -> Any:
    """Whether this host could start an instance."""
    return queries.check(service.node, arguments.instance)
