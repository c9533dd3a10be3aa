"""`instance.list` of a node that knows 1,000 stopped instances, against a bare task with an answer of the same size."""

from __future__ import annotations

import json

from hostler.contract import InstanceState
from hostler.payloads import Instance, parse
from models import Instance as InstanceRow
from models import utc_now
from tests.benchmarks.bare import QUEUE, bare_worker, node_and_sender
from tests.benchmarks.figures import Figures, Result
from tests.nodes import TestNode, tiny_instance

RUNS = 20
INSTANCES = 1000


def measure(runs: int = RUNS) -> Result:
    """Bare task and job in turn. The first of each warms up and does not count."""
    with node_and_sender() as (node, sender), bare_worker(node):
        _insert_stopped(node)
        views = sender.do("instance.list", "node.n1")
        assert len(views) == INSTANCES
        pairs = [
            (
                sender.timed_ms("repeat", QUEUE, item=views[0], times=INSTANCES),
                sender.timed_ms("instance.list", "node.n1"),
            )
            for _ in range(1 + runs)
        ][1:]
    bare = Figures.of(f"bare Celery: {INSTANCES} views from memory", "ms", (pair[0] for pair in pairs))
    ours = Figures.of(f"instance.list of {INSTANCES}", "ms", (pair[1] for pair in pairs))
    note = f"An answer is {len(json.dumps(views)) / 1000:.0f} kB of JSON."
    return Result((bare, ours, ours.over(bare, "list over bare")), (note,))


def _insert_stopped(node: TestNode) -> None:
    spec = parse(Instance, tiny_instance(node.root)).model_dump(mode="json")
    with node.database().transaction() as session:
        session.add_all(
            InstanceRow(
                name=f"web{number}",
                node=node.name,
                state=InstanceState.STOPPED,
                reason="stopped by force",
                spec=spec | {"name": f"web{number}"},
                ended_at=utc_now(),
            )
            for number in range(INSTANCES)
        )
