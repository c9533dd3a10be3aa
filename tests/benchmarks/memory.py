"""Memory of an idle worker (PSS) against that of a bare Celery worker, each started in the two ways there are."""

from __future__ import annotations

import signal
from importlib.metadata import entry_points

import psutil

from tests.benchmarks.bare import CELERY, PROGRAM, Sender, bare_worker, node_and_sender
from tests.benchmarks.figures import Figures, Result
from tests.nodes import CELERY_WORKER, WORKER, TestNode, node, tiny_instance, until

RUNS = 3
AIM_MB = 80
HELD_TO_THE_AIM = ("hostler worker", "celery -A worker worker")
STEADY_READINGS = 10
"""So many equal readings, 20 ms apart, are taken for idle."""

_READY_SHOWN = ("--loglevel", "INFO")
"""Celery's command line shows warnings only, by default, and the node waits for the line "worker is ready"."""

Readings = dict[str, list[int]]


def measure(runs: int = RUNS) -> Result:
    """Each worker alone: what two processes share counts half for each of them."""
    readings: Readings = {}
    for _ in range(runs):
        _read_bare(readings)
        _read_node(readings, "hostler worker", WORKER)
        _read_node(readings, "celery -A worker worker", (*CELERY_WORKER, *_READY_SHOWN))
        _read_used(readings)
    megabytes = [
        Figures.of(
            f"{what}, PSS", "MB", (value / 10**6 for value in values), AIM_MB if what in HELD_TO_THE_AIM else None
        )
        for what, values in readings.items()
    ]
    mebibytes = [
        Figures.of(f"{what}, PSS", "MiB", (value / 2**20 for value in values)) for what, values in readings.items()
    ]
    units = "MB are 10^6 bytes, MiB 2^20: 80 MB are 76.3 MiB. Pages shared with other processes count by their share."
    return Result((*megabytes, *mebibytes), (units, _plug_ins()))


def _plug_ins() -> str:
    """Celery's command line imports every plug-in that is installed, in hostler's worker as in the bare one."""
    found = ", ".join(sorted(plug_in.name for plug_in in entry_points(group="celery.commands")))
    return f"Plug-ins that celery's command line loaded into the workers it started: {found or 'none'}."


def _read_bare(readings: Readings) -> None:
    with node() as beside:
        beside.client().ping("n1")  # starts the broker
        for what, command in (("bare, as a program", PROGRAM), ("bare, by celery's command line", CELERY)):
            with bare_worker(beside, command) as pid:
                readings.setdefault(what, []).append(_idle_pss(pid))


def _read_node(readings: Readings, what: str, command: tuple[str, ...]) -> None:
    with node() as made:
        made.start_worker()  # once: it makes the tables, with Alembic, which no later start needs
        if command == WORKER:
            readings.setdefault(f"{what}, its first start ever", []).append(_idle_pss(_pid(made)))
        made.kill_worker(signal.SIGTERM)
        made.start_worker(*command)
        readings.setdefault(what, []).append(_idle_pss(_pid(made)))


def _read_used(readings: Readings) -> None:
    with node_and_sender() as (made, sender):
        made.kill_worker(signal.SIGTERM)
        made.start_worker()
        _work(made, sender)
        readings.setdefault("hostler worker, idle again after its first guest", []).append(_idle_pss(_pid(made)))


def _work(made: TestNode, sender: Sender) -> None:
    sender.do("instance.start", "node.n1", instance=tiny_instance(made.root))
    sender.do("instance.stop", "node.n1", name="web1", force=True)


def _pid(made: TestNode) -> int:
    assert made.worker is not None
    return made.worker.pid


def _idle_pss(pid: int) -> int:
    """Bytes, once they do not change any more."""
    process = psutil.Process(pid)
    readings: list[int] = []

    def steady() -> bool:
        readings.append(process.memory_full_info().pss)
        last = readings[-STEADY_READINGS:]
        return len(last) == STEADY_READINGS and max(last) - min(last) < 0.005 * max(last)

    until(steady, what="the worker's memory is steady")
    return readings[-1]
