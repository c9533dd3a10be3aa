"""The way to a guest's screen, as the console job tells it: somebody who goes there meets the display."""

from __future__ import annotations

import socket
import struct
from typing import Any

import pytest

from tests.nodes import TestNode, tiny_instance
from tests.services import missing

pytestmark = pytest.mark.node

SPICE_HELLO = b"REDQ" + struct.pack("<IIIIBBIII", 2, 2, 18, 0, 1, 0, 0, 0, 18)
"""A client that opens the main channel, in SPICE's words (RedLinkMess)."""


def free_port(family: socket.AddressFamily = socket.AF_INET) -> int:
    with socket.socket(family) as probe:
        probe.bind(("", 0))
        port = int(probe.getsockname()[1])
    return port if port > 5900 else free_port(family)


def started(n1: TestNode, **hvparams: Any) -> dict[str, Any]:
    family = socket.AF_INET6 if ":" in str(hvparams) else socket.AF_INET
    instance = tiny_instance(n1.root, hvparams=hvparams)
    n1.start(instance | {"network_port": free_port(family)})
    return instance


def greeting(found: dict[str, Any], said_first: bytes = b"") -> bytes:
    """What the display that the console job told of says to somebody who comes."""
    if "path" in found:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(found["path"])
    else:
        connection = socket.create_connection((found["host"], found["port"]), 30)
    with connection:
        connection.settimeout(30)
        connection.sendall(said_first)
        return connection.recv(12)


@pytest.mark.parametrize(("address", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_vnc_on_a_port_is_met_where_the_job_says(n1: TestNode, address: str, shown: str) -> None:
    started(n1, vnc_bind_address=address)
    found = n1.do("instance.console", name="web1", kind="vnc")
    port = found["port"]
    assert greeting(found) == b"RFB 003.008\n"
    assert found == {
        "kind": "vnc", "instance": "web1", "node_host": socket.gethostname(), "host": address, "port": port,
        "display": port - 5900, "uri": f"vnc://{shown}:{port}", "tls": False, "has_password": False,
    }  # fmt: skip


def test_vnc_on_every_address_is_reached_by_the_nodes_name(n1: TestNode) -> None:
    started(n1, vnc_bind_address="0.0.0.0", serial_console=False)
    found = n1.do("instance.console", name="web1")
    assert (found["kind"], found["host"]) == ("vnc", socket.gethostname())
    assert greeting(found | {"host": "127.0.0.1"}) == b"RFB 003.008\n"


def test_w23_vnc_on_a_socket_is_a_path_and_pretends_no_port(n1: TestNode) -> None:
    started(n1, vnc_bind_address=str(n1.root))
    found = n1.do("instance.console", name="web1", kind="vnc")
    assert greeting(found) == b"RFB 003.008\n"
    assert found["path"] == f"{n1.root}/web1.vnc"
    assert not {"host", "port", "display", "uri"} & found.keys()
    shown = n1.cli("console", "web1", "-n", "n1", "--vnc")
    assert (shown.returncode, f"unix socket {n1.root}/web1.vnc" in shown.stdout) == (0, True), shown.stderr


def test_spice_is_met_on_its_port_and_on_its_socket(n1: TestNode) -> None:
    errors = n1.do("instance.check", instance=tiny_instance(n1.root, hvparams={"spice_bind": str(n1.root)}))["errors"]
    if any("has no SPICE" in error["reason"] for error in errors):
        missing("SPICE", "this QEMU has none; install qemu-system-modules-spice")
    password = n1.root / "password"
    password.write_text("geheim7\n")
    started(n1, spice_bind="127.0.0.1", spice_password_file=str(password))
    found = n1.do("instance.console", name="web1", kind="spice")
    assert greeting(found, SPICE_HELLO)[:4] == b"REDQ"
    assert (found["uri"], found["has_password"]) == (f"spice://127.0.0.1:{found['port']}", True)
    shown = n1.cli("console", "web1", "-n", "n1", "--spice")
    assert found["uri"] in shown.stdout and "geheim7" not in shown.stdout + str(found)
    n1.do("instance.stop", name="web1", force=True)
    started(n1, spice_bind=str(n1.root))
    found = n1.do("instance.console", name="web1", kind="spice")
    assert greeting(found, SPICE_HELLO)[:4] == b"REDQ"
    assert (found["uri"], "port" in found) == (f"spice+unix://{n1.root}/web1.spice", False)


def test_the_serial_port_comes_first_and_what_there_is_not_is_a_message(n1: TestNode) -> None:
    started(n1, vnc_bind_address="127.0.0.1")
    assert n1.do("instance.console", name="web1")["kind"] == "serial"
    found = n1.do("instance.console", name="web1", kind="spice")
    assert found["kind"] == "message"
    assert found["message"] == "No SPICE display for instance web1; it has serial and vnc"
    refused = n1.cli("console", "web1", "-n", "n1", "--spice")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "No SPICE display" in refused.stderr
    assert n1.failure("instance.console", name="web1", kind="telnet").code == "INVALID_ARGUMENT"
