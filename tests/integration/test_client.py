"""The client against the contract alone: a real Redis, and a real worker that has none of hostler's code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import celery
import pytest
import redis

from hostler import Client, ErrorCode, InvalidArgument, JobState, OperationFailed, ServiceUnreachable, embedded
from hostler.settings import Settings, SettingsError, known_names

DEADLINE_S = 30.0

STUB = """
    # A node as the contract describes it, written with Celery alone.
    import os, sys
    from celery import Celery

    class OperationFailed(Exception):
        pass

    app = Celery("stub", broker=os.environ["URL"], backend=os.environ["URL"])
    app.conf.update(result_extended=True, task_track_started=True, worker_hijack_root_logger=False)

    def report(task, percent, phase):
        meta = {"phase": phase, "percent": percent, "message": f"{phase} it", "instance": "web1", "node": "n1"}
        task.update_state(state="PROGRESS", meta={**meta, "updated_at": f"2030-01-01T00:00:{percent:02}+00:00"})

    def gate(task):
        # Held until the test opens it: the test decides the order of things, not the clock.
        app.backend.client.blpop(f"gate:{task.request.id}", timeout=60)

    @app.task(name="instance.start", bind=True)
    def start(self, **arguments):
        report(self, 10, "validate")
        gate(self)
        report(self, 60, "spawn")
        gate(self)
        return {"name": arguments["instance"]["name"], "state": "running", "node": "n1", "arguments": arguments}

    @app.task(name="instance.stop", bind=True)
    def stop(self, name, **arguments):
        raise OperationFailed("NOT_RUNNING", f"{name} is not running", {"retryable": False, "state": "stopped"})

    @app.task(name="instance.reboot", bind=True)
    def reboot(self, name, **arguments):
        gate(self)
        return {"name": name, "state": "running"}

    @app.task(name="instance.cleanup", bind=True)
    def cleanup(self, name):
        raise ZeroDivisionError("division by zero")

    @app.task(name="instance.pause", bind=True)
    def pause(self, name):
        return {"name": name, "state": "paused"}

    @app.task(name="instance.info", bind=True)
    def info(self, name):
        return {"name": name, "state": "running", "node": "n1", "hostler": "hostler" in sys.modules}

    @app.task(name="instance.list", bind=True)
    def list_all(self):
        return [{"name": "web1", "state": "running", "node": "n1", "memory_mib": 512, "vcpus": 2, "pid": 4711}]

    @app.task(name="instance.console", bind=True)
    def console(self, name):
        path = os.environ["CONSOLE"]
        return {"kind": "serial", "host": "n1", "command": ["socat", "-", f"UNIX-CONNECT:{path}"], "path": path}
"""
WEB1 = {"name": "web1", "memory_mib": 64}


class Service:
    """A Redis of our own, on a socket in a short folder; it keeps its data over a restart."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "redis.sock"
        self.url = f"redis+socket://{self.socket}?virtual_host=0"
        self.start()

    def start(self) -> None:
        options = {"port": "0", "unixsocket": str(self.socket), "dir": str(self.folder)}
        options |= {"appendonly": "yes", "appendfsync": "always"}  # a kill loses nothing that was answered
        arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
        self.process = subprocess.Popen(["redis-server", *arguments], stdout=subprocess.DEVNULL)
        self.client = redis.Redis(unix_socket_path=str(self.socket))
        until(self._answers)

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.ConnectionError:
            return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.client.close()

    def open_gate(self, job_id: str) -> None:
        self.client.rpush(f"gate:{job_id}", "open")

    def subscribed(self) -> list[Any]:
        channels: Any = self.client.pubsub_channels("celery-task-meta-*")
        return list(channels)


def until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not met():
        assert time.monotonic() < deadline, "the awaited event did not happen"
        time.sleep(0.01)


@pytest.fixture(autouse=True, scope="module")
def _needs_redis() -> None:
    if shutil.which("redis-server"):
        return
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("redis-server is not installed")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="hst-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    running = Service(folder)
    yield running
    running.kill()


@pytest.fixture(scope="module")
def worker(service: Service) -> Iterator[None]:
    """A worker of node n1 that knows the contract and not hostler."""
    (service.folder / "stub.py").write_text(textwrap.dedent(STUB))
    flags = ["--pool=threads", "--concurrency=16", "--without-gossip", "--without-mingle"]
    command = [
        sys.executable,
        "-m",
        "celery",
        "--quiet",
        "-A",
        "stub",
        "worker",
        "-Q",
        "node.n1",
        "-n",
        "hostler@n1",
        *flags,
    ]
    environment = {"PATH": os.environ["PATH"], "URL": service.url, "CONSOLE": str(service.folder / "serial.sock")}
    environment["C_FORCE_ROOT"] = "1"
    with (service.folder / "worker.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=service.folder, env=environment, stdout=log, stderr=log)
    try:
        with Client(service.url) as client:
            until(lambda: client.ping("n1") or process.poll() is not None)
        assert process.poll() is None, (service.folder / "worker.log").read_text()
        yield
    finally:
        process.send_signal(signal.SIGQUIT)
        process.wait()


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with Client(service.url) as made:
        yield made


class Node:
    """Reports about a job as a node does, from the test itself: for what a real worker would do by chance only."""

    def __init__(self, url: str) -> None:
        self.app = celery.Celery("node", broker=url, backend=url, set_as_current=False)

    def report(self, job_id: str, percent: int) -> None:
        self.app.backend.store_result(job_id, {"phase": "work", "percent": percent}, "PROGRESS")

    def succeed(self, job_id: str, result: Any) -> None:
        self.app.backend.store_result(job_id, result, "SUCCESS")


# Jobs


def test_progress_is_pushed_step_by_step_and_the_result_returned(
    client: Client, service: Service, worker: None
) -> None:
    job = client.start("n1", WEB1)
    seen: list[tuple[str, int]] = []

    def opening(meta: dict[str, Any]) -> None:
        seen.append((meta["phase"], meta["percent"]))
        service.open_gate(job.id)

    result = job.wait(DEADLINE_S, opening)
    assert seen == [("validate", 10), ("spawn", 60)]
    assert result["state"] == "running"
    assert result["arguments"] == {"instance": WEB1}, "what is left at its default is not sent"
    assert job.state is JobState.SUCCESS
    assert job.result == result and job.error is None and job.progress is None


def test_progress_that_was_there_before_the_wait_is_reported_too(
    client: Client, service: Service, worker: None
) -> None:
    job = client.start("n1", WEB1)
    until(lambda: job.progress is not None)
    seen: list[int] = []

    def opening(meta: dict[str, Any]) -> None:
        seen.append(meta["percent"])
        service.open_gate(job.id)

    job.wait(DEADLINE_S, opening)
    assert seen == [10, 60]


def test_the_snapshot_of_a_job_tells_task_arguments_and_worker(client: Client, worker: None) -> None:
    job = client.info("n1", "web1")
    job.wait(DEADLINE_S)
    snapshot = client.job(job.id).snapshot()
    assert (snapshot.task, snapshot.arguments, snapshot.worker) == ("instance.info", {"name": "web1"}, "hostler@n1")
    assert snapshot.finished and snapshot.known and snapshot.finished_at


def test_the_worker_of_these_tests_has_none_of_hostlers_code(client: Client, worker: None) -> None:
    assert client.info("n1", "web1").wait(DEADLINE_S)["hostler"] is False


def test_a_failed_job_raises_with_code_message_and_details(client: Client, worker: None) -> None:
    job = client.stop("n1", "web1")
    with pytest.raises(OperationFailed) as failed:
        job.wait(DEADLINE_S)
    assert failed.value.code == ErrorCode.NOT_RUNNING
    assert failed.value.message == "web1 is not running"
    assert failed.value.details == {"retryable": False, "state": "stopped"}
    assert job.state is JobState.FAILURE
    assert job.error is not None and job.error.code == "NOT_RUNNING" and job.result is None


def test_any_other_exception_of_a_node_becomes_internal(client: Client, worker: None) -> None:
    with pytest.raises(OperationFailed, match="INTERNAL: ZeroDivisionError: division by zero"):
        client.cleanup("n1", "web1").wait(DEADLINE_S)


def test_a_task_the_node_does_not_know_is_unsupported(client: Client, worker: None) -> None:
    with pytest.raises(OperationFailed, match=r"UNSUPPORTED: .*node\.info"):
        client.node_info("n1").wait(DEADLINE_S)


def test_a_revoked_job_raises_cancelled(client: Client, service: Service, worker: None) -> None:
    control = Node(service.url).app.control
    job_id = str(uuid.uuid4())
    control.broadcast("revoke", arguments={"task_id": job_id}, destination=["hostler@n1"], reply=True)
    job = client.pause("n1", "web1", job_id=job_id)
    with pytest.raises(OperationFailed, match="CANCELLED"):
        job.wait(DEADLINE_S)
    assert job.state is JobState.REVOKED


def test_time_runs_out_for_the_waiting_and_not_for_the_job(client: Client, service: Service, worker: None) -> None:
    job = client.reboot("n1", "web1")
    for timeout_s in (0, 0.05):
        with pytest.raises(TimeoutError, match="goes on"):
            job.wait(timeout_s)
    service.open_gate(job.id)
    assert job.wait(DEADLINE_S) == {"name": "web1", "state": "running"}


def test_many_threads_wait_for_many_jobs_and_leave_nothing_subscribed(
    client: Client, service: Service, worker: None
) -> None:
    jobs = [client.reboot("n1", f"web{number}") for number in range(8)]
    with ThreadPoolExecutor(16) as pool:
        waits = [pool.submit(job.wait, DEADLINE_S) for job in jobs for _ in range(2)]
        until(lambda: len(service.subscribed()) == len(jobs))
        for job in jobs:
            service.open_gate(job.id)
        names = [wait.result(DEADLINE_S)["name"] for wait in waits]
    assert names == [f"web{number}" for number in range(8) for _ in range(2)]
    until(lambda: not service.subscribed())


def test_sending_without_waiting_subscribes_to_nothing(client: Client, service: Service, worker: None) -> None:
    for _ in range(5):
        client.info("n1", "web1")
    assert not service.subscribed()


def test_a_chosen_job_id_is_the_jobs_id(client: Client, worker: None) -> None:
    job_id = f"mine-{uuid.uuid4()}"
    assert client.info("n1", "web1", job_id=job_id).id == job_id
    assert client.job(job_id).wait(DEADLINE_S)["name"] == "web1"


def test_a_forgotten_job_is_unknown_to_the_backend(client: Client, worker: None) -> None:
    job = client.info("n1", "web1")
    job.wait(DEADLINE_S)
    job.forget()
    assert job.state is JobState.PENDING and not job.snapshot().known


def test_the_message_is_the_one_a_bare_send_task_would_send(client: Client, service: Service) -> None:
    client.stop("n3", "web1", force=True)
    Node(service.url).app.send_task("instance.stop", kwargs={"name": "web1", "force": True}, queue="node.n3")
    bare, ours = (json.loads(raw) for raw in service.client.lrange("node.n3", 0, -1))
    assert ours["body"] == bare["body"]
    assert ours["headers"].keys() == bare["headers"].keys()
    service.client.delete("node.n3")


# Losses


def test_a_backend_that_returns_soon_goes_unnoticed_by_the_one_who_waits(folder: Path) -> None:
    home = folder / "restarted"
    home.mkdir()
    service = Service(home)
    try:
        node, job_id = Node(service.url), "over-a-restart"
        node.report(job_id, 10)
        seen: list[int] = []
        with Client(service.url) as client, ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(client.job(job_id).wait, DEADLINE_S, lambda meta: seen.append(meta["percent"]))
            until(lambda: bool(service.subscribed()) and seen == [10])
            service.kill()
            service.start()
            until(lambda: bool(service.subscribed()))
            Node(service.url).succeed(job_id, "done")
            assert waiting.result(DEADLINE_S) == "done"
        assert seen == [10]
    finally:
        service.kill()


def test_a_job_is_cancelled_at_once_after_the_broker_was_restarted(folder: Path) -> None:
    home = folder / "cancelled"
    home.mkdir()
    service = Service(home)
    try:
        with Client(service.url) as client:
            job = client.pause("n1", "web1")
            for restarts in range(2):
                if restarts:  # the client's pool has connections of before
                    service.kill()
                    service.start()
                with pytest.raises(ServiceUnreachable, match="no worker answered"):  # the broker did
                    job.cancel("n1")
            service.kill()
            with pytest.raises(ServiceUnreachable, match="the broker does not answer"):
                job.cancel("n1")
    finally:
        service.kill()


def test_a_backend_that_stays_away_is_told_to_the_one_who_waits(folder: Path) -> None:
    home = folder / "gone"
    home.mkdir()
    service = Service(home)
    with Client(service.url) as client, ThreadPoolExecutor(1) as pool:
        try:
            waiting = pool.submit(client.job("some-job").wait, 60)
            until(lambda: bool(service.subscribed()))
        finally:
            service.kill()
        with pytest.raises(ServiceUnreachable, match="result backend"):
            waiting.result(DEADLINE_S)


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as server:
        yield server.getsockname()[1]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["closed port", "missing socket", "silent server", "closed amqp port"])
def test_an_unreachable_broker_is_said_soon_and_without_its_password(
    kind: str, silent_port: int, service: Service
) -> None:
    url = {
        "closed port": "redis://user:geheim@127.0.0.1:1/0",
        "missing socket": "redis+socket:///tmp/hst-nowhere.sock?virtual_host=0&password=geheim",
        "silent server": f"redis://user:geheim@127.0.0.1:{silent_port}/0",
        "closed amqp port": "amqp://user:geheim@127.0.0.1:1//",
    }[kind]
    with Client(url, service.url if "amqp" in kind else None) as client:
        with pytest.raises(ServiceUnreachable, match="the broker") as lost:
            client.info("n1", "web1")
        assert "geheim" not in str(lost.value)
        assert "127.0.0.1" in str(lost.value) or "nowhere" in str(lost.value)
        with pytest.raises(ServiceUnreachable):
            client.ping("n1")


@pytest.mark.timeout(30)
def test_an_unreachable_result_backend_is_said_soon_and_without_its_password(service: Service) -> None:
    with Client(service.url, "redis://:geheim@127.0.0.1:1/0") as client:
        job = client.info("n9", "web1")
        for look in (job.snapshot, job.wait, job.forget):
            with pytest.raises(ServiceUnreachable, match=r"result backend redis://127\.0\.0\.1:1") as lost:
                look()
            assert "geheim" not in str(lost.value)
    service.client.delete("node.n9")


@pytest.mark.parametrize("urls", [("nonsense://x", None), (None, "nonsense://x"), ("", "redis://[::1")])
def test_a_url_that_nothing_understands_is_refused_at_once(
    urls: tuple[str | None, str | None], service: Service
) -> None:
    with pytest.raises(SettingsError):
        Client(urls[0] or service.url, urls[1])


def test_nothing_is_sent_when_an_argument_is_wrong(client: Client, service: Service) -> None:
    with pytest.raises(InvalidArgument, match=r"instance\.memory_mib"):
        client.start("n4", {"name": "web1", "memory_mib": 0})
    assert not service.client.exists("node.n4")


def test_a_node_without_a_worker_does_not_answer_a_ping(client: Client, worker: None) -> None:
    assert client.ping("n1")
    assert not client.ping("n2")


# Beside other applications


def test_a_backend_in_sql_is_polled(service: Service, folder: Path) -> None:
    url = f"db+sqlite:///{folder / 'results.sqlite'}"
    node = celery.Celery("node", broker=service.url, backend=url, set_as_current=False)
    node.backend.store_result("polled", {"phase": "work", "percent": 10}, "PROGRESS")

    def finish(meta: dict[str, Any]) -> None:
        assert meta["percent"] == 10
        node.backend.store_result("polled", [1, 2], "SUCCESS")

    with Client(service.url, url) as client:
        assert client.job("polled").wait(DEADLINE_S, finish) == [1, 2]


def test_the_applications_own_celery_and_its_variables_are_left_alone(
    service: Service, worker: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "no.such.settings")
    before = celery.current_app._get_current_object()
    with Client(service.url) as client:
        assert client.info("n1", "web1").wait(DEADLINE_S)["name"] == "web1"
    assert celery.current_app._get_current_object() is before


def test_the_urls_come_from_the_settings_where_none_are_given(service: Service, worker: None) -> None:
    with Client(settings=Settings(broker_url=service.url)) as client:
        assert client.info("n1", "web1").wait(DEADLINE_S)["name"] == "web1"


def test_the_embedded_broker_is_started_when_it_is_first_needed() -> None:
    state = Path(tempfile.mkdtemp(prefix="hst-", dir="/tmp"))
    settings = Settings(state_dir=state)
    try:
        with Client(settings=settings) as client:
            assert not embedded.status(settings).running
            assert client.info("n1", "web1").state is JobState.PENDING
            assert embedded.status(settings).running
    finally:
        embedded.stop(settings)
        shutil.rmtree(state)


# The command line


@pytest.fixture
def hostler(service: Service) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command as a program of its own."""

    def run(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if name not in known_names()}
        settings = {"HOSTLER_BROKER_URL": service.url, "HOSTLER_NODE": "n1", **environment}
        command = [sys.executable, "-m", "hostler", *arguments]
        return subprocess.run(
            command, env=inherited | settings, input=stdin, capture_output=True, text=True, timeout=DEADLINE_S
        )

    return run


Hostler = Callable[..., subprocess.CompletedProcess[str]]


def test_the_command_prints_a_table_for_people(hostler: Hostler, worker: None) -> None:
    done = hostler("list")
    assert done.returncode == 0
    header, row = done.stdout.splitlines()
    assert header.split()[:2] == ["NAME", "STATE"]
    assert row.split() == ["web1", "running", "512", "2", "4711", "n1"]


def test_the_command_prints_one_json_document_for_programs(hostler: Hostler, worker: None) -> None:
    done = hostler("info", "web1", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["name"] == "web1"


def test_progress_goes_to_standard_error_only(hostler: Hostler, service: Service, worker: None) -> None:
    def open_when_watched() -> None:
        until(lambda: b"celery-task-meta-gated-start" in service.subscribed())
        service.open_gate("gated-start")
        service.open_gate("gated-start")

    opener = threading.Thread(target=open_when_watched)
    opener.start()
    done = hostler("start", "n1", "-", "--job-id", "gated-start", "--json", stdin=json.dumps(WEB1))
    opener.join()
    assert json.loads(done.stdout)["state"] == "running"
    assert done.returncode == 0
    assert "60 %  spawn: spawn it" in done.stderr


def test_a_failed_job_exits_with_1_code_message_and_a_next_step(hostler: Hostler, worker: None) -> None:
    done = hostler("stop", "web1")
    assert (done.returncode, done.stdout) == (1, "")
    assert "NOT_RUNNING: web1 is not running" in done.stderr
    assert "hostler start n1 FILE" in done.stderr
    assert "--history -n n1" in done.stderr


def test_a_failed_job_is_a_json_document_too(hostler: Hostler, worker: None) -> None:
    done = hostler("stop", "web1", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"] == {
        "code": "NOT_RUNNING",
        "message": "web1 is not running",
        "details": {"retryable": False, "state": "stopped"},
    }


def test_no_wait_prints_the_id_that_watch_and_job_take(hostler: Hostler, service: Service, worker: None) -> None:
    job_id = hostler("reboot", "web1", "--no-wait").stdout.strip()
    assert json.loads(hostler("job", job_id, "--json").stdout)["state"] in {"PENDING", "STARTED"}
    assert hostler("watch", job_id, "--timeout", "0.1").returncode == 124
    service.open_gate(job_id)
    watched = hostler("watch", job_id, "--json")
    assert json.loads(watched.stdout) == {"name": "web1", "state": "running"}
    shown = json.loads(hostler("job", job_id, "--json").stdout)
    assert (shown["task"], shown["state"], shown["worker"]) == ("instance.reboot", "SUCCESS", "hostler@n1")
    assert "instance.reboot" in hostler("job", job_id).stdout


def test_a_node_without_a_worker_is_named_and_the_timeout_has_its_own_status(
    hostler: Hostler, service: Service
) -> None:
    done = hostler("list", "-n", "n2", "--timeout", "3.5")
    assert done.returncode == 124
    assert "node n2 has no live worker (or it is busy); the job waits in queue node.n2" in done.stderr
    assert "hostler watch" in done.stderr
    service.client.delete("node.n2")


def test_an_unknown_job_is_said_to_be_unknown(hostler: Hostler) -> None:
    done = hostler("job", "no-such-job")
    assert done.returncode == 0
    assert "there is no such job, or no worker has received it yet, or its result has expired" in done.stderr


def test_an_unreachable_service_exits_with_3(hostler: Hostler) -> None:
    broken = {"HOSTLER_BROKER_URL": "redis://:geheim@127.0.0.1:1/0"}
    done = hostler("list", **broken)
    assert (done.returncode, done.stdout) == (3, "")
    assert "the broker redis://127.0.0.1:1/0" in done.stderr and "geheim" not in done.stderr
    document = json.loads(hostler("list", "--json", **broken).stdout)
    assert document["error"]["code"] == "NODE_UNAVAILABLE"


def test_ctrl_c_leaves_the_job_and_tells_how_to_return(service: Service, worker: None) -> None:
    environment = os.environ | {"HOSTLER_BROKER_URL": service.url, "HOSTLER_NODE": "n1"}
    command = [sys.executable, "-m", "hostler", "reboot", "web1", "--job-id", "left-alone"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: b"celery-task-meta-left-alone" in service.subscribed())
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, out) == (130, "")
    assert "hostler watch left-alone" in err
    service.open_gate("left-alone")
    with Client(service.url) as client:
        assert client.job("left-alone").wait(DEADLINE_S)["state"] == "running"


def test_the_console_command_connects_pipes_to_the_guest(hostler: Hostler, service: Service, worker: None) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(service.folder / "serial.sock"))
        server.listen()
        heard: list[bytes] = []

        def guest() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"login: ")
                heard.append(connection.recv(100))
                connection.sendall(b"hello " + heard[0])

        thread = threading.Thread(target=guest)
        thread.start()
        done = hostler("console", "web1", stdin="root\n")
        thread.join(DEADLINE_S)
    (service.folder / "serial.sock").unlink()
    assert heard == [b"root\n"]
    assert done.stdout == "login: hello root\n"
    assert done.stderr.startswith("Connected to web1. Escape key is ^]\n")
    assert done.returncode == 0


def test_the_console_command_prints_the_way_where_there_is_no_socket(hostler: Hostler, worker: None) -> None:
    for arguments in (("console", "web1"), ("console", "web1", "--print")):
        assert hostler(*arguments).stdout.startswith("ssh -t n1 'socat - UNIX-CONNECT:")
    assert json.loads(hostler("console", "web1", "--json").stdout)["kind"] == "serial"
