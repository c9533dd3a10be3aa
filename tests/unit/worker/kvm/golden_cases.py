"""The guests whose command lines are kept as golden files, and how such a file is read and written.

Paths lie below :data:`PLACE`, which does not exist: a test that starts a line puts a folder of its own there. File
descriptors are fixed numbers, to be exchanged likewise.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hostler.hvparams import HvParams
from hostler.payloads import Instance
from worker.kvm.arguments import HostPart, Option, TapFds, build
from worker.kvm.command_line.network import queues, uses_vhost
from worker.kvm.prepared import password_files

GOLDEN = Path(__file__).parent / "golden"
PLACE = "/golden"
BINARY = "qemu-system-x86_64"
UUID = "5b8f1c9a-3c37-4b57-9d2e-8f0f5a3c6d10"
MADE_SEED = f"{PLACE}/guests/{UUID}/seed.iso"
"""Where the node makes a seed: in the guest's folder, which the tests with a real QEMU have below PLACE."""
QMP_FD, MONITOR_FD, SERIAL_FD, AGENT_FD, PASSWORD_FD, FIRST_TAP_FD, FIRST_VHOST_FD = 10, 11, 12, 13, 14, 20, 60
PORT = 15999
"""Of displays; to be exchanged too, for another program may have it."""
ODD_NAME = "a,b=c 'd' \"e\" \\f,,{g} ü🚀"
"""Everything that QEMU's option syntax, JSON or a shell could take for something else."""


@dataclass(frozen=True)
class Case:
    """One guest. ``block_devices`` are those of its disks and CDs that are devices of the host."""

    spec: dict[str, Any] = field(default_factory=dict)
    hvparams: dict[str, Any] = field(default_factory=dict)
    accelerator: str = "tcg"
    block_devices: frozenset[str] = frozenset()
    incoming: bool = False

    @property
    def instance(self) -> Instance:
        return Instance.model_validate({"name": "web1", "memory_mib": 32, **self.spec, "hvparams": self.hvparams})

    @property
    def options(self) -> list[Option]:
        instance = self.instance
        taps = [index for index, nic in enumerate(instance.nics) if nic.mode != "user"]
        host = HostPart(
            uuid=UUID,
            accelerator=self.accelerator,
            qmp_fd=QMP_FD,
            monitor_fd=MONITOR_FD,
            serial_fd=SERIAL_FD if instance.hvparams.serial_console else None,
            agent_fd=AGENT_FD if instance.hvparams.guest_agent else None,
            password_fds=dict.fromkeys(password_files(instance.hvparams), PASSWORD_FD),
            tap_fds={index: tap_fds(instance.hvparams, index) for index in taps},
            block_devices=self.block_devices,
            seed_path=MADE_SEED,
            incoming=self.incoming,
        )
        return build(instance, host)


def tap_fds(hvparams: HvParams, index: int) -> TapFds:
    numbers = [index + 10 * queue for queue in range(queues(hvparams))]
    return TapFds(
        tuple(FIRST_TAP_FD + number for number in numbers),
        tuple(FIRST_VHOST_FD + number for number in numbers) if uses_vhost(hvparams) else (),
    )


def disks(*names: str, **more: Any) -> dict[str, Any]:
    return {"disks": [{"path": f"{PLACE}/{name}", **more} for name in names]}


def nics(*modes: str) -> dict[str, Any]:
    links = {"bridged": "br0", "routed": "100", "openvswitch": "ovs0", "user": ""}
    addresses = {"bridged": "", "routed": "192.0.2.7", "openvswitch": "", "user": ""}
    return {
        "nics": [
            {"mac": f"52:54:00:00:00:{index:02x}", "mode": mode, "link": links[mode], "ip": addresses[mode]}
            for index, mode in enumerate(modes)
        ]
    }


def numbered(count: int) -> list[str]:
    return [f"disk{index}" for index in range(count)]


KERNEL = {"kernel_path": f"{PLACE}/vmlinuz"}
INITRD = KERNEL | {"initrd_path": f"{PLACE}/initrd"}
CDROM = {"cdrom_image_path": f"{PLACE}/cd.iso"}
CDROM2 = {"cdrom2_image_path": f"{PLACE}/cd2.iso"}
SEED = {"cloud_init_image_path": f"{PLACE}/seed.iso"}
SEED_DATA: dict[str, Any] = {
    "cloud_init_user_data": "#cloud-config\n",
    "cloud_init_meta_data": {"dsmode": "local"},
    "cloud_init_network_config": "version: 2\n",
}
FLOPPY = {"floppy_image_path": f"{PLACE}/floppy.img"}
UEFI = {"uefi_code_path": f"{PLACE}/code.fd", "uefi_vars_path": f"{PLACE}/vars.fd"}
NIC_TYPES = ("paravirtual", "e1000", "rtl8139", "ne2k_pci", "ne2k_isa", "i82551", "i82557b", "i82559er", "pcnet")
DISK_TYPES = ("paravirtual", "ide", "scsi", "virtio-scsi", "nvme")
CDROM_TYPES = ("paravirtual", "ide", "scsi", "virtio-scsi")
CACHES = ("default", "none", "writethrough", "writeback", "directsync", "unsafe")
DISPLAY = {"network_port": PORT}
X509 = {"vnc_tls": True, "vnc_x509_path": f"{PLACE}/x509"}
VNC_PASSWORD = {"vnc_password_file": f"{PLACE}/password"}


def vnc(address: str = "127.0.0.1", **more: Any) -> dict[str, Any]:
    return {"vnc_bind_address": address, **more}


def spice(address: str = "127.0.0.1", **more: Any) -> dict[str, Any]:
    return {"spice_bind": address, **more}


CASES: dict[str, Case] = {
    "defaults": Case(),
    "size": Case(
        {"name": "db-1.example_site.org", "memory_mib": 1024, "vcpus": 4, "tags": ["a"], "network_port": 5901}
    ),
    "longest-name": Case({"name": "n" * 255}),
    # disks: every type, every cache mode, every property
    **{f"disk-{kind}": Case(disks("disk0", "disk1"), {"disk_type": kind}) for kind in DISK_TYPES},
    **{f"cache-{mode}-paravirtual": Case(disks("disk0"), {"disk_cache": mode}) for mode in CACHES},
    **{
        f"cache-{mode}-{kind}": Case(disks("disk0"), {"disk_cache": mode, "disk_type": kind})
        for mode in ("none", "writethrough")
        for kind in DISK_TYPES[1:]
    },
    "disk-qcow2": Case(disks("disk0.qcow2", format="qcow2")),
    "disk-qcow2-directsync": Case(disks("disk0.qcow2", format="qcow2"), {"disk_cache": "directsync"}),
    "disk-read-only": Case(disks("disk0", mode="ro")),
    **{
        f"disk-read-only-{kind}": Case(disks("disk0", mode="ro"), {"disk_type": kind})
        for kind in ("scsi", "virtio-scsi", "nvme")
    },
    **{f"disk-shared-{kind}": Case(disks("disk0", shared=True), {"disk_type": kind}) for kind in DISK_TYPES},
    **{
        f"disk-aio-{aio}": Case(disks("disk0"), {"disk_aio": aio, "disk_cache": "none"})
        for aio in ("threads", "native", "io_uring")
    },
    "disk-aio-native-directsync": Case(disks("disk0"), {"disk_aio": "native", "disk_cache": "directsync"}),
    "disk-discard-ignore": Case(disks("disk0"), {"disk_discard": "ignore"}),
    "disk-shared-read-only": Case(disks("disk0", shared=True, mode="ro")),
    "disk-odd-path": Case(disks(ODD_NAME)),
    "disk-odd-path-scsi-cache-none": Case(disks(ODD_NAME), {"disk_type": "scsi", "disk_cache": "none"}),
    "disk-block-device": Case(
        disks("device0", "disk1"), {"disk_cache": "none"}, block_devices=frozenset({f"{PLACE}/device0"})
    ),
    "disk-block-device-odd-path": Case(disks(ODD_NAME), block_devices=frozenset({f"{PLACE}/{ODD_NAME}"})),
    "disks-ide-4": Case(disks(*numbered(4)), {"disk_type": "ide"}),
    "disks-ide-3-and-cdrom": Case(disks(*numbered(3)), {"disk_type": "ide"} | CDROM),
    "disks-scsi-7": Case(disks(*numbered(7)), {"disk_type": "scsi"}),
    "disks-paravirtual-24": Case(disks(*numbered(24))),
    "disks-virtio-scsi-24": Case(disks(*numbered(24)), {"disk_type": "virtio-scsi"}),
    # CD drives: every type, also together with disks of that and of another type
    **{f"cdrom-{kind}": Case(disks("disk0"), {"cdrom_disk_type": kind} | CDROM) for kind in CDROM_TYPES},
    **{
        f"cdrom-beside-{kind}-disks": Case(disks("disk0", "disk1"), {"disk_type": kind} | CDROM | CDROM2)
        for kind in DISK_TYPES
    },
    **{
        f"cdrom-{kind}-boots": Case(
            disks("disk0"), {"disk_type": "scsi", "cdrom_disk_type": kind, "boot_order": "cdrom"} | CDROM | CDROM2
        )
        for kind in CDROM_TYPES
    },
    "cdrom2-alone": Case({}, CDROM2),
    "cdrom-block-device": Case(disks("disk0"), CDROM, block_devices=frozenset({f"{PLACE}/cd.iso"})),
    **{
        f"cdrom-{kind}-empty": Case(
            disks("disk0"), {"cdrom_drive": True, "cdrom2_drive": True, "cdrom_disk_type": kind, "boot_order": "cdrom"}
        )
        for kind in CDROM_TYPES
        if kind != "paravirtual"
    },
    "cdrom-empty-beside-another": Case({}, {"cdrom_drive": True} | CDROM2),
    "cloud-init": Case(disks("disk0"), SEED),
    "cloud-init-of-data": Case(disks("disk0"), SEED_DATA),
    "cloud-init-of-a-file": Case(disks("disk0"), {"cloud_init_user_data_path": f"{PLACE}/user-data"}),
    "cdroms-all": Case(disks("disk0"), {"disk_type": "ide"} | CDROM | CDROM2 | SEED),
    "floppy": Case(disks("disk0"), FLOPPY),
    "floppy-q35": Case(disks("disk0"), FLOPPY | {"machine_version": "q35"}),
    # network cards: every model, every mode
    **{f"nic-{kind}-user": Case(nics("user"), {"nic_type": kind}) for kind in NIC_TYPES},
    **{f"nic-{kind}-tap": Case(nics("bridged"), {"nic_type": kind}) for kind in NIC_TYPES},
    "nics-ne2k_isa-4": Case(nics(*["user"] * 4), {"nic_type": "ne2k_isa"}),
    "nic-vhost": Case(nics("bridged", "user"), {"vhost_net": True}),
    "nic-vhost-of-another-model": Case(nics("bridged"), {"vhost_net": True, "nic_type": "e1000"}),
    "nic-queues": Case(nics("bridged", "user"), {"virtio_net_queues": 4}),
    "nic-queues-vhost": Case(nics("bridged"), {"virtio_net_queues": 2, "vhost_net": True}),
    "nic-queues-of-another-model": Case(nics("bridged"), {"virtio_net_queues": 4, "nic_type": "e1000"}),
    "nics-every-mode": Case(nics("bridged", "routed", "openvswitch", "user")),
    "nics-8": Case(nics(*["user", "routed"] * 4)),
    # what it boots from
    **{
        f"boot-{order}": Case(disks("disk0", "disk1") | nics("user", "user"), {"boot_order": order} | CDROM)
        for order in ("disk", "cdrom", "network")
    },
    "boot-cdrom-without-disk": Case({}, {"boot_order": "cdrom"} | CDROM),
    "boot-floppy": Case(disks("disk0"), {"boot_order": "floppy"} | FLOPPY),
    "boot-floppy-without-image": Case(disks("disk0"), {"boot_order": "floppy"}),
    **{f"boot-disk-{kind}": Case(disks("disk0"), {"disk_type": kind} | FLOPPY | CDROM) for kind in DISK_TYPES},
    "boot-network-ne2k_isa": Case(nics("user"), {"boot_order": "network", "nic_type": "ne2k_isa"}),
    "uefi": Case(disks("disk0"), UEFI),
    "uefi-q35": Case(disks("disk0"), UEFI | {"machine_version": "q35", "disk_type": "nvme"}),
    "uefi-odd-path": Case({}, UEFI | {"uefi_vars_path": f"{PLACE}/{ODD_NAME}"}),
    "boot-network-routed": Case(nics("routed"), {"boot_order": "network"}),
    "cdrom-odd-path": Case({}, {"cdrom_image_path": f"{PLACE}/{ODD_NAME}"}),
    "kernel": Case(disks("disk0"), KERNEL),
    "kernel-without-serial-console": Case(disks("disk0"), KERNEL | {"serial_console": False}),
    "kernel-initrd-root-args": Case(
        disks("disk0"), INITRD | {"root_path": "UUID=1-2,3", "kernel_args": "ro quiet init=/bin/sh -- 'a b', \"c\" ü🚀"}
    ),
    "kernel-odd-path": Case({}, {"kernel_path": f"{PLACE}/{ODD_NAME}", "kernel_args": ""}),
    **{
        f"kernel-boot-order-{order}": Case(disks("disk0") | nics("user"), INITRD | CDROM | {"boot_order": order})
        for order in ("disk", "cdrom", "network")
    },
    "initrd-without-kernel": Case({}, {"initrd_path": f"{PLACE}/initrd"}),
    # the machine
    "acpi-off": Case(disks("disk0"), {"acpi": False}),
    "serial-console-off": Case(disks("disk0"), {"serial_console": False}),
    **{
        f"kernel-serial-speed-{speed}": Case({}, KERNEL | {"serial_speed": speed})
        for speed in (9600, 19200, 57600, 115200)
    },
    "localtime": Case({}, {"use_localtime": True}),
    "kvm-enabled": Case(disks("disk0"), {"kvm_flag": "enabled"}, accelerator="kvm"),
    "kvm-disabled": Case(disks("disk0"), {"kvm_flag": "disabled"}),
    "kvm-by-default": Case(disks("disk0"), accelerator="kvm"),
    "cpu-under-tcg": Case({}, {"cpu_type": "qemu64"}),
    "cpu-under-kvm": Case({}, {"cpu_type": "max"}, accelerator="kvm"),
    "cpu-features": Case({}, {"cpu_type": "qemu64", "cpu_features": ["+aes", "-sse4.1", "-svm"]}),
    "cpu-features-of-the-default": Case({}, {"cpu_features": ["-avx2"]}),
    "smp-topology": Case({"vcpus": 8}, {"cpu_type": "Conroe", "cpu_sockets": 2, "cpu_cores": 2, "cpu_threads": 2}),
    "smp-cores-alone": Case({"vcpus": 4}, {"cpu_cores": 4}),
    "hugepages": Case({}, {"mem_path": f"{PLACE}/memory"}),
    "hugepages-odd-path": Case({"memory_mib": 48}, {"mem_path": f"{PLACE}/{ODD_NAME}"}),
    "balloon": Case({}, {"balloon": True}),
    "balloon-between-bounds": Case({}, {"balloon": True, "memory_min_mib": 16, "memory_max_mib": 48}),
    "kvm-extra": Case({}, {"kvm_extra": ["-overcommit", "mem-lock=off"]}),
    # displays
    "vnc": Case(DISPLAY, vnc()),
    "vnc-any-address": Case(DISPLAY, vnc("0.0.0.0")),
    "vnc-ipv6": Case(DISPLAY, vnc("::1")),
    "vnc-any-ipv6-address": Case(DISPLAY, vnc("::")),
    "vnc-tls-anonymous": Case(DISPLAY, vnc(vnc_tls=True)),
    "vnc-tls-x509": Case(DISPLAY, vnc(**X509)),
    "vnc-tls-x509-verify": Case(DISPLAY, vnc(**X509, vnc_x509_verify=True)),
    "vnc-x509-without-tls": Case(DISPLAY, vnc(**(X509 | {"vnc_tls": False}))),
    "vnc-password": Case(DISPLAY, vnc(**VNC_PASSWORD)),
    "vnc-password-tls-x509": Case(DISPLAY, vnc(**X509, **VNC_PASSWORD)),
    "vnc-socket": Case({}, vnc(f"{PLACE}/displays")),
    "vnc-socket-odd-path": Case({}, vnc(f"{PLACE}/a,b=c ü")),
    "vnc-socket-has-no-options": Case({}, vnc(f"{PLACE}/displays", **X509, **VNC_PASSWORD)),
    "vnc-options-without-vnc": Case(DISPLAY, X509 | VNC_PASSWORD),
    "vnc-keymap": Case(DISPLAY, vnc(keymap="de")),
    "vnc-q35": Case(DISPLAY | disks("disk0"), vnc(machine_version="q35")),
    "spice": Case(DISPLAY, spice()),
    "spice-ipv6": Case(DISPLAY, spice("::1")),
    "spice-password": Case(DISPLAY, spice(spice_password_file=f"{PLACE}/password")),
    "spice-tls": Case(DISPLAY, spice(spice_use_tls=True, spice_x509_path=f"{PLACE}/x509")),
    "spice-socket": Case({}, spice(f"{PLACE}/displays")),
    "spice-without-vdagent": Case(DISPLAY, spice(spice_use_vdagent=False)),
    **{f"vga-{card}": Case(DISPLAY, vnc(vga=card)) for card in ("std", "cirrus", "qxl", "virtio", "vmware")},
    "vga-alone": Case({}, {"vga": "std"}),
    # what else is plugged in
    **{f"usb-mouse-{kind}": Case({}, {"usb_mouse": kind}) for kind in ("mouse", "tablet")},
    "usb-mouse-with-vnc": Case(DISPLAY, vnc(usb_mouse="mouse")),
    "usb-devices": Case({}, {"usb_devices": ["tablet", "mouse", "keyboard"]}),
    "usb-device-of-the-host": Case({}, {"usb_devices": ["host:046d:C52b"]}),
    **{f"sound-{card}": Case({}, {"soundhw": card}) for card in ("ac97", "es1370", "hda", "sb16")},
    "sound-spice": Case(DISPLAY, spice(soundhw="hda")),
    "guest-agent": Case({}, {"guest_agent": True}),
    "guest-agent-and-vdagent": Case(DISPLAY, spice(guest_agent=True)),
    "machine-pinned": Case(disks("disk0"), {"machine_version": "pc-i440fx-7.2"}),
    **{
        f"machine-q35-{kind}": Case(disks("disk0", "disk1", "disk2"), {"machine_version": "q35", "disk_type": kind})
        for kind in DISK_TYPES
    },
    "machine-q35-cdrom": Case(
        disks("disk0", "disk1", "disk2") | nics("user"),
        {"machine_version": "pc-q35-7.2", "disk_type": "ide", "boot_order": "cdrom"} | CDROM,
    ),
    "incoming": Case(disks("disk0"), incoming=True),
    "everything": Case(
        {"vcpus": 2, "disks": disks("disk0")["disks"] + disks("disk1", mode="ro", shared=True)["disks"]}
        | nics("bridged", "user"),
        INITRD
        | CDROM
        | {"disk_cache": "writeback", "cpu_type": "max", "machine_version": "pc", "nic_type": "e1000", "acpi": True}
        | CDROM2
        | FLOPPY
        | {"balloon": True, "guest_agent": True, "soundhw": "hda", "usb_devices": ["keyboard"]},
    ),
}


def to_text(options: list[Option]) -> str:
    """One option a line, as QEMU gets it."""
    lines = []
    for name, value in options:
        text = json.dumps(value, separators=(",", ":")) if isinstance(value, dict) else value
        lines.append(name if text is None else f"{name} {text}")
    return "\n".join(lines) + "\n"


def to_argv(text: str) -> list[str]:
    """The words of a golden file, without the program."""
    return [word for line in text.splitlines() for word in line.split(" ", 1)]


def golden_file(name: str) -> Path:
    return GOLDEN / f"{name}.txt"
