"""What a person types to reach a guest that ``instance.console`` told the way to."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

LOCAL_PORT = 5901
"""Where a forwarded unix socket appears on the person's own machine; any free port does."""

_SOCKET_VIEWERS = {"vnc": ["vncviewer"], "spice": ["remote-viewer"]}


def way_to(found: dict[str, Any]) -> str:
    """The command for a serial port; for a display its address, and how to forward what only the node reaches."""
    kind = found.get("kind")
    if kind == "serial":
        return shlex.join(["ssh", "-t", str(found.get("host")), shlex.join(found["command"])])
    if kind not in _SOCKET_VIEWERS:
        return str(found.get("message", found))
    return "\n".join(_on_a_socket(found) if found.get("path") else _on_a_port(found))


def _on_a_socket(found: dict[str, Any]) -> Iterator[str]:
    kind, path, node = str(found["kind"]), str(found["path"]), str(found.get("node_host"))
    yield f"{kind.upper()}: unix socket {path} on {node}; {_protection(found)}"
    yield f"  on {node}:  {shlex.join([*_SOCKET_VIEWERS[kind], str(found.get('uri') or path)])}"
    yield f"  elsewhere:  {_forward(LOCAL_PORT, _escaped(path), node)}"
    yield f"              then {kind}://127.0.0.1:{LOCAL_PORT}"


def _on_a_port(found: dict[str, Any]) -> Iterator[str]:
    host, port, node = str(found.get("host")), found.get("port"), str(found.get("node_host"))
    address = f"[{host}]" if ":" in host else host
    display = f", display {found['display']}" if "display" in found else ""
    yield f"{str(found['kind']).upper()}: {address}:{port}{display}; {_protection(found)}"
    yield f"  viewer:     {found.get('uri')}"
    if _is_loopback(host):
        yield f"  elsewhere:  {_forward(port, f'{address}:{port}', node)}"
        yield f"              then {str(found.get('uri')).replace(address, '127.0.0.1')}"


def _protection(found: dict[str, Any]) -> str:
    tls = "TLS" if found.get("tls") else "no TLS"
    return f"{tls}, {'with a password' if found.get('has_password') else 'no password'}"


def _forward(port: object, target: str, node: str) -> str:
    return shlex.join(["ssh", "-N", "-L", f"127.0.0.1:{port}:{target}", node])


def _escaped(path: str) -> str:
    """``path`` as ssh's -L takes it, where a colon would end it."""
    return path.replace("\\", "\\\\").replace(":", "\\:")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
