"""Certificates for the streams of a live migration: is a folder of them in order, and how QEMU gets them.

The folder holds the files under QEMU's own names for tls-creds-x509 (docs/system/tls). Both sides must show a
certificate of the same authority, and the target's must carry the name or address under which it is connected to.

A QEMU that gave up its rights cannot read the folder. It is lent a copy of what its side needs, for the moment in which
it reads it: afterwards it has all of it in memory.
"""

from __future__ import annotations

import os
import shutil
import ssl
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from worker.errors import QemuFailed
from worker.kvm.folder import GuestFolder
from worker.kvm.qmp import Monitor

Endpoint = Literal["server", "client"]

AUTHORITY = "ca-cert.pem"
REVOKED = "ca-crl.pem"
"""The authority's list of certificates that no longer count; may be missing."""
DH_PARAMS = "dh-params.pem"
"""What a target's QEMU else makes itself at each migration, for up to a second (openssl dhparam); may be missing."""
FILES = (AUTHORITY, "server-cert.pem", "server-key.pem", "client-cert.pem", "client-key.pem")
CREDENTIALS = "migration-tls"
"""The id of the object that QEMU has them in."""
_COPY = "x509"
_OPEN_TO_OTHERS = stat.S_IRWXO
_HANDSHAKE_MAX = 20


def check_folder(folder: Path) -> list[str]:
    """What is wrong with a folder of certificates, for people; empty when its server and client accept each other.

    That includes files that are missing, open to everybody, of another authority, expired, or no match for their key.
    """
    lacking = [name for name in FILES if not (folder / name).is_file()]
    problems = [f"{folder / name} is missing" for name in lacking]
    for name in FILES:
        if name.endswith("-key.pem") and name not in lacking and _mode(folder / name) & _OPEN_TO_OTHERS:
            problems.append(f"{folder / name} is open to everybody (mode {_mode(folder / name):04o}); chmod o= it")
    return problems or _handshake_problems(folder)


def client_context(folder: Path) -> ssl.SSLContext:
    """For a connection of our own to a target. Raises OSError, of which ssl.SSLError is one, for a file that is bad."""
    return _context(folder, "client")


def add_credentials(
    monitor: Monitor, folder: Path, endpoint: Endpoint, guest: GuestFolder, *, uid: int | None = None
) -> None:
    """Have QEMU read the certificates, as the object ``CREDENTIALS``; those it had before are replaced.

    ``guest`` is the folder of this QEMU, and ``uid`` whom it runs as, None where it is who started it. Raises
    QemuFailed with QEMU's reason, OSError when the files cannot be read; QEMU has none then.
    """
    remove_credentials(monitor)
    with lent(folder, endpoint, guest, uid) as seen_as:
        monitor.execute(
            "object-add",
            {
                "qom-type": "tls-creds-x509", "id": CREDENTIALS,
                "dir": seen_as, "endpoint": endpoint, "verify-peer": True,
            },
        )  # fmt: skip


def remove_credentials(monitor: Monitor) -> None:
    """Have QEMU forget the certificates; nothing happens where it has none. Connections under way keep theirs."""
    if any(each["name"] == CREDENTIALS for each in monitor.execute("qom-list", {"path": "/objects"})):
        monitor.execute("migrate-set-parameters", {"tls-creds": "", "tls-hostname": ""})
        with suppress(QemuFailed):
            monitor.execute("object-del", {"id": CREDENTIALS})


@contextmanager
def lent(folder: Path, endpoint: Endpoint, guest: GuestFolder, uid: int | None) -> Iterator[str]:
    """The certificates' folder as this QEMU can read it, meanwhile. Raises OSError; then nothing is left of it."""
    confined = guest.chroot.is_dir()
    if uid is None and not confined:
        yield str(folder)
        return
    place = guest.chroot if confined else guest.path
    take_back(guest)
    try:
        _copy(folder, endpoint, place / _COPY, uid)
        if uid is not None:
            place.chmod(0o711)  # what is in it has modes of its own
        yield f"/{_COPY}" if confined else str(place / _COPY)
    finally:
        take_back(guest)


def take_back(guest: GuestFolder) -> None:
    """Remove what was lent, also by a worker that died in the middle of it. Safe to repeat."""
    for place in (guest.path, guest.chroot):
        if (place / _COPY).is_dir():
            place.chmod(0o700)
            shutil.rmtree(place / _COPY)


def _copy(folder: Path, endpoint: Endpoint, copy: Path, uid: int | None) -> None:
    copy.mkdir(mode=0o700)
    names = [AUTHORITY, f"{endpoint}-cert.pem", f"{endpoint}-key.pem"]
    for name in names + [name for name in (REVOKED, DH_PARAMS) if (folder / name).exists()]:
        fd = os.open(copy / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write((folder / name).read_bytes())
            if uid is not None:
                os.fchown(fd, uid, -1)
    if uid is not None:
        os.chown(copy, uid, -1)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _context(folder: Path, endpoint: Endpoint) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if endpoint == "client" else ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(folder / AUTHORITY)
    if (folder / REVOKED).exists():
        context.load_verify_locations(folder / REVOKED)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    # A key with a password is refused: nobody is there to be asked for it.
    context.load_cert_chain(folder / f"{endpoint}-cert.pem", folder / f"{endpoint}-key.pem", password=lambda: "")
    return context


def _handshake_problems(folder: Path) -> list[str]:
    """Let the folder's server and client shake hands, in memory."""
    contexts: dict[Endpoint, ssl.SSLContext] = {}
    for endpoint in ("client", "server"):
        try:
            contexts[endpoint] = _context(folder, endpoint)
        except OSError as exc:
            return [f"{folder}: the {endpoint}'s files cannot be used: {_reason(exc)}"]
    contexts["client"].check_hostname = False  # which name it is connected to by is another matter
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = {
        "server": contexts["client"].wrap_bio(to_client, to_server),
        "client": contexts["server"].wrap_bio(to_server, to_client, server_side=True),
    }
    for _ in range(_HANDSHAKE_MAX):
        for judged, side in sides.items():
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLError as exc:
                return [f"{folder / f'{judged}-cert.pem'} is refused by the other side: {_reason(exc)}"]
    return []


def _reason(exc: OSError) -> str:
    return getattr(exc, "verify_message", "") or getattr(exc, "reason", "") or str(exc)
