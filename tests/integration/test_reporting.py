"""What outsiders see of a job: states and meta in the result backend, events, and Flower."""

from __future__ import annotations

import base64
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from hostler import OperationFailed
from tests.nodes import DEADLINE_S, TestNode, tiny_instance, until
from tests.services import missing
from worker.kvm.tiny_guest import IGNORE_KEY, IGNORING_MESSAGE, POWER_OFF_KEY

PHASES = ["validate", "claim", "sockets", "spawn", "greeting", "continue", "record"]
LOGIN = "me:secret"
Event = dict[str, Any]


@contextmanager
def events(node: TestNode) -> Iterator[queue.Queue[Event]]:
    """Every event that the node sends from now on, as Celery's own receiver hears it."""
    heard: queue.Queue[Event] = queue.Queue()
    app = node.client()._app
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": heard.put})
        listening = threading.Thread(target=receiver.capture, kwargs={"limit": None, "wakeup": False})
        listening.start()
        try:
            until(lambda: marked(node, heard), what="events arrive")
            yield heard
        finally:
            receiver.should_stop = True
            listening.join(DEADLINE_S)


def marked(node: TestNode, heard: queue.Queue[Event]) -> bool:
    """Whether the receiver hears what is sent; what it heard until then is dropped."""
    node.client()._app.control.ping(timeout=0.01)
    node.do("instance.list")
    return not heard.empty()


def of_job(heard: queue.Queue[Event], job_id: str) -> list[Event]:
    """The events of a job up to its end."""
    found: list[Event] = []
    while not found or found[-1]["type"] not in ("task-succeeded", "task-failed"):
        event = heard.get(timeout=DEADLINE_S)
        if event.get("uuid") == job_id:
            found.append(event)
    return found


@contextmanager
def busy(node: TestNode, name: str = "web1") -> Iterator[str]:
    """A job at work: a stop of a guest that ignores its power button until the end of the block."""
    node.start(tiny_instance(node.root, name))
    with node.serial(name) as serial:
        serial.tick()
        serial.send(IGNORE_KEY)
        serial.read_until(IGNORING_MESSAGE)
        job = node.send("instance.stop", name=name, timeout_s=600)
        node.until_state(name, "stopping")
        yield job.id
        if job.state == "REVOKED":
            return
        serial.send(POWER_OFF_KEY)
        job.wait(DEADLINE_S)


def test_a_job_sends_events_of_its_progress_with_a_text_in_result(n1: TestNode) -> None:
    with events(n1) as heard:
        job = n1.send("instance.start", instance=tiny_instance(n1.root))
        job.wait(DEADLINE_S)
        seen = of_job(heard, job.id)
    progress = [event for event in seen if event["type"] == "task-Started"]
    assert progress
    percents = [int(event["result"].split(" % ")[0]) for event in progress]
    assert percents == sorted(percents)
    assert all(event["result"].split(" % ")[1] for event in progress)
    assert {event["hostname"] for event in progress} == {"hostler@n1"}
    assert [event["type"] for event in seen if event["type"] != "task-Started"] == [
        "task-received",
        "task-started",
        "task-succeeded",
    ]


def test_a_failed_job_sends_its_failure(n1: TestNode) -> None:
    with events(n1) as heard:
        job = n1.send("instance.pause", name="nobody")
        with pytest.raises(OperationFailed):
            job.wait(DEADLINE_S)
        last = of_job(heard, job.id)[-1]
    assert last["type"] == "task-failed"
    assert "UNKNOWN_INSTANCE" in last["exception"]


def test_no_event_of_any_job_is_lost_when_many_run_at_once(n1: TestNode) -> None:
    """A lost end would leave a job at work in Flower for ever."""
    with events(n1) as heard:
        jobs = [n1.send("instance.list") for _ in range(200)]
        for job in jobs:
            job.wait(DEADLINE_S)
        missing_ones = {(job.id, f"task-{what}") for job in jobs for what in ("received", "started", "succeeded")}
        while missing_ones:
            event = heard.get(timeout=DEADLINE_S)
            missing_ones.discard((event.get("uuid"), event["type"]))


def test_the_result_backend_shows_state_and_meta_of_a_job_at_work(n1: TestNode) -> None:
    with busy(n1) as job_id:
        job = n1.client().job(job_id)
        until(lambda: job.state == "PROGRESS")
        meta = job.progress
        assert meta
        assert set(meta) >= {"phase", "percent", "message", "instance", "node", "updated_at"}
        assert (meta["phase"], meta["instance"], meta["node"]) == ("shutdown", "web1", "n1")
        assert 0 <= meta["percent"] <= 100
        assert meta["updated_at"].endswith("+00:00")


def test_no_report_comes_after_the_result(n1: TestNode) -> None:
    """A late report would turn a finished job into one at work for ever."""
    n1.start(tiny_instance(n1.root))
    jobs = [n1.send(f"instance.{what}", name="web1") for _ in range(20) for what in ("pause", "resume")]
    for job in jobs:
        job.wait(DEADLINE_S)
    n1.do("instance.list")
    assert {job.state for job in jobs} == {"SUCCESS"}


class Flower:
    """A Flower of this node, started as a person would, behind a login."""

    def __init__(self, node: TestNode, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "flower.log"
        argv = [sys.executable, "-m", "celery", "-A", "worker", "flower"]
        argv += ["--address=127.0.0.1", f"--port={port}", f"--basic-auth={LOGIN}"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                argv,
                env=node.env,
                cwd=folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def get(self, path: str, login: str = LOGIN) -> Any:
        request = urllib.request.Request(self.url + path)
        if login:
            request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
        with urllib.request.urlopen(request, timeout=10) as answer:
            text = answer.read().decode()
        return json.loads(text) if path.startswith("/api/") else text

    def answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return "n1" in json.dumps(self.get("/api/workers?refresh=1"))
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def task(self, job_id: str) -> dict[str, Any]:
        return dict(self.get("/api/tasks?limit=1000").get(job_id) or {})

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def flower(shared_node: TestNode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    if find_spec("flower") is None:
        missing("Flower", "install hostler[flower]")
    made = Flower(shared_node, tmp_path_factory.mktemp("flower"))
    try:
        until(made.answers, 60, what="Flower shows the node's worker")
        yield made
    finally:
        made.close()


def test_flower_shows_a_job_at_work_with_its_progress_and_then_its_result(n1: TestNode, flower: Flower) -> None:
    with busy(n1) as job_id:
        shown = until(lambda: (task := flower.task(job_id)) and "10 %" in str(task["result"]) and task)
        assert (shown["name"], shown["state"]) == ("instance.stop", "STARTED")
        assert "Terminate" in flower.get(f"/task/{job_id}")
        assert "power button" in shown["result"]
        assert " % " in shown["result"]
        assert "web1" in shown["kwargs"]
        assert shown["worker"] == "hostler@n1"
    done = until(lambda: (task := flower.task(job_id)) and task["state"] == "SUCCESS" and task)
    assert "guest_shutdown" in done["result"]
    assert f"{job_id}" in flower.get(f"/task/{job_id}")


def test_flower_shows_a_failure_with_its_code(n1: TestNode, flower: Flower) -> None:
    job = n1.send("instance.pause", name="nobody")
    with pytest.raises(OperationFailed):
        job.wait(DEADLINE_S)
    failed = until(lambda: (task := flower.task(job.id)) and task["state"] == "FAILURE" and task)
    assert "UNKNOWN_INSTANCE" in failed["exception"]


def test_a_job_can_be_sent_through_flower_to_the_nodes_queue(n1: TestNode, flower: Flower) -> None:
    job_id = str(uuid.uuid4())
    order = {"kwargs": {}, "queue": "node.n1", "task_id": job_id}
    request = urllib.request.Request(
        f"{flower.url}/api/task/send-task/instance.list",
        data=json.dumps(order).encode(),
        headers={"Authorization": "Basic " + base64.b64encode(LOGIN.encode()).decode()},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        sent = json.loads(answer.read())
    assert isinstance(n1.client().job(sent["task-id"]).wait(DEADLINE_S), list)


@pytest.mark.parametrize("path", ["/", "/tasks", "/workers"])
def test_flowers_pages_are_closed_to_who_does_not_log_in(flower: Flower, path: str) -> None:
    for login in ("", "me:wrong"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            flower.get(path, login)
        assert refused.value.code == 401
    assert "Flower" in flower.get(path)


def test_the_login_that_closes_flower_is_documented() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert "celery -A worker flower" in readme
    assert "--basic-auth=" in readme


def documented(flower: Flower, words: str, **values: str) -> Any:
    """The answer to the request of docs/flower.md that has ``words`` in it, run as it stands there."""
    if not shutil.which("curl"):
        missing("curl", "install curl")
    text = (Path(__file__).parents[2] / "docs" / "flower.md").read_text()
    (command,) = [block for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if words in block]
    for name, value in ({"http://127.0.0.1:5555": flower.url, "me:secret": LOGIN} | values).items():
        assert name in command
        command = command.replace(name, value)
    done = subprocess.run(["sh", "-ec", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_documented_request_to_flower_retries_a_failed_job(n1: TestNode, flower: Flower) -> None:
    failed = n1.send("instance.pause", name="web1")
    with pytest.raises(OperationFailed):
        failed.wait(DEADLINE_S)
    n1.start(tiny_instance(n1.root))
    sent = documented(flower, "job.retry", JOB_ID=failed.id)
    answer = documented(flower, "/result/", TASK_ID=sent["task-id"])
    (retry,) = answer["result"]
    assert (retry["retry_of"], retry["task"]) == (failed.id, "instance.pause")
    assert n1.client().job(retry["id"]).wait(DEADLINE_S)["state"] == "paused"


def test_flower_shows_a_job_that_waits_and_the_documented_request_cancels_it(n1: TestNode, flower: Flower) -> None:
    with busy(n1) as job_id:
        waiting = n1.send("instance.pause", name="web1")
        shown = until(lambda: (task := flower.task(waiting.id)) and task["result"] and task)
        assert (shown["state"], shown["result"]) == ("RECEIVED", f"0 % waiting for job {job_id}")
        assert "Revoke" in flower.get(f"/task/{waiting.id}")
        documented(flower, "/revoke/", JOB_ID=waiting.id)
        until(lambda: waiting.state == "REVOKED")
        until(lambda: (task := flower.task(waiting.id)) and task["state"] == "REVOKED")


def test_a_job_that_was_terminated_at_work_is_revoked_in_flower(n1: TestNode, flower: Flower) -> None:
    with busy(n1) as job_id:
        until(lambda: (task := flower.task(job_id)) and "10 %" in str(task["result"]))
        documented(flower, "/revoke/", JOB_ID=job_id)
        until(lambda: (task := flower.task(job_id)) and task["state"] == "REVOKED")
        n1.do("instance.stop", name="web1", force=True)


@pytest.mark.parametrize("path", ["/metrics", "/healthcheck"])
def test_what_the_documentation_calls_open_is_open(flower: Flower, path: str) -> None:
    assert flower.get(path, login="")
