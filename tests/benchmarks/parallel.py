"""Twenty guests started, then stopped by force, all at once: jobs against as many raw QEMUs at once."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from tests.benchmarks.bare import Sender, node_and_sender
from tests.benchmarks.figures import Figures, Result
from tests.benchmarks.raw import RawGuest, end_all, start_all
from tests.nodes import TestNode, tiny_instance

RUNS = 7
GUESTS = 20

Pair = tuple[float, float]


def measure(runs: int = RUNS) -> Result:
    """Raw and job rounds in turn. The first of each warms up and does not count."""
    raw: list[Pair] = []
    jobs: list[Pair] = []
    with node_and_sender() as (node, sender), asyncio.Runner() as runner:
        instances = [tiny_instance(node.root, f"web{number}") for number in range(GUESTS)]
        for _ in range(1 + runs):
            raw.append(runner.run(_raw_round(node, instances)))
            jobs.append(_job_round(sender, instances))
    return Result((*_compared("start", raw[1:], jobs[1:], 0), *_compared("stop", raw[1:], jobs[1:], 1)))


async def _raw_round(node: TestNode, instances: list[dict[str, Any]]) -> Pair:
    guests = [RawGuest(node, instance) for instance in instances]
    began = time.perf_counter()
    await start_all(guests)
    return (time.perf_counter() - began) * 1000, await end_all(guests)


def _job_round(sender: Sender, instances: list[dict[str, Any]]) -> Pair:
    starts = [{"instance": instance} for instance in instances]
    stops = [{"name": instance["name"], "force": True} for instance in instances]
    start_ms = sender.timed_batch_ms("instance.start", "node.n1", starts)
    return start_ms, sender.timed_batch_ms("instance.stop", "node.n1", stops)


def _compared(what: str, raw: list[Pair], jobs: list[Pair], position: int) -> list[Figures]:
    limit = Figures.of(f"{what} {GUESTS} raw QEMUs at once", "ms", (pair[position] for pair in raw))
    whole = Figures.of(f"{what} {GUESTS} guests by jobs at once", "ms", (pair[position] for pair in jobs))
    return [limit, whole, whole.over(limit, f"{what} by jobs over raw")]
