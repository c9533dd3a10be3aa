"""The folder of one running guest: its sockets, QEMU's log, and the journal in which QEMU writes its own events.

<run_dir>/guests/<uuid>/     mode 0700; named by uuid, because a name of 255 characters passes a socket's path limit
    qmp                      the worker's monitor
    monitor                  a person's monitor (readline)
    serial                   the serial console
    agent                    the guest agent's channel, if the guest has one
    seed.iso                 the CD made for cloud-init, if the guest has one; mode 0600, it may hold secrets
    chroot/                  all that a confined QEMU sees of the host's files: nothing
    display                  a link to the VNC or SPICE display's socket, which lies where the operator wants it
    qemu.log                 what QEMU says of itself
    journal                  every event QEMU ever sent, one JSON document a line, worker or no worker
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOG_TAIL_BYTES = 2000


class GuestFolder:
    """Paths below one guest's folder, and what is done with them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.qmp = path / "qmp"
        self.monitor = path / "monitor"
        self.serial = path / "serial"
        self.agent = path / "agent"
        self.seed = path / "seed.iso"
        self.chroot = path / "chroot"
        self.display = path / "display"
        self.log = path / "qemu.log"
        self.journal = path / "journal"

    @classmethod
    def of(cls, run_dir: Path, uuid: str) -> GuestFolder:
        """The folder for the QEMU with this uuid; it need not exist."""
        return cls(run_dir / "guests" / uuid)

    def create(self) -> None:
        """Make the folder, for its owner alone. Raises FileExistsError where it is already there."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        self.path.mkdir(mode=0o700)

    def listen(self, path: Path) -> socket.socket:
        """A listening socket at ``path``, mode 0600, to be handed to QEMU and then closed here."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.bind(str(path))
            path.chmod(0o600)
            listener.listen(1)
        except OSError:
            listener.close()
            raise
        return listener

    def adopt_socket(self, path: Path) -> None:
        """Have the display's socket at ``path``, which QEMU will make, removed with this folder."""
        self.display.symlink_to(path)

    def open_for_append(self, path: Path) -> int:
        """A descriptor to write ``path`` with; appending, so that the file can be cut while QEMU writes."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def log_tail(self) -> str:
        """The last lines QEMU said, for an error message; empty when it said nothing."""
        try:
            tail = self.log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
        except OSError:
            return ""
        return tail.replace("\0", "\N{REPLACEMENT CHARACTER}")  # which no database's text can hold

    def last_event(self, name: str) -> dict[str, Any] | None:
        """The last event of this name in QEMU's journal, None where it has none."""
        return next(self.events(name), None)

    def events(self, name: str) -> Iterator[dict[str, Any]]:
        """The events of this name in QEMU's journal, latest first; a line that a kill cut off is passed over."""
        with contextlib.suppress(OSError):
            for line in reversed(self.journal.read_bytes().splitlines()):
                with contextlib.suppress(ValueError, RecursionError):
                    event = json.loads(line)
                    if isinstance(event, dict) and event.get("event") == name:
                        yield event

    def trim_journal(self, limit_bytes: int = 256 * 1024) -> None:
        """Empty a journal that grew past ``limit_bytes``; only for a guest whose worker listens."""
        with contextlib.suppress(OSError):
            if self.journal.stat().st_size > limit_bytes:
                os.truncate(self.journal, 0)

    def remove(self) -> bool:
        """Delete the folder and all in it; False when there was none."""
        if not self.path.exists():
            return False
        if self.display.is_socket():  # a QEMU that was killed could not remove it
            self.display.readlink().unlink(missing_ok=True)
        shutil.rmtree(self.path)
        return True
