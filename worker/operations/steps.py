"""Steps: what a job has another node do for it. Meanwhile it waits in the ledger, and holds no thread.

A step is a job of its own, with its node's promises: claimed once, taken up again after a death, ended once. Its id is
that of its job and the step's name, so that a job that is taken up again finds it, and never has it done twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hostler.contract import JobState, TaskName
from hostler.payloads import SLOTS
from models import Job, utc_now
from worker.operations.receipts import Wakeup


@dataclass(frozen=True)
class Step:
    """A part of a job, for the node that has to do it. It holds ``instance``, where the job it belongs to does not."""

    job_id: str
    name: str
    task: TaskName
    node: str
    arguments: dict[str, Any]
    instance: str | None = None

    @property
    def id(self) -> str:
        """The step's own job id."""
        return f"{self.job_id}.{self.name}"

    def row(self, job: Job) -> Job:
        """The step as a job.

        It has no priority: an idle worker waits on the queue of those without, and takes these at once.
        """
        return Job(
            id=self.id,
            node=self.node,
            task=self.task,
            instance_name=self.instance,
            slot=SLOTS.get(self.task) if self.instance else None,
            arguments=self.arguments,
            state=JobState.PENDING,
            step_of=job.id,
            received_at=utc_now(),
        )


@dataclass(frozen=True)
class StepEnd:
    """How a step ended."""

    succeeded: bool
    result: Any
    error: dict[str, Any] | None


def nothing() -> None:
    """What is done meanwhile mostly."""


class HandedOver(Exception):
    """The job goes on on another node; ``wakeups`` are the messages to send for that.

    ``meanwhile`` is called once they are sent. It may run beside the job's next attempt, and nothing depends on it.
    """

    def __init__(self, wakeups: list[Wakeup], meanwhile: Callable[[], None] = nothing) -> None:
        super().__init__("the job goes on on another node")
        self.wakeups = wakeups
        self.meanwhile = meanwhile
