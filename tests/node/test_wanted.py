"""What an operator wants of a guest: it is started again after a crash or a boot, and never against their will."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from models import Instance, Job, Runtime
from tests.nodes import FakeQemu, TestNode, tiny_instance, until
from worker.kvm.tiny_guest import IGNORE_KEY, IGNORING_MESSAGE, POWER_OFF_KEY

pytestmark = pytest.mark.node

LATER_S = 3600.0
"""A delay that no test waits for."""


@pytest.fixture
def here(n1: TestNode) -> Iterator[TestNode]:
    """The module's node; what the test leaves is stopped by jobs, behind a restart that may be under way."""
    yield n1
    if n1.worker is None or n1.worker.poll() is not None:
        n1.start_worker()
    for name in n1.known():
        n1.do("instance.stop", name=name, force=True)


def guest(here: TestNode, name: str, policy: str = "on-crash", delay_s: float = 0.1, **more: Any) -> dict[str, Any]:
    """An instance that is running."""
    instance = tiny_instance(here.root, name, restart_policy=policy, restart_delay_s=delay_s, **more)
    here.start(instance)
    return instance


def kill_9(here: TestNode, name: str) -> None:
    """Kill the guest's QEMU, and wait until it has ended."""
    end(here, name, lambda pid: os.kill(pid, signal.SIGKILL))


def power_off(here: TestNode, name: str) -> None:
    """Let the guest shut itself down, and wait until its QEMU has ended."""
    with here.serial(name) as serial:
        serial.tick()
        end(here, name, lambda pid: serial.send(POWER_OFF_KEY))


def end(here: TestNode, name: str, how: Callable[[int], None]) -> None:
    pid = here.pid(name)
    with suppress(ProcessLookupError):
        how(pid)
    until(lambda: not alive(pid), what=f"QEMU of {name} ends")


def alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def restarts(here: TestNode, name: str) -> list[Job]:
    """The jobs that started the instance again, in order."""
    query = select(Job).where(Job.task == "instance.restart", Job.instance_name == name).order_by(Job.sequence)
    with here.reading() as session:
        return [*session.scalars(query)]


def until_restarted(here: TestNode, name: str, number: int = 1) -> Job:
    """Wait for the end of the instance's so-manieth restart."""

    def look() -> Job | None:
        jobs = restarts(here, name)
        return jobs[number - 1] if len(jobs) >= number and jobs[number - 1].finished_at else None

    return until(look, what=f"restart {number} of {name}")


def row_of(here: TestNode, name: str) -> Instance:
    row = here.row(name)
    assert row
    return row


def test_a_guest_that_is_killed_is_started_again_by_a_job_of_the_ledger(here: TestNode) -> None:
    guest(here, "killed")
    before = here.info("killed")
    assert (before["wanted"], before["restart_policy"], before["autostart"]) == ("running", "on-crash", False)
    assert (before["restarts"], before["restart_at"]) == (0, None)
    kill_9(here, "killed")
    job = until_restarted(here, "killed")
    assert (job.state, job.arguments) == ("SUCCESS", {"name": "killed", "cause": "crash"})
    assert job.result["how"] == "started"
    after = here.info("killed")
    assert (after["state"], after["restarts"], after["wanted"]) == ("running", 1, "running")
    assert after["pid"] not in (None, before["pid"])
    assert after["machine"] == before["machine"]
    with here.serial("killed") as serial:
        serial.tick()
    assert here.do("job.list", instance="killed")[0]["id"] == job.id


def test_people_see_when_a_restart_is_due(here: TestNode) -> None:
    guest(here, "due", delay_s=LATER_S)
    kill_9(here, "due")
    here.until_state("due", "crashed")
    view = here.info("due")
    assert view["restart_at"] > view["ended_at"]
    assert "restart_at" in here.cli("info", "due").stdout
    assert "RESTART DUE" in here.cli("list").stdout
    here.start(tiny_instance(here.root, "due"))  # somebody is faster
    assert (row_of(here, "due").restart_at, restarts(here, "due")) == (None, [])


def test_restarts_in_a_row_are_bounded_until_somebody_starts_it(here: TestNode) -> None:
    instance = guest(here, "looping", delay_s=0, restart_max=2)
    for number in (1, 2):
        kill_9(here, "looping")
        until_restarted(here, "looping", number)
        assert row_of(here, "looping").restarts == number
    kill_9(here, "looping")
    row = here.until_state("looping", "crashed")
    assert str(row.reason).startswith("QEMU died without a word (signal 9")
    assert "; restarted 2 time(s) in a row, and not again by itself: find out why" in str(row.reason)
    assert (row.restart_at, len(restarts(here, "looping"))) == (None, 2)
    here.restart_worker()
    assert (row_of(here, "looping").state, len(restarts(here, "looping"))) == ("crashed", 2)
    here.start(instance)
    assert row_of(here, "looping").restarts == 0
    kill_9(here, "looping")
    assert until_restarted(here, "looping", 3).state == "SUCCESS"


@pytest.mark.parametrize("watched", [True, False], ids=["with a worker", "while no worker runs"])
def test_a_guest_that_shuts_itself_down_is_started_again_only_under_always(here: TestNode, watched: bool) -> None:
    names = {policy: f"off-{policy}-{watched}" for policy in ("never", "on-crash", "always")}
    for policy, name in names.items():
        guest(here, name, policy)
    if not watched:
        here.kill_worker()
    for name in names.values():
        power_off(here, name)
    if not watched:
        here.start_worker()
    job = until_restarted(here, names["always"])
    assert (job.state, job.arguments["cause"]) == ("SUCCESS", "shutdown")
    assert row_of(here, names["always"]).state == "running"
    for policy in ("never", "on-crash"):
        row = here.until_state(names[policy], "stopped")
        assert (row.wanted, row.restart_at, restarts(here, names[policy])) == ("stopped", None, [])


@pytest.mark.parametrize("force", [False, True], ids=["shut down", "killed"])
def test_what_its_operator_stopped_stays_stopped_also_for_the_next_workers(here: TestNode, force: bool) -> None:
    name = f"stopped-{force}"
    guest(here, name, "always", delay_s=0, autostart=True)
    with here.serial(name) as serial:
        serial.tick()
    view = here.do("instance.stop", name=name, force=force, on_timeout="force" if force else "fail")
    assert (view["state"], view["wanted"], view["restart_at"]) == ("stopped", "stopped", None)
    here.restart_worker()
    row = row_of(here, name)
    assert (row.state, row.wanted, row.restart_at, restarts(here, name)) == ("stopped", "stopped", None, [])


@pytest.mark.parametrize("task", ["instance.stop", "instance.cleanup"])
def test_a_restart_that_is_due_is_called_off_by_its_operator(here: TestNode, task: str) -> None:
    name = f"called-off-{task.removeprefix('instance.')}"
    guest(here, name, delay_s=LATER_S)
    kill_9(here, name)
    here.until_state(name, "crashed")
    assert row_of(here, name).restart_at
    answer = here.do(task, name=name)
    assert task == "instance.cleanup" or answer["how"] == "already_stopped"
    row = row_of(here, name)
    assert (row.wanted, row.restart_at, row.restarts) == ("stopped", None, 0)
    assert here.do("instance.restart", name=name, cause="crash")["how"] == "nothing_to_do"
    assert not row_of(here, name).runtime


def test_a_stop_that_gives_up_leaves_the_guest_wanted_running(here: TestNode) -> None:
    ignoring(here, "stubborn")
    failure = here.failure("instance.stop", name="stubborn", timeout_s=0.5, on_timeout="fail")
    assert failure.code == "TIMED_OUT"
    assert row_of(here, "stubborn").wanted == "running"
    kill_9(here, "stubborn")
    assert until_restarted(here, "stubborn").state == "SUCCESS"


def test_a_restart_behind_a_stop_does_nothing(here: TestNode) -> None:
    ignoring(here, "queued")
    stop = here.send("instance.stop", name="queued", timeout_s=1)
    until(lambda: stop.state == "PROGRESS")
    restart = here.send("instance.restart", name="queued", cause="crash")
    until(lambda: restart.state == "WAITING")
    assert stop.wait(30)["how"] == "killed"
    view = restart.wait(30)
    assert (view["how"], view["state"]) == ("nothing_to_do", "stopped")
    notes = [entry["message"] for entry in here.do("job.info", id=restart.id)["phases"]]
    assert notes == ["nothing to be done: it is wanted stopped by now"]


def ignoring(here: TestNode, name: str) -> None:
    guest(here, name)
    with here.serial(name) as serial:
        serial.tick()
        serial.send(IGNORE_KEY)
        serial.read_until(IGNORING_MESSAGE)


def test_anybody_may_have_a_stopped_guest_started_again_as_it_was(here: TestNode) -> None:
    guest(here, "again", "never")
    here.do("instance.stop", name="again", force=True)
    view = here.client().restart("n1", "again").wait(30)
    assert (view["state"], view["how"], view["wanted"], view["restarts"]) == ("running", "started", "running", 0)
    assert here.do("instance.restart", name="again")["how"] == "nothing_to_do"
    assert here.pid("again") == view["pid"]
    assert here.failure("instance.restart", name="nobody").code == "UNKNOWN_INSTANCE"


def test_a_reboot_ends_the_guest_itself_and_is_no_crash(here: TestNode) -> None:
    guest(here, "rebooted", "always", delay_s=0)
    with here.serial("rebooted") as serial:
        serial.tick()
    for mode in ("soft", "hard"):
        before = here.pid("rebooted")
        assert here.do("instance.reboot", name="rebooted", mode=mode)["pid"] not in (None, before)
        with here.serial("rebooted") as serial:
            serial.tick()
    row = row_of(here, "rebooted")
    assert (row.wanted, row.restart_at, restarts(here, "rebooted")) == ("running", None, [])


def test_the_next_worker_sees_to_a_restart_whose_worker_died_in_its_delay(here: TestNode) -> None:
    guest(here, "delayed", delay_s=LATER_S)
    kill_9(here, "delayed")
    here.until_state("delayed", "crashed")
    here.kill_worker()
    with here.database().transaction() as session:
        session.execute(update(Instance).where(Instance.name == "delayed").values(restart_at=Instance.ended_at))
    here.start_worker()
    assert until_restarted(here, "delayed").state == "SUCCESS"
    assert (len(restarts(here, "delayed")), row_of(here, "delayed").state) == (1, "running")


def test_a_restart_whose_worker_dies_in_it_is_finished_by_the_next_one(new_node: TestNode) -> None:
    qemu = FakeQemu(new_node.root)
    new_node.environment["HOSTLER_QEMU_BINARY"] = str(qemu.path)
    new_node.start_worker()
    guest(new_node, "halfway")
    qemu.mode = "hangs"
    kill_9(new_node, "halfway")
    until(lambda: [job.phase for job in restarts(new_node, "halfway")] == ["greeting"])
    (hung,) = new_node.qemu_pids()
    new_node.kill_worker()
    qemu.mode = "works"
    new_node.start_worker()
    job = until_restarted(new_node, "halfway")
    assert (job.state, job.attempts, len(restarts(new_node, "halfway"))) == ("SUCCESS", 2, 1)
    assert new_node.qemu_pids() == [job.result["pid"]] != [hung]
    row = row_of(new_node, "halfway")
    assert (row.state, row.restarts, row.restart_at, row.wanted) == ("running", 1, None, "running")


def test_what_crashed_while_no_worker_ran_is_started_again_by_the_next_one(here: TestNode) -> None:
    guest(here, "alone")
    guest(here, "alone-never", "never")
    here.kill_worker()
    for name in ("alone", "alone-never"):
        kill_9(here, name)
    here.start_worker()
    assert until_restarted(here, "alone").state == "SUCCESS"
    here.restart_worker()
    assert len(restarts(here, "alone")) == 1
    row = row_of(here, "alone-never")
    assert (row.state, row.restart_at, restarts(here, "alone-never")) == ("crashed", None, [])


def test_a_restart_that_cannot_succeed_is_tried_so_often_and_no_more(here: TestNode) -> None:
    instance = guest(here, "diskless", delay_s=0.1, restart_max=2)
    disk = Path(instance["disks"][0]["path"])
    disk.rename(disk.with_suffix(".away"))
    kill_9(here, "diskless")
    jobs = [until_restarted(here, "diskless", number) for number in (1, 2)]
    assert [(job.state, (job.error or {}).get("code")) for job in jobs] == [("FAILURE", "INVALID_ARGUMENT")] * 2
    row = until(lambda: (row := row_of(here, "diskless")) and "not again" in str(row.reason) and row)
    assert (row.state, row.restart_at, len(restarts(here, "diskless"))) == ("crashed", None, 2)
    assert str(row.reason).startswith("it could not be started again: instance.disks[0].path: ")
    disk.with_suffix(".away").rename(disk)
    here.start(instance)
    assert row_of(here, "diskless").restarts == 0


def test_after_a_boot_of_the_host_what_has_autostart_and_was_wanted_running_is_started(here: TestNode) -> None:
    guest(here, "boot-b", "never", autostart=True)
    guest(here, "boot-a", "on-crash", autostart=True)
    guest(here, "boot-terminated", "never", autostart=True)
    guest(here, "boot-no-autostart", "always")
    guest(here, "boot-delayed", "on-crash", delay_s=LATER_S)
    guest(here, "boot-stopped", "always", autostart=True)
    here.do("instance.stop", name="boot-stopped", force=True)
    end(here, "boot-terminated", lambda pid: os.kill(pid, signal.SIGTERM))
    kill_9(here, "boot-delayed")
    for name in ("boot-terminated", "boot-delayed"):
        here.until_state(name, "crashed")
    here.kill_worker()
    lose_the_host(here)
    here.start_worker()
    started = [until_restarted(here, name) for name in ("boot-a", "boot-b", "boot-terminated")]
    assert {(job.state, job.arguments["cause"]) for job in started} == {("SUCCESS", "boot")}
    assert started == sorted(started, key=lambda job: job.sequence)
    here.restart_worker()
    for job in started:
        assert row_of(here, str(job.instance_name)).state == "running"
        assert len(restarts(here, str(job.instance_name))) == 1
    for name, state in (("boot-no-autostart", "crashed"), ("boot-delayed", "crashed"), ("boot-stopped", "stopped")):
        row = row_of(here, name)
        assert (row.state, row.restart_at, restarts(here, name)) == (state, None, [])
    assert row_of(here, "boot-no-autostart").reason == "the host was rebooted or lost power"


def lose_the_host(here: TestNode) -> None:
    """What a host that loses power leaves behind: no process, and a boot id in SQL that is not the next boot's."""
    for pid in here.qemu_pids():
        os.kill(pid, signal.SIGKILL)
        until(lambda pid=pid: not alive(pid))  # type: ignore[misc]
    with here.database().transaction() as session:
        for table in (Instance, Runtime):
            session.execute(update(table).values(boot_id="00000000-0000-0000-0000-000000000000"))
