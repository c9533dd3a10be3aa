"""The ledger on a host whose clock is set."""

from __future__ import annotations

from datetime import timedelta

import pytest

from models import Database
from tests.unit.worker.operations.ledgers import ledger_of, receipt
from worker.operations import ledger as ledger_module

HOUR = timedelta(hours=1)
ERROR = {"code": "QMP_LOST", "message": "silence", "details": {}}


def set_clock(monkeypatch: pytest.MonkeyPatch, by: timedelta) -> None:
    true = ledger_module.utc_now
    monkeypatch.setattr(ledger_module, "utc_now", lambda: true() + by)


@pytest.mark.parametrize("by", [-HOUR, HOUR], ids=["back", "forward"])
def test_a_job_that_is_put_off_is_due_once_the_clock_was_set(
    database: Database, monkeypatch: pytest.MonkeyPatch, by: timedelta
) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("job"))
    assert ledger.postpone("job", ERROR)
    assert ledger.due() == []
    set_clock(monkeypatch, by)
    at = ledger.next_retry_at()
    assert at
    assert at <= ledger_module.utc_now()
    assert [wakeup.job_id for wakeup in ledger.due()] == ["job"]


@pytest.mark.parametrize("by", [-HOUR, HOUR], ids=["back", "forward"])
def test_a_message_that_was_lost_is_sent_again_once_the_clock_was_set(
    database: Database, monkeypatch: pytest.MonkeyPatch, by: timedelta
) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("job"))
    ledger.take_over()
    older_than = timedelta(seconds=30)
    assert ledger.forgotten(older_than) == []
    set_clock(monkeypatch, by)
    assert [wakeup.job_id for wakeup in ledger.forgotten(older_than)] == ["job"]
    assert ledger.forgotten(older_than) == []


def test_to_put_off_an_attempt_twice_is_to_do_it_once(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = ledger_of(database)
    assert ledger.receive(receipt("job")).attempt == 1
    first = ledger.postpone("job", ERROR, 1)
    second = ledger.postpone("job", ERROR, 1)
    assert first and second
    assert first[0] == second[0]
    set_clock(monkeypatch, HOUR)
    (again,) = ledger.due()
    assert ledger.receive(receipt(again.job_id)).attempt == 2
    ledger.postpone("job", ERROR, 1)  # whoever does not know whether it took effect, late
    ledger.advance("job", "pause", 50, "")
    assert ledger.due() == []
