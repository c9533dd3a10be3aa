"""The bare limits of Celery: a worker without hostler's code beside the node, and a client without it before both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from celery import Celery
from celery.result import AsyncResult

from tests.benchmarks import BARE_OPTIONS, BARE_READY
from tests.nodes import TestNode, node, until

PROGRAM = (sys.executable, "-m", "tests.benchmarks.bare_app")
CELERY = (
    *(sys.executable, "-m", "celery", "-A", "tests.benchmarks.bare_app", "worker"),
    *("--loglevel", "WARNING", "--without-mingle", "--without-gossip"),
)
QUEUE = "bare"
RESULT_TIMEOUT_S = 120.0

_REPOSITORY = Path(__file__).parents[2]
_HOSTLERS_OWN = ("include", "task_queues", "worker_consumer")
_PRINT_OPTIONS = f"""\
import json
from hostler.settings import load
from worker.celery_config import node_options
options = node_options(load())
print(json.dumps({{name: value for name, value in options.items() if name not in {_HOSTLERS_OWN}}}))
"""


class Sender:
    """A Celery client as anybody would write one, for all queues of one Redis."""

    def __init__(self, url: str) -> None:
        self._app = Celery("sender", broker=url, backend=url, set_as_current=False)

    def send(self, task: str, queue: str, **kwargs: Any) -> AsyncResult:
        """Send a task and wait for nothing."""
        return self._app.send_task(task, kwargs=kwargs, queue=queue)

    def do(self, task: str, queue: str, **kwargs: Any) -> Any:
        """Send a task and wait for its result."""
        return result_of(self.send(task, queue, **kwargs))

    def timed_ms(self, task: str, queue: str, **kwargs: Any) -> float:
        """From just before sending to the result seen."""
        began = time.perf_counter()
        self.do(task, queue, **kwargs)
        return (time.perf_counter() - began) * 1000

    def timed_batch_ms(self, task: str, queue: str, arguments: list[dict[str, Any]]) -> float:
        """From just before sending the first of many at once to the last result seen."""
        began = time.perf_counter()
        for result in [self.send(task, queue, **kwargs) for kwargs in arguments]:
            result_of(result)
        return (time.perf_counter() - began) * 1000

    def close(self) -> None:
        """Close the connections."""
        # A result that is deleted later, with a traceback for example, would look for its Redis, which is gone by then.
        self._app.backend.remove_pending_result = lambda result: result
        self._app.close()


def result_of(result: AsyncResult) -> Any:
    """Wait for a result; what it failed with is raised."""
    return result.get(timeout=RESULT_TIMEOUT_S)


@contextmanager
def node_and_sender(name: str = "n1", **environment: str) -> Iterator[tuple[TestNode, Sender]]:
    """A node with its worker ready, and a bare client of its Redis."""
    with node(name, prefix=(), **environment) as made:
        made.start_worker()
        sender = Sender(made.settings.effective_broker_url)
        try:
            yield made, sender
        finally:
            sender.close()


@contextmanager
def bare_worker(beside: TestNode, command: tuple[str, ...] = PROGRAM) -> Iterator[int]:
    """A bare Celery worker with the settings and the Redis of a node, consuming ``QUEUE``; gives its pid."""
    options_file = beside.root / "bare-options.json"
    options_file.write_text(json.dumps(_options(beside)))
    env = {name: value for name, value in os.environ.items() if not name.startswith("HOSTLER_")}
    log_path = beside.root / "bare.log"
    with log_path.open("wb") as log:
        worker = subprocess.Popen(
            command, env=env | {BARE_OPTIONS: str(options_file)}, cwd=_REPOSITORY, stdout=log, stderr=log
        )
    try:
        until(lambda: _is_ready(worker, log_path), what="the bare worker is ready")
        yield worker.pid
    finally:
        worker.terminate()
        try:
            worker.wait(10)
        finally:
            worker.kill()
            worker.wait()


def _is_ready(worker: subprocess.Popen[bytes], log_path: Path) -> bool:
    said = log_path.read_text(errors="replace")
    if worker.poll() is not None:
        raise RuntimeError(f"the bare worker ended: {said}")
    return BARE_READY in said


def _options(of: TestNode) -> dict[str, Any]:
    # Asked of a process of the node's own: the settings are computed from its environment when the module is loaded.
    done = subprocess.run(
        [sys.executable, "-c", _PRINT_OPTIONS], env=of.env, cwd=of.root, capture_output=True, text=True, check=True
    )
    options: dict[str, Any] = json.loads(done.stdout)
    own = {name: f"{name}.{QUEUE}" for name in ("unacked_key", "unacked_index_key", "unacked_mutex_key")}
    options["broker_transport_options"] |= own
    return options | {f"task_default_{what}": QUEUE for what in ("queue", "exchange", "routing_key")}
