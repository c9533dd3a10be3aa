"""Each job on the tiny guest: start, stop, reboot, pause, resume, cleanup, and what can be asked."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from datetime import datetime, timedelta
from typing import Any

import pytest

from tests.nodes import TICK_LINE, TestNode, tiny_instance, until
from worker.kvm.tiny_guest import (
    BANNER,
    BYE_MESSAGE,
    IGNORE_KEY,
    IGNORING_MESSAGE,
    POWER_BUTTON_MESSAGE,
    POWER_OFF_KEY,
)

pytestmark = pytest.mark.node

VIEW_FIELDS = {
    "name", "node", "state", "pid", "memory_mib", "vcpus", "uid", "nics", "disks", "tags", "started_at", "ended_at",
    "reason", "qemu_version", "machine", "accelerator", "uuid", "run_dir",
    "wanted", "autostart", "restart_policy", "restarts", "restart_at",
}  # fmt: skip


def start_counting(n1: TestNode, name: str = "web1", **more: Any) -> Any:
    """Start a tiny guest and wait until it counts: from then on it sees its power button."""
    view = n1.start(tiny_instance(n1.root, name, **more))
    with n1.serial(name) as serial:
        serial.tick()
    return view


def start_ignoring(n1: TestNode, name: str = "web1") -> Any:
    """Start a tiny guest that has been told to ignore its power button."""
    view = start_counting(n1, name)
    with n1.serial(name) as serial:
        serial.send(IGNORE_KEY)
        serial.read_until(IGNORING_MESSAGE)
    return view


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_started_guest_runs_and_its_view_is_complete(n1: TestNode) -> None:
    instance = tiny_instance(n1.root, memory_mib=17, tags=["blue"])
    instance["nics"] = [{"mac": "52:54:00:00:00:01", "mode": "user"}]
    view = n1.start(instance)
    assert view.keys() == VIEW_FIELDS
    assert (view["name"], view["node"], view["state"]) == ("web1", "n1", "running")
    assert (view["memory_mib"], view["vcpus"], view["uid"], view["tags"]) == (17, 1, None, ["blue"])
    assert view["nics"] == [{"mac": "52:54:00:00:00:01", "mode": "user", "link": "", "ip": "", "vlan": 0, "tap": ""}]
    assert view["disks"] == [{"path": instance["disks"][0]["path"], "mode": "rw", "shared": False, "format": "raw"}]
    assert datetime.fromisoformat(view["started_at"]).utcoffset() == timedelta(0)
    assert (view["ended_at"], view["reason"]) == (None, None)
    assert view["qemu_version"][0].isdigit()
    assert view["machine"].startswith("pc-i440fx-")
    assert view["accelerator"] == "tcg"
    assert n1.qemu_pids() == [view["pid"]]
    assert view["uuid"] in n1.monitor("web1", "info uuid")
    with n1.serial("web1") as serial:
        assert serial.tick() < serial.tick()


def test_a_guest_started_paused_prints_nothing_until_it_is_resumed(n1: TestNode) -> None:
    view = n1.start(tiny_instance(n1.root), paused=True)
    assert view["state"] == "paused"
    with n1.serial("web1") as serial:
        assert serial.is_silent_for(0.5)
        assert n1.do("instance.resume", name="web1")["state"] == "running"
        serial.read_until(BANNER)
        assert serial.tick() == 1
    assert n1.pid("web1") == view["pid"]


def test_a_running_instance_is_not_started_twice(n1: TestNode) -> None:
    view = n1.start(tiny_instance(n1.root))
    failed = n1.failure("instance.start", instance=tiny_instance(n1.root))
    assert failed.code == "ALREADY_RUNNING"
    assert "web1" in failed.message
    assert failed.details["state"] == "running"
    assert n1.qemu_pids() == [view["pid"]]
    assert n1.info("web1")["state"] == "running"


def test_a_paused_instance_counts_as_running_for_a_second_start(n1: TestNode) -> None:
    view = n1.start(tiny_instance(n1.root), paused=True)
    assert n1.failure("instance.start", instance=tiny_instance(n1.root)).code == "ALREADY_RUNNING"
    assert n1.qemu_pids() == [view["pid"]]
    assert n1.info("web1")["state"] == "paused"


def test_the_power_button_stops_a_guest(n1: TestNode) -> None:
    view = start_counting(n1)
    with n1.serial("web1") as serial:
        stopped = n1.do("instance.stop", name="web1")
        serial.read_until(POWER_BUTTON_MESSAGE)
    assert stopped.keys() == VIEW_FIELDS | {"how"}
    assert (stopped["state"], stopped["how"]) == ("stopped", "guest_shutdown")
    assert stopped["reason"] == "the guest shut down"
    assert stopped["ended_at"]
    gone = ("pid", "uid", "started_at", "qemu_version", "machine", "accelerator", "uuid", "run_dir")
    assert [stopped[field] for field in gone] == [None] * len(gone)
    assert not alive(view["pid"])
    n1.nothing_is_left()


def test_force_stops_a_guest_that_ignores_its_power_button(n1: TestNode) -> None:
    view = start_ignoring(n1)
    stopped = n1.do("instance.stop", name="web1", force=True)
    assert (stopped["state"], stopped["how"], stopped["reason"]) == ("stopped", "killed", "stopped by force")
    assert not alive(view["pid"])
    n1.nothing_is_left()


def test_stopping_a_stopped_instance_says_so(n1: TestNode) -> None:
    n1.start(tiny_instance(n1.root))
    n1.do("instance.stop", name="web1", force=True)
    for force in (False, True):
        again = n1.do("instance.stop", name="web1", force=force)
        assert (again["state"], again["how"]) == ("stopped", "already_stopped")


def test_a_guest_that_does_not_shut_down_in_time_is_killed(n1: TestNode) -> None:
    view = start_ignoring(n1)
    stopped = n1.do("instance.stop", name="web1", timeout_s=0.5)
    assert (stopped["state"], stopped["how"]) == ("stopped", "killed")
    assert not alive(view["pid"])
    n1.nothing_is_left()


def test_on_timeout_fail_leaves_a_guest_that_does_not_shut_down_running(n1: TestNode) -> None:
    view = start_ignoring(n1)
    failed = n1.failure("instance.stop", name="web1", timeout_s=0.5, on_timeout="fail")
    assert failed.code == "TIMED_OUT"
    assert failed.retryable
    assert failed.details["state"] == "running"
    assert "force" in failed.message
    assert (n1.info("web1")["state"], n1.info("web1")["pid"]) == ("running", view["pid"])
    with n1.serial("web1") as serial:
        assert serial.tick() < serial.tick()


def test_a_paused_guest_is_stopped_by_its_power_button_too(n1: TestNode) -> None:
    start_counting(n1)
    n1.do("instance.pause", name="web1")
    stopped = n1.do("instance.stop", name="web1")
    assert (stopped["state"], stopped["how"]) == ("stopped", "guest_shutdown")
    n1.nothing_is_left()


def test_a_guest_stopped_before_its_first_instruction_sees_the_button_pressed_again(n1: TestNode) -> None:
    n1.start(tiny_instance(n1.root), paused=True)
    stopped = n1.do("instance.stop", name="web1", timeout_s=25, on_timeout="fail")
    assert (stopped["state"], stopped["how"]) == ("stopped", "guest_shutdown")


def test_a_guest_without_acpi_is_killed_at_once(n1: TestNode) -> None:
    n1.start(tiny_instance(n1.root, hvparams={"acpi": False}))
    stopped = n1.do("instance.stop", name="web1")
    assert (stopped["state"], stopped["how"]) == ("stopped", "killed")


def test_an_instance_that_ran_before_starts_again_with_new_hardware(n1: TestNode) -> None:
    first = n1.start(tiny_instance(n1.root))
    n1.do("instance.stop", name="web1", force=True)
    second = n1.start(tiny_instance(n1.root, memory_mib=24))
    assert (second["state"], second["memory_mib"], second["ended_at"]) == ("running", 24, None)
    assert second["uuid"] != first["uuid"]


def test_a_soft_reboot_shuts_down_and_starts_the_saved_hardware(n1: TestNode) -> None:
    before = start_counting(n1, memory_mib=20, tags=["blue"])
    after = n1.do("instance.reboot", name="web1")
    assert after["state"] == "running"
    assert (after["pid"] != before["pid"], after["uuid"] != before["uuid"]) == (True, True)
    same = ("memory_mib", "vcpus", "disks", "tags", "machine", "accelerator")
    assert [after[field] for field in same] == [before[field] for field in same]
    assert n1.qemu_pids() == [after["pid"]]
    with n1.serial("web1") as serial:
        serial.tick()


def test_a_hard_reboot_does_not_ask_the_guest(n1: TestNode) -> None:
    before = start_ignoring(n1)
    after = n1.do("instance.reboot", name="web1", mode="hard")
    assert (after["state"], after["pid"] != before["pid"]) == ("running", True)
    assert n1.qemu_pids() == [after["pid"]]


def test_the_reset_line_keeps_the_process_and_begins_at_one(n1: TestNode) -> None:
    before = start_counting(n1)
    with n1.serial("web1") as serial:
        after = n1.do("instance.reboot", name="web1", mode="reset")
        serial.read_until(BANNER)
        assert serial.tick() == 1
    assert (after["state"], after["pid"], after["uuid"]) == ("running", before["pid"], before["uuid"])


def test_a_soft_reboot_of_a_guest_that_ignores_its_button_times_out_and_it_runs_on(n1: TestNode) -> None:
    before = start_ignoring(n1)
    failed = n1.failure("instance.reboot", name="web1", timeout_s=0.5)
    assert failed.code == "TIMED_OUT"
    assert (n1.info("web1")["state"], n1.info("web1")["pid"]) == ("running", before["pid"])


@pytest.mark.parametrize("mode", ["soft", "hard", "reset"])
def test_a_stopped_instance_is_not_rebooted(n1: TestNode, mode: str) -> None:
    n1.start(tiny_instance(n1.root))
    n1.do("instance.stop", name="web1", force=True)
    assert n1.failure("instance.reboot", name="web1", mode=mode).code == "NOT_RUNNING"
    assert n1.qemu_pids() == []


def test_a_reboot_builds_the_hardware_that_was_saved_and_not_what_qemu_would_choose_now(n1: TestNode) -> None:
    n1.start(tiny_instance(n1.root, hvparams={"machine_version": "pc-i440fx-6.2"}))
    assert n1.do("instance.reboot", name="web1", mode="hard")["machine"] == "pc-i440fx-6.2"


def test_a_paused_guest_stands_still_and_goes_on_where_it_was(n1: TestNode) -> None:
    view = start_counting(n1)
    with n1.serial("web1") as serial:
        before = serial.tick()
        assert n1.do("instance.pause", name="web1")["state"] == "paused"
        assert n1.do("instance.pause", name="web1")["state"] == "paused"
        last = max([before, *(int(count, 16) for count in TICK_LINE.findall(serial.drain()))])
        assert serial.is_silent_for(0.5)
        assert n1.info("web1")["state"] == "paused"
        assert n1.do("instance.resume", name="web1")["state"] == "running"
        assert n1.do("instance.resume", name="web1")["state"] == "running"
        assert serial.tick() - last in (1, 2)  # the pause may have cut a line in two
    assert n1.pid("web1") == view["pid"]


def test_a_pause_and_resume_at_qemus_own_monitor_are_noticed(n1: TestNode) -> None:
    start_counting(n1)
    n1.monitor("web1", "stop")
    n1.until_state("web1", "paused")
    assert n1.info("web1")["state"] == "paused"
    n1.monitor("web1", "cont")
    n1.until_state("web1", "running")


def test_a_live_guest_is_not_cleaned_up(n1: TestNode) -> None:
    view = n1.start(tiny_instance(n1.root))
    failed = n1.failure("instance.cleanup", name="web1")
    assert failed.code == "ALREADY_RUNNING"
    assert "stop" in failed.message
    assert n1.qemu_pids() == [view["pid"]]
    assert n1.info("web1")["state"] == "running"


def test_a_crashed_instance_is_stopped_after_its_cleanup(n1: TestNode) -> None:
    n1.start(tiny_instance(n1.root))
    os.kill(n1.pid("web1"), signal.SIGKILL)
    reason = n1.until_state("web1", "crashed").reason
    done = n1.do("instance.cleanup", name="web1")
    assert done == {"name": "web1", "node": "n1", "removed": [], "released": [], "quarantined": []}
    view = n1.info("web1")
    assert (view["state"], view["reason"]) == ("stopped", reason)
    assert n1.start(tiny_instance(n1.root))["state"] == "running"


def test_list_shows_every_instance_and_info_the_one(n1: TestNode) -> None:
    for name in ("web2", "web1", "a.b-c_d"):
        n1.start(tiny_instance(n1.root, name), paused=True)
    views = n1.do("instance.list")
    assert [view["name"] for view in views] == sorted(n1.known())
    by_name = {view["name"]: view for view in views}
    for name in ("web1", "web2", "a.b-c_d"):
        assert by_name[name]["state"] == "paused"
        assert n1.info(name) == by_name[name]


@pytest.mark.parametrize("task", ["info", "stop", "reboot", "pause", "resume", "cleanup", "console"])
def test_an_instance_nobody_knows(n1: TestNode, task: str) -> None:
    failed = n1.failure(f"instance.{task}", name="no-such")
    assert failed.code == "UNKNOWN_INSTANCE"
    assert "no-such" in failed.message
    assert "no-such" not in n1.known()


@pytest.mark.parametrize("task", ["pause", "resume", "console"])
def test_what_needs_a_running_guest_refuses_a_stopped_one(n1: TestNode, task: str) -> None:
    n1.start(tiny_instance(n1.root))
    n1.do("instance.stop", name="web1", force=True)
    assert n1.failure(f"instance.{task}", name="web1").code == "NOT_RUNNING"


def test_check_finds_nothing_wrong_and_starts_nothing(n1: TestNode) -> None:
    before = n1.known()
    found = n1.do("instance.check", instance=tiny_instance(n1.root, "checked"))
    assert found["errors"] == []
    unset = ["instance.hvparams.machine_version", "instance.hvparams.cpu_type"]
    assert [warning["field"] for warning in found["warnings"]] == unset
    assert n1.known() == before
    n1.nothing_is_left()


def test_check_names_everything_that_is_wrong_at_once(n1: TestNode) -> None:
    instance = tiny_instance(n1.root, "checked", hvparams={"machine_version": "vax", "cpu_type": "z80"})
    instance["disks"].append({"path": "/no/such.img"})
    found = n1.do("instance.check", instance=instance)
    assert [error["field"] for error in found["errors"]] == [
        "instance.hvparams.machine_version",
        "instance.hvparams.cpu_type",
        "instance.disks[1].path",
    ]
    assert "checked" not in n1.known()


def test_the_serial_console_names_a_command_that_works(n1: TestNode) -> None:
    start_counting(n1)
    found = n1.do("instance.console", name="web1")
    assert found["kind"] == "serial"
    assert found["host"]
    assert found["command"][0] == "socat"
    assert found["command"][-1] == f"UNIX-CONNECT:{found['path']}"
    # The same command without a terminal to make raw.
    console = subprocess.Popen(
        ["socat", "STDIO", found["command"][-1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    try:
        assert console.stdout and console.stdin
        until(lambda: TICK_LINE.search(console.stdout.read(64)))
        console.stdin.write(POWER_OFF_KEY)
        n1.until_state("web1", "stopped")
    finally:
        console.kill()
        console.wait()
        console.stdin.close()
        console.stdout.close()


def test_a_guest_without_a_serial_port_has_no_console(n1: TestNode) -> None:
    n1.start(tiny_instance(n1.root, hvparams={"serial_console": False}))
    found = n1.do("instance.console", name="web1")
    assert found["kind"] == "message"
    assert "web1" in found["message"]


def test_hostler_console_through_pipes_carries_keys_in_and_output_out(n1: TestNode) -> None:
    start_counting(n1)
    argv = [sys.executable, "-m", "hostler", "console", "web1", "-n", "n1"]
    console = subprocess.run(argv, env=n1.env, input=POWER_OFF_KEY, capture_output=True, timeout=60)
    assert console.returncode == 0, console.stderr
    assert BYE_MESSAGE in console.stdout
    assert b"Escape key is ^]" in console.stderr
    n1.until_state("web1", "stopped")


def test_hostler_console_on_a_terminal_is_left_by_the_escape_key(n1: TestNode) -> None:
    start_counting(n1)
    ours, theirs = pty.openpty()
    argv = [sys.executable, "-m", "hostler", "console", "web1", "-n", "n1"]
    console = subprocess.Popen(argv, env=n1.env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    try:
        seen = b""

        def shows(wanted: bytes) -> bool:
            nonlocal seen
            seen += os.read(ours, 4096)
            return wanted in seen

        until(lambda: shows(b"Escape key is ^]"))
        os.write(ours, b"x")
        until(lambda: shows(b"x"))
        until(lambda: shows(b"tick "))
        os.write(ours, b"\x1d")
        assert console.wait(30) == 0
    finally:
        console.kill()
        console.wait()
        os.close(ours)
    assert n1.info("web1")["state"] == "running"
    with n1.serial("web1") as serial:
        serial.tick()


def test_the_command_line_starts_lists_and_stops_a_guest(n1: TestNode) -> None:
    instance = tiny_instance(n1.root)
    file = n1.root / "web1.yaml"
    disk = instance["disks"][0]["path"]
    file.write_text(
        f"name: web1\nmemory_mib: 16\ndisks: [{{path: {disk}}}]\nhvparams: {{disk_type: ide, kvm_flag: disabled}}\n"
    )
    started = n1.cli("start", "n1", str(file))
    assert started.returncode == 0, started.stderr
    assert "web1" in n1.cli("list", "-n", "n1").stdout
    assert [view["state"] for view in n1.cli_json("list", "-n", "n1") if view["name"] == "web1"] == ["running"]
    stopped = n1.cli_json("stop", "web1", "-n", "n1", "--force")
    assert stopped["how"] == "killed"


def test_two_jobs_of_one_instance_run_in_the_order_they_were_sent(n1: TestNode) -> None:
    start_ignoring(n1)
    stop = n1.send("instance.stop", name="web1", timeout_s=30)
    until(lambda: stop.state == "PROGRESS")
    start = n1.send("instance.start", instance=tiny_instance(n1.root))
    until(lambda: start.state == "WAITING")
    waiting = start.progress
    assert waiting
    assert waiting["waiting_for"] == [stop.id]
    assert waiting.keys() == {"phase", "percent", "message", "instance", "node", "updated_at", "waiting_for"}
    assert n1.info("web1")["state"] == "stopping"
    with n1.serial("web1") as serial:
        serial.send(POWER_OFF_KEY)
        assert stop.wait(30)["how"] == "guest_shutdown"
        assert start.wait(30)["state"] == "running"
    assert len(n1.qemu_pids()) == 1
