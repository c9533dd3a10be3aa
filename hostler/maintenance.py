"""The arguments of maintenance: emptying a node of its guests, and giving up one whose host is off."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hostler.job_arguments import JobArguments, NodeName
from hostler.migration import MoveArguments

TARGETS_MAX = 1000
PARALLEL_MAX = 64

Targets = Annotated[list[NodeName], Field(max_length=TARGETS_MAX)]


class DrainArguments(MoveArguments):
    """``node.drain``, sent to the node that is drained: every guest that runs there is moved to another node.

    To those of ``targets``, or, with ``auto``, of all nodes of the database that have a worker and are not drained. At
    most ``parallel`` move at once (None: HOSTLER_LIMIT_MIGRATIONS, which also bounds it). With ``allow_shutdown`` a
    guest that cannot be moved is asked to shut down (ACPI); without, it runs on. The other arguments are those of each
    migration. The node takes no guest in from then on, until ``node.undrain``.
    """

    targets: Targets = Field(default_factory=list)
    auto: bool = False
    allow_shutdown: bool = False
    parallel: Annotated[int, Field(ge=1, le=PARALLEL_MAX)] | None = None

    @model_validator(mode="after")
    def _goes_somewhere(self) -> DrainArguments:
        if self.auto and self.targets:
            raise ValueError("auto: chooses the targets; give either it or targets")
        if not self.auto and not self.targets:
            raise ValueError("targets: give the nodes that shall take the guests, or auto")
        return self

    def of_each_migration(self) -> dict[str, object]:
        """What is said of how the guests move, where it is not the default."""
        return self.model_dump(mode="json", include={*MoveArguments.model_fields} - {*JobArguments.model_fields},
                               exclude_defaults=True)  # fmt: skip


class HoldArguments(JobArguments):
    """``node.hold``: the node begins no more jobs that change its guests, until ``node.unhold``. Those wait, in order.

    What has begun goes on, and so do parts of other nodes' jobs, jobs that only look, and cancels. ``reason`` is told
    to whoever asks why a job waits.
    """

    reason: Annotated[str, Field(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")] = ""


class FenceArguments(JobArguments):
    """``node.fence``, sent to any living node of the same database: ``node``'s host is off, and its guests with it.

    ``confirm`` says so. Its guests are ``crashed`` then, and can be started on other nodes; with ``restart_on`` those
    that were wanted running are started there, each where the most memory is free.
    """

    node: NodeName
    confirm: Literal["it is off"]
    restart_on: Targets = Field(default_factory=list)


class UnfenceArguments(JobArguments):
    """``node.unfence``, sent to any living node of the same database: ``node`` may have a worker again.

    Only when no QEMU of it is left. A host that was booted since it was fenced needs no such job.
    """

    node: NodeName
