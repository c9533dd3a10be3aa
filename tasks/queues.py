"""A look at the messages that lie in nodes' queues, without taking them. Only Redis lets one."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from celery import Celery

from hostler.contract import NODE_PATTERN, queue_name
from worker.operations.receipts import is_job_id

SCAN_KEYS = 1000
"""How many keys Redis looks at in one step: below a millisecond, during which it serves nobody else."""

FIND_STEPS = 100
FIND_PAGE = 500
FIND_MESSAGES_MAX = 20_000

PREFIX = "node."
_NONSENSE = (ValueError, TypeError, LookupError, AttributeError)


@dataclass(frozen=True)
class Queued:
    """A job as its message has it, and how many messages its worker takes before it."""

    job_id: str
    task: str
    arguments: dict[str, Any]
    node: str
    ahead: int


class Queues:
    """The queues of nodes in one Redis. Made by ``looking``."""

    def __init__(self, channel: Any, client: Any) -> None:
        self._channel = channel
        self._client = client

    def scan(self, cursor: int) -> tuple[int, set[str]]:
        """One step through Redis' keys: where to go on (0: that was all), and the nodes whose queues were met."""
        cursor, keys = self._client.scan(cursor, match=f"{PREFIX}*", count=SCAN_KEYS, _type="list")
        names = {key.decode(errors="replace").partition(self._channel.sep)[0].removeprefix(PREFIX) for key in keys}
        return cursor, {name for name in names if NODE_PATTERN.fullmatch(name)}

    def size(self, node: str) -> int:
        """How many messages lie in the node's queue."""
        return int(sum(self._client.llen(key) for key in self._keys(node)))

    def read(self, node: str, offsets: dict[str, int], limit: int) -> Iterator[Queued]:
        """The next messages in the order they will be taken. ``offsets`` keeps how far each list was read."""
        before = 0
        for key in self._keys(node):
            length = int(self._client.llen(key))
            offset = offsets.get(key, 0) if offsets.get(key, 0) <= length else 0
            # Messages are pushed on the left and taken on the right: counted from there they keep their places.
            found = self._client.lrange(key, -(offset + limit), -(offset + 1)) if limit > 0 else []
            offsets[key] = offset + len(found)
            limit -= len(found)
            for place, raw in enumerate(reversed(found), before + offset):
                if queued := _parsed(raw, node, place):
                    yield queued
            before += length

    def find(self, job_id: str, nodes: Iterable[str]) -> Queued | None:
        """The message of a job, looked for among the first ones of each queue."""
        for node in dict.fromkeys([*nodes, *self._all_nodes()]):
            offsets: dict[str, int] = {}
            while sum(offsets.values()) < FIND_MESSAGES_MAX:
                before = sum(offsets.values())
                for queued in self.read(node, offsets, FIND_PAGE):
                    if queued.job_id == job_id:
                        return queued
                if sum(offsets.values()) == before:
                    break
        return None

    def _all_nodes(self) -> Iterator[str]:
        cursor = 0
        for _ in range(FIND_STEPS):
            cursor, names = self.scan(cursor)
            yield from names
            if not cursor:
                return

    def _keys(self, node: str) -> list[str]:
        # Kombu keeps a list for each priority, and takes from the first of them that has anything.
        return [self._channel._q_for_pri(queue_name(node), step) for step in self._channel.priority_steps]


@contextmanager
def looking(app: Celery) -> Iterator[Queues | None]:
    """The broker's queues; None where it is no Redis. Raises what redis-py raises when it does not answer."""
    with app.connection_for_read() as connection:
        if connection.transport.driver_type != "redis":
            yield None
            return
        with connection.channel() as channel, channel.conn_or_acquire() as client:
            yield Queues(channel, client)


def _parsed(raw: bytes, node: str, ahead: int) -> Queued | None:
    """None for what is no job's message: whoever takes it will see to that."""
    try:
        message = json.loads(raw)
        job_id, task = message["headers"]["id"], message["headers"]["task"]
        arguments = json.loads(base64.b64decode(message["body"]))[1]
        if is_job_id(job_id) and isinstance(task, str) and isinstance(arguments, dict):
            return Queued(job_id, task, arguments, node, ahead)
    except _NONSENSE:
        pass
    return None
