"""What a person is told of the way to a guest."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from hostler.cli.viewers import way_to

PLAIN = {"kind": "vnc", "node_host": "n1", "tls": False, "has_password": False}


def way(**found: Any) -> list[str]:
    return way_to(PLAIN | found).splitlines()


def test_a_display_on_the_network_has_an_address_and_a_uri() -> None:
    assert way(host="192.0.2.7", port=5911, display=11, uri="vnc://192.0.2.7:5911", tls=True, has_password=True) == [
        "VNC: 192.0.2.7:5911, display 11; TLS, with a password",
        "  viewer:     vnc://192.0.2.7:5911",
    ]


@pytest.mark.parametrize(("host", "address"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_a_display_that_only_its_node_reaches_is_forwarded(host: str, address: str) -> None:
    shown = way(host=host, port=5911, display=11, uri=f"vnc://{address}:5911")
    assert shown[0] == f"VNC: {address}:5911, display 11; no TLS, no password"
    command = shlex.split(shown[2].partition("elsewhere:")[2])
    assert command == ["ssh", "-N", "-L", f"127.0.0.1:5911:{address}:5911", "n1"]
    assert shown[3].endswith("then vnc://127.0.0.1:5911")


def test_w23_a_display_on_a_socket_is_a_path_and_no_port() -> None:
    shown = way(path="/odd place/a:b.vnc")
    assert shown[0] == "VNC: unix socket /odd place/a:b.vnc on n1; no TLS, no password"
    assert shown[1] == "  on n1:  vncviewer '/odd place/a:b.vnc'"
    command = shlex.split(shown[2].partition("elsewhere:")[2])
    assert command == ["ssh", "-N", "-L", "127.0.0.1:5901:/odd place/a\\:b.vnc", "n1"]


def test_spice_with_tls_names_its_port_as_spice_does() -> None:
    shown = way(kind="spice", host="::1", port=5911, tls=True, uri="spice://[::1]?tls-port=5911")
    assert shown[0] == "SPICE: [::1]:5911; TLS, no password"
    assert shown[-1].endswith("then spice://127.0.0.1?tls-port=5911")


def test_where_there_is_nothing_the_node_says_so() -> None:
    assert way_to({"kind": "message", "message": "No serial shell for instance web1"}).startswith("No serial")
