"""``node.hold``: this node begins no more jobs that change its guests, as before work on its storage or its network."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from models import Node, utc_now
from worker.operations.context import JobContext, NodeContext
from worker.operations.receipts import Ended
from worker.operations.views import iso


def hold(node: NodeContext, job: JobContext, reason: str) -> dict[str, Any]:
    """From now on such jobs wait. Safe to repeat: the first time stays, the reason is the last one given."""
    with node.database.transaction() as session:
        row = session.get_one(Node, node.name, with_for_update=True)
        row.held_at, row.held_by, row.held_reason = row.held_at or utc_now(), job.id, reason or None
        return {"node": node.name, "held_at": iso(row.held_at), "reason": row.held_reason}


def unhold(node: NodeContext) -> tuple[dict[str, Any], Ended]:
    """The jobs that waited are begun, in their order, as those that waited for a place meanwhile: they are to be woken.

    A worker that is killed before they are leaves them to the ledger's ``overdue`` and ``forgotten``; ``held_at`` is
    then None, and ``jobs`` what was left.
    """
    since = _unmark(node)
    held = node.ledger.let_go()
    others = node.ledger.overdue()
    others.wakeups = [*held, *others.wakeups]
    return {"node": node.name, "held_at": iso(since), "jobs": len(held)}, others


def _unmark(node: NodeContext) -> datetime | None:
    with node.database.transaction() as session:
        row = session.get_one(Node, node.name, with_for_update=True)
        since, row.held_at, row.held_by, row.held_reason = row.held_at, None, None, None
        return since
