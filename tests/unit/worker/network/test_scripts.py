"""Network scripts: what they are told, and what is made of how they end."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from hostler.payloads import Nic
from tests.nodes import until
from tests.unit.worker.network.hosts import Host, host, tools
from worker.errors import NetworkFailed
from worker.network import links
from worker.network.scripts import environment, run, shipped

MAC = "52:54:00:12:34:56"
BASE = {
    "PATH": links.SEARCH_PATH,
    "INSTANCE": "web1",
    "MAC": MAC,
    "INTERFACE": "tap0",
    "INTERFACE_INDEX": "0",
    "TAGS": "",
}
Script = Callable[[str], Path]

__all__ = ["host"]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Makes an executable script."""

    def write(text: str) -> Path:
        path = tmp_path / "ifup"
        path.write_text(text)
        path.chmod(0o755)
        return path

    return write


@pytest.mark.parametrize(
    ("nic", "told"),
    [
        (Nic(mac=MAC, mode="bridged", link="br0"), {"MODE": "bridged", "LINK": "br0", "BRIDGE": "br0"}),
        (
            Nic(mac=MAC, mode="bridged", link="br0", ip="192.0.2.7"),
            {"MODE": "bridged", "LINK": "br0", "BRIDGE": "br0", "IP": "192.0.2.7"},
        ),
        (Nic(mac=MAC, mode="routed"), {"MODE": "routed"}),
        (Nic(mac=MAC, mode="routed", link="100"), {"MODE": "routed", "LINK": "100"}),
        (
            Nic(mac=MAC, mode="routed", link="100", ip="2001:db8::7"),
            {"MODE": "routed", "LINK": "100", "IP": "2001:db8::7"},
        ),
        (
            Nic(mac=MAC, mode="bridged", link="br0", vlan=7),
            {"MODE": "bridged", "LINK": "br0", "BRIDGE": "br0", "VLAN": "7"},
        ),
        (
            Nic(mac=MAC, mode="openvswitch", link="ovs0", vlan=4094),
            {"MODE": "openvswitch", "LINK": "ovs0", "VLAN": "4094"},
        ),
        (
            Nic(mac=MAC, mode="bridged", link="br9000"),
            {"MODE": "bridged", "LINK": "br9000", "BRIDGE": "br9000", "MTU": "9000"},
        ),
        (Nic(mac=MAC, mode="openvswitch", link="br9000"), {"MODE": "openvswitch", "LINK": "br9000", "MTU": "9000"}),
        (Nic(mac=MAC, mode="routed", link="br9000"), {"MODE": "routed", "LINK": "br9000"}),
    ],
)
def test_a_script_is_told_all_about_its_card_and_nothing_that_does_not_apply(
    nic: Nic, told: dict[str, str], host: Host
) -> None:
    host.has("br9000", mtu="9000")
    assert environment("web1", [], 0, nic, "tap0") == BASE | told


def test_tags_are_joined_by_spaces_and_the_index_counts_cards() -> None:
    told = environment("db.example.org", ["a:b", "web"], 3, Nic(mac=MAC, mode="routed"), "tap7")
    assert (told["INSTANCE"], told["TAGS"], told["INTERFACE_INDEX"], told["INTERFACE"]) == (
        "db.example.org",
        "a:b web",
        "3",
        "tap7",
    )


def test_w46_a_script_sees_its_own_environment_and_none_of_the_workers(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOSTLER_DATABASE_URL", "postgresql://secret@db/")
    seen = tmp_path / "seen.json"
    path = script(
        f"#!{sys.executable} -IS\nimport json, os, sys\n"
        f"facts = [dict(os.environ), sys.argv[1:], os.getcwd(), sys.stdin.read()]\n"
        f"open({str(seen)!r}, 'w').write(json.dumps(facts))\n"
    )
    told = environment("web1", ["a"], 0, Nic(mac=MAC, mode="bridged", link="br0"), "tap0")
    run(path, "tap0", told)
    variables, arguments, folder, read = json.loads(seen.read_text())
    assert {name: value for name, value in variables.items() if name != "LC_CTYPE"} == told  # CPython adds that one
    assert (arguments, folder, read) == (["tap0"], "/", "")


def test_no_descriptor_of_the_workers_reaches_a_script(script: Script, tmp_path: Path) -> None:
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        with pytest.raises(NetworkFailed) as failed:
            run(script("#!/bin/sh\nls -l /proc/self/fd\nexit 1\n"), "tap0", BASE)
    assert str(tmp_path / "open") not in failed.value.message


def test_a_script_that_fails_is_quoted_with_all_it_said(script: Script) -> None:
    with pytest.raises(NetworkFailed) as failed:
        run(script("#!/bin/sh\necho to stdout\necho 'to stderr' >&2\nexit 3\n"), "tap9", BASE)
    assert failed.value.message == (
        "Failed to configure interface tap9: exited with exit code 3. "
        "Network configuration script output: to stdout\nto stderr"
    )
    assert failed.value.details["retryable"] is False


def test_what_a_script_says_becomes_text_that_any_database_can_keep(script: Script) -> None:
    with pytest.raises(NetworkFailed) as failed:
        run(script("#!/bin/sh\nprintf 'caf\\303\\251 \\377 \\000 end'\nexit 1\n"), "tap0", BASE)
    assert failed.value.message.endswith("output: café \N{REPLACEMENT CHARACTER} \N{REPLACEMENT CHARACTER} end")


def test_of_a_flood_of_output_the_end_is_quoted(script: Script) -> None:
    with pytest.raises(NetworkFailed) as failed:
        run(script("#!/bin/sh\nyes | head -c 3000000\necho the last words\nexit 1\n"), "tap0", BASE)
    assert failed.value.message.endswith("the last words")
    assert len(failed.value.message) < 10_000


def test_a_script_that_is_killed_is_told_so(script: Script) -> None:
    with pytest.raises(NetworkFailed, match=r"tap0: signal 9\. Network"):
        run(script("#!/bin/sh\nkill -9 $$\n"), "tap0", BASE)


def test_what_a_script_says_when_all_is_well_is_its_own_affair(script: Script) -> None:
    run(script("#!/bin/sh\necho hello\n"), "tap0", BASE)


def test_a_script_that_takes_too_long_is_killed_with_all_it_started(script: Script, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    path = script(f"#!/bin/sh\nsleep 600 &\necho $$ $! > {pids}.new\nmv {pids}.new {pids}\nwait\n")
    with pytest.raises(NetworkFailed, match=r"did not end within 0\.5 s and was killed"):
        run(path, "tap0", BASE, timeout_s=0.5)
    started = [int(pid) for pid in until(lambda: pids.exists() and pids.read_text()).split()]
    assert len(started) == 2
    until(lambda: not any(alive(pid) for pid in started))


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_script_that_leaves_a_daemon_behind_has_ended_all_the_same(script: Script, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    run(script(f"#!/bin/sh\nsleep 600 &\necho $! > {pid}\n"), "tap0", BASE, timeout_s=20.0)
    daemon = psutil.Process(int(pid.read_text()))
    assert daemon.is_running()
    daemon.kill()


@pytest.mark.parametrize(
    ("text", "mode", "reason"),
    [
        ("#!/bin/sh\n", 0o644, "Permission denied"),
        ("#!/no/such/shell\n", 0o755, "No such file or directory"),
        ("not a script", 0o755, "Exec format error"),
    ],
)
def test_a_script_that_cannot_be_run_is_told_so(script: Script, text: str, mode: int, reason: str) -> None:
    path = script(text)
    path.chmod(mode)
    with pytest.raises(NetworkFailed, match=f"Failed to configure interface tap0: cannot run {path}: {reason}"):
        run(path, "tap0", BASE)


def test_a_script_that_is_missing_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(NetworkFailed, match=r"cannot run .*no-such: No such file"):
        run(tmp_path / "no-such", "tap0", BASE)


@pytest.mark.parametrize("name", ["ifup", "ifdown"])
def test_the_scripts_that_come_with_hostler_are_there_and_are_shell(name: str) -> None:
    path = shipped(name)
    assert path.stat().st_mode & stat.S_IXUSR
    assert subprocess.run(["sh", "-n", str(path)], capture_output=True).returncode == 0


def test_the_shipped_ifup_refuses_a_mode_it_does_not_know() -> None:
    with pytest.raises(NetworkFailed, match=r"exit code 1.*unknown MODE 'magic'"):
        run(shipped("ifup"), "tap0", BASE | {"MODE": "magic"})


def test_the_shipped_ifup_says_what_is_wrong_with_a_bridge_that_is_not_there() -> None:
    with pytest.raises(NetworkFailed, match=r"output: .*no-such-br"):
        run(shipped("ifup"), "tap0", BASE | {"MODE": "bridged", "LINK": "no-such-br", "BRIDGE": "no-such-br"})


def test_the_shipped_ifdown_has_nothing_to_do_when_the_tap_is_gone() -> None:
    run(shipped("ifdown"), "hst-no-such", BASE | {"MODE": "bridged", "LINK": "br0", "BRIDGE": "br0"})


def ran(name: str, tmp_path: Path, nic: Nic, instance: str = "web1", **answers: str) -> list[str]:
    """The commands that a shipped script runs for a card, instead of which only ``answers`` are given."""
    env = environment(instance, [], 0, nic, "hst-no-such") | {"PATH": f"{tools(tmp_path, **answers)}:/usr/bin:/bin"}
    run(shipped(name), "hst-no-such", env)
    commands = tmp_path / "commands"
    return commands.read_text().splitlines() if commands.exists() else []


OVS = Nic(mac=MAC, mode="openvswitch", link="ovs0")


def test_ifup_makes_a_port_of_open_vswitch_in_one_transaction_that_replaces_what_an_earlier_tap_left(
    tmp_path: Path, host: Host
) -> None:
    assert ran("ifup", tmp_path, OVS, "1.example.org") == [
        "ovs-vsctl --timeout=10 -- --if-exists del-port hst-no-such -- add-port ovs0 hst-no-such tag=0 "
        '-- set Interface hst-no-such external-ids:hostler="1.example.org"',
        "ip link set dev hst-no-such up",
    ]


def test_ifup_tags_a_port_of_open_vswitch_and_gives_the_tap_the_bridges_mtu(tmp_path: Path, host: Host) -> None:
    host.has("ovs0", mtu="9000")
    mtu, port, up = ran("ifup", tmp_path, OVS.model_copy(update={"vlan": 12}))
    assert (mtu, up) == ("ip link set dev hst-no-such mtu 9000", "ip link set dev hst-no-such up")
    assert " -- add-port ovs0 hst-no-such tag=12 -- " in port


@pytest.mark.parametrize("owner", ['"web1"', "web1"])
def test_ifdown_removes_the_guests_port_of_open_vswitch_though_the_tap_is_gone(tmp_path: Path, owner: str) -> None:
    assert ran("ifdown", tmp_path, OVS, ovs_vsctl=owner) == [
        "ovs-vsctl --timeout=10 --if-exists get Interface hst-no-such external-ids:hostler",
        "ovs-vsctl --timeout=10 --if-exists del-port hst-no-such",
    ]


@pytest.mark.parametrize("owner", ["web2", "", "[]"])
def test_ifdown_leaves_a_port_of_open_vswitch_that_is_not_the_guests(tmp_path: Path, owner: str) -> None:
    assert len(ran("ifdown", tmp_path, OVS, ovs_vsctl=owner)) == 1


def test_an_open_vswitch_that_does_not_answer_makes_ifdown_fail(tmp_path: Path) -> None:
    with pytest.raises(NetworkFailed, match=r"exit code 3"):
        ran("ifdown", tmp_path, OVS, ovs_vsctl="!3")


@pytest.mark.parametrize("own", ["1", "0", "7"])
def test_ifup_puts_a_bridge_s_port_into_its_vlan_alone_before_it_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str
) -> None:
    """Which VLAN is the bridge's own is read from /sys: ``cat`` answers here instead."""
    monkeypatch.setattr(links, "INTERFACES", tmp_path)
    commands = ran("ifup", tmp_path, Nic(mac=MAC, mode="bridged", link="br0", vlan=7), cat=own)
    assert commands == [
        "ip link set dev hst-no-such master br0",
        "cat /sys/class/net/br0/bridge/default_pvid",
        *([f"bridge vlan del dev hst-no-such vid {own}"] if own != "0" else []),
        "bridge vlan add dev hst-no-such vid 7 pvid untagged",
        "ip link set dev hst-no-such up",
    ]


@pytest.mark.parametrize(("link", "table"), [("", ""), ("100", " table 100")])
def test_ifup_gives_a_routed_card_a_route_and_an_ipv6_guest_a_gateway(
    tmp_path: Path, host: Host, link: str, table: str
) -> None:
    nic = Nic(mac=MAC, mode="routed", link=link, ip="2001:db8::7")
    assert ran("ifup", tmp_path, nic) == [
        "ip link set dev hst-no-such up",
        "ip -6 address replace fe80::1/64 dev hst-no-such nodad",
        f"ip -6 route replace 2001:db8::7 dev hst-no-such{table}",
    ]
