"""Live migration as a master and a person see it: a real Redis, and a worker that has none of hostler's code."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostler import Client, OperationFailed
from hostler.settings import known_names
from tests.integration.test_client import DEADLINE_S, Service, until

STUB = """
    # A node as the contract describes it, written with Celery alone.
    import os
    from celery import Celery

    class OperationFailed(Exception):
        pass

    app = Celery("stub", broker=os.environ["URL"], backend=os.environ["URL"])
    app.conf.update(result_extended=True, task_track_started=True, worker_hijack_root_logger=False)
    GIB = 2**30
    REPORT = {"source": "n1", "kind": "live", "state": "running", "node": "n2", "decisions": [],
              "qemu_total_ms": 900, "total_ms": 1000, "transferred_bytes": 2 * GIB, "total_bytes": 2 * GIB}

    def look(second):
        left = (4 - second) * GIB // 2
        return {"status": "active", "total_bytes": 2 * GIB, "transferred_bytes": 2 * GIB - left,
                "remaining_bytes": left, "throughput_bytes_s": GIB // 2, "dirty_rate_bytes_s": second * GIB // 100,
                "pass": second + 1, "expected_downtime_ms": 120, "eta_s": 4.0 - second, "eta_confidence": 0.5,
                "percent": 25.0 * second, "verdict": None, "storage": None}

    @app.task(name="instance.migrate", bind=True)
    def migrate(self, name, target, **options):
        for second in range(4):
            meta = {"phase": "transfer", "percent": 20 + 15 * second, "message": "on its way", "instance": name,
                    "node": "n1", "updated_at": f"2030-01-01T00:00:0{second}+00:00", "live_migration": look(second)}
            self.update_state(state="PROGRESS", meta=meta)
            # Held until the test opens it: the test decides the order of things, not the clock.
            app.backend.client.blpop(f"gate:{self.request.id}", timeout=60)
        if options.get("on_deadline") == "abort":
            details = {"retryable": True, "node": "n1", "migration_id": self.request.id}
            raise OperationFailed("MIGRATION_FAILED", "too late", details)
        return {"name": name, "target": target, **REPORT, "options": options}

    @app.task(name="instance.migrate_cancel")
    def cancel(name):
        return {"id": "j1", "outcome": "too_late", "message": "it is being switched over"}

    @app.task(name="instance.migrate_tune")
    def tune(name, **changes):
        return {"job": "j1", "name": name, "changed": changes}

    @app.task(name="migration.report")
    def report(id):
        samples = [{"at": f"2030-01-01T00:00:0{second}+00:00", **look(second)} for second in range(4)]
        found = {"job": id, "name": "web1", "source": "n1", "target": "n2", "stage": "done"}
        return found | {"report": {"name": "web1", "target": "n2", **REPORT}, "samples": samples}
"""


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    if not shutil.which("redis-server"):
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("redis-server is not installed")
    folder = Path(tempfile.mkdtemp(prefix="hst-", dir="/tmp"))
    running = Service(folder)
    yield running
    running.kill()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[Client]:
    """A client of node n1, whose worker knows the contract and not hostler."""
    (service.folder / "stub.py").write_text(textwrap.dedent(STUB))
    flags = ("--pool=threads", "--concurrency=8", "--without-gossip", "--without-mingle", "-Q", "node.n1")
    command = [sys.executable, "-m", "celery", "--quiet", "-A", "stub", "worker", "-n", "hostler@n1", *flags]
    environment = {"PATH": os.environ["PATH"], "URL": service.url, "C_FORCE_ROOT": "1"}
    with (service.folder / "worker.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=service.folder, env=environment, stdout=log, stderr=log)
    try:
        with Client(service.url) as made:
            until(lambda: made.ping("n1") or process.poll() is not None)
            assert process.poll() is None, (service.folder / "worker.log").read_text()
            yield made
    finally:
        process.send_signal(signal.SIGQUIT)
        process.wait()


def environment_of(service: Service) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in known_names()}
    return inherited | {"HOSTLER_BROKER_URL": service.url, "HOSTLER_NODE": "n1", "TERM": "xterm", "COLUMNS": "120"}


def hostler(service: Service, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hostler", *arguments]
    return subprocess.run(
        command, env=environment_of(service), capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


def open_gates(service: Service, job_id: str) -> None:
    for _ in range(4):
        service.open_gate(job_id)


def test_the_progress_of_a_migration_carries_its_numbers_and_its_result_is_the_report(
    client: Client, service: Service
) -> None:
    job = client.migrate("n1", "web1", "n2", downtime_ms=50, postcopy="if-needed", tls=False)
    heard: list[dict[str, Any]] = []

    def on_progress(meta: dict[str, Any]) -> None:
        heard.append(meta["live_migration"])
        service.open_gate(job.id)

    result = job.wait(DEADLINE_S, on_progress)
    assert [look["pass"] for look in heard] == [1, 2, 3, 4]
    assert [look["remaining_bytes"] for look in heard] == [2**31, 3 * 2**29, 2**30, 2**29]
    assert (result["node"], result["target"]) == ("n2", "n2")
    assert result["options"] == {"downtime_ms": 50, "postcopy": "if-needed", "tls": False}


def test_a_migration_that_failed_says_where_the_guest_is(client: Client, service: Service) -> None:
    # The default is not sent, so that this node is told so by a job of somebody else's making.
    open_gates(service, "failing")
    sent = client._app.send_task(
        "instance.migrate", kwargs={"name": "web1", "target": "n2", "on_deadline": "abort"}, task_id="failing",
        queue=client._queue("n1"),
    )  # fmt: skip
    with pytest.raises(OperationFailed) as failed:
        client.job(sent.id).wait(DEADLINE_S)
    assert (failed.value.code, failed.value.details["node"]) == ("MIGRATION_FAILED", "n1")
    done = hostler(service, "watch", "failing")
    assert done.returncode == 1
    assert "hostler migration-report failing -n NODE" in done.stderr


def test_a_change_sends_what_is_given_and_a_cancel_that_comes_too_late_fails(client: Client, service: Service) -> None:
    tuned = client.migrate_tune("n1", "web1", downtime_max_ms=900, force_now=True).wait(DEADLINE_S)
    assert tuned["changed"] == {"downtime_max_ms": 900, "force_now": True}
    shown = hostler(service, "migrate-tune", "web1", "--deadline-s", "30")
    assert (shown.returncode, "deadline_s" in shown.stdout) == (0, True)
    late = hostler(service, "migrate-cancel", "web1")
    assert (late.returncode, late.stdout) == (1, "too_late: it is being switched over\n")


class Terminal:
    """``hostler ARGUMENTS`` on a terminal, and what it has shown so far."""

    def __init__(self, service: Service, *arguments: str) -> None:
        self.shown = ""
        self._ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "hostler", *arguments]
        self.process = subprocess.Popen(
            command, env=environment_of(service), stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True
        )
        os.close(theirs)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._ours, 65536)
            except OSError:  # it has ended
                return
            self.shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", data.decode(errors="replace"))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(DEADLINE_S)
        os.close(self._ours)


def test_watch_draws_a_migration_as_it_goes_and_its_report_at_the_end(client: Client, service: Service) -> None:
    job = client.migrate("n1", "web1", "n2")
    terminal = Terminal(service, "watch", job.id)
    try:
        for at in range(4):
            until(lambda at=at: f"pass {at + 1}: " in terminal.shown)  # type: ignore[misc]
            service.open_gate(job.id)
        assert terminal.process.wait(DEADLINE_S) == 0
        until(lambda: "it is running on node n2" in terminal.shown)
    finally:
        terminal.close()
    shown = terminal.shown
    for words in ("memory ━", "75%", "the guest writes 31 MiB/s", "512 MiB/s", "done in about 1.0 s (50 % sure)"):
        assert words in shown, words
    assert re.search(r"left +█▆▅▃", shown) and re.search(r"written +▁▃▆█", shown)
    assert "web1 moved while it ran, from node n1 to node n2" in shown


def test_a_report_is_printed_drawn_and_told_to_programs(client: Client, service: Service, tmp_path: Path) -> None:
    file = tmp_path / "web1.png"
    done = hostler(service, "migration-report", "j1", "--plot", str(file))
    assert done.returncode == 0
    assert "web1 moved while it ran" in done.stdout and str(file) in done.stderr
    assert file.read_bytes().startswith(b"\x89PNG")
    told = hostler(service, "migration-report", "j1", "--json")
    assert len(json.loads(told.stdout)["samples"]) == 4
