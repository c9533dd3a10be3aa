"""The target's side of a live migration: a QEMU started with ``-incoming defer``."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from worker.errors import MigrationFailed, QemuFailed
from worker.kvm.live_migration.sample import Sample, query
from worker.kvm.qmp import Monitor

_PORT_TAKEN = "address already in use"


def uri(host: str, port: int) -> str:
    """Where a target listens, as QEMU writes it; an IPv6 address gets its brackets."""
    return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"


class Incoming:
    """A migration into the QEMU behind ``monitor``. Holds nothing: made anew, it speaks of the same migration.

    The guest stays stopped whatever comes, until somebody continues it (QEMU has ``-S``).
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def listen(self, host: str, ports: Iterable[int], *, taken: Collection[int] = ()) -> int:
        """Listen on the first free port of ``ports`` that is not in ``taken``, and return it (``migrate-incoming``).

        Raises MigrationFailed when all are taken, QemuFailed when this host does not have the address.
        """
        return self._first_free(host, ports, taken, "migrate-incoming")

    def query(self) -> Sample:
        """How it stands."""
        return query(self._monitor)

    def status(self) -> str:
        """How it stands, in QEMU's word; ``none`` until a source has connected."""
        return self.query().status

    def recover(self, host: str, ports: Iterable[int], *, taken: Collection[int] = ()) -> int:
        """Listen again for the source of a paused post-copy (``migrate-recover``); as ``listen`` otherwise."""
        return self._first_free(host, ports, taken, "migrate-recover")

    def pause_postcopy(self) -> None:
        """Break the connection of a post-copy whose source is not heard of; ``recover`` wants ``postcopy-paused``."""
        self._monitor.execute("migrate-pause")

    def announce(self) -> None:
        """Tell the network where the guest's cards are now (``announce-self``)."""
        rounds = {"initial": 50, "max": 550, "rounds": 5, "step": 100}  # QEMU's own after a migration
        self._monitor.execute("announce-self", rounds)

    def _first_free(self, host: str, ports: Iterable[int], taken: Collection[int], command: str) -> int:
        tried = 0
        for port in ports:
            if port in taken:
                continue
            tried += 1
            try:
                self._monitor.execute(command, {"uri": uri(host, port)})
            except QemuFailed as exc:
                if _PORT_TAKEN not in exc.message.lower():
                    raise
            else:
                return port
        raise MigrationFailed(
            f"no port is free for a guest to come in on {host}: {tried} refused, {len(taken)} promised to others;"
            " HOSTLER_MIGRATION_PORTS is the range",
            retryable=True,
        )
