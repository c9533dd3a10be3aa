"""Two real nodes that share a broker and a database, and so can exchange guests."""

from __future__ import annotations

import os
import secrets
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select

from hostler.client import Job
from models import Job as JobRow
from models import LiveMigration
from tests.faults.promises import Sent, violations
from tests.nodes import TestNode, node, tiny_instance, until
from tests.services import missing

SLOW_MIB_S = 0.05
"""So slow that the tiny guest is on its way for some ten seconds."""
FORGIVING_S = 12.0
"""What a migration left is removed at the next heartbeat but one at the latest."""


@dataclass(frozen=True)
class Site:
    """Where a node is: what its worker's command begins with, and where it receives guests."""

    address: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()
    netns: str = ""

    def ip(self, *arguments: str) -> None:
        """Change its network."""
        subprocess.run(["ip", "-n", self.netns, *arguments], check=True)


@contextmanager
def two_sites() -> Iterator[list[Site]]:
    """Two network namespaces with a cable between them, ``uplink`` in each. Needs root."""
    names = [f"hst-{secrets.token_hex(4)}" for _ in range(2)]
    made = [Site(f"192.0.2.{number}", ("ip", "netns", "exec", name), name) for number, name in enumerate(names, 1)]
    first, second = made
    with ExitStack() as stack:
        for site in made:
            subprocess.run(["ip", "netns", "add", site.netns], check=True)
            stack.callback(subprocess.run, ["ip", "netns", "delete", site.netns], check=True)
        first.ip("link", "add", "uplink", "type", "veth", "peer", "name", "uplink", "netns", second.netns)
        for site in made:
            site.ip("address", "add", f"{site.address}/24", "dev", "uplink")
            site.ip("link", "set", "lo", "up")
            site.ip("link", "set", "uplink", "up")
        yield made


@contextmanager
def pair(
    *names: str, start: bool = True, sites: Sequence[Site] = (), **environment: str
) -> Iterator[list[TestNode]]:  # fmt: skip
    """Nodes ``n1``, ``n2`` (or as named) with their workers. The first has the broker, and, unless ``environment``
    names another, the database. ``sites`` are where they are, by default both on this host."""
    with ExitStack() as stack:
        made: list[TestNode] = []
        for name, site in zip(names or ("n1", "n2"), [*sites, *[Site()] * 9], strict=False):
            shared = _shared(made[0]) if made else {}
            own = {"HOSTLER_MIGRATION_ADDRESS": site.address} | environment | shared
            each = stack.enter_context(node(name, prefix=site.prefix, **own))
            made.append(each)
            if start:
                each.start_worker()
        yield made


def own_folders(nodes: list[TestNode]) -> list[Path]:
    """A folder that is another one on each node under the same path, the first one's. Where each one's really is.

    Before their workers start. Needs root.
    """
    made = [node.root / "private" for node in nodes]
    for folder in made:
        folder.mkdir()
    script = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
    for each, folder in [*zip(nodes, made, strict=True)][1:]:
        there = ("sh", "-c", script, "sh", str(folder), str(made[0]))
        each.prefix = (*each.prefix, "unshare", "--mount", *there)
    return made


@contextmanager
def apart(**environment: str) -> Iterator[tuple[list[TestNode], list[Path]]]:
    """Two nodes that see each its own folder under one path (see ``own_folders``), with their workers.

    Both have to be in order at the end, and nothing may be left.
    """
    if os.geteuid() != 0:
        missing("A mount namespace", "needs root")
    with pair(start=False, **environment) as nodes:
        folders = own_folders(nodes)
        for each in nodes:
            each.start_worker()
        yield nodes, folders
        assert in_order(nodes) == []
        end_guests(nodes)


def _shared(first: TestNode) -> dict[str, str]:
    settings = first.settings
    return {
        "HOSTLER_BROKER_URL": settings.effective_broker_url,
        "HOSTLER_RESULT_BACKEND": settings.effective_result_backend,
        "HOSTLER_DATABASE_URL": settings.effective_database_url,
    }


def migrate(source: TestNode, target: TestNode, name: str = "web1", **options: Any) -> Any:
    """Move a guest and wait for the report."""
    return source.do("instance.migrate", name=name, target=target.name, **options)


def ticks_on(node: TestNode, name: str, after: int) -> int:
    """The guest's counter, seen here, once it has gone beyond ``after``."""
    with node.serial(name) as serial:
        return until(lambda: number if (number := serial.tick()) > after else 0, what="the guest goes on")


def slowly(source: TestNode, target: TestNode, name: str = "web1", **options: Any) -> Job:
    """A migration that takes some ten seconds, once memory is on its way; ``tune`` lets it go on at once."""
    options = {"bandwidth_mib_s": SLOW_MIB_S} | options
    job = source.send("instance.migrate", name=name, target=target.name, **options)
    until(lambda: stage_of(source, job) == "transferring" and _is_sending(source, job), what="the transfer")
    return job


def _is_sending(source: TestNode, job: Job) -> bool:
    """Whether QEMU has begun, and said so; that it is about to is recorded before."""
    row = job_row(source, job.id)
    told = row.live_migration if row and row.phase == "transfer" else None
    return bool(told and told["status"] != "none")


def hurry(source: TestNode, name: str = "web1") -> None:
    """Let a migration that goes slowly take what it can get."""
    source.do("instance.migrate_tune", name=name, bandwidth_mib_s=0)


def stage_of(node: TestNode, job: Job) -> str:
    """The stage of a migration; empty where there is none."""
    with node.reading() as session:
        row = session.get(LiveMigration, job.id)
        return row.stage if row else ""


def phase_of(node: TestNode, job: Job) -> str:
    """The phase a job is in; empty where there is no such job."""
    row = job_row(node, job.id)
    return row.phase if row and row.phase else ""


def job_row(node: TestNode, job_id: str) -> JobRow | None:
    """What the database has of a job."""
    with node.reading() as session:
        return session.scalar(select(JobRow).where(JobRow.id == job_id))


@contextmanager
def frozen(node: TestNode) -> Iterator[None]:
    """The worker stands still meanwhile, in no transaction: a shared SQLite would stand still with it. It may be killed
    while it does."""
    worker = node.worker
    assert worker
    until(lambda: _freeze(node), what=f"{node.name}'s worker stands still outside of a transaction")
    try:
        yield
    finally:
        if worker.poll() is None:
            worker.send_signal(signal.SIGCONT)


def _freeze(node: TestNode) -> bool:
    assert node.worker
    node.worker.send_signal(signal.SIGSTOP)
    url = node.database().engine.url
    if url.get_backend_name() != "sqlite":
        return True
    with closing(sqlite3.connect(str(url.database), timeout=0.2, isolation_level=None)) as database:
        try:
            database.execute("BEGIN IMMEDIATE")
            return True
        except sqlite3.OperationalError:
            node.worker.send_signal(signal.SIGCONT)
            return False


def end_guests(nodes: list[TestNode]) -> None:
    """Kill every guest of nodes that share a database; nothing may be left of them."""
    for each in nodes:
        for pid in each.qemu_pids():
            os.kill(pid, signal.SIGKILL)
    for each in nodes:
        each.nothing_is_left()


def still_wrong(look: Callable[[], list[str]]) -> list[str]:
    """What a look finds wrong after as long as it is forgiven; nothing as soon as one finds nothing."""
    found: list[str] = []

    def is_well() -> bool:
        found[:] = look()
        return not found

    with suppress(AssertionError):
        until(is_well, FORGIVING_S)
    return found


def in_order(nodes: list[TestNode], *jobs: Sent) -> list[str]:
    """What is wrong with nodes that are at rest: broken promises, and what their own audits find."""
    found = still_wrong(lambda: violations(nodes, jobs))
    audits = [finding["explanation"] for each in nodes for finding in each.do("node.audit")["findings"]]
    return found + [f"audit: {explanation}" for explanation in audits]


__all__ = ["migrate", "pair", "ticks_on", "tiny_instance"]
