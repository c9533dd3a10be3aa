"""Jobs that are tried again: by themselves after a transient failure, under a new id when somebody asks."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlalchemy import update

from models import Database, Job, utc_now
from tests.unit.worker.operations.ledgers import DROP, RUN, again, ids, ledger_of, locks, receipt, row, succeed, wait
from worker.errors import InstanceBusy, UnknownJob, Unsupported
from worker.operations.ledger import RETRIES_MAX, Ledger
from worker.operations.receipts import CancelOutcome, Ended, Receipt, Verdict

SILENT = {"code": "QMP_LOST", "message": "QEMU is silent", "details": {"retryable": True}}
HOPELESS = {"code": "NOT_RUNNING", "message": "web1 is not running", "details": {"retryable": False}}
HOUR = timedelta(hours=1)
SOON = timedelta(minutes=1)
CLOCKS = timedelta(seconds=0.1)
"""MariaDB and Python round times differently, and a commit takes a while."""
RACES = 25
DEADLINE_S = 30.0


def make_due(database: Database, job_id: str, at: timedelta = -HOUR) -> None:
    with database.transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(retry_at=utc_now() + at))


def failed(ledger: Ledger, job_id: str, instance: str = "web1", error: dict[str, object] = SILENT) -> None:
    ledger.receive(receipt(job_id, instance))
    ledger.fail(job_id, error)


# By themselves


def test_a_job_that_is_put_off_says_so_keeps_its_instance_and_runs_again_under_its_id(database: Database) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("j1"))
    ledger.advance("j1", "pause", 50, "stopping the guest's processors")
    put_off = ledger.postpone("j1", SILENT)
    assert put_off
    assert put_off[1] == Ended()
    job = row(database, "j1")
    assert (job.state, job.claimed_by, job.retries, job.error, job.finished_at) == ("RETRY", None, 1, SILENT, None)
    assert job.message.startswith("attempt 1 failed (QMP_LOST); again at ")
    assert locks(database) == {"web1": "j1"}
    assert ledger.receive(receipt("j2")) == wait("j1")
    make_due(database, "j1")
    (wakeup,) = ledger.due()
    assert (wakeup.job_id, ledger.due()) == ("j1", [])
    assert (row(database, "j1").state, row(database, "j1").error) == ("PENDING", None)
    decision = ledger.receive(again(wakeup))
    assert (decision.verdict, decision.attempt) == (Verdict.RUN, 2)
    woken = succeed(ledger, "j1")
    assert woken and woken.job_id == "j2"
    assert row(database, "j1").state == "SUCCESS"


def test_the_delay_doubles_with_each_retry_until_there_are_no_more(database: Database) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("j1"))
    for number in range(RETRIES_MAX):
        asked_at = utc_now()
        put_off = ledger.postpone("j1", SILENT)
        assert put_off
        delay_s = (put_off[0] - asked_at).total_seconds()
        assert 0.5 * 2**number <= delay_s + CLOCKS.total_seconds()
        assert (put_off[0] - utc_now()).total_seconds() <= 1.5 * 2**number
        make_due(database, "j1")
        (wakeup,) = ledger.due()
        assert ledger.receive(again(wakeup)).attempt == number + 2
    before = row(database, "j1")
    assert ledger.postpone("j1", SILENT) is None
    after = row(database, "j1")
    assert (after.state, after.retries, after.updated_at) == ("STARTED", RETRIES_MAX, before.updated_at)
    assert after.claimed_by
    ledger.fail("j1", SILENT)
    assert row(database, "j1").state == "FAILURE"


def test_only_what_is_due_is_woken_in_order_and_the_next_time_is_known(database: Database) -> None:
    n1, n2 = ledger_of(database, "n1"), ledger_of(database, "n2")
    assert (n1.due(), n1.next_retry_at()) == ([], None)
    for number in (1, 2, 3, 4):
        n1.receive(receipt(f"j{number}", f"web{number}"))
        n1.postpone(f"j{number}", SILENT)
    for number, at in ((1, SOON), (2, -HOUR), (3, 1.2 * SOON), (4, -2 * HOUR)):
        make_due(database, f"j{number}", at)
    assert (n2.due(), n2.next_retry_at()) == ([], None)
    assert ids(n1.due()) == ["j2", "j4"]
    assert n1.next_retry_at() == row(database, "j1").retry_at


def test_a_job_that_is_put_off_is_so_for_the_next_worker_too(database: Database) -> None:
    before = ledger_of(database)
    before.receive(receipt("j1"))
    before.postpone("j1", SILENT)
    now = ledger_of(database)
    assert (now.take_over(), now.forgotten(-HOUR), now.overdue()) == ([], [], Ended())
    assert now.next_retry_at() == row(database, "j1").retry_at
    make_due(database, "j1")
    (wakeup,) = now.due()
    assert now.receive(again(wakeup)).attempt == 2


# By hand


def test_a_retry_is_a_new_job_that_names_the_old_one_and_asks_for_the_same(database: Database) -> None:
    ledger = ledger_of(database)
    arguments = {"instance": {"name": "web1"}, "after": ["p1"], "paused": True}
    ledger.receive(receipt("p1", None))
    ledger.succeed("p1", None)
    sent = Receipt("j1", "instance.start", arguments, "web1", slot="start", priority=3, after=("p1",))
    assert ledger.receive(sent) == RUN
    ledger.fail("j1", HOPELESS)
    wakeup = ledger.retry("j1")
    assert wakeup.job_id != "j1"
    assert (wakeup.task, wakeup.node, wakeup.priority) == ("instance.start", "n1", 3)
    assert wakeup.arguments == {"instance": {"name": "web1"}, "paused": True}
    new = row(database, wakeup.job_id)
    assert (new.retry_of, new.state, new.slot, new.instance_name) == ("j1", "PENDING", "start", "web1")
    assert row(database, "j1").state == "FAILURE"
    assert ids(ledger.forgotten(-HOUR)) == [wakeup.job_id]
    assert ledger.receive(Receipt(wakeup.job_id, wakeup.task, wakeup.arguments, "web1", slot="start")) == RUN
    assert locks(database) == {"web1": wakeup.job_id}


def test_a_job_is_not_retried_while_it_or_a_retry_of_it_is_open(database: Database) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("j1"))
    for _ in ("it runs", "it is put off"):
        with pytest.raises(InstanceBusy, match="job j1 has not ended yet"):
            ledger.retry("j1")
        ledger.postpone("j1", SILENT)
    ledger.cancel("j1", "enough")
    first = ledger.retry("j1")
    with pytest.raises(InstanceBusy, match=f"job {first.job_id} has not ended yet"):
        ledger.retry("j1")
    ledger.receive(again(first))
    with pytest.raises(InstanceBusy, match=first.job_id):
        ledger.retry("j1")
    ledger.fail(first.job_id, SILENT)
    assert ledger.retry("j1").job_id not in ("j1", first.job_id)


def test_what_cannot_be_retried_is_refused_and_nothing_is_added(database: Database) -> None:
    n1, n2 = ledger_of(database, "n1"), ledger_of(database, "n2")
    n1.receive(receipt("good"))
    n1.succeed("good", None)
    failed(n2, "elsewhere", "web2")
    n1.receive(Receipt("refused", "instance.pause", {"refused": "{}"}, None))
    n1.fail("refused", HOPELESS)
    n1.receive(receipt("query", None))
    n1.fail("query", SILENT)
    assert n1.cancel("never-came", "enough")[0] is CancelOutcome.REVOKED
    for job_id in ("nobody", "elsewhere"):
        with pytest.raises(UnknownJob, match=job_id):
            n1.retry(job_id)
    for job_id in ("good", "refused", "query", "never-came"):
        with pytest.raises(Unsupported, match=job_id):
            n1.retry(job_id)
    assert (n1.forgotten(-HOUR), n1.retry_failed(utc_now() - HOUR, 100)) == ([], {})


def test_all_that_failed_is_retried_where_that_can_help_and_nobody_did(database: Database) -> None:
    ledger = ledger_of(database)
    for number in range(3):
        failed(ledger, f"hopeless{number}", error=HOPELESS)
    for number in range(4):
        failed(ledger, f"j{number}", f"web{number}")
    ledger.receive(receipt("cancelled"))
    ledger.revoke("cancelled", "enough")
    failed(ledger, "old", "web9")
    with database.transaction() as session:
        session.execute(update(Job).where(Job.id == "old").values(finished_at=utc_now() - 2 * HOUR))
    ledger.retry("j1")
    first = ledger.retry_failed(utc_now() - HOUR, 2)
    assert list(first) == ["j0", "j2"]
    assert [row(database, wakeup.job_id).retry_of for wakeup in first.values()] == ["j0", "j2"]
    assert list(ledger.retry_failed(utc_now() - HOUR, 100)) == ["j3"]
    assert ledger.retry_failed(utc_now() - HOUR, 100) == {}
    ledger.receive(again(first["j0"]))
    ledger.fail(first["j0"].job_id, SILENT)
    assert list(ledger.retry_failed(utc_now() - HOUR, 100)) == [first["j0"].job_id]


# All at once


def test_of_two_that_retry_a_job_at_once_one_is_refused(database: Database) -> None:
    ledgers, at_once = [ledger_of(database), ledger_of(database)], threading.Barrier(2)

    def retry(ledger: Ledger, job_id: str) -> str:
        at_once.wait(DEADLINE_S)
        try:
            return ledger.retry(job_id).job_id
        except InstanceBusy:
            return "busy"

    with ThreadPoolExecutor(2) as pool:
        for number in range(RACES):
            failed(ledgers[0], f"j{number}", f"web{number}")
            outcomes = [*pool.map(retry, ledgers, [f"j{number}"] * 2)]
            assert Counter(outcomes)["busy"] == 1, outcomes


def test_a_job_that_is_due_while_it_is_cancelled_runs_or_is_revoked(database: Database) -> None:
    ledger, canceller, at_once = ledger_of(database), ledger_of(database), threading.Barrier(2)

    def wake(job_id: str) -> Verdict:
        at_once.wait(DEADLINE_S)
        return ([ledger.receive(again(wakeup)).verdict for wakeup in ledger.due()] or [Verdict.DROP])[0]

    def cancel(job_id: str) -> CancelOutcome:
        at_once.wait(DEADLINE_S)
        return canceller.cancel(job_id, "enough")[0]

    with ThreadPoolExecutor(2) as pool:
        for number in range(RACES):
            job_id = f"j{number}"
            ledger.receive(receipt(job_id, f"web{number}"))
            ledger.postpone(job_id, SILENT)
            make_due(database, job_id)
            waking, cancelling = pool.submit(wake, job_id), pool.submit(cancel, job_id)
            outcome = waking.result(), cancelling.result()
            assert outcome in ((Verdict.RUN, CancelOutcome.REQUESTED), (Verdict.DROP, CancelOutcome.REVOKED))
            assert row(database, job_id).state == ("STARTED" if outcome[0] is Verdict.RUN else "REVOKED")
            assert ledger.receive(receipt(job_id, f"web{number}")) == DROP
