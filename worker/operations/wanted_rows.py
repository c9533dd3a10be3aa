"""What the rows of instances say about being wanted: the decisions of ``wanted`` written down and read.

A restart is due from ``restart_at`` on. It becomes a job in the transaction that clears ``restart_at``: none is lost
and none is made twice, whenever the worker is killed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

import structlog
from sqlalchemy import ColumnElement, func, select

from hostler.contract import InstanceState, TaskName
from models import Instance, Node, utc_now
from worker.kvm.process import boot_id
from worker.operations import wanted
from worker.operations.context import NodeContext
from worker.operations.ending import Ending
from worker.operations.maintenance.marks import TAKES_GUESTS
from worker.operations.receipts import Wakeup
from worker.operations.wanted import End, Intent, Policy

log = structlog.get_logger(__name__)


def note_end(row: Instance, ending: Ending) -> str:
    """Decide about a guest that ended, in the transaction that records its end and before its runtime is forgotten.

    Returns the reason to record.
    """
    ran = utc_now() - row.runtime.started_at if row.runtime and row.runtime.started_at else timedelta()
    same_boot = row.runtime is None or row.runtime.boot_id == boot_id()
    end = End(ending.state, InstanceState(row.state), ran, same_boot)
    intent = wanted.after_end(Policy.of(row.spec), _intent(row), end, utc_now())
    _write(row, intent)
    return "; ".join(filter(None, (ending.reason, intent.note)))


def note_running(row: Instance, restarts: int) -> None:
    """A guest runs, and is wanted so; after so many restarts in a row, 0 where somebody started it. Within the caller's
    transaction."""
    _write(row, Intent(wanted.RUNNING, restarts))
    row.boot_id = boot_id()


def note_moved(row: Instance) -> None:
    """A guest has come to this host, wanted as it was. Within the caller's transaction."""
    row.boot_id = boot_id()


def note_failure(node: NodeContext, name: str, reason: str) -> None:
    """A restart failed: put down why, and when it is tried again, if at all."""
    with node.database.transaction() as session:
        row = session.get(Instance, name, with_for_update=True, populate_existing=True)
        if row is None or row.state not in wanted.IDLE:
            return
        intent = wanted.after_failure(Policy.of(row.spec), _intent(row), utc_now())
        _write(row, intent)
        row.reason = "; ".join(filter(None, (f"it could not be started again: {reason}", intent.note)))
        restart_at = intent.restart_at
    node.wake_at(restart_at)


def note_boot(node: NodeContext) -> None:
    """Decide about the guests that ran before the host was booted. Safe to repeat until their restarts are jobs."""
    for name in _names(node, Instance.wanted == wanted.RUNNING, Instance.boot_id != boot_id()):
        with node.database.transaction() as session:
            row = session.get(Instance, name, with_for_update=True)
            if row and row.node == node.name and row.boot_id != boot_id():
                _write(row, wanted.after_boot(Policy.of(row.spec), _intent(row), utc_now()))


def want_stopped(node: NodeContext, name: str) -> None:
    """An operator wants it stopped: it is not started again by itself, and a restart that is due is called off."""
    with node.database.transaction() as session:
        row = session.get(Instance, name, with_for_update=True)
        if row and row.node == node.name:
            _write(row, Intent(wanted.STOPPED))


@contextmanager
def stopping(node: NodeContext, name: str) -> Iterator[None]:
    """The part of an operation that stops a guest for its operator; where it fails and the guest runs on, it is wanted
    running as before."""
    want_stopped(node, name)
    try:
        yield
    except Exception:
        with node.database.transaction() as session:
            row = session.get(Instance, name, with_for_update=True)
            if row and row.node == node.name and row.runtime and row.state != InstanceState.STOPPING:
                row.wanted = wanted.RUNNING
        raise


def due(node: NodeContext) -> list[Wakeup]:
    """The restarts whose time has come, as jobs of the ledger whose messages are to be sent; by instance name.

    Those of a drained node wait until it is not any more.
    """
    now = utc_now()
    ready = _names(node, Instance.restart_at <= now, TAKES_GUESTS)
    return [wakeup for name in ready if (wakeup := _make_job(node, name, now))]


def _make_job(node: NodeContext, name: str, now: datetime) -> Wakeup | None:
    with node.database.transaction() as session:
        session.get(Node, node.name, with_for_update=True)  # the job refers to it; see the order of locks
        row = session.get(Instance, name, with_for_update=True)
        if row is None or row.node != node.name or row.restart_at is None or row.restart_at > now:
            return None
        arguments = {"name": name, "cause": _cause(row)}
        _write(row, Intent(row.wanted, row.restarts + 1))
        row.boot_id = boot_id()
        wakeup, restarts = node.ledger.add(session, TaskName.INSTANCE_RESTART, arguments), row.restarts
    log.info("a guest is to be started again", instance=name, cause=arguments["cause"], restarts=restarts)
    return wakeup


def _names(node: NodeContext, *conditions: ColumnElement[bool]) -> list[str]:
    # Read without a lock, and then locked one by one by their key: MariaDB locks what it finds by another index in
    # an order that does not agree with that of who changes a row.
    with node.database.reading() as session:
        query = select(Instance.name).where(Instance.node == node.name, *conditions)
        return [*session.scalars(query.order_by(Instance.name))]


def next_at(node: NodeContext) -> datetime | None:
    """When the next restart is due; None when there is none."""
    with node.database.reading() as session:
        return session.scalar(select(func.min(Instance.restart_at)).where(Instance.node == node.name, TAKES_GUESTS))


def _cause(row: Instance) -> str:
    if row.boot_id != boot_id():
        return "boot"
    return "crash" if row.state == InstanceState.CRASHED else "shutdown"


def _intent(row: Instance) -> Intent:
    return Intent(row.wanted, row.restarts, row.restart_at)


def _write(row: Instance, intent: Intent) -> None:
    row.wanted, row.restarts, row.restart_at = intent.wanted, intent.restarts, intent.restart_at
