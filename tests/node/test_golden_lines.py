"""Every golden command line, started on a real QEMU and asked what it made of it. No guest runs: they stay paused."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.services import missing
from tests.unit.worker.kvm.golden_cases import (
    BINARY,
    CASES,
    FIRST_TAP_FD,
    MONITOR_FD,
    PLACE,
    QMP_FD,
    SERIAL_FD,
    UUID,
    Case,
    golden_file,
    to_argv,
)
from worker.errors import NetworkFailed, QmpLost
from worker.kvm.accelerator import KvmProbe, kvm_works
from worker.kvm.folder import GuestFolder
from worker.kvm.launch import Sockets, _handshake
from worker.kvm.process import QemuProcess
from worker.kvm.qmp import EventLoop, Monitor
from worker.network.tap import open_tap

pytestmark = pytest.mark.node

DEADLINE_S = 30.0
DISK_BYTES = 1024 * 1024


@pytest.fixture(scope="module")
def loop() -> Iterator[EventLoop]:
    made = EventLoop()
    yield made
    made.close()


@pytest.fixture
def place() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="hst-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


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


def make_files(case: Case, place: Path, cleanup: ExitStack) -> None:
    """Everything below PLACE that the case's guest is made of."""
    hvparams = case.instance.hvparams
    for path in filter(None, (hvparams.initrd_path, hvparams.cdrom_image_path)):
        here(path, place).write_bytes(bytes(DISK_BYTES))
    if hvparams.kernel_path:
        here(hvparams.kernel_path, place).write_bytes(bare_kernel())
    for disk in case.instance.disks:
        file = here(disk.path, place)
        if disk.format == "qcow2":
            file.write_bytes(empty_qcow2())
        elif disk.path in case.block_devices:
            image = place / f"backing-{file.name}"
            image.write_bytes(bytes(DISK_BYTES))
            file.symlink_to(cleanup.enter_context(loop_device(image)))
        else:
            file.write_bytes(bytes(DISK_BYTES))


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


class Started:
    """A QEMU that was given a golden line."""

    def __init__(self, monitor: Monitor, process: QemuProcess, folder: GuestFolder) -> None:
        self.monitor, self.process, self.folder = monitor, process, folder

    def ask(self, command: str, **arguments: Any) -> Any:
        return self.monitor.execute(command, arguments or None)

    def property(self, device: str, name: str) -> Any:
        return self.ask("qom-get", path=f"/machine/peripheral/{device}", property=name)


@contextmanager
def started(name: str, place: Path, loop: EventLoop) -> Iterator[Started]:
    """The line in its golden file, started with this test's folder and descriptors; it has ended at the end."""
    case, text = CASES[name], golden_file(name).read_text()
    require(case)
    with ExitStack() as cleanup:
        make_files(case, place, cleanup)
        folder = GuestFolder.of(place, UUID)
        folder.create()
        sockets = Sockets.bind(folder, serial=case.instance.hvparams.serial_console)
        cleanup.callback(sockets.close)
        fds = {QMP_FD: sockets.qmp.fileno(), MONITOR_FD: sockets.monitor.fileno()}
        if sockets.serial:
            fds[SERIAL_FD] = sockets.serial.fileno()
        for index, nic in enumerate(case.instance.nics):
            if nic.mode != "user":
                try:
                    tap = open_tap(vnet_hdr=case.instance.hvparams.nic_type == "paravirtual")
                except NetworkFailed as exc:
                    missing("a tap", exc)
                cleanup.callback(tap.close)
                fds[FIRST_TAP_FD + index] = tap.fd
        text = re.sub(r'(fd=|"fd":")(\d+)', lambda found: f"{found[1]}{fds[int(found[2])]}", text)
        argv = [str(shutil.which(BINARY)), *to_argv(text.replace(PLACE, str(place)))]
        opened = [_handshake(), folder.open_for_append(folder.journal), folder.open_for_append(folder.log)]
        for fd in opened:
            cleanup.callback(os.close, fd)
        process = QemuProcess.spawn(argv, pass_fds=[*fds.values()], stdin=opened[0], stdout=opened[1], stderr=opened[2])
        cleanup.callback(process.close)
        cleanup.callback(process.kill, grace_s=0)
        try:
            monitor = Monitor.connect(loop, folder.qmp, DEADLINE_S, lambda event: None)
        except QmpLost:
            process.wait(1.0)
            pytest.fail(f"QEMU did not take the line: {folder.log_tail()}")
        with closing(monitor):
            yield Started(monitor, process, folder)
            monitor.execute("quit")
            assert process.wait(DEADLINE_S), "QEMU did not quit"
        assert process.exit_status() == 0, folder.log_tail()
        assert folder.last_event("SHUTDOWN"), "its journal holds its end"


@pytest.mark.parametrize("name", CASES)
def test_qemu_takes_the_golden_line_and_makes_of_it_what_was_meant(name: str, place: Path, loop: EventLoop) -> None:
    instance = CASES[name].instance
    with started(name, place, loop) as qemu:
        assert qemu.ask("query-name") == {"name": instance.name}
        assert qemu.ask("query-uuid") == {"UUID": UUID}
        state = qemu.ask("query-status")
        assert (state["status"], state["running"]) == ("prelaunch", False)
        assert len(qemu.ask("query-cpus-fast")) == instance.vcpus
        assert qemu.ask("query-memory-size-summary")["base-memory"] == instance.memory_mib * 2**20
        assert qemu.ask("query-kvm")["enabled"] is (CASES[name].accelerator == "kvm")
        check_channels(qemu, serial=instance.hvparams.serial_console)
        check_disks(qemu, CASES[name], place)
        check_cards(qemu, CASES[name])
        assert qemu.folder.log_tail() == ""


def check_channels(qemu: Started, *, serial: bool) -> None:
    files = {entry["label"]: entry["filename"] for entry in qemu.ask("query-chardev")}
    sockets = {"qmp", "monitor", *(["serial0"] if serial else [])}
    assert set(files) == {*sockets, "journal"}
    for label in sockets:
        assert f"unix:{qemu.folder.path / label.removesuffix('0')}" in files[label]
        assert "server" in files[label]


def check_disks(qemu: Started, case: Case, place: Path) -> None:
    instance, hvparams = case.instance, case.instance.hvparams
    found = {
        entry["inserted"]["node-name"]: entry["inserted"] for entry in qemu.ask("query-block") if "inserted" in entry
    }
    wanted = {f"disk{index}": disk for index, disk in enumerate(instance.disks)}
    assert set(found) == {*wanted, *(["cdrom0"] if hvparams.cdrom_image_path else [])}
    for node, disk in wanted.items():
        inserted = found[node]
        assert inserted["image"]["filename"] == str(here(disk.path, place))
        assert (inserted["drv"], inserted["ro"]) == (disk.format, disk.mode == "ro")
        assert inserted["image"]["virtual-size"] == DISK_BYTES
        assert inserted["cache"]["direct"] is (hvparams.disk_cache == "none")
        assert inserted["cache"]["writeback"] is (hvparams.disk_cache != "writethrough")
        assert qemu.property(f"{node}-device", "share-rw") is disk.shared
    if hvparams.cdrom_image_path:
        assert found["cdrom0"]["image"]["filename"] == str(here(hvparams.cdrom_image_path, place))
        assert found["cdrom0"]["ro"] is True


def check_cards(qemu: Started, case: Case) -> None:
    hvparams = case.instance.hvparams
    for index, nic in enumerate(case.instance.nics):
        assert qemu.property(f"nic{index}", "mac") == nic.mac
        first = index == 0 and hvparams.boot_order == "network" and not hvparams.kernel_path
        assert qemu.property(f"nic{index}", "bootindex") == (1 if first else -1)
