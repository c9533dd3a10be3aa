"""What went wrong when the original moved a guest does not: the target has a record, and is cleaned up after."""

from __future__ import annotations

from collections.abc import Iterator
from signal import SIGKILL

import psutil
import pytest
from sqlalchemy import select

from hostler.errors import OperationFailed
from models import DiskLease, Runtime
from tests.faults.promises import Sent
from tests.nodes import TestNode, tiny_instance, until
from tests.pairs import end_guests, hurry, in_order, migrate, pair, slowly, ticks_on

pytestmark = pytest.mark.node


@pytest.fixture(scope="module")
def shared_pair(qemu: None) -> Iterator[list[TestNode]]:
    with pair() as nodes:
        yield nodes


@pytest.fixture
def both(shared_pair: list[TestNode]) -> Iterator[list[TestNode]]:
    yield shared_pair
    end_guests(shared_pair)


def booted(node: TestNode, **hvparams: str) -> int:
    node.start(tiny_instance(node.root, hvparams=hvparams))
    with node.serial("web1") as serial:
        return serial.tick()


def runtimes(node: TestNode) -> dict[str, Runtime]:
    """What SQL has of the guest's QEMUs, by node."""
    with node.reading() as session:
        return {row.node: row for row in session.scalars(select(Runtime))}


def test_w9_while_a_guest_arrives_the_target_has_a_record_by_which_its_next_worker_finds_it(
    both: list[TestNode],
) -> None:
    a, b = both
    before = booted(a)
    job = slowly(a, b)
    found = runtimes(a)
    assert sorted(found) == ["n1", "n2"] and found["n1"].uuid != found["n2"].uuid
    assert [found["n2"].pid] == b.qemu_pids()
    with a.reading() as session:
        assert sorted(session.scalars(select(DiskLease.node))) == ["n1", "n2"]
    b.restart_worker()
    assert b.qemu_pids() == [found["n2"].pid]
    hurry(a)
    assert job.wait(60)["node"] == "n2"
    assert b.pid("web1") == found["n2"].pid
    assert ticks_on(b, "web1", before) > before
    assert in_order(both, Sent(job.id)) == []


def test_w10_of_a_target_that_dies_nothing_is_left_and_the_guest_runs_on(both: list[TestNode]) -> None:
    a, b = both
    before = booted(a)
    job = slowly(a, b)
    (pid,) = b.qemu_pids()
    psutil.Process(pid).send_signal(SIGKILL)
    with pytest.raises(OperationFailed) as failed:
        job.wait(60)
    assert failed.value.code == "MIGRATION_FAILED" and failed.value.details["node"] == "n1"
    until(lambda: sorted(runtimes(a)) == ["n1"], what="the target's record is gone")
    assert not [*(b.root / "run" / "guests").iterdir()] and not b.tap_fds()
    assert ticks_on(a, "web1", before) > before
    assert in_order(both, Sent(job.id, frozenset({"MIGRATION_FAILED"}))) == []


def test_a_guest_whose_own_parameter_says_so_is_paused_while_it_moves(both: list[TestNode]) -> None:
    a, b = both
    before = booted(a, migration_mode="non-live")
    assert migrate(a, b)["kind"] == "non-live"
    assert ticks_on(b, "web1", before) > before
