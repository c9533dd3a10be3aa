"""A worker's life: one per node and host, known in the database, with a heartbeat."""

from __future__ import annotations

import fcntl
import os
import uuid
from pathlib import Path

import structlog
from sqlalchemy import select

from hostler import __version__
from hostler.contract import ErrorCode
from models import Database, Incarnation, Node, utc_now
from worker.errors import OperationError
from worker.kvm.process import ProcessIdentity, boot_id
from worker.operations.maintenance.marks import lift_fence
from worker.operations.views import iso

log = structlog.get_logger(__name__)


class SecondWorker(OperationError):
    """This node has a living worker already. Nothing was started."""


class NodeFenced(OperationError):
    """This node was given up: its guests may run elsewhere by now. Nothing was started, and no QEMU was touched."""

    code = ErrorCode.NODE_UNAVAILABLE


class NodeLock:
    """The lock file below the state folder that a node's worker holds; the kernel frees it however the worker ends."""

    def __init__(self, state_dir: Path, node: str) -> None:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path = state_dir / f"node.{node}.lock"
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(self._fd, 32).decode(errors="replace").strip()
            os.close(self._fd)
            raise SecondWorker(f"node {node} has a live worker already (pid {pid or 'unknown'}); stop that one first, "
                               "or give this one another HOSTLER_NODE") from None  # fmt: skip
        os.ftruncate(self._fd, 0)
        os.write(self._fd, str(os.getpid()).encode())

    def release(self) -> None:
        """Let another worker start."""
        os.close(self._fd)


def enter(database: Database, node: str) -> str:
    """Register this process as the node's worker and return the incarnation's id.

    Raises SecondWorker when the database names another process of this host, alive, as the node's worker (one with
    another state folder, which the lock file cannot see), and NodeFenced when the node is fenced and its host was not
    booted since. Predecessors that are dead are marked so.
    """
    me = ProcessIdentity.of(os.getpid())
    assert me is not None
    with database.transaction() as session:
        row = session.get(Node, node, with_for_update=True)
        if row is None:
            session.add(Node(name=node))
            session.flush()
        elif row.fenced_at:
            _require_booted_since(row)
            log.warning(
                "this node was fenced; its host was booted since, and the fence is lifted", since=lift_fence(row)
            )
        for other in session.scalars(
            select(Incarnation).where(Incarnation.node == node, Incarnation.ended_at.is_(None))
        ):
            identity = ProcessIdentity(other.pid, other.start_ticks, other.boot_id)
            if identity != me and identity.is_alive():
                raise SecondWorker(f"node {node} has a live worker already (pid {other.pid}), as the database says; "
                                   "stop that one first, or give this one another HOSTLER_NODE")  # fmt: skip
            other.ended_at = utc_now()
        incarnation = Incarnation(
            id=str(uuid.uuid4()),
            node=node,
            pid=me.pid,
            start_ticks=me.start_ticks,
            boot_id=me.boot_id,
            version=__version__,
        )
        session.add(incarnation)
        return incarnation.id


def _require_booted_since(node: Node) -> None:
    if node.fenced_boot_id is None or node.fenced_boot_id == boot_id():
        raise NodeFenced(
            f"node {node.name} was fenced at {iso(node.fenced_at)} (job {node.fenced_by}) and this host was not booted "
            "since: guests of it may run on other nodes by now, and their old QEMUs still here. Nothing was touched. "
            f"End those QEMUs, or boot this host; then, from any living node: hostler unfence {node.name}"
        )


def beat(database: Database, incarnation: str) -> None:
    """Say that this worker lives. Raises NodeFenced where its node was given up while it lived."""
    with database.transaction() as session:
        me = session.get_one(Incarnation, incarnation)
        fenced_at = session.get_one(Node, me.node).fenced_at if me.ended_at else None
        if fenced_at is None:
            me.heartbeat_at = utc_now()
    if fenced_at:
        raise NodeFenced(f"node {me.node} was fenced at {iso(fenced_at)} although this worker lives; it ends")


def leave(database: Database, incarnation: str) -> None:
    """Say that this worker ended in good order."""
    with database.transaction() as session:
        session.get_one(Incarnation, incarnation).ended_at = utc_now()
