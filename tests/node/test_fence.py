"""A node whose host is off is given up: its guests start elsewhere, and no guest ever runs twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import update

from hostler.client import Job
from hostler.errors import OperationFailed
from models import Incarnation, Instance, LiveMigration, Node, Runtime, utc_now
from tests.nodes import TestNode, tiny_instance, until
from tests.pairs import frozen, hurry, job_row, pair, phase_of, slowly, stage_of, ticks_on
from tests.power import had_by, lose_power, pretend_boot, silence
from worker.kvm.tiny_guest import IGNORE_KEY, IGNORING_MESSAGE

pytestmark = pytest.mark.node

OFF = {"node": "n1", "confirm": "it is off"}


@pytest.fixture
def nodes(qemu: None) -> Iterator[list[TestNode]]:
    with pair("n1", "n2", "n3") as made:
        yield made


def start(node: TestNode, *names: str, memory_mib: int = 16) -> None:
    for name in names:
        node.start(tiny_instance(node.root, name, memory_mib=memory_mib))
        with node.serial(name) as serial:
            serial.tick()


def of_n1(node: TestNode) -> dict[str, list[str]]:
    """What SQL still has of the dead node that it must not."""
    return had_by(node, "n1")


def test_a_node_that_lives_is_not_fenced(nodes: list[TestNode]) -> None:
    a, b, _ = nodes
    start(a, "web1")
    assert "it answers" in b.failure("node.fence", **OFF).message
    a.kill_worker()
    assert "gave a sign of life" in b.failure("node.fence", **OFF).message
    silence(a)
    failed = b.failure("node.fence", **OFF)
    assert failed.code == "INVALID_ARGUMENT"
    assert "web1 of node n1 runs on this very host" in failed.message
    for arguments in ({**OFF, "confirm": "yes"}, {**OFF, "node": "n2"}, {**OFF, "node": "n9"}):
        assert b.failure("node.fence", **arguments).code == "INVALID_ARGUMENT"
    a.start_worker()
    assert a.info("web1")["state"] == "running"


def test_the_guests_of_a_fenced_node_are_crashed_and_start_on_another_one(nodes: list[TestNode]) -> None:
    a, b, _ = nodes
    start(a, "web1", "web2")
    lose_power(a)
    refused = b.failure("instance.start", instance=tiny_instance(a.root))
    assert refused.code == "ALREADY_RUNNING"
    fenced = b.do("node.fence", **OFF)
    assert {each["name"]: each["verdict"] for each in fenced["guests"]} == {"web1": "crashed", "web2": "crashed"}
    row = b.row("web1")
    assert row and row.reason
    assert (row.state, "its host is off" in row.reason, row.wanted) == ("crashed", True, "running")
    assert of_n1(b) == {}
    assert b.start(tiny_instance(a.root))["node"] == "n2"
    again = b.do("node.fence", **OFF, restart_on=["n3"])
    assert [(each["name"], each["verdict"], each["node"]) for each in again["guests"]] == [("web2", "started", "n3")]


def test_those_wanted_running_are_started_where_asked_and_the_others_stay_down(nodes: list[TestNode]) -> None:
    a, b, c = nodes
    start(a, "web1", "web2", "web3", "off")
    a.do("instance.stop", name="off", force=True)
    lose_power(a)
    shown = b.cli_json("fence", "n1", "--yes-it-is-off", "--restart-on", "n2,n3", "-n", "n2")
    assert {each["name"]: each["verdict"] for each in shown["guests"]} == dict.fromkeys(
        ("web1", "web2", "web3"), "started"
    )
    where = {"n2": b, "n3": c}
    for each in shown["guests"]:
        ticks_on(where[each["node"]], each["name"], 0)
    assert {each["node"] for each in shown["guests"]} == {"n2", "n3"}
    row = b.row("off")
    assert row and (row.state, row.node) == ("stopped", "n1")


def test_the_late_comer_runs_no_guest_twice(nodes: list[TestNode]) -> None:
    a, b, _ = nodes
    start(a, "web1", "stale")
    stale = a.pid("stale")
    lose_power(a, keep=("stale",))
    hidden_pid(a, "stale")
    failed = b.failure("node.fence", **OFF, restart_on=["n2"])
    verdicts = {each["name"]: each["verdict"] for each in failed.details["guests"]}
    assert verdicts == {"web1": "started", "stale": "failed"}  # this host's kernel keeps its disk from a second QEMU
    refused = a.refused_worker()
    assert refused.returncode == 1
    assert "was fenced at" in refused.stderr
    assert "hostler unfence n1" in refused.stderr
    assert a.qemu_pids() == [stale]  # nothing was killed
    assert b.cli_json("unfence", "n1", "-n", "n2")["fenced_at"]
    a.start_worker()
    assert [each for each in a.do("node.audit")["findings"] if each["evidence"].get("pid") == stale], "it is found"
    assert a.qemu_pids() == [stale]
    assert b.info("web1")["node"] == "n2"
    assert b.do("node.unfence", node="n1")["fenced_at"] is None


def hidden_pid(node: TestNode, name: str) -> None:
    """As on another host: this one sees no process of that runtime."""
    with node.database().transaction() as session:
        session.execute(
            update(Runtime).where(Runtime.instance_name == name, Runtime.node == "n1").values(boot_id="elsewhere")
        )


def test_a_host_that_was_booted_since_lifts_its_fence_by_itself(nodes: list[TestNode]) -> None:
    a, b, _ = nodes
    start(a, "web1")
    lose_power(a)
    b.do("node.fence", **OFF, restart_on=["n2"])
    pretend_boot(a)
    a.start_worker()
    assert {each["node"]: each["fenced_at"] for each in b.do("node.list")}["n1"] is None
    ticks_on(b, "web1", 0)
    assert a.qemu_pids() == []
    assert a.start(tiny_instance(a.root, "web2"))["node"] == "n1"


def test_a_worker_that_was_fenced_while_it_lived_ends(nodes: list[TestNode]) -> None:
    a, _, _ = nodes
    start(a, "web1")
    with a.database().transaction() as session:
        session.execute(update(Node).where(Node.name == "n1").values(fenced_at=utc_now()))
        session.execute(update(Incarnation).where(Incarnation.node == "n1").values(ended_at=utc_now()))
    worker = a.worker
    assert worker
    assert until(lambda: worker.poll() is not None, what="the worker ends")
    assert len(a.qemu_pids()) == 1
    a.worker = None


def test_jobs_of_a_fenced_node_end_and_free_their_instances(nodes: list[TestNode]) -> None:
    a, b, _ = nodes
    start(a, "web1")
    with a.serial("web1") as serial:
        serial.send(IGNORE_KEY)
        serial.read_until(IGNORING_MESSAGE)
    stop = a.send("instance.stop", name="web1", timeout_s=600)
    until(lambda: (row := job_row(a, stop.id)) and row.phase == "shutdown", what="the stop is under way")
    waits = a.send("instance.resume", name="web1")
    until(lambda: (row := job_row(a, waits.id)) and row.state == "WAITING", what="a job waits behind it")
    lose_power(a)
    fenced = b.do("node.fence", **OFF)
    assert fenced["jobs"] >= 2
    assert of_n1(b) == {}
    assert ended_as(b, stop) == ("FAILURE", "NODE_UNAVAILABLE")
    assert ended_as(b, waits) == ("REVOKED", "CANCELLED")
    with pytest.raises(Exception, match="was fenced"):
        Job.wait(stop, 20)
    assert b.start(tiny_instance(a.root))["state"] == "running"


def ended_as(node: TestNode, job: Job) -> tuple[str, str]:
    row = job_row(node, job.id)
    assert row and row.error
    return row.state, row.error["code"]


def test_what_waited_on_the_target_for_a_guest_of_the_fenced_node_is_removed(nodes: list[TestNode]) -> None:
    a, b, c = nodes
    start(a, "web1")
    migration = slowly(a, b)
    lose_power(a)
    fenced = c.do("node.fence", **OFF, restart_on=["n2"])
    assert [(each["name"], each["verdict"], each["node"]) for each in fenced["guests"]] == [("web1", "started", "n2")]
    assert stage_of(c, migration) == "done"
    assert len(b.qemu_pids()) == 1
    ticks_on(b, "web1", 0)


def forget_that_it_was_sent(node: TestNode, migration_id: str, source: str = "n1") -> None:
    """As where the source's host or worker died after QEMU had sent the last part, and before that was written down."""
    with node.database().transaction() as session:
        session.execute(update(LiveMigration).where(LiveMigration.job_id == migration_id).values(stage="switching"))
        session.execute(update(Instance).where(Instance.name == "web1").values(node=source))


@pytest.mark.parametrize("recorded", ["moved", "switching"])
def test_a_guest_that_had_been_sent_goes_on_where_it_is(nodes: list[TestNode], recorded: str) -> None:
    a, b, c = nodes
    start(a, "web1")
    migration = slowly(a, b)
    with frozen(b):
        hurry(a)
        until(lambda: stage_of(a, migration) == "moved", what="it is sent")
        lose_power(a)
        if recorded == "switching":
            forget_that_it_was_sent(c, migration.id)
        fence = c.send("node.fence", **OFF)
        until(lambda: job_row(c, f"{fence.id}.finalize.web1") is not None, what="its target is told")
    [guest] = fence.wait(60)["guests"]
    assert (guest["name"], guest["verdict"], guest["node"]) == ("web1", "moved", "n2")
    ticks_on(b, "web1", 0)
    assert b.info("web1")["state"] == "running"
    assert stage_of(c, migration) == "done"


def test_a_guest_on_its_way_to_the_fenced_node_runs_on_where_it_was(nodes: list[TestNode]) -> None:
    a, b, c = nodes
    start(b, "web1")
    migration = slowly(b, a)
    lose_power(a)
    assert c.do("node.fence", **OFF)["guests"] == []
    until(lambda: stage_of(c, migration) == "done", what="the migration is over")
    ticks_on(b, "web1", 0)
    assert of_n1(c) == {}


def test_a_guest_that_its_fenced_target_had_whole_runs_on_where_it_was(nodes: list[TestNode]) -> None:
    """Its source's worker was away when the last part had been sent, and comes back after the fence."""
    a, b, c = nodes
    start(b, "web1")
    migration = slowly(b, a)
    with frozen(a):
        hurry(b)
        until(lambda: stage_of(b, migration) == "moved", what="it is sent")
        b.kill_worker()
        lose_power(a)
    forget_that_it_was_sent(c, migration.id, "n2")
    assert c.do("node.fence", **OFF)["guests"] == []
    b.start_worker()
    with pytest.raises(OperationFailed, match="node n1 was fenced") as failed:
        migration.wait(60)
    assert failed.value.details["node"] == "n2"
    ticks_on(b, "web1", 0)
    assert b.info("web1")["state"] == "running"
    assert of_n1(c).keys() <= {"jobs"}  # it is told to clean up when it has a worker again


def test_what_the_source_kept_for_a_guest_that_ended_on_its_fenced_target_is_removed(nodes: list[TestNode]) -> None:
    a, b, c = nodes
    start(b, "web1", memory_mib=64)
    migration = slowly(b, a, postcopy="at-once")
    until(lambda: phase_of(b, migration) == "postcopy", what="the guest runs on its target")
    lose_power(a)
    assert [each["verdict"] for each in c.do("node.fence", **OFF)["guests"]] == ["crashed"]
    with pytest.raises(OperationFailed, match="ended on node n1 before all of its memory had followed"):
        migration.wait(60)
    assert b.qemu_pids() == []
    assert c.start(tiny_instance(b.root, memory_mib=64))["node"] == "n3"


def test_a_post_copy_guest_whose_target_was_fenced_before_it_ran_there_crashed_where_it_was(
    nodes: list[TestNode],
) -> None:
    """Its QEMU has given it away and never continues it: it starts anew, and nothing is left."""
    a, b, c = nodes
    start(b, "web1", memory_mib=64)
    migration = slowly(b, a, postcopy="if-needed")
    with frozen(a):
        b.do("instance.migrate_tune", name="web1", postcopy_now=True)
        until(lambda: stage_of(b, migration) == "moved", what="it is sent")
        lose_power(a)
    c.do("node.fence", **OFF)
    with pytest.raises(OperationFailed, match="node n1 was fenced"):
        migration.wait(60)
    until(lambda: (row := c.row("web1")) and (row.node, row.state) == ("n2", "crashed"), what="it crashed there")
    assert b.qemu_pids() == []
    assert c.start(tiny_instance(b.root, memory_mib=64))["node"] == "n3"
