"""Guests move between two real nodes: live, paused, stopped, there and back, several at once, and where they cannot."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

import psutil
import pytest
from sqlalchemy import select, update

from hostler.errors import OperationFailed
from models import Incarnation, Instance, Job, LiveMigration, UidLease
from tests.faults.promises import Sent
from tests.node.test_network import PORT, Network
from tests.nodes import TestNode, tiny_instance, until
from tests.pairs import (
    FORGIVING_S,
    SLOW_MIB_S,
    Site,
    end_guests,
    frozen,
    hurry,
    in_order,
    migrate,
    pair,
    phase_of,
    slowly,
    stage_of,
    ticks_on,
    two_sites,
)
from tests.services import missing
from worker.network import scripts
from worker.operations.ledger import ATTEMPTS_MAX

pytestmark = pytest.mark.node


@pytest.fixture(scope="module")
def shared_pair(qemu: None) -> Iterator[list[TestNode]]:
    with pair() as nodes:
        yield nodes


@pytest.fixture
def both(shared_pair: list[TestNode]) -> Iterator[list[TestNode]]:
    """Two nodes with workers. Whatever a test does, both are in order after it, and nothing is left."""
    yield shared_pair
    assert in_order(shared_pair) == []
    end_guests(shared_pair)


@pytest.fixture
def far_apart(qemu: None, tmp_path: Path) -> Iterator[tuple[list[TestNode], list[Site]]]:
    """Two nodes in networks of their own. The folder ``private`` of the first is another, empty one on the second."""
    if os.geteuid() != 0:
        missing("A network namespace", "needs root")
    with two_sites() as sites, pair(sites=sites, start=False) as nodes:
        private = nodes[0].root / "private"
        private.mkdir()
        hide = f'mount -t tmpfs none {private} && exec "$@"'
        nodes[1].prefix = (*nodes[1].prefix, "sh", "-c", hide, "sh")
        for node in nodes:
            node.start_worker()
        yield nodes, sites
        assert in_order(nodes) == []
        end_guests(nodes)


def booted(node: TestNode, name: str = "web1", **more: Any) -> int:
    """A guest that has begun to count, and how far it was."""
    node.start(tiny_instance(node.root, name, **more))
    with node.serial(name) as serial:
        return serial.tick()


def refused(source: TestNode, **arguments: Any) -> OperationFailed:
    """A migration that must fail, after which the guest runs on where it was and the target has nothing of it."""
    with source.serial("web1") as serial:
        before = serial.tick()
    failed = source.failure("instance.migrate", **{"name": "web1"} | arguments)
    assert source.info("web1")["state"] == "running"
    assert ticks_on(source, "web1", before) > before
    return failed


def test_a_guest_moves_and_its_counter_goes_on(both: list[TestNode]) -> None:
    a, b = both
    before = booted(a)
    report = migrate(a, b)
    assert ticks_on(b, "web1", before) < before + 200
    assert (report["node"], report["state"], report["kind"]) == ("n2", "running", "live")
    assert report["transferred_bytes"] > 0 and report["downtime_seen_ms"] > 0
    view = b.info("web1")
    assert (view["node"], view["state"]) == ("n2", "running")
    assert a.qemu_pids() == []


def test_a_report_compares_with_a_prediction_for_the_same_limits_alone(both: list[TestNode]) -> None:
    a, b = both
    booted(a)
    foretold = migrate(a, b, dry_run=True, sample_s=0.1, downtime_ms=500)["prediction"]
    migrate(a, b, dry_run=True, sample_s=0.1, bandwidth_mib_s=8)
    assert migrate(a, b, downtime_ms=500)["prediction"] == foretold


def test_the_log_of_the_source_says_that_a_guest_moved(both: list[TestNode]) -> None:
    a, b = both
    booted(a)
    began = a.log_path.stat().st_size
    migrate(a, b)
    said = a.log_path.read_bytes()[began:].decode()
    assert "it moved to node n2" in said and "stopped by force" not in said


def test_a_failure_says_in_which_phase(both: list[TestNode]) -> None:
    a, b = both
    before = booted(a)
    job = slowly(a, b, deadline_s=0.1)
    with pytest.raises(OperationFailed) as failed:
        job.wait(30)
    assert (failed.value.code, failed.value.details["phase"]) == ("MIGRATION_FAILED", "transfer")
    assert failed.value.details["migration_id"] == job.id
    job = slowly(a, b)
    with frozen(b):
        hurry(a)
        until(lambda: stage_of(a, job) == "moved", what="the target has all")
        for pid in b.qemu_pids():
            os.kill(pid, SIGKILL)
    with pytest.raises(OperationFailed) as failed:
        job.wait(30)
    assert (failed.value.code, failed.value.details["phase"]) == ("MIGRATION_FAILED", "finalize")
    assert ticks_on(a, "web1", before) > before


def test_it_goes_there_and_back_many_times(both: list[TestNode]) -> None:
    a, b = both
    count = booted(a)
    for source, target in ((a, b), (b, a)) * 3:
        migrate(source, target)
        count = ticks_on(target, "web1", count)


def test_a_paused_guest_arrives_paused(both: list[TestNode]) -> None:
    a, b = both
    before = booted(a)
    a.do("instance.pause", name="web1")
    assert migrate(a, b)["state"] == "paused"
    assert "paused" in b.monitor("web1", "info status")
    b.do("instance.resume", name="web1")
    assert ticks_on(b, "web1", before) > before


def test_without_live_it_stands_still_meanwhile_and_then_goes_on(both: list[TestNode]) -> None:
    a, b = both
    before = booted(a)
    report = migrate(a, b, live=False)
    assert (report["kind"], report["state"]) == ("non-live", "running")
    assert ticks_on(b, "web1", before) > before


@pytest.mark.parametrize("options", [
    {"postcopy": "at-once", "bandwidth_mib_s": 0.2}, {"multifd_channels": 2, "compression": "zlib"},
    {"xbzrle": True}, {"auto_converge": True},
])  # fmt: skip
def test_every_way_of_sending_brings_it_along(both: list[TestNode], options: dict[str, Any]) -> None:
    a, b = both
    before = booted(a)
    report = migrate(a, b, **options)
    assert report["postcopy"] is ("postcopy" in options)
    assert ticks_on(b, "web1", before) > before


def test_a_stopped_instance_changes_its_owner(both: list[TestNode]) -> None:
    a, b = both
    booted(a)
    a.do("instance.stop", name="web1", force=True)
    report = migrate(a, b)
    assert (report["kind"], report["state"], report["node"]) == ("cold", "stopped", "n2")
    assert b.info("web1")["state"] == "stopped"
    assert a.failure("instance.info", name="web1").details["node"] == "n2"
    booted(b)


def test_a_target_that_nobody_knows_or_that_is_the_source(both: list[TestNode]) -> None:
    a, _ = both
    booted(a)
    for target, reason in (("n9", "no node 'n9'"), ("n1", "already")):
        failed = refused(a, target=target)
        assert failed.code == "INVALID_ARGUMENT"
        assert (failed.details["errors"][0]["field"], reason in failed.message) == ("target", True)


def test_a_target_without_a_worker(both: list[TestNode]) -> None:
    a, b = both
    booted(a)
    b.kill_worker(SIGTERM)
    try:
        failed = refused(a, target="n2")
        assert (failed.code, "no worker" in failed.message) == ("INVALID_ARGUMENT", True)
    finally:
        b.start_worker()


def test_what_the_target_lacks_is_named_and_nothing_is_touched(far_apart: tuple[list[TestNode], list[Site]]) -> None:
    (a, _b), (there, _) = far_apart
    there.ip("link", "add", "only", "type", "bridge")
    nic = {"mac": "52:54:00:00:00:01", "mode": "bridged", "link": "only"}
    a.start(tiny_instance(a.root / "private", nics=[nic]))
    failed = refused(a, target="n2")
    assert failed.code == "INVALID_ARGUMENT"
    reasons = {error["field"]: error["reason"] for error in failed.details["errors"]}
    assert {*reasons} == {"instance.nics[0].link", "instance.disks[0].path"}
    assert all("(node n2)" in reason for reason in reasons.values())


def test_another_file_of_the_same_name_is_no_shared_disk(far_apart: tuple[list[TestNode], list[Site]]) -> None:
    (a, b), _ = far_apart
    instance = tiny_instance(a.root / "private")
    a.start(instance)
    path = instance["disks"][0]["path"]
    seen_there = Path(f"/proc/{b.worker.pid}/root{path}")  # type: ignore[union-attr]
    seen_there.write_bytes(Path(path).read_bytes())
    failed = refused(a, target="n2")
    assert failed.details["errors"][0]["field"] == "disks[0].path"
    assert "another file" in failed.message
    assert sorted(seen_there.parent.iterdir()) == [seen_there]


def test_cards_are_connected_before_and_disconnected_after(far_apart: tuple[list[TestNode], list[Site]]) -> None:
    (a, b), sites = far_apart
    for node, site in zip((a, b), sites, strict=True):
        site.ip("link", "add", "br0", "type", "bridge")
        site.ip("link", "set", "br0", "up")
        for name in ("ifup", "ifdown"):
            script = node.root / name
            script.write_text(f'#!/bin/sh\necho "$(date +%s%N) {name} $INSTANCE {node.name}" >>{a.root}/calls\n'
                              f'exec {scripts.shipped(name)} "$@"\n')  # fmt: skip
            script.chmod(0o755)
            node.environment[f"HOSTLER_{name.upper()}"] = str(script)
        node.restart_worker()
    there, here = Network(sites[0].netns), Network(sites[1].netns)
    a.start(tiny_instance(a.root, nics=[PORT]))
    migrate(a, b)
    assert there.ports() == [] and there.ip("link", "show", "type", "tun") == []
    assert here.ports() == [b.info("web1")["nics"][0]["tap"]]
    called = [line.split()[1:] for line in sorted((a.root / "calls").read_text().splitlines())]
    assert called == [["ifup", "web1", "n1"], ["ifup", "web1", "n2"], ["ifdown", "web1", "n1"]]


def test_a_guest_with_too_much_memory_for_the_target(both: list[TestNode]) -> None:
    a, _ = both
    memory = psutil.virtual_memory()
    booted(a, memory_mib=(memory.available + memory.total) // 2 // 2**20)
    failed = refused(a, target="n2")
    assert (failed.code, failed.details["errors"][0]["field"]) == ("INVALID_ARGUMENT", "target")
    assert "MiB free" in failed.message


def test_two_guests_come_to_one_node_at_once(both: list[TestNode]) -> None:
    a, b = both
    counts = {name: booted(a, name) for name in ("web1", "web2")}
    jobs = [slowly(a, b, name) for name in counts]
    for name in counts:
        hurry(a, name)
    for job in jobs:
        assert job.wait(60)["node"] == "n2"
    for name, count in counts.items():
        assert ticks_on(b, name, count) > count


def test_guests_move_in_opposite_directions_at_once(both: list[TestNode]) -> None:
    a, b = both
    there, back = booted(a, "web1"), booted(b, "web2")
    jobs = [slowly(a, b, "web1"), slowly(b, a, "web2")]
    hurry(a, "web1")
    hurry(b, "web2")
    assert [job.wait(60)["node"] for job in jobs] == ["n2", "n1"]
    assert ticks_on(b, "web1", there) > there
    assert ticks_on(a, "web2", back) > back


def test_other_jobs_of_the_instance_wait_and_learn_where_it_is(both: list[TestNode]) -> None:
    a, b = both
    booted(a)
    job = slowly(a, b)
    old, new = a.send("instance.pause", name="web1"), b.send("instance.pause", name="web1")
    until(lambda: states_of(a, old, new) == ["WAITING", "WAITING"], what="both wait")
    hurry(a)
    job.wait(60)
    with pytest.raises(OperationFailed) as failed:
        old.wait(30)
    assert (failed.value.code, failed.value.details["node"]) == ("UNKNOWN_INSTANCE", "n2")
    assert new.wait(30)["state"] == "paused"
    assert in_order(both, Sent(job.id), Sent(old.id, frozenset({"UNKNOWN_INSTANCE"})), Sent(new.id)) == []


def test_it_is_one_job_in_which_either_node_is_seen_to_act(both: list[TestNode]) -> None:
    a, b = both
    booted(a)
    seen: list[dict[str, Any]] = []
    job = slowly(a, b)
    hurry(a)
    report = job.wait(60, seen.append)
    told = a.do("migration.report", id=job.id)
    assert (told["stage"], told["report"]) == ("done", report)
    assert len(told["samples"]) == report["samples"] > 0
    percents = [each["percent"] for each in seen]
    assert percents == sorted(percents)
    assert {each["node"] for each in seen} == {"n1", "n2"}
    phases = phases_of(a, "web1")
    assert [*dict.fromkeys(phases)] == ["check", "accept", "setup", "transfer", "finalize", "clean"]


def test_the_four_steps_driven_by_a_program_that_has_celery_alone(both: list[TestNode], tmp_path: Path) -> None:
    a, b = both
    before = booted(a)
    file = tmp_path / "master.py"
    file.write_text(MASTER)
    argv = [sys.executable, "-I", str(file), a.settings.effective_broker_url]
    done = subprocess.run(argv, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["node"] == "n2"
    assert ticks_on(b, "web1", before) > before


def test_a_master_that_gives_up_between_two_steps_leaves_nothing(both: list[TestNode]) -> None:
    a, b = both
    before = booted(a)
    info = a.do("migration.info", name="web1", target="n2")
    b.do("migration.accept", info=info)
    assert b.do("migration.finalize", migration_id=info["migration_id"], success=False)["removed"]
    assert a.failure("migration.run", name="web1", accepted=info).code == "MIGRATION_FAILED"
    assert ticks_on(a, "web1", before) > before


def test_an_accept_that_failed_is_over_when_its_master_gives_up(both: list[TestNode]) -> None:
    a, b = both
    with socket.create_server(("127.0.0.1", 0)) as taken:
        before = booted(a, hvparams={"migration_port": taken.getsockname()[1]})
        info = a.do("migration.info", name="web1", target="n2")
        assert b.failure("migration.accept", info=info).code == "MIGRATION_FAILED"
    b.do("migration.finalize", migration_id=info["migration_id"], success=False)
    assert a.do("migration.report", id=info["migration_id"])["stage"] == "done"
    assert "given up" in a.failure("migration.run", name="web1", accepted=info).message
    assert b.failure("migration.accept", info=info).code == "MIGRATION_FAILED"
    assert ticks_on(a, "web1", before) > before
    assert in_order(both) == []


def test_a_step_that_died_too_often_while_it_sent_memory_leaves_nothing(both: list[TestNode]) -> None:
    a, b = both
    before = booted(a)
    info = a.do("migration.info", name="web1", target="n2", bandwidth_mib_s=SLOW_MIB_S)
    run = a.send("migration.run", name="web1", accepted=b.do("migration.accept", info=info))
    until(lambda: phase_of(a, run) == "transfer", what="memory is on its way")
    with a.database().transaction() as session:
        session.execute(update(Job).where(Job.id == run.id).values(attempts=2 * ATTEMPTS_MAX))
    a.restart_worker()
    with pytest.raises(OperationFailed):
        run.wait(60)
    until(lambda: a.do("migration.report", id=info["migration_id"])["stage"] == "done", FORGIVING_S)
    until(lambda: not b.qemu_pids(), FORGIVING_S, what="nothing waits on the target")
    assert ticks_on(a, "web1", before) > before
    assert in_order(both, Sent(run.id, frozenset({"MIGRATION_FAILED", "INTERNAL"}))) == []
    assert migrate(a, b)["node"] == "n2"


def test_an_earlier_migration_of_a_master_that_failed_never_continues_a_guest_that_a_later_one_moved(
    both: list[TestNode],
) -> None:
    a, b = both
    before = booted(a)
    earlier = a.do("migration.info", name="web1", target="n2", bandwidth_mib_s=SLOW_MIB_S)
    run = a.send("migration.run", name="web1", accepted=b.do("migration.accept", info=earlier))
    until(lambda: phase_of(a, run) == "transfer", what="memory is on its way")
    run.cancel()
    with pytest.raises(OperationFailed):
        run.wait(60)
    assert a.do("migration.report", id=earlier["migration_id"])["stage"] == "done"
    with a.database().transaction() as session:  # as a worker leaves it that dies too often just before
        session.get_one(LiveMigration, earlier["migration_id"]).stage = "aborted"
    later = a.do("migration.info", name="web1", target="n2")
    a.do("migration.run", name="web1", accepted=b.do("migration.accept", info=later))
    sweeps = heartbeat_of(a)
    until(lambda: heartbeat_of(a) > sweeps, FORGIVING_S, what="a heartbeat")
    sweeps = heartbeat_of(a)
    until(lambda: heartbeat_of(a) > sweeps, FORGIVING_S, what="another one, so that the first has swept")
    assert a.do("migration.report", id=earlier["migration_id"])["stage"] == "aborted"
    with a.reading() as session:
        assert session.get_one(Instance, "web1").node == "n2"
    b.do("migration.finalize", migration_id=later["migration_id"], success=True)
    assert ticks_on(b, "web1", before) > before
    until(lambda: not a.qemu_pids(), FORGIVING_S, what="the source's QEMU is gone")


def heartbeat_of(node: TestNode) -> datetime:
    """The last sign of life of a node's worker."""
    with node.reading() as session:
        return session.scalars(
            select(Incarnation.heartbeat_at).where(Incarnation.node == node.name, Incarnation.ended_at.is_(None))
        ).one()


def test_the_source_s_uid_is_free_again(both: list[TestNode]) -> None:
    a, b = both
    for node, ranges in ((a, "20000-20003"), (b, "20100-20103")):
        node.do("uid_pool.add", ranges=ranges)
    before = booted(a, hvparams={"security_model": "pool"})
    migrate(a, b)
    with a.reading() as session:
        leased = session.scalars(select(UidLease).where(UidLease.instance_name == "web1")).all()
    assert [lease.node for lease in leased if not lease.released_at] == ["n2"]
    assert psutil.Process(b.pid("web1")).uids().real == leased[0].uid
    assert ticks_on(b, "web1", before) > before


MASTER = """\
import json, sys
from celery import Celery

url = sys.argv[1]
app = Celery("master", broker=url, backend=url)

def run(task, queue, **kwargs):
    return app.send_task(task, kwargs=kwargs, queue=queue).get(timeout=60)

info = run("migration.info", "node.n1", name="web1", target="n2")
accepted = run("migration.accept", "node.n2", info=info)
run("migration.run", "node.n1", name="web1", accepted=accepted)
print(json.dumps(run("migration.finalize", "node.n2", migration_id=info["migration_id"])))
"""


def phases_of(node: TestNode, name: str) -> list[str]:
    """The phases of the latest migration of a guest."""
    query = select(Job.phases).join(LiveMigration, LiveMigration.job_id == Job.id)
    with node.reading() as session:
        latest = session.scalars(query.where(LiveMigration.instance_name == name).order_by(Job.sequence.desc())).first()
    return [entry["phase"] for entry in latest or []]


def states_of(node: TestNode, *jobs: Any) -> list[str]:
    with node.reading() as session:
        found = {row.id: row.state for row in session.scalars(select(Job).where(Job.id.in_([job.id for job in jobs])))}
    return [found.get(job.id, "") for job in jobs]
