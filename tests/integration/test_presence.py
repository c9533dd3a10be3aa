"""Jobs of nodes without a worker say so: two nodes on one PostgreSQL and one Redis, one of them without a worker."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from celery import Celery
from celery.result import AsyncResult
from sqlalchemy import select, update

from hostler import OperationFailed
from migrations import schema
from models import Incarnation, utc_now
from models import Job as JobRow
from tests.nodes import DEADLINE_S, TestNode, node, tiny_instance, until
from tests.services import postgresql_database
from worker.kvm.tiny_guest import IGNORE_KEY, IGNORING_MESSAGE, POWER_OFF_KEY
from worker.operations.presence import ABSENT_AFTER

pytestmark = [pytest.mark.node, pytest.mark.postgresql]


@pytest.fixture(scope="module")
def both(qemu: None) -> Iterator[tuple[TestNode, TestNode]]:
    """n1, whose worker lives and watches, and n2; one database, and n1's embedded Redis for both."""
    with postgresql_database() as url, node(HOSTLER_DATABASE_URL=url) as n1:
        schema.upgrade(n1.database())
        n1.start_worker()
        shared = dict.fromkeys(("HOSTLER_BROKER_URL", "HOSTLER_RESULT_BACKEND"), n1.settings.effective_broker_url)
        with node("n2", HOSTLER_DATABASE_URL=url, **shared) as n2:
            yield n1, n2


@pytest.fixture
def n2(both: tuple[TestNode, TestNode]) -> Iterator[TestNode]:
    """The second node, its worker alive."""
    if both[1].worker is None:
        both[1].start_worker()
    yield both[1]
    both[1].end_guests()


@pytest.fixture
def n1(both: tuple[TestNode, TestNode]) -> TestNode:
    return both[0]


@pytest.fixture
def server(n1: TestNode) -> Iterator[redis.Redis]:
    """The broker and result backend, past Celery."""
    with redis.Redis(unix_socket_path=str(n1.settings.broker_socket)) as client:
        yield client


@pytest.fixture
def master(n1: TestNode) -> Iterator[Celery]:
    """A program that has none of hostler's code."""
    url = n1.settings.effective_broker_url
    with Celery(broker=url, backend=url, set_as_current=False) as app:
        yield app
        gc.collect()  # results unsubscribe when they go: now, as long as there is a Redis


def kill(n2: TestNode) -> None:
    """SIGKILL, long enough ago for its heartbeat to be missed."""
    n2.kill_worker()
    with n2.database().transaction() as session:
        session.execute(
            update(Incarnation)
            .where(Incarnation.node == n2.name, Incarnation.ended_at.is_(None))
            .values(heartbeat_at=utc_now() - ABSENT_AFTER)
        )


def told(result: AsyncResult, state: str, words: str) -> dict[str, Any]:
    """The meta of a job once it is in ``state`` with ``words`` in its message."""

    def look() -> Any:
        meta = result._get_task_meta()
        said = meta["result"] if isinstance(meta["result"], dict) else {}
        return meta["status"] == state and words in said.get("message", "") and meta

    result._cache = None
    return dict(until(look, what=f"{result.id} is {state}: {words}"))


def hold(n2: TestNode) -> str:
    """A job at work: a stop of a guest that ignores its power button."""
    n2.start(tiny_instance(n2.root))
    with n2.serial("web1") as serial:
        serial.tick()
        serial.send(IGNORE_KEY)
        serial.read_until(IGNORING_MESSAGE)
    job = n2.send("instance.stop", name="web1", timeout_s=600)
    n2.until_state("web1", "stopping")
    return job.id


def release(n2: TestNode) -> None:
    with n2.serial("web1") as serial:
        serial.tick()
        serial.send(POWER_OFF_KEY)


def test_a_job_for_a_node_without_a_worker_says_so_and_succeeds_when_the_worker_is_back(
    n1: TestNode, n2: TestNode, master: Celery
) -> None:
    kill(n2)
    jobs = [
        master.send_task("instance.list", queue="node.n2"),
        master.send_task("instance.check", kwargs={"instance": {"name": "web7"}}, queue="node.n2", priority=9),
    ]
    for job, instance in zip(jobs, (None, "web7"), strict=True):
        meta = told(job, "WAITING", "node n2 has no worker since 20")
        assert meta["result"]["message"].endswith("; start one there: hostler worker")
        assert (meta["result"]["phase"], meta["result"]["percent"]) == ("queued", 0)
        assert (meta["result"]["node"], meta["result"]["instance"]) == ("n2", instance)
        assert meta["result"]["waiting_for"] == []
    assert told(jobs[1], "WAITING", "n2")["kwargs"] == {"instance": {"name": "web7"}}
    n2.start_worker()
    assert jobs[0].get(timeout=DEADLINE_S) == []
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        jobs[1].get(timeout=DEADLINE_S)


def test_a_job_for_a_misspelt_node_says_so_and_a_node_on_another_database_is_not_taken_for_one(
    n1: TestNode, master: Celery, server: redis.Redis
) -> None:
    url = n1.settings.effective_broker_url
    with node("other", HOSTLER_BROKER_URL=url, HOSTLER_RESULT_BACKEND=url, HOSTLER_CONCURRENCY="1") as other:
        other.start_worker()
        busy = hold(other)
        waiting = [master.send_task("instance.list", queue="node.other") for _ in range(3)]
        until(lambda: server.llen("node.other"))
        strange = master.send_task("instance.list", queue="node.typo")
        meta = told(strange, "WAITING", "no worker of node typo was ever seen; check the name")
        assert meta["result"]["node"] == "typo"
        assert waiting[-1].state == "PENDING"  # the same look at the broker met its queue
        release(other)
        assert master.AsyncResult(busy).get(timeout=DEADLINE_S)["how"] == "guest_shutdown"
        assert [job.get(timeout=DEADLINE_S)[0]["name"] for job in waiting] == ["web1"] * 3
    explained = n1.cli_json("why", strange.id, "-n", "n1")
    assert explained["because"] == [
        "no worker of node typo was ever seen; check the name",
        "its message lies in queue node.typo, with 0 before it",
    ]
    assert n1.cli(*explained["command"].split()[1:]).returncode == 0
    with pytest.raises(OperationFailed, match="CANCELLED"):
        n1.client().job(strange.id).wait(DEADLINE_S)


def test_jobs_of_the_ledger_whose_worker_died_say_so_and_go_on_with_the_next(
    n1: TestNode, n2: TestNode, master: Celery
) -> None:
    busy = master.AsyncResult(hold(n2))
    behind = master.send_task("instance.cleanup", kwargs={"name": "web1"}, queue="node.n2")
    told(behind, "WAITING", "waiting for job")
    kill(n2)
    at_work = told(busy, "PROGRESS", "node n2 has no worker since")["result"]
    assert (at_work["phase"], at_work["percent"], at_work["instance"]) == ("shutdown", 10, "web1")
    waits = told(behind, "WAITING", "node n2 has no worker since")["result"]
    assert (waits["phase"], waits["waiting_for"]) == ("waiting", [busy.id])
    explained = n1.do("job.why", id=behind.id)
    assert explained["because"][0].startswith("node n2 has no worker since ")
    assert explained["because"][1].startswith("instance web1 is held since ")
    assert explained["command"] == "hostler worker --node n2"
    n2.start_worker()
    told(behind, "WAITING", "waiting for job")
    told(busy, "PROGRESS", "power button")
    assert n1.do("job.why", id=behind.id)["because"][0].startswith("instance web1 is held")
    release(n2)
    assert busy.get(timeout=DEADLINE_S)["how"] == "guest_shutdown"
    assert behind.get(timeout=DEADLINE_S)["name"] == "web1"


def test_hostler_nodes_lists_who_is_there_and_who_is_not(n1: TestNode, n2: TestNode) -> None:
    n2.start(tiny_instance(n2.root))
    pid = n1.worker.pid if n1.worker else 0
    first, second = n1.cli_json("nodes", "-n", "n2")
    assert (first["node"], first["worker"], first["pid"], first["instances"]) == ("n1", "alive", pid, {})
    assert (second["node"], second["worker"], second["instances"]) == ("n2", "alive", {"running": 1})
    assert second["version"] and second["since"]
    assert (first["open_jobs"], second["open_jobs"]) == (0, 0)
    kill(n2)
    second = n1.cli_json("nodes")[1]  # of whichever node answers
    assert (second["worker"], second["pid"], second["instances"]) == ("absent", None, {"running": 1})
    shown = n1.cli("nodes").stdout
    assert "NODE" in shown
    assert "1 running" in shown
    assert n2.cli("nodes", "-n", "n2", "--timeout", "1").returncode == 124
    n2.start_worker()
    assert [row["worker"] for row in n2.cli_json("nodes")] == ["alive", "alive"]
    with n1.reading() as session:
        assert session.scalars(select(JobRow.id).where(JobRow.task == "node.list")).all()


def test_hostler_nodes_says_when_nobody_is_there(new_node: TestNode) -> None:
    done = new_node.cli("nodes")
    assert done.returncode == 3
    assert "no node's worker answers" in done.stderr
