"""What a job's end brings about, while broker or database are away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from hostler.errors import OperationFailed
from models import utc_now
from tasks import outcome
from worker.operations.receipts import Ended, Wakeup


class Broker:
    """An application whose messages are taken or refused."""

    def __init__(self) -> None:
        self.away = False
        self.taken: list[str] = []

    def send_task(self, task: str, *, task_id: str, **_: Any) -> None:
        if self.away:
            raise ConnectionError("nobody listens")
        self.taken.append(task_id)


def wakeup(job_id: str) -> Wakeup:
    return Wakeup(job_id, "instance.pause", {"name": "web1"}, "n1")


def test_a_wakeup_that_the_broker_did_not_take_is_sent_with_the_next_ones_and_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outcome, "unsent", [])
    broker: Any = Broker()
    broker.away = True
    outcome.carry_out(broker, Ended([wakeup("first"), wakeup("second")]))
    outcome.carry_out(broker, Ended())
    broker.away = False
    outcome.carry_out(broker, Ended([wakeup("third")]))
    outcome.carry_out(broker, Ended())
    assert broker.taken == ["first", "second", "third"]


class Ledger:
    """One whose database is away for the first ``times``."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.put_off: list[tuple[str, int | None]] = []

    def postpone(self, job_id: str, error: dict[str, Any], attempt: int | None) -> tuple[datetime, Ended]:
        if self.times:
            self.times -= 1
            raise OperationalError("UPDATE jobs", {}, Exception("connection refused"))
        self.put_off.append((job_id, attempt))
        return utc_now(), Ended()


def put_off(ledger: Ledger) -> bool:
    service: Any = SimpleNamespace(node=SimpleNamespace(ledger=ledger), wake_at=lambda _: None)
    failure = OperationFailed("INTERNAL", "the node's database failed", {"retryable": True})
    app: Any = Broker()
    return outcome.postpone(app, service, SimpleNamespace(id="job", hostler_attempt=2), failure)


def test_a_job_is_put_off_once_the_database_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome, "LEDGER_RETRY_S", 0.001)
    ledger = Ledger(times=3)
    assert put_off(ledger)
    assert ledger.put_off == [("job", 2)]


def test_a_worker_that_is_to_end_does_not_wait_for_its_database(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(times=1)
    outcome.shutting_down.set()
    try:
        assert not put_off(ledger)
    finally:
        outcome.shutting_down.clear()
    assert ledger.put_off == []


class Reporter:
    """One that is only told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def settle(self, job_id: str) -> None:
        self.told.append(("settle", job_id))

    def doubt(self, job_ids: list[str]) -> None:
        self.told += [("doubt", job_id) for job_id in job_ids]


@pytest.fixture
def reporter() -> Iterator[Reporter]:
    made: Any = Reporter()
    outcome.use_reporter(made)
    yield made
    outcome.use_reporter(None)


def test_a_revoked_job_is_reported_on_no_more_before_its_result_says_so(reporter: Reporter) -> None:
    """That it waits was still to be published, and would have stood in the place of its end."""
    app: Any = SimpleNamespace(
        backend=SimpleNamespace(mark_as_revoked=lambda job_id, *_, **__: reporter.told.append(("revoked", job_id))),
        events=SimpleNamespace(default_dispatcher=lambda: nullcontext(SimpleNamespace(send=lambda *_, **__: None))),
    )
    outcome.mark_revoked(app, "j1", "enough")
    assert reporter.told == [("settle", "j1"), ("revoked", "j1")]


def test_a_revoked_job_whose_result_could_not_say_so_is_seen_to_later(reporter: Reporter) -> None:
    app: Any = Broker()  # which has no backend
    outcome.mark_revoked(app, "j1", "enough")
    assert reporter.told == [("settle", "j1"), ("doubt", "j1")]
