"""A Linux guest sees at once what is plugged in, lets go of what is to go, and finds it all in its place again."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.guests import LINUX_MEMORY_MIB, LINUX_READY, LINUX_TICK
from tests.node.test_linux import BOOT_S, ask, linux
from tests.nodes import TestNode, until

__all__ = ["linux"]

pytestmark = pytest.mark.node

MAC = "52:54:00:00:00:77"
PLACES = "grep -h PCI_SLOT /sys/block/vdb/device/../uevent /sys/class/net/eth1/device/../uevent"


def test_a_guest_has_memory_between_its_bounds_from_the_start_and_after_a_reboot(
    n1: TestNode, linux: dict[str, Any]
) -> None:
    least, most = LINUX_MEMORY_MIB - 6, LINUX_MEMORY_MIB + 32
    bounds = {"balloon": True, "memory_min_mib": least, "memory_max_mib": most}
    n1.start(linux | {"hvparams": linux["hvparams"] | bounds})
    for has in (LINUX_MEMORY_MIB, most):
        with n1.serial("linux1") as serial:
            serial.read_until(LINUX_READY, BOOT_S)
            until(lambda wanted=has: f"actual={wanted}\r" in n1.monitor("linux1", "info balloon"), what=f"{has} MiB")
            assert n1.info("linux1")["memory_mib"] == has
            for wanted, reason in ((least - 1, "less than its memory_min_mib"), (most + 1, "more than linux1 was")):
                refused = n1.failure("instance.set_memory", name="linux1", memory_mib=wanted)
                assert (refused.code, refused.details["errors"][0]["field"]) == ("INVALID_ARGUMENT", "memory_mib")
                assert reason in refused.message
            if has < most:
                n1.do("instance.set_memory", name="linux1", memory_mib=least)
                n1.do("instance.set_memory", name="linux1", memory_mib=most)
                n1.do("instance.reboot", name="linux1", mode="hard")


def test_linux_sees_disks_and_cards_come_and_go(n1: TestNode, linux: dict[str, Any]) -> None:
    disk = n1.root / "more.img"
    disk.write_bytes(b"more".ljust(4 * 2**20, b"\0"))
    n1.start(linux | {"hvparams": linux["hvparams"] | {"balloon": True}})
    with n1.serial("linux1") as serial:
        serial.read_until(LINUX_READY, BOOT_S)
        serial.read_until(LINUX_TICK + b"2")
        n1.do("instance.disk_add", name="linux1", disk={"path": str(disk)})
        n1.do("instance.nic_add", name="linux1", nic={"mac": MAC, "mode": "user"})
        serial.send(b"\nuntil [ -b /dev/vdb ] && [ -d /sys/class/net/eth1 ]; do :; done\n")
        ask(serial, "head -c 4 /dev/vdb", b"more")
        ask(serial, "cat /sys/class/net/eth1/address", MAC.encode())
        where = ask(serial, PLACES, rb"PCI_SLOT[^\r\n]*")[1]
        n1.do("instance.disk_resize", name="linux1", path=str(disk), size_mib=6)
        serial.send(b"until [ $(cat /sys/block/vdb/size) = 12288 ]; do :; done\n")
        ask(serial, "cat /sys/block/vdb/size", b"12288")
        assert n1.do("instance.set_memory", name="linux1", memory_mib=88)["memory_mib"] == 88
        assert "actual=88" in n1.monitor("linux1", "info balloon")
        n1.do("instance.set_memory", name="linux1", memory_mib=LINUX_MEMORY_MIB)
        n1.do("instance.pause", name="linux1")
        assert n1.failure("instance.set_memory", name="linux1", memory_mib=88, timeout_s=0.2).code == "TIMED_OUT"
        n1.do("instance.resume", name="linux1")
        for _ in range(2):
            serial.read_until(LINUX_TICK)
        assert f"actual={LINUX_MEMORY_MIB}" in n1.monitor("linux1", "info balloon")
        n1.do("instance.set_memory", name="linux1", memory_mib=90)
        n1.do("instance.reboot", name="linux1", timeout_s=30)
    with n1.serial("linux1") as serial:
        serial.read_until(LINUX_READY, BOOT_S)
        serial.read_until(LINUX_TICK + b"2")
        serial.send(b"\n")
        assert "actual=90" in n1.monitor("linux1", "info balloon")
        ask(serial, PLACES, re.escape(where))
        n1.do("instance.disk_remove", name="linux1", path=str(disk))
        view = n1.do("instance.nic_remove", name="linux1", mac=MAC)
        assert (len(view["disks"]), len(view["nics"])) == (1, 1)
        ask(serial, "ls /sys/block /sys/class/net | grep -c -e vdb -e eth1", b"0")
    assert n1.do("node.audit")["findings"] == []
