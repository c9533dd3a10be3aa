"""Jobs about instances."""

from __future__ import annotations

from typing import Any

from hostler.contract import TaskName
from hostler.job_arguments import NameArguments, NoArguments
from hostler.payloads import (
    ConsoleArguments,
    InstanceArguments,
    RebootArguments,
    RestartArguments,
    StartArguments,
    StopArguments,
)
from tasks.boundary import operation
from worker.operations import consoles, lifecycle, queries
from worker.operations.context import JobContext
from worker.operations.restart import restart as restart_instance
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


@operation(TaskName.INSTANCE_RESTART)
def restart(service: Service, job: JobContext, arguments: RestartArguments) -> Any:
    """Start a guest again that does not run, as it was, if that is still wanted."""
    return restart_instance(service.node, service.guests, job, arguments)


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
def console(service: Service, job: JobContext, arguments: ConsoleArguments) -> Any:
    """How to reach a guest: serial port, VNC or SPICE."""
    return consoles.console(service.node, service.guests, arguments)


@operation(TaskName.INSTANCE_CHECK)
def check(service: Service, job: JobContext, arguments: InstanceArguments) -> Any:
    """Whether this host could start an instance."""
    return queries.check(service.node, arguments.instance)
