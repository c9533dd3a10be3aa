"""The benchmarks run and print what they found. Nothing here looks at how fast anything was."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.__main__ import BENCHMARKS
from tests.benchmarks.figures import Figures

REPOSITORY = Path(__file__).parents[2]
DEADLINE_S = 120


def run_benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m tests.benchmarks ARGUMENTS``; one that hangs is interrupted, so that it removes its nodes."""
    argv = [sys.executable, "-m", "tests.benchmarks", *arguments]
    with subprocess.Popen(argv, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, err = process.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            raise
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


@pytest.mark.node
@pytest.mark.usefixtures("qemu")
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs_and_prints_its_table(name: str) -> None:
    done = run_benchmarks(name, "--runs", "1")
    assert done.returncode == 0, done.stderr
    assert "| benchmark | what" in done.stdout
    assert f"\n| {name} " in done.stdout
    assert "- CPU: " in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.node
@pytest.mark.usefixtures("qemu")
def test_json_carries_every_value() -> None:
    done = run_benchmarks("stop", "--runs", "2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["machine"]) >= {"CPU", "RAM", "kernel", "QEMU", "Python", "Celery", "database"}
    for figures in found["benchmarks"]["stop"]["figures"]:
        assert figures["n"] == len(figures["values"]) == 2


def test_an_unknown_benchmark_is_refused_with_those_there_are() -> None:
    done = run_benchmarks("speed")
    assert done.returncode == 2
    assert "unknown benchmark speed; there are start, noop" in done.stderr


def test_rounds_below_one_are_refused() -> None:
    done = run_benchmarks("stop", "--runs", "0")
    assert done.returncode == 2
    assert "--runs must be at least 1" in done.stderr


def test_figures_sum_up_their_values() -> None:
    figures = Figures.of("x", "ms", range(1, 102), at_most=50)
    assert (figures.median, figures.p95, figures.iqr) == (51, 96, 50)
    assert figures.verdict == "<= 50: MISSED"
    once = Figures.of("x", "ms", [7.0])
    assert (once.median, once.p95, once.iqr, once.verdict) == (7, 7, 0, "")


def test_figures_are_compared_with_the_median_of_their_limit() -> None:
    limit = Figures.of("limit", "ms", [1, 2, 100])
    ours = Figures.of("ours", "ms", [4, 6])
    assert ours.beyond(limit, "beyond").values == (2, 4)
    assert ours.over(limit, "over", at_most=3).values == (2, 3)
    assert ours.over(limit, "over", at_most=3).verdict == "<= 3: kept"
