"""A job that does nothing (`instance.list` on an empty node) against a bare Celery task with the same settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import text

from migrations import schema
from models import Database
from tests.benchmarks.bare import QUEUE, bare_worker, node_and_sender
from tests.benchmarks.figures import Figures, Result
from tests.services import postgresql_database

RUNS = 200
RUNS_A_BATCH = 20
BATCH = 200
AIM_TIMES = 2


def measure(runs: int = RUNS) -> Result:
    """``runs`` jobs one after the other, in turn with the bare task; one batch for every ``RUNS_A_BATCH`` of them."""
    figures, note = _measure_on("SQLite", runs), ""
    try:
        with postgresql() as (url, note):
            figures += _measure_on("PostgreSQL", runs, HOSTLER_DATABASE_URL=url)
    except (pytest.skip.Exception, pytest.fail.Exception) as missing:
        note = f"Without PostgreSQL: {missing}"
    return Result((*figures,), (note,))


def _measure_on(database: str, runs: int, **environment: str) -> list[Figures]:
    with node_and_sender(**environment) as (node, sender), bare_worker(node):
        bare_task, job = ("noop", QUEUE), ("instance.list", "node.n1")
        none: list[dict[str, Any]] = [{} for _ in range(BATCH)]
        for target in (bare_task, job):
            sender.timed_batch_ms(*target, none[:20])  # warm up
        one_by_one = [(sender.timed_ms(*bare_task), sender.timed_ms(*job)) for _ in range(runs)]
        batches = [
            (sender.timed_batch_ms(*bare_task, none), sender.timed_batch_ms(*job, none))
            for _ in range(max(1, runs // RUNS_A_BATCH))
        ]
    return [
        *_compared(database, "one at a time", one_by_one),
        *_compared(database, f"{BATCH} at once, per job", [(bare / BATCH, ours / BATCH) for bare, ours in batches]),
    ]


def _compared(database: str, how: str, pairs: list[tuple[float, float]]) -> list[Figures]:
    bare = Figures.of(f"{database}: bare Celery, {how}", "ms", (pair[0] for pair in pairs))
    ours = Figures.of(f"{database}: no-op job, {how}", "ms", (pair[1] for pair in pairs))
    return [bare, ours, ours.over(bare, f"{database}: job over bare, {how}", AIM_TIMES)]


@contextmanager
def postgresql() -> Iterator[tuple[str, str]]:
    """The URL of a scratch database with our schema, and a note on its server. Skips or fails where there is none."""
    with postgresql_database() as url:
        database = Database(url)
        try:
            schema.upgrade(database)
            with database.reading() as session:
                names = ("server_version", "fsync", "synchronous_commit")
                shown = [f"{name} {session.scalar(text(f'SHOW {name}'))}" for name in names]
        finally:
            database.dispose()
        yield url, f"PostgreSQL on this machine: {', '.join(shown)}."
