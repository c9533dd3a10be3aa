"""Batches of jobs against a real Redis and a real worker that has none of hostler's code."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import textwrap
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import celery
import pytest
from sqlalchemy import Engine, event

from hostler import Client, Job, JobExecutor, JobRequest, JobState, ServiceUnreachable
from hostler.settings import known_names
from tests.integration import test_client
from tests.integration.test_client import DEADLINE_S, Node, Service, until

folder, service, worker, client = test_client.folder, test_client.service, test_client.worker, test_client.client
_needs_redis = test_client._needs_redis

WEB1 = {"name": "web1", "memory_mib": 64}
MANY = 10_000
FINISHER = """
    # Another process ends the jobs of node n5: a fifth at once, the rest when told to, in an order of its own.
    import os, random, sys
    from celery import Celery

    app = Celery("finisher", broker=os.environ["URL"], backend=os.environ["URL"])
    numbers = list(range(int(sys.argv[1])))
    random.Random(5).shuffle(numbers)
    first = len(numbers) // 5

    def end(number):
        job_id = f"many-{number}"
        if number % 1000 == 7:
            app.backend.mark_as_failure(job_id, RuntimeError(f"number {number}"))
        else:
            app.backend.store_result(job_id, {"number": number}, "SUCCESS")

    for number in numbers[:first]:
        end(number)
    print("ready", flush=True)
    sys.stdin.readline()
    for number in numbers[first:]:
        end(number)
"""


@pytest.fixture
def executor(client: Client) -> JobExecutor:
    return JobExecutor(client)


@pytest.fixture
def own_service(folder: Path) -> Iterator[Service]:
    """A Redis that the test may kill, without a worker."""
    home = folder / uuid.uuid4().hex[:8]
    home.mkdir()
    running = Service(home)
    yield running
    running.kill()


class LosingClient(Client):
    """A client whose broker is lost, or which is interrupted, when it is about to send its third job."""

    def __init__(self, url: str, happens: Callable[[], None]) -> None:
        super().__init__(url)
        self._happens = happens
        self._sent = 0

    def send(self, request: JobRequest) -> Job:
        self._sent += 1
        if self._sent == 3:
            self._happens()
        return super().send(request)


def queued(service: Service, node: str) -> list[str]:
    """Ids of the messages in a node's queue, the first sent first."""
    messages: Any = service.client.lrange(f"node.{node}", 0, -1)
    return [json.loads(raw)["headers"]["id"] for raw in reversed(messages)]


def subscribers(service: Service) -> list[dict[str, str]]:
    clients: Any = service.client.client_list()
    return [one for one in clients if int(one["sub"]) > 0]


def calls(service: Service, command: str) -> int:
    stats: Any = service.client.info("commandstats")
    return int(stats.get(f"cmdstat_{command}", {}).get("calls", 0))


# Results


def test_the_example_of_the_contract(client: Client, service: Service, worker: None) -> None:
    job = client.start("n1", WEB1)
    service.open_gate(job.id)
    service.open_gate(job.id)
    jex = JobExecutor(client)
    jex.queue_job("web1", client.stop.job("n1", name="web1"))
    jex.add_job_id("", job.id)
    (stopped, started) = jex.get_results()
    assert stopped == (False, "NOT_RUNNING: web1 is not running")
    assert started[0] and started[1]["state"] == "running"


def test_results_come_in_the_order_added_with_every_kind_of_failure_told_apart(
    client: Client, service: Service, executor: JobExecutor, worker: None
) -> None:
    revoked = str(uuid.uuid4())
    control = Node(service.url).app.control
    control.broadcast("revoke", arguments={"task_id": revoked}, destination=["hostler@n1"], reply=True)
    executor.queue_job("off", client.stop.job("n1", "off"))
    executor.queue_job("fine", client.pause.job("n1", "fine"))
    executor.add_job_id("refused", "no quota", status=False)
    executor.queue_job("broken", client.cleanup.job("n1", "broken"))
    executor.queue_job("revoked", client.pause.job("n1", "revoked", job_id=revoked))
    executor.queue_job("unknown task", client.node_info.job("n1"))
    executor.add_job_id("nowhere", "no-such-job")
    executor.queue_job("slow", client.reboot.job("n1", "slow", job_id="gated-slow"))
    until(lambda: all(not message.startswith("still PENDING") for _, message in sent_away(executor)[:6]))
    until(lambda: client.job("gated-slow").state is JobState.STARTED)
    results = executor.get_results(timeout_s=0.2)
    assert results[:4] == [
        (False, "NOT_RUNNING: off is not running"),
        (True, {"name": "fine", "state": "paused"}),
        (False, "no quota"),
        (False, "INTERNAL: ZeroDivisionError: division by zero"),
    ]
    assert not results[4][0] and results[4][1].startswith("CANCELLED: ")
    assert not results[5][0] and results[5][1].startswith("UNSUPPORTED: ")
    assert not results[6][0] and results[6][1].startswith("still unknown: there is no such job, or no worker has")
    assert results[7] == (False, "still STARTED, goes on: hostler watch gated-slow")
    service.open_gate("gated-slow")
    until(lambda: client.job("gated-slow").state is JobState.SUCCESS)
    assert executor.get_results(timeout_s=0)[7] == (True, {"name": "slow", "state": "running"})


def sent_away(executor: JobExecutor) -> list[tuple[bool, str]]:
    return [(ok, str(result)) for ok, result in executor.get_results(timeout_s=0.2)]


def test_several_requests_under_one_name_are_answered_with_one_list(
    client: Client, executor: JobExecutor, worker: None
) -> None:
    executor.queue_job("both", client.pause.job("n1", "web1"), client.info.job("n1", "web1"))
    executor.queue_job("half", client.pause.job("n1", "web1"), client.stop.job("n1", "web1", job_id="second-half"))
    (both, half) = executor.get_results(DEADLINE_S)
    assert both[0] and [view["state"] for view in both[1]] == ["paused", "running"]
    assert half == (
        False,
        "partial failure: request 2 of 2, job second-half: NOT_RUNNING: web1 is not running",
    )


def test_a_job_added_twice_is_answered_twice(client: Client, executor: JobExecutor, worker: None) -> None:
    job = client.pause("n1", "web1")
    executor.add_job_id("once", job.id)
    executor.add_job_id("", job.id)
    assert executor.get_results(DEADLINE_S) == [(True, {"name": "web1", "state": "paused"})] * 2


def test_a_result_that_was_there_and_is_gone_is_called_archived(service: Service, executor: JobExecutor) -> None:
    node = Node(service.url)
    node.report("archived", 10)
    executor.add_job_id("web1", "archived")
    assert executor.get_results(timeout_s=0) == [(False, "still PROGRESS, goes on: hostler watch archived")]
    node.app.backend.forget("archived")
    ((ok, message),) = executor.get_results()
    assert not ok and message.startswith("archived, cannot check its result")
    node.succeed("archived", "it went on after all")
    assert executor.get_results() == [(True, "it went on after all")]


# W40 to W44


def test_w40_what_was_queued_is_sent_even_if_an_id_was_added_after_it(
    client: Client, executor: JobExecutor, worker: None
) -> None:
    executor.queue_job("queued", client.pause.job("n1", "queued"))
    executor.add_job_id("", client.info("n1", "added").id)
    executor.queue_job("last", client.pause.job("n1", "last"))
    results = executor.get_results(DEADLINE_S)
    assert [(ok, result["name"]) for ok, result in results] == [(True, "queued"), (True, "added"), (True, "last")]


def test_w40_what_is_queued_after_results_were_taken_is_sent_too(
    client: Client, executor: JobExecutor, worker: None
) -> None:
    executor.queue_job("first", client.pause.job("n1", "first"))
    assert len(executor.get_results(DEADLINE_S)) == 1
    executor.queue_job("second", client.pause.job("n1", "second"))
    assert [result["name"] for _, result in executor.get_results(DEADLINE_S)] == ["first", "second"]


@pytest.mark.parametrize("each", [False, True])
def test_w41_nothing_is_sent_twice(client: Client, service: Service, executor: JobExecutor, each: bool) -> None:
    ids = ["w41-a", "w41-b"]
    for job_id in ids:
        executor.queue_job(job_id, client.info.job("n2", "web1", job_id=job_id))
    assert executor.submit_pending(each) == [(True, job_id) for job_id in ids]
    assert executor.submit_pending(each) == []
    executor.get_results(timeout_s=0)
    executor.wait_or_show(False)
    assert queued(service, "n2") == ids
    service.client.delete("node.n2")


def test_w42_a_job_without_a_name_is_shown_by_its_id_alone(
    client: Client, service: Service, executor: JobExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    executor.queue_job("web1", client.info.job("n2", "web1", job_id="named"))
    executor.queue_job(None, client.info.job("n2", "web1", job_id="nameless"))
    executor.add_job_id("", "added")
    executor.add_job_id("web2", "no quota", status=False)
    executor.add_job_id("", "no luck", status=False)
    shown = executor.wait_or_show(False)
    assert shown == [(True, "named"), (True, "nameless"), (True, "added"), (False, "no quota"), (False, "no luck")]
    out, err = capsys.readouterr()
    assert out.splitlines() == ["named: web1", "nameless", "added"]
    assert err.splitlines() == ["Failure for web2: no quota", "Failure: no luck"]
    assert queued(service, "n2") == ["named", "nameless"]
    service.client.delete("node.n2")


def test_w43_the_ids_sent_before_a_failure_are_kept_and_the_rest_can_be_sent_later(own_service: Service) -> None:
    with LosingClient(own_service.url, own_service.kill) as client:
        executor = JobExecutor(client)
        ids = [f"w43-{number}" for number in range(5)]
        for job_id in ids:
            executor.queue_job(job_id, client.info.job("n1", "web1", job_id=job_id))
        with pytest.raises(ServiceUnreachable) as lost:
            executor.submit_pending(each=True)
        assert executor.jobs == [(job_id, job_id) for job_id in ids[:2]]
        (text,) = lost.value.__notes__
        assert "hostler watch w43-0" in text and "hostler watch w43-1" in text and "watch w43-2" not in text
        assert "not sent: 3; of the first, w43-2, it is not certain" in text
        own_service.start()
        assert executor.submit_pending(each=True) == [(True, job_id) for job_id in ids[2:]]
        assert queued(own_service, "n1") == ids
        for job_id in ids:
            Node(own_service.url).succeed(job_id, job_id)
        assert executor.get_results(DEADLINE_S) == [(True, job_id) for job_id in ids]


def test_w43_a_broker_lost_midway_is_told_for_each_job_and_the_others_are_waited_for(own_service: Service) -> None:
    with LosingClient(own_service.url, own_service.kill) as client:
        executor = JobExecutor(client)
        for number in range(5):
            executor.queue_job("", client.info.job("n1", "web1", job_id=f"lost-{number}"))
        outcomes = executor.submit_pending()
        own_service.start()
        assert [ok for ok, _ in outcomes] == [True, True, False, False, False]
        assert "does not answer" in outcomes[2][1] and "lost-2" in outcomes[2][1]
        assert all(message.startswith("not sent, because") for _, message in outcomes[3:])
        for number in range(2):
            Node(own_service.url).succeed(f"lost-{number}", number)
        assert executor.get_results(DEADLINE_S) == [(True, 0), (True, 1), *outcomes[2:]]
        assert queued(own_service, "n1") == ["lost-0", "lost-1"]


def test_w44_ten_thousand_jobs_are_awaited_over_one_connection_without_asking_for_each(own_service: Service) -> None:
    command = [sys.executable, "-c", textwrap.dedent(FINISHER), str(MANY)]
    environment = {"PATH": os.environ["PATH"], "URL": own_service.url}
    with (
        Client(own_service.url) as client,
        ThreadPoolExecutor(1) as pool,
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other,
    ):
        executor = JobExecutor(client)
        for number in range(MANY):
            executor.queue_job(f"web{number}", client.info.job("n5", "web1", job_id=f"many-{number}"))
        assert len(executor.submit_pending()) == MANY
        assert other.stdin and other.stdout and other.stdout.readline() == "ready\n"
        finished_first = calls(own_service, "publish")
        waiting = pool.submit(executor.get_results)
        until(lambda: [int(one["sub"]) for one in subscribers(own_service)] == [MANY - finished_first])
        other.stdin.write("go\n")
        other.stdin.close()
        most = 1
        while not waiting.done():
            most = max(most, len(subscribers(own_service)))
        results = waiting.result()
    assert most == 1
    assert [number for number, (ok, _) in enumerate(results) if not ok] == list(range(7, MANY, 1000))
    assert results[7] == (False, "INTERNAL: RuntimeError: number 7")
    assert all(result == {"number": number} for number, (ok, result) in enumerate(results) if ok)
    # Each job's result is read by the one who stores it (Celery does), and by nobody else one by one.
    assert calls(own_service, "get") == MANY
    assert calls(own_service, "mget") < MANY / 50
    assert not subscribers(own_service)


def test_w44_a_backend_in_sql_is_asked_for_many_jobs_at_once(service: Service, folder: Path) -> None:
    url = f"db+sqlite:///{folder / 'many.sqlite'}"
    node = celery.Celery("node", broker=service.url, backend=url, set_as_current=False)
    ids = [f"sql-{number}" for number in range(600)]
    node.backend.store_result("sql-slow", {"phase": "work", "percent": 10}, "PROGRESS")
    for job_id in ids:
        node.backend.store_result(job_id, job_id, "SUCCESS")
    with Client(service.url, url) as client:
        executor = JobExecutor(client)
        for job_id in [*ids, "sql-slow", "sql-unknown"]:
            executor.add_job_id("", job_id)
        selects: list[str] = []

        def count(*arguments: Any) -> None:
            selects.append(arguments[2])

        event.listen(Engine, "before_cursor_execute", count)
        try:
            results = executor.get_results(timeout_s=0)
        finally:
            event.remove(Engine, "before_cursor_execute", count)
        assert len([statement for statement in selects if "celery_taskmeta.task_id" in statement]) == 2
        assert results[:600] == [(True, job_id) for job_id in ids]
        assert results[600] == (False, "still PROGRESS, goes on: hostler watch sql-slow")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(executor.get_results)
            node.backend.store_result("sql-slow", "slow", "SUCCESS")
            node.backend.store_result("sql-unknown", "known", "SUCCESS")
            assert waiting.result(DEADLINE_S)[600:] == [(True, "slow"), (True, "known")]


# Losses


def test_a_result_whose_push_was_lost_with_the_connection_is_found_at_once(
    client: Client, service: Service, executor: JobExecutor
) -> None:
    executor.add_job_id("", "unheard")
    executor.add_job_id("", "heard")
    payload = json.dumps({"status": "SUCCESS", "result": "stored only", "task_id": "unheard"})
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(executor.get_results)
        until(lambda: len(service.subscribed()) == 2)
        with service.client.pipeline(transaction=True) as together:
            together.client_kill_filter(_type="pubsub")
            together.set("celery-task-meta-unheard", payload)
            together.execute()
        until(lambda: len(service.subscribed()) == 2)
        Node(service.url).succeed("heard", "pushed")
        # Well before the state is read again for want of news.
        assert waiting.result(20) == [(True, "stored only"), (True, "pushed")]


def test_a_backend_that_returns_soon_goes_unnoticed_by_a_batch(own_service: Service) -> None:
    with Client(own_service.url) as client, ThreadPoolExecutor(1) as pool:
        executor = JobExecutor(client)
        executor.add_job_id("", "over-a-restart")
        waiting = pool.submit(executor.get_results)
        until(lambda: bool(own_service.subscribed()))
        own_service.kill()
        own_service.start()
        until(lambda: bool(own_service.subscribed()))
        Node(own_service.url).succeed("over-a-restart", "done")
        assert waiting.result(DEADLINE_S) == [(True, "done")]


def answered(service: Service) -> int:
    """How often the results of several jobs were read."""
    asked: Any = service.client.info("commandstats")
    return int(asked.get("cmdstat_mget", {}).get("calls", 0))


def test_a_backend_that_stays_away_is_told_with_the_way_back(own_service: Service) -> None:
    with Client(own_service.url) as client, ThreadPoolExecutor(1) as pool:
        executor = JobExecutor(client)
        Node(own_service.url).succeed("ended", "well")
        executor.add_job_id("done", "ended")
        executor.add_job_id("web1", "on-its-way")
        before = answered(own_service)
        waiting = pool.submit(executor.get_results)
        until(lambda: len(own_service.subscribed()) == 2)
        until(lambda: answered(own_service) > before)  # what has ended is known then
        own_service.kill()
        with pytest.raises(ServiceUnreachable, match="result backend") as lost:
            waiting.result(DEADLINE_S)
        assert "hostler watch on-its-way    # web1" in lost.value.__notes__[0]
        assert "ended" not in lost.value.__notes__[0]
        own_service.start()
        Node(own_service.url).succeed("on-its-way", "at last")
        assert executor.get_results(DEADLINE_S) == [(True, "well"), (True, "at last")]


# People

BATCH = """
    import sys
    from hostler import Client, JobExecutor

    with Client() as client:
        executor = JobExecutor(client, verbose=None if sys.stderr.isatty() else True)
        executor.queue_job("quick", client.pause.job("n1", "quick"))
        for job_id in sys.argv[1:]:
            instance = {"name": "web1", "memory_mib": 64}
            executor.queue_job(f"web-{job_id}", client.start.job("n1", instance, job_id=job_id))
        print([ok for ok, _ in executor.get_results()])
"""


@pytest.fixture
def batch(service: Service, worker: None) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a program that waits for one quick job and for gated ones with the given ids."""
    started: list[subprocess.Popen[str]] = []

    def start(*ids: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
        inherited = {name: value for name, value in os.environ.items() if name not in known_names()}
        environment = inherited | {"HOSTLER_BROKER_URL": service.url, "TERM": "xterm", "COLUMNS": "100"}
        command = [sys.executable, "-c", textwrap.dedent(BATCH), *ids]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for_gates(service: Service, client: Client, *ids: str) -> None:
    until(lambda: {f"celery-task-meta-{job_id}".encode() for job_id in ids} <= set(service.subscribed()))
    until(lambda: all(client.job(job_id).state is JobState.PROGRESS for job_id in ids))


def test_ctrl_c_leaves_the_jobs_running_and_says_how_to_return_to_them(
    client: Client, service: Service, batch: Callable[..., subprocess.Popen[str]]
) -> None:
    ids = ("left-a", "left-b")
    process = batch(*ids)
    wait_for_gates(service, client, *ids)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == -signal.SIGINT, "KeyboardInterrupt went on up to the top"
    assert out == ""
    assert "go on: 2. Return to them:\n  hostler watch left-a    # web-left-a\n  hostler watch left-b" in err
    assert client.job("left-a").state is JobState.PROGRESS
    again = JobExecutor(client)
    for job_id in ids:
        again.add_job_id("", job_id)
        service.open_gate(job_id)
        service.open_gate(job_id)
    assert [ok for ok, _ in again.get_results(DEADLINE_S)] == [True, True]


def test_an_interruption_while_sending_says_what_was_sent_and_loses_nothing(own_service: Service) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with LosingClient(own_service.url, interrupt) as client:
        executor = JobExecutor(client, verbose=False)
        for number in range(4):
            executor.queue_job("", client.info.job("n1", "web1", job_id=f"cut-{number}"))
        with pytest.raises(KeyboardInterrupt) as interrupted:
            executor.get_results()
        (text,) = interrupted.value.__notes__
        assert "go on: 2" in text and "not sent: 2" in text
        executor.submit_pending()
        assert queued(own_service, "n1") == [f"cut-{number}" for number in range(4)]


def test_lines_without_a_terminal_and_nothing_of_it_on_standard_output(
    client: Client, service: Service, batch: Callable[..., subprocess.Popen[str]]
) -> None:
    process = batch("line-a")
    wait_for_gates(service, client, "line-a")
    for _ in range(2):
        service.open_gate("line-a")
    out, err = process.communicate(timeout=DEADLINE_S)
    assert out == "[True, True]\n"
    assert err.startswith("Submitted jobs ")
    assert "Waiting for job line-a for web-line-a ...\n" in err
    assert "   60 %  spawn: spawn it\n" in err
    assert err.endswith("2 of 2 jobs succeeded\n")


def test_a_terminal_shows_counts_and_messages_live(
    client: Client, service: Service, batch: Callable[..., subprocess.Popen[str]]
) -> None:
    terminal, end = pty.openpty()
    process = batch("live-a", "live-b", stderr=end)
    os.close(end)
    seen = bytearray()

    def read() -> None:
        try:
            while chunk := os.read(terminal, 4096):
                seen.extend(chunk)
        except OSError:  # the other end was closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        until(lambda: b"1 of 3 ended, 0 failed, 2 running" in seen and b"validate: validate it" in seen)
        for job_id in ("live-a", "live-b"):
            service.open_gate(job_id)
        until(lambda: b"job live-b for web-live-b:  60 %  spawn: spawn it" in seen)
        for job_id in ("live-a", "live-b"):
            service.open_gate(job_id)
        out, _ = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
        reader.join(DEADLINE_S)
        os.close(terminal)
    assert out == "[True, True, True]\n"
    assert b"3 of 3 jobs succeeded" in seen
