"""A bare Celery application with a node's Celery settings and none of hostler's code: the limit for any job.

Run by ``celery -A tests.benchmarks.bare_app worker``, or as a program, which spares what Celery's command line loads.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from celery import Celery
from celery.signals import worker_ready

from tests.benchmarks import BARE_OPTIONS, BARE_READY

app = Celery("bare")
app.conf.update(json.loads(Path(os.environ[BARE_OPTIONS]).read_text()))


def noop() -> list[Any]:
    """Nothing, and the answer of a node without instances."""
    return []


def repeat(item: Any, times: int) -> list[Any]:
    """An answer of any size."""
    return [item] * times


def _ready(**_: Any) -> None:
    print(BARE_READY, flush=True)


app.task(name="noop")(noop)
app.task(name="repeat")(repeat)
worker_ready.connect(_ready)

if __name__ == "__main__":
    # As `hostler worker` does it. WARNING, because a node does not log every task either.
    app.Worker(loglevel="WARNING", quiet=True, without_mingle=True, without_gossip=True).start()
