"""Each kind of broken promise is found: one is planted, and its sentence is seen."""

from __future__ import annotations

import os
import re
import secrets
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from signal import SIGTERM
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from models import Incarnation, Instance, InstanceLock, Job, Runtime, UidLease, utc_now
from tests.faults.promises import Sent, bare, finished_at, ran, violations
from tests.nodes import TestNode, node, tiny_instance
from tests.services import missing
from worker.network.tap import open_tap

pytestmark = pytest.mark.node

NOW = utc_now()
Plant = Callable[["Bench"], dict[str, Any] | None]


class Bench:
    """A node with two guests and no worker, so that nobody heals what is planted."""

    def __init__(self, made: TestNode) -> None:
        self.node = made
        made.start_worker()
        jobs = [made.send("instance.start", instance=tiny_instance(made.root, name)) for name in ("web1", "web2")]
        for job in jobs:
            job.wait(30)
        self.jobs = [Sent(job.id) for job in jobs]
        self.ran = ran(made, "web1", "web2")
        assert violations(made, self.jobs, untouched=self.ran) == []
        made.kill_worker(SIGTERM)
        self.secret = "none yet"
        self.processes: list[subprocess.Popen[bytes]] = []

    def found(self, **options: Any) -> list[str]:
        return violations(self.node, **({"jobs": self.jobs, "untouched": self.ran, "secrets": [self.secret]} | options))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """All is as before at the end, but for the secret: what was once in a file may stay in its free pages."""
        self.secret = secrets.token_hex()
        self.node.database().dispose()
        with (
            sqlite3.connect(self.node.settings.state_dir / "hostler.sqlite") as now,
            sqlite3.connect(":memory:") as kept,
        ):
            now.backup(kept)
            sent, log = list(self.jobs), self.node.log_path.read_bytes()
            try:
                yield
            finally:
                self.node.monitor("web2", "cont")
                self.jobs = sent
                self.node.log_path.write_bytes(log)
                (self.node.settings.run_dir / "guests" / "stray").mkdir(exist_ok=True)
                (self.node.settings.run_dir / "guests" / "stray").rmdir()
                for process in self.processes:
                    process.kill()
                    process.wait()
                self.processes.clear()
                self.node.database().dispose()
                kept.backup(now)

    def rows(self, *rows: Any) -> None:
        with self.node.database().transaction() as session:
            session.add_all(rows)

    def change(self, table: type[Any], *where: Any, **values: Any) -> None:
        with self.node.database().transaction() as session:
            session.execute(update(table).where(*where).values(**values))

    def look(self, session_look: Callable[[Session], Any]) -> Any:
        with self.node.reading() as session:
            return session_look(session)

    def start_process(self, *arguments: str, stdin: Any = None, fds: tuple[int, ...] = (), folder: str = "") -> None:
        """A process with such arguments; with ``folder``, it passes for a QEMU of this node that has it."""
        argv = [sys.executable, "-c", "import time; time.sleep(60)", *arguments]
        path = self.node.settings.run_dir / "guests" / folder
        with (path / "journal" if folder else Path(os.devnull)).open("ab") as journal:
            self.processes.append(subprocess.Popen(argv, stdin=stdin, stdout=journal, pass_fds=fds))


@pytest.fixture(scope="module")
def bench(qemu: None) -> Iterator[Bench]:
    with node() as made:
        yield Bench(made)


def job_row(name: str | None = "web9", began_s: float = 0, lasted_s: float = 1, **more: Any) -> Job:
    began = NOW + timedelta(seconds=began_s)
    values = {
        "id": str(uuid.uuid4()), "node": "n1", "task": "instance.pause", "arguments": {}, "state": "SUCCESS",
        "started_at": began, "finished_at": began + timedelta(seconds=lasted_s),
    }  # fmt: skip
    return Job(instance_name=name, **(values | more))


def second_qemu(bench: Bench) -> None:
    folder = bench.ran[0].node.row("web1").runtime.uuid  # type: ignore[union-attr]
    bench.start_process("-name", "web1", "-uuid", str(uuid.uuid4()), folder=folder)


def second_writer(bench: Bench) -> None:
    folder = bench.node.row("web1").runtime.uuid  # type: ignore[union-attr]
    with (bench.node.root / "web2.img").open("r+b") as disk:
        bench.start_process("-name", "web3", "-uuid", str(uuid.uuid4()), stdin=disk, folder=folder)


def stray_tap(bench: Bench) -> None:
    if os.geteuid() != 0:
        missing("A tap", "needs root")
    tap = open_tap(vnet_hdr=False)
    folder = bench.node.row("web1").runtime.uuid  # type: ignore[union-attr]
    bench.start_process("-name", "web3", "-uuid", str(uuid.uuid4()), fds=(tap.fd,), folder=folder)
    tap.close()


def stray_folder(bench: Bench) -> None:
    (bench.node.settings.run_dir / "guests" / "stray").mkdir()


def dead_runtime(bench: Bench) -> None:
    runtime = Runtime(
        node="n1", uuid="gone", boot_id="x", pid=1, start_ticks=1, executable="q", accelerator="tcg",
        run_dir="/nowhere", hardware={}, taps=[],
    )  # fmt: skip
    bench.rows(Instance(name="web9", node="n1", state="running", spec={}, runtime=runtime))


def stray_disk_lease(bench: Bench) -> None:
    with sqlite3.connect(bench.node.settings.state_dir / "hostler.sqlite") as raw:  # which checks no foreign keys
        raw.execute(
            "INSERT INTO disk_leases (node, file_id, path, instance_name, shared, read_only)"
            " VALUES ('n1', 'f', '/d', 'web9', 0, 0)"
        )


def uids(*instances: str) -> list[UidLease]:
    return [UidLease(node="n1", uid=70_000 + number, instance_name=name) for number, name in enumerate(instances)]


def jobs(bench: Bench, *rows: Job) -> dict[str, Any]:
    bench.rows(*rows)
    return {"jobs": [Sent(row.id) for row in rows]}


def backend_says(bench: Bench, state: str, result: Any) -> None:
    row = job_row(None, result={"name": "web1"})
    bench.rows(row)
    bench.jobs.append(Sent(row.id))
    with bare(bench.node) as app:
        app.backend.store_result(row.id, result, state)


def paused_behind_its_back(bench: Bench) -> None:
    bench.node.monitor("web2", "stop")


PLANTS: dict[str, tuple[str, Plant]] = {
    "two QEMUs of an instance": ("1: 2 QEMUs run for instance web1", second_qemu),
    "a QEMU without a runtime": ("1: QEMU .* of web1 runs, and no runtime names it", second_qemu),
    "another pid in the runtime": (
        "1: QEMU .* of web1 is 1 in its runtime", lambda b: b.change(Runtime, Runtime.instance_name == "web1", pid=1),
    ),
    "a disk open twice": ("1: disk file:.* is open for writing in QEMUs", second_writer),
    "a uid of two runtimes": ("2: uid 70000 is that of 2 runtimes", lambda b: b.change(Runtime, uid=70000)),
    "two uids of an instance": ("2: web1 holds 2 uids", lambda b: b.rows(*uids("web1", "web1"))),
    "a leased uid of somebody else": (
        f"2: uid {os.getuid()} is leased to web1, and process .* has it",
        lambda b: b.rows(UidLease(node="n1", uid=os.getuid(), instance_name="web1")),
    ),
    "a QEMU of another uid": (
        f"2: QEMU .* of web1 runs as .{os.getuid()}., not as uid 70000", lambda b: b.change(Runtime, uid=70000),
    ),
    "a lost job": ("3: job nobody-knows was sent, and no ledger has it", lambda b: {"jobs": [Sent("nobody-knows")]}),
    "a job without an end": (
        "3: job .* has not ended: STARTED", lambda b: jobs(b, job_row(state="STARTED", finished_at=None)),
    ),
    "another end than expected": (
        "3: job .* ended as SUCCESS and not as REVOKED",
        lambda b: {"jobs": [replace(b.jobs[0], ends=frozenset({"REVOKED"}))]},
    ),
    "another effect": ("3: job .*: twice", lambda b: {"jobs": [replace(b.jobs[0], effect=lambda: "twice")]}),
    "no result": ("3: job .* is SUCCESS in the ledger, and its result is PENDING", lambda b: jobs(b, job_row())),
    "another state in the backend": (
        "3: job .* is SUCCESS in the ledger, and its result is STARTED", lambda b: backend_says(b, "STARTED", {}),
    ),
    "another result in the backend": (
        "3: job .* is SUCCESS in the ledger, and its result is {'name': 'web2'}",
        lambda b: backend_says(b, "SUCCESS", {"name": "web2"}),
    ),
    "a second end": (
        "3: job .* ended at .* and again at", lambda b: {"finished": dict.fromkeys(finished_at([b.node]), NOW)},
    ),
    "two jobs at once": (
        "4: job .* of web9 began before job .* had ended", lambda b: b.rows(job_row(lasted_s=9), job_row(began_s=5)),
    ),
    "jobs out of order": (
        "4: job .* of web9 came after job .* and began first", lambda b: b.rows(job_row(began_s=5), job_row()),
    ),
    "a restarted guest": (
        "5: web1 ran as pid 1, and does not", lambda b: {"untouched": [replace(b.ran[0], pid=1)]},
    ),
    "a guest that was reset": (
        "5: web1 counted to 10000000, and began anew", lambda b: {"untouched": [replace(b.ran[0], counter=10**7)]},
    ),
    "a guest that stands still": ("5: web2 counted to .*, and counts no more", paused_behind_its_back),
    "a folder": ("6: folder stray belongs to no runtime", stray_folder),
    "a runtime without a process": ("6: the runtime of web9 names pid 1, which is gone", dead_runtime),
    "a tap": ("6: tap .* belongs to no runtime", stray_tap),
    "a tap that is gone": (
        "6: a runtime names tap hst-gone, which is gone",
        lambda b: b.change(Runtime, Runtime.instance_name == "web1", taps=[{"name": "hst-gone"}]),
    ),
    "a disk lease": ("6: disk /d is leased to web9, which has no runtime", stray_disk_lease),
    "a uid lease": ("6: uid 70000 is leased to web9, which has no runtime", lambda b: b.rows(*uids("web9"))),
    "an incarnation": (
        "6: incarnation .* is dead, and its row says that it lives", lambda b: b.change(Incarnation, ended_at=None),
    ),
    "a lock of a job that ended": (
        "6: web1 is held by job .*, which is SUCCESS",
        lambda b: b.rows(InstanceLock(instance_name="web1", job_id=b.jobs[0].id, node="n1")),
    ),
    "a lock of no job": (
        "6: web1 is held by job x, which is known to nobody",
        lambda b: b.rows(InstanceLock(instance_name="web1", job_id="x", node="n1")),
    ),
    "a place of a job that ended": (
        "6: job .* has ended and keeps its place", lambda b: b.rows(job_row(slot="start", slot_taken=True)),
    ),
    "a claim of the dead": (
        "6: job .* is claimed by incarnation .*, which is dead",
        lambda b: b.rows(job_row(finished_at=None, claimed_by=b.look(lambda s: s.scalar(select(Incarnation.id))))),
    ),
    "a secret argument": (
        "7: a secret is in the arguments of process", lambda b: b.start_process(f"postgresql://me:{b.secret}@host"),
    ),
    "a secret in a log": ("7: a secret is in the file worker.log", lambda b: say(b, f"with password {b.secret}")),
    "a secret in a row": ("7: a secret is in a row of jobs", lambda b: b.rows(job_row(message=f"as {b.secret}"))),
    "a secret in a result": ("7: a secret is in the result of job", lambda b: backend_says(b, "SUCCESS", b.secret)),
    "another state than QEMU's": (
        "8: web1 is paused in the ledger, and its QEMU says 'VM status: running",
        lambda b: b.change(Instance, Instance.name == "web1", state="paused"),
    ),
    "a guest that does not run": (
        "8: web9 is running in the ledger, and has no QEMU",
        lambda b: b.rows(Instance(name="web9", node="n1", state="running", spec={})),
    ),
    "an unknown that answers": (
        "8: web1 is unknown in the ledger, and its QEMU says",
        lambda b: b.change(Instance, Instance.name == "web1", state="unknown"),
    ),
}  # fmt: skip


def say(bench: Bench, text: str) -> None:
    with bench.node.log_path.open("a") as log:
        log.write(text)


@pytest.mark.parametrize("what", PLANTS)
def test_a_broken_promise_is_found(bench: Bench, what: str) -> None:
    sentence, plant = PLANTS[what]
    with bench.restored():
        found = bench.found(**(plant(bench) or {}))
    assert any(re.match(sentence, text) for text in found), found


def test_a_node_that_keeps_its_promises_has_no_violations(bench: Bench) -> None:
    with bench.restored():
        assert bench.found(finished=finished_at([bench.node])) == []


def test_an_instance_whose_qemu_keeps_silent_may_be_unknown(bench: Bench) -> None:
    with bench.restored():
        bench.change(Instance, Instance.name == "web1", state="unknown")
        os.kill(bench.ran[0].pid, 19)
        try:
            assert not [text for text in bench.found(untouched=[]) if text.startswith("8")]
        finally:
            os.kill(bench.ran[0].pid, 18)
