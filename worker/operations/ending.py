"""Why a guest ended, from what QEMU said and how its process ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hostler.contract import InstanceState
from worker.kvm.launch import describe_exit

GUEST_SHUT_DOWN = "the guest shut down"


@dataclass(frozen=True)
class Ending:
    """The state an instance is in after its QEMU ended, why, and the contract's word for how it was stopped."""

    state: InstanceState
    reason: str
    how: str


def judge(shutdown: dict[str, Any] | None, exit_status: int | None, *, killed_by_us: bool, log_tail: str) -> Ending:
    """``shutdown`` is the data of QEMU's last SHUTDOWN event (QAPI run-state.json), None where it sent none.

    A guest that shuts itself down is stopped. What nobody asked for is a crash: QEMU died, was killed from outside, or
    the guest panicked.
    """
    cause = str(shutdown.get("reason", "")) if shutdown else ""
    if cause == "guest-shutdown":
        return Ending(InstanceState.STOPPED, GUEST_SHUT_DOWN, "guest_shutdown")
    if killed_by_us:
        return Ending(InstanceState.STOPPED, "stopped by force", "killed")
    if cause == "guest-panic":
        return Ending(InstanceState.CRASHED, "the guest's kernel panicked", "killed")
    if cause in ("host-signal", "host-qmp-quit"):
        how = "by a signal" if cause == "host-signal" else "through its monitor"
        return Ending(InstanceState.CRASHED, f"QEMU was ended from outside, {how}", "killed")
    said = f"; its log ends: {log_tail}" if log_tail else ""
    return Ending(InstanceState.CRASHED, f"QEMU died without a word ({describe_exit(exit_status)}){said}", "killed")
