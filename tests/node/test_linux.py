"""The jobs on a full Linux guest: kernel and initrd given directly, a virtio disk, ACPI as a real system answers it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.guests import LINUX_ARGUMENTS, LINUX_MEMORY_MIB, LINUX_READY, LINUX_TICK, linux_guest
from tests.nodes import Serial, TestNode

pytestmark = pytest.mark.node

BOOT_S = 60.0


@pytest.fixture
def linux(shared_node: TestNode) -> dict[str, Any]:
    """An instance that boots Linux, from paths that mean something to QEMU's option parser."""
    guest = linux_guest()
    kernel, initrd = shared_node.root / "vm,linuz=a", shared_node.root / "init,rd=b"
    for link, target in ((kernel, guest.kernel), (initrd, guest.initrd)):
        if not link.exists():
            link.symlink_to(target)
    disk = shared_node.root / "linux.img"
    disk.write_bytes(b"a disk".ljust(4 * 2**20, b"\0"))
    hvparams = {
        "kernel_path": str(kernel),
        "initrd_path": str(initrd),
        "kernel_args": LINUX_ARGUMENTS,
        "kvm_flag": "disabled",
    }
    card = {"mac": "52:54:00:00:00:09", "mode": "user"}
    return {
        "name": "linux1", "memory_mib": LINUX_MEMORY_MIB, "vcpus": 1, "disks": [{"path": str(disk)}], "nics": [card],
        "hvparams": hvparams,
    }  # fmt: skip


def ask(serial: Serial, command: str, answer: bytes) -> re.Match[bytes]:
    serial.send(f"echo answer $({command}) end\n".encode())
    return serial.read_until(re.compile(rb"\nanswer (" + answer + rb") end\r"))


def test_linux_boots_sees_its_disk_pauses_reboots_and_shuts_down(n1: TestNode, linux: dict[str, Any]) -> None:
    before = n1.start(linux)
    with n1.serial("linux1") as serial:
        serial.read_until(LINUX_READY, BOOT_S)
        serial.read_until(LINUX_TICK + b"2")
        serial.send(b"\n")
        ask(serial, "cat /sys/block/vda/size", b"8192")
        ask(serial, "head -c 6 /dev/vda", b"a disk")
        ask(serial, "cat /sys/class/net/eth0/address", b"52:54:00:00:00:09")
        assert b"root=/dev/vda1" in ask(serial, "cat /proc/cmdline", rb"[^\r\n]*")[1]
        serial.send(b"echo new contents >/dev/vda; sync; echo written $?\n")
        serial.read_until(b"written 0")
        assert n1.do("instance.pause", name="linux1")["state"] == "paused"
        assert serial.is_silent_for(1.2)
        assert n1.do("instance.resume", name="linux1")["state"] == "running"
        serial.read_until(LINUX_TICK)
    after = n1.do("instance.reboot", name="linux1", timeout_s=30)
    assert (after["state"], after["pid"] != before["pid"]) == ("running", True)
    assert after["disks"] == before["disks"]
    assert Path(linux["disks"][0]["path"]).read_bytes().startswith(b"new contents\n")
    with n1.serial("linux1") as serial:
        serial.read_until(LINUX_READY, BOOT_S)
        serial.read_until(LINUX_TICK + b"2")
    stopped = n1.do("instance.stop", name="linux1", timeout_s=30, on_timeout="fail")
    assert (stopped["state"], stopped["how"]) == ("stopped", "guest_shutdown")
    n1.nothing_is_left()
