"""A node is emptied of its guests: three real nodes, one of them drained, whatever happens meanwhile."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, update

from hostler.client import Job
from hostler.errors import OperationFailed
from models import Instance, Node, utc_now
from models import Job as JobRow
from tests.nodes import TestNode, tiny_instance, until
from tests.pairs import SLOW_MIB_S, end_guests, hurry, in_order, job_row, pair, slowly, ticks_on

pytestmark = pytest.mark.node

NAMES = [f"web{number}" for number in range(1, 6)]


@pytest.fixture(scope="module")
def trio(qemu: None) -> Iterator[list[TestNode]]:
    with pair("n1", "n2", "n3") as nodes:
        yield nodes


@pytest.fixture
def nodes(trio: list[TestNode]) -> Iterator[list[TestNode]]:
    """Three nodes with workers, none of them drained. Whatever a test does, they are in order after it."""
    yield trio
    trio[0].do("node.undrain")
    assert in_order(trio) == []
    end_guests(trio)


def start_all(node: TestNode, names: list[str]) -> dict[str, int]:
    """Guests that have begun to count, of different sizes, and how far each was."""
    for number, name in enumerate(names):
        node.start(tiny_instance(node.root, name, memory_mib=16 + 8 * number))
    return {name: tick(node, name) for name in names}


def tick(node: TestNode, name: str) -> int:
    with node.serial(name) as serial:
        return serial.tick()


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in result["verdicts"]}


def moves(node: TestNode, drain: Job) -> list[JobRow]:
    """The migrations that a drain has begun, in order."""
    query = select(JobRow).where(JobRow.step_of == drain.id, JobRow.task == "instance.migrate")
    with node.reading() as session:
        return [*session.scalars(query.order_by(JobRow.sequence))]


def ended(node: TestNode, job_id: str) -> str:
    """What a job that did not succeed ended with."""
    row = job_row(node, job_id)
    assert row and row.error
    return str(row.error["message"])


def state(node: TestNode, job_id: str) -> str:
    row = job_row(node, job_id)
    return row.state if row else ""


@contextmanager
def taken_port() -> Iterator[int]:
    """A port on which no target can listen."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_every_guest_moves_and_goes_on_and_the_largest_go_first(nodes: list[TestNode]) -> None:
    a, b, c = nodes
    before = start_all(a, NAMES)
    drain = a.send("node.drain", targets=["n2", "n3"])
    verdicts = by_name(drain.wait(60))
    assert {name: each["verdict"] for name, each in verdicts.items()} == dict.fromkeys(NAMES, "moved")
    assert {each["node"] for each in verdicts.values()} == {"n2", "n3"}
    there = {"n2": b, "n3": c}
    for name, each in verdicts.items():
        assert ticks_on(there[each["node"]], name, before[name]) > before[name]
        assert state(a, each["job"]) == "SUCCESS"
    assert [row.instance_name for row in moves(a, drain)] == NAMES[::-1]
    row = job_row(a, drain.id)
    assert row
    assert (row.percent, row.slot) == (100, None)
    assert any("5 guests are done; under way: web" in entry["message"] for entry in row.phases)


def test_a_drained_node_takes_no_guest_until_it_is_undrained(nodes: list[TestNode]) -> None:
    a, b, _ = nodes
    assert a.do("node.drain", auto=True)["verdicts"] == []
    refused = a.failure("instance.start", instance=tiny_instance(a.root, "new"))
    assert (refused.code, refused.details["retryable"]) == ("NODE_UNAVAILABLE", False)
    assert "hostler undrain n1" in refused.message
    assert a.row("new") is None
    b.start(tiny_instance(a.root))
    refused = b.failure("instance.migrate", name="web1", target="n1")
    assert refused.code == "INVALID_ARGUMENT"
    assert "hostler undrain n1" in refused.message
    assert b.info("web1")["state"] == "running"
    shown = {each["node"]: each for each in b.do("node.list")}
    assert shown["n1"]["drained_at"]
    assert (shown["n2"]["drained_at"], shown["n1"]["fenced_at"]) == (None, None)
    assert a.do("node.undrain")["drained_at"] == shown["n1"]["drained_at"]
    assert a.do("node.undrain")["drained_at"] is None
    assert b.do("instance.migrate", name="web1", target="n1")["node"] == "n1"


def test_a_guest_that_cannot_be_moved_runs_on_and_stops_no_other_one(nodes: list[TestNode]) -> None:
    a, _, _ = nodes
    with taken_port() as port:
        start_all(a, ["web1", "web2"])
        a.start(tiny_instance(a.root, "stuck", hvparams={"migration_port": port}))
        before = tick(a, "stuck")
        drain = a.send("node.drain", auto=True)
        with pytest.raises(OperationFailed) as failed:
            drain.wait(60)
    assert (failed.value.code, failed.value.details["retryable"]) == ("MIGRATION_FAILED", True)
    verdicts = by_name(failed.value.details)
    assert {name: each["verdict"] for name, each in verdicts.items()} == {
        "web1": "moved", "web2": "moved", "stuck": "left"
    }  # fmt: skip
    assert verdicts["stuck"]["node"] == "n1"
    assert "n2" in verdicts["stuck"]["reason"]  # each target was tried
    assert "n3" in verdicts["stuck"]["reason"]
    assert ticks_on(a, "stuck", before) > before
    # It stays drained, and what is left can be rebooted there; the next drain goes on with it.
    assert a.do("instance.reboot", name="stuck", mode="hard")["state"] == "running"
    assert a.do("node.drain", auto=True)["verdicts"][0]["verdict"] == "moved"


def test_only_where_that_was_allowed_a_guest_that_cannot_be_moved_is_shut_down(nodes: list[TestNode]) -> None:
    a, _, _ = nodes
    with taken_port() as port:
        a.start(tiny_instance(a.root, "stuck", hvparams={"migration_port": port}))
        tick(a, "stuck")
        [verdict] = a.send("node.drain", targets=["n2"], allow_shutdown=True).wait(60)["verdicts"]
    assert (verdict["verdict"], verdict["node"]) == ("stopped", "n1")
    assert verdict["reason"] == "the guest shut down"
    assert a.info("stuck")["state"] == "stopped"


def test_a_guest_for_which_no_target_has_room_is_left_with_how_much_there_is(nodes: list[TestNode]) -> None:
    a, _, _ = nodes
    a.start(tiny_instance(a.root))
    row = a.row("web1")
    assert row
    with a.database().transaction() as session:
        large = row.spec | {"memory_mib": 16 * 2**20}
        session.execute(update(Instance).where(Instance.name == "web1").values(spec=large))
    failed = a.failure("node.drain", targets=["n2", "n3"])
    assert "it has 16777216 MiB; n2 has " in failed.message
    with a.database().transaction() as session:
        session.execute(update(Instance).where(Instance.name == "web1").values(spec=row.spec))
    assert a.do("node.drain", targets=["n2", "n3"])["verdicts"][0]["verdict"] == "moved"


def test_a_drain_goes_on_when_its_worker_was_killed_in_the_middle(nodes: list[TestNode]) -> None:
    a, b, c = nodes
    before = start_all(a, NAMES)
    drain = a.send("node.drain", auto=True, bandwidth_mib_s=SLOW_MIB_S)
    until(lambda: [row for row in moves(a, drain) if row.phase == "transfer"], what="a guest is on its way")
    a.kill_worker()
    a.start_worker()
    done: set[str] = set()
    while len(done) < len(NAMES):
        going = until(lambda: [r for r in moves(a, drain) if r.instance_name not in done and r.phase == "transfer"])
        hurry(a, str(going[0].instance_name))
        done.add(str(going[0].instance_name))
    verdicts = by_name(drain.wait(60))
    assert {name: each["verdict"] for name, each in verdicts.items()} == dict.fromkeys(NAMES, "moved")
    for name, each in verdicts.items():
        assert ticks_on({"n2": b, "n3": c}[each["node"]], name, before[name]) > before[name]
    assert len(moves(a, drain)) == len(NAMES)


def test_a_second_drain_is_refused_while_one_runs_and_a_cancelled_one_begins_no_more(nodes: list[TestNode]) -> None:
    a, _, _ = nodes
    start_all(a, NAMES)
    drain = a.send("node.drain", targets=["n2"], parallel=1, bandwidth_mib_s=SLOW_MIB_S)
    [first] = until(lambda: [row for row in moves(a, drain) if row.phase == "transfer"], what="a guest is on its way")
    refused = a.failure("node.drain", auto=True)
    assert refused.code == "INSTANCE_BUSY"
    assert drain.id in refused.message
    assert a.failure("node.undrain").code == "INSTANCE_BUSY"
    assert drain.cancel()["outcome"] == "requested"
    with pytest.raises(OperationFailed) as cancelled:
        drain.wait(30)
    assert cancelled.value.code == "CANCELLED"
    assert f"to their end: {first.instance_name}." in ended(a, drain.id)
    hurry(a, str(first.instance_name))
    until(lambda: state(a, first.id) == "SUCCESS", what="what is under way goes on to its end")
    assert len(moves(a, drain)) == 1
    with a.reading() as session:
        assert session.get_one(Node, "n1").drained_at
    again = by_name(a.send("node.drain", targets=["n3"]).wait(60))
    assert len(again) == len(NAMES) - 1


def wait_to_be_started_again(node: TestNode, due_in: timedelta) -> None:
    """As a guest that crashed, with a ``restart_policy``."""
    node.do("instance.stop", name="web1", force=True)
    due = {"state": "crashed", "wanted": "running", "restart_at": utc_now() + due_in}
    with node.database().transaction() as session:
        session.execute(update(Instance).where(Instance.name == "web1").values(due))


def test_a_guest_that_waits_to_be_started_again_is_started_elsewhere(nodes: list[TestNode]) -> None:
    a, _, _ = nodes
    start_all(a, ["web1"])
    wait_to_be_started_again(a, timedelta(hours=1))
    [verdict] = a.do("node.drain", targets=["n2"])["verdicts"]
    assert (verdict["verdict"], verdict["node"]) == ("moved", "n2")
    assert nodes[1].info("web1")["state"] == "running"


def test_a_node_that_is_undrained_and_drained_again_loses_no_guest_that_was_just_being_started(
    nodes: list[TestNode],
) -> None:
    a, b, _ = nodes
    a.start(tiny_instance(a.root, restart_policy="on-crash", restart_delay_s=1))
    a.do("instance.stop", name="web1", force=True)
    assert a.do("node.drain", auto=True)["verdicts"] == []
    wait_to_be_started_again(a, timedelta(0))
    undrain, drain = a.send("node.undrain"), a.send("node.drain", targets=["n2"])
    assert undrain.wait(30)["node"] == "n1"
    [verdict] = drain.wait(60)["verdicts"]
    assert (verdict["verdict"], verdict["node"]) == ("moved", "n2"), verdict
    assert b.info("web1")["state"] == "running"
    assert a.qemu_pids() == []


def test_a_guest_on_its_way_to_the_drained_node_arrives_and_leaves_again(nodes: list[TestNode]) -> None:
    a, b, c = nodes
    before = start_all(b, ["web1"])["web1"]
    coming = slowly(b, a)
    drain = a.send("node.drain", targets=["n3"])
    until(lambda: moves(a, drain), what="it is to leave again")
    hurry(b)
    assert coming.wait(60)["node"] == "n1"
    [verdict] = drain.wait(60)["verdicts"]
    assert (verdict["verdict"], verdict["node"]) == ("moved", "n3")
    assert ticks_on(c, "web1", before) > before


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({}, "targets"),
        ({"targets": ["n2"], "auto": True}, "auto"),
        ({"targets": ["n2", "n9"]}, "targets[1]"),
        ({"targets": ["n1"]}, "targets[0]"),
        ({"auto": True, "parallel": 0}, "parallel"),
        ({"auto": True, "downtime_ms": 0}, "downtime_ms"),
    ],
)
def test_bad_arguments_are_refused_by_name_and_the_node_is_not_drained(
    nodes: list[TestNode], arguments: dict[str, Any], field: str
) -> None:
    failed = nodes[0].failure("node.drain", **arguments)
    assert [each["field"] for each in failed.details["errors"]] == [field]
    assert nodes[0].do("node.undrain")["drained_at"] is None


def test_the_command_line_drains_and_shows_what_became_of_each(nodes: list[TestNode]) -> None:
    a, _, _ = nodes
    start_all(a, ["web1"])
    shown = a.cli("drain", "n1", "--to", "n2")
    assert shown.returncode == 0, shown.stderr
    assert "moved" in shown.stdout
    assert "drained" in a.cli("nodes").stdout
    assert a.cli("drain", "n1").returncode == 2
    assert a.cli_json("undrain", "n1")["node"] == "n1"
