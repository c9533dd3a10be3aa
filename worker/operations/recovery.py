"""Taking up a job that an earlier attempt left: find out what is true, and do what the table says."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import structlog

from hostler.contract import InstanceState, TaskName
from models import Instance, Runtime, runtime_of
from worker.errors import OperationError, QmpLost, TimedOut
from worker.kvm.folder import GuestFolder
from worker.kvm.process import ProcessIdentity, QemuProcess
from worker.kvm.qmp import Monitor
from worker.operations.context import JobContext, NodeContext
from worker.operations.ending import GUEST_SHUT_DOWN, Ending
from worker.operations.guests import Guests, how_it_ended, identity_of, release
from worker.operations.recovery_table import Action, Reality, row_for

log = structlog.get_logger(__name__)

ANSWER_S = 2.0
"""A QEMU that is well answers in milliseconds; a new worker decides all it took over within 5 s."""


@dataclass(frozen=True)
class Recovery:
    """What was decided for a job. A first attempt begins."""

    action: Action = Action.BEGIN
    phase: str = "received"


def recover(node: NodeContext, guests: Guests, job: JobContext, task: TaskName, name: str) -> Recovery:
    """Decide how a job goes on that an earlier attempt left; the decision is recorded in the job's history.

    With ``UNDO`` the half-started QEMU is ended and all it had is given back before this returns. Raises QmpLost where
    nothing can be concluded; the instance is ``unknown`` then, and watched.
    """
    if job.attempt == 1:
        return Recovery()
    phase, since = job.last_phase()
    row = row_for(task, phase)
    reality = find_out(node, guests, name, since, own=job.id if row.own else None, look_for_reset=phase == "reset")
    action = row.cells[reality]
    log.info("continuing a job", job=job.id, task=task, instance=name, phase=phase, reality=reality, action=action)
    job.note(f"an earlier attempt ended in phase {phase}; {name}: {reality}; decided: {action}")
    if row.committed and action in (Action.CONTINUE, Action.COMPLETE, Action.ASK):
        job.carry_on()
    if action is Action.UNDO:
        undo_start(node, guests, name, started_by=job.id)
    if action is Action.ASK:
        _leave_unknown(node, guests, name, ask=False)
        raise QmpLost(
            f"QEMU of {name} runs but does not answer, and the worker that carried out this job died in phase {phase}; "
            f"nothing was concluded and nothing was touched. If it stays silent: hostler stop {name} --force",
            state=InstanceState.UNKNOWN,
        )
    return Recovery(action, phase)


def find_out(
    node: NodeContext,
    guests: Guests,
    name: str,
    since: datetime | None,
    *,
    own: str | None = None,
    look_for_reset: bool = False,
) -> Reality:
    """What is true of an instance, in at most a few seconds. Nothing is changed.

    ``since`` is when the job's phase began; a QEMU that ended before is none. With ``own`` only the one counts that the
    job of this id started.
    """
    with node.database.reading() as session:
        runtime = runtime_of(session, node.name, name)
        instance = session.get(Instance, name)
    if runtime is None or (own and runtime.started_by != own):
        ours = instance and instance.node == node.name
        if not (instance and ours and since and instance.ended_at and instance.ended_at >= since):
            return Reality.NO_RUNTIME
        return Reality.SHUT_DOWN if (instance.reason or "").startswith(GUEST_SHUT_DOWN) else Reality.GONE
    folder = GuestFolder(Path(runtime.run_dir))
    if identity_of(runtime) is None:
        ending = how_it_ended(runtime, killed_by_us=False)
        return Reality.SHUT_DOWN if ending.reason == GUEST_SHUT_DOWN else Reality.GONE
    status = _ask(node, guests, name, folder)
    if status is not None and look_for_reset and since and _was_reset(folder, since):
        return Reality.RESET
    if status is None:
        return Reality.SILENT
    return Reality.RUNNING if status == "running" else Reality.PAUSED


def _ask(node: NodeContext, guests: Guests, name: str, folder: GuestFolder) -> str | None:
    """QEMU's run state, None when it keeps silent. A half-started QEMU is not watched yet."""
    try:
        if guest := guests.get(name):
            return str(guest.talk().execute("query-status", timeout_s=ANSWER_S)["status"])
        monitor = Monitor.connect(node.loop, folder.qmp, ANSWER_S, lambda _: None)
        try:
            return str(monitor.execute("query-status", timeout_s=ANSWER_S)["status"])
        finally:
            monitor.close()
    except OperationError:
        return None


def _was_reset(folder: GuestFolder, since: datetime) -> bool:
    """Whether the reset line was pulled; a guest's firmware resets its machine too, and says so."""
    return any(
        not event["data"]["guest"]
        and event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6 >= since.timestamp()
        for event in folder.events("RESET")
    )


def undo_start(node: NodeContext, guests: Guests, name: str, *, started_by: str) -> None:
    """End the QEMU that this job half started, no other one, and give back all it had. Safe to repeat.

    Raises TimedOut when it does not die: it is watched then, keeps what it has, and the instance is ``unknown``.
    """
    with node.database.reading() as session:
        row = runtime_of(session, node.name, name)
    if row is None or row.started_by != started_by:
        return
    if (identity := identity_of(row)) and (process := QemuProcess.adopt(identity)):
        try:
            process.kill(grace_s=0.5)
        except TimedOut:
            _leave_unknown(node, guests, name, ask=False)
            raise
    release(node, name, row.uuid, Ending(InstanceState.STOPPED, "its start was interrupted", "killed"))


def abandon(node: NodeContext, guests: Guests, job: JobContext, task: TaskName, name: str) -> None:
    """Leave nothing half-done of a job that is not tried again."""
    phase, since = job.last_phase()
    row = row_for(task, phase)
    if row.cells[find_out(node, guests, name, since, own=job.id if row.own else None)] is Action.UNDO:
        undo_start(node, guests, name, started_by=job.id)
    else:
        _leave_unknown(node, guests, name, ask=True)


def _note_process(node: NodeContext, runtime: Runtime, identity: ProcessIdentity) -> None:
    """The worker died before it wrote down which process it had started."""
    with node.database.transaction() as session:
        row = runtime_of(session, node.name, runtime.instance_name, for_update=True)
        if row and row.uuid == runtime.uuid:
            row.pid, row.start_ticks = identity.pid, identity.start_ticks


def _leave_unknown(node: NodeContext, guests: Guests, name: str, *, ask: bool) -> None:
    """A guest that no job works on for now: watched and ``unknown``, until QEMU is asked, with ``ask`` at once.

    One that has ended, and that nobody watches, is released. The state of one that another node owns is not touched.
    """
    with node.database.transaction() as session:
        row = session.get(Instance, name, with_for_update=True)
        runtime = runtime_of(session, node.name, name)
        if row is None or runtime is None:
            return
        if row.node == node.name:
            row.state = InstanceState.UNKNOWN
    if runtime.pid is None and (identity := identity_of(runtime)):
        _note_process(node, runtime, identity)
    if guest := guests.get(name):
        if ask:
            guests.observe(guest)
    elif not guests.adopt(runtime, killed_by_us=False, ask=ask) and identity_of(runtime) is None:
        release(node, name, runtime.uuid, how_it_ended(runtime, killed_by_us=False))
