"""What of this host a card can be connected to: its bridges and how it forwards. Looked at, never changed."""

from __future__ import annotations

import shutil
import socket
import subprocess
from ipaddress import ip_address
from pathlib import Path

import psutil

from hostler.payloads import Nic

SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where host tools are looked for, by the network scripts too: whatever the worker was started with."""
OVS_TIMEOUT_S = 5
INTERFACES = Path("/sys/class/net")
SYSCTL = Path("/proc/sys/net")

Problem = tuple[str, str]


def mtu_bytes(interface: str) -> int | None:
    """The interface's MTU; None where this host has no such interface."""
    text = _read(INTERFACES / interface / "mtu")
    return int(text) if text else None


def problem(nic: Nic) -> Problem | None:
    """Why this host cannot connect the card as the shipped scripts do: (field of the card, reason)."""
    if nic.mode == "bridged":
        return _bridge_problem(nic)
    if nic.mode == "openvswitch":
        return _openvswitch_problem(nic)
    return None


def warning(nic: Nic) -> Problem | None:
    """What of this host will keep packets from the card, though it can be connected."""
    if nic.mode != "routed" or not nic.ip:
        return None
    name = "ipv6/conf/all/forwarding" if ip_address(nic.ip).version == 6 else "ipv4/ip_forward"
    if _read(SYSCTL / name) not in ("", "0"):
        return None
    key = f"net.{name.replace('/', '.')}"
    return "ip", f"this host does not forward ({key} is not 1): the guest reaches the host and nothing beyond it"


def _bridge_problem(nic: Nic) -> Problem | None:
    interface = INTERFACES / nic.link
    if not interface.is_dir():
        return "link", f"this host has no bridge {nic.link!r}"
    if not (interface / "bridge").is_dir():
        return "link", f"{nic.link!r} is an interface of this host and no Linux bridge"
    if nic.vlan and _read(interface / "bridge/vlan_filtering") != "1":
        how = f"ip link set {nic.link} type bridge vlan_filtering 1"
        return "vlan", f"the bridge {nic.link!r} does not filter VLANs; `{how}` makes it"
    return None


def _openvswitch_problem(nic: Nic) -> Problem | None:
    tool = shutil.which("ovs-vsctl", path=SEARCH_PATH)
    if tool is None:
        return "mode", f"this host has no Open vSwitch: no ovs-vsctl in {SEARCH_PATH}"
    argv = [tool, f"--timeout={OVS_TIMEOUT_S}", "br-exists", nic.link]
    done = subprocess.run(
        argv, check=False, env={"PATH": SEARCH_PATH}, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode == 2:
        return "link", f"this host's Open vSwitch has no bridge {nic.link!r}"
    if done.returncode:
        return "mode", f"this host's Open vSwitch does not answer: {done.stderr.strip() or done.returncode}"
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def first_address() -> str:
    """This host's first address that others can reach, IPv4 before IPv6; the loopback's where there is none."""
    found = {
        address.family: address.address
        for name, addresses in reversed(psutil.net_if_addrs().items())
        for address in addresses
        if name != "lo" and not address.address.startswith(("fe80:", "169.254."))
    }
    return found.get(socket.AF_INET) or found.get(socket.AF_INET6) or "127.0.0.1"
