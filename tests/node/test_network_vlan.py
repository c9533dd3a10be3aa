"""Guests in VLANs, on a Linux bridge and on Open vSwitch. The switch runs in userspace, in the test's namespace:
Debian's packages of it are unpacked into a cache and not installed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.guests import default_cache_dir
from tests.node.test_network_traffic import Shell, ip, linux
from tests.nodes import TestNode, node
from tests.services import missing

pytestmark = pytest.mark.node

VLAN = {"mac": "52:54:00:00:01:04", "mode": "bridged", "link": "br1", "vlan": 100}
OVS = {"mac": "52:54:00:00:01:05", "mode": "openvswitch", "link": "ovs0"}
OVS_VLAN = {"mac": "52:54:00:00:01:06", "mode": "openvswitch", "link": "ovs0", "vlan": 100}
PACKAGES = ("openvswitch-switch", "openvswitch-common", "libxdp1")
DEADLINE_S = 300


def programs() -> Path:
    """The root of the unpacked packages, from the cache if they are there."""
    home = default_cache_dir() / "openvswitch"
    if not home.is_dir():
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="building-", dir=home.parent) as folder:
            _unpack(Path(folder))
            if not home.is_dir():  # else another process was first
                Path(folder, "root").rename(home)
    return home


def _unpack(folder: Path) -> None:
    try:
        download = ["apt-get", "download", *PACKAGES]
        subprocess.run(download, cwd=folder, capture_output=True, check=True, timeout=DEADLINE_S)
        for package in folder.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(package), str(folder / "root")], check=True, timeout=DEADLINE_S)
    except (OSError, subprocess.SubprocessError) as exc:
        missing("Open vSwitch", f"{exc}; it needs Debian with fresh package lists (apt-get update)")


class OpenVSwitch:
    """A switch of its own database and processes, with no kernel module."""

    def __init__(self, root: Path, folder: Path, netns: str) -> None:
        self._root, self._folder, self._netns = root, folder, netns
        (library,) = root.glob("usr/lib/*/libxdp.so.1")
        self._env = {
            "PATH": os.environ["PATH"], "LD_LIBRARY_PATH": str(library.parent), "OVS_RUNDIR": str(folder),
        }  # fmt: skip

    def start(self) -> None:
        usr, db = self._root / "usr", f"{self._folder}/db.sock"
        schema = str(usr / "share/openvswitch/vswitch.ovsschema")
        self._run(str(usr / "bin/ovsdb-tool"), "create", f"{self._folder}/conf.db", schema)
        own = ("--detach", "--no-chdir", "--log-file=/dev/null")
        self._run(
            str(usr / "sbin/ovsdb-server"), f"{self._folder}/conf.db", f"--remote=punix:{db}",
            f"--pidfile={self._folder}/db.pid", f"--unixctl={self._folder}/db.ctl", *own,
        )  # fmt: skip
        self._write_tool(db)
        self.vsctl("--no-wait", "init")
        self._run(
            str(usr / "lib/openvswitch-switch/ovs-vswitchd"), f"unix:{db}", "--disable-system",
            f"--pidfile={self._folder}/switch.pid", f"--unixctl={self._folder}/switch.ctl", *own,
        )  # fmt: skip

    def stop(self) -> None:
        for name in ("switch.pid", "db.pid"):
            file = self._folder / name
            if file.exists() and psutil.pid_exists(pid := int(file.read_text())):
                process = psutil.Process(pid)
                process.send_signal(signal.SIGKILL)
                process.wait(10)

    def in_path(self) -> tuple[str, ...]:
        """Words before a command that make ``ovs-vsctl`` a program of /usr/local/sbin for it; nobody else sees that."""
        mount = f'mount --bind {self._folder}/bin /usr/local/sbin && exec "$@"'
        return ("unshare", "--mount", "sh", "-c", mount, "sh")

    def vsctl(self, *arguments: str) -> str:
        return self._run(f"{self._folder}/bin/ovs-vsctl", "--timeout=20", *arguments).strip()

    def add_bridge(self, name: str, address: str) -> None:
        self.vsctl("add-br", name, "--", "set", "bridge", name, "datapath_type=netdev")
        self._configure(name, address)

    def add_port(self, bridge: str, name: str, vlan: int, address: str) -> None:
        """A port that is an interface of the host."""
        self.vsctl("add-port", bridge, name, f"tag={vlan}", "--", "set", "Interface", name, "type=internal")
        self._configure(name, address)

    def ports(self, bridge: str) -> set[str]:
        return {*self.vsctl("list-ports", bridge).split()}

    def _configure(self, interface: str, address: str) -> None:
        for change in (f"address add {address} dev {interface}", f"link set {interface} up"):
            self._run("ip", *change.split())

    def _write_tool(self, db: str) -> None:
        tool = self._folder / "bin/ovs-vsctl"
        tool.parent.mkdir()
        library = self._env["LD_LIBRARY_PATH"]
        program = f'exec {self._root}/usr/bin/ovs-vsctl --db=unix:{db} "$@"'
        tool.write_text(f"#!/bin/sh\nLD_LIBRARY_PATH={library} {program}\n")
        tool.chmod(0o755)

    def _run(self, *argv: str) -> str:
        done = subprocess.run(
            ["ip", "netns", "exec", self._netns, *argv],
            env=self._env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, (argv, done.stderr)
        return done.stdout


@contextmanager
def open_vswitch(netns: str) -> Iterator[OpenVSwitch]:
    """A running switch; at the end its processes and files are gone."""
    folder = Path(tempfile.mkdtemp(prefix="hst-ovs-", dir="/tmp"))
    made = OpenVSwitch(programs(), folder, netns)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def strict(netns: str) -> str:
    """The namespace, whose interfaces answer for their own addresses only: a ping tells which one it reached."""
    ip(netns, "link", "set", "lo", "up")
    change = ["ip", "netns", "exec", netns, "sysctl", "-qw", "net.ipv4.conf.all.arp_ignore=1"]
    subprocess.run(change, check=True)
    return netns


def cut_off(shell: Shell, address: str) -> bool:
    return shell.run(f"ping -c 2 -W 1 {address}") != 0


def test_a_guest_in_a_vlan_of_a_bridge_reaches_its_vlan_and_nothing_else(qemu: None, strict: str) -> None:
    netns = strict
    made = ["ip", "-n", netns, "link", "add", "br1", "type", "bridge", "vlan_filtering", "1", "forward_delay", "0"]
    if subprocess.run(made, capture_output=True).returncode:
        pytest.skip("this kernel's bridges know no VLANs (CONFIG_BRIDGE_VLAN_FILTERING)")
    ip(netns, "address", "add", "10.2.0.9/24", "dev", "br1")
    ip(netns, "link", "set", "br1", "up")
    ip(netns, "link", "add", "out0", "type", "veth", "peer", "name", "port0")
    ip(netns, "address", "add", "10.3.0.1/24", "dev", "out0")
    ip(netns, "link", "set", "out0", "up")
    ip(netns, "link", "set", "port0", "master", "br1", "up")
    for change in ("del dev port0 vid 1", "add dev port0 vid 100 pvid untagged"):
        subprocess.run(["bridge", "-n", netns, "vlan", *change.split()], check=True)
    with node(prefix=("ip", "netns", "exec", netns)) as n1:
        n1.start_worker()
        (card,) = n1.start(linux(n1.root, VLAN))["nics"]
        shown = subprocess.run(
            ["bridge", "-n", netns, "vlan", "show", "dev", card["tap"]], capture_output=True, text=True, check=True
        )
        assert shown.stdout.splitlines()[1].split() == [card["tap"], "100", "PVID", "Egress", "Untagged"]
        with n1.serial("linux1") as serial:
            shell = Shell(serial)
            shell.configure("ip address add 10.3.0.2/24 dev eth0", "ip address add 10.2.0.2/24 dev eth0")
            shell.configure("ip link set eth0 up")
            assert shell.reaches("10.3.0.1")
            assert cut_off(shell, "10.2.0.9")
        n1.do("instance.stop", name="linux1", force=True)
        n1.nothing_is_left()


@pytest.fixture
def switch(strict: str) -> Iterator[OpenVSwitch]:
    with open_vswitch(strict) as made:
        yield made


@pytest.fixture
def switched(qemu: None, netns: str, switch: OpenVSwitch) -> Iterator[TestNode]:
    """A node whose host has Open vSwitch: its tool is where hostler looks for tools, for this worker alone."""
    with node("n2", prefix=("ip", "netns", "exec", netns, *switch.in_path())) as made:
        made.start_worker()
        yield made


def test_a_guest_on_open_vswitch_reaches_its_vlan_and_leaves_no_port(switched: TestNode, switch: OpenVSwitch) -> None:
    switch.add_bridge("ovs0", "10.4.0.1/24")
    switch.add_port("ovs0", "inner0", 100, "10.5.0.1/24")
    view = switched.start(linux(switched.root, OVS, OVS_VLAN))
    plain, tagged = (card["tap"] for card in view["nics"])
    assert switch.ports("ovs0") == {"inner0", plain, tagged}
    assert [switch.vsctl("get", "Port", tap, "tag") for tap in (plain, tagged)] == ["0", "100"]
    assert switch.vsctl("get", "Interface", plain, "external-ids:hostler") in ("linux1", '"linux1"')
    with switched.serial("linux1") as serial:
        shell = Shell(serial)
        shell.configure(
            "ip address add 10.4.0.2/24 dev eth0", "ip link set eth0 up",
            "ip address add 10.5.0.2/24 dev eth1", "ip link set eth1 up",
        )  # fmt: skip
        assert shell.reaches("10.4.0.1")
        assert shell.reaches("10.5.0.1")
        shell.configure("ip link set eth1 down", "ip address add 10.5.0.3/24 dev eth0")
        assert cut_off(shell, "10.5.0.1")
    os.kill(switched.pid("linux1"), signal.SIGKILL)
    switched.until_state("linux1", "crashed")
    assert switch.ports("ovs0") == {"inner0"}
    failed = switched.failure(
        "instance.start", instance=linux(switched.root, OVS | {"link": "ovs9"}) | {"name": "web2"}
    )
    assert failed.details["errors"] == [
        {"field": "instance.nics[0].link", "reason": "this host's Open vSwitch has no bridge 'ovs9'"}
    ]
