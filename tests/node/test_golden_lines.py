"""Every golden command line, started on a real QEMU and asked what it made of it. No guest runs: they stay paused."""

from __future__ import annotations

import os
import re
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hostler.hvchecks import FIRST_DISPLAY_PORT
from hostler.hvparams import HvParams
from hostler.payloads import Instance
from tests.services import missing
from tests.unit.worker.kvm.golden_cases import (
    AGENT_FD,
    BINARY,
    CASES,
    MADE_SEED,
    MONITOR_FD,
    PASSWORD_FD,
    PLACE,
    PORT,
    QMP_FD,
    SERIAL_FD,
    UUID,
    Case,
    golden_file,
    tap_fds,
    to_argv,
)
from worker.errors import NetworkFailed, QmpLost
from worker.kvm.accelerator import KvmProbe, kvm_works
from worker.kvm.command_line.disks import BYPASS, CDROMS, WRITE_THROUGH, cdrom_types
from worker.kvm.command_line.display import has_display, socket_path
from worker.kvm.command_line.network import queues
from worker.kvm.folder import GuestFolder
from worker.kvm.launch import Sockets, _handshake
from worker.kvm.prepared import Prepared, prepare
from worker.kvm.process import QemuProcess
from worker.kvm.qmp import EventLoop, Monitor
from worker.network.tap import open_tap
from worker.network.vhost import close_vhost, open_vhost
from worker.operations.hardware import VHOST_DEVICE

pytestmark = pytest.mark.node

DEADLINE_S = 30.0
DISK_BYTES = 1024 * 1024


def bare_kernel() -> bytes:
    """Just enough of a Linux kernel for QEMU to load (Documentation/arch/x86/boot.rst): nothing that could run."""
    setup = bytearray(2 * 512)
    setup[0x1F1] = 1  # setup sectors after the first
    struct.pack_into("<H", setup, 0x1FE, 0xAA55)
    struct.pack_into("<I", setup, 0x202, 0)
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, 0x020F)  # boot protocol 2.15
    setup[0x211] = 1  # loaded high
    struct.pack_into("<I", setup, 0x22C, 0x7FFFFFFF)  # highest address of an initrd
    struct.pack_into("<I", setup, 0x238, 2047)  # longest command line
    return bytes(setup) + b"\xf4" * 512


def empty_qcow2() -> bytes:
    """An image without data (QEMU's docs/interop/qcow2.txt): header, refcount table, refcount block, first table."""
    cluster = 1 << 16
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        *(b"QFI\xfb", 3, 0, 0, 16, DISK_BYTES, 0, 1, 3 * cluster, cluster, 1, 0, 0, 0, 0, 0, 4, 104),
    )
    refcount_table = struct.pack(">Q", 2 * cluster)
    refcounts = struct.pack(">4H", 1, 1, 1, 1)
    return b"".join(part.ljust(cluster, b"\0") for part in (header, refcount_table, refcounts, b""))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes a folder with an authority of its own and a server's certificate, as tls-creds-x509 wants it."""

    @cache
    def make() -> Path:
        if not shutil.which("openssl"):
            missing("openssl", "not on PATH")
        folder = tmp_path_factory.mktemp("x509")
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
        authority = ["-subj", "/CN=authority", "-addext", "keyUsage=critical,keyCertSign", "-keyout", "ca.key"]
        server = ["-subj", "/CN=localhost", "-keyout", "server-key.pem", "-CA", "ca-cert.pem", "-CAkey", "ca.key"]
        server += ["-addext", "basicConstraints=CA:false"]
        for more in ([*authority, "-out", "ca-cert.pem"], [*server, "-out", "server-cert.pem"]):
            subprocess.run(["openssl", "req", "-x509", *key, *more], cwd=folder, check=True, capture_output=True)
        return folder

    return make


@contextmanager
def loop_device(image: Path) -> Iterator[str]:
    """A block device backed by ``image``; the test is skipped where none can be had."""
    done = subprocess.run(["losetup", "--find", "--show", str(image)], capture_output=True, text=True)
    if done.returncode:
        missing("a loop device", done.stderr.strip())
    try:
        yield done.stdout.strip()
    finally:
        subprocess.run(["losetup", "--detach", done.stdout.strip()], check=True)


IMAGES = ("initrd_path", *CDROMS, "floppy_image_path", "uefi_code_path", "uefi_vars_path")
FOLDERS = ("mem_path", "vnc_bind_address", "spice_bind")
SECRETS = ("vnc_password_file", "spice_password_file", "cloud_init_user_data_path")


def make_files(case: Case, place: Path, certificates: Callable[[], Path], cleanup: ExitStack) -> None:
    """Everything below PLACE that the case's guest is made of."""
    hvparams = case.instance.hvparams
    for field in FOLDERS:
        if getattr(hvparams, field).startswith(PLACE):
            here(getattr(hvparams, field), place).mkdir()
    for field in SECRETS:
        if path := getattr(hvparams, field):
            here(path, place).write_text("secret\n")
    if hvparams.vnc_x509_path or hvparams.spice_x509_path:
        (place / "x509").symlink_to(certificates())
    for path in filter(None, (getattr(hvparams, field) for field in IMAGES)):
        provide_image(case, here(path, place), path, bytes(DISK_BYTES), cleanup)
    if hvparams.kernel_path:
        here(hvparams.kernel_path, place).write_bytes(bare_kernel())
    for disk in case.instance.disks:
        content = empty_qcow2() if disk.format == "qcow2" else bytes(DISK_BYTES)
        provide_image(case, here(disk.path, place), disk.path, content, cleanup)


def provide_image(case: Case, file: Path, path: str, content: bytes, cleanup: ExitStack) -> None:
    """A file, or a block device where the case says so."""
    if path not in case.block_devices:
        file.write_bytes(content)
        return
    image = file.with_name(f"backing-{file.name}")
    image.write_bytes(content)
    file.symlink_to(cleanup.enter_context(loop_device(image)))


def here(path: str, place: Path) -> Path:
    return Path(path.replace(PLACE, str(place), 1))


@cache
def kvm() -> KvmProbe:
    with tempfile.TemporaryDirectory() as folder:
        return kvm_works(Path(str(shutil.which(BINARY))), Path(folder))


def require(case: Case) -> None:
    if not shutil.which(BINARY):
        missing(BINARY, "not on PATH")
    if case.accelerator == "kvm" and not (probe := kvm()).works:
        pytest.skip(f"KVM does not work here: {probe.reason}")
    if os.geteuid() != 0 and (case.block_devices or any(nic.mode != "user" for nic in case.instance.nics)):
        pytest.skip("taps and loop devices need root")
    if case.instance.hvparams.vhost_net and not VHOST_DEVICE.exists():
        pytest.skip(f"{VHOST_DEVICE} is not there")


def free_port(address: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        try:
            probe.bind((address, 0))
        except OSError as exc:
            pytest.skip(f"{address} cannot be bound here: {exc}")
        port = int(probe.getsockname()[1])
    return port if port > FIRST_DISPLAY_PORT else free_port(address)


def with_port(text: str, port: int) -> str:
    """The line with another port for its display."""
    display = f":{PORT - FIRST_DISPLAY_PORT}"
    text = re.sub(rf"(?m)^(-vnc .*?){display}(,|$)", rf"\1:{port - FIRST_DISPLAY_PORT}\2", text)
    return text.replace(f"port={PORT}", f"port={port}")


def prepared_for(case: Case, place: Path, folder: GuestFolder, cleanup: ExitStack) -> Prepared:
    """What the worker would prepare for the guest with its paths in this test's folder."""
    hvparams = {
        name: value.replace(PLACE, str(place), 1) if isinstance(value, str) else value
        for name, value in case.hvparams.items()
    }
    prepared = prepare(Case(case.spec, hvparams).instance, folder)
    for fd in prepared.fds:
        cleanup.callback(os.close, fd)
    return prepared


class Started:
    """A QEMU that was given a golden line."""

    port = 0

    def __init__(self, monitor: Monitor, process: QemuProcess, folder: GuestFolder) -> None:
        self.monitor, self.process, self.folder = monitor, process, folder

    def ask(self, command: str, **arguments: Any) -> Any:
        return self.monitor.execute(command, arguments or None)

    def property(self, device: str, name: str) -> Any:
        return self.ask("qom-get", path=f"/machine/peripheral/{device}", property=name)


@contextmanager
def started(name: str, place: Path, certificates: Callable[[], Path], loop: EventLoop) -> Iterator[Started]:
    """The line in its golden file, started with this test's folder and descriptors; it has ended at the end."""
    case, text = CASES[name], golden_file(name).read_text()
    require(case)
    with ExitStack() as cleanup:
        make_files(case, place, certificates, cleanup)
        folder = GuestFolder.of(place, UUID)
        folder.create()
        sockets = Sockets.bind(folder, serial=case.instance.hvparams.serial_console)
        cleanup.callback(sockets.close)
        fds = {QMP_FD: sockets.qmp.fileno(), MONITOR_FD: sockets.monitor.fileno()}
        prepared = prepared_for(case, place, folder, cleanup)
        if prepared.agent_fd is not None:
            fds[AGENT_FD] = prepared.agent_fd
        for fd in prepared.password_fds.values():
            fds[PASSWORD_FD] = fd
        if sockets.serial:
            fds[SERIAL_FD] = sockets.serial.fileno()
        for index, nic in enumerate(case.instance.nics):
            if nic.mode != "user":
                try:
                    hvparams = case.instance.hvparams
                    tap = open_tap(vnet_hdr=hvparams.nic_type == "paravirtual", queues=queues(hvparams))
                except NetworkFailed as exc:
                    missing("a tap", exc)
                cleanup.callback(tap.close)
                wanted = tap_fds(hvparams, index)
                fds |= dict(zip(wanted.queues, tap.fds, strict=True))
                vhost = open_vhost(len(wanted.vhost))
                cleanup.callback(close_vhost, vhost)
                fds |= dict(zip(wanted.vhost, vhost, strict=True))
        text = re.sub(
            r'(\bfd=|fds?":"|/self/fd/)([\d:]+)',
            lambda found: found[1] + ":".join(str(fds[int(number)]) for number in found[2].split(":")),
            text,
        )
        address = case.instance.hvparams.vnc_bind_address or case.instance.hvparams.spice_bind
        port = free_port(address) if address and not address.startswith("/") else 0
        text = with_port(text, port)
        argv = [str(shutil.which(BINARY)), *to_argv(text.replace(PLACE, str(place)))]
        opened = [_handshake(), folder.open_for_append(folder.journal), folder.open_for_append(folder.log)]
        for fd in opened:
            cleanup.callback(os.close, fd)
        process = QemuProcess.spawn(argv, pass_fds=[*fds.values()], stdin=opened[0], stdout=opened[1], stderr=opened[2])
        sockets.close()  # or nobody hears of it when QEMU ends at once
        cleanup.callback(process.close)
        cleanup.callback(process.kill, grace_s=0)
        try:
            monitor = Monitor.connect(loop, folder.qmp, DEADLINE_S, lambda event: None)
        except QmpLost:
            process.wait(1.0)
            pytest.fail(f"QEMU did not take the line: {folder.log_tail()}")
        with closing(monitor):
            qemu = Started(monitor, process, folder)
            qemu.port = port
            yield qemu
            monitor.execute("quit")
            assert process.wait(DEADLINE_S), "QEMU did not quit"
        assert process.exit_status() == 0, folder.log_tail()
        assert folder.last_event("SHUTDOWN"), "its journal holds its end"
        folder.remove()
        assert not [path for path in place.rglob("*") if path.is_socket()]


@pytest.mark.parametrize("name", CASES)
def test_qemu_takes_the_golden_line_and_makes_of_it_what_was_meant(
    name: str, place: Path, certificates: Callable[[], Path], loop: EventLoop
) -> None:
    instance = CASES[name].instance
    with started(name, place, certificates, loop) as qemu:
        assert qemu.ask("query-name") == {"name": instance.name}
        assert qemu.ask("query-uuid") == {"UUID": UUID}
        state = qemu.ask("query-status")
        assert (state["status"], state["running"]) == ("inmigrate" if CASES[name].incoming else "prelaunch", False)
        assert len(qemu.ask("query-cpus-fast")) == instance.vcpus
        built_mib = instance.hvparams.memory_max_mib or instance.memory_mib
        assert qemu.ask("query-memory-size-summary")["base-memory"] == built_mib * 2**20
        assert qemu.ask("query-kvm")["enabled"] is (CASES[name].accelerator == "kvm")
        check_channels(qemu, instance.hvparams)
        check_disks(qemu, CASES[name], place)
        check_drives(qemu, CASES[name], place)
        check_cards(qemu, CASES[name])
        check_machine(qemu, instance, place)
        check_vnc(qemu, instance, place)
        check_spice(qemu, instance)
        check_devices(qemu, instance.hvparams)
        assert qemu.folder.log_tail() == ""


def check_channels(qemu: Started, hvparams: HvParams) -> None:
    files = {entry["label"]: entry["filename"] for entry in qemu.ask("query-chardev")}
    sockets = {"qmp", "monitor"} | ({"serial0"} if hvparams.serial_console else set())
    sockets |= {"agent"} if hvparams.guest_agent else set()
    vdagent = {"vdagent"} if hvparams.spice_bind and hvparams.spice_use_vdagent else set()
    assert set(files) == sockets | vdagent | {"journal"}
    for label in sockets:
        assert f"unix:{qemu.folder.path / label.removesuffix('0')}" in files[label]
        assert "server" in files[label]


def check_disks(qemu: Started, case: Case, place: Path) -> None:
    instance, hvparams = case.instance, case.instance.hvparams
    found = images(qemu)
    for index, disk in enumerate(instance.disks):
        node = f"disk{index}"
        inserted = found[node]
        assert inserted["image"]["filename"] == str(here(disk.path, place))
        assert (inserted["drv"], inserted["ro"]) == (disk.format, disk.mode == "ro")
        assert inserted["image"]["virtual-size"] == DISK_BYTES
        assert inserted["cache"]["direct"] is (hvparams.disk_cache in BYPASS)
        assert inserted["cache"]["no-flush"] is (hvparams.disk_cache == "unsafe")
        assert inserted["cache"]["writeback"] is (hvparams.disk_cache not in WRITE_THROUGH)
        assert qemu.property(f"{node}-device", "share-rw") is disk.shared
        assert qemu.property(f"{node}-device", "type") == DISK_DRIVERS[hvparams.disk_type]


DISK_DRIVERS = {
    "paravirtual": "virtio-blk-pci", "ide": "ide-hd", "scsi": "scsi-hd", "virtio-scsi": "scsi-hd", "nvme": "nvme",
}  # fmt: skip
CD_DRIVERS = {"paravirtual": "virtio-blk-pci", "ide": "ide-cd", "scsi": "scsi-cd", "virtio-scsi": "scsi-cd"}


def images(qemu: Started) -> dict[str, Any]:
    """What is inserted in the guest's drives, by node."""
    return {
        entry["inserted"]["node-name"]: entry["inserted"] for entry in qemu.ask("query-block") if "inserted" in entry
    }


def drive(qemu: Started, device: str) -> dict[str, Any]:
    """What QEMU says of a drive, empty or not."""
    (found,) = (entry for entry in qemu.ask("query-block") if device in entry.get("qdev", "").split("/"))
    return dict(found)


def check_drives(qemu: Started, case: Case, place: Path) -> None:
    hvparams, found = case.instance.hvparams, images(qemu)
    wanted = {f"disk{index}": disk.path for index, disk in enumerate(case.instance.disks)}
    for field, kind in cdrom_types(hvparams).items():
        node = f"cdrom{CDROMS.index(field)}"
        path = getattr(hvparams, field) or (MADE_SEED if field == CDROMS[-1] else "")
        if path:
            wanted[node] = path
            assert found[node]["ro"] is True
        else:
            assert {"removable": True, "tray_open": False}.items() <= drive(qemu, f"{node}-device").items()
        assert qemu.property(f"{node}-device", "type") == CD_DRIVERS[kind]
    if hvparams.floppy_image_path:
        wanted["floppy0"] = hvparams.floppy_image_path
        assert found["floppy0"]["ro"] is False
    if hvparams.uefi_code_path:
        wanted |= {"uefi-code": hvparams.uefi_code_path, "uefi-vars": hvparams.uefi_vars_path}
        assert (found["uefi-code"]["ro"], found["uefi-vars"]["ro"]) == (True, False)
    assert {node: inserted["image"]["filename"] for node, inserted in found.items()} == {
        node: str(here(path, place)) for node, path in wanted.items()
    }
    check_boot_order(qemu, hvparams, wanted)


def check_boot_order(qemu: Started, hvparams: HvParams, drives: dict[str, str]) -> None:
    first = {"disk": "disk0", "cdrom": "cdrom0", "floppy": "floppy0"}.get(hvparams.boot_order)
    if "floppy0" in drives:
        devices = qemu.ask("qom-list", path="/machine/unattached") + qemu.ask("qom-list", path="/machine/peripheral")
        (controller,) = (device["name"] for device in devices if device["type"] == "child<isa-fdc>")
        folder = "peripheral" if controller == "fdc" else "unattached"
        index = qemu.ask("qom-get", path=f"/machine/{folder}/{controller}", property="bootindexA")
        assert index == (1 if first == "floppy0" and not hvparams.kernel_path else -1)
    cds = {f"cdrom{CDROMS.index(field)}" for field in cdrom_types(hvparams)}
    for node in {*drives} | cds:
        if not node.startswith(("uefi", "floppy")):
            wanted = 1 if node == first and not hvparams.kernel_path else -1
            assert qemu.property(f"{node}-device", "bootindex") == wanted, node


def check_cards(qemu: Started, case: Case) -> None:
    hvparams = case.instance.hvparams
    for index, nic in enumerate(case.instance.nics):
        assert qemu.property(f"nic{index}", "mac") == nic.mac
        first = index == 0 and hvparams.boot_order == "network" and not hvparams.kernel_path
        assert qemu.property(f"nic{index}", "bootindex") == (1 if first else -1)
        drivers = {"paravirtual": "virtio-net-pci"}
        assert qemu.property(f"nic{index}", "type") == drivers.get(hvparams.nic_type, hvparams.nic_type)


def check_machine(qemu: Started, instance: Instance, place: Path) -> None:
    hvparams = instance.hvparams
    topology = (hvparams.cpu_sockets, hvparams.cpu_cores, hvparams.cpu_threads)
    if any(topology):
        last = qemu.ask("query-cpus-fast")[-1]["props"]
        places = (last["socket-id"] + 1, last["core-id"] + 1, last["thread-id"] + 1)
        assert places == tuple(number or 1 for number in topology)
    for feature in hvparams.cpu_features:
        cpu = qemu.ask("query-cpus-fast")[0]["qom-path"]
        assert qemu.ask("qom-get", path=cpu, property=feature[1:]) is (feature[0] == "+")
    if hvparams.mem_path:
        (memory,) = qemu.ask("query-memdev")
        assert (memory["size"], memory["prealloc"]) == (instance.memory_mib * 2**20, True)
        mem_path = qemu.ask("qom-get", path="/objects/ram", property="mem-path")
        assert mem_path == str(here(hvparams.mem_path, place))


def check_vnc(qemu: Started, instance: Instance, place: Path) -> None:
    hvparams, servers = instance.hvparams, qemu.ask("query-vnc-servers")
    if not hvparams.vnc_bind_address:
        assert servers == []
        return
    (server,) = servers
    (listener,) = server["server"]
    if path := socket_path(instance):
        assert (listener["family"], listener["service"]) == ("unix", str(here(str(path), place)))
        assert (server["auth"], here(str(path), place).is_socket()) == ("none", True)
        return
    assert (listener["host"], listener["service"]) == (hvparams.vnc_bind_address, str(qemu.port))
    scheme = "x509" if hvparams.vnc_x509_path else "tls"
    password = "vnc" if hvparams.vnc_password_file else "none"
    wanted = ("vencrypt", f"{scheme}-{password}") if hvparams.vnc_tls else (password, None)
    assert (server["auth"], server.get("vencrypt")) == wanted
    if hvparams.vnc_tls and hvparams.vnc_x509_path:
        verify = qemu.ask("qom-get", path="/objects/vnc-tls", property="verify-peer")
        assert verify is hvparams.vnc_x509_verify


def check_spice(qemu: Started, instance: Instance) -> None:
    hvparams, found = instance.hvparams, qemu.ask("query-spice")
    if not hvparams.spice_bind:
        assert found["enabled"] is False
    elif not socket_path(instance):
        assert (found["enabled"], found["host"]) == (True, hvparams.spice_bind)
        assert found.get("tls-port" if hvparams.spice_use_tls else "port") == qemu.port
        assert found["auth"] == ("spice" if hvparams.spice_password_file else "none")


def check_devices(qemu: Started, hvparams: HvParams) -> None:
    """The devices that are switched on are there, and no others."""
    found = {entry["name"]: entry["type"] for entry in qemu.ask("qom-list", path="/machine/peripheral")}
    card = hvparams.vga or ("std" if hvparams.vnc_bind_address else "qxl" if hvparams.spice_bind else "")
    cards = {"std": "VGA", "cirrus": "cirrus-vga", "qxl": "qxl-vga", "virtio": "virtio-vga", "vmware": "vmware-svga"}
    pointer = hvparams.usb_mouse or ("tablet" if has_display(hvparams) else "")
    sounds = {"ac97": "AC97", "es1370": "ES1370", "hda": "hda-duplex", "sb16": "sb16"}
    wanted = {
        "vga0": cards.get(card),
        "pointer0": {"tablet": "usb-tablet", "mouse": "usb-mouse"}.get(pointer),
        "sound0": sounds.get(hvparams.soundhw),
        "balloon0": "virtio-balloon-pci" if hvparams.balloon else None,
        "agent-device": "virtserialport" if hvparams.guest_agent else None,
        "vdagent-device": "virtserialport" if hvparams.spice_bind and hvparams.spice_use_vdagent else None,
    }
    for device, driver in wanted.items():
        assert found.get(device) == (f"child<{driver}>" if driver else None), device
    assert len([name for name in found if name.startswith("usb-device")]) == len(hvparams.usb_devices)
