"""The ledger behind real messages: a real worker, a real Redis, and guests that hold their instances busy."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import redis
from sqlalchemy import select

from hostler import Job, OperationFailed
from hostler.contract import queue_name
from migrations import schema
from models import InstanceLock
from models import Job as JobRow
from tests.nodes import DEADLINE_S, TestNode, node, tiny_instance, until
from tests.services import postgresql_database
from worker.kvm.tiny_guest import IGNORE_KEY, IGNORING_MESSAGE, POWER_OFF_KEY

Message = dict[str, Any]


@pytest.fixture
def server(n1: TestNode) -> Iterator[redis.Redis]:
    """The node's broker and result backend, past Celery."""
    with redis.Redis(unix_socket_path=str(n1.settings.broker_socket)) as client:
        yield client


def new_id(word: str) -> str:
    return f"{word}-{uuid.uuid4()}"


def row(node: TestNode, job: Job) -> JobRow:
    with node.reading() as session:
        return session.scalars(select(JobRow).where(JobRow.id == job.id)).one()


def rows(node: TestNode, jobs: list[Job]) -> list[JobRow]:
    """In the order of receipt."""
    ids = [job.id for job in jobs]
    with node.reading() as session:
        return list(session.scalars(select(JobRow).where(JobRow.id.in_(ids)).order_by(JobRow.sequence)))


def all_read(node: TestNode) -> None:
    """The worker has decided about every message sent before: it reads them in order."""
    node.do("instance.list")


def hold(node: TestNode, name: str = "web1") -> Job:
    """A job that keeps the instance busy until ``release``: a stop of a guest that ignores its power button."""
    node.start(tiny_instance(node.root, name))
    with node.serial(name) as serial:
        serial.tick()
        serial.send(IGNORE_KEY)
        serial.read_until(IGNORING_MESSAGE)
    job = node.send("instance.stop", name=name, timeout_s=600)
    node.until_state(name, "stopping")
    return job


def release(node: TestNode, name: str = "web1") -> None:
    with node.serial(name) as serial:
        serial.tick()
        serial.send(POWER_OFF_KEY)


def stored(server: redis.Redis, job: Job) -> Any:
    """The result as it lies in Redis, byte by byte."""
    return server.get(f"celery-task-meta-{job.id}")


def test_a_second_message_of_a_finished_job_leaves_its_result_and_row_untouched(
    n1: TestNode, server: redis.Redis
) -> None:
    good, bad = n1.send("instance.start", instance=tiny_instance(n1.root)), n1.send("instance.pause", name="nobody")
    good.wait(DEADLINE_S)
    with pytest.raises(OperationFailed):
        bad.wait(DEADLINE_S)
    before = [(stored(server, job), row(n1, job).finished_at, row(n1, job).phases) for job in (good, bad)]
    for job in (good, bad):
        n1.send("instance.start", job_id=job.id, instance=tiny_instance(n1.root))
        n1.send("instance.list", job_id=job.id)
        n1.send("instance.stop", job_id=job.id, name="a b", nonsense=True)
    all_read(n1)
    assert [(stored(server, job), row(n1, job).finished_at, row(n1, job).phases) for job in (good, bad)] == before
    assert [row(n1, job).attempts for job in (good, bad)] == [1, 1]
    assert n1.info("web1")["state"] == "running"


def test_an_id_sent_twice_quickly_is_carried_out_once(n1: TestNode) -> None:
    n1.start(tiny_instance(n1.root))
    ids = [new_id("twice") for _ in range(20)]
    jobs = [n1.send("instance.pause", job_id=job_id, name="web1") for job_id in ids for _ in range(2)]
    for job in jobs:
        job.wait(DEADLINE_S)
    all_read(n1)
    found = rows(n1, jobs)
    assert [job.id for job in found] == ids
    assert {(job.state, job.attempts) for job in found} == {("SUCCESS", 1)}
    assert [[entry["phase"] for entry in job.phases] for job in found] == [["pause"]] * 20


def test_jobs_of_a_busy_instance_wait_and_say_so_while_other_instances_go_on(n1: TestNode) -> None:
    busy = hold(n1)
    waiting = [n1.send("instance.pause", name="web1") for _ in range(3)]
    until(lambda: waiting[-1].state == "WAITING")
    assert [job.state for job in waiting] == ["WAITING"] * 3
    ahead = [busy.id]
    for job in waiting:
        meta = job.progress
        assert meta
        assert meta["waiting_for"] == ahead
        assert (meta["phase"], meta["percent"], meta["instance"], meta["node"]) == ("waiting", 0, "web1", "n1")
        assert busy.id in meta["message"]
        assert row(n1, job).waiting_for == ahead
        assert row(n1, job).attempts == 0
        ahead = [*ahead, job.id]
    assert n1.start(tiny_instance(n1.root, "web2"))["state"] == "running"
    assert n1.do("instance.stop", name="web2", force=True)["how"] == "killed"
    assert [job.state for job in waiting] == ["WAITING"] * 3
    assert n1.info("web1")["state"] == "stopping"  # who only looks does not wait
    release(n1)
    assert busy.wait(DEADLINE_S)["how"] == "guest_shutdown"
    for job in waiting:
        with pytest.raises(OperationFailed, match="NOT_RUNNING"):
            job.wait(DEADLINE_S)
    n1.nothing_is_left()


def test_fifty_jobs_of_an_instance_run_one_after_another_in_the_order_they_were_sent(n1: TestNode) -> None:
    busy = hold(n1)
    jobs = [n1.send("instance.cleanup", name="web1") for _ in range(50)]
    until(lambda: jobs[-1].state == "WAITING")
    release(n1)
    for job in jobs:
        job.wait(DEADLINE_S)
    found = rows(n1, [busy, *jobs])
    assert [job.id for job in found] == [busy.id, *(job.id for job in jobs)]
    for before, after in pairwise(found):
        assert before.finished_at and after.started_at
        assert before.finished_at <= after.started_at
    with n1.reading() as session:
        assert session.scalars(select(InstanceLock)).all() == []


def test_a_row_tells_of_a_job_what_its_master_was_told(n1: TestNode) -> None:
    good, bad = n1.send("instance.start", instance=tiny_instance(n1.root)), n1.send("instance.pause", name="nobody")
    view = good.wait(DEADLINE_S)
    with pytest.raises(OperationFailed) as failed:
        bad.wait(DEADLINE_S)
    started, refused = row(n1, good), row(n1, bad)
    assert (started.state, started.attempts, started.percent, started.error) == ("SUCCESS", 1, 100, None)
    assert started.result == view
    phases = ["validate", "claim", "sockets", "spawn", "greeting", "continue", "record"]
    assert [entry["phase"] for entry in started.phases] == phases
    assert started.received_at <= started.started_at <= started.finished_at  # type: ignore[operator]
    assert (refused.state, refused.attempts, refused.result) == ("FAILURE", 1, None)
    code, message, details = failed.value.args
    assert refused.error == {"code": code, "message": message, "details": details}
    assert code == "UNKNOWN_INSTANCE"
    shown = n1.do("job.info", id=good.id)
    assert (shown["state"], shown["attempts"], shown["result"]) == ("SUCCESS", 1, view)
    assert [entry["phase"] for entry in shown["phases"]] == phases
    assert bad.id in [entry["id"] for entry in n1.do("job.list", states=["FAILURE"])]


def test_the_result_of_a_job_whose_worker_was_killed_comes_under_its_id_from_the_next(
    n1: TestNode, server: redis.Redis
) -> None:
    busy = hold(n1)
    waiting = n1.send("instance.cleanup", name="web1")
    until(lambda: waiting.state == "WAITING")
    n1.restart_worker()
    until(lambda: row(n1, busy).attempts == 2)
    assert busy.state in ("PROGRESS", "STARTED")
    assert row(n1, waiting).state == "WAITING"
    for job in (busy, waiting):  # whoever sends them again does no harm now either
        n1.send("instance.stop", job_id=job.id, name="web1")
    all_read(n1)
    release(n1)
    assert busy.wait(DEADLINE_S)["how"] == "guest_shutdown"
    assert waiting.wait(DEADLINE_S)["name"] == "web1"
    done = row(n1, busy)
    assert (done.state, done.attempts) == ("SUCCESS", 2)
    assert [entry["phase"] for entry in done.phases] == ["shutdown", "recover", "shutdown"]
    assert json.loads(stored(server, busy))["status"] == "SUCCESS"
    n1.nothing_is_left()


def test_jobs_that_nobody_woke_when_the_worker_died_run_in_their_order(n1: TestNode) -> None:
    busy = hold(n1)
    jobs = [n1.send("instance.cleanup", name="web1") for _ in range(5)]
    until(lambda: jobs[-1].state == "WAITING")
    n1.kill_worker()
    for pid in n1.qemu_pids():
        n1.monitor("web1", "quit")
        until(lambda pid=pid: pid not in n1.qemu_pids())
    n1.start_worker()
    for job in [busy, *jobs]:
        job.wait(DEADLINE_S)
    found = rows(n1, [busy, *jobs])
    assert [job.started_at for job in found] == sorted(job.started_at for job in found if job.started_at)
    assert [job.id for job in found] == [busy.id, *(job.id for job in jobs)]


def body(*parts: Any) -> bytes:
    return json.dumps(parts).encode()


GOOD_BODY = body([], {}, {})
UNREADABLE: list[tuple[str, Callable[[str], Message]]] = [
    ("a body cut off", lambda id: {"body": GOOD_BODY[:5], "headers": {"id": id, "task": "instance.list"}}),
    ("a body that is no JSON", lambda id: {"body": b"\xff\xfe", "headers": {"id": id, "task": "instance.list"}}),
    ("an unknown task", lambda id: {"body": GOOD_BODY, "headers": {"id": id, "task": "instance.explode"}}),
    ("no task", lambda id: {"body": GOOD_BODY, "headers": {"id": id}}),
    ("arguments that are none", lambda id: {"body": body(7, 7, {}), "headers": {"id": id, "task": "instance.list"}}),
]


def publish(node: TestNode, message: Message) -> None:
    app, queue = node.client()._app, queue_name(node.name)
    with app.connection_for_write() as connection, connection.Producer() as producer:
        producer.publish(
            message["body"],
            routing_key=queue,
            exchange=queue,
            content_type=message.get("content_type", "application/json"),
            content_encoding="utf-8",
            headers=message["headers"],
        )


@pytest.mark.parametrize("message", [make for _, make in UNREADABLE], ids=[name for name, _ in UNREADABLE])
def test_a_poison_message_ends_neither_the_worker_nor_the_job_whose_id_it_bears(
    n1: TestNode, server: redis.Redis, message: Callable[[str], Message]
) -> None:
    assert n1.worker
    pid = n1.worker.pid
    finished, busy = n1.send("instance.list"), hold(n1)
    finished.wait(DEADLINE_S)
    before = stored(server, finished)
    for job in (finished, busy):
        publish(n1, message(job.id))
    publish(n1, message(new_id("poison")))
    all_read(n1)
    assert n1.worker.pid == pid
    assert n1.worker.poll() is None
    assert stored(server, finished) == before
    assert busy.state == "PROGRESS"
    release(n1)
    assert busy.wait(DEADLINE_S)["how"] == "guest_shutdown"


@pytest.mark.parametrize("message", [make for name, make in UNREADABLE if name != "no task"])
def test_a_poison_message_with_an_id_of_its_own_fails_by_the_contracts_one_exception(
    n1: TestNode, message: Callable[[str], Message]
) -> None:
    job = n1.client().job(new_id("poison"))
    publish(n1, message(job.id))
    with pytest.raises(OperationFailed) as failed:
        job.wait(DEADLINE_S)
    assert failed.value.code == "INVALID_ARGUMENT"
    (error,) = failed.value.details["errors"]
    assert error["field"] in ("message", "task")
    assert error["reason"]


@pytest.fixture(scope="module")
def on_postgresql(qemu: None) -> Iterator[TestNode]:
    """A node whose ledger refuses what JSON can say and SQL cannot: NUL and half of a surrogate pair."""
    with postgresql_database() as url, node(HOSTLER_DATABASE_URL=url) as made:
        schema.upgrade(made.database())
        made.start_worker()
        yield made


@pytest.mark.postgresql
@pytest.mark.parametrize("key", ["nul \0", "\ud800", "k" * 50_000])
def test_what_the_database_cannot_keep_is_refused_like_anything_else_and_ends(
    on_postgresql: TestNode, key: str
) -> None:
    for arguments in ({"name": "web1", key: True}, {"name": key}, {"name": "web1", "on_timeout": key}):
        job = on_postgresql.send("instance.stop", **arguments)
        with pytest.raises(OperationFailed) as failed:
            job.wait(DEADLINE_S)
        assert failed.value.code == "INVALID_ARGUMENT"
        assert failed.value.details["errors"]
        kept = row(on_postgresql, job)
        assert kept.error
        assert kept.error["details"] == failed.value.details
