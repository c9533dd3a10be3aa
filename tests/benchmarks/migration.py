"""Live migration: the job's time beyond QEMU's own, downtime against what was asked for, and how fresh progress is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from hostler.errors import OperationFailed
from tests.benchmarks.figures import Figures, Result
from tests.benchmarks.noop import postgresql
from tests.dirtying_guest import write_disk
from tests.nodes import TestNode, tiny_instance
from tests.pairs import pair

RUNS = 10
AIM_MS = 150.0
"""Ganeti's was 2,850 ms."""
SIZES_MIB = (128, 2048)
DIRTY_MIB, RATE_MIB_S = 32, 20
"""How much a dirtying guest has in work, and how much of that it writes each second."""


def measure(runs: int = RUNS) -> Result:
    """Each guest there and back ``runs`` times. The first move of each warms up and does not count."""
    notes = [f"A dirtying guest writes {RATE_MIB_S} MiB/s to {DIRTY_MIB} MiB. Both nodes are this machine."]
    figures = [*_measure_on("SQLite", runs, notes)]
    try:
        with postgresql() as (url, note):
            figures += _measure_on("PostgreSQL", runs, notes, HOSTLER_DATABASE_URL=url)
        notes.append(note)
    except (pytest.skip.Exception, pytest.fail.Exception) as missing:
        notes.append(f"Without PostgreSQL: {missing}")
    return Result(tuple(figures), tuple(notes))


def _measure_on(database: str, runs: int, notes: list[str], **environment: str) -> Iterator[Figures]:
    with pair(**environment) as nodes:
        for size_mib in SIZES_MIB:
            for kind in ("idle", "dirtying"):
                label = f"{database}, {size_mib} MiB, {kind}"
                yield from _figures(label, [*_moves(nodes, size_mib, kind, runs, notes)][1:])


def _moves(nodes: list[TestNode], size_mib: int, kind: str, runs: int, notes: list[str]) -> Iterator[dict[str, Any]]:
    source, target = nodes
    name = f"{kind}{size_mib}"
    instance = tiny_instance(source.root, name, memory_mib=size_mib)
    if kind == "dirtying":
        write_disk(source.root / f"{name}.img", RATE_MIB_S, DIRTY_MIB)
    source.start(instance)
    try:
        for _ in range(1 + runs):
            yield _move(source, target, name)
            source, target = target, source
    except OperationFailed as failure:
        notes.append(f"{name} did not move: {failure}")
    finally:
        source.do("instance.stop", name=name, force=True)


def _move(source: TestNode, target: TestNode, name: str) -> dict[str, Any]:
    ages_ms: list[float] = []

    def seen(progress: dict[str, Any]) -> None:
        said = datetime.fromisoformat(progress["updated_at"])
        ages_ms.append((datetime.now(UTC) - said).total_seconds() * 1000)

    began = time.perf_counter()
    report = source.send("instance.migrate", name=name, target=target.name).wait(120, seen)
    took_ms = (time.perf_counter() - began) * 1000
    return {**report, "job_ms": took_ms, "ages_ms": ages_ms}


def _figures(label: str, moves: list[dict[str, Any]]) -> Iterator[Figures]:
    if not moves:
        return
    yield Figures.of(f"{label}: QEMU's own total-time", "ms", [each["qemu_total_ms"] for each in moves])
    yield Figures.of(f"{label}: migrate job, send to result seen", "ms", [each["job_ms"] for each in moves])
    beyond = [each["job_ms"] - each["qemu_total_ms"] for each in moves]
    yield Figures.of(f"{label}: job beyond QEMU's own", "ms", beyond, AIM_MS)
    yield Figures.of(f"{label}: downtime, QEMU's own", "ms", [each["downtime_ms"] for each in moves])
    seen = [each["downtime_seen_ms"] for each in moves]
    yield Figures.of(f"{label}: downtime, stopped there to running here", "ms", seen, moves[0]["downtime_limit_ms"])
    yield Figures.of(f"{label}: age of progress when seen", "ms", [age for each in moves for age in each["ages_ms"]])
