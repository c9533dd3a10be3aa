"""What a node has of a guest that another node owns: watched, given back, and never a reason to judge the guest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import update

from hostler.contract import InstanceState
from models import Instance, InstanceLock, Node, Runtime, runtime_of
from tests.unit.worker.operations.test_audit import Host, host, instance, receipt, runtime
from worker.errors import AlreadyRunning
from worker.operations import recovery, start
from worker.operations.ending import Ending
from worker.operations.guests import release
from worker.operations.reconcile import adopt_guests
from worker.operations.recovery_table import Reality

__all__ = ["host"]

CRASHED = Ending(InstanceState.CRASHED, "it died", "killed")


@pytest.fixture
def moved(host: Host) -> Iterator[Host]:
    """This node is n1; web1 is owned by n2, where it runs, and a QEMU of it that has ended was here."""
    host.add(Node(name="n2"), instance("running"), runtime(host), runtime(host, node="n2"))
    with host.node.database.transaction() as session:
        session.execute(update(Instance).values(node="n2"))
    yield host


def rows(host: Host) -> tuple[Instance, Runtime | None, Runtime | None]:
    with host.node.database.reading() as session:
        row = session.get_one(Instance, "web1")
        return row, runtime_of(session, "n1", "web1"), runtime_of(session, "n2", "web1")


def untouched(row: Instance, theirs: Runtime | None) -> bool:
    return (row.node, row.state, row.reason, row.ended_at) == ("n2", "running", None, None) and theirs is not None


def test_its_end_gives_back_what_was_here_and_says_nothing_of_the_guest(moved: Host) -> None:
    mine, theirs = rows(moved)[1:]
    assert mine and theirs
    assert release(moved.node, "web1", theirs.uuid, CRASHED) == []
    assert release(moved.node, "web1", mine.uuid, CRASHED) == [f"runtime {mine.uuid}"]
    row, mine, theirs = rows(moved)
    assert mine is None
    assert untouched(row, theirs)


def test_the_owners_end_leaves_what_the_other_side_has(moved: Host) -> None:
    with moved.node.database.transaction() as session:
        session.execute(update(Instance).values(node="n1"))
    mine = rows(moved)[1]
    assert mine
    release(moved.node, "web1", mine.uuid, CRASHED)
    row, mine, theirs = rows(moved)
    assert (row.state, mine, row.runtime) == ("crashed", None, None)
    assert theirs is not None


@pytest.mark.parametrize("state", ["running", "starting", "stopping"])
def test_a_new_worker_releases_it_and_leaves_the_guests_state(moved: Host, state: str) -> None:
    with moved.node.database.transaction() as session:
        session.execute(update(Instance).values(state=state))
    adopt_guests(moved.node, moved.guests)
    row, mine, theirs = rows(moved)
    assert (row.state, mine) == (state, None)
    assert theirs is not None


def test_an_audit_finds_it_and_its_repair_leaves_the_guest(moved: Host) -> None:
    found = moved.audit()
    assert [*found] == ["dead_runtime:web1"]
    assert found["dead_runtime:web1"]["repair"]["task"] == "node.repair"
    assert moved.repair("dead_runtime:web1")["done"]
    row, mine, theirs = rows(moved)
    assert mine is None
    assert untouched(row, theirs)
    assert moved.audit() == {}


def test_it_is_no_finding_while_a_job_of_the_owner_has_the_guest(moved: Host) -> None:
    moved.node.ledger.receive(receipt("at-work", None))
    moved.add(InstanceLock(instance_name="web1", job_id="at-work", node="n2"))
    assert moved.audit() == {}


def test_a_job_that_is_taken_up_again_does_not_take_the_owners_end_for_one_of_ours(moved: Host) -> None:
    mine = rows(moved)[1]
    assert mine
    release(moved.node, "web1", mine.uuid, CRASHED)
    with moved.node.database.transaction() as session:
        row = session.get_one(Instance, "web1")
        row.state, row.runtime, row.ended_at = "stopped", None, row.created_at
    assert recovery.find_out(moved.node, moved.guests, "web1", row.created_at) is Reality.NO_RUNTIME
    with moved.node.database.transaction() as session:
        session.execute(update(Instance).values(node="n1"))
    assert recovery.find_out(moved.node, moved.guests, "web1", row.created_at) is Reality.GONE


def test_the_guest_is_not_started_where_something_of_it_is_left(moved: Host) -> None:
    with moved.node.database.transaction() as session:
        row = session.get_one(Instance, "web1")
        row.state, row.runtime = "stopped", None
        with pytest.raises(AlreadyRunning, match="node n2 owns it, and what n1 had of it"):
            start._require_startable(session, row, "n1")
        start._require_startable(session, row, "n2")
