"""Starting a guest: the job, from sending to result seen, against the same QEMU from exec to the answer of `cont`."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from datetime import datetime
from itertools import pairwise

from sqlalchemy import select

from models import Job
from tests.benchmarks.bare import Sender, node_and_sender, result_of
from tests.benchmarks.figures import Figures, Result
from tests.benchmarks.raw import RawGuest, Started, end_all, require_same_argv
from tests.nodes import TestNode, tiny_instance

RUNS = 30
AIM_BEYOND_MS = 60


def measure(runs: int = RUNS) -> Result:
    """Raw and job rounds in turn, so that a drift of the machine hits both."""
    raw: list[Started] = []
    jobs: list[dict[str, float]] = []
    with node_and_sender() as (node, sender), asyncio.Runner() as runner:
        _warm_up(node, sender, runner)
        for _ in range(runs):
            guest = RawGuest(node, tiny_instance(node.root))
            raw.append(runner.run(guest.start()))
            runner.run(end_all([guest]))
            jobs.append(_job(node, sender))
            _stop(sender)
    return _result(raw, jobs)


def _warm_up(node: TestNode, sender: Sender, runner: asyncio.Runner) -> None:
    sender.do("instance.start", "node.n1", instance=tiny_instance(node.root))
    guest = RawGuest(node, tiny_instance(node.root))
    require_same_argv(guest, node, "web1")
    _stop(sender)
    runner.run(guest.start())
    runner.run(end_all([guest]))


def _stop(sender: Sender) -> None:
    sender.do("instance.stop", "node.n1", name="web1", force=True)


def _job(node: TestNode, sender: Sender) -> dict[str, float]:
    """One start: the milliseconds of each part, in order; they add up to the whole."""
    instance = tiny_instance(node.root)
    moments = [("sending, to the receipt in the ledger", time.time())]
    sent = sender.send("instance.start", "node.n1", instance=instance)
    result_of(sent)
    seen = time.time()
    with node.reading() as session:
        row = session.scalars(select(Job).where(Job.id == sent.id)).one()
    assert row.finished_at is not None
    moments += [("claim of the job, to its thread", row.received_at.timestamp())]
    moments += [(f"phase {entry['phase']}", datetime.fromisoformat(entry["at"]).timestamp()) for entry in row.phases]
    moments += [("end in the ledger, to the result seen", row.finished_at.timestamp()), ("", seen)]
    return {what: (after - at) * 1000 for (what, at), (_, after) in pairwise(moments)}


def _result(raw: list[Started], jobs: list[dict[str, float]]) -> Result:
    limit = Figures.of("raw QEMU: exec to the answer of cont", "ms", (one.total_ms for one in raw))
    whole = Figures.of("start job: send to result seen", "ms", (sum(parts.values()) for parts in jobs))
    by_part: dict[str, list[float]] = defaultdict(list)
    for parts in jobs:
        for what, took_ms in parts.items():
            by_part[what].append(took_ms)
    return Result(
        (
            limit,
            Figures.of("- of it exec to QMP negotiated", "ms", (one.greeting_ms for one in raw)),
            whole,
            whole.beyond(limit, "start job beyond raw QEMU", AIM_BEYOND_MS),
            *(Figures.of(f"- {what}", "ms", values) for what, values in by_part.items()),
        ),
        ("The argv of both was compared: equal but for the uuid and the numbers of descriptors.",),
    )
