"""Jobs that change a running guest."""

from __future__ import annotations

from typing import Any

from hostler.contract import TaskName
from hostler.payloads import (
    CdEjectArguments,
    CdInsertArguments,
    DiskAddArguments,
    DiskRemoveArguments,
    DiskResizeArguments,
    NicAddArguments,
    NicRemoveArguments,
    SetMemoryArguments,
    SetPasswordArguments,
)
from tasks.boundary import operation
from worker.operations import hotplug_cds, hotplug_disks, hotplug_nics, hotplug_settings
from worker.operations.context import JobContext
from worker.operations.service import Service


@operation(TaskName.INSTANCE_DISK_ADD)
def disk_add(service: Service, job: JobContext, arguments: DiskAddArguments) -> Any:
    """Plug a disk into a running guest."""
    return hotplug_disks.disk_add(service.node, service.guests, job, arguments)


@operation(TaskName.INSTANCE_DISK_REMOVE)
def disk_remove(service: Service, job: JobContext, arguments: DiskRemoveArguments) -> Any:
    """Take a disk out of a running guest."""
    return hotplug_disks.disk_remove(service.node, service.guests, job, arguments)


@operation(TaskName.INSTANCE_DISK_RESIZE)
def disk_resize(service: Service, job: JobContext, arguments: DiskResizeArguments) -> Any:
    """Make a disk of a running guest larger."""
    return hotplug_disks.disk_resize(service.node, service.guests, job, arguments)


@operation(TaskName.INSTANCE_NIC_ADD)
def nic_add(service: Service, job: JobContext, arguments: NicAddArguments) -> Any:
    """Plug a network card into a running guest."""
    return hotplug_nics.nic_add(service.node, service.guests, job, arguments)


@operation(TaskName.INSTANCE_NIC_REMOVE)
def nic_remove(service: Service, job: JobContext, arguments: NicRemoveArguments) -> Any:
    """Take a network card out of a running guest."""
    return hotplug_nics.nic_remove(service.node, service.guests, job, arguments)


@operation(TaskName.INSTANCE_CD_INSERT)
def cd_insert(service: Service, job: JobContext, arguments: CdInsertArguments) -> Any:
    """Put a CD into a drive of a running guest."""
    return hotplug_cds.cd_insert(service.node, service.guests, job, arguments)


@operation(TaskName.INSTANCE_CD_EJECT)
def cd_eject(service: Service, job: JobContext, arguments: CdEjectArguments) -> Any:
    """Take the CD out of a drive of a running guest."""
    return hotplug_cds.cd_eject(service.node, service.guests, job, arguments)


@operation(TaskName.INSTANCE_SET_MEMORY)
def set_memory(service: Service, job: JobContext, arguments: SetMemoryArguments) -> Any:
    """Change how much memory a running guest has, by its balloon."""
    return hotplug_settings.set_memory(service.node, service.guests, job, arguments)


@operation(TaskName.INSTANCE_SET_PASSWORD)
def set_password(service: Service, job: JobContext, arguments: SetPasswordArguments) -> Any:
    """Change the password of a running guest's display."""
    return hotplug_settings.set_password(service.node, service.guests, job, arguments)
