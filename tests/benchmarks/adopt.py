"""A worker's start to ready with 20 running guests to adopt, against the same without any."""

from __future__ import annotations

import json
import signal
import time
from datetime import datetime

from tests.benchmarks.bare import node_and_sender
from tests.benchmarks.figures import Figures, Result
from tests.nodes import TestNode, node, tiny_instance

RUNS = 7
GUESTS = 20
FEW = 3
"""Of a single run, which only shows that it works."""


def measure(runs: int = RUNS) -> Result:
    """The two nodes in turn, so that the guests' own work slows both. The first of each does not count."""
    alone: list[float] = []
    with_guests: list[float] = []
    guests = GUESTS if runs > 1 else FEW
    with node("n0") as empty, node_and_sender() as (full, sender):
        starts = [{"instance": tiny_instance(full.root, f"web{number}")} for number in range(guests)]
        sender.timed_batch_ms("instance.start", "node.n1", starts)
        for _ in range(1 + runs):
            alone.append(_start_ms(empty))
            with_guests.append(_start_ms(full))
        assert len(full.qemu_pids()) == guests
    limit = Figures.of("start to ready, no guest", "ms", alone[1:])
    whole = Figures.of(f"start to ready, {guests} guests adopted", "ms", with_guests[1:])
    beyond = whole.beyond(limit, f"adoption of {guests} guests")
    each = Figures.of("adoption, per guest", "ms", (value / guests for value in beyond.values))
    return Result((limit, whole, beyond, each))


def _start_ms(made: TestNode) -> float:
    """End the worker in good order and start the next: from before its exec to its own word that it is ready."""
    made.kill_worker(signal.SIGTERM)
    known = made.log_path.stat().st_size if made.log_path.exists() else 0
    began = time.time()
    made.start_worker()
    said = made.log_path.read_bytes()[known:].decode().splitlines()
    entries = [json.loads(line) for line in said if line.startswith("{")]
    ready = next(entry for entry in entries if entry["event"] == "worker is ready")
    return (datetime.fromisoformat(ready["timestamp"]).timestamp() - began) * 1000
