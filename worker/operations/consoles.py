"""How a person reaches a running guest: its serial port, its VNC or SPICE display."""

from __future__ import annotations

import socket
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any

from hostler.hvchecks import FIRST_DISPLAY_PORT
from hostler.payloads import ConsoleArguments, Instance
from models import runtime_of
from worker.errors import NotRunning
from worker.kvm.command_line.display import socket_path, vnc_has_tls
from worker.kvm.folder import GuestFolder
from worker.kvm.prepared import password_files
from worker.operations.context import NodeContext
from worker.operations.guests import Guests
from worker.operations.views import view_of

Way = dict[str, Any]


def console(node: NodeContext, guests: Guests, arguments: ConsoleArguments) -> Way:
    """The way to the console of the kind asked for; without one to the first there is: serial, vnc, spice.

    Where there is none, ``kind`` is ``message`` and ``message`` says so. Nothing secret is in it: of a password, that
    there is one. Raises UnknownInstance, NotRunning.
    """
    name = arguments.name
    view_of(node, name)
    guest = guests.get(name)
    with node.database.reading() as session:
        runtime = runtime_of(session, node.name, name)
    if guest is None or runtime is None:
        raise NotRunning(f"{name} is not running, so it has no console")
    ways = _ways(Instance.model_validate(runtime.hardware), guest.folder)
    kind = arguments.kind or [*ways, "serial"][0]
    return {"instance": name} | (ways[kind]() if kind in ways else _none(name, kind, [*ways]))


def _none(name: str, kind: str, there: list[str]) -> Way:
    has = f"; it has {' and '.join(there)}" if there else ""
    what = "serial shell" if kind == "serial" else f"{kind.upper()} display"
    return {"kind": "message", "message": f"No {what} for instance {name}{has}"}


def _ways(instance: Instance, folder: GuestFolder) -> dict[str, Callable[[], Way]]:
    hvparams, ways = instance.hvparams, dict[str, Callable[[], Way]]()
    if folder.serial.exists():
        ways["serial"] = lambda: _serial(folder)
    if hvparams.vnc_bind_address:
        ways["vnc"] = lambda: _vnc(instance)
    if hvparams.spice_bind:
        ways["spice"] = lambda: _spice(instance)
    return ways


def _serial(folder: GuestFolder) -> Way:
    path = str(folder.serial)
    command = ["socat", "STDIO,raw,echo=0,escape=0x1d", f"UNIX-CONNECT:{path}"]
    return {"kind": "serial", "host": socket.gethostname(), "command": command, "path": path}


def _vnc(instance: Instance) -> Way:
    way = _display(instance, "vnc", instance.hvparams.vnc_bind_address, tls=vnc_has_tls(instance.hvparams))
    if "path" not in way:
        way |= {"display": way["port"] - FIRST_DISPLAY_PORT, "uri": f"vnc://{_in_uri(way['host'])}:{way['port']}"}
    return way


def _spice(instance: Instance) -> Way:
    way = _display(instance, "spice", instance.hvparams.spice_bind, tls=instance.hvparams.spice_use_tls)
    if "path" in way:
        return way | {"uri": f"spice+unix://{way['path']}"}
    place = f"?tls-port={way['port']}" if way["tls"] else f":{way['port']}"
    return way | {"uri": f"spice://{_in_uri(way['host'])}{place}"}


def _display(instance: Instance, kind: str, bound: str, *, tls: bool) -> Way:
    here = socket.gethostname()
    way = {"kind": kind, "node_host": here, "tls": tls, "has_password": kind in password_files(instance.hvparams)}
    if path := socket_path(instance):
        return way | {"path": str(path)}
    return way | {"host": here if ip_address(bound).is_unspecified else bound, "port": instance.network_port}


def _in_uri(host: str) -> str:
    return f"[{host}]" if ":" in host else host
