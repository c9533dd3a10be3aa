"""The worker as a process: one per node, by either command, with settings that are checked."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from hostler import embedded
from tests.nodes import CELERY_WORKER, WORKER, TestNode, node, tiny_instance, until
from tests.services import mariadb_database, missing, postgresql_database

pytestmark = pytest.mark.node


@contextmanager
def celery_app(n1: TestNode) -> Iterator[Celery]:
    app = Celery(set_as_current=False, broker=n1.settings.effective_broker_url)
    try:
        yield app
    finally:
        app.close()


def queues(app: Celery) -> dict[str, list[str]]:
    answered: dict[str, list[dict[str, Any]]] = app.control.inspect(timeout=5, limit=1).active_queues() or {}
    return {worker: [queue["name"] for queue in found] for worker, found in answered.items()}


@pytest.mark.parametrize("command", [WORKER, CELERY_WORKER], ids=["hostler worker", "celery -A worker worker"])
def test_either_command_is_the_same_worker(new_node: TestNode, command: tuple[str, ...]) -> None:
    new_node.start_worker(*command)
    with celery_app(new_node) as app:
        assert queues(app) == {"hostler@n1": ["node.n1"]}
        inspect = app.control.inspect(timeout=5, limit=1)
        registered = next(iter(inspect.registered().values()))
        assert {"instance.start", "instance.stop", "job.info"} <= {name.split(" ")[0] for name in registered}
        assert inspect.stats()["hostler@n1"]["pool"]["implementation"].endswith("concurrency.thread:TaskPool")
    assert new_node.client().ping("n1")
    assert new_node.start(tiny_instance(new_node.root))["state"] == "running"


@pytest.mark.parametrize("command", [WORKER, CELERY_WORKER], ids=["hostler worker", "celery -A worker worker"])
def test_a_second_worker_of_the_same_node_is_refused(n1: TestNode, command: tuple[str, ...]) -> None:
    view = n1.start(tiny_instance(n1.root))
    assert n1.worker
    refused = n1.refused_worker(*command)
    assert refused.returncode != 0
    assert f"node n1 has a live worker already (pid {n1.worker.pid})" in refused.stderr
    assert "HOSTLER_NODE" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert n1.info("web1") == view  # the first one works on


@pytest.fixture(scope="module")
def shared_database(qemu: None) -> Iterator[str]:
    """The URL of a database that several nodes of this module's tests use."""
    with postgresql_database() as url, node(HOSTLER_DATABASE_URL=url) as made:
        assert made.cli("db", "upgrade").returncode == 0
        yield url


@pytest.mark.postgresql
def test_a_second_worker_with_another_state_folder_is_refused_by_the_shared_database(shared_database: str) -> None:
    url = shared_database
    with node(HOSTLER_DATABASE_URL=url) as first:
        first.start_worker()
        assert first.worker
        with node(HOSTLER_DATABASE_URL=url) as second:
            refused = second.refused_worker()
            assert refused.returncode != 0
            assert f"node n1 has a live worker already (pid {first.worker.pid})" in refused.stderr
            assert "Traceback" not in refused.stderr
            first.kill_worker()
            second.start_worker()


@pytest.mark.postgresql
def test_two_nodes_that_share_a_database_know_their_own_instances_and_refuse_the_other_s(
    shared_database: str,
) -> None:
    with (
        node("n1", HOSTLER_DATABASE_URL=shared_database) as one,
        node("n2", HOSTLER_DATABASE_URL=shared_database) as two,
    ):
        one.start_worker()
        two.start_worker()
        one.start(tiny_instance(one.root))
        failed = two.failure("instance.start", instance=tiny_instance(two.root))
        assert failed.code == "ALREADY_RUNNING"
        assert "n1" in failed.message
        assert two.failure("instance.stop", name="web1").code == "UNKNOWN_INSTANCE"
        assert two.do("instance.list") == []
        assert two.qemu_pids() == []


def test_two_nodes_can_share_a_state_folder(n1: TestNode) -> None:
    other = TestNode("n2", n1.root)
    try:
        other.start_worker()
        assert other.start(tiny_instance(n1.root, "web2"))["node"] == "n2"
        assert n1.start(tiny_instance(n1.root))["node"] == "n1"
        with celery_app(n1) as app:
            assert app.control.inspect(timeout=1).ping().keys() == {"hostler@n1", "hostler@n2"}
        assert other.do("instance.stop", name="web2", force=True)["how"] == "killed"
    finally:
        other.kill_worker()
        other.client().close()


def test_a_stale_lock_is_no_obstacle(n1: TestNode) -> None:
    lock = n1.root / "state" / "node.n1.lock"
    assert n1.worker
    dead = n1.worker.pid
    n1.kill_worker(signal.SIGKILL)
    assert lock.read_text() == str(dead)
    n1.start_worker()
    assert lock.read_text() == str(n1.worker.pid)


@pytest.mark.parametrize(
    ("command", "name", "value", "said"),
    [
        (WORKER, "HOSTLER_NOODLE", "n1", "unknown setting HOSTLER_NOODLE"),
        (CELERY_WORKER, "HOSTLER_NOODLE", "n1", "unknown setting HOSTLER_NOODLE"),
        (WORKER, "HOSTLER_NODE", "a/b", "HOSTLER_NODE: 'a/b' is not a node name"),
        (WORKER, "HOSTLER_MIGRATION_PORTS", "9-1", "HOSTLER_MIGRATION_PORTS: '9-1' is not a port range"),
        (CELERY_WORKER, "HOSTLER_RUN_DIR", "run", "HOSTLER_RUN_DIR: 'run' is not an absolute path"),
    ],
    ids=lambda value: value[2] if isinstance(value, tuple) else None,
)
def test_a_wrong_setting_is_refused_at_start(
    new_node: TestNode, command: tuple[str, ...], name: str, value: str, said: str
) -> None:
    refused = new_node.refused_worker(*command, **{name: value})
    assert refused.returncode != 0
    assert said in refused.stderr
    assert "Traceback" not in refused.stderr
    assert [path.name for path in new_node.root.iterdir()] == []


def test_a_database_that_was_not_upgraded_is_refused_with_the_command_that_does_it(new_node: TestNode) -> None:
    new_node.environment["HOSTLER_DATABASE_URL"] = f"sqlite+pysqlite:///{new_node.root}/own.sqlite"
    refused = new_node.refused_worker()
    assert refused.returncode != 0
    assert "hostler db upgrade" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert new_node.cli("db", "upgrade").returncode == 0
    new_node.start_worker()


def test_the_worker_starts_the_embedded_broker_that_client_and_next_worker_use_again(new_node: TestNode) -> None:
    new_node.start_worker()
    began = embedded.status(new_node.settings)
    assert began.running
    new_node.restart_worker()
    assert new_node.cli("list", "-n", "n1").returncode == 0
    assert embedded.status(new_node.settings).pid == began.pid


def test_a_broker_that_was_killed_comes_back_and_the_worker_goes_on(new_node: TestNode) -> None:
    new_node.start_worker()
    view = new_node.start(tiny_instance(new_node.root))
    pid = embedded.status(new_node.settings).pid
    assert pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}").exists() or embedded.status(new_node.settings).pid != pid)
    assert new_node.info("web1") == view
    assert new_node.do("instance.stop", name="web1", force=True)["how"] == "killed"


def test_ending_the_worker_waits_for_the_job_at_work(n1: TestNode) -> None:
    from tests.node.test_adoption import ignoring

    ignoring(n1)
    job = n1.send("instance.stop", name="web1", timeout_s=1)
    n1.until_state("web1", "stopping")
    assert n1.kill_worker(signal.SIGTERM) == 0
    assert job.result["how"] == "killed"
    assert not n1.leftovers()


@pytest.mark.mariadb
def test_a_node_works_on_mariadb(qemu: None) -> None:
    with mariadb_database() as url, node(HOSTLER_DATABASE_URL=url) as made:
        assert made.cli("db", "upgrade").returncode == 0
        whole_life(made)


def test_a_node_works_on_a_redis_server_over_tcp(qemu: None, tmp_path: Path) -> None:
    with redis_server(tmp_path) as url, node(HOSTLER_BROKER_URL=url) as made:
        whole_life(made)
        assert not embedded.status(made.settings).running


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    if not shutil.which("redis-server"):
        missing("Redis", "no redis-server on PATH")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    argv = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(folder)]
    server = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    try:
        until(lambda: answers(port), what="redis-server answers")
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.terminate()
        server.wait()


def answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def whole_life(made: TestNode) -> None:
    made.start_worker()
    instance = tiny_instance(made.root)
    view = made.start(instance)
    assert made.failure("instance.start", instance=instance).code == "ALREADY_RUNNING"
    made.restart_worker()
    assert made.info("web1") == view
    assert made.do("instance.pause", name="web1")["state"] == "paused"
    assert made.do("instance.reboot", name="web1", mode="hard")["state"] == "running"
    os.kill(made.pid("web1"), signal.SIGKILL)
    made.until_state("web1", "crashed")
    assert made.do("instance.cleanup", name="web1")["name"] == "web1"
    made.nothing_is_left()
