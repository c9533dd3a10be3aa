"""The source's side of a live migration."""

from __future__ import annotations

import time

from worker.errors import MigrationFailed, TimedOut
from worker.kvm.live_migration.capabilities import limits
from worker.kvm.live_migration.sample import COMPLETED, POSTCOPY, POSTCOPY_PAUSED, PRE_SWITCHOVER, Sample, query
from worker.kvm.qmp import Monitor

__all__ = ["Outgoing", "Sample"]


TOTALS_TIMEOUT_S = 5.0
RECOVER_TIMEOUT_S = 10.0
_LOOK_S = 0.005


class Outgoing:
    """A migration away from the QEMU behind ``monitor``. Holds nothing: made anew, it speaks of the same migration.

    Every call raises QemuFailed with QEMU's words where it is not the time for it, and QmpLost when QEMU is silent.
    Until ``switch_over`` a failure leaves the guest here, and running if it was: QEMU itself continues it. Afterwards
    QEMU does the same up to ``completed`` or ``postcopy-active``, from where on it never continues it by itself.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def start(self, uri: str) -> None:
        """Begin to send (``migrate``). That the target is not there shows as the status ``failed``, not here."""
        self._monitor.execute("migrate", {"uri": uri})

    def query(self) -> Sample:
        """How it stands."""
        return query(self._monitor)

    def totals(self) -> Sample:
        """The last sample of a completed migration, with its times: QEMU works them out after it says ``completed``.

        Raises TimedOut when they do not come, which changes nothing about the migration.
        """
        deadline = time.monotonic() + TOTALS_TIMEOUT_S
        while not (sample := self.query()).total_ms:
            if sample.status != COMPLETED or time.monotonic() > deadline:
                raise TimedOut(f"QEMU does not say how long the migration took; its status is {sample.status}")
            time.sleep(_LOOK_S)
        return sample

    def switch_over(self) -> None:
        """Let the last part go (``migrate-continue``) from ``pre-switchover``, where the guest stands still."""
        self._monitor.execute("migrate-continue", {"state": PRE_SWITCHOVER})

    def cancel(self) -> bool:
        """Give up (``migrate_cancel``); the status becomes ``cancelled``, and the guest goes on here.

        False, and nothing is done, in post-copy: the guest is the target's, and to cancel would destroy it.
        """
        if self.query().status in POSTCOPY:
            return False
        self._monitor.execute("migrate_cancel")
        return True

    def tune(self, *, bandwidth_bytes_s: int | None = None, downtime_ms: int | None = None) -> None:
        """Change the limits of a migration under way; 0 bytes/s is unlimited, None leaves one as it is."""
        self._monitor.execute("migrate-set-parameters", limits(bandwidth_bytes_s, downtime_ms))

    def start_postcopy(self) -> None:
        """Go over to post-copy at the next chance; ``pre-switchover`` comes first, as in pre-copy."""
        self._monitor.execute("migrate-start-postcopy")

    def pause_postcopy(self) -> None:
        """Break the connection of a post-copy; both sides become ``postcopy-paused`` (``migrate-pause``)."""
        self._monitor.execute("migrate-pause")

    def recover(self, uri: str) -> Sample:
        """Go on with a paused post-copy, to where the target listens again (``migrate`` with ``resume``).

        Returns when it goes on. Raises MigrationFailed when the target cannot be reached: both sides are still paused,
        nothing is lost, and it can be tried again.
        """
        self._monitor.execute("migrate", {"uri": uri, "resume": True})
        deadline = time.monotonic() + RECOVER_TIMEOUT_S
        while (sample := self.query()).status == POSTCOPY_PAUSED:  # QEMU says nothing else of a refused connection
            if time.monotonic() > deadline:
                raise MigrationFailed(
                    f"the target could not be reached again at {uri}; the memory that is missing there is safe here",
                    retryable=True,
                    state=sample.status,
                )
            time.sleep(_LOOK_S)
        return sample
