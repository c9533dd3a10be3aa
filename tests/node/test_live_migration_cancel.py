"""A migration is cancelled, in each phase and in each way: then one QEMU has the guest, and the other side is clean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import update

from hostler.errors import OperationFailed
from hostler.job import Job
from models import Job as JobRow
from models import utc_now
from tests.faults.bed import QEMU_SCRIPT
from tests.faults.promises import Sent, bare
from tests.nodes import QEMU, TestNode, tiny_instance, until
from tests.pairs import end_guests, frozen, hurry, in_order, job_row, pair, phase_of, slowly, stage_of, ticks_on

pytestmark = pytest.mark.node


@pytest.fixture(scope="module")
def shared_pair(qemu: None) -> Iterator[list[TestNode]]:
    """On the second node a QEMU can be made to hang at its start."""
    with pair(start=False) as nodes:
        script = nodes[1].root / "qemu"
        script.write_text(QEMU_SCRIPT.format(root=nodes[1].root, qemu=QEMU))
        script.chmod(0o755)
        nodes[1].environment["HOSTLER_QEMU_BINARY"] = str(script)
        for node in nodes:
            node.start_worker()
        yield nodes


@pytest.fixture
def both(shared_pair: list[TestNode]) -> Iterator[list[TestNode]]:
    yield shared_pair
    end_guests(shared_pair)


def by_client(source: TestNode, job: Job) -> None:
    job.cancel()


def by_task(source: TestNode, job: Job) -> None:
    source.do("instance.migrate_cancel", name="web1")


def by_celery(source: TestNode, job: Job) -> None:
    with bare(source) as app:
        app.control.revoke(job.id, terminate=True)


WAYS = [by_client, by_task, by_celery]
Cancel = Callable[[TestNode, Job], None]


def started(node: TestNode, **options: Any) -> int:
    node.start(tiny_instance(node.root), **options)
    if options.get("paused"):
        return 0
    with node.serial("web1") as serial:
        return serial.tick()


@contextmanager
def hanging_start(node: TestNode) -> Iterator[None]:
    hold = node.root / "hold.web1"
    hold.touch()
    try:
        yield
    finally:
        hold.unlink()


def ends_revoked(both: list[TestNode], job: Job, before: int) -> None:
    """The job ends as asked, the guest runs on where it was, and the other side has nothing of it."""
    a, b = both
    with pytest.raises(OperationFailed) as failed:
        job.wait(30)
    assert failed.value.code == "CANCELLED"
    assert a.row("web1").node == "n1"  # type: ignore[union-attr]
    assert ticks_on(a, "web1", before) > before
    a.until_state("web1", "running")
    assert in_order(both, Sent(job.id, frozenset({"REVOKED"}))) == []
    assert b.qemu_pids() == []


@pytest.mark.parametrize("cancel", WAYS)
def test_while_the_target_prepares(both: list[TestNode], cancel: Cancel) -> None:
    a, b = both
    before = started(a)
    with hanging_start(b):
        job = a.send("instance.migrate", name="web1", target="n2")
        until(lambda: (row := job_row(a, f"{job.id}.accept")) and row.phase == "greeting", what="QEMU hangs")
        cancel(a, job)
        ends_revoked(both, job, before)


@pytest.mark.parametrize("cancel", WAYS)
def test_while_memory_is_on_its_way(both: list[TestNode], cancel: Cancel) -> None:
    a, b = both
    before = started(a)
    job = slowly(a, b)
    cancel(a, job)
    ends_revoked(both, job, before)


def test_a_guest_that_was_paused_stays_so(both: list[TestNode]) -> None:
    a, b = both
    started(a)
    a.do("instance.pause", name="web1")
    job = slowly(a, b)
    job.cancel()
    with pytest.raises(OperationFailed):
        job.wait(30)
    assert a.info("web1")["state"] == "paused"
    assert "paused" in a.monitor("web1", "info status")
    assert in_order(both, Sent(job.id, frozenset({"REVOKED"}))) == []


def test_without_live_the_guest_runs_again(both: list[TestNode]) -> None:
    a, b = both
    before = started(a)
    job = slowly(a, b, live=False)
    assert "paused" in a.monitor("web1", "info status")
    job.cancel()
    ends_revoked(both, job, before)


@pytest.mark.parametrize("cancel", [by_client, by_celery])
def test_one_that_waits_for_the_instance_never_begins(both: list[TestNode], cancel: Cancel) -> None:
    a, b = both
    before = started(a)
    first = slowly(a, b)
    second = a.send("instance.migrate", name="web1", target="n2")
    until(lambda: (row := job_row(a, second.id)) and row.state == "WAITING", what="it waits")
    cancel(a, second)
    with pytest.raises(OperationFailed) as failed:
        second.wait(30)
    assert failed.value.code == "CANCELLED"
    hurry(a)
    assert first.wait(60)["node"] == "n2"
    assert ticks_on(b, "web1", before) > before
    assert stage_of(a, second) == ""
    assert in_order(both, Sent(first.id), Sent(second.id, frozenset({"REVOKED"}))) == []


def test_without_its_id_the_first_one_that_waits_is_cancelled_where_none_has_begun(both: list[TestNode]) -> None:
    a, _ = both
    before = started(a)
    waiting: list[Job] = []
    for _ in range(2):
        waiting.append(a.send("instance.migrate", name="web1", target="n2", after=["never-sent"]))
        until(lambda: (row := job_row(a, waiting[-1].id)) and row.state == "WAITING", what="it waits")
    for job in waiting:
        answer = a.do("instance.migrate_cancel", name="web1")
        assert (answer["id"], answer["outcome"]) == (job.id, "revoked")
        with pytest.raises(OperationFailed) as failed:
            job.wait(30)
        assert failed.value.code == "CANCELLED"
    assert a.failure("instance.migrate_cancel", name="web1").code == "NOT_RUNNING"
    assert ticks_on(a, "web1", before) > before
    assert in_order(both, *(Sent(job.id, frozenset({"REVOKED"})) for job in waiting)) == []


@pytest.mark.parametrize("cancel", WAYS)
def test_too_late_when_the_target_has_all(both: list[TestNode], cancel: Cancel) -> None:
    a, b = both
    before = started(a)
    job = slowly(a, b)
    with frozen(b):
        hurry(a)
        until(lambda: stage_of(a, job) == "moved", what="the target has all")
        cancel(a, job)
        until(lambda: phase_of(a, job) == "transfer" and job_row(a, job.id).waits_on == "steps", what="it waits on")  # type: ignore[union-attr]
    assert job.wait(30)["node"] == "n2"
    assert ticks_on(b, "web1", before) > before
    assert in_order(both, Sent(job.id)) == []
    assert a.qemu_pids() == []


def test_a_cancel_that_no_worker_hears_is_heard_by_the_next_one(both: list[TestNode]) -> None:
    a, b = both
    before = started(a)
    job = slowly(a, b)
    with a.database().transaction() as session:
        session.execute(update(JobRow).where(JobRow.id == job.id).values(cancel_requested_at=utc_now()))
    a.restart_worker()
    ends_revoked(both, job, before)
