"""Waiting, cancelling, retrying and explaining, through a real worker, with real guests to be waited for."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import psutil
import pytest
import redis
from sqlalchemy import select

from hostler import Job, OperationFailed
from hostler.contract import worker_name
from models import Job as JobRow
from tests.nodes import DEADLINE_S, FakeQemu, TestNode, node, tiny_instance, until
from worker.kvm.tiny_guest import IGNORE_KEY, IGNORING_MESSAGE, POWER_OFF_KEY

pytestmark = pytest.mark.node

CANCEL_DEADLINE_S = 5.0
"""A job that gives up has undone its work within this; a promise to users."""


@pytest.fixture
def server(n1: TestNode) -> Iterator[redis.Redis]:
    """The node's result backend, past Celery."""
    with redis.Redis(unix_socket_path=str(n1.settings.broker_socket)) as client:
        yield client


@pytest.fixture(scope="module")
def narrow_node(qemu: None) -> Iterator[TestNode]:
    """A node that carries out one start at a time, and whose QEMU hangs on demand."""
    with node(HOSTLER_LIMIT_STARTS="1") as made:
        made.environment["HOSTLER_QEMU_BINARY"] = str(FakeQemu(made.root).path)
        made.start_worker()
        yield made


@pytest.fixture
def narrow(narrow_node: TestNode) -> Iterator[TestNode]:
    yield narrow_node
    narrow_node.end_guests()


@contextmanager
def qemu_is(n1: TestNode, mode: str) -> Iterator[None]:
    switch = n1.root / "qemu.mode"
    switch.write_text(mode)
    try:
        yield
    finally:
        switch.write_text("works")


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that says nothing meanwhile."""
    process = psutil.Process(pid)
    process.suspend()
    try:
        yield
    finally:
        process.resume()


def row(n1: TestNode, job: Job) -> JobRow:
    with n1.reading() as session:
        return session.scalars(select(JobRow).where(JobRow.id == job.id)).one()


def phase(n1: TestNode, job: Job) -> str:
    with n1.reading() as session:
        return session.scalar(select(JobRow.phase).where(JobRow.id == job.id)) or ""


def start_one_that_ignores_its_button(n1: TestNode, name: str = "web1") -> None:
    n1.start(tiny_instance(n1.root, name))
    with n1.serial(name) as serial:
        serial.tick()
        serial.send(IGNORE_KEY)
        serial.read_until(IGNORING_MESSAGE)


def hold(n1: TestNode, name: str = "web1") -> Job:
    """A job that keeps the instance busy until ``release``: a stop of a guest that ignores its power button."""
    start_one_that_ignores_its_button(n1, name)
    job = n1.send("instance.stop", name=name, timeout_s=600)
    n1.until_state(name, "stopping")
    return job


def release(n1: TestNode, name: str = "web1") -> None:
    with n1.serial(name) as serial:
        serial.tick()
        serial.send(POWER_OFF_KEY)


def ends_cancelled(job: Job, within_s: float = CANCEL_DEADLINE_S) -> OperationFailed:
    with pytest.raises(OperationFailed) as failed:
        job.wait(within_s)
    assert failed.value.code == "CANCELLED"
    assert job.state == "REVOKED"
    return failed.value


def why(n1: TestNode, job: Job) -> Any:
    return n1.do("job.why", id=job.id)


# Cancel: what has not begun


def test_a_waiting_job_is_cancelled_at_once_and_stays_so_for_the_next_worker(n1: TestNode) -> None:
    busy = hold(n1)
    waiting = n1.send("instance.pause", name="web1")
    until(lambda: waiting.state == "WAITING")
    child = n1.send("instance.info", name="web1", after=[waiting.id])
    until(lambda: child.state == "WAITING")
    assert waiting.cancel(n1.name) == {
        "id": waiting.id, "outcome": "revoked", "message": "it had not begun and never will",
    }  # fmt: skip
    ends_cancelled(waiting)
    ends_cancelled(child)
    assert waiting.cancel(n1.name)["outcome"] == "revoked"
    n1.restart_worker()
    for job, task in ((waiting, "instance.pause"), (child, "instance.info")):
        n1.send(task, job_id=job.id, name="web1")
    n1.do("node.info")
    assert (row(n1, waiting).state, row(n1, waiting).attempts, waiting.state) == ("REVOKED", 0, "REVOKED")
    assert child.state == "REVOKED"
    release(n1)
    assert busy.wait(DEADLINE_S)["how"] == "guest_shutdown"
    n1.nothing_is_left()


def test_a_job_whose_message_has_not_come_yet_is_cancelled(n1: TestNode) -> None:
    job = n1.client().job("a-job-on-its-way")
    assert job.cancel(n1.name)["outcome"] == "revoked"
    n1.send("instance.start", job_id=job.id, instance=tiny_instance(n1.root, "never"))
    n1.do("node.info")
    ends_cancelled(job)
    assert n1.row("never") is None


@pytest.mark.parametrize("terminate", [False, True])
def test_celerys_revoke_cancels_what_waits_and_only_with_terminate_what_runs(n1: TestNode, terminate: bool) -> None:
    busy, control = hold(n1), n1.client()._app.control
    waiting = n1.send("instance.pause", name="web1")
    until(lambda: waiting.state == "WAITING")
    (reply,) = control.revoke([waiting.id, busy.id], terminate=terminate, reply=True, timeout=DEADLINE_S, limit=1)
    first, second = reply[worker_name(n1.name)]["ok"]
    assert (first["outcome"], second["outcome"]) == ("revoked", "requested" if terminate else "running")
    ends_cancelled(waiting)
    if terminate:
        assert "cancelled in phase shutdown" in ends_cancelled(busy).message
        assert n1.row("web1").state == "running"  # type: ignore[union-attr]
    else:
        assert busy.state == "PROGRESS"
        release(n1)
        assert busy.wait(DEADLINE_S)["how"] == "guest_shutdown"


# Cancel: what runs


def test_a_stop_that_waits_for_its_guest_gives_up_and_the_guest_runs_on(n1: TestNode) -> None:
    busy = hold(n1)
    following, pid = n1.send("instance.pause", name="web1"), n1.pid("web1")
    until(lambda: following.state == "WAITING")
    done = n1.cli("cancel", busy.id, "-n", n1.name)
    assert (done.returncode, done.stdout) == (0, "requested: it gives up in phase shutdown and undoes its work\n")
    ends_cancelled(busy)
    assert following.wait(DEADLINE_S)["state"] == "paused"
    assert n1.do("instance.resume", name="web1")["state"] == "running"
    with n1.serial("web1") as serial:
        assert serial.tick() < serial.tick()
    assert n1.pid("web1") == pid
    assert row(n1, busy).state == "REVOKED"


def test_a_stop_of_a_paused_guest_that_gives_up_leaves_it_paused(n1: TestNode) -> None:
    start_one_that_ignores_its_button(n1)
    n1.do("instance.pause", name="web1")
    busy = n1.send("instance.stop", name="web1", timeout_s=600)
    n1.until_state("web1", "stopping")
    with n1.serial("web1") as serial:
        serial.tick()  # it was resumed, to see its power button
    assert busy.cancel(n1.name)["outcome"] == "requested"
    ends_cancelled(busy)
    assert n1.info("web1")["state"] == "paused"


def test_a_start_that_hangs_is_cancelled_and_leaves_nothing(narrow: TestNode) -> None:
    narrow.do("instance.check", instance=tiny_instance(narrow.root))  # it is probed before it hangs
    with qemu_is(narrow, "hangs"):
        job = narrow.send("instance.start", instance=tiny_instance(narrow.root))
        until(lambda: phase(narrow, job) == "greeting")
        assert job.cancel(narrow.name)["outcome"] == "requested"
        assert "greeting" in ends_cancelled(job).message
    narrow.nothing_is_left()
    assert narrow.row("web1") is None
    assert narrow.start(tiny_instance(narrow.root))["state"] == "running"


def test_a_node_that_has_not_heard_of_a_job_leaves_its_result_alone(n1: TestNode) -> None:
    url = n1.settings.effective_broker_url
    with node("n2", HOSTLER_BROKER_URL=url, HOSTLER_RESULT_BACKEND=url) as n2:
        n2.start_worker()
        busy, failed = hold(n1), n1.send("instance.pause", name="nobody")
        until(lambda: failed.state == "FAILURE")
        assert failed.cancel()["outcome"] == "finished"
        assert failed.state == "FAILURE"
        assert busy.cancel("n2")["outcome"] == "running"
        assert busy.state == "PROGRESS"
        assert busy.cancel()["outcome"] == "requested"
        ends_cancelled(busy)


def test_what_is_past_its_last_point_of_return_says_so_and_finishes(n1: TestNode) -> None:
    n1.start(tiny_instance(n1.root))
    with stopped(n1.pid("web1")):
        job = n1.send("instance.pause", name="web1")
        until(lambda: phase(n1, job) == "pause")
        until(lambda: job.cancel(n1.name)["outcome"] == "too_late")
        assert job.cancel(n1.name)["message"] == "too late: pause, it will finish"
        assert n1.cli("cancel", job.id).returncode == 1
    assert job.wait(DEADLINE_S)["state"] == "paused"
    assert job.cancel(n1.name) == {"id": job.id, "outcome": "finished", "message": "it has ended already"}
    assert job.wait(0)["state"] == "paused"


def test_a_job_that_gives_up_is_not_put_off_when_the_monitor_is_silent_too(n1: TestNode) -> None:
    busy = hold(n1)
    with stopped(n1.pid("web1")):
        until(lambda: busy.cancel(n1.name)["outcome"] == "requested")
        ends_cancelled(busy, DEADLINE_S)
    assert row(n1, busy).retries == 0


# Retry


def test_a_silent_monitor_is_ridden_out_under_the_same_id(n1: TestNode) -> None:
    n1.start(tiny_instance(n1.root))
    with stopped(n1.pid("web1")):
        job = n1.send("instance.pause", name="web1")
        until(lambda: job.state == "RETRY")
        put_off = row(n1, job)
        assert (put_off.state, put_off.retries) == ("RETRY", 1)
        explained = why(n1, job)
        assert explained["state"] in ("RETRY", "PROGRESS")
    assert job.wait(DEADLINE_S)["state"] == "paused"
    done = row(n1, job)
    assert (done.state, done.error) == ("SUCCESS", None)
    assert done.attempts == done.retries + 1 >= 2


def test_a_failed_job_is_retried_by_hand_under_a_new_id_that_names_it(n1: TestNode) -> None:
    start_one_that_ignores_its_button(n1)
    failed = n1.send("instance.stop", name="web1", timeout_s=1, on_timeout="fail")
    with pytest.raises(OperationFailed) as timed_out:
        failed.wait(DEADLINE_S)
    assert (timed_out.value.code, timed_out.value.retryable) == ("TIMED_OUT", True)
    assert why(n1, failed)["command"] == f"hostler retry {failed.id} -n {n1.name}"
    with n1.serial("web1") as serial:
        serial.tick()
        serial.send(b"r")  # after its reset it minds the button again
        serial.read_until(b"hostler tiny guest")
        serial.tick()
    (pair,) = n1.cli_json("retry", failed.id, "-n", n1.name)
    assert (pair["retry_of"], pair["task"]) == (failed.id, "instance.stop")
    assert n1.client().job(pair["id"]).wait(DEADLINE_S)["how"] == "guest_shutdown"
    assert row(n1, n1.client().job(pair["id"])).retry_of == failed.id
    assert n1.cli_json("retry", "--failed", "-n", n1.name) == []
    refused = n1.cli("retry", pair["id"], "-n", n1.name)
    assert refused.returncode == 1
    assert "cannot be retried" in refused.stderr


# Waiting


def test_a_job_comes_after_another_and_is_cancelled_when_that_fails(n1: TestNode) -> None:
    start = n1.send("instance.start", instance=tiny_instance(n1.root))
    pause = n1.send("instance.pause", name="web1", after=[start.id])
    bad = n1.send("instance.pause", name="nobody", after=[pause.id])
    never = n1.send("instance.resume", name="web1", after=[bad.id])
    anyway = n1.send("instance.info", name="web1", after=[never.id], after_failure="run")
    assert anyway.wait(DEADLINE_S)["state"] == "paused"
    with pytest.raises(OperationFailed) as failed:
        bad.wait(DEADLINE_S)
    assert failed.value.code == "UNKNOWN_INSTANCE"
    ends_cancelled(never)
    assert (row(n1, start).finished_at or 0) <= (row(n1, pause).started_at or 0)  # type: ignore[operator]


def test_starts_go_one_at_a_time_where_one_is_the_limit(narrow: TestNode) -> None:
    names = [f"web{number}" for number in range(4)]
    jobs = [narrow.send("instance.start", instance=tiny_instance(narrow.root, name)) for name in names]
    for job in jobs:
        assert job.wait(DEADLINE_S)["state"] == "running"
    rows = [row(narrow, job) for job in jobs]
    for before, after in pairwise(rows):
        assert before.finished_at and after.started_at
        assert before.finished_at <= after.started_at
    assert not any(done.slot_taken for done in rows)


def test_a_start_that_waits_for_a_place_says_so_and_gets_the_one_of_a_cancelled(narrow: TestNode) -> None:
    narrow.do("instance.check", instance=tiny_instance(narrow.root))
    with qemu_is(narrow, "hangs"):
        first = narrow.send("instance.start", instance=tiny_instance(narrow.root, "web1"))
        until(lambda: phase(narrow, first) == "greeting")
        second = narrow.send("instance.start", instance=tiny_instance(narrow.root, "web2"))
        until(lambda: second.state == "WAITING")
        explained = why(narrow, second)
    assert explained["because"][0] == "all places for start jobs on node n1 are taken, by"
    assert first.id in explained["because"][1]
    assert narrow.do("node.info")["node"] == "n1"
    assert first.cancel()["outcome"] == "requested"
    ends_cancelled(first)
    assert second.wait(DEADLINE_S)["state"] == "running"


# After a death


@pytest.mark.parametrize("ends", ["SUCCESS", "FAILURE", "REVOKED"])
def test_a_result_that_the_worker_could_not_deliver_is_delivered_by_the_next(
    n1: TestNode, server: redis.Redis, ends: str
) -> None:
    make: dict[str, Callable[[], Job]] = {
        "SUCCESS": lambda: n1.send("instance.start", instance=tiny_instance(n1.root)),
        "FAILURE": lambda: n1.send("instance.pause", name="nobody"),
        "REVOKED": lambda: hold(n1),
    }
    job = make[ends]()
    if ends == "REVOKED":
        job.cancel(n1.name)
    until(lambda: job.state == ends)
    before = job.snapshot()
    assert n1.worker
    os.kill(n1.worker.pid, signal.SIGSTOP)
    assert server.delete(f"celery-task-meta-{job.id}") == 1
    n1.restart_worker()
    until(lambda: job.state == ends)
    after = job.snapshot()
    assert after.result == before.result
    if before.error:
        assert after.error
        assert (after.error.code, after.error.details) == (before.error.code, before.error.details)
    assert row(n1, job).attempts == 1


# Why


def test_why_explains_each_state_and_names_the_next_command(n1: TestNode) -> None:
    busy = hold(n1)
    waiting = n1.send("instance.pause", name="web1")
    child = n1.send("instance.info", name="web1", after=[waiting.id, "never-sent"])
    until(lambda: child.state == "WAITING")
    runs = why(n1, busy)
    assert (runs["state"], runs["command"]) == ("PROGRESS", f"hostler watch {busy.id}")
    assert runs["because"][0].startswith("it runs: shutdown, 10 %, pressing the power button")
    waits = why(n1, waiting)
    assert waits["because"][0].startswith("instance web1 is held since ")
    assert waits["because"][1] == f"job {busy.id} (instance.stop on n1, PROGRESS, shutdown, 10 %)"
    assert waits["command"] == f"hostler why {busy.id} -n n1"
    comes_after = n1.cli_json("why", child.id, "-n", "n1")["because"]
    assert comes_after[0] == "it comes after"
    assert "job never-sent, which no node has received yet" in comes_after
    child.cancel(n1.name)
    release(n1)
    busy.wait(DEADLINE_S)
    ended = why(n1, busy)
    assert ended["because"][0].startswith("it has ended as SUCCESS at ")
    assert ended["command"] == f"hostler job {busy.id} --history -n n1"
    unknown = n1.cli("why", "no-such-job", "-n", "n1")
    assert unknown.returncode == 1
    assert "knows no job no-such-job" in unknown.stderr


def test_why_says_that_nobody_is_there(n1: TestNode) -> None:
    n1.kill_worker(signal.SIGTERM)
    job = n1.send("instance.list")
    done = n1.cli("why", job.id, "-n", "n1")
    assert done.returncode == 1
    assert "node n1 has no live worker" in done.stdout
    assert "hostler worker --node n1" in done.stdout
    assert n1.cli("cancel", job.id, "-n", "n1").returncode == 3
    n1.start_worker()
    assert job.wait(DEADLINE_S) is not None
