"""What the tests of the ledger share: nodes that keep one, and jobs to put into it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from typing import Any

from sqlalchemy import select

from models import Database, Incarnation, InstanceLock, Job, Node
from worker.kvm.process import ProcessIdentity
from worker.operations.ledger import Ledger
from worker.operations.receipts import Decision, Ended, Receipt, Verdict, Wakeup


def ledger_of(database: Database, node: str = "n1") -> Ledger:
    """The ledger of a new worker incarnation of ``node``."""
    me = ProcessIdentity.of(os.getpid())
    assert me
    incarnation = str(uuid.uuid4())
    with database.transaction() as session:
        if session.get(Node, node) is None:
            session.add(Node(name=node))
            session.flush()
        session.add(
            Incarnation(
                id=incarnation, node=node, pid=me.pid, start_ticks=me.start_ticks, boot_id=me.boot_id, version="0"
            )
        )
    return Ledger(database, node, incarnation)


def receipt(job_id: str, instance: str | None = "web1", **arguments: Any) -> Receipt:
    """A message of ``instance.pause``, or of ``instance.list`` where it is about no instance."""
    if instance is None:
        return Receipt(job_id, "instance.list", arguments, None)
    return Receipt(job_id, "instance.pause", {"name": instance} | arguments, instance)


def again(wakeup: Wakeup) -> Receipt:
    """The message that a wake-up is sent as."""
    return Receipt(wakeup.job_id, wakeup.task, wakeup.arguments, wakeup.arguments.get("name"))


def succeed(ledger: Ledger, job_id: str, result: Any = None) -> Wakeup | None:
    """End a job well; the job to be woken, of which there is at most one where instances alone are waited for."""
    return _only(ledger.succeed(job_id, result))


def fail(ledger: Ledger, job_id: str, error: dict[str, Any]) -> Wakeup | None:
    """End a job badly; as ``succeed``."""
    return _only(ledger.fail(job_id, error))


def _only(ended: Ended) -> Wakeup | None:
    assert len(ended.wakeups) <= 1
    assert ended.revoked == []
    return ended.wakeups[0] if ended.wakeups else None


def row(database: Database, job_id: str) -> Job:
    with database.reading() as session:
        return session.scalars(select(Job).where(Job.id == job_id)).one()


def locks(database: Database) -> dict[str, str]:
    """Which job holds which instance."""
    with database.reading() as session:
        return {lock.instance_name: lock.job_id for lock in session.scalars(select(InstanceLock))}


def ids(wakeups: Iterable[Wakeup]) -> list[str]:
    return [wakeup.job_id for wakeup in wakeups]


RUN = Decision(Verdict.RUN, attempt=1)
DROP = Decision(Verdict.DROP)


def wait(*ahead: str) -> Decision:
    return Decision(Verdict.WAIT, ahead)
