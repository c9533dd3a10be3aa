"""node.powercycle up to the act: a pipe stands for the kernel's trigger, so that every letter it gets is seen."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from hostler.contract import TaskName
from hostler.errors import InvalidArgument
from hostler.payloads import PowercycleArguments
from hostler.settings import Settings
from migrations import schema
from models import Database
from tests.nodes import until
from tests.unit.worker.operations.ledgers import ledger_of
from worker.errors import Cancelled, Unsupported
from worker.kvm.process import boot_id
from worker.operations import powercycle
from worker.operations.context import JobContext, NodeContext
from worker.operations.powercycle import Means
from worker.operations.receipts import Receipt, Verdict

DEADLINE_S = 30


@dataclass
class Host:
    """A node that may be rebooted, but cannot: ``letters`` is what its kernel would have got since last asked."""

    node: NodeContext
    pipe: int
    threads: list[threading.Thread] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)

    def receive(self, job_id: str = "", **arguments: str) -> JobContext:
        job_id = job_id or str(uuid.uuid4())
        self.jobs.append(job_id)
        assert self.deliver(job_id, **arguments) is Verdict.RUN
        return JobContext(job_id, None, self.node, lambda meta: None)

    def deliver(self, job_id: str, **arguments: str) -> Verdict:
        return self.node.ledger.receive(Receipt(job_id, TaskName.NODE_POWERCYCLE, arguments, None)).verdict

    def carry_out(self, job: JobContext, confirm: str = "n1", boot: str | None = None) -> threading.Thread:
        thread = powercycle.powercycle(self.node, job, PowercycleArguments(confirm=confirm, boot_id=boot))
        self.threads.append(thread)
        return thread

    def letters(self) -> bytes:
        try:
            return os.read(self.pipe, 100)
        except BlockingIOError:
            return b""

    def end(self) -> None:
        for job_id in self.jobs:
            self.node.ledger.fail(job_id, {"code": "INTERNAL", "message": "the test is over", "details": {}})
        for thread in self.threads:
            thread.join(DEADLINE_S)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    trigger = tmp_path / "sysrq-trigger"
    os.mkfifo(trigger)
    pipe = os.open(trigger, os.O_RDWR | os.O_NONBLOCK)
    # Before anything else: this is what keeps the machine that runs the tests up.
    monkeypatch.setattr(powercycle, "means", lambda: Means(trigger, ("touch", str(tmp_path / "rebooted"))))
    monkeypatch.setattr(powercycle, "TOLD_S", 0)
    monkeypatch.setattr(os, "sync", lambda: None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    database = Database(f"sqlite+pysqlite:///{tmp_path / 'hostler.sqlite'}")
    schema.upgrade(database)
    ledger = ledger_of(database)
    settings = Settings(node="n1", allow_powercycle=True)
    made = Host(NodeContext(settings, database, ledger._incarnation, None), pipe)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.end()
        database.dispose()
        os.close(pipe)


def test_the_host_goes_after_its_job_has_succeeded_and_not_before(host: Host) -> None:
    job = host.receive()
    thread = host.carry_out(job, boot=boot_id())
    thread.join(3 * powercycle.LOOK_S)
    assert thread.is_alive() and host.letters() == b""
    host.node.ledger.succeed(job.id, None)
    thread.join(DEADLINE_S)
    assert host.letters() == b"b"


def test_what_is_in_memory_reaches_the_disks_first(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(os, "sync", lambda: seen.append(host.letters()))
    job = host.receive()
    thread = host.carry_out(job)
    host.node.ledger.succeed(job.id, None)
    thread.join(DEADLINE_S)
    assert seen == [b""] and host.letters() == b"b"


def test_disks_that_hang_do_not_keep_the_host_up(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = threading.Event()
    monkeypatch.setattr(os, "sync", lambda: hanging.wait(DEADLINE_S))
    monkeypatch.setattr(powercycle, "SYNC_S", 0.01)
    job = host.receive()
    thread = host.carry_out(job)
    host.node.ledger.succeed(job.id, None)
    try:
        assert until(host.letters) == b"b"
    finally:
        hanging.set()
        thread.join(DEADLINE_S)


def test_a_job_that_failed_or_was_never_recorded_reboots_nothing(host: Host) -> None:
    job = host.receive()
    thread = host.carry_out(job)
    host.node.ledger.fail(job.id, {"code": "INTERNAL", "message": "", "details": {}})
    thread.join(DEADLINE_S)
    unknown = JobContext("unknown", None, host.node, lambda meta: None)
    unknown.phase = lambda *_: None  # type: ignore[method-assign]
    host.carry_out(unknown).join(DEADLINE_S)
    assert not thread.is_alive() and host.letters() == b""


def test_a_job_whose_worker_ended_before_its_record_is_done_once_by_the_next_one(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = host.receive()
    ended = threading.Thread()
    with monkeypatch.context() as dying:
        dying.setattr(threading, "main_thread", lambda: ended)
        host.carry_out(job).join(DEADLINE_S)
    assert host.letters() == b""
    successor = ledger_of(host.node.database)
    assert [wakeup.job_id for wakeup in successor.take_over()] == [job.id]
    host.node.ledger = successor
    thread = host.carry_out(host.receive(job.id))
    successor.succeed(job.id, None)
    thread.join(DEADLINE_S)
    assert host.letters() == b"b"


def test_a_job_delivered_again_is_dropped_also_by_the_worker_after_the_reboot(host: Host) -> None:
    job = host.receive()
    assert host.deliver(job.id) is Verdict.DROP
    thread = host.carry_out(job)
    assert host.deliver(job.id) is Verdict.DROP
    host.node.ledger.succeed(job.id, None)
    thread.join(DEADLINE_S)
    host.node.ledger = ledger_of(host.node.database)
    assert host.node.ledger.take_over() == []
    assert host.deliver(job.id) is Verdict.DROP
    assert host.letters() == b"b"


def test_a_job_that_is_cancelled_in_time_reboots_nothing_and_later_it_is_too_late(host: Host) -> None:
    job = host.receive()
    assert job.cancel() is True
    with pytest.raises(Cancelled):
        host.carry_out(job)
    assert host.threads == [] and host.letters() == b""
    other = host.receive()
    host.carry_out(other)
    assert other.cancel() is False


@pytest.mark.parametrize("confirm", ["n2", "N1", "n1.", "yes"])
def test_another_name_than_the_nodes_is_refused_by_field(host: Host, confirm: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        host.carry_out(host.receive(), confirm=confirm)
    assert [error["field"] for error in refused.value.details["errors"]] == ["confirm"]
    assert confirm in refused.value.message and host.threads == []


def test_a_job_from_before_the_last_boot_is_refused(host: Host) -> None:
    with pytest.raises(InvalidArgument) as refused:
        host.carry_out(host.receive(), confirm="n2", boot=str(uuid.uuid4()))
    assert [error["field"] for error in refused.value.details["errors"]] == ["confirm", "boot_id"]
    with pytest.raises(InvalidArgument, match="rebooted since"):
        host.carry_out(host.receive(), boot=str(uuid.uuid4()))
    assert host.threads == []


def test_a_node_that_does_not_allow_it_says_how_to_allow_it(host: Host) -> None:
    assert Settings.model_fields["allow_powercycle"].default is False
    host.node.settings = host.node.settings.model_copy(update={"allow_powercycle": False})
    with pytest.raises(Unsupported, match="HOSTLER_ALLOW_POWERCYCLE=true"):
        host.carry_out(host.receive())


def test_a_worker_that_is_not_root_refuses(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Unsupported, match="root"):
        host.carry_out(host.receive())
    assert host.threads == []


def test_a_kernel_that_cannot_be_told_leaves_it_to_a_program(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rebooted = tmp_path / "rebooted"
    monkeypatch.setattr(powercycle, "means", lambda: Means(tmp_path / "none", ("touch", str(rebooted))))
    job = host.receive()
    thread = host.carry_out(job)
    host.node.ledger.succeed(job.id, None)
    thread.join(DEADLINE_S)
    assert rebooted.exists() and not (tmp_path / "none").exists() and host.letters() == b""


@pytest.mark.parametrize("command", [("false",), ("/no/such/program",)])
def test_a_program_that_cannot_either_is_only_told_of(command: tuple[str, ...], tmp_path: Path) -> None:
    powercycle._reboot(Means(tmp_path / "none", command))


def test_a_database_that_is_away_for_a_moment_is_asked_again(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    job = host.receive()
    reading, away = host.node.database.reading, [True, True]

    def flaky() -> object:
        if away and threading.current_thread() in host.threads:
            away.pop()
            raise OperationalError("SELECT", {}, Exception("away"))
        return reading()

    monkeypatch.setattr(host.node.database, "reading", flaky)
    thread = host.carry_out(job)
    host.node.ledger.succeed(job.id, None)
    thread.join(DEADLINE_S)
    assert host.letters() == b"b"


def test_the_kernel_is_told_by_its_own_trigger(tmp_path: Path) -> None:
    assert powercycle.means() == Means(Path("/proc/sysrq-trigger"), ("reboot", "-n", "-f"))
