"""What becomes of a guest that ended, or that its host took down: decided here, by rules alone. Nothing is touched.

    ended as      never               on-crash            always
    crashed       stays crashed       started again       started again
    shut down     stays stopped       stays stopped       started again
    host lost     autostart alone decides, whatever the policy

What an operator stopped stays stopped, and the end that an operation brings about belongs to that operation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from hostler.contract import InstanceState

RUNNING, STOPPED = "running", "stopped"
"""What a guest can be wanted to be."""

GOOD_RUN = timedelta(minutes=10)
"""A guest that ran so long was well: what ends it then is a new trouble, and restarts are counted anew."""

DELAY_MAX_S = 300.0

OPERATIONS_OWN = frozenset(
    {InstanceState.STARTING, InstanceState.STOPPING, InstanceState.INCOMING, InstanceState.MIGRATING}
)
"""States in which an operation is at work on the guest, which sees to its end itself."""

IDLE = frozenset({InstanceState.STOPPED, InstanceState.CRASHED})


@dataclass(frozen=True)
class Policy:
    """What an instance's payload says about being started again."""

    autostart: bool = False
    restart_policy: str = "never"
    restart_max: int = 5
    restart_delay_s: float = 5

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Policy:
        """The policy in a saved spec."""
        return cls(**{name: spec[name] for name in cls.__dataclass_fields__ if name in spec})

    def delay(self, restarts: int) -> timedelta:
        """How long to wait before the next restart, after so many in a row."""
        ceiling_s = max(DELAY_MAX_S, self.restart_delay_s)
        return timedelta(seconds=min(ceiling_s, self.restart_delay_s * 2**restarts))


@dataclass(frozen=True)
class Intent:
    """What an instance is wanted to be, how often in a row it was restarted, and when it will be next."""

    wanted: str
    restarts: int = 0
    restart_at: datetime | None = None
    note: str = ""
    """What people are told beside the reason of the end."""


@dataclass(frozen=True)
class End:
    """How a guest ended: ``before`` is its state until then, ``ran`` how long it had run."""

    state: InstanceState
    before: InstanceState
    ran: timedelta
    same_boot: bool = True


def after_end(policy: Policy, intent: Intent, end: End, now: datetime) -> Intent:
    """What to do about a guest that ended."""
    if intent.wanted != RUNNING or end.before in OPERATIONS_OWN:
        return intent
    shut_down = end.state == InstanceState.STOPPED
    if shut_down and policy.restart_policy != "always":
        return Intent(STOPPED)
    if not end.same_boot or policy.restart_policy == "never":
        return replace(intent, restart_at=None)
    restarts = 0 if end.ran >= GOOD_RUN else intent.restarts
    if restarts >= policy.restart_max:
        note = f"restarted {restarts} time(s) in a row, and not again by itself: find out why, then start it"
        return Intent(RUNNING, restarts, None, note)
    return Intent(RUNNING, restarts, now + policy.delay(restarts))


def after_failure(policy: Policy, intent: Intent, now: datetime) -> Intent:
    """What to do about a guest whose restart failed: as about one that crashed at once."""
    return after_end(policy, intent, End(InstanceState.CRASHED, InstanceState.CRASHED, timedelta()), now)


def after_boot(policy: Policy, intent: Intent, now: datetime) -> Intent:
    """What to do about a guest that last ran before the host was booted, and was wanted running then."""
    if policy.autostart and intent.wanted == RUNNING:
        return Intent(RUNNING, 0, now)
    return replace(intent, restart_at=None)


def why_not(policy: Policy, cause: str, wanted: str, state: str, *, same_boot: bool) -> str:
    """Why a restart that was begun for ``cause`` is not to be carried out now; empty when it is."""
    if state not in IDLE:
        return f"it is {state}"
    if cause == "operator":
        return ""
    if wanted != RUNNING:
        return "it is wanted stopped by now"
    if not same_boot and not policy.autostart:
        return "the host was rebooted, and it has no autostart"
    return ""
