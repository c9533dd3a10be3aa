"""What goes into the job ledger and what comes out of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

_JOB_ID = re.compile(r"[\x21-\x7e]{1,255}")


class Verdict(Enum):
    """What to do with a delivered message."""

    RUN = auto()
    WAIT = auto()
    DROP = auto()
    REVOKED = auto()
    """It ended without ever having begun: tell its master."""


@dataclass(frozen=True)
class Receipt:
    """What a message asks for. ``instance_name`` is set for jobs that change that instance."""

    job_id: str
    task: str
    arguments: dict[str, Any]
    instance_name: str | None
    slot: str | None = None
    priority: int = 0
    after: tuple[str, ...] = ()
    after_failure: str = "cancel"


@dataclass(frozen=True)
class Wakeup:
    """A job whose message has to be sent (again): its turn has come, or its worker died."""

    job_id: str
    task: str
    arguments: dict[str, Any]
    node: str
    priority: int = 0


@dataclass(frozen=True)
class Decision:
    """The verdict on a delivery; for ``WAIT`` with the jobs it waits on, for ``REVOKED`` with the reason."""

    verdict: Verdict
    waiting_for: tuple[str, ...] = ()
    attempt: int = 0
    deaths: int = field(default=0, compare=False)
    """How many of the earlier attempts ended with their worker, and not with a failure that was put off."""
    cancelled: bool = field(default=False, compare=False)
    """It was asked to give up while it had no worker: what an earlier attempt left has to be undone first."""
    message: str = field(default="", compare=False)


@dataclass
class Ended:
    """What the end of a job brings about: jobs to wake, and jobs that are revoked because it failed."""

    wakeups: list[Wakeup] = field(default_factory=list)
    revoked: list[str] = field(default_factory=list)


class CancelOutcome(Enum):
    """What became of a request to cancel."""

    REVOKED = "revoked"
    REQUESTED = "requested"
    FINISHED = "finished"


def is_job_id(value: str) -> bool:
    """Whether ``value`` can be a job's id: 1 to 255 visible ASCII characters."""
    return bool(_JOB_ID.fullmatch(value))
