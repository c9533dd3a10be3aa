"""Whatever ends a guest is seen, recorded with its reason, and cleaned up after; its disk is free at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime

import pytest

from tests.nodes import TestNode, tiny_instance, until
from worker.kvm.tiny_guest import BANNER, POWER_OFF_KEY, RESET_KEY

pytestmark = pytest.mark.node


def from_inside(n1: TestNode) -> None:
    with n1.serial("web1") as serial:
        serial.tick()
        serial.send(POWER_OFF_KEY)
        n1.until_state("web1", "stopped")


def by_kill_9(n1: TestNode) -> None:
    os.kill(n1.pid("web1"), signal.SIGKILL)


def by_sigterm(n1: TestNode) -> None:
    os.kill(n1.pid("web1"), signal.SIGTERM)


def by_quit_at_the_monitor(n1: TestNode) -> None:
    n1.monitor("web1", "quit")


ENDINGS = [
    pytest.param(from_inside, "stopped", "the guest shut down", id="shut down from inside"),
    pytest.param(by_kill_9, "crashed", "signal 9", id="kill -9 of QEMU"),
    pytest.param(by_sigterm, "crashed", "by a signal", id="SIGTERM of QEMU"),
    pytest.param(by_quit_at_the_monitor, "crashed", "through its monitor", id="quit at the monitor"),
]


@pytest.mark.parametrize(("end", "state", "reason"), ENDINGS)
def test_an_ending_is_recorded_with_its_reason_and_nothing_is_left(
    n1: TestNode, end: Callable[[TestNode], None], state: str, reason: str
) -> None:
    instance = tiny_instance(n1.root)
    n1.start(instance)
    end(n1)
    row = n1.until_state("web1", state)
    assert reason in row.reason
    assert row.ended_at is not None
    # Recorded last: whoever reads the state finds everything given back, and the disk free for another instance.
    assert not n1.leftovers()
    other = instance | {"name": "web2"}
    assert n1.start(other)["state"] == "running"
    view = n1.info("web1")
    assert (view["state"], view["reason"], view["pid"]) == (state, row.reason, None)
    assert datetime.fromisoformat(view["ended_at"]) == row.ended_at


@pytest.mark.parametrize(
    ("end", "reason"),
    [(by_kill_9, "signal 9"), (by_sigterm, "by a signal"), (by_quit_at_the_monitor, "through its monitor")],
)
def test_a_paused_guest_can_end_too(n1: TestNode, end: Callable[[TestNode], None], reason: str) -> None:
    n1.start(tiny_instance(n1.root), paused=True)
    end(n1)
    assert reason in n1.until_state("web1", "crashed").reason
    assert not n1.leftovers()


def test_a_reset_from_inside_is_no_ending(n1: TestNode) -> None:
    view = n1.start(tiny_instance(n1.root))
    with n1.serial("web1") as serial:
        serial.tick()
        serial.send(RESET_KEY)
        serial.read_until(BANNER)
        assert serial.tick() == 1
    after = n1.info("web1")
    assert (after["state"], after["pid"], after["reason"]) == ("running", view["pid"], None)


def test_a_guest_killed_during_its_stop_ends_the_stop(n1: TestNode) -> None:
    n1.start(tiny_instance(n1.root), paused=True)
    n1.do("instance.resume", name="web1")
    job = n1.send("instance.stop", name="web1", timeout_s=60)
    until(lambda: n1.row("web1").state in ("stopping", "stopped"))  # type: ignore[union-attr]
    for pid in n1.qemu_pids():
        with suppress(ProcessLookupError):  # it was faster
            os.kill(pid, signal.SIGKILL)
    ended = job.wait(30)
    assert ended["state"] in ("crashed", "stopped")
    assert (ended["how"] == "guest_shutdown") == (ended["reason"] == "the guest shut down")
    assert not n1.leftovers()


def test_many_guests_that_end_at_once_are_all_recorded(n1: TestNode) -> None:
    names = [f"many{number}" for number in range(6)]
    jobs = [n1.send("instance.start", instance=tiny_instance(n1.root, name), paused=True) for name in names]
    pids = [job.wait(60)["pid"] for job in jobs]
    assert sorted(n1.qemu_pids()) == sorted(pids)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for name in names:
        assert "signal 9" in n1.until_state(name, "crashed").reason
    assert not n1.leftovers()


def test_a_guest_that_ends_frees_its_instance_for_a_start_sent_at_once(n1: TestNode) -> None:
    instance = tiny_instance(n1.root)
    n1.start(instance)
    os.kill(n1.pid("web1"), signal.SIGKILL)
    n1.until_state("web1", "crashed")
    assert n1.start(instance)["state"] == "running"
    assert len(n1.qemu_pids()) == 1
