"""A card of several queues, in a network namespace of the test's own."""

from __future__ import annotations

import subprocess

import pytest

from tests.node.test_network_traffic import Shell, ip, linux
from tests.nodes import node

pytestmark = pytest.mark.node

CARD = {"mac": "52:54:00:00:02:00", "mode": "bridged", "link": "br0"}
USER = {"mac": "52:54:00:00:02:01", "mode": "user"}


def test_a_guest_uses_all_queues_of_its_card_and_no_descriptor_stays_with_the_worker(qemu: None, netns: str) -> None:
    ip(netns, "link", "add", "br0", "type", "bridge", "forward_delay", "0")
    ip(netns, "address", "add", "10.1.0.1/24", "dev", "br0")
    ip(netns, "link", "set", "br0", "up")
    with node(prefix=("ip", "netns", "exec", netns)) as n1:
        n1.start_worker()
        instance = linux(n1.root, CARD, USER) | {"vcpus": 2}
        instance["hvparams"] |= {"virtio_net_queues": 2}
        tap = n1.start(instance)["nics"][0]["tap"]
        assert n1.tap_fds() == ["/dev/net/tun"] * 2
        with n1.serial("linux1") as serial:
            shell = Shell(serial)
            shell.configure("ip address add 10.1.0.2/24 dev eth0", "ip link set eth0 up")
            shell.configure("test -d /sys/class/net/eth0/queues/rx-1", "test ! -d /sys/class/net/eth1/queues/rx-1")
            shell.configure("grep -q 'virtio0-output.1' /proc/interrupts")
            assert shell.reaches("10.1.0.1")
            # QEMU lets go of the queues that the guest's driver does not ask for.
            shown = ["ip", "netns", "exec", netns, "ls", f"/sys/class/net/{tap}/queues"]
            assert subprocess.run(shown, capture_output=True, text=True, check=True).stdout.split() == [
                "rx-0", "rx-1", "tx-0", "tx-1",
            ]  # fmt: skip
        n1.do("instance.stop", name="linux1", force=True)
        n1.nothing_is_left()
