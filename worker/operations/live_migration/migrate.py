"""The job ``instance.migrate``: what comes next, read from the stage that was recorded before it.

So the first attempt, the one after the target has done its part, and the one after a worker died are the same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NoReturn

import structlog
from sqlalchemy.exc import SQLAlchemyError

from hostler.contract import TaskName
from hostler.errors import OperationFailed
from hostler.migration import MigrateArguments
from models import LiveMigration, utc_now
from worker.errors import (
    Cancelled,
    LinkLost,
    MigrationFailed,
    NotRunning,
    OperationError,
    QemuFailed,
    QmpLost,
)
from worker.kvm.live_migration.outgoing import Outgoing
from worker.operations.context import JobContext, NodeContext
from worker.operations.guests import Guests
from worker.operations.live_migration import checks, rows
from worker.operations.live_migration.cold import move_stopped, was_moved
from worker.operations.live_migration.foretelling import foretell, last_prediction
from worker.operations.live_migration.names import ACCEPT, DISCARD, FINALIZE
from worker.operations.live_migration.other_side import end_incoming, moved_to
from worker.operations.live_migration.returned import go_on_here
from worker.operations.live_migration.rows import Stage
from worker.operations.live_migration.transfer import Transfer, measured, prepare_ahead, set_out
from worker.operations.live_migration.tuning import is_live
from worker.operations.patience import patient
from worker.operations.steps import HandedOver, Step, StepEnd
from worker.operations.wanted import IDLE

log = structlog.get_logger(__name__)

ENDING_S, ENDED_S = 0.5, 20.0
"""How long a QEMU that does not answer may take to end, if that is why, and the worker to clean up after it."""
ACCEPT_S, DISCARD_S, FINALIZE_S, RECOVER_S = 120.0, 8.0, 60.0, 30.0
"""How long a job waits for a step before it looks itself: for ``finalize`` for ever, saying so each time."""


def migrate(node: NodeContext, guests: Guests, job: JobContext, arguments: MigrateArguments) -> dict[str, Any]:
    """Move a guest to another node, live. Returns the report.

    Raises MigrationFailed, Cancelled, or why it could not begin. In each case the guest is on exactly one node, which
    the error names, and on the other one nothing is left.
    """
    row = rows.find(node, job.id)
    if row is None:
        if job.attempt > 1 and job.last_phase()[0] == "move" and (report := was_moved(node, arguments)):
            return report
        instance = checks.instance_here(node, arguments.name)
        job.phase("check", 2, f"looking whether {arguments.name} can be moved to node {arguments.target}")
        checks.require_possible(node, job, arguments)
        if instance.runtime is None:
            return move_stopped(node, job, arguments)
        if arguments.dry_run:
            return foretell(node, guests, job, arguments)
        row = checks.describe(node, job, arguments, guests.need(arguments.name))
        row.prediction = last_prediction(node, row)
        Migration(node, guests, job, job.id).begin(row)  # and from there on with other attempts
    return Migration(node, guests, job, job.id).run(row)


class Migration:
    """A migration, as the job that carries it out now sees it."""

    def __init__(self, node: NodeContext, guests: Guests, job: JobContext, migration_id: str) -> None:
        self._node = node
        self._guests = guests
        self._job = job
        self._id = migration_id

    @property
    def _row(self) -> LiveMigration:
        return rows.get(self._node, self._id)

    def begin(self, row: LiveMigration) -> NoReturn:
        """Write the migration down and hand it to the target, at one moment: until then there is nothing to undo.

        Raises HandedOver, Cancelled.
        """
        self._job.check_cancelled()
        phase = "accept", 5, f"node {row.target} prepares a QEMU that waits"
        try:
            raise self._job.hand_over(
                [self._accept(row)],
                ACCEPT_S,
                phase=phase,
                also=lambda session: session.add(row),
                meanwhile=partial(prepare_ahead, self._guests, row),
            )
        except SQLAlchemyError:
            self._job.carry_on()  # it may have taken effect: the next attempt sees, and undoes it if it has to
            raise

    def run(self, row: LiveMigration) -> dict[str, Any]:
        """Go on from the recorded stage until the end, or until another node has to act."""
        if row.stage not in rows.BEFORE_THE_SWITCH:
            self._job.carry_on()
        parts: dict[str, Callable[[LiveMigration], dict[str, Any] | None]] = {
            Stage.ACCEPTING: self._have_it_accepted,
            Stage.TRANSFERRING: self._transfer_and_hand_on,
            Stage.SWITCHING: self._transfer_and_hand_on,
            Stage.MOVED: self._have_it_finalized,
            Stage.CONTINUING: self._have_it_finalized,
            Stage.FINALIZED: self._clean,
            Stage.ABORTED: self._have_it_discarded,
        }
        while row.stage != Stage.DONE:
            with self._giving_up_if_it_fails(row.stage):
                if (report := parts[row.stage](row)) is not None:
                    return report
            row = self._row
        return self._end(row)

    @contextmanager
    def _giving_up_if_it_fails(self, stage: str) -> Iterator[None]:
        """What is transient is tried again, also by a job that was asked to give up: it ends once that is done."""
        try:
            yield
        except (HandedOver, SQLAlchemyError):
            self._job.carry_on()
            raise
        except Exception as exc:
            self._job.carry_on()
            if stage not in rows.SOURCE_OWNS or (isinstance(exc, OperationError) and exc.transient):
                raise
            self._abort(exc)

    def transfer_only(self) -> dict[str, Any]:
        """The part between accept and finalize, for a master that drives these itself."""
        row = self._row
        if row.stage not in rows.BEFORE_THE_SWITCH:
            self._job.carry_on()
        while row.stage in (Stage.TRANSFERRING, Stage.SWITCHING):
            with self._giving_up_if_it_fails(row.stage):
                if (report := self._transfer(row)) is not None:
                    rows.give_to_target(self._node, row.job_id, report)
            row = self._row
        if row.stage == Stage.ABORTED:
            go_on_here(self._node, self._guests, row)
            rows.move_on(self._node, row.job_id, Stage.ABORTED, Stage.DONE)
        if row.stage in (Stage.ABORTED, Stage.DONE) and (failure := row.report.get("failure")):
            raise self._as_raised(failure, {})
        return {"migration_id": row.job_id, "stage": row.stage, **row.report}

    def _step(self, row: LiveMigration, name: str, task: TaskName, **arguments: Any) -> Step:
        return Step(self._job.id, name, task, row.target, arguments)

    def _end_of(self, step: Step, deadline_s: float) -> StepEnd | None:
        """How the target's part ended; None when it took too long. Raises HandedOver to wait for it."""
        if end := self._node.ledger.step(step.id):
            return end
        waited_s = self._node.ledger.waited_s(step.id)
        if waited_s is not None and waited_s >= deadline_s:
            return None
        raise self._job.hand_over([step], deadline_s - (waited_s or 0))

    def _end_for_ever(self, step: Step, look_s: float, while_waiting: str) -> StepEnd:
        """As ``_end_of``, of a part without which nothing can go on; says so at times."""
        if end := self._end_of(step, look_s):
            return end
        self._job.progress(0, while_waiting)
        raise self._job.hand_over([step], look_s)

    def _have_it_accepted(self, row: LiveMigration) -> None:
        self._job.check_cancelled()
        end = self._end_of(self._accept(row), ACCEPT_S)
        if end is None:
            raise MigrationFailed(
                f"node {row.target} has not prepared a QEMU within {ACCEPT_S:g} s; see its worker's log"
            )
        if not end.succeeded:
            raise _as_error(end.error or {})
        set_out(self._node, self._job, row)

    def _transfer_and_hand_on(self, row: LiveMigration) -> None:
        """The guest becomes the target's, and the target is told, at one moment: it stands still meanwhile."""
        if (report := self._transfer(row)) is not None:
            give = patient(self._job.hand_over)
            raise give([self._finalize(row)], FINALIZE_S, also=lambda session: rows.give(session, row.job_id, report))

    def _transfer(self, row: LiveMigration) -> dict[str, Any] | None:
        """What there is to report once the target has all; None where this QEMU is gone, and that has been seen to."""
        guest = self._guests.get(row.instance_name)
        if guest is None:
            self._source_is_gone(row)
            return None
        try:
            return Transfer(self._node, self._guests, self._job, row).run()
        except (QmpLost, QemuFailed):
            if not (guest.process.wait(ENDING_S) and guest.ended.wait(ENDED_S)):
                raise
            return None

    def _accept(self, row: LiveMigration) -> Step:
        return self._step(row, ACCEPT, TaskName.MIGRATION_ACCEPT, info={"migration_id": row.job_id})

    def _finalize(self, row: LiveMigration) -> Step:
        return self._step(row, FINALIZE, TaskName.MIGRATION_FINALIZE, migration_id=row.job_id, success=True)

    def _source_is_gone(self, row: LiveMigration) -> None:
        """Where its QEMU had begun to send the last part the target may have all: then it is the target's, which says
        whether it has. Nobody else can run it any more."""
        if row.stage == Stage.SWITCHING:
            rows.give_to_target(self._node, row.job_id, {"tls": bool(row.info["tls"])})
            return
        raise NotRunning(
            f"{row.instance_name} ended while it was moved; `hostler info {row.instance_name}` says why",
            state=self._instance_state(),
        )

    def _have_it_finalized(self, row: LiveMigration) -> None:
        where = f"{row.instance_name} was sent to node {row.target}, which owns it now. It stands still, whole, on both"
        waits = f"{where} nodes, until node {row.target} has a worker that lets it go on"
        end = self._end_for_ever(self._finalize(row), FINALIZE_S, waits)
        if end.succeeded or self._row.stage not in rows.ON_THE_TARGET:
            return
        raise MigrationFailed(
            f"{where} nodes, because node {row.target} could not let it go on: {(end.error or {}).get('message')}. "
            f"Send migration.finalize with migration_id={row.job_id} to node.{row.target} to try again, "
            "with success=false to have it back",
            phase=FINALIZE,
            node=row.target,
            state=self._instance_state(),
            report=row.report,
            migration_id=row.job_id,
        )

    def _clean(self, row: LiveMigration) -> dict[str, Any] | None:
        """The report, where all went well: that it is done becomes true when the job's success does."""
        report = row.report or {}
        if report.get("postcopy") and self._job.last_phase()[0] != "clean":
            report |= self._have_the_rest_follow(row)
        report |= self._totals(row)
        self._job.phase("clean", 97, "removing what is left of the guest on this node")
        end_incoming(self._node, self._guests, row.instance_name, why=moved_to(row.target))
        report = self._report(row, report)
        done = partial(rows.enter, migration_id=row.job_id, before=Stage.FINALIZED, to=Stage.DONE, report=report)
        if "failure" not in report:
            self._job.at_success = done
            return report
        rows.move_on(self._node, row.job_id, Stage.FINALIZED, Stage.DONE, report=report)
        return None

    def _totals(self, row: LiveMigration) -> dict[str, Any]:
        """QEMU works its times out after it says ``completed``; what was reported at that moment may lack them."""
        guest = self._guests.get(row.instance_name)
        with suppress(OperationError):
            return measured(Outgoing(guest.talk()).totals()) if guest else {}
        return {}

    def _have_the_rest_follow(self, row: LiveMigration) -> dict[str, Any]:
        """Post-copy: the guest runs on the target and needs the rest of its memory from here.

        Raises LinkLost where the connection is broken: it is tried again for a while, and nothing is given up. Of a
        guest that has ended there meanwhile nothing is needed any more.
        """
        if self._guests.get(row.instance_name) is None:
            why = (
                f"the source's QEMU ended before all memory of {row.instance_name} had followed to node {row.target}: "
                f"the guest stands still there when it needs the rest, and can only be stopped by force"
            )
            return {"failure": rows.as_failure(MigrationFailed(why), "postcopy")}
        self._job.phase("postcopy", 96, f"the guest runs on node {row.target}; the rest of its memory follows")
        transfer = Transfer(self._node, self._guests, self._job, row)
        sample = transfer.finish_postcopy()
        if sample.status != "completed" and rows.state_of(self._node, row.instance_name) in IDLE:
            why = f"{row.instance_name} ended on node {row.target} before all of its memory had followed"
            return {"failure": rows.as_failure(MigrationFailed(why), "postcopy")}
        if sample.status == "postcopy-paused":
            self._listen_again(row, transfer)
            sample = Transfer(self._node, self._guests, self._job, row).finish_postcopy()
        if sample.status != "completed":
            raise LinkLost(
                f"{row.instance_name} runs on node {row.target}, and the connection over which the rest of its memory "
                f"follows is broken (QEMU says {sample.status}: {sample.error or 'no reason'}). It stands still when "
                "it needs that. Mend the network; the source keeps the memory until then",
                phase="postcopy",
                node=row.target,
                state=self._instance_state(),
                report=row.report,
                migration_id=row.job_id,
            )
        return {}

    def _listen_again(self, row: LiveMigration, transfer: Transfer) -> None:
        number = int(row.report.get("recoveries", 0))
        step = self._step(row, f"recover{number}", TaskName.MIGRATION_RECOVER, migration_id=row.job_id)
        end = self._end_of(step, RECOVER_S)
        rows.note(self._node, row.job_id, report=row.report | {"recoveries": number + 1})
        if end is None or not end.succeeded:
            raise LinkLost(f"node {row.target} does not listen again for the rest of {row.instance_name}'s memory")
        transfer.recover_postcopy(end.result["host"], end.result["port"])

    def _abort(self, exc: Exception) -> None:
        """Write down that it is given up, and why."""
        if not isinstance(exc, OperationError | OperationFailed):
            log.exception("a live migration failed unexpectedly", migration=self._id)
        report = self._row.report | {"failure": rows.as_failure(exc, self._phase())}
        rows.move_on(self._node, self._id, rows.SOURCE_OWNS, Stage.ABORTED, report=report)

    def _phase(self) -> str:
        """The one it is in, also of an attempt that has begun none yet."""
        current = self._job.current_phase
        return current if current != "received" else self._job.last_phase()[0]

    def _have_it_discarded(self, row: LiveMigration) -> None:
        """The guest runs on here, and the target is told."""
        go_on_here(self._node, self._guests, row)
        if self._node.ledger.knows(f"{self._job.id}.{ACCEPT}"):
            step = self._step(row, DISCARD, TaskName.MIGRATION_FINALIZE, migration_id=row.job_id, success=False)
            end = self._end_of(step, DISCARD_S)
            if end is None or not end.succeeded:
                log.warning("the target has not cleaned up yet; it does so by itself", migration=row.job_id)
        rows.move_on(self._node, row.job_id, Stage.ABORTED, Stage.DONE)

    def _end(self, row: LiveMigration) -> dict[str, Any]:
        report: dict[str, Any] = row.report or {}
        if failure := report.get("failure"):
            raise self._as_raised(failure, {name: value for name, value in report.items() if name != "failure"})
        return report

    def _as_raised(self, failure: dict[str, Any], report: dict[str, Any]) -> OperationError:
        row = self._row
        owner = rows.owner_of(self._node, row.instance_name)
        where = {"node": owner, "state": self._instance_state(), "report": report, "migration_id": row.job_id}
        if failure["code"] == "CANCELLED":
            return Cancelled(f"{failure['message']}; {row.instance_name} is on node {row.source} as before", **where)
        return _as_error(failure, **where)

    def _instance_state(self) -> str:
        return rows.state_of(self._node, self._row.instance_name)

    def _report(self, row: LiveMigration, measured: dict[str, Any]) -> dict[str, Any]:
        state, samples = rows.state_and_samples(self._node, row)
        seen = row.resumed_at and row.stopped_at and row.resumed_at - row.stopped_at
        return {
            "name": row.instance_name,
            "source": row.source,
            "target": row.target,
            "node": row.target,
            "state": state,
            "kind": "live" if is_live(row) else "non-live",
            "total_ms": round((utc_now() - row.started_at).total_seconds() * 1000, 1),
            "downtime_seen_ms": round(seen.total_seconds() * 1000, 1) if seen else None,
            "prediction": row.prediction,
            "samples": samples,
        } | measured


def _as_error(failure: dict[str, Any], **details: Any) -> OperationError:
    """A failure that was written down, or that the target's step ended with, as the job's own."""
    error = OperationError(failure["message"], **(failure.get("details") or {}) | details)
    error.code = failure["code"]  # type: ignore[misc]
    return error
