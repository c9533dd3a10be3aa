"""Packets of a Linux guest through each kind of connection, in a network namespace of the test's own."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.guests import LINUX_ARGUMENTS, LINUX_MEMORY_MIB, LINUX_READY, linux_guest
from tests.nodes import Serial, TestNode, node, until

pytestmark = pytest.mark.node

BOOT_S = 60.0
BRIDGED = {"mac": "52:54:00:00:01:00", "mode": "bridged", "link": "br0"}
ROUTED = {"mac": "52:54:00:00:01:01", "mode": "routed", "ip": "192.0.2.7"}
ROUTED_6 = {"mac": "52:54:00:00:01:02", "mode": "routed", "ip": "2001:db8::7"}
TABLE = {"mac": "52:54:00:00:01:03", "mode": "routed", "ip": "192.0.2.8", "link": "100"}
VLAN = {"mac": "52:54:00:00:01:04", "mode": "bridged", "link": "br1", "vlan": 100}
OVS = {"mac": "52:54:00:00:01:05", "mode": "openvswitch", "link": "ovs0"}


def ip(netns: str, *arguments: str) -> str:
    done = subprocess.run(["ip", "-n", netns, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def linux(root: Path, *nics: dict[str, Any]) -> dict[str, Any]:
    guest = linux_guest()
    hvparams = {"kernel_path": str(guest.kernel), "initrd_path": str(guest.initrd), "kernel_args": LINUX_ARGUMENTS}
    return {
        "name": "linux1", "memory_mib": LINUX_MEMORY_MIB, "nics": [*nics],
        "hvparams": hvparams | {"kvm_flag": "disabled"},
    }  # fmt: skip


class Shell:
    """The guest's root shell on its console."""

    def __init__(self, serial: Serial) -> None:
        self._serial = serial
        self._asked = 0
        serial.read_until(LINUX_READY, BOOT_S)

    def run(self, command: str) -> int:
        """The command's exit status."""
        self._asked += 1
        self._serial.send(f"{command}; echo status{self._asked} $?\n".encode())
        return int(self._serial.read_until(re.compile(rf"\nstatus{self._asked} (\d+)\r".encode()))[1])

    def configure(self, *commands: str) -> None:
        for command in commands:
            assert self.run(command) == 0, command

    def reaches(self, address: str) -> bool:
        """Whether a ping is answered, asked again for as long as a link may take to come up."""
        ping = "ping6" if ":" in address else "ping"
        return self.run(f"for n in 1 2 3 4 5; do {ping} -c 1 -W 1 {address} && break; done") == 0


@pytest.fixture(scope="module")
def n1(qemu: None, netns: str) -> Iterator[TestNode]:
    ip(netns, "link", "set", "lo", "up")
    ip(netns, "link", "add", "br0", "type", "bridge", "forward_delay", "0")
    ip(netns, "address", "add", "10.1.0.1/24", "dev", "br0")
    ip(netns, "link", "set", "br0", "up")
    ip(netns, "address", "add", "198.51.100.1/32", "dev", "lo")
    with node(prefix=("ip", "netns", "exec", netns)) as made:
        made.start_worker()
        yield made


@pytest.fixture(scope="module")
def guest(n1: TestNode, netns: str) -> Iterator[Shell]:
    """One guest with a card of each kind, for booting takes the longest; its end is a test of its own, the last."""
    n1.start(linux(n1.root, BRIDGED, ROUTED, ROUTED_6, TABLE))
    with n1.serial("linux1") as serial:
        yield Shell(serial)


def test_a_bridged_guest_reaches_the_bridge(guest: Shell, netns: str) -> None:
    guest.configure("ip address add 10.1.0.2/24 dev eth0", "ip link set eth0 up")
    assert guest.reaches("10.1.0.1")
    assert f"lladdr {BRIDGED['mac']}" in ip(netns, "neighbour", "show", "10.1.0.2")


def test_a_routed_guest_reaches_an_address_of_its_host(guest: Shell, n1: TestNode, netns: str) -> None:
    tap = n1.info("linux1")["nics"][1]["tap"]
    guest.configure("ip address add 192.0.2.7/32 dev eth1", "ip link set eth1 up", "ip route add 198.51.100.1 dev eth1")
    assert guest.reaches("198.51.100.1")
    assert ip(netns, "route", "show", "192.0.2.7").split()[:3] == ["192.0.2.7", "dev", tap]


def test_a_routed_ipv6_guest_reaches_its_host_through_the_gateway_that_is_the_same_everywhere(
    guest: Shell, netns: str
) -> None:
    ip(netns, "address", "replace", "2001:db8::1/128", "dev", "lo")
    guest.configure(
        "ip link set eth2 up",
        "ip -6 address add 2001:db8::7/128 dev eth2",
        "ip -6 route add 2001:db8::1 via fe80::1 dev eth2",
    )
    until(lambda: guest.reaches("2001:db8::1"), what="the guest's address is no longer tentative")


def test_link_is_the_routing_table_of_a_routed_card(guest: Shell, n1: TestNode, netns: str) -> None:
    tap = n1.info("linux1")["nics"][3]["tap"]
    assert ip(netns, "route", "show", "table", "100").split() == ["192.0.2.8", "dev", tap, "scope", "link"]
    assert ip(netns, "route", "show", "192.0.2.8") == ""


def test_no_guest_is_a_neighbour_or_a_router_of_its_host(guest: Shell, n1: TestNode, netns: str) -> None:
    bridged, routed = (card["tap"] for card in n1.info("linux1")["nics"][:2])
    settings = [f"net.ipv6.conf.{bridged}.disable_ipv6", f"net.ipv6.conf.{routed}.accept_ra"]
    read = ["ip", "netns", "exec", netns, "sysctl", "-n", *settings]
    assert subprocess.run(read, capture_output=True, text=True, check=True).stdout.split() == ["1", "0"]


def test_with_the_guest_go_its_taps_ports_and_routes(guest: Shell, n1: TestNode, netns: str) -> None:
    assert n1.do("instance.stop", name="linux1", force=True)["how"] == "killed"
    assert re.findall(r"(?m)^\d+: (\w+)", ip(netns, "link", "show")) == ["lo", "br0"]
    assert ip(netns, "route", "show", "table", "100") == ip(netns, "route", "show", "192.0.2.0/24") == ""
    n1.nothing_is_left()


def test_a_check_warns_of_a_host_that_does_not_forward_and_names_what_is_missing(n1: TestNode, netns: str) -> None:
    tagged, nowhere = BRIDGED | {"vlan": 7}, OVS | {"link": "ovs9"}
    found = n1.do("instance.check", instance=linux(n1.root, ROUTED, ROUTED_6, tagged, nowhere, VLAN | {"link": "lo"}))
    warned = {each["field"]: each["reason"] for each in found["warnings"]}
    assert "net.ipv4.ip_forward" in warned["instance.nics[0].ip"]
    assert "net.ipv6.conf.all.forwarding" in warned["instance.nics[1].ip"]
    refused = {each["field"]: each["reason"] for each in found["errors"]}
    assert "does not filter VLANs" in refused.pop("instance.nics[2].vlan")
    assert "no Linux bridge" in refused.pop("instance.nics[4].link")
    (where,) = refused  # the tool, or only the bridge, depending on the host
    assert where in ("instance.nics[3].mode", "instance.nics[3].link")
