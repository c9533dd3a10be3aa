"""What is found out about this host's bridges and forwarding before a card is connected."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostler.payloads import Nic
from tests.unit.worker.network.hosts import Host, host, tools
from worker.network import links

__all__ = ["host"]

MAC = "52:54:00:12:34:56"
BRIDGED = Nic(mac=MAC, mode="bridged", link="br0")
TAGGED = Nic(mac=MAC, mode="bridged", link="br0", vlan=7)
OVS = Nic(mac=MAC, mode="openvswitch", link="ovs0")


def test_a_bridge_that_is_not_there(host: Host) -> None:
    assert links.problem(BRIDGED) == ("link", "this host has no bridge 'br0'")


def test_an_interface_that_is_no_bridge(host: Host) -> None:
    host.has("br0", mtu="1500")
    assert links.problem(BRIDGED) == ("link", "'br0' is an interface of this host and no Linux bridge")


@pytest.mark.parametrize("files", [{"bridge__vlan_filtering": "0"}, {"bridge__root_id": "0"}])
def test_a_vlan_needs_a_bridge_that_filters_vlans(host: Host, files: dict[str, str]) -> None:
    host.has("br0", **files)
    assert links.problem(BRIDGED) is None
    assert links.problem(TAGGED) == (
        "vlan",
        "the bridge 'br0' does not filter VLANs; `ip link set br0 type bridge vlan_filtering 1` makes it",
    )


def test_a_bridge_that_filters_vlans(host: Host) -> None:
    host.has("br0", bridge__vlan_filtering="1")
    assert (links.problem(BRIDGED), links.problem(TAGGED)) == (None, None)


def test_a_host_without_open_vswitch(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "SEARCH_PATH", str(host.bin))
    assert links.problem(OVS) == ("mode", f"this host has no Open vSwitch: no ovs-vsctl in {host.bin}")


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("", None),
        ("!2", ("link", "this host's Open vSwitch has no bridge 'ovs0'")),
        ("!1", ("mode", "this host's Open vSwitch does not answer: 1")),
    ],
)
def test_open_vswitch_is_asked_for_its_bridge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, problem: tuple[str, str] | None
) -> None:
    monkeypatch.setattr(links, "SEARCH_PATH", f"{tools(tmp_path, ovs_vsctl=answer)}:/usr/bin:/bin")
    assert links.problem(OVS) == problem
    assert (tmp_path / "commands").read_text() == "ovs-vsctl --timeout=5 br-exists ovs0\n"


@pytest.mark.parametrize(
    ("ip", "name", "key"),
    [
        ("192.0.2.7", "ipv4/ip_forward", "net.ipv4.ip_forward"),
        ("2001:db8::7", "ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding"),
    ],
)
def test_a_host_that_does_not_forward_is_told_of(host: Host, ip: str, name: str, key: str) -> None:
    nic = Nic(mac=MAC, mode="routed", ip=ip)
    for value in ("1", "2"):
        host.sets(name, value)
        assert links.warning(nic) is None
    host.sets(name, "0")
    field, reason = links.warning(nic) or ("", "")
    assert (field, key in reason) == ("ip", True)


@pytest.mark.parametrize("nic", [BRIDGED, OVS, Nic(mac=MAC, mode="user"), Nic(mac=MAC, mode="routed")])
def test_forwarding_is_of_no_interest_to_a_card_without_a_route(host: Host, nic: Nic) -> None:
    host.sets("ipv4/ip_forward", "0")
    assert links.warning(nic) is None


@pytest.mark.parametrize("nic", [Nic(mac=MAC, mode="user"), Nic(mac=MAC, mode="routed", ip="192.0.2.7")])
def test_other_modes_need_nothing_of_the_host(host: Host, nic: Nic) -> None:
    assert links.problem(nic) is None


@pytest.mark.parametrize("mode", ["routed", "user"])
def test_a_vlan_is_refused_where_there_is_no_bridge(mode: str) -> None:
    with pytest.raises(ValueError, match=f"vlan: a card of mode {mode} is on no bridge"):
        Nic.model_validate({"mac": MAC, "mode": mode, "vlan": 7})


@pytest.mark.parametrize("vlan", [-1, 4095, "7", 7.0, True])
def test_a_vlan_that_802_1q_does_not_have_is_refused(vlan: object) -> None:
    with pytest.raises(ValueError, match="vlan"):
        Nic.model_validate({"mac": MAC, "link": "br0", "vlan": vlan})


def test_a_card_of_open_vswitch_needs_its_bridges_name() -> None:
    with pytest.raises(ValueError, match="link: a card of mode openvswitch needs the bridge's name"):
        Nic.model_validate({"mac": MAC, "mode": "openvswitch"})
