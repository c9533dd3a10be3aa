"""The source's part: the guest's memory on its way, up to the moment at which QEMU says that the target has all.

Whoever comes here, the first time or after its predecessor died, asks QEMU how far it is, and goes on from there: QEMU
goes on without us.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import structlog
from sqlalchemy.orm import Session

from hostler.contract import InstanceState
from models import LiveMigration, utc_now
from worker.errors import LinkLost, MigrationFailed, OperationError, QmpLost
from worker.kvm.live_migration.capabilities import prepare
from worker.kvm.live_migration.convergence import Convergence, Decision, Limits
from worker.kvm.live_migration.follow import follow
from worker.kvm.live_migration.incoming import uri
from worker.kvm.live_migration.outgoing import Outgoing, Sample
from worker.kvm.live_migration.progress import Progress
from worker.kvm.live_migration.sample import (
    COMPLETED,
    FAILED,
    GIVEN_UP,
    HANDED_ON,
    POSTCOPY_PAUSED,
    PRE_SWITCHOVER,
)
from worker.kvm.live_migration.tls import CREDENTIALS
from worker.operations.context import JobContext, NodeContext
from worker.operations.guests import Guest, Guests
from worker.operations.live_migration import rows, security, storage
from worker.operations.live_migration.checks import deadline_s
from worker.operations.live_migration.rows import Stage
from worker.operations.live_migration.teller import TRANSFER_FROM, Teller
from worker.operations.live_migration.tuning import MIB, bandwidth_mib_s, downtime_ms, is_live, options_of, tuning_of

log = structlog.get_logger(__name__)

CANCEL_S, CANCEL_LOOK_S = 10.0, 0.02


class Transfer:
    """One worker's part in one migration."""

    def __init__(self, node: NodeContext, guests: Guests, job: JobContext, row: LiveMigration) -> None:
        self._node = node
        self._job = job
        self._row = row
        self._guest: Guest = guests.need(row.instance_name)
        self._qemu = Outgoing(self._guest.talk())
        self._progress = Progress(downtime_ms(row))
        self._teller = Teller(node, job, row.job_id)
        self._decisions: list[dict[str, Any]] = list((row.report or {}).get("decisions", []))
        self._convergence = Convergence(self._limits())

    def run(self) -> dict[str, Any]:
        """Return when the target has all, or, with post-copy, may begin, what there is to report: it is the target's
        as soon as that is written down, and this QEMU never continues it by itself.

        Raises MigrationFailed when QEMU gives it up, Cancelled when the job was asked to; the guest then runs on here.
        Raises QmpLost when QEMU keeps silent: it goes on by itself, and is asked again.
        """
        with self._teller:
            sample = self._qemu.query()
            if self._row.stage == Stage.TRANSFERRING:
                # Before the switch an end is that of an earlier migration. One that failed while no worker looked is
                # begun again, and fails again if it has to.
                if sample.ended or self._job.last_phase()[0] != "transfer":
                    self._begin()
                sample = self._until_it_stands_still()
            if sample.status == PRE_SWITCHOVER:
                self._switch_over()
            sample = self._follow(HANDED_ON | GIVEN_UP, switching=True)
            if sample.status in GIVEN_UP:
                raise self._failed(sample)
        return self.report(sample)

    def finish_postcopy(self) -> Sample:
        """Return when the last of the memory has followed, or the connection broke meanwhile."""
        with self._teller:
            return self._follow(frozenset({COMPLETED, FAILED, POSTCOPY_PAUSED}), switching=True)

    def recover_postcopy(self, host: str, port: int) -> None:
        """Connect again to a target that listens again. Whether that holds is seen by ``finish_postcopy``."""
        try:
            self._qemu.recover(uri(host, port))
        except MigrationFailed as exc:
            raise LinkLost(exc.message) from exc

    def _limits(self) -> Limits:
        options = options_of(self._row)
        return Limits(
            downtime_ms=downtime_ms(self._row),
            downtime_max_ms=options.downtime_max_ms or 0,
            deadline_s=deadline_s(self._row),
            on_deadline=options.on_deadline,
            postcopy=options.postcopy,
        )

    def _begin(self) -> None:
        row = self._row
        goes_on = False
        if self._job.current_phase != "setup":
            goes_on = self._job.last_phase()[0] == "storage"  # its predecessor died while disks were copied
            set_out(self._node, self._job, row)
        creds = CREDENTIALS if row.info["tls"] else ""
        if creds and not goes_on:
            security.give_certificates(self._node, self._guest, "client")
        if self._guest.prepared_for != row.job_id:
            prepare(self._guest.talk(), tuning_of(row, tls_creds=creds), incoming=False)
        if row.info["copied"]:
            self._job.phase("storage", TRANSFER_FROM, f"copying {len(row.info['copied'])} disk(s) to node {row.target}")
            self._guest.tuned.set()  # what was changed while nobody looked counts for the copying too
            storage.copy(self._node, row, self._guest, self._teller, self._while_copying)
            self._guest.tuned.set()  # what was wished meanwhile is for the memory
        if not is_live(row) and not row.was_paused:
            self._guest.talk().pause_vcpus()
        memory_mib = row.info["instance"]["memory_mib"]
        self._job.phase("transfer", TRANSFER_FROM, f"sending {memory_mib} MiB to node {row.target}")
        assert row.host and row.port
        self._qemu.start(uri(row.host, row.port))

    def _until_it_stands_still(self) -> Sample:
        sample = self._follow(HANDED_ON | GIVEN_UP | {PRE_SWITCHOVER})
        if sample.status in GIVEN_UP:
            raise self._failed(sample)
        return sample

    def _switch_over(self) -> None:
        """The guest stands still on both sides. It is written down before QEMU is told: no cancel any more."""
        self._job.commit()
        stopped_at = self._guest.stopped_at or utc_now()
        if not rows.move_on(
            self._node, self._row.job_id, Stage.TRANSFERRING, Stage.SWITCHING, stopped_at=stopped_at
        ):  # fmt: skip
            raise MigrationFailed("the migration was given up meanwhile")
        storage.finish(self._row, self._guest)
        self._qemu.switch_over()

    def _follow(self, until: frozenset[str], *, switching: bool = False) -> Sample:
        self._guest.migration_changed.clear()
        return follow(
            self._qemu,
            self._guest.migration_changed,
            self._look,
            (lambda: None) if switching else self._before_a_look,
            until=until,
        )

    def _while_copying(self) -> None:
        self._job.check_cancelled()
        if self._guest.tuned.is_set():
            self._take_over_changes()

    def _before_a_look(self) -> None:
        self._job.check_cancelled()
        if self._row.info["copied"]:
            with suppress(QmpLost):  # how long that may last is judged by who asks about the memory
                storage.require_sound(self._guest)

    def _look(self, sample: Sample) -> None:
        """What is decided at each look, and told and kept by another thread: nothing may hold the migration up."""
        meta = self._progress.feed(sample)
        self._teller.tell(meta)
        if self._guest.tuned.is_set():
            self._take_over_changes()
        if decision := self._convergence.decide(meta, sample.total_ms / 1000):
            self._carry_out(decision)

    def _take_over_changes(self) -> None:
        """An operator has changed the limits of the migration (``tune``)."""
        self._guest.tuned.clear()
        self._row = rows.get(self._node, self._row.job_id)
        self._convergence.limits = self._limits()
        self._progress.downtime_ms = downtime_ms(self._row)
        bandwidth_bytes_s = int(bandwidth_mib_s(self._row) * MIB)
        self._qemu.tune(bandwidth_bytes_s=bandwidth_bytes_s, downtime_ms=downtime_ms(self._row))
        storage.tune(self._row, self._guest, bandwidth_bytes_s)
        wish = self._row.report.get("wish")
        if wish in ("postcopy", "force") and self._qemu.query().status in ("setup", "active"):
            self._carry_out(Decision(wish, "an operator asked for it"))

    def _carry_out(self, decision: Decision) -> None:
        self._decisions.append({"at": utc_now().isoformat(), "what": decision.what, "why": decision.why})
        log.info("live migration", migration=self._row.job_id, decision=decision.what, why=decision.why)
        if decision.what == "abort":
            raise MigrationFailed(decision.why)
        if decision.what == "raise-downtime":
            self._qemu.tune(downtime_ms=decision.value)
            self._progress.downtime_ms = decision.value or 0
        elif decision.what == "postcopy":
            self._qemu.start_postcopy()
        elif decision.what == "force":
            self._guest.talk().pause_vcpus()

    def report(self, sample: Sample) -> dict[str, Any]:
        """What QEMU and the policy say of it at its end."""
        return {
            **measured(sample),
            "setup_ms": sample.setup_ms,
            "downtime_limit_ms": downtime_ms(self._row),
            "bandwidth_mib_s": bandwidth_mib_s(self._row),
            "total_bytes": sample.total_bytes,
            "passes": sample.passes,
            "postcopy": sample.status != COMPLETED,
            "tls": bool(self._row.info["tls"]),
            "copied": [disk["path"] for disk in self._row.info["copied"]],
            "decisions": self._decisions,
        }

    def _failed(self, sample: Sample) -> OperationError:
        reason = sample.error or f"QEMU says {sample.status}"
        return MigrationFailed(f"the migration to node {self._row.target} failed: {reason}")


def prepare_ahead(guests: Guests, row: LiveMigration) -> None:
    """Tell the source's QEMU how it will be while the target makes its own; where TLS is possible both agree first."""
    guest = guests.get(row.instance_name)
    if guest and row.info["tls"] == "no":
        prepare(guest.talk(), tuning_of(row, tls_creds=""), incoming=False)
        guest.prepared_for = row.job_id


def set_out(node: NodeContext, job: JobContext, row: LiveMigration) -> None:
    """The target has accepted it: from here on the guest counts as on its way. Raises Cancelled; safe to repeat."""

    def enter(session: Session) -> None:
        if not rows.enter(session, row.job_id, Stage.ACCEPTING, Stage.TRANSFERRING):
            raise MigrationFailed("the migration was given up meanwhile", phase="accept")
        rows.set_state_in(session, node.name, row.instance_name, InstanceState.MIGRATING)

    job.phase("setup", TRANSFER_FROM, f"opening the way to node {row.target}", enter)


def measured(sample: Sample) -> dict[str, Any]:
    """What QEMU measured of a migration at its end, in the report's words."""
    return {
        "qemu_total_ms": sample.total_ms,
        "downtime_ms": sample.downtime_ms,
        "transferred_bytes": sample.transferred_bytes,
        "throughput_bytes_s": int(sample.mbps * 1e6 / 8),
    }


def give_up(guest: Guest, row: LiveMigration) -> None:
    """End a migration that the source's QEMU is at, and let the guest run on if it did before.

    Raises QmpLost when QEMU keeps silent, MigrationFailed when it cannot be ended any more.
    """
    qemu = Outgoing(guest.talk())
    deadline = time.monotonic() + CANCEL_S
    while not (sample := qemu.query()).ended:
        qemu.cancel()
        if time.monotonic() > deadline:
            raise QmpLost(f"QEMU does not end the migration (it is {sample.status})")
        time.sleep(CANCEL_LOOK_S)
    storage.end(row, guest)
    security.take_certificates(guest)
    if not row.was_paused and guest.talk().status() != "running":
        guest.talk().continue_vcpus()
