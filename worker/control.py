"""Remote control in hostler's words: ``revoke``, as Flower's buttons and ``celery control revoke`` send it.

Celery's own keeps revoked ids in a worker's memory, where a restart forgets them, and cannot end a thread. Ours goes
through the ledger: what has not begun never will, and what runs is asked to give up and undo its work.
"""

from __future__ import annotations

from typing import Any

from celery.worker.control import control_command

from tasks import outcome
from worker.operations.service import current


@control_command(variadic="task_id", signature="[id1 [id2 [... [idN]]]]")
def revoke(state: Any, task_id: Any, terminate: bool = False, signal: Any = None, **_: Any) -> dict[str, Any]:
    """Cancel jobs by id; with terminate also those that run. A thread knows no signal: it is ignored."""
    return _cancel(state, task_id, also_running=bool(terminate))


@control_command(variadic="task_id", args=[("signal", str)], signature="<signal> [id1 [id2 [... [idN]]]]")
def terminate(state: Any, signal: Any, task_id: Any, **_: Any) -> dict[str, Any]:
    """Cancel jobs by id, also those that run."""
    return _cancel(state, task_id, also_running=True)


def _cancel(state: Any, task_id: Any, *, also_running: bool) -> dict[str, Any]:
    ids = [task_id] if isinstance(task_id, str) else list(task_id or [])
    return {"ok": [outcome.cancel(state.app, current(), job_id, also_running=also_running) for job_id in ids]}
