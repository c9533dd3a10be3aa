"""Which jobs leave the ledger, which stay however old they are, and that nobody has to wait meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.exc import OperationalError

from hostler.payloads import JobPruneArguments
from hostler.settings import Settings, SettingsError, load
from models import Database, Incarnation, Job, JobParent, utc_now
from tests.unit.worker.operations.ledgers import RUN, again, ids, ledger_of, receipt, row, wait
from worker.errors import Cancelled
from worker.operations import pruning
from worker.operations.ledger import PREDECESSORS, TOMBSTONE
from worker.operations.pruning import Cutoffs, Pruned, Pruner, prune, prune_jobs
from worker.operations.receipts import CancelOutcome, Receipt

DAY = timedelta(days=1)
WEEK_S, QUARTER_S = 7 * 86400, 90 * 86400
LONG = timedelta(days=1000)
SILENT = {"code": "QMP_LOST", "message": "QEMU is silent", "details": {"retryable": True}}


def put(database: Database, *names: str, age: timedelta = LONG, **more: Any) -> None:
    """Ended jobs of n1, each of an instance."""
    ended_at = utc_now() - age
    given = {"node": "n1", "task": "instance.stop", "state": "SUCCESS", "arguments": {}, "finished_at": ended_at} | more
    with database.transaction() as session:
        session.add_all(Job(id=job_id, received_at=ended_at, **given) for job_id in names)


def make_old(database: Database, *names: str) -> None:
    long_ago = utc_now() - LONG
    with database.transaction() as session:
        session.execute(update(Job).where(Job.id.in_(names)).values(received_at=long_ago, updated_at=long_ago))
        ended = update(Job).where(Job.id.in_(names), Job.finished_at.is_not(None))
        session.execute(ended.values(finished_at=long_ago))


def left(database: Database) -> set[str]:
    with database.reading() as session:
        return {*session.scalars(select(Job.id))}


def whole_pass(database: Database, cutoffs: Cutoffs | None = None, *, dry_run: bool = False) -> Pruned:
    total = Pruned()
    for batch in prune(database, "n1", cutoffs or Cutoffs.ago(WEEK_S, QUARTER_S), dry_run=dry_run):
        total += batch
    return total


AGES: dict[str, tuple[dict[str, str], float, bool]] = {
    "a change is kept for a week": ({}, 6, True),
    "and no longer": ({}, 8, False),
    "a failure is kept for a quarter": ({"state": "FAILURE"}, 89, True),
    "and no longer than that": ({"state": "FAILURE"}, 91, False),
    "as is what was cancelled": ({"state": "REVOKED"}, 89, True),
    "which goes with the failures": ({"state": "REVOKED"}, 91, False),
    "a cancel that came before its message is one": ({"state": "REVOKED", "task": TOMBSTONE}, 89, True),
    "and goes as one": ({"state": "REVOKED", "task": TOMBSTONE}, 91, False),
    "a query is kept for a day": ({"task": "instance.list"}, 0.9, True),
    "whatever changes are": ({"task": "instance.list"}, 1.1, False),
    "and whether it failed": ({"task": "node.info", "state": "FAILURE"}, 1.1, False),
    "a retry is kept as long as what it retries": ({"retry_of": "gone"}, 89, True),
    "and goes with it": ({"retry_of": "gone"}, 91, False),
    "another node's job is that node's affair": ({"node": "n2"}, 1000, True),
}


def test_how_long_a_job_stays_depends_on_what_it_was(database: Database) -> None:
    ledger_of(database, "n1"), ledger_of(database, "n2")
    for name, (job, days, _) in AGES.items():
        put(database, name, age=days * DAY, **job)
    whole_pass(database)
    assert left(database) == {name for name, (*_, stays) in AGES.items() if stays}


def test_nothing_is_removed_of_what_is_kept_for_ever_but_queries(database: Database) -> None:
    ledger_of(database)
    put(database, "change")
    put(database, "failure", state="FAILURE")
    put(database, "query", task="instance.list")
    whole_pass(database, Cutoffs.ago(0, QUARTER_S))
    assert left(database) == {"change"}
    put(database, "failure", state="FAILURE")
    whole_pass(database, Cutoffs.ago(WEEK_S, 0))
    assert left(database) == {"failure"}


def test_a_query_is_not_kept_longer_than_a_change(database: Database) -> None:
    ledger_of(database)
    put(database, "query", task="instance.list", age=timedelta(hours=2))
    whole_pass(database, Cutoffs.ago(3 * 3600, QUARTER_S))
    assert left(database) == {"query"}
    whole_pass(database, Cutoffs.ago(3600, QUARTER_S))
    assert left(database) == set()


def test_a_job_that_has_not_ended_stays_however_old_it_is(database: Database) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("running", "web1"))
    ledger.receive(receipt("waiting", "web1"))
    ledger.receive(receipt("put off", "web2"))
    ledger.postpone("put off", SILENT)
    ledger.receive(receipt("query", None))
    put(database, "pending", state="PENDING", finished_at=None)
    make_old(database, *left(database))
    assert whole_pass(database) == Pruned()
    assert left(database) == {"running", "waiting", "put off", "query", "pending"}


def test_a_parent_stays_until_those_that_come_after_it_have_ended(database: Database) -> None:
    ledger = ledger_of(database)
    put(database, "p1", "p2")
    ledger.receive(receipt("p3", "web3"))
    ledger.receive(Receipt("child", "instance.pause", {"name": "web1"}, "web1", after=("p1", "p3")))
    assert whole_pass(database) == Pruned({"SUCCESS": 1}, kept=1)  # type: ignore[arg-type]  # a dict counts too
    assert left(database) == {"p1", "p3", "child"}
    ledger.succeed("p3", None)
    assert row(database, "child").state == "PENDING"
    assert whole_pass(database).kept == 1
    ledger.receive(Receipt("child", "instance.pause", {"name": "web1"}, "web1", after=("p1", "p3")))
    ledger.succeed("child", None)
    assert whole_pass(database).removed.total() == 1
    make_old(database, "p3", "child")
    assert whole_pass(database).removed.total() == 2
    with database.reading() as session:
        assert session.scalar(select(func.count()).select_from(JobParent)) == 0


def test_a_failed_job_stays_until_its_retry_has_ended_and_is_never_retried_twice(database: Database) -> None:
    ledger = ledger_of(database)
    ledger.receive(receipt("j1"))
    ledger.fail("j1", SILENT)
    retry = ledger.retry("j1")
    make_old(database, "j1")
    assert whole_pass(database) == Pruned(kept=1)
    ledger.receive(again(retry))
    ledger.succeed(retry.job_id, None)
    with database.transaction() as session:
        session.execute(update(Job).values(finished_at=utc_now() - 30 * DAY))
    assert whole_pass(database) == Pruned()
    assert ledger.retry_failed(utc_now() - 60 * DAY, 100) == {}
    make_old(database, "j1", retry.job_id)
    assert whole_pass(database).removed == {"FAILURE": 1, "SUCCESS": 1}


def test_a_message_whose_cancel_came_first_is_dropped_as_long_as_the_cancel_is_known(database: Database) -> None:
    ledger = ledger_of(database)
    assert ledger.cancel("late", "enough")[0] is CancelOutcome.REVOKED
    with database.transaction() as session:
        session.execute(update(Job).values(finished_at=utc_now() - 30 * DAY))
    whole_pass(database)
    assert row(database, "late").state == "REVOKED"
    make_old(database, "late")
    whole_pass(database)
    assert left(database) == set()


def test_whoever_retries_an_old_job_at_this_moment_is_not_waited_for_and_finds_it_there(database: Database) -> None:
    if database.is_sqlite:
        pytest.skip("SQLite has one writer at a time")
    ledger_of(database)
    put(database, "j1", "j2")
    with database.transaction() as session:
        session.scalars(select(Job).where(Job.id == "j1").with_for_update()).one()
        session.add(Job(id="retry", node="n1", task="instance.stop", arguments={}, state="PENDING", retry_of="j1"))
        session.flush()
        assert whole_pass(database).removed.total() == 1
    assert left(database) == {"j1", "retry"}
    assert whole_pass(database) == Pruned(kept=1)


def test_whoever_begins_to_wait_for_an_old_job_at_this_moment_does_not_wait_for_ever(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    if database.is_sqlite:
        pytest.skip("SQLite has one writer at a time")
    ledger, look = ledger_of(database), pruning._needed
    put(database, "p1")
    ledger.receive(receipt("open", "web1"))
    child = Receipt("child", "instance.pause", {"name": "web2"}, "web2", after=("p1", "open"))

    def too_late(*given: Any) -> set[int]:
        needed = look(*given)
        assert ledger.receive(child) == wait("open")
        return needed

    monkeypatch.setattr(pruning, "_needed", too_late)
    whole_pass(database)
    assert left(database) == {"open", "child"}
    assert ledger.receive(child) == wait("open")
    assert ids(ledger.succeed("open", None).wakeups) == ["child"]
    assert ledger.receive(child) == RUN


def test_a_dry_run_says_what_would_go_and_removes_nothing(database: Database) -> None:
    ledger = ledger_of(database)
    put(database, "j1", "j2", "parent")
    put(database, "j3", state="FAILURE")
    ledger.receive(Receipt("child", "instance.pause", {"name": "web1"}, "web1", after=("parent", "later")))
    would = whole_pass(database, dry_run=True)
    assert (would.removed, would.kept) == ({"SUCCESS": 2, "FAILURE": 1}, 1)
    assert left(database) == {"j1", "j2", "j3", "parent", "child"}
    assert whole_pass(database) == would
    assert left(database) == {"parent", "child"}


def test_a_pass_goes_in_small_steps_over_all_also_those_that_ended_in_the_same_moment(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = ledger_of(database)
    monkeypatch.setattr(pruning, "BATCH", 3)
    moment = utc_now() - LONG
    put(database, *(f"j{number}" for number in range(7)), finished_at=moment)
    put(database, *(f"k{number}" for number in range(4)), task="instance.list", finished_at=moment + DAY)
    ledger.receive(Receipt("child", "instance.pause", {"name": "web1"}, "web1", after=("j0", "j1", "j2", "later")))
    steps = [*prune(database, "n1", Cutoffs.ago(WEEK_S, QUARTER_S))]
    assert all(step.removed.total() + step.kept <= 3 for step in steps)
    assert sum(step.removed.total() for step in steps) == 8
    assert left(database) == {"j0", "j1", "j2", "child"}


def test_workers_that_no_job_names_are_forgotten_but_not_the_latest(database: Database) -> None:
    ledgers = [ledger_of(database) for _ in range(PREDECESSORS + 5)]
    other = ledger_of(database, "n2")
    mine = [ledger._incarnation for ledger in ledgers]
    with database.transaction() as session:
        for number, worker in enumerate(mine):
            at = {"started_at": utc_now() - (100 - number) * DAY}
            at |= {"ended_at": utc_now() - (99 - number) * DAY} if number < len(mine) - 1 else {}
            session.execute(update(Incarnation).where(Incarnation.id == worker).values(at))
        session.execute(update(Incarnation).where(Incarnation.id == mine[2]).values(ended_at=utc_now() - DAY))
        session.execute(
            update(Incarnation).where(Incarnation.id == other._incarnation).values(ended_at=utc_now() - LONG)
        )
    put(database, "young", age=DAY, claimed_by=mine[1])
    put(database, "old", claimed_by=mine[0])
    whole_pass(database, dry_run=True)
    whole_pass(database)
    with database.reading() as session:
        workers = {*session.scalars(select(Incarnation.id))}
    assert workers == {mine[1], mine[2], *mine[-PREDECESSORS - 1 :], other._incarnation}


# At each heartbeat


@pytest.fixture
def settings() -> Settings:
    return Settings(node="n1", keep_jobs_s=WEEK_S, keep_failures_s=QUARTER_S)


def test_a_heartbeat_does_a_few_steps_and_the_next_one_goes_on(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger_of(database)
    monkeypatch.setattr(pruning, "BATCH", 2)
    monkeypatch.setattr(pruning, "BATCHES_A_BEAT", 3)
    put(database, *(f"j{number}" for number in range(15)))
    pruner = Pruner(database, settings, begin_in_s=0)
    seen = []
    for _ in range(5):
        pruner.tend()
        seen.append(len(left(database)))
    # Failures and revoked jobs, of which there are none, are a step each.
    assert seen == [13, 7, 1, 0, 0]
    put(database, "too late for this pass")
    pruner.tend()
    assert left(database) == {"too late for this pass"}
    monkeypatch.setattr(pruner, "_begin_at", 0)
    pruner.tend()
    assert left(database) == set()


def test_a_new_worker_has_other_things_to_do_first(database: Database, settings: Settings) -> None:
    ledger_of(database)
    put(database, "j1")
    Pruner(database, settings).tend()
    assert left(database) == {"j1"}


def test_a_pass_that_the_database_broke_off_is_begun_anew_at_its_time(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger_of(database)
    put(database, "j1")

    def away(*_: object, **__: object) -> None:
        raise OperationalError("", {}, Exception("away"))

    pruner = Pruner(database, settings, begin_in_s=0)
    with monkeypatch.context() as broken:
        broken.setattr(pruning, "_remove", away)
        with pytest.raises(OperationalError):
            pruner.tend()
    pruner.tend()
    assert left(database) == {"j1"}
    monkeypatch.setattr(pruner, "_begin_at", 0)
    pruner.tend()
    assert left(database) == set()


# When asked


def job_of(database: Database, settings: Settings, giving_up: bool = False) -> Any:
    node = SimpleNamespace(database=database, name="n1", settings=settings)
    return SimpleNamespace(node=node, is_giving_up=giving_up)


def test_the_answer_counts_by_state_and_the_settings_are_the_default(database: Database, settings: Settings) -> None:
    ledger_of(database)
    put(database, "j1", "j2", age=8 * DAY)
    put(database, "j3", age=6 * DAY)
    put(database, "f1", state="FAILURE", age=91 * DAY)
    put(database, "f2", state="FAILURE", age=50 * DAY)
    job = job_of(database, settings)
    by_state = {"FAILURE": 1, "REVOKED": 0, "SUCCESS": 2}
    assert prune_jobs(job, JobPruneArguments(dry_run=True)) == {"would_remove": 3, "kept": 0, "by_state": by_state}
    assert prune_jobs(job, JobPruneArguments()) == {"removed": 3, "kept": 0, "by_state": by_state}
    assert prune_jobs(job, JobPruneArguments(older_than_s=5 * 86400))["by_state"]["SUCCESS"] == 1
    assert prune_jobs(job, JobPruneArguments(failures_older_than_s=49 * 86400))["by_state"]["FAILURE"] == 1
    assert left(database) == set()


def test_a_prune_that_is_cancelled_stops_after_a_batch_and_says_how_far_it_came(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger_of(database)
    monkeypatch.setattr(pruning, "BATCH", 2)
    put(database, *(f"j{number}" for number in range(5)), state="FAILURE")
    with pytest.raises(Cancelled, match="2 jobs were removed before"):
        prune_jobs(job_of(database, settings, giving_up=True), JobPruneArguments())
    assert len(left(database)) == 3


@pytest.mark.parametrize("name", ["HOSTLER_KEEP_JOBS_S", "HOSTLER_KEEP_FAILURES_S"])
@pytest.mark.parametrize("value", ["-1", "1", "599", "99999999999999999", "7d"])
def test_a_setting_that_would_forget_what_may_yet_be_delivered_again_is_refused(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    uncached: Callable[[], Settings] = load.__wrapped__
    with pytest.raises(SettingsError, match=name):
        uncached()
    for good in ("0", "600", "3153600000"):
        monkeypatch.setenv(name, good)
        assert uncached()
