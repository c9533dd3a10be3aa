"""The hypervisor parameters of an instance: name, type, default, and what each one means.

Names are those of Ganeti's KVM module, so that a site can carry its parameters over. The checks here need no host;
whether a file exists on a node is checked there. Unknown names are refused.
"""

from __future__ import annotations

import posixpath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

HvDiskType = Literal["paravirtual", "ide", "scsi"]
NicType = Literal["paravirtual", "e1000", "rtl8139", "ne2k_pci", "i82551", "i82557b", "i82559er", "pcnet"]


def _one_line(value: str) -> str:
    if any(ord(char) < 0x20 or ord(char) == 0x7F for char in value):
        raise ValueError("must not contain line breaks or other control characters")
    if any(0xD800 <= ord(char) <= 0xDFFF for char in value):
        raise ValueError("must be text that UTF-8 can carry (it has a lone surrogate)")
    return value


def _absolute_path(value: str) -> str:
    _one_line(value)
    if not value.startswith("/") or value.startswith("//") or posixpath.normpath(value) != value:
        raise ValueError(f"must be an absolute, normalised path (no '..', no '//', no final '/'), not {value!r}")
    return value


def _optional_path(value: str) -> str:
    return _absolute_path(value) if value else value


OneLine = Annotated[str, AfterValidator(_one_line)]
AbsolutePath = Annotated[str, Field(min_length=1, max_length=4095), AfterValidator(_absolute_path)]
OptionalPath = Annotated[str, Field(max_length=4095), AfterValidator(_optional_path)]
"""An absolute, normalised path, or the empty string for "none"."""

Word = Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z0-9_.+-]*$")]
"""One of QEMU's own names, such as a machine type or a CPU model; empty for the default."""


class HvParams(BaseModel):
    """How the virtual hardware is built. Every parameter is optional and has a working default."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    kernel_path: OptionalPath = Field("", description="Kernel to boot directly; empty boots from boot_order.")
    initrd_path: OptionalPath = Field("", description="Initial RAM disk; used only with kernel_path.")
    root_path: OneLine = Field("/dev/vda1", description="Root device given to the kernel as root=.")
    kernel_args: OneLine = Field("ro", description="Further kernel arguments.")
    acpi: bool = Field(True, description="ACPI; without it a guest cannot be asked to shut down and is killed.")
    serial_console: bool = Field(True, description="A serial port that `hostler console` attaches to.")
    boot_order: Literal["disk", "cdrom", "network"] = Field("disk", description="What the firmware boots from.")
    cdrom_image_path: OptionalPath = Field("", description="ISO image in the CD drive.")
    disk_type: HvDiskType = Field("paravirtual", description="The disks' controller: virtio, IDE or SCSI.")
    disk_cache: Literal["default", "none", "writethrough", "writeback"] = Field(
        "default", description="Host cache mode; default is QEMU's writeback."
    )
    nic_type: NicType = Field("paravirtual", description="The network cards' model; paravirtual is virtio-net.")
    kvm_flag: Literal["", "enabled", "disabled"] = Field(
        "", description="enabled: KVM or fail; disabled: emulation (TCG); empty: KVM where it really works, else TCG."
    )
    machine_version: Word = Field("", description="QEMU machine type, such as pc-i440fx-7.2; empty is QEMU's pc.")
    cpu_type: Word = Field("", description="QEMU CPU model; empty is host under KVM and max under TCG.")
    use_localtime: bool = Field(False, description="The guest's clock shows local time instead of UTC.")

    @model_validator(mode="after")
    def _cross_check(self) -> HvParams:
        if self.kernel_path and not self.root_path:
            raise ValueError("root_path: Need a root partition for the instance, if a kernel is defined")
        if self.boot_order == "cdrom" and not self.cdrom_image_path:
            raise ValueError("cdrom_image_path: Cannot boot from cdrom without an ISO path")
        return self
