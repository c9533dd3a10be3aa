"""The reporter: the newest report of each job, in order, never in anybody's way, and never for long over a result."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context

from hostler.contract import JobState
from hostler.errors import OperationFailed
from tasks.reporting import Reporter
from tests.nodes import until

DEADLINE_S = 30.0


class Watched:
    """An application with backend and broker in memory. Storing can be held up or made to fail, as by an outage."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.app = Celery("test", broker="memory://", backend="cache+memory://", set_as_current=False)
        self.app.conf.result_extended = True
        self.stored: list[tuple[str, str, Any]] = []
        self.entered, self.gate = threading.Event(), threading.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.looked_at: list[set[str]] = []
        self.left: list[Collection[str] | Exception] = []
        """What the next looks at jobs in doubt leave, or raise; those after them leave none."""
        kind = type(self.app.backend)  # of which Celery makes one for each thread
        self._store = kind._store_result

        def store(backend: Any, *args: Any, **kwargs: Any) -> None:
            self._watch(backend, *args, **kwargs)

        monkeypatch.setattr(kind, "_store_result", store)

    def _watch(self, backend: Any, job_id: str, result: Any, state: str, *args: Any, **kwargs: Any) -> None:
        self.entered.set()
        assert self.gate.wait(DEADLINE_S)
        if self.failure:
            raise self.failure
        self._store(backend, job_id, result, state, *args, **kwargs)
        self.stored.append((job_id, state, result))

    def restore(self, job_ids: Collection[str]) -> Collection[str]:
        self.looked_at.append({*job_ids})
        left = self.left.pop(0) if self.left else ()
        if isinstance(left, Exception):
            raise left
        return left

    def hold(self) -> None:
        self.gate.clear()
        self.entered.clear()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    monkeypatch.setattr("tasks.reporting.LOOK_AFTER_S", 0.05)
    monkeypatch.setattr("tasks.reporting.LOOK_AGAIN_S", 0.05)
    made = Watched(monkeypatch)
    yield made
    made.gate.set()


@pytest.fixture
def reporter(watched: Watched) -> Iterator[Reporter]:
    made = Reporter(watched.app, "hostler@n1", watched.restore)
    yield made
    watched.gate.set()
    made.close()
    made._thread.join(DEADLINE_S)
    assert not made._thread.is_alive()


def request(job_id: str) -> Context:
    return Context(id=job_id, task="instance.pause", kwargs={"name": "web1"})


def meta(percent: int) -> dict[str, Any]:
    return {"phase": "pause", "percent": percent, "message": "pausing", "instance": "web1", "node": "n1"}


def test_a_report_reaches_the_result_backend_as_state_and_meta(watched: Watched, reporter: Reporter) -> None:
    reporter.report(request("j1"), JobState.PROGRESS, meta(50))
    until(lambda: watched.stored)
    result = watched.app.AsyncResult("j1")
    assert (result.state, result.info) == ("PROGRESS", meta(50))
    assert (result.name, result.kwargs) == ("instance.pause", {"name": "web1"})


def test_a_job_that_is_put_off_shows_why(watched: Watched, reporter: Reporter) -> None:
    reporter.report(request("j1"), JobState.RETRY, OperationFailed("QMP_LOST", "silent", {"retryable": True}))
    until(lambda: watched.stored)
    assert watched.app.AsyncResult("j1").state == "RETRY"


def test_while_the_backend_is_slow_only_the_newest_report_of_a_job_waits(watched: Watched, reporter: Reporter) -> None:
    watched.hold()
    reporter.report(request("j1"), JobState.PROGRESS, meta(1))
    assert watched.entered.wait(DEADLINE_S)
    for percent in range(2, 100):
        reporter.report(request("j1"), JobState.PROGRESS, meta(percent))
    reporter.report(request("j2"), JobState.PROGRESS, meta(7))
    watched.gate.set()
    until(lambda: len(watched.stored) == 3)
    assert [(job_id, result["percent"]) for job_id, _, result in watched.stored] == [("j1", 1), ("j2", 7), ("j1", 99)]


def test_a_job_is_not_reported_on_more_often_than_ten_times_a_second_unless_another_node_goes_on_with_it(
    watched: Watched, reporter: Reporter
) -> None:
    for percent in range(50):
        reporter.report(request("j1"), JobState.PROGRESS, meta(percent))
        until(lambda: watched.stored)
    reporter.hurry("j1")
    until(lambda: len(watched.stored) >= 2)
    assert [result["percent"] for _, _, result in watched.stored] == [0, 49]


def test_reporting_does_not_wait_for_the_backend(watched: Watched, reporter: Reporter) -> None:
    watched.hold()
    for number in range(100):
        reporter.report(request(f"j{number}"), JobState.PROGRESS, meta(1))
    assert watched.stored == []  # and here we are


def test_a_job_that_has_ended_is_not_reported_on_any_more(watched: Watched, reporter: Reporter) -> None:
    watched.hold()
    reporter.report(request("j1"), JobState.PROGRESS, meta(1))
    assert watched.entered.wait(DEADLINE_S)
    reporter.report(request("j2"), JobState.PROGRESS, meta(1))
    reporter.settle("j2")  # returns at once: nothing of it is under way
    watched.gate.set()
    reporter.report(request("j3"), JobState.PROGRESS, meta(1))
    until(lambda: len(watched.stored) == 2)
    assert [job_id for job_id, _, _ in watched.stored] == ["j1", "j3"]


def test_the_end_of_a_job_waits_for_its_report_that_is_under_way(watched: Watched, reporter: Reporter) -> None:
    watched.hold()
    reporter.report(request("j1"), JobState.PROGRESS, meta(1))
    assert watched.entered.wait(DEADLINE_S)
    settled = threading.Event()
    settling = threading.Thread(target=lambda: (reporter.settle("j1"), settled.set()))
    settling.start()
    assert not settled.is_set()
    watched.gate.set()
    assert settled.wait(DEADLINE_S)
    assert [job_id for job_id, _, _ in watched.stored] == ["j1"]
    settling.join()


def test_a_backend_that_hangs_does_not_keep_a_job_from_ending(
    watched: Watched, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.reporting.SETTLE_S", 0.05)
    watched.hold()
    reporter.report(request("j1"), JobState.PROGRESS, meta(1))
    assert watched.entered.wait(DEADLINE_S)
    reporter.settle("j1")
    assert watched.stored == []


def test_a_report_that_fails_costs_no_other_one(watched: Watched, reporter: Reporter) -> None:
    watched.hold()
    watched.failure = ConnectionError("the backend is away")
    reporter.report(request("j1"), JobState.PROGRESS, meta(1))
    assert watched.entered.wait(DEADLINE_S)
    watched.gate.set()
    reporter.settle("j1")
    watched.failure = None
    reporter.report(request("j1"), JobState.PROGRESS, meta(2))
    until(lambda: watched.stored)
    assert watched.app.AsyncResult("j1").info == meta(2)


def test_a_closed_reporter_says_nothing_more(watched: Watched, reporter: Reporter) -> None:
    reporter.close()
    reporter._thread.join(DEADLINE_S)
    reporter.report(request("j1"), JobState.PROGRESS, meta(1))
    reporter.settle("j1")
    assert watched.stored == []


# Reports that come late


def test_jobs_that_were_reported_on_are_looked_at_afterwards_and_once(watched: Watched, reporter: Reporter) -> None:
    for job_id in ("j1", "j2"):
        reporter.report(request(job_id), JobState.PROGRESS, meta(1))
    until(lambda: set().union(*watched.looked_at) == {"j1", "j2"})
    reporter.report(request("j3"), JobState.PROGRESS, meta(1))
    until(lambda: watched.looked_at[-1] == {"j3"})
    assert [job_id for job_id, _, _ in watched.stored] == ["j1", "j2", "j3"]
    assert sum(map(len, watched.looked_at)) == 3


def test_a_job_is_looked_at_after_its_report_and_not_while_that_is_on_its_way(
    watched: Watched, reporter: Reporter
) -> None:
    watched.hold()
    reporter.report(request("late"), JobState.PROGRESS, meta(1))
    assert watched.entered.wait(DEADLINE_S)
    reporter.doubt(["other"])
    watched.gate.set()
    until(lambda: set().union(*watched.looked_at) == {"late", "other"})
    assert [job_id for job_id, _, _ in watched.stored] == ["late"]


def test_a_job_whose_report_failed_is_looked_at_too(watched: Watched, reporter: Reporter) -> None:
    """It may have arrived, and only the answer got lost."""
    watched.failure = ConnectionError("the backend is away")
    reporter.report(request("j1"), JobState.PROGRESS, meta(1))
    until(lambda: watched.looked_at == [{"j1"}])


@pytest.mark.parametrize("left", [ConnectionError("the database is away"), ["j1"]], ids=["all", "some"])
def test_what_could_not_be_looked_at_is_looked_at_again(watched: Watched, reporter: Reporter, left: Any) -> None:
    watched.left = [left]
    reporter.doubt(["j1"])
    until(lambda: watched.looked_at == [{"j1"}] * 2)
    reporter.doubt(["j2"])
    until(lambda: watched.looked_at == [{"j1"}, {"j1"}, {"j2"}])


def test_reports_go_on_while_the_database_is_away(
    watched: Watched, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.reporting.LOOK_AGAIN_S", 2 * DEADLINE_S)
    watched.left = [ConnectionError("the database is away")]
    reporter.doubt(["j1"])
    until(lambda: watched.looked_at)
    reporter.report(request("j2"), JobState.PROGRESS, meta(1))
    until(lambda: watched.stored)
    assert watched.looked_at == [{"j1"}]
