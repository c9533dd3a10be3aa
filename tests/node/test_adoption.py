"""The worker is disposable: guests and jobs survive its death, at whatever moment it dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from hostler import embedded
from tests.nodes import FakeQemu, Serial, TestNode, node, tiny_instance, until
from tests.services import postgresql_database
from worker.kvm.tiny_guest import IGNORE_KEY, IGNORING_MESSAGE, POWER_OFF_KEY

pytestmark = pytest.mark.node


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
def test_a_guest_outlives_its_worker_and_the_next_one_controls_it(n1: TestNode, paused: bool) -> None:
    view = n1.start(tiny_instance(n1.root), paused=paused)
    n1.restart_worker()
    after = n1.info("web1")
    assert after == view
    if paused:
        with n1.serial("web1") as serial:
            assert serial.is_silent_for(0.3)
        assert n1.do("instance.resume", name="web1")["state"] == "running"
    with n1.serial("web1") as serial:
        serial.tick()
    stopped = n1.do("instance.stop", name="web1", on_timeout="fail")
    assert (stopped["state"], stopped["how"]) == ("stopped", "guest_shutdown")
    n1.nothing_is_left()


def test_a_running_guest_never_notices_that_its_worker_dies(n1: TestNode) -> None:
    n1.start(tiny_instance(n1.root))
    with n1.serial("web1") as serial:
        ticks = [serial.tick(), serial.tick()]
        n1.kill_worker()
        ticks += [serial.tick() for _ in range(3)]
        n1.start_worker()
        ticks += [serial.tick() for _ in range(3)]
        while ticks[-1] < ticks[0] + 12:
            ticks.append(serial.tick())
    assert ticks == [*range(ticks[0], ticks[0] + len(ticks))]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_ending_the_worker_in_good_order_leaves_its_guests_and_its_broker_running(
    n1: TestNode, number: signal.Signals
) -> None:
    view = n1.start(tiny_instance(n1.root))
    assert n1.worker
    if number == signal.SIGINT:  # a terminal sends it to every process of the group
        os.killpg(n1.worker.pid, number)
        n1.worker.wait(30)
        n1.worker = None
    else:
        assert n1.kill_worker(number) == 0
    with n1.serial("web1") as serial:
        assert serial.tick() < serial.tick()
    assert embedded.status(n1.settings).running
    n1.start_worker()
    assert n1.info("web1") == view


def power_off(serial: Serial, pid: int) -> None:
    serial.send(POWER_OFF_KEY)
    until(lambda: not Path(f"/proc/{pid}").exists())


def kill(serial: Serial, pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}").exists())


def terminate(serial: Serial, pid: int) -> None:
    os.kill(pid, signal.SIGTERM)
    until(lambda: not Path(f"/proc/{pid}").exists())


@pytest.mark.parametrize(
    ("end", "state", "reason"),
    [
        pytest.param(power_off, "stopped", "the guest shut down", id="shut down from inside"),
        pytest.param(kill, "crashed", "QEMU died without a word", id="kill -9"),
        pytest.param(terminate, "crashed", "by a signal", id="SIGTERM"),
    ],
)
def test_what_ended_while_no_worker_ran_is_told_from_the_journal(
    n1: TestNode, end: Callable[[Serial, int], None], state: str, reason: str
) -> None:
    n1.start(tiny_instance(n1.root))
    pid = n1.pid("web1")
    with n1.serial("web1") as serial:
        serial.tick()
        n1.kill_worker()
        end(serial, pid)
    n1.start_worker()
    row = n1.row("web1")
    assert row
    assert row.state == state
    assert reason in str(row.reason)
    assert not n1.leftovers()
    assert n1.start(tiny_instance(n1.root))["state"] == "running"


def test_a_guest_paused_or_resumed_while_no_worker_ran_is_seen_as_it_is(n1: TestNode) -> None:
    n1.start(tiny_instance(n1.root))
    n1.start(tiny_instance(n1.root, "web2"), paused=True)
    n1.kill_worker()
    n1.monitor("web1", "stop")
    n1.monitor("web2", "cont")
    n1.start_worker()
    assert (n1.info("web1")["state"], n1.info("web2")["state"]) == ("paused", "running")
    n1.until_state("web1", "paused")
    n1.until_state("web2", "running")


def test_a_stop_that_waits_for_its_guest_is_continued_by_the_next_worker(n1: TestNode) -> None:
    ignoring(n1)
    job = n1.send("instance.stop", name="web1", timeout_s=2)
    n1.until_state("web1", "stopping")
    n1.restart_worker()
    stopped = job.wait(30)
    assert (stopped["state"], stopped["how"]) == ("stopped", "killed")
    assert attempts(n1, job.id) == 2
    n1.nothing_is_left()


def test_a_stop_whose_guest_shut_down_while_no_worker_ran_has_stopped_it(n1: TestNode) -> None:
    pid = ignoring(n1)
    job = n1.send("instance.stop", name="web1", timeout_s=60)
    n1.until_state("web1", "stopping")
    with n1.serial("web1") as serial:
        n1.kill_worker()
        power_off(serial, pid)
    n1.start_worker()
    stopped = job.wait(30)
    assert (stopped["state"], stopped["how"]) == ("stopped", "guest_shutdown")
    n1.nothing_is_left()


def test_a_parked_job_survives_the_worker(n1: TestNode) -> None:
    ignoring(n1)
    stop = n1.send("instance.stop", name="web1", timeout_s=2)
    until(lambda: stop.state == "PROGRESS")
    start = n1.send("instance.start", instance=tiny_instance(n1.root))
    until(lambda: start.state == "WAITING")
    n1.restart_worker()
    assert stop.wait(30)["how"] == "killed"
    assert start.wait(30)["state"] == "running"
    assert len(n1.qemu_pids()) == 1


def test_a_job_sent_while_no_worker_runs_is_carried_out_by_the_next_one(n1: TestNode) -> None:
    n1.kill_worker()
    job = n1.send("instance.start", instance=tiny_instance(n1.root))
    n1.start_worker()
    assert job.wait(30)["state"] == "running"


def ignoring(n1: TestNode) -> int:
    n1.start(tiny_instance(n1.root))
    with n1.serial("web1") as serial:
        serial.tick()
        serial.send(IGNORE_KEY)
        serial.read_until(IGNORING_MESSAGE)
    return n1.pid("web1")


def attempts(n1: TestNode, job_id: str) -> Any:
    return n1.do("job.info", id=job_id)["attempts"]


def test_a_start_killed_while_qemu_hangs_before_greeting_is_finished_by_the_next_worker(new_node: TestNode) -> None:
    qemu = FakeQemu(new_node.root)
    qemu.mode = "hangs"
    new_node.environment["HOSTLER_QEMU_BINARY"] = str(qemu.path)
    new_node.start_worker()
    job = new_node.send("instance.start", instance=tiny_instance(new_node.root))
    until(lambda: (job.progress or {}).get("phase") == "greeting")
    (hung,) = new_node.qemu_pids()
    new_node.kill_worker()
    qemu.mode = "works"
    new_node.start_worker()
    view = job.wait(30)
    assert view["state"] == "running"
    assert new_node.qemu_pids() == [view["pid"]] != [hung]
    assert attempts(new_node, job.id) == 2


def test_a_start_killed_while_its_network_script_runs_is_finished_by_the_next_worker(netns: str) -> None:
    with node(prefix=("ip", "netns", "exec", netns)) as made:
        script = made.root / "ifup"
        script.write_text(
            f"#!/bin/sh\necho $1 >>{made.root}/taps\nwhile [ -e {made.root}/wait ]; do sleep 0.05; done\n"
        )
        script.chmod(0o755)
        (made.root / "wait").touch()
        made.environment |= {"HOSTLER_IFUP": str(script), "HOSTLER_IFDOWN": "/bin/true"}
        made.start_worker()
        instance = tiny_instance(made.root)
        instance["nics"] = [{"mac": "52:54:00:00:00:01", "mode": "bridged", "link": "br0"}]
        job = made.send("instance.start", instance=instance)
        until((made.root / "taps").exists)
        made.kill_worker()
        (made.root / "wait").unlink()
        made.start_worker()
        view = job.wait(30)
        assert view["state"] == "running"
        assert made.qemu_pids() == [view["pid"]]
        assert made.tap_fds() == ["/dev/net/tun"]


class Gate:
    """Stops the node's worker where it is about to write something: a trigger in PostgreSQL waits for our lock.

    ``shut`` names the table and the condition. What the worker did before that write is done; a SIGKILL now is a death
    at exactly this place.
    """

    KEY = 4711

    def __init__(self, n1: TestNode) -> None:
        self._n1 = n1
        self._connection = n1.database().engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        self._execute(
            "CREATE OR REPLACE FUNCTION gate() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            f"PERFORM pg_advisory_xact_lock_shared({self.KEY}); "
            "IF TG_OP = 'DELETE' THEN RETURN OLD; END IF; RETURN NEW; END $$"
        )

    def _execute(self, statement: str) -> Any:
        return self._connection.execute(text(statement))

    def close(self) -> None:
        self._execute("DROP FUNCTION gate CASCADE")
        self._connection.close()

    @contextmanager
    def shut(self, event: str, table: str, condition: str = "true") -> Iterator[None]:
        """Keep the worker from any such write until the block ends. It is at the gate when the block begins."""
        self._execute(f"CREATE TRIGGER gate BEFORE {event} ON {table} FOR EACH ROW WHEN ({condition}) "
                      "EXECUTE FUNCTION gate()")  # fmt: skip
        self._execute(f"SELECT pg_advisory_lock({self.KEY})")
        try:
            yield
        finally:
            # Before the trigger goes, so that who waits in it, holding locks of the table, can go on.
            self._execute(f"SELECT pg_advisory_unlock({self.KEY})")
            self._execute(f"DROP TRIGGER gate ON {table}")

    def until_waiting(self) -> None:
        """Wait for the worker to arrive."""
        waiting = (
            f"SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = {self.KEY} AND NOT granted"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        until(lambda: self._execute(waiting).scalar(), what="the worker is at the gate")


@pytest.fixture(scope="module")
def postgresql_node(qemu: None) -> Iterator[TestNode]:
    with postgresql_database() as url, node(HOSTLER_DATABASE_URL=url) as made:
        assert made.cli("db", "upgrade").returncode == 0
        made.start_worker()
        yield made


@pytest.fixture
def n2(postgresql_node: TestNode) -> Iterator[TestNode]:
    if postgresql_node.worker is None:
        postgresql_node.start_worker()
    yield postgresql_node
    postgresql_node.end_guests()


@pytest.fixture
def gate(n2: TestNode) -> Iterator[Gate]:
    made = Gate(n2)
    yield made
    made.close()


def before_phase(phase: str) -> tuple[str, str, str]:
    return "UPDATE", "jobs", f"NEW.phase = '{phase}' AND OLD.phase <> '{phase}'"


PLACES = {
    "before validate": before_phase("validate"),
    "after validate": before_phase("claim"),
    "in claim": ("INSERT", "runtimes", "true"),
    "after claim": before_phase("sockets"),
    "after sockets": before_phase("spawn"),
    "after spawn, the pid unknown": ("UPDATE", "runtimes", "NEW.pid IS NOT NULL AND OLD.pid IS NULL"),
    "after spawn": before_phase("greeting"),
    "after greeting": before_phase("continue"),
    "after continue": before_phase("record"),
    "in record": ("UPDATE", "instances", "NEW.state IN ('running', 'paused')"),
    "after record": ("UPDATE", "jobs", "NEW.state = 'SUCCESS'"),
}


@pytest.mark.postgresql
@pytest.mark.parametrize("place", PLACES)
def test_a_start_whose_worker_is_killed_is_finished_by_the_next_one(n2: TestNode, gate: Gate, place: str) -> None:
    with gate.shut(*PLACES[place]):
        job = n2.send("instance.start", instance=tiny_instance(n2.root), job_id=f"start {place}".replace(" ", "-"))
        gate.until_waiting()
        n2.kill_worker()
    n2.start_worker()
    view = job.wait(30)
    assert (view["state"], view["node"]) == ("running", "n1")
    assert n2.qemu_pids() == [view["pid"]]
    assert n2.info("web1") == view
    assert attempts(n2, job.id) == 2
    with n2.serial("web1") as serial:
        serial.tick()
    assert n2.do("instance.stop", name="web1", force=True)["how"] == "killed"
    n2.nothing_is_left()


@pytest.mark.postgresql
@pytest.mark.parametrize(
    ("place", "how"),
    [
        (before_phase("shutdown"), "guest_shutdown"),
        (("DELETE", "runtimes", "true"), "guest_shutdown"),
        (("UPDATE", "jobs", "NEW.state = 'SUCCESS'"), "guest_shutdown"),
    ],
    ids=["before the button", "before its end is recorded", "before the job's end is recorded"],
)
def test_a_stop_whose_worker_is_killed_is_finished_by_the_next_one(
    n2: TestNode, gate: Gate, place: tuple[str, str, str], how: str
) -> None:
    n2.start(tiny_instance(n2.root))
    with n2.serial("web1") as serial:
        serial.tick()
    killed_in(n2, gate, place, how, force=False)


@pytest.mark.postgresql
@pytest.mark.parametrize(
    ("place", "how"),
    [
        (before_phase("kill"), "killed"),
        (("DELETE", "runtimes", "true"), "killed"),
        (("UPDATE", "jobs", "NEW.state = 'SUCCESS'"), "killed"),
    ],
    ids=["before the kill", "before its end is recorded", "before the job's end is recorded"],
)
def test_a_forced_stop_whose_worker_is_killed_is_finished_by_the_next_one(
    n2: TestNode, gate: Gate, place: tuple[str, str, str], how: str
) -> None:
    n2.start(tiny_instance(n2.root))
    killed_in(n2, gate, place, how, force=True)


def killed_in(n2: TestNode, gate: Gate, place: tuple[str, str, str], how: str, *, force: bool) -> None:
    with gate.shut(*place):
        job = n2.send("instance.stop", name="web1", force=force, timeout_s=20)
        gate.until_waiting()
        n2.kill_worker()
    n2.start_worker()
    view = job.wait(30)
    assert (view["state"], view["how"], n2.info("web1")["state"]) == ("stopped", how, "stopped")
    assert attempts(n2, job.id) == 2
    n2.nothing_is_left()


@pytest.mark.postgresql
@pytest.mark.parametrize(
    ("mode", "place"),
    [
        pytest.param("soft", ("DELETE", "runtimes", "true"), id="soft, before the end is recorded"),
        pytest.param("hard", ("DELETE", "runtimes", "true"), id="hard, before the end is recorded"),
        pytest.param("soft", before_phase("rebuild"), id="soft, before rebuild"),
        pytest.param("hard", before_phase("claim"), id="hard, before claim"),
        pytest.param("soft", before_phase("greeting"), id="soft, before greeting"),
        pytest.param("hard", ("UPDATE", "jobs", "NEW.state = 'SUCCESS'"), id="hard, before the job's end"),
    ],
)
def test_a_reboot_whose_worker_is_killed_is_finished_by_the_next_one(
    n2: TestNode, gate: Gate, mode: str, place: tuple[str, str, str]
) -> None:
    before = n2.start(tiny_instance(n2.root))
    with n2.serial("web1") as serial:
        serial.tick()
    with gate.shut(*place):
        job = n2.send("instance.reboot", name="web1", mode=mode, timeout_s=20)
        gate.until_waiting()
        n2.kill_worker()
    n2.start_worker()
    view = job.wait(30)
    assert view["state"] == "running"
    assert n2.qemu_pids() == [view["pid"]] != [before["pid"]]
    assert n2.info("web1") == view
