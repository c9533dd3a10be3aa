"""Cards with taps that come and go while a guest runs, in a network namespace of the test's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete

from models import UidLease
from tests.node.test_network import MAC, PORT, Network, calls, network, scripted_node, with_nics
from tests.nodes import TestNode, until
from tests.services import missing

__all__ = ["network", "scripted_node"]

pytestmark = pytest.mark.node

OTHER = "52:54:00:00:00:02"
ADDED = PORT | {"mac": OTHER}
UID = 2_000_000_000 + 100 * os.getpid() + 50
"""Without a login, and no process of the host has it but a guest of this test process."""
POOL = {"security_model": "pool"}
CHROOT = {"use_chroot": True}


@pytest.fixture
def n1(scripted_node: TestNode, network: Network) -> Iterator[TestNode]:
    (scripted_node.root / "calls").unlink(missing_ok=True)
    yield scripted_node
    (scripted_node.root / "fail").unlink(missing_ok=True)
    scripted_node.end_guests()
    assert network.taps() == []


def taken_out(n1: TestNode, mac: str, device: str) -> list[str]:
    """Take a card out of a guest that lets go of it only when it is reset; the taps of those that are left."""
    assert n1.failure("instance.nic_remove", name="web1", mac=mac, timeout_s=0.2).code == "TIMED_OUT"
    n1.monitor("web1", "system_reset")
    until(lambda: device not in n1.monitor("web1", "qom-list /machine/peripheral"))
    return [card["tap"] for card in n1.do("instance.nic_remove", name="web1", mac=mac)["nics"]]


def test_a_card_brings_its_tap_and_takes_it_along(n1: TestNode, network: Network) -> None:
    n1.start(with_nics(n1, PORT))
    view = n1.do("instance.nic_add", name="web1", nic=ADDED)
    first, second = (card["tap"] for card in view["nics"])
    assert sorted(network.taps()) == sorted([first, second])
    assert (calls(n1, "ifup")[-1]["argv"], calls(n1, "ifup")[-1]["env"]["INTERFACE_INDEX"]) == ([second], "1")
    assert OTHER in n1.monitor("web1", "info network")
    assert n1.do("node.audit")["findings"] == []
    assert taken_out(n1, MAC, "nic0") == [second]
    assert network.taps() == [second]
    assert [call["argv"] for call in calls(n1, "ifdown")] == [[first]]
    (card,) = n1.do("instance.reboot", name="web1", mode="hard")["nics"]
    assert (card["mac"], network.taps()) == (OTHER, [card["tap"]])
    assert "nic1" in n1.monitor("web1", "info network")
    n1.do("instance.stop", name="web1", force=True)
    n1.nothing_is_left()


def test_a_card_that_is_plugged_in_has_all_its_queues_as_after_a_reboot(n1: TestNode, network: Network) -> None:
    n1.start(with_nics(n1, hvparams={"virtio_net_queues": 2}))
    (card,) = n1.do("instance.nic_add", name="web1", nic=PORT)["nics"]
    assert network.taps() == [card["tap"]]
    plugged = n1.monitor("web1", "info qtree").count("mq = true"), n1.tap_fds()
    assert plugged == (1, ["/dev/net/tun"] * 2)  # QEMU's: the worker has let go of its own
    n1.do("instance.reboot", name="web1", mode="hard")
    assert (n1.monitor("web1", "info qtree").count("mq = true"), n1.tap_fds()) == plugged


@pytest.fixture
def uid(n1: TestNode) -> Iterator[int]:
    if os.geteuid() != 0:
        missing("Other uids", "needs root")
    n1.do("uid_pool.add", ranges=str(UID))
    yield UID
    n1.end_guests()
    n1.do("uid_pool.remove", ranges=str(UID))
    with n1.database().transaction() as session:
        session.execute(delete(UidLease))


@pytest.mark.parametrize("model", [CHROOT, POOL, POOL | CHROOT], ids=["chroot", "pool", "pool and chroot"])
def test_a_card_comes_to_a_guest_whose_qemu_could_make_no_tap_itself(
    n1: TestNode, network: Network, uid: int, model: dict[str, Any]
) -> None:
    n1.start(with_nics(n1, PORT, hvparams=model | {"virtio_net_queues": 2}))
    status = Path(f"/proc/{n1.pid('web1')}/status").read_text()
    assert f"Uid:\t{uid}\t" in status or POOL.items().isdisjoint(model.items())
    assert "Seccomp:\t2" in status
    view = n1.do("instance.nic_add", name="web1", nic=ADDED)
    first, second = (card["tap"] for card in view["nics"])
    assert sorted(network.taps()) == sorted([first, second])
    assert calls(n1, "ifup")[-1]["argv"] == [second]
    assert n1.tap_fds() == ["/dev/net/tun"] * 4
    assert OTHER in n1.monitor("web1", "info network")
    assert n1.do("node.audit")["findings"] == []
    assert taken_out(n1, OTHER, "nic1") == [first]
    assert (network.taps(), n1.tap_fds()) == ([first], ["/dev/net/tun"] * 2)
    n1.do("instance.nic_add", name="web1", nic=ADDED)
    n1.do("instance.reboot", name="web1", mode="hard")
    assert (len(network.taps()), n1.tap_fds()) == (2, ["/dev/net/tun"] * 4)
    assert n1.do("node.audit")["findings"] == []


def test_a_card_outlives_the_worker_that_plugged_it_in(n1: TestNode, network: Network) -> None:
    n1.start(with_nics(n1))
    (card,) = n1.do("instance.nic_add", name="web1", nic=PORT)["nics"]
    n1.restart_worker()
    assert network.taps() == [card["tap"]]
    assert n1.info("web1")["nics"] == [card]


def test_an_ifup_that_fails_leaves_neither_card_nor_tap(n1: TestNode, network: Network) -> None:
    n1.start(with_nics(n1, PORT))
    before = network.taps()
    (n1.root / "fail").write_text("1")
    failed = n1.failure("instance.nic_add", name="web1", nic=ADDED)
    assert (failed.code, "the switch is on fire" in failed.message) == ("NETWORK_FAILED", True)
    assert network.taps() == before
    assert [call["argv"] for call in calls(n1, "ifdown")] == [calls(n1, "ifup")[-1]["argv"]]
    assert [nic["mac"] for nic in n1.info("web1")["nics"]] == [MAC]
    (n1.root / "fail").unlink()
    assert len(n1.do("instance.nic_add", name="web1", nic=ADDED)["nics"]) == 2


def test_a_card_that_qemu_refuses_leaves_no_tap(n1: TestNode, network: Network) -> None:
    n1.start(with_nics(n1))
    for slot in range(2, 32):
        n1.monitor("web1", f"device_add virtio-rng-pci,addr={slot:x}")
    failed = n1.failure("instance.nic_add", name="web1", nic=PORT)
    assert (failed.code, "PCI" in failed.message) == ("QEMU_FAILED", True)
    assert network.taps() == []
    assert "netdev0" not in n1.monitor("web1", "info network")
    assert n1.info("web1")["nics"] == []
