"""The watcher, beat by beat, on a Redis of its own: what it tells, what it leaves alone, and what it takes back."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from celery import Celery
from sqlalchemy import update

from hostler import embedded
from hostler.contract import JobState, queue_name
from hostler.errors import OperationFailed
from migrations import schema
from models import Database, Incarnation, utc_now
from models import Job as JobRow
from tasks import outcome, presence, queues, told
from tasks.presence import Watcher
from tasks.reporting import Reporter
from tests.nodes import TestNode, node, until
from tests.unit.worker.operations.ledgers import fail, ledger_of, receipt, succeed

A_DAY = timedelta(days=1)
ERROR = {"code": "NOT_RUNNING", "message": "web1 is not running", "details": {"retryable": False}}


@pytest.fixture(scope="module")
def place() -> Iterator[TestNode]:
    """A broker, a result backend and a database; no worker."""
    with node() as made:
        embedded.ensure(made.settings)
        schema.upgrade(made.database())
        yield made


@pytest.fixture
def server(place: TestNode) -> Iterator[redis.Redis]:
    """Redis, empty."""
    with redis.Redis(unix_socket_path=str(place.settings.broker_socket)) as client:
        client.flushall()
        yield client


@pytest.fixture
def app(place: TestNode, server: redis.Redis) -> Celery:
    return place.client()._app


@pytest.fixture
def database(place: TestNode) -> Iterator[Database]:
    """The database; n1 has a worker, n2 has none."""
    database = place.database()
    ledger_of(database, "n1")
    ledger_of(database, "n2")
    set_end(database, "n2", utc_now() - A_DAY)
    yield database
    with database.transaction() as session:
        for table in ("job_parents", "instance_locks", "jobs", "incarnations", "nodes"):
            session.connection().exec_driver_sql(f"DELETE FROM {table}")


@pytest.fixture
def watcher(app: Celery, database: Database, monkeypatch: pytest.MonkeyPatch) -> Watcher:
    """n1's. Nobody answers a ping, at once."""
    monkeypatch.setattr(app.control, "ping", lambda **_: [])
    return Watcher(app, database, "n1")


@pytest.fixture
def reporter(app: Celery, database: Database) -> Iterator[Reporter]:
    """n1's, which looks after jobs in doubt."""
    made = Reporter(app, "hostler@n1", partial(outcome.restore_results, app, database))
    outcome.use_reporter(made)
    yield made
    outcome.use_reporter(None)
    made.close()


def set_end(database: Database, name: str, ended_at: datetime | None) -> None:
    with database.transaction() as session:
        session.execute(update(Incarnation).where(Incarnation.node == name).values(ended_at=ended_at))


def send(app: Celery, job_id: str, to: str = "n2", task: str = "instance.pause", **options: Any) -> None:
    queue = app.amqp.queues.new_missing(queue_name(to))
    app.send_task(task, kwargs={"name": "web1"}, task_id=job_id, queue=queue, **options)


def meta(app: Celery, job_id: str) -> dict[str, Any]:
    return dict(app.backend.get_task_meta(job_id, cache=False))


def states(app: Celery, *job_ids: str) -> list[str]:
    return [meta(app, job_id)["status"] for job_id in job_ids]


def test_jobs_in_the_queue_and_in_the_ledger_of_an_absent_node_are_told_of(
    watcher: Watcher, app: Celery, database: Database
) -> None:
    ledger = ledger_of(database, "n2")
    set_end(database, "n2", utc_now())
    for job_id in ("begun", "parked"):
        ledger.receive(receipt(job_id))
    ledger.advance("begun", "spawn", 40, "starting QEMU")
    send(app, "queued")
    send(app, "urgent", priority=0)
    send(app, "later", priority=9)
    watcher.look()
    assert states(app, "begun", "parked", "queued", "urgent", "later") == ["PROGRESS", *["WAITING"] * 4]
    for job_id, phase, percent in (("begun", "spawn", 40), ("parked", "waiting", 0), ("later", "queued", 0)):
        said = meta(app, job_id)["result"]
        assert (said["phase"], said["percent"], said["instance"], said["node"]) == (phase, percent, "web1", "n2")
        assert said["message"].startswith("node n2 has no worker since 2")
    assert meta(app, "parked")["result"]["waiting_for"] == ["begun"]
    assert (meta(app, "later")["name"], meta(app, "later")["kwargs"]) == ("instance.pause", {"name": "web1"})


def test_only_what_is_new_is_published(watcher: Watcher, app: Celery, server: redis.Redis) -> None:
    send(app, "first")
    watcher.look()
    before = server.get("celery-task-meta-first")
    send(app, "second")
    watcher.look()
    assert states(app, "first", "second") == ["WAITING", "WAITING"]
    Watcher(app, watcher._database, "n1").look()  # two at once, or another one
    assert server.get("celery-task-meta-first") == before


def test_a_long_queue_is_told_of_beat_by_beat(watcher: Watcher, app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "JOBS_MAX", 10)
    names = [f"job{number}" for number in range(25)]
    for job_id in names:
        send(app, job_id)
    for already in (10, 20, 25):
        watcher.look()
        assert states(app, *names) == ["WAITING"] * already + ["PENDING"] * (25 - already)


def test_no_result_is_overwritten_and_a_known_job_is_told_of_by_its_row(
    watcher: Watcher, app: Celery, database: Database
) -> None:
    ledger = ledger_of(database, "n2")
    set_end(database, "n2", utc_now())
    ledger.receive(receipt("begun"))
    app.backend.mark_as_done("good", 7)
    app.backend.mark_as_failure("bad", ValueError("x"))
    app.backend.mark_as_revoked("gone", "by somebody")
    for job_id in ("good", "bad", "gone", "begun"):
        send(app, job_id)
    watcher.look()
    assert states(app, "good", "bad", "gone", "begun") == ["SUCCESS", "FAILURE", "REVOKED", "PROGRESS"]


@pytest.mark.parametrize("ends", ["SUCCESS", "FAILURE"])
def test_a_result_that_came_while_its_job_was_told_of_is_given_back(
    watcher: Watcher, reporter: Reporter, app: Celery, database: Database, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """Between our look at the backend and our report the node comes back, and carries the job out."""
    send(app, "quick")
    store = app.backend._store_result

    def overtaken(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(app.backend, "_store_result", store)
        ledger = ledger_of(database, "n2")
        ledger.receive(receipt("quick"))
        if ends == "SUCCESS":
            succeed(ledger, "quick", {"pid": 7})
        else:
            fail(ledger, "quick", ERROR)
        return store(*args, **kwargs)

    monkeypatch.setattr(app.backend, "_store_result", overtaken)
    watcher.look()
    until(lambda: states(app, "quick") == [ends])
    assert (meta(app, "quick")["result"] == {"pid": 7}) is (ends == "SUCCESS")


def test_a_report_that_is_overtaken_by_the_end_of_its_job_does_not_stay(
    reporter: Reporter, app: Celery, database: Database
) -> None:
    """Its node's own report, that it waits: another node was asked to cancel it, or it failed meanwhile."""
    ledger = ledger_of(database, "n1")
    for job_id in ("failed", "cancelled", "open"):
        ledger.receive(receipt(job_id))
    ledger.cancel("cancelled", "cancelled before it began")
    app.backend.mark_as_revoked("cancelled", "cancelled before it began")
    fail(ledger, "failed", ERROR)
    app.backend.mark_as_failure("failed", OperationFailed("NOT_RUNNING", "web1 is not running", {}))
    for job_id in ("failed", "cancelled", "open"):
        request = outcome.request_of(job_id, "instance.pause", {"name": "web1"}, "n1")
        reporter.report(request, JobState.WAITING, {"percent": 0, "message": "waiting for job failed"})
    until(lambda: states(app, "failed", "cancelled", "open") == ["FAILURE", "REVOKED", "WAITING"])
    assert "NOT_RUNNING" in str(meta(app, "failed")["result"])
    assert (meta(app, "failed")["name"], meta(app, "failed")["kwargs"]) == ("instance.pause", {"name": "web1"})


def test_results_that_the_worker_before_did_not_publish_are_published_and_no_other_is_touched(
    app: Celery, database: Database
) -> None:
    ledger = ledger_of(database, "n1")
    for job_id in ("done", "known", "gave-up", "open"):
        ledger.receive(receipt(job_id, job_id))
    ledger.receive(receipt("cancelled", "open"))
    ledger.cancel("cancelled", "cancelled before it began")
    succeed(ledger, "done", {"pid": 7})
    succeed(ledger, "known", {"pid": 8})
    ledger.revoke("gave-up", "cancelled")
    app.backend.mark_as_done("known", "as it was")
    unpublished = ledger_of(database, "n1").unpublished()
    service: Any = SimpleNamespace(node=SimpleNamespace(database=database), unpublished=unpublished)
    outcome.repair_results(app, service)
    found = states(app, "done", "known", "gave-up", "cancelled", "open")
    assert found == ["SUCCESS", "SUCCESS", "REVOKED", "REVOKED", "PENDING"]
    assert [meta(app, job_id)["result"] for job_id in ("done", "known")] == [{"pid": 7}, "as it was"]


def test_what_was_said_of_a_node_that_came_back_in_between_is_taken_back(
    watcher: Watcher, app: Celery, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = ledger_of(database, "n2")
    set_end(database, "n2", utc_now())
    for job_id in ("begun", "parked"):
        ledger.receive(receipt(job_id))
    send(app, "queued")
    monkeypatch.setattr(app.control, "ping", lambda **_: ledger_of(database, "n2") and [])
    watcher.look()
    assert meta(app, "parked")["result"]["message"] == "waiting for job begun"
    assert meta(app, "queued")["result"]["message"] == "in queue node.n2, whose worker is back"
    assert states(app, "begun") == ["PROGRESS"]


def test_a_node_that_answers_is_left_alone_whatever_its_clock_or_the_database_says(
    watcher: Watcher, app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def ping(destination: list[str], **_: Any) -> list[dict[str, Any]]:
        asked.append(sorted(destination))
        return [{"hostler@n2": {"ok": "pong"}}]

    monkeypatch.setattr(app.control, "ping", ping)
    send(app, "j1")
    send(app, "j2", to="typo")
    watcher.look()
    assert asked == [["hostler@n2", "hostler@typo"]]
    assert states(app, "j1", "j2") == ["PENDING", "WAITING"]
    assert meta(app, "j2")["result"]["message"] == "no worker of node typo was ever seen; check the name"
    monkeypatch.setattr(app.control, "ping", lambda **_: [])
    watcher.look()
    assert states(app, "j1") == ["WAITING"]


def test_who_is_not_the_watcher_says_nothing(watcher: Watcher, app: Celery, database: Database) -> None:
    ledger_of(database, "n0")
    send(app, "j1")
    watcher.look()
    assert states(app, "j1") == ["PENDING"]
    set_end(database, "n0", utc_now())
    watcher.look()
    assert states(app, "j1") == ["WAITING"]


def test_what_lies_in_a_queue_and_is_no_job_is_passed_over(watcher: Watcher, app: Celery, server: redis.Redis) -> None:
    send(app, "before")
    for nonsense in (b"\xff", b"[]", b"7", b'{"headers": {"id": 7, "task": "x"}, "body": "e30="}', b'{"body": "!"}'):
        server.lpush("node.n2", nonsense)
    server.lpush("node.typo/../x", b"{}")
    server.set("node.string", "not a list")
    send(app, "after")
    watcher.look()
    assert states(app, "before", "after") == ["WAITING", "WAITING"]


def test_a_worker_that_is_back_takes_back_what_was_said_of_its_jobs(
    watcher: Watcher, app: Celery, database: Database, server: redis.Redis
) -> None:
    ledger = ledger_of(database, "n2")
    set_end(database, "n2", utc_now())
    for job_id in ("begun", "parked"):
        ledger.receive(receipt(job_id))
    ledger.receive(receipt("put-off", "web2"))
    ledger.postpone("put-off", ERROR | {"code": "QMP_LOST"})
    send(app, "queued")
    watcher.look()
    send(app, "untold")
    presence.tell_own(app, database, "n2")
    assert meta(app, "parked")["result"]["message"] == "waiting for job begun"
    assert meta(app, "queued")["result"]["message"] == "in queue node.n2, whose worker is back"
    assert states(app, "begun", "put-off", "untold") == ["PROGRESS", "RETRY", "PENDING"]
    assert "QMP_LOST" in str(meta(app, "put-off")["result"])


def test_a_job_that_was_told_of_can_still_be_cancelled_before_any_node_has_it(
    watcher: Watcher, app: Celery, database: Database
) -> None:
    send(app, "j1")
    watcher.look()
    assert not outcome._was_received(app, "j1")
    told.say(app, told.of_job(JobRow(id="j2", node="n2", task="x", arguments={}, attempts=1, phase="spawn"), "x"))
    assert outcome._was_received(app, "j2")


def test_a_job_is_found_in_whichever_queue_it_lies_with_its_place(app: Celery, server: redis.Redis) -> None:
    for number in range(queues.FIND_PAGE + 3):
        send(app, f"job{number}", to="typo")
    send(app, "low", to="typo", priority=9)
    with queues.looking(app) as broker:
        assert broker
        far, low = broker.find(f"job{queues.FIND_PAGE + 2}", ["n1", "n2"]), broker.find("low", ["typo"])
        assert broker.find("never", ["n1"]) is None
    assert far and low
    assert (far.node, far.task, far.ahead) == ("typo", "instance.pause", queues.FIND_PAGE + 2)
    assert low.ahead == queues.FIND_PAGE + 3


def test_a_broker_that_is_no_redis_is_not_looked_into() -> None:
    with Celery(broker="memory://", set_as_current=False) as app, queues.looking(app) as broker:
        assert broker is None
