"""Two real QEMUs on 127.0.0.1 for the migration's drivers. Their guest keeps a log on its disk, which shows any gap."""

from __future__ import annotations

import shutil
import socket
import struct
import subprocess
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from typing import Any

from hostler.payloads import Instance
from tests.nodes import until
from tests.services import missing
from worker.kvm.command_line.options import Confinement
from worker.kvm.folder import GuestFolder
from worker.kvm.launch import Sockets, greet, spawn
from worker.kvm.qmp import Event, EventLoop
from worker.kvm.tiny_guest import assemble

HOST = "127.0.0.1"
PORTS = range(53100, 53164)
RECORD_BYTES = 8192
RECORDS = 512
LOG_AT = 64 * 512
"""Where the ring of records begins on the writing guest's disk."""
LOG_END = LOG_AT + RECORDS * RECORD_BYTES

_WRITER = """
    31 C0                   ; xor ax, ax
    8E D8                   ; mov ds, ax
    8E D0                   ; mov ss, ax
    BC 00 7C                ; mov sp, 0x7C00
    88 16 00 7A             ; mov [0x7A00], dl          the drive
    FB                      ; sti
main:
    66 FF 06 00 7E          ; inc dword [0x7E00]        the record's number, its first four bytes
    66 A1 00 7E             ; mov eax, [0x7E00]
    66 25 FF 01 00 00       ; and eax, 511              its place in the ring
    66 C1 E0 04             ; shl eax, 4                16 sectors each
    66 83 C0 40             ; add eax, 64
    66 A3 =sector           ; mov [sector], eax
    BE =packet              ; mov si, packet
    8A 16 00 7A             ; mov dl, [0x7A00]
    B8 00 43                ; mov ax, 0x4300            extended write
    CD 13                   ; int 0x13
    EB ~main                ; jmp main
"""
_PACKET = {"packet": bytes.fromhex("10001000007e0000"), "sector": bytes(8)}


def write_writer(path: Path) -> None:
    """Put the writing guest's boot sector onto a raw image: it writes numbered records for ever, in a ring."""
    code = assemble(_WRITER, _PACKET, {}, 0x7C00)
    with path.open("r+b") as disk:
        disk.write(code.ljust(510, b"\0") + b"\x55\xaa")


def log_of(raw: Path) -> int:
    """The last record's number on a raw image. No record may be missing: each place holds the latest of its own."""
    found = {}
    with raw.open("rb") as disk:
        for place in range(RECORDS):
            disk.seek(LOG_AT + place * RECORD_BYTES)
            found[place] = struct.unpack("<I", disk.read(4))[0]
    last = max(found.values())
    # The guest may have been stopped before the last record that it counted.
    wanted = {number % RECORDS: number for number in range(max(1, last - RECORDS + 1), last + 1)}
    assert {place: number for place, number in found.items() if number} == wanted
    return last


class Peer:
    """One side: a QEMU started as the worker starts it, stopped before its first instruction or waiting for a guest."""

    def __init__(self, loop: EventLoop, root: Path, instance: dict[str, Any], confinement: Confinement) -> None:
        self.events: list[str] = []
        self.changed = threading.Event()
        self.uuid = str(uuid.uuid4())
        self.folder = GuestFolder.of(root, self.uuid)
        self.folder.create()
        if confinement.chroot:
            self.folder.chroot.mkdir(mode=0o700)
            confinement = Confinement(confinement.run_as, str(self.folder.chroot))
        sockets = Sockets.bind(self.folder, serial=True)
        binary = Path(str(which("qemu-system-x86_64")))
        self.process = spawn(
            binary, Instance.model_validate(instance), self.folder, sockets, {},
            uuid=self.uuid, accelerator="tcg", confinement=confinement,
        )  # fmt: skip
        sockets.close()
        self.monitor = greet(loop, self.process, self.folder, 30, self._note)
        self.ask = self.monitor.execute

    def _note(self, event: Event) -> None:
        self.events.append(str(event["event"]))
        self.changed.set()

    def close(self) -> None:
        self.monitor.close()
        self.process.kill(grace_s=0)
        self.process.close()

    def migration(self) -> str:
        return str(self.ask("query-migrate").get("status", "none"))

    def counter(self) -> int:
        """How many records the writing guest has counted."""
        said = self.ask("human-monitor-command", {"command-line": "xp /1wx 0x7e00"})
        return int(str(said).split()[-1], 16)

    def until_counting(self, more: int = 200) -> int:
        began = self.counter()
        return until(lambda: (now := self.counter()) > began + more and now, what="the guest writes") or 0

    def until_migration(self, *statuses: str) -> str:
        def look() -> str | None:
            return found if (found := self.migration()) in statuses else None

        return until(look, what=f"the migration is {statuses}, not {self.migration()}") or ""

    def nbd_is_left(self) -> list[str]:
        """Whatever mirrors and exports left in this QEMU."""
        left = [job["id"] for job in self.ask("query-jobs")] + [each["id"] for each in self.ask("query-block-exports")]
        nodes = self.monitor.block_nodes().items()
        return left + [name for name, node in nodes if node["drv"] in ("nbd", "mirror_top")]


class Authority:
    """Issues certificates as tls-creds-x509 wants them."""

    def __init__(self, folder: Path) -> None:
        if not which("openssl"):
            missing("openssl", "not on PATH")
        folder.mkdir()
        self.folder = folder
        more = ["-subj", "/CN=authority", "-addext", "keyUsage=critical,keyCertSign", "-out", "ca-cert.pem"]
        self._request("ca", "-x509", *more)

    def issue(self, folder: Path, *, server: str = "DNS:n2.example,IP:127.0.0.1", days: int = 2) -> Path:
        """A node's folder; ``server`` are the names and addresses under which it may be connected to."""
        folder.mkdir()
        shutil.copy(self.folder / "ca-cert.pem", folder)
        for endpoint, more in (("server", ["-addext", f"subjectAltName={server}"]), ("client", [])):
            name = str(folder / endpoint)
            usage = ["-addext", f"extendedKeyUsage={endpoint}Auth", "-addext", "basicConstraints=critical,CA:false"]
            self._request(name, "-subj", f"/CN={endpoint}", *usage, *more, "-out", f"{endpoint}.csr")
            signer = ["-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial", "-days", str(days)]
            extensions = ["-copy_extensions", "copy", "-in", f"{endpoint}.csr", "-out", f"{name}-cert.pem"]
            self._openssl("x509", "-req", *signer, *extensions)
        return folder

    def _request(self, name: str, *more: str) -> None:
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}-key.pem"]
        self._openssl("req", *key, *more)

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)


@contextmanager
def peers(
    loop: EventLoop,
    root: Path,
    disks: tuple[list[dict[str, Any]], list[dict[str, Any]]],
    confinement: Confinement = Confinement(),  # noqa: B008
    **hvparams: Any,
) -> Iterator[tuple[Peer, Peer]]:
    """The source, not yet running, and the target; each with its own disks."""
    made: list[Peer] = []
    try:
        for number, own in enumerate(disks):
            incoming = ["-incoming", "defer"] if number else []
            instance = {
                "name": "web1", "memory_mib": 16, "vcpus": 1, "disks": own,
                "hvparams": {"kvm_extra": incoming, **hvparams},
            }  # fmt: skip
            made.append(Peer(loop, root, instance, confinement))
        yield made[0], made[1]
    finally:
        for each in made:
            each.close()


def prepare(source: Peer, target: Peer, tls: str = "", hostname: str = "") -> int:
    """Have the target listen; the port. The source pauses before the switch, the target opens its disks at the end."""
    both = [{"capability": "late-block-activate", "state": True}, {"capability": "events", "state": True}]
    target.ask("migrate-set-capabilities", {"capabilities": both})
    paused = [*both, {"capability": "pause-before-switchover", "state": True}]
    source.ask("migrate-set-capabilities", {"capabilities": paused})
    source.ask("migrate-set-parameters", {"tls-creds": tls, "tls-hostname": hostname})
    target.ask("migrate-set-parameters", {"tls-creds": tls})
    port = free_port()
    target.ask("migrate-incoming", {"uri": f"tcp:{HOST}:{port}"})
    return port


def free_port() -> int:
    for port in reversed(PORTS):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def same(one: Path, one_format: str, other: Path, other_format: str) -> bool:
    """Whether two images that nobody writes to hold the same."""
    command = ["qemu-img", "compare", "-U", "-f", one_format, "-F", other_format, str(one), str(other)]
    return subprocess.run(command, capture_output=True).returncode == 0
