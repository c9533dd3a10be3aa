"""Whatever goes wrong in a start, and wherever: nothing is left of it, and the next one succeeds."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import select, text

from models import Instance, Job
from tests.nodes import QEMU, FakeQemu, TestNode, node, tiny_instance, until

pytestmark = pytest.mark.node

IFUP = """\
#!/bin/sh
! [ -e {root}/ifup-fails ]
"""


@pytest.fixture(scope="module")
def undo_node(qemu: None, netns: str) -> Iterator[TestNode]:
    """A node whose QEMU and whose network script fail on demand."""
    with node(prefix=("ip", "netns", "exec", netns), HOSTLER_QEMU_TIMEOUT_S="2") as made:
        program = FakeQemu(made.root)
        script = made.root / "ifup"
        script.write_text(IFUP.format(root=made.root))
        script.chmod(0o755)
        made.environment |= {
            "HOSTLER_QEMU_BINARY": str(program.path),
            "HOSTLER_IFUP": str(script),
            "HOSTLER_IFDOWN": "/bin/true",
        }
        made.start_worker()
        yield made


@pytest.fixture
def n1(undo_node: TestNode) -> Iterator[TestNode]:
    yield undo_node
    undo_node.end_guests()


def bridged(n1: TestNode, name: str) -> dict[str, Any]:
    return tiny_instance(n1.root, name) | {"nics": [{"mac": "52:54:00:00:00:01", "mode": "bridged", "link": "br0"}]}


@contextmanager
def database_refuses(n1: TestNode, event: str, table: str, condition: str = "1") -> Iterator[None]:
    """The node's database refuses one kind of write."""
    trigger = f"CREATE TRIGGER refuse BEFORE {event} ON {table} WHEN {condition} "
    with n1.database().transaction() as session:
        session.execute(text(trigger + "BEGIN SELECT RAISE(ABORT, 'the disk of the database is full'); END"))
    try:
        yield
    finally:
        with n1.database().transaction() as session:
            session.execute(text("DROP TRIGGER refuse"))


@contextmanager
def ifup_fails(n1: TestNode) -> Iterator[None]:
    marker = n1.root / "ifup-fails"
    marker.touch()
    try:
        yield
    finally:
        marker.unlink()


@contextmanager
def ifup_is_no_program(n1: TestNode) -> Iterator[None]:
    script = n1.root / "ifup"
    script.chmod(0o644)
    try:
        yield
    finally:
        script.chmod(0o755)


@contextmanager
def guests_folder_is_a_file(n1: TestNode) -> Iterator[None]:
    guests = n1.root / "run" / "guests"
    with suppress(FileNotFoundError):
        guests.rmdir()
    guests.parent.mkdir(exist_ok=True)
    guests.touch()
    try:
        yield
    finally:
        guests.unlink()


@contextmanager
def qemu_is_no_program(n1: TestNode) -> Iterator[None]:
    program = n1.root / "qemu"
    program.chmod(0o644)
    try:
        yield
    finally:
        program.chmod(0o755)


@contextmanager
def disk_is_locked(n1: TestNode) -> Iterator[None]:
    """Another QEMU, not one of the node's, has the disk open."""
    disk = f"file={n1.root}/locked.img,format=raw"
    argv = [QEMU, "-S", "-display", "none", "-nodefaults", "-machine", "pc", "-drive", disk, "-qmp", "stdio"]
    holder = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout and holder.stdin
        assert b"QMP" in holder.stdout.readline()
        yield
    finally:
        holder.kill()
        holder.communicate()


def qemu(mode: str) -> Callable[[TestNode], Any]:
    @contextmanager
    def misbehaves(n1: TestNode) -> Iterator[None]:
        file = n1.root / "qemu.mode"
        file.write_text(mode)
        try:
            yield
        finally:
            file.write_text("works")

    return misbehaves


def refuses(event: str, table: str, condition: str = "1") -> Callable[[TestNode], Any]:
    return lambda n1: database_refuses(n1, event, table, condition)


def refuses_phase(phase: str) -> Callable[[TestNode], Any]:
    return refuses("UPDATE", "jobs", f"NEW.phase = '{phase}' AND OLD.phase <> '{phase}'")


PHASES = ["validate", "claim", "network", "sockets", "spawn", "greeting", "continue", "record"]

FAULTS = {
    **{f"the database refuses phase {phase}": (refuses_phase(phase), "INTERNAL", "database") for phase in PHASES},
    "claim: the database refuses the instance": (refuses("INSERT", "instances"), "INTERNAL", "database"),
    "claim: the database refuses the runtime": (refuses("INSERT", "runtimes"), "INTERNAL", "database"),
    "claim: the database refuses the disks": (refuses("INSERT", "disk_leases"), "INTERNAL", "database"),
    "network: the database refuses the taps": (
        refuses("UPDATE", "runtimes", "NEW.taps <> OLD.taps"), "INTERNAL", "database",
    ),
    "network: ifup fails": (ifup_fails, "NETWORK_FAILED", "exit code 1"),
    "network: ifup is no program": (ifup_is_no_program, "NETWORK_FAILED", "Permission denied"),
    "sockets: no folder can be made": (guests_folder_is_a_file, "INTERNAL", "guests"),
    "spawn: QEMU is no program": (qemu_is_no_program, "QEMU_FAILED", "Permission denied"),
    "spawn: the database refuses the pid": (
        refuses("UPDATE", "runtimes", "NEW.pid IS NOT NULL"), "INTERNAL", "database",
    ),
    "greeting: QEMU exits": (qemu("exits"), "QEMU_FAILED", "the moon is full"),
    "greeting: QEMU hangs": (qemu("hangs"), "QEMU_FAILED", "did not greet"),
    "greeting: the disk is locked": (disk_is_locked, "QEMU_FAILED", "lock"),
    "continue: QEMU dies": (qemu("dies at cont"), "QMP_LOST", "cont"),
    "continue: QEMU refuses": (qemu("refuses cont"), "QEMU_FAILED", "not today"),
    "record: the database refuses the state": (
        refuses("UPDATE", "instances", "NEW.state = 'running'"), "INTERNAL", "database",
    ),
}  # fmt: skip


TRANSIENT = {fault for fault, (_, code, _said) in FAULTS.items() if code == "QMP_LOST"}
"""Faults that are likely to pass: the job is put off, everything undone meanwhile, and tried again by itself. A
database that refuses a write (the triggers' way) is not one that is away: that job fails."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_start_that_fails_is_undone_and_the_next_one_succeeds(n1: TestNode, fault: str) -> None:
    name = "locked" if fault.endswith("locked") else "web1"
    forget(n1, name)
    fails_and_succeeds(n1, fault, bridged(n1, name), None)


@pytest.mark.parametrize("phase", ["claim", "spawn", "record"])
def test_an_instance_that_ran_before_is_after_a_failed_start_what_it_was(n1: TestNode, phase: str) -> None:
    instance = bridged(n1, "web1")
    n1.start(instance)
    n1.do("instance.stop", name="web1", force=True)
    row = n1.row("web1")
    before = {field: getattr(row, field) for field in ("state", "reason", "spec", "ended_at")}
    fails_and_succeeds(n1, f"the database refuses phase {phase}", instance, before)


def fails_and_succeeds(n1: TestNode, fault: str, instance: dict[str, Any], before: Any) -> None:
    provoke, code, said = FAULTS[fault]
    with provoke(n1):
        job = n1.send("instance.start", instance=instance | {"memory_mib": 24})
        state, error, left, now = until(lambda: after_an_attempt(n1, job.id, instance["name"]))
    if state == "RETRY":
        assert left.pop("instance locks") == [instance["name"]]  # nobody else changes it between the attempts
    assert not left
    assert now == before
    assert error["code"] == code
    assert said in error["message"]
    assert (state == "FAILURE") == (fault not in TRANSIENT)
    view = job.wait(30) if fault in TRANSIENT else n1.start(instance)
    assert view["state"] == "running"
    assert n1.qemu_pids() == [view["pid"]]
    assert len(n1.tap_fds()) == 1


def after_an_attempt(
    n1: TestNode, job_id: str, name: str
) -> tuple[str, dict[str, Any], dict[str, list[str]], Any] | None:
    """State and error of a job that is not at work, what is left of it, and its instance; None while it is."""
    job = job_row(n1, job_id)
    left = n1.leftovers()
    with n1.reading() as session:
        instance = session.get(Instance, name)
        now = (
            {field: getattr(instance, field) for field in ("state", "reason", "spec", "ended_at")} if instance else None
        )
    after = job_row(n1, job_id)
    if job is None or after is None or job.error is None or (job.state, job.attempts) != (after.state, after.attempts):
        return None
    return (job.state, job.error, left, now) if job.state in ("RETRY", "FAILURE") else None


def job_row(n1: TestNode, job_id: str) -> Job | None:
    with n1.reading() as session:
        return session.scalar(select(Job).where(Job.id == job_id))


def forget(n1: TestNode, name: str) -> None:
    with n1.database().transaction() as session:
        session.execute(text("DELETE FROM instances WHERE name = :name"), {"name": name})


def test_a_reboot_that_cannot_start_again_leaves_a_stopped_instance(n1: TestNode) -> None:
    n1.start(bridged(n1, "web1"))
    with qemu("exits")(n1):
        failed = n1.failure("instance.reboot", name="web1", mode="hard")
    assert failed.code == "QEMU_FAILED"
    assert n1.info("web1")["state"] == "stopped"
    assert not n1.leftovers()
    assert n1.start(bridged(n1, "web1"))["state"] == "running"
