"""Nodes whose workers can be killed at the border of any transaction, which is all that a database sees of a kill."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import delete
from sqlalchemy.orm import Session

from models import Database, InstanceLock, Job, JobParent
from tests.unit.worker.operations.ledgers import ledger_of
from worker.operations.ledger import Ledger


class Killed(Exception):
    """The worker is no more."""


class MortalDatabase(Database):
    """A node's connections. Its worker is killed after so many transactions, just when the last one is committed."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.transactions_left: int | None = None
        self._counting = threading.Lock()

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        self._die_if_told()
        with super().transaction() as session:
            yield session
        with self._counting:
            if self.transactions_left:
                self.transactions_left -= 1
        self._die_if_told()

    def _die_if_told(self) -> None:
        if self.transactions_left == 0:
            raise Killed


class MortalNode:
    """A node, its connections and the ledger of the worker it has at the moment."""

    def __init__(self, url: str, name: str, places: int) -> None:
        self.name, self.places = name, places
        self.database = MortalDatabase(url)
        self.ledger: Ledger

    def start_worker(self) -> None:
        """A new worker; the one before is dead, and what it held has not been freed yet."""
        self.database.transactions_left = None
        incarnation = ledger_of(self.database, self.name)._incarnation
        self.ledger = Ledger(self.database, self.name, incarnation, {"start": self.places})


@contextmanager
def mortal_nodes(database: Database) -> Iterator[dict[str, MortalNode]]:
    """Two nodes with connections of their own; one may have one start under way, the other two."""
    url = database.url.render_as_string(hide_password=False)
    nodes = {name: MortalNode(url, name, places) for name, places in (("n1", 1), ("n2", 2))}
    try:
        yield nodes
    finally:
        for node in nodes.values():
            node.database.dispose()


def forget_all_jobs(database: Database) -> None:
    """Empty the ledger, which is much faster than a new database."""
    with database.transaction() as session:
        for table in (JobParent, InstanceLock, Job):
            session.execute(delete(table))
