"""Each kind of finding on each database: shown with its evidence, untouched by a dry run, gone after its repair."""

from __future__ import annotations

import shlex
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

import pytest
from sqlalchemy import delete, event, text
from structlog.testing import capture_logs

from hostler.cli.audit import repair_command
from hostler.contract import TaskName
from hostler.payloads import Instance, RepairArguments
from hostler.settings import Settings
from migrations import schema
from models import Database, DiskLease, InstanceLock, Job, JobParent, Node, Runtime, UidLease, UidRange, utc_now
from models import Instance as InstanceRow
from tests.services import missing
from tests.unit.worker.operations.ledgers import ids, ledger_of, locks, receipt, row, succeed
from worker.errors import NetworkFailed
from worker.kvm.process import ProcessIdentity, boot_id
from worker.kvm.qmp import EventLoop
from worker.network.tap import open_tap
from worker.operations.audit import auditing, patrol
from worker.operations.audit.auditing import KINDS
from worker.operations.audit.findings import finding
from worker.operations.audit.patrol import Patrol
from worker.operations.audit.repairing import Report, repair
from worker.operations.context import JobContext, NodeContext
from worker.operations.guests import Guests
from worker.operations.receipts import Ended

SPEC = Instance(name="web1", memory_mib=16).model_dump(mode="json")


@dataclass
class Host:
    """A node without a worker process: its database, its run folder, and jobs that audit and repair it."""

    node: NodeContext
    guests: Guests
    ended: Ended = field(default_factory=Ended)

    def job(self) -> JobContext:
        job_id = str(uuid.uuid4())
        self.node.ledger.receive(receipt(job_id, None))
        return JobContext(job_id, None, self.node, lambda meta: None)

    def audit(self) -> dict[str, Any]:
        """The findings by id; the job that looks has ended."""
        job = self.job()
        try:
            found = auditing.audit(self.node, self.guests, job)["findings"]
        finally:
            self.node.ledger.succeed(job.id, None)
        return {finding["id"]: finding for finding in found}

    def repair(self, *finding_ids: str, dry_run: bool = False) -> Report:
        job = self.job()
        try:
            arguments = RepairArguments(ids=list(finding_ids), dry_run=dry_run)
            report, self.ended = repair(self.node, self.guests, job, arguments)
        finally:
            self.node.ledger.succeed(job.id, None)
        return report

    def add(self, *rows: Any) -> None:
        with self.node.database.transaction() as session:
            for one in rows:
                session.add(one)
                session.flush()

    def folder(self) -> Path:
        path = self.node.settings.run_dir / "guests" / str(uuid.uuid4())
        path.mkdir(parents=True)
        return path


@contextmanager
def host_of(database: Database, folder: Path) -> Iterator[Host]:
    ledger = ledger_of(database)
    settings = Settings.model_construct(node="n1", run_dir=folder, state_dir=folder, limit_starts=4)
    loop = EventLoop()
    node = NodeContext(settings, database, ledger._incarnation, loop)
    guests = Guests(node)
    try:
        yield Host(node, guests)
    finally:
        guests.close()
        loop.close()


@pytest.fixture(autouse=True)
def _look_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auditing, "SECOND_LOOK_S", 0.01)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    database = Database(f"sqlite+pysqlite:///{tmp_path / 'hostler.sqlite'}")
    schema.upgrade(database)
    with host_of(database, tmp_path) as made:
        yield made
    database.dispose()


def runtime(host: Host, name: str = "web1", **more: Any) -> Runtime:
    me = ProcessIdentity(2**22 + 1, 1, boot_id())  # a pid no kernel gives
    folder = str(host.node.settings.run_dir / "guests" / str(uuid.uuid4()))
    common = {"instance_name": name, "node": "n1", "uuid": Path(folder).name, "run_dir": folder, "executable": "qemu"}
    process = {"pid": me.pid, "start_ticks": me.start_ticks, "boot_id": me.boot_id, "accelerator": "tcg"}
    return Runtime(**common | process | {"hardware": SPEC, "taps": []} | more)


def instance(state: str = "stopped", name: str = "web1") -> InstanceRow:
    return InstanceRow(name=name, node="n1", state=state, spec=SPEC)


def lock(job_id: str) -> InstanceLock:
    return InstanceLock(instance_name="web1", job_id=job_id, node="n1")


def a_lock_of_an_ended_job(host: Host) -> str:
    host.node.ledger.receive(receipt("done"))
    succeed(host.node.ledger, "done")
    host.add(lock("done"))
    return "lock:web1"


def a_lock_of_a_job_nobody_knows(host: Host) -> str:
    host.add(lock("nobody-knows-it"))
    return "lock:web1"


def a_job_of_a_dead_worker(host: Host) -> str:
    ledger_of(host.node.database).receive(receipt("lost"))
    return "job:lost"


def a_job_at_work_that_nobody_has(host: Host) -> str:
    host.add(Job(id="lost", node="n1", task="instance.list", arguments={}, state="PROGRESS", phase="x"))
    return "job:lost"


def a_job_that_waits_for_an_instance_nobody_has(host: Host) -> str:
    for job_id in ("first", "second", "third"):
        host.node.ledger.receive(receipt(job_id))
    with host.node.database.transaction() as session:
        session.execute(text("DELETE FROM instance_locks"))
        session.execute(text("DELETE FROM jobs WHERE id = 'first'"))
    return "waiting:second"


def a_job_whose_parents_have_all_ended(host: Host) -> str:
    long_ago = utc_now() - timedelta(hours=1)
    common = {"node": "n1", "task": "instance.list", "arguments": {}}
    host.add(
        Job(id="parent", state="SUCCESS", finished_at=long_ago, **common),
        Job(id="child", state="WAITING", waits_on="parents", waiting_for=["parent"], **common),
        JobParent(job_id="child", parent_id="parent"),
    )
    return "waiting:child"


def a_runtime_whose_process_is_gone(host: Host) -> str:
    host.add(instance("running"), runtime(host))
    return "dead_runtime:web1"


def a_running_instance_without_a_runtime(host: Host) -> str:
    host.add(instance("running"))
    return "state:web1"


def a_disk_kept_for_nobody(host: Host) -> str:
    lease = DiskLease(node="n1", file_id="8:1", path="/x", instance_name="web1", shared=False, read_only=False)
    off = {
        "sqlite": "PRAGMA foreign_keys=OFF",
        "postgresql": "SET LOCAL session_replication_role = replica",
        "mysql": "SET foreign_key_checks=0",
    }
    database = Database(host.node.database.url)
    try:
        if database.is_sqlite:  # there it is a property of the connection, not to be changed in a transaction
            event.listen(database.engine, "connect", lambda connection, _: connection.execute(off["sqlite"]))
        with database.transaction() as session:
            if not database.is_sqlite:
                session.execute(text(off[database.url.get_backend_name()]))
            session.add(lease)
    finally:
        database.dispose()
    return f"disk_lease:{lease.id}"


def a_uid_leased_to_nobody(host: Host) -> str:
    host.add(UidLease(node="n1", uid=4_000_000_001, instance_name="web1"))
    return "uid_lease:4000000001"


def a_folder_of_nobody(host: Host) -> str:
    return f"folder:{host.folder().name}"


PROVOKE: list[Callable[[Host], str]] = [
    a_lock_of_an_ended_job,
    a_lock_of_a_job_nobody_knows,
    a_job_of_a_dead_worker,
    a_job_at_work_that_nobody_has,
    a_job_that_waits_for_an_instance_nobody_has,
    a_job_whose_parents_have_all_ended,
    a_runtime_whose_process_is_gone,
    a_running_instance_without_a_runtime,
    a_disk_kept_for_nobody,
    a_uid_leased_to_nobody,
    a_folder_of_nobody,
]


@pytest.mark.parametrize("provoke", PROVOKE, ids=lambda provoke: provoke.__name__)
def test_it_is_found_left_by_a_dry_run_and_gone_after_its_repair(host: Host, provoke: Callable[[Host], str]) -> None:
    assert host.audit() == {}
    is_found_and_repaired(host, provoke)
    assert not any(host.repair().values())


def is_found_and_repaired(host: Host, provoke: Callable[[Host], str]) -> None:
    finding_id = provoke(host)
    found = host.audit()
    assert [*found] == [finding_id]
    assert found[finding_id]["evidence"] and found[finding_id]["repair"]
    assert [item["id"] for item in host.repair(dry_run=True)["would_do"]] == [finding_id]
    assert host.audit() == found
    report = host.repair()
    assert [item["id"] for item in report["done"]] == [finding_id], report
    assert host.audit() == {}


def test_all_of_it_works_on_each_database(database: Database, tmp_path: Path) -> None:
    with host_of(database, tmp_path) as host:
        for provoke in PROVOKE:
            is_found_and_repaired(host, provoke)
            with database.transaction() as session:
                for table in (JobParent, Job, InstanceLock, InstanceRow, UidLease):
                    session.execute(delete(table))


def test_a_freed_instance_goes_to_the_job_that_waits_for_it_and_that_job_is_woken(host: Host) -> None:
    finding_id = a_lock_of_an_ended_job(host)
    host.node.ledger.receive(receipt("next"))
    host.repair(finding_id)
    assert locks(host.node.database) == {"web1": "next"}
    assert ids(host.ended.wakeups) == ["next"]


def test_the_job_of_a_dead_worker_keeps_its_instance_and_is_woken(host: Host) -> None:
    host.repair(a_job_of_a_dead_worker(host))
    assert ids(host.ended.wakeups) == ["lost"]
    assert locks(host.node.database) == {"web1": "lost"}
    assert row(host.node.database, "lost").state == "PENDING"


def test_what_a_job_holds_is_no_finding_and_a_repair_says_who_holds_it(host: Host) -> None:
    finding_id = a_running_instance_without_a_runtime(host)
    host.node.ledger.receive(receipt("at-work"))
    assert host.audit() == {}
    (left,) = host.repair(finding_id)["left"]
    assert "web1 is held by job at-work" in left["why"]
    assert locks(host.node.database) == {"web1": "at-work"}


def test_a_repair_holds_the_instance_and_hands_it_on_to_a_job_that_came_meanwhile(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding_id = a_running_instance_without_a_runtime(host)
    kind = next(kind for kind in KINDS if kind.name == "state")
    mend, seen = kind.mend, []
    assert mend

    def while_a_job_comes(bench: Any, finding: Any) -> str:
        seen.append(bench.node.ledger.receive(receipt("next")).waiting_for)
        return mend(bench, finding)

    monkeypatch.setitem(kind.__dict__, "mend", while_a_job_comes)
    assert host.repair(finding_id)["done"]
    ((repairing,),) = seen
    assert row(host.node.database, repairing).state == "SUCCESS"
    assert locks(host.node.database) == {"web1": "next"}
    assert ids(host.ended.wakeups) == ["next"]


def test_a_repair_whose_worker_died_lets_go_of_what_it_held(host: Host) -> None:
    job = host.job()
    host.add(lock(job.id))
    repair(host.node, host.guests, job, RepairArguments())
    assert locks(host.node.database) == {}


def test_a_thing_that_is_gone_at_the_second_look_is_no_finding(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = host.folder()
    first = auditing.look(host.node, host.guests)
    assert [finding["subject"] for finding in first.findings] == [folder.name]
    looks = iter([first])
    look = auditing.look

    def first_as_it_was(*args: Any) -> Any:
        if before := next(looks, None):
            folder.rmdir()
            return before
        return look(*args)

    monkeypatch.setattr(auditing, "look", first_as_it_was)
    assert host.audit() == {}


@contextmanager
def pretending(journal: Path, guest: str) -> Iterator[Popen[bytes]]:
    """A process that looks like a QEMU of this node, where its output goes to its folder."""
    with journal.open("wb") as output:
        argv = [sys.executable, "-c", "import time; time.sleep(600)", "-name", "web1", "-uuid", guest]
        process = Popen(argv, stdin=DEVNULL, stdout=output, stderr=DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def pretender(host: Host) -> Iterator[tuple[Popen[bytes], Path]]:
    folder = host.folder()
    with pretending(folder / "journal", folder.name) as process:
        yield process, folder


def test_a_qemu_of_somebody_else_is_no_finding(host: Host, tmp_path: Path) -> None:
    with pretending(tmp_path / "journal", str(uuid.uuid4())):
        assert host.audit() == {}


def test_an_unknown_process_is_ended_only_by_its_id(host: Host, pretender: tuple[Popen[bytes], Path]) -> None:
    process, folder = pretender
    (finding_id,) = host.audit()
    assert finding_id.startswith(f"process:{process.pid}-")
    assert "name its id" in host.repair()["left"][0]["why"]
    assert process.poll() is None
    assert host.repair(finding_id)["done"]
    assert process.wait(10) is not None
    assert not folder.exists()
    assert host.audit() == {}


def test_a_process_of_another_node_on_this_host_is_none_of_ours(
    host: Host, pretender: tuple[Popen[bytes], Path]
) -> None:
    _, folder = pretender
    host.add(Node(name="n2"), instance("running"), runtime(host, node="n2", uuid=folder.name))
    assert host.audit().keys() == {"state:web1"}


def test_a_second_process_with_a_guests_uuid_is_reported_and_never_touched(
    host: Host, pretender: tuple[Popen[bytes], Path]
) -> None:
    process, folder = pretender
    host.add(instance("running"), runtime(host, uuid=folder.name))
    found = host.audit()
    assert {finding["kind"]: finding["repair"] for finding in found.values()} == {"dead_runtime": None, "process": None}
    assert len(host.repair(*found)["left"]) == 2
    assert process.poll() is None


def test_an_instance_is_not_called_stopped_while_an_unknown_qemu_of_its_name_runs(
    host: Host, pretender: tuple[Popen[bytes], Path]
) -> None:
    host.add(instance("running"))
    found = host.audit()
    process_id = next(finding_id for finding_id in found if finding_id.startswith("process:"))
    assert found["state:web1"]["repair"] is None
    assert f"settle {process_id} first" in found["state:web1"]["explanation"]
    assert host.repair(process_id, "state:web1")["left"][0]["id"] == "state:web1"
    assert [item["id"] for item in host.repair()["done"]] == ["state:web1"]
    assert host.audit() == {}


def test_a_uid_of_the_pool_that_a_stranger_uses_is_reported(host: Host) -> None:
    host.add(UidRange(node="n1", first_uid=0, last_uid=0))
    found = host.audit()["uid:0"]
    assert found["repair"] is None
    assert found["evidence"] == {"uid": 0, "pid": 1}


def test_a_tap_that_the_worker_keeps_open_is_reported_once_no_start_is_at_work(host: Host) -> None:
    try:
        tap = open_tap()
    except NetworkFailed as exc:
        missing("A tap", exc)
    try:
        host.add(Job(id="start", node="n1", task="instance.start", arguments={}, state="STARTED"))
        assert host.audit().keys() == {"job:start"}
        host.repair()
        (finding,) = host.audit().values()
        assert finding["id"] == f"tap:{tap.name}.{tap.ifindex}"
        assert finding["repair"] is None
    finally:
        tap.close()
    assert host.audit() == {}


def test_a_look_takes_the_same_number_of_queries_whatever_the_number_of_guests(host: Host) -> None:
    statements: list[str] = []
    event.listen(host.node.database.engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    counts = []
    for number in range(3):
        host.add(instance("running", f"web{number}"), runtime(host, f"web{number}"))
        statements.clear()
        auditing.look(host.node, host.guests)
        counts.append(len([said for said in statements if said.startswith("SELECT")]))
    assert counts[0] == counts[1] == counts[2] <= 12


def test_the_patrol_reports_what_stands_once_and_that_it_is_gone_once(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(patrol.time, "monotonic", lambda: clock[0])
    watch = Patrol(host.node, host.guests, 600)
    folder = host.folder()
    with capture_logs() as logs:
        watch.beat()
        assert logs == []
        for _ in range(3):
            watch.beat()
            clock[0] += 601
        assert [(entry["log_level"], entry["finding"]) for entry in logs] == [("warning", f"folder:{folder.name}")]
        folder.rmdir()
        watch.beat()
        watch.beat()
        assert [entry["log_level"] for entry in logs] == ["warning", "info"]


def test_the_patrol_can_be_switched_off(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patrol, "look", lambda *_: pytest.fail("it looked"))
    Patrol(host.node, host.guests, 0).beat()


def test_the_command_that_repairs_a_finding_can_be_typed_as_it_is_shown() -> None:
    evil = finding("job", "it's;mine", "", repair=TaskName.NODE_REPAIR, evidence={})
    shown = repair_command("n1", dict(evil))
    assert shlex.split(shown) == ["hostler", "audit", "-n", "n1", "--repair", "job:it's;mine", "--yes"]
    gone = finding("dead_runtime", "web1", "", instance="web1", repair=TaskName.INSTANCE_CLEANUP, evidence={})
    assert repair_command("n1", dict(gone)) == "hostler cleanup web1 -n n1"
