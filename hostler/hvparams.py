"""The hypervisor parameters of an instance: name, type, default, and what each one means.

Names are those of Ganeti's KVM module, so that a site can carry its parameters over; where a default is another one
today, its description says why. The checks here need no host (across parameters: ``hostler.hvchecks``); whether a file
exists on a node is checked there. Unknown names are refused.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hostler.hvchecks import SEED_PARTS, cross_check
from hostler.hvtypes import (
    BindAddress,
    Capabilities,
    CpuFeature,
    CpuMask,
    MetaData,
    OneLine,
    OptionalPath,
    QemuArgument,
    UsbDevice,
    UserText,
    Word,
)

HvDiskType = Literal["paravirtual", "virtio-scsi", "nvme", "ide", "scsi", "sd", "mtd", "pflash"]
HvCdromType = Literal["", "paravirtual", "virtio-scsi", "ide", "scsi", "sd", "mtd", "pflash"]
MEMORY_MAX_MIB = 16 * 1024 * 1024
"""16 TiB; what a host really has is checked on the node."""

NicType = Literal[
    "paravirtual", "e1000", "rtl8139", "ne2k_pci", "ne2k_isa", "i82551", "i82557b", "i82559er", "pcnet"
]  # fmt: skip
Cache = Literal["default", "none", "writethrough", "writeback", "directsync", "unsafe"]
Vga = Literal["", "std", "cirrus", "qxl", "virtio", "vmware"]


class HvParams(BaseModel):
    """How the virtual hardware is built. Every parameter is optional and has a working default."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    # what it boots from
    kernel_path: OptionalPath = Field(
        "",
        description="Kernel to boot directly; empty boots from boot_order (was /boot/vmlinuz-2.6-kvmU: a 2011 kernel).",
    )
    initrd_path: OptionalPath = Field("", description="Initial RAM disk; used only with kernel_path.")
    root_path: OneLine = Field("/dev/vda1", description="Root device given to the kernel as root=.")
    kernel_args: OneLine = Field("ro", description="Further kernel arguments.")
    boot_order: Literal["disk", "cdrom", "network", "floppy"] = Field(
        "disk", description="What the firmware boots from."
    )
    floppy_image_path: OptionalPath = Field("", description="Raw image in the floppy drive; the guest may write to it.")
    cdrom_image_path: OptionalPath = Field("", description="ISO image in the CD drive.")
    cdrom_drive: bool = Field(
        False, description="A CD drive also while it has no image, for one to be inserted while the guest runs."
    )
    cdrom2_image_path: OptionalPath = Field("", description="ISO image in a second CD drive, never booted from.")
    cdrom2_drive: bool = Field(False, description="Likewise the second CD drive.")
    cloud_init_image_path: OptionalPath = Field(
        "", description="Seed for cloud-init in a CD drive of its own: a NoCloud image with the volume label cidata."
    )
    cloud_init_user_data: UserText = Field(
        "",
        repr=False,
        description="User data of a seed that the node makes itself, at most 64 KiB. It stays in the job and in the "
        "instance: broker, result backend and SQL hold it. For secrets use cloud_init_user_data_path.",
    )
    cloud_init_user_data_path: OptionalPath = Field(
        "", description="Likewise from a file of the node, read at each start; at most 1 MiB, and kept nowhere else."
    )
    cloud_init_meta_data: MetaData = Field(
        default_factory=dict,
        repr=False,
        description="Added to the seed's meta-data, which has instance-id and local-hostname: the instance's name.",
    )
    cloud_init_network_config: UserText = Field(
        "", repr=False, description="The seed's network-config (YAML); empty: cloud-init asks DHCP on the first card."
    )
    uefi_code_path: OptionalPath = Field("", description="UEFI firmware (OVMF_CODE.fd); empty is the BIOS.")
    uefi_vars_path: OptionalPath = Field("", description="The guest's own UEFI variable store, writable; it stays.")
    uefi_vars_template_path: OptionalPath = Field(
        "", description="What uefi_vars_path is copied from where it does not exist yet (OVMF_VARS.fd)."
    )

    # machine and processors
    acpi: bool = Field(True, description="ACPI; without it a guest cannot be asked to shut down and is killed.")
    kvm_flag: Literal["", "enabled", "disabled"] = Field(
        "", description="enabled: KVM or fail; disabled: emulation (TCG); empty: KVM where it really works, else TCG."
    )
    machine_version: Word = Field("", description="QEMU machine type, such as pc-i440fx-7.2; empty is QEMU's pc.")
    cpu_type: Word = Field("", description="QEMU CPU model; empty is host under KVM and max under TCG.")
    cpu_features: list[CpuFeature] = Field(
        default_factory=list, max_length=100, description="Features to add to the CPU model or take away: +vmx, -hle."
    )
    cpu_sockets: int = Field(0, ge=0, le=4096, description="Topology; where one of the three is set, 0 counts as 1.")
    cpu_cores: int = Field(0, ge=0, le=4096, description="Cores a socket.")
    cpu_threads: int = Field(0, ge=0, le=4096, description="Threads a core.")
    cpu_mask: CpuMask = Field(
        "",
        description="Host processors QEMU runs on: all, 0-3,^2 or, one list for each vCPU, 0:1:2-3; its other threads "
        "then run on any of these. Empty is wherever the worker may run.",
    )
    use_localtime: bool = Field(False, description="The guest's clock shows local time instead of UTC.")
    mem_path: OptionalPath = Field("", description="Folder of a hugetlbfs; the memory is taken from there, at once.")
    balloon: bool = Field(False, description="virtio-balloon: the guest gives memory that it does not use back.")
    memory_min_mib: int = Field(
        0, ge=0, le=MEMORY_MAX_MIB, description="The least that instance.set_memory leaves the guest; 0: no bound."
    )
    memory_max_mib: int = Field(
        0,
        ge=0,
        le=MEMORY_MAX_MIB,
        description="What the guest is built with, so that instance.set_memory can give it as much; the balloon holds "
        "what is beyond memory_mib, once the guest has its driver. 0 is memory_mib.",
    )

    # disks
    disk_type: HvDiskType = Field("paravirtual", description="The disks' controller; paravirtual is virtio-blk.")
    cdrom_disk_type: HvCdromType = Field(
        "",
        description="Likewise of CD drives; empty is as disk_type, but IDE to boot from and where that type has no CD.",
    )
    disk_cache: Cache = Field("default", description="Host cache mode; default is QEMU's writeback.")
    disk_aio: Literal["", "threads", "native", "io_uring"] = Field(
        "", description="How QEMU reads and writes; native needs a disk_cache that bypasses the host's; empty: threads."
    )
    disk_discard: Literal["ignore", "unmap"] = Field(
        "unmap", description="What a guest's TRIM does (Ganeti ignores it; images then never shrink)."
    )

    # network cards
    nic_type: NicType = Field("paravirtual", description="The network cards' model; paravirtual is virtio-net.")
    vhost_net: bool = Field(False, description="virtio-net in the host's kernel; ignored for other models.")
    virtio_net_queues: int = Field(1, ge=1, le=256, description="Queues of a virtio-net card.")

    # consoles and displays
    serial_console: bool = Field(True, description="A serial port that `hostler console` attaches to.")
    serial_speed: Literal[9600, 19200, 38400, 57600, 115200] = Field(
        38400, description="Told to a kernel of kernel_path, in bit/s; the port itself has none."
    )
    vnc_bind_address: BindAddress = Field(
        "",
        description="Address of a VNC display on network_port (above 5900), or the folder of its socket NAME.vnc.",
    )
    vnc_tls: bool = Field(False, description="TLS for VNC, anonymous without vnc_x509_path.")
    vnc_x509_path: OptionalPath = Field("", description="Folder with ca-cert.pem, server-cert.pem and server-key.pem.")
    vnc_x509_verify: bool = Field(False, description="Clients need a certificate of that authority.")
    vnc_password_file: OptionalPath = Field("", description="Holds VNC's password, one line, 8 characters count.")
    spice_bind: BindAddress = Field(
        "",
        description="Address of a SPICE display on network_port (above 5900), or the folder of its socket NAME.spice.",
    )
    spice_use_tls: bool = Field(False, description="TLS for SPICE, with spice_x509_path; no plain port is open.")
    spice_x509_path: OptionalPath = Field("", description="As vnc_x509_path.")
    spice_password_file: OptionalPath = Field("", description="Holds SPICE's password, one line.")
    spice_use_vdagent: bool = Field(True, description="The channel of the guest's SPICE agent; only with spice_bind.")
    vga: Vga = Field("", description="Graphics card; empty: std with VNC, qxl with SPICE, none without a display.")
    keymap: Word = Field("", description="Keyboard layout of VNC, such as de; empty is QEMU's en-us.")

    # other devices
    usb_mouse: Literal["", "mouse", "tablet"] = Field(
        "", description="USB pointer; empty is a tablet where there is a VNC or SPICE display, else none."
    )
    usb_devices: list[UsbDevice] = Field(
        default_factory=list, max_length=15, description="tablet, mouse, keyboard, or host:VENDOR:PRODUCT in hex."
    )
    soundhw: Literal["", "ac97", "es1370", "hda", "sb16"] = Field("", description="Sound card; heard through SPICE.")
    guest_agent: bool = Field(False, description="The channel of QEMU's guest agent, a socket in the guest's folder.")
    kvm_extra: list[QemuArgument] = Field(
        default_factory=list, max_length=100, description="More words for QEMU's command line; nobody checks them."
    )

    # isolation
    security_model: Literal["none", "user", "pool"] = Field(
        "none", description="Whose rights QEMU has: the worker's, security_domain's, or a uid of the pool."
    )
    security_domain: OneLine = Field("", description="The login of security_model user.")
    use_chroot: bool = Field(False, description="QEMU sees an empty folder instead of the host's files.")
    cgroup_memory_max_mib: int = Field(
        0,
        ge=0,
        le=2 * MEMORY_MAX_MIB,
        description="What QEMU may have in all; the kernel swaps, then kills (memory.max). 0 is no limit.",
    )
    cgroup_cpu_max_percent: int = Field(
        0, ge=0, le=100_000, description="Processor time; 100 is one whole processor (cpu.max); 0 is no limit."
    )
    cgroup_cpu_weight: int = Field(
        0, ge=0, le=10_000, description="Its share where processors are short (cpu.weight); 0 is the kernel's, 100."
    )

    # live migration
    migration_port: int = Field(
        0, ge=0, le=65535, description="0 (was 8102: two guests could not arrive at once): a free one of the node's."
    )
    migration_bandwidth: int = Field(
        1024, ge=1, le=1024 * 1024, description="At most, in MiB/s (was 32: less than many a guest writes)."
    )
    migration_downtime: int = Field(
        300, ge=1, le=2_000_000, description="Aimed at, in ms (was 30: busy guests then never arrive)."
    )
    migration_mode: Literal["live", "non-live"] = Field("live", description="non-live: paused while it moves.")
    migration_caps: Capabilities = Field(
        "", description="Further migration capabilities of QEMU to switch on, as zero-blocks:auto-converge."
    )

    @model_validator(mode="after")
    def _cross_check(self) -> HvParams:
        cross_check(self)
        return self

    @property
    def is_confined(self) -> bool:
        """Whether its QEMU gives up the right to open files by their paths before the guest runs."""
        return self.use_chroot or self.security_model != "none"

    @property
    def has_seed(self) -> bool:
        """Whether the node makes a seed for cloud-init. One that is there already is cloud_init_image_path."""
        return any(getattr(self, name) for name in SEED_PARTS)
