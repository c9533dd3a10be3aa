"""A node in a process of its own, for races that threads of one process might not show."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier

from models import Database
from tests.unit.worker.operations.ledgers import ledger_of, receipt

DEADLINE_S = 60.0


def receive_at_once(
    database: Database, node: str, instances: Sequence[str], start: Barrier | threading.Barrier
) -> list[str]:
    """Receive one job for each instance, each in the same moment as the other racers; the verdicts' names."""
    ledger = ledger_of(database, node)
    verdicts = []
    for instance in instances:
        start.wait(DEADLINE_S)
        verdicts.append(ledger.receive(receipt(f"{instance}-{node}", instance)).verdict.name)
    return verdicts


def racer(
    url: str, node: str, instances: Sequence[str], start: Barrier, verdicts: Queue[tuple[str, list[str]]]
) -> None:
    """The main function of a racing process."""
    database = Database(url)
    try:
        verdicts.put((node, receive_at_once(database, node, instances, start)))
    except BaseException as exc:
        start.abort()
        verdicts.put((node, [repr(exc)]))
        raise
    finally:
        database.dispose()
