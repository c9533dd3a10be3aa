"""Taps, bridges and network scripts, in a network namespace of the test's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nodes import TestNode, node, tiny_instance

pytestmark = pytest.mark.node

MAC = "52:54:00:00:00:01"
PORT = {"mac": MAC, "mode": "bridged", "link": "br0"}


class Network:
    """What the node's network namespace shows."""

    def __init__(self, netns: str) -> None:
        self._netns = netns

    def ip(self, *arguments: str) -> Any:
        done = subprocess.run(
            ["ip", "-n", self._netns, "-json", *arguments], capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout) if done.stdout.strip() else []

    def taps(self) -> list[str]:
        return [link["ifname"] for link in self.ip("link", "show") if link["ifname"] not in ("lo", "br0")]

    def ports(self) -> list[str]:
        return [link["ifname"] for link in self.ip("link", "show", "master", "br0")]

    def routes(self) -> dict[str, str]:
        return {route["dst"]: route["dev"] for route in self.ip("route", "show")}


@pytest.fixture(scope="module")
def network(netns: str) -> Network:
    made = Network(netns)
    made.ip("link", "set", "lo", "up")
    made.ip("link", "add", "br0", "type", "bridge")
    made.ip("link", "set", "br0", "mtu", "1400", "up")
    return made


@pytest.fixture(scope="module")
def bridged_node(qemu: None, netns: str) -> Iterator[TestNode]:
    """A node with the network scripts that are shipped."""
    with node(prefix=("ip", "netns", "exec", netns)) as made:
        made.start_worker()
        yield made


@pytest.fixture
def n1(bridged_node: TestNode, network: Network) -> Iterator[TestNode]:
    yield bridged_node
    bridged_node.end_guests()
    assert network.taps() == []


@pytest.fixture(scope="module")
def scripted_node(qemu: None, netns: str) -> Iterator[TestNode]:
    """A node with network scripts of its own, which record how they are called."""
    with node(prefix=("ip", "netns", "exec", netns)) as made:
        for name in ("ifup", "ifdown"):
            made.environment[f"HOSTLER_{name.upper()}"] = str(write_script(made.root, name))
        made.start_worker()
        yield made


@pytest.fixture
def n2(scripted_node: TestNode, network: Network) -> Iterator[TestNode]:
    (scripted_node.root / "calls").unlink(missing_ok=True)
    yield scripted_node
    (scripted_node.root / "fail").unlink(missing_ok=True)
    scripted_node.end_guests()
    assert network.taps() == []


SCRIPT = """\
#!{python} -IS
import json, pathlib, sys
root = pathlib.Path({root!r})
environ = pathlib.Path("/proc/self/environ").read_bytes().decode().split("\\0")[:-1]
call = {{"script": {name!r}, "argv": sys.argv[1:], "env": dict(item.split("=", 1) for item in environ)}}
with (root / "calls").open("a") as calls:
    print(json.dumps(call), file=calls)
fail = root / "fail"
if {name!r} == "ifup" and fail.exists() and fail.read_text() in ("", call["env"]["INTERFACE_INDEX"]):
    print("no such cable")
    sys.exit("the switch is on fire")
"""


def write_script(root: Path, name: str) -> Path:
    path = root / name
    path.write_text(SCRIPT.format(python=sys.executable, root=str(root), name=name))
    path.chmod(0o755)
    return path


def calls(n2: TestNode, script: str) -> list[dict[str, Any]]:
    file = n2.root / "calls"
    lines = file.read_text().splitlines() if file.exists() else []
    return [call for line in lines if (call := json.loads(line))["script"] == script]


def with_nics(n1: TestNode, *nics: dict[str, Any], **more: Any) -> dict[str, Any]:
    return tiny_instance(n1.root, **more) | {"nics": list(nics)}


def test_a_bridged_card_s_tap_is_a_port_of_its_bridge_while_the_guest_runs(n1: TestNode, network: Network) -> None:
    view = n1.start(with_nics(n1, PORT))
    (card,) = view["nics"]
    assert card["tap"]
    assert card == card | {"mac": MAC, "mode": "bridged", "link": "br0", "ip": ""}
    assert network.ports() == network.taps() == [card["tap"]]
    (link,) = network.ip("link", "show", card["tap"])
    assert "UP" in link["flags"]
    assert link["mtu"] == 1400
    assert MAC in n1.monitor("web1", "info network")
    assert n1.do("instance.stop", name="web1", force=True)["nics"][0]["tap"] == ""
    assert network.taps() == []


def test_the_tap_survives_the_worker_and_goes_with_the_guest(n1: TestNode, network: Network) -> None:
    tap = n1.start(with_nics(n1, PORT))["nics"][0]["tap"]
    n1.kill_worker()
    assert network.ports() == [tap]
    n1.start_worker()
    assert n1.info("web1")["nics"][0]["tap"] == tap
    assert network.ports() == [tap]
    os.kill(n1.pid("web1"), signal.SIGKILL)
    n1.until_state("web1", "crashed")
    assert network.taps() == []


def test_each_card_has_a_tap_of_its_own_and_a_reboot_new_ones(n1: TestNode, network: Network) -> None:
    other = {"mac": "52:54:00:00:00:02", "mode": "bridged", "link": "br0"}
    user = {"mac": "52:54:00:00:00:03", "mode": "user"}
    n1.start(with_nics(n1, PORT, user, other))
    view = n1.do("instance.reboot", name="web1", mode="hard")
    taps = [card["tap"] for card in view["nics"]]
    assert taps[1] == ""
    assert sorted(network.ports()) == sorted([taps[0], taps[2]])


@pytest.mark.parametrize("nic_type", ["e1000", "rtl8139"])
def test_other_models_of_cards(n1: TestNode, network: Network, nic_type: str) -> None:
    view = n1.start(with_nics(n1, PORT, hvparams={"nic_type": nic_type}))
    assert network.ports() == [view["nics"][0]["tap"]]


def test_a_bridge_that_this_host_has_not(n1: TestNode, network: Network) -> None:
    failed = n1.failure("instance.start", instance=with_nics(n1, PORT | {"link": "br1"}))
    assert failed.code == "INVALID_ARGUMENT"
    assert failed.details["errors"] == [{"field": "instance.nics[0].link", "reason": "this host has no bridge 'br1'"}]
    assert network.taps() == []


def test_a_routed_card_gets_a_host_route(n1: TestNode, network: Network) -> None:
    view = n1.start(with_nics(n1, {"mac": MAC, "mode": "routed", "ip": "192.0.2.7"}))
    tap = view["nics"][0]["tap"]
    assert network.routes() == {"192.0.2.7": tap}
    assert network.ports() == []
    n1.do("instance.stop", name="web1", force=True)
    assert network.routes() == {}


def test_a_qemu_that_refuses_leaves_no_port(n1: TestNode, network: Network) -> None:
    kernel = n1.root / "no-kernel"
    kernel.write_bytes(b"x")
    failed = n1.failure("instance.start", instance=with_nics(n1, PORT, hvparams={"kernel_path": str(kernel)}))
    assert failed.code == "QEMU_FAILED"
    assert network.taps() == []
    n1.nothing_is_left()


def test_ifup_is_told_exactly_what_the_card_is_and_nothing_of_the_worker_s(n2: TestNode, network: Network) -> None:
    routed = {"mac": "52:54:00:00:00:02", "mode": "routed", "ip": "2001:db8::7"}
    view = n2.start(with_nics(n2, PORT | {"vlan": 7}, routed, tags=["blue", "big"]))
    taps = [card["tap"] for card in view["nics"]]
    assert sorted(network.taps()) == sorted(taps)
    assert [call["argv"] for call in calls(n2, "ifup")] == [[taps[0]], [taps[1]]]
    first, second = (call["env"] for call in calls(n2, "ifup"))
    path = first["PATH"]
    assert {"/sbin", "/usr/sbin"} <= {*path.split(":")}
    common = {"PATH": path, "INSTANCE": "web1", "TAGS": "blue big"}
    assert first == common | {
        "MAC": MAC, "MODE": "bridged", "INTERFACE": taps[0], "INTERFACE_INDEX": "0", "LINK": "br0", "BRIDGE": "br0",
        "MTU": "1400", "VLAN": "7",
    }  # fmt: skip
    assert second == common | {
        "MAC": routed["mac"], "MODE": "routed", "INTERFACE": taps[1], "INTERFACE_INDEX": "1", "IP": "2001:db8::7",
    }  # fmt: skip
    n2.do("instance.stop", name="web1", force=True)
    assert [call["env"] for call in calls(n2, "ifdown")] == [first, second]


def test_tags_are_empty_where_there_are_none_and_link_is_no_bridge_in_mode_routed(n2: TestNode) -> None:
    n2.start(with_nics(n2, {"mac": MAC, "mode": "routed", "link": "100", "ip": "192.0.2.7"}))
    (call,) = calls(n2, "ifup")
    assert (call["env"]["TAGS"], call["env"]["LINK"], call["env"].get("BRIDGE")) == ("", "100", None)


@pytest.mark.parametrize("card", ["0", "1"])
def test_an_ifup_that_fails_is_quoted_and_everything_is_undone(n2: TestNode, network: Network, card: str) -> None:
    (n2.root / "fail").write_text(card)
    instance = with_nics(n2, PORT, PORT | {"mac": "52:54:00:00:00:02"}) | {"name": f"failing{card}"}
    failed = n2.failure("instance.start", instance=instance)
    assert failed.code == "NETWORK_FAILED"
    assert "Failed to configure interface" in failed.message
    assert "exit code 1" in failed.message
    assert "Network configuration script output: no such cable\nthe switch is on fire" in failed.message
    assert network.taps() == []
    assert not n2.leftovers()
    assert instance["name"] not in n2.known()
    # Each card whose ifup was begun had its ifdown, the last one first.
    assert [call["argv"] for call in calls(n2, "ifdown")] == [call["argv"] for call in calls(n2, "ifup")][::-1]
    (n2.root / "fail").unlink()
    assert n2.start(instance)["state"] == "running"


def test_a_guest_that_dies_has_its_ifdown(n2: TestNode) -> None:
    n2.start(with_nics(n2, PORT))
    os.kill(n2.pid("web1"), signal.SIGKILL)
    n2.until_state("web1", "crashed")
    assert [call["argv"] for call in calls(n2, "ifdown")] == [call["argv"] for call in calls(n2, "ifup")]


def test_a_guest_that_died_while_no_worker_ran_has_its_ifdown(n2: TestNode) -> None:
    n2.start(with_nics(n2, PORT))
    n2.kill_worker()
    os.kill(n2.pid("web1"), signal.SIGKILL)
    n2.start_worker()
    n2.until_state("web1", "crashed")
    assert [call["argv"] for call in calls(n2, "ifdown")] == [call["argv"] for call in calls(n2, "ifup")]


def test_without_rights_user_mode_works_and_a_tap_is_refused_clearly(netns: str, network: Network) -> None:
    powerless = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
    with node(prefix=("ip", "netns", "exec", netns, *powerless)) as made:
        made.start_worker()
        view = made.start(with_nics(made, {"mac": MAC, "mode": "user"}))
        assert view["state"] == "running"
        assert made.tap_fds() == []
        assert MAC in made.monitor("web1", "info network")
        failed = made.failure("instance.start", instance=with_nics(made, PORT) | {"name": "web2", "disks": []})
        assert failed.code == "NETWORK_FAILED"
        assert "CAP_NET_ADMIN" in failed.message
        assert made.known() == {"web1"}
        assert made.do("instance.stop", name="web1", force=True)["how"] == "killed"
        assert not made.leftovers()
        assert network.taps() == []
