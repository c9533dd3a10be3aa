"""Stopping a guest by force: the job, from sending to result seen, against SIGTERM to exit of the same QEMU."""

from __future__ import annotations

import asyncio

from tests.benchmarks.bare import node_and_sender
from tests.benchmarks.figures import Figures, Result
from tests.benchmarks.raw import RawGuest, end_all
from tests.nodes import tiny_instance

RUNS = 30


def measure(runs: int = RUNS) -> Result:
    """Raw and job rounds in turn. The first of each warms up and does not count."""
    raw: list[float] = []
    jobs: list[float] = []
    with node_and_sender() as (node, sender), asyncio.Runner() as runner:
        instance = tiny_instance(node.root)
        for _ in range(1 + runs):
            guest = RawGuest(node, instance)
            runner.run(guest.start())
            raw.append(runner.run(end_all([guest])))
            sender.do("instance.start", "node.n1", instance=instance)
            jobs.append(sender.timed_ms("instance.stop", "node.n1", name="web1", force=True))
    limit = Figures.of("raw QEMU: SIGTERM to exit", "ms", raw[1:])
    whole = Figures.of("stop job by force: send to result seen", "ms", jobs[1:])
    return Result((limit, whole, whole.beyond(limit, "stop job beyond raw QEMU")))
