"""A host that loses its power, as one machine can show it: what ran there is gone, and SQL heard of it long ago."""

from __future__ import annotations

import os
import signal

from sqlalchemy import select, update

from models import Incarnation, InstanceLock, Node, Runtime, utc_now
from models import Job as JobRow
from tests.nodes import TestNode, until
from worker.operations.presence import ABSENT_AFTER


def lose_power(node: TestNode, *, keep: tuple[str, ...] = ()) -> None:
    """The worker and all QEMUs die at once, and the heartbeat was long ago. Those of ``keep`` are forgotten to die."""
    kept = {node.pid(name) for name in keep}
    node.kill_worker()
    for pid in set(node.qemu_pids()) - kept:
        os.kill(pid, signal.SIGKILL)
    until(lambda: set(node.qemu_pids()) == kept, what="the QEMUs are gone")
    silence(node)


def silence(node: TestNode) -> None:
    """Its worker's last heartbeat was long ago."""
    with node.database().transaction() as session:
        session.execute(
            update(Incarnation)
            .where(Incarnation.node == node.name, Incarnation.ended_at.is_(None))
            .values(heartbeat_at=utc_now() - ABSENT_AFTER)
        )


def pretend_boot(node: TestNode) -> None:
    """What SQL knows of the node's last worker is of another boot than this one."""
    with node.database().transaction() as session:
        session.execute(update(Node).where(Node.name == node.name).values(fenced_boot_id="of an earlier boot"))


def had_by(node: TestNode, dead: str) -> dict[str, list[str]]:
    """What SQL still has of a dead node, as another one sees it: runtimes, locks, jobs that have not ended."""
    with node.reading() as session:
        found = {
            "runtimes": [*session.scalars(select(Runtime.instance_name).where(Runtime.node == dead))],
            "locks": [*session.scalars(select(InstanceLock.instance_name).where(InstanceLock.node == dead))],
            "jobs": [
                *session.scalars(select(JobRow.id).where(JobRow.node == dead, JobRow.finished_at.is_(None)))
            ],
        }  # fmt: skip
    return {what: names for what, names in found.items() if names}
