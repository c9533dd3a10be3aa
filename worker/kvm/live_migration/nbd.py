"""A look at a target's exported disk before QEMU connects to it: is it there, may we have it, how large is it.

QEMU opens a node in its main loop, and its guest stands still until it has succeeded or given up. What it would be
refused is therefore found out here first, with the certificates that it would show. Reference: the NBD protocol.
"""

from __future__ import annotations

import socket
import ssl
import struct
from dataclasses import dataclass
from pathlib import Path

from worker.errors import MigrationFailed
from worker.kvm.live_migration.tls import CREDENTIALS, client_context

TIMEOUT_S = 5.0
"""For each answer of the target's."""
_GREETING = b"NBDMAGICIHAVEOPT"
_FLAGS = struct.pack(">I", 0b11)
_REQUEST = struct.Struct(">8sII")
_REPLY = struct.Struct(">QIII")
_REPLY_MAGIC = 0x3E889045565A9
_ABORT, _START_TLS, _INFO = 2, 5, 6
_ACK, _INFO_REPLY, _ERROR = 1, 3, 1 << 31
_WHY = {
    _ERROR + 1: "it does not know this request",
    _ERROR + 2: "it serves its disks otherwise: in clear text or to other names only",
    _ERROR + 5: "it serves its disks in TLS only",
    _ERROR + 6: "it has no such disk",
}
_LONGEST = 65536


@dataclass(frozen=True)
class Tls:
    """With what a source shows who it is, and knows the target: the folder, also as QEMU's object ``creds``.

    ``hostname`` is the name that the target's certificate must have; empty is the address it is reached at.
    """

    folder: Path
    hostname: str = ""
    creds: str = CREDENTIALS


@dataclass(frozen=True)
class Address:
    """Where a target's disks are reached; with ``tls`` not in clear text."""

    host: str
    port: int
    tls: Tls | None = None

    def __str__(self) -> str:
        return f"{self.host} port {self.port}"


def size_of(address: Address, disk: str) -> int:
    """How large an exported disk is, in bytes. Raises MigrationFailed saying what is wrong; the target goes on."""
    context = _context(address.tls) if address.tls else None
    try:
        with socket.create_connection((address.host, address.port), TIMEOUT_S) as connection:
            connection.settimeout(TIMEOUT_S)
            return _ask(connection, address, disk, context)
    except ssl.SSLError as exc:
        why = getattr(exc, "verify_message", "") or exc.reason or str(exc)
        raise MigrationFailed(f"TLS with the target at {address} failed: {why}") from exc
    except OSError as exc:
        raise MigrationFailed(f"the target's disks cannot be reached at {address}: {exc}", retryable=True) from exc


def _context(tls: Tls) -> ssl.SSLContext:
    try:
        return client_context(tls.folder)
    except OSError as exc:
        raise MigrationFailed(f"the certificates in {tls.folder} cannot be used: {exc}; nothing was begun") from exc


def _ask(connection: socket.socket, address: Address, disk: str, context: ssl.SSLContext | None) -> int:
    if (said := _read(connection, len(_GREETING) + 2))[:-2] != _GREETING:
        raise MigrationFailed(f"what answers at {address} is no NBD server: {said!r}")
    connection.sendall(_FLAGS)
    if address.tls is None or context is None:
        return _size(connection, address, disk)
    _send(connection, _START_TLS)
    _receive(connection, address)
    with context.wrap_socket(connection, server_hostname=address.tls.hostname or address.host) as encrypted:
        try:
            return _size(encrypted, address, disk)
        except ConnectionError as exc:
            # In TLS 1.3 our side is done with the handshake before the target has judged us.
            raise MigrationFailed(
                f"TLS with the target at {address} failed: it hung up, most likely because it does not accept the "
                f"certificate in {address.tls.folder}"
            ) from exc


def _size(connection: socket.socket, address: Address, disk: str) -> int:
    name = disk.encode()
    _send(connection, _INFO, struct.pack(">I", len(name)) + name + struct.pack(">H", 0))
    size = None
    while (reply := _receive(connection, address))[0] != _ACK:
        kind, data = reply
        if kind == _INFO_REPLY and data[:2] == b"\0\0":
            size = int.from_bytes(data[2:10], "big")
    _send(connection, _ABORT)  # or the target complains in its log
    _receive(connection, address)
    if size is None:
        raise MigrationFailed(f"the target at {address} does not say how large its {disk} is")
    return size


def _send(connection: socket.socket, option: int, data: bytes = b"") -> None:
    connection.sendall(_REQUEST.pack(b"IHAVEOPT", option, len(data)) + data)


def _receive(connection: socket.socket, address: Address) -> tuple[int, bytes]:
    magic, _, kind, length = _REPLY.unpack(_read(connection, _REPLY.size))
    if magic != _REPLY_MAGIC or length > _LONGEST:
        raise MigrationFailed(f"what answers at {address} is no NBD server")
    data = _read(connection, length)
    if kind & _ERROR:
        said = data.decode(errors="replace")
        raise MigrationFailed(f"the target at {address} refused: {_WHY.get(kind) or said or f'error {kind - _ERROR}'}")
    return kind, data


def _read(connection: socket.socket, length: int) -> bytes:
    received = b""
    while len(received) < length:
        if not (part := connection.recv(length - len(received))):
            raise ConnectionResetError("it hung up")
        received += part
    return received
