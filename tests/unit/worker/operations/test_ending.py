"""Why a guest ended: the table, cell by cell."""

from __future__ import annotations

from typing import Any

import pytest

from hostler.contract import InstanceState
from worker.operations.ending import Ending, judge

STOPPED, CRASHED = InstanceState.STOPPED, InstanceState.CRASHED
BY_FORCE = Ending(STOPPED, "stopped by force", "killed")
SHUT_DOWN = Ending(STOPPED, "the guest shut down", "guest_shutdown")
PANICKED = Ending(CRASHED, "the guest's kernel panicked", "killed")
SIGNALLED = Ending(CRASHED, "QEMU was ended from outside, by a signal", "killed")
QUIT = Ending(CRASHED, "QEMU was ended from outside, through its monitor", "killed")


def said(reason: str) -> dict[str, Any]:
    return {"guest": reason.startswith("guest"), "reason": reason}


@pytest.mark.parametrize(
    ("shutdown", "when_nobody_asked", "when_we_killed_it"),
    [
        (said("guest-shutdown"), SHUT_DOWN, SHUT_DOWN),
        (said("guest-panic"), PANICKED, BY_FORCE),
        (said("host-signal"), SIGNALLED, BY_FORCE),
        (said("host-qmp-quit"), QUIT, BY_FORCE),
    ],
)
def test_what_qemu_said_last_tells_how_the_guest_ended(
    shutdown: dict[str, Any], when_nobody_asked: Ending, when_we_killed_it: Ending
) -> None:
    assert judge(shutdown, 0, killed_by_us=False, log_tail="noise") == when_nobody_asked
    assert judge(shutdown, 0, killed_by_us=True, log_tail="noise") == when_we_killed_it


@pytest.mark.parametrize("shutdown", [None, {}, said("none"), said("guest-reset"), said("a reason of a later QEMU")])
@pytest.mark.parametrize(
    ("exit_status", "words"), [(1, "exit code 1"), (0, "exit code 0"), (-9, "signal 9"), (None, "exit status unknown")]
)
def test_a_qemu_that_did_not_say_why_has_crashed_and_its_log_is_quoted(
    shutdown: dict[str, Any] | None, exit_status: int | None, words: str
) -> None:
    silent = judge(shutdown, exit_status, killed_by_us=False, log_tail="")
    assert silent == Ending(CRASHED, f"QEMU died without a word ({words})", "killed")
    loud = judge(shutdown, exit_status, killed_by_us=False, log_tail="qemu: out of memory")
    assert loud == Ending(CRASHED, f"QEMU died without a word ({words}); its log ends: qemu: out of memory", "killed")
    assert judge(shutdown, exit_status, killed_by_us=True, log_tail="noise") == BY_FORCE


def test_how_is_a_word_of_the_contract_and_only_a_guests_own_end_is_its_shutdown() -> None:
    for reason in ("guest-shutdown", "guest-panic", "host-signal", "host-qmp-quit", "none"):
        for killed_by_us in (False, True):
            ending = judge(said(reason), 0, killed_by_us=killed_by_us, log_tail="")
            assert ending.how == ("guest_shutdown" if reason == "guest-shutdown" else "killed")
