"""The audit shows what leaked, with evidence; a repair repairs it; what is in motion or in order is no finding."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, insert, select, update

from hostler.errors import OperationFailed
from models import Base, DiskLease, Incarnation, Instance, InstanceLock, Job, Runtime
from tests.nodes import QEMU, FakeQemu, TestNode, node, tiny_instance, until

pytestmark = pytest.mark.node


@pytest.fixture
def n1(n1: TestNode) -> Iterator[TestNode]:
    """The module's node; every test ends with a clean audit once its guests are gone."""
    yield n1
    n1.end_guests()
    assert audit(n1) == []
    for path in n1.root.glob("*.iso"):
        path.unlink()


def audit(n1: TestNode) -> list[dict[str, Any]]:
    return list(n1.do("node.audit")["findings"])


def the_finding(n1: TestNode, finding_id: str | None = None) -> dict[str, Any]:
    """The one finding there is, or of several the one of this id."""
    found = {finding["id"]: finding for finding in audit(n1)}
    if finding_id is None:
        assert len(found) == 1, found
        return next(iter(found.values()))
    assert finding_id in found
    return found[finding_id]


def repaired(n1: TestNode, finding: dict[str, Any]) -> None:
    """A dry run changes nothing; the repair that the finding names makes it go."""
    dry = n1.do("node.repair", ids=[finding["id"]])
    assert dry == {"done": [], "would_do": [{"id": finding["id"], "what": finding["explanation"]}], "left": []}
    assert the_finding(n1, finding["id"]) == finding
    done = n1.do(finding["repair"]["task"], **finding["repair"]["arguments"])
    if finding["repair"]["task"] == "node.repair":
        assert [item["id"] for item in done["done"]] == [finding["id"]], done
    assert finding["id"] not in [other["id"] for other in audit(n1)]


def change(n1: TestNode, *statements: Any) -> None:
    """Change the node's database behind its worker's back."""
    with n1.database().transaction() as session:
        for statement in statements:
            session.execute(statement)


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_a_node_in_order_has_no_findings(n1: TestNode) -> None:
    n1.start(tiny_instance(n1.root))
    result = n1.do("node.audit")
    assert result["findings"] == []
    assert result["node"] == "n1"
    checked = result["checked"]
    assert (checked["processes"], checked["folders"], checked["runtimes"], checked["disk_leases"]) == (1, 1, 1, 1)


def test_a_qemu_whose_rows_are_gone_is_ended_only_when_its_id_is_named(n1: TestNode) -> None:
    view = n1.start(tiny_instance(n1.root))
    change(n1, delete(DiskLease), delete(Runtime), delete(Instance))
    finding = the_finding(n1)
    assert finding["kind"] == "process"
    assert (finding["evidence"]["pid"], finding["evidence"]["uuid"]) == (view["pid"], view["uuid"])
    assert finding["evidence"]["journal"] == f"{view['run_dir']}/journal"
    left = n1.do("node.repair", dry_run=False)["left"]
    assert "name its id" in left[0]["why"]
    assert alive(view["pid"])
    repaired(n1, finding)
    assert not alive(view["pid"])
    assert not Path(view["run_dir"]).exists()


@pytest.fixture
def strange_qemu(n1: TestNode) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A QEMU started by hand, its journal where the node's guests have theirs."""
    name = str(uuid.uuid4())
    folder = n1.root / "run" / "guests" / name
    folder.mkdir(parents=True)
    argv = [QEMU, "-S", "-display", "none", "-nodefaults", "-machine", "none", "-name", "strange", "-uuid", name]
    with (folder / "journal").open("wb") as journal:
        process = subprocess.Popen([*argv, "-qmp", "stdio"], stdin=subprocess.PIPE, stdout=journal)
    until((folder / "journal").read_bytes, what="it has said something")
    yield process, name
    process.kill()
    process.communicate()
    shutil.rmtree(folder, ignore_errors=True)


def test_a_qemu_started_by_hand_is_reported_and_not_touched_unless_named(
    n1: TestNode, strange_qemu: tuple[subprocess.Popen[bytes], str]
) -> None:
    process, name = strange_qemu
    finding = the_finding(n1)
    assert finding["kind"] == "process"
    assert finding["instance"] == "strange"
    assert (finding["evidence"]["pid"], finding["evidence"]["uuid"]) == (process.pid, name)
    n1.restart_worker()
    assert the_finding(n1) == finding
    assert process.poll() is None
    repaired(n1, finding)
    assert process.wait(10) is not None


def test_a_folder_that_was_left_is_removed(n1: TestNode) -> None:
    folder = n1.root / "run" / "guests" / str(uuid.uuid4())
    folder.mkdir(parents=True)
    (folder / "qemu.log").touch()
    finding = the_finding(n1)
    assert finding["id"] == f"folder:{folder.name}"
    assert finding["evidence"] == {"path": str(folder), "entries": ["qemu.log"]}
    repaired(n1, finding)
    assert not folder.exists()


def test_a_guest_killed_without_a_worker_and_without_its_folder_leaves_nothing(n1: TestNode) -> None:
    view = n1.start(tiny_instance(n1.root))
    n1.kill_worker()
    os.kill(view["pid"], signal.SIGKILL)
    until(lambda: not n1.qemu_pids())
    shutil.rmtree(view["run_dir"])
    n1.start_worker()
    assert audit(n1) == []
    assert n1.info("web1")["state"] == "crashed"


def test_a_running_guest_whose_folder_was_deleted_is_reported_and_left_alone(n1: TestNode) -> None:
    view = n1.start(tiny_instance(n1.root))
    shutil.rmtree(view["run_dir"])
    finding = the_finding(n1)
    assert (finding["id"], finding["repair"]) == ("guest_folder:web1", None)
    assert {"qmp", "journal"} <= {*finding["evidence"]["missing"]}
    left = n1.do("node.repair", ids=[finding["id"]], dry_run=False)["left"]
    assert [item["id"] for item in left] == [finding["id"]]
    assert alive(view["pid"])


def test_a_guest_that_the_worker_does_not_watch_is_adopted(n1: TestNode) -> None:
    view = n1.start(tiny_instance(n1.root))
    runtime = row_of(n1, Runtime)
    n1.kill_worker()
    change(n1, delete(DiskLease), delete(Runtime))
    n1.start_worker()
    change(n1, insert(Runtime).values(runtime), update(Instance).values(state="unknown"))
    finding = the_finding(n1, "unwatched:web1")
    assert finding["evidence"]["pid"] == view["pid"]
    repaired(n1, finding)
    repaired(n1, the_finding(n1, "missing_lease:web1"))
    assert n1.info("web1") | {"started_at": None} == view | {"started_at": None}
    second = tiny_instance(n1.root, "web2", disks=[{"path": str(n1.root / "web1.img")}])
    assert "in use by instance web1" in n1.failure("instance.start", instance=second).message
    assert n1.do("instance.stop", name="web1", on_timeout="fail")["how"] == "guest_shutdown"


@pytest.mark.parametrize("inserted", [True, False], ids=["inserted later", "there from the start"])
def test_a_cd_that_is_not_kept_from_others_is_a_finding_and_is_kept_again(n1: TestNode, inserted: bool) -> None:
    cd = n1.root / "cd.iso"
    cd.write_bytes(bytes(2**20))
    (n1.root / "same.iso").symlink_to(cd)
    at_first = {"cdrom_drive": True} if inserted else {"cdrom_image_path": str(cd)}
    n1.start(tiny_instance(n1.root, hvparams=at_first | {"cdrom2_image_path": str(n1.root / "same.iso")}))
    if inserted:
        n1.do("instance.cd_insert", name="web1", path=str(cd))
    assert audit(n1) == []  # two names of one file have one lease
    change(n1, delete(DiskLease).where(DiskLease.path.like("%.iso")))
    finding = the_finding(n1, "missing_lease:web1")
    assert finding["evidence"]["paths"] == [str(cd), str(n1.root / "same.iso")]
    repaired(n1, finding)
    writer = tiny_instance(n1.root, "web2", disks=[{"path": str(cd)}])
    assert "in use by instance web1" in n1.failure("instance.start", instance=writer).message
    assert audit(n1) == []


def row_of(n1: TestNode, model: type[Base]) -> dict[str, Any]:
    with n1.reading() as session:
        return dict(session.execute(select(model.__table__)).mappings().one())


def test_a_runtime_without_a_qemu_is_cleaned_up(n1: TestNode) -> None:
    n1.start(tiny_instance(n1.root))
    runtime, instance = row_of(n1, Runtime), row_of(n1, Instance)
    n1.do("instance.stop", name="web1", force=True)
    change(n1, insert(Runtime).values(runtime), update(Instance).values(state=instance["state"]))
    finding = the_finding(n1)
    assert (finding["id"], finding["evidence"]["pid"]) == ("dead_runtime:web1", runtime["pid"])
    assert finding["repair"] == {"task": "instance.cleanup", "arguments": {"name": "web1"}}
    repaired(n1, finding)
    assert n1.start(tiny_instance(n1.root))["state"] == "running"


@pytest.mark.parametrize("state", ["running", "starting"])
def test_an_instance_that_is_said_to_run_without_a_runtime_is_stopped(n1: TestNode, state: str) -> None:
    n1.start(tiny_instance(n1.root))
    n1.do("instance.stop", name="web1", force=True)
    change(n1, update(Instance).values(state=state))
    finding = the_finding(n1)
    assert (finding["id"], finding["evidence"]) == ("state:web1", {"state": state, "runtime": None})
    repaired(n1, finding)
    assert n1.info("web1")["state"] == "stopped"


@pytest.mark.parametrize("state", ["stopped", "stopping"])
def test_an_instance_that_runs_but_is_said_not_to_is_seen_as_it_is(n1: TestNode, state: str) -> None:
    view = n1.start(tiny_instance(n1.root))
    change(n1, update(Instance).values(state=state))
    finding = the_finding(n1)
    assert (finding["id"], finding["evidence"]["pid"]) == ("state:web1", view["pid"])
    repaired(n1, finding)
    assert n1.info("web1") == view


def test_an_instance_locked_by_a_job_that_has_ended_is_freed_and_the_next_job_runs(n1: TestNode) -> None:
    start = n1.send("instance.start", instance=tiny_instance(n1.root))
    start.wait(30)
    change(n1, insert(InstanceLock).values(instance_name="web1", job_id=start.id, node="n1"))
    stop = n1.send("instance.stop", name="web1", force=True)
    until(lambda: stop.state == "WAITING")
    finding = the_finding(n1)
    assert (finding["id"], finding["evidence"]["job"]) == ("lock:web1", start.id)
    repaired(n1, finding)
    assert stop.wait(30)["how"] == "killed"


def test_a_job_whose_worker_is_dead_is_carried_on(n1: TestNode) -> None:
    job_id = str(uuid.uuid4())
    dead = Incarnation(id=str(uuid.uuid4()), node="n1", pid=1, start_ticks=1, boot_id="x", version="0")
    with n1.database().transaction() as session:
        session.add(dead)
        session.flush()
        arguments = {"instance": tiny_instance(n1.root)}
        lost = Job(id=job_id, node="n1", task="instance.start", instance_name="web1", arguments=arguments, attempts=1)
        lost.state, lost.claimed_by = "STARTED", dead.id
        session.add_all([lost, InstanceLock(instance_name="web1", job_id=job_id, node="n1")])
    finding = the_finding(n1)
    assert (finding["id"], finding["evidence"]["claimed_by"]) == (f"job:{job_id}", dead.id)
    repaired(n1, finding)
    assert n1.client().job(job_id).wait(30)["state"] == "running"


def test_what_a_job_is_at_work_on_is_no_finding_and_is_left(n1: TestNode) -> None:
    n1.start(tiny_instance(n1.root), paused=True)
    stop = n1.send("instance.stop", name="web1", force=False, timeout_s=60)
    n1.until_state("web1", "stopping")
    change(n1, delete(DiskLease))
    result = n1.do("node.audit")
    assert result["findings"] == []
    assert result["in_motion"] == {"web1": stop.id}
    (left,) = n1.do("node.repair", ids=["missing_lease:web1"], dry_run=False)["left"]
    assert f"web1 is held by job {stop.id}" in left["why"]
    assert stop.cancel()["outcome"] in ("requested", "too_late")


def test_a_tap_that_is_not_on_record_or_was_deleted_under_its_guest_is_reported(netns: str, qemu: None) -> None:
    prefix = ("ip", "netns", "exec", netns)
    with node(prefix=prefix, HOSTLER_IFUP="/bin/true", HOSTLER_IFDOWN="/bin/true") as made:
        made.start_worker()
        instance = tiny_instance(made.root)
        instance["nics"] = [{"mac": "52:54:00:00:00:01", "mode": "bridged", "link": "br0"}]
        view = made.start(instance)
        assert audit(made) == []
        tap = view["nics"][0]["tap"]
        recorded = row_of(made, Runtime)["taps"]
        change(made, update(Runtime).values(taps=[]))
        assert "which the database does not say" in the_finding(made, f"guest_tap:web1/{tap}")["explanation"]
        change(made, update(Runtime).values(taps=recorded))
        subprocess.run([*prefix, "ip", "link", "delete", tap], check=True)
        finding = the_finding(made)
        assert (finding["id"], finding["repair"]) == (f"guest_tap:web1/{tap}", None)
        assert alive(view["pid"])
        made.do("instance.stop", name="web1", force=True)
        assert audit(made) == []


def test_guests_that_come_and_go_while_audits_run_all_the_time_are_no_findings(n1: TestNode) -> None:
    found: list[dict[str, Any]] = []
    over = threading.Event()

    def come_and_go(name: str) -> None:
        for _ in range(4):
            n1.start(tiny_instance(n1.root, name))
            n1.do("instance.stop", name=name, force=True)

    def watch() -> int:
        audits = 0
        while not over.is_set():
            found.extend(audit(n1))
            audits += 1
        return audits

    with ThreadPoolExecutor() as threads:
        watching = threads.submit(watch)
        try:
            list(threads.map(come_and_go, [f"web{number}" for number in range(5)]))
        finally:
            over.set()
        assert watching.result() > 1
    assert found == []


BAD_STARTS = ["exits", "hangs", "talks garbage", "greets and dies", "dies at cont", "refuses cont"]


def test_the_audit_is_clean_after_every_kind_of_failed_start(netns: str, qemu: None) -> None:
    with node(prefix=("ip", "netns", "exec", netns), HOSTLER_QEMU_TIMEOUT_S="1") as made:
        program, script = FakeQemu(made.root), made.root / "ifup"
        script.write_text(f"#!/bin/sh\n! [ -e {made.root}/ifup-fails ]\n")
        script.chmod(0o755)
        made.environment |= {"HOSTLER_QEMU_BINARY": str(program.path), "HOSTLER_IFUP": str(script)}
        made.environment |= {"HOSTLER_IFDOWN": "/bin/true"}
        made.start_worker()
        instance = tiny_instance(made.root)
        instance["nics"] = [{"mac": "52:54:00:00:00:01", "mode": "bridged", "link": "br0"}]
        for mode in BAD_STARTS:
            program.mode = mode
            fails(made, instance)
            assert audit(made) == [], mode
        (made.root / "ifup-fails").touch()
        fails(made, instance)
        (made.root / "ifup-fails").unlink()
        assert audit(made) == []
        program.mode = "hangs"
        fails(made, instance, cancel_in="greeting")
        assert audit(made) == []


def fails(n1: TestNode, instance: dict[str, Any], cancel_in: str = "") -> None:
    """Start what cannot be started; cancel it in a phase, or where it would be tried again."""
    job = n1.send("instance.start", instance=instance)
    until(lambda: job.state in ("FAILURE", "RETRY") or (job.progress or {}).get("phase") == cancel_in)
    if job.state != "FAILURE":
        assert audit(n1) == []
        job.cancel()
    with pytest.raises(OperationFailed):
        job.wait(30)


def test_a_person_sees_findings_and_repairs_them(n1: TestNode) -> None:
    clean = n1.cli("audit")
    assert (clean.returncode, clean.stdout.split(".")[0]) == (0, "Database and host agree on n1")
    folder = n1.root / "run" / "guests" / str(uuid.uuid4())
    folder.mkdir(parents=True)
    shown = n1.cli("audit")
    assert shown.returncode == 1
    assert f"hostler audit -n n1 --repair folder:{folder.name} --yes" in shown.stdout
    assert n1.cli_json("audit")["findings"][0]["subject"] == folder.name
    dry = n1.cli("audit", "--repair-all")
    assert (dry.returncode, dry.stdout.split(":")[0]) == (1, "would repair folder")
    assert folder.exists()
    done = n1.cli("audit", "--repair", f"folder:{folder.name}", "--yes")
    assert (done.returncode, done.stdout.split(":")[0]) == (0, "repaired folder")
    gone = n1.cli("audit", "--repair", f"folder:{folder.name}", "--yes")
    assert gone.returncode == 1
    assert "there is no such finding now" in gone.stdout


def test_the_worker_itself_warns_of_what_it_finds(new_node: TestNode) -> None:
    folder = new_node.root / "run" / "guests" / str(uuid.uuid4())
    folder.mkdir(parents=True)
    new_node.start_worker()
    until(lambda: f"folder:{folder.name}" in new_node.log_path.read_text(), what="a warning in the log")
    assert folder.exists()


@pytest.mark.parametrize("arguments", [["--yes"], ["--repair", "x:y", "--repair-all"]])
def test_wrong_usage_of_audit_sends_nothing(new_node: TestNode, arguments: list[str]) -> None:
    assert new_node.cli("audit", *arguments).returncode == 2
