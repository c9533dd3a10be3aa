"""Starting a guest again that does not run, as it was: the job that a crash, a boot or a person asks for."""

from __future__ import annotations

from hostler.contract import TaskName
from hostler.errors import OperationFailed
from hostler.payloads import Instance, InstanceView, RestartArguments
from models import Instance as InstanceRow
from worker.errors import Cancelled, OperationError, QemuFailed
from worker.kvm.process import boot_id
from worker.operations import checks, wanted, wanted_rows
from worker.operations.context import JobContext, NodeContext
from worker.operations.guests import Guests
from worker.operations.recovery import recover
from worker.operations.recovery_table import Action
from worker.operations.start import build, choose_accelerator, complete
from worker.operations.views import view_of
from worker.operations.wanted import Policy


def restart(node: NodeContext, guests: Guests, job: JobContext, arguments: RestartArguments) -> InstanceView:
    """Start the saved hardware of a guest that does not run and is still wanted; the view's ``how`` is ``started``.

    Else nothing is done, and ``how`` is ``nothing_to_do``; the job's history says why. Raises UnknownInstance and what
    a start can raise: then the next restart is due, unless there were enough in a row.
    """
    view_of(node, arguments.name)
    recovery = recover(node, guests, job, TaskName.INSTANCE_RESTART, arguments.name)
    with node.database.reading() as session:
        row = session.get_one(InstanceRow, arguments.name)
    restarts = 0 if arguments.cause == "operator" else row.restarts
    if recovery.action is Action.COMPLETE:
        return _view(node, row.name, "started", complete(node, guests, row.name, paused=False, restarts=restarts))
    if why_not := _why_not(row, arguments.cause):
        job.note(f"nothing to be done: {why_not}")
        return _view(node, row.name, "nothing_to_do")
    try:
        return _view(node, row.name, "started", _start(node, guests, job, row, restarts))
    except Cancelled:
        raise
    except (OperationError, OperationFailed) as exc:
        if arguments.cause != "operator":
            wanted_rows.note_failure(node, row.name, exc.message)
        if isinstance(exc, OperationError) and exc.transient:
            raise QemuFailed(exc.message, **exc.details) from exc  # the next restart is the retry: not both
        raise


def _why_not(row: InstanceRow, cause: str) -> str:
    same_boot = row.boot_id == boot_id()
    return wanted.why_not(Policy.of(row.spec), cause, row.wanted, row.state, same_boot=same_boot)


def _start(node: NodeContext, guests: Guests, job: JobContext, row: InstanceRow, restarts: int) -> InstanceView:
    instance = Instance.model_validate(row.spec)
    job.phase("validate", 5, "checking the instance against this host")
    checks.require_valid(node, instance)
    accelerator = choose_accelerator(node, instance)
    return build(node, guests, job, instance, accelerator=accelerator, paused=False, restarts=restarts)


def _view(node: NodeContext, name: str, how: str, view: InstanceView | None = None) -> InstanceView:
    view = view or view_of(node, name)
    view["how"] = how
    return view
