"""The arguments of live migration: the job that does all of it, what changes one under way, and its four steps."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, JsonValue, model_validator

from hostler.job_arguments import JobArguments, JobId, NameArguments, NodeName, TimeoutS

DOWNTIME_MAX_MS = 60_000
BANDWIDTH_MAX_MIB_S = 1024 * 1024
CHANNELS_MAX = 16
SAMPLE_MAX_S = 60


def _channels(value: int) -> int:
    if value == 1 or not 0 <= value <= CHANNELS_MAX:
        raise ValueError(f"must be 0 (off) or 2 to {CHANNELS_MAX}, not {value}")
    return value


def _with_an_id(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if not isinstance(value.get("migration_id"), str):
        raise ValueError("has no migration_id; pass on unchanged what the step before returned")
    return value


BandwidthMibS = Annotated[float, Field(ge=0, le=BANDWIDTH_MAX_MIB_S, allow_inf_nan=False)]
"""0 is without limit."""
DowntimeMs = Annotated[int, Field(ge=1, le=DOWNTIME_MAX_MS)]
Channels = Annotated[int, AfterValidator(_channels)]
OnDeadline = Literal["abort", "force", "postcopy"]
Passed = Annotated[dict[str, JsonValue], AfterValidator(_with_an_id)]
"""What a step returned, for the next one: of no meaning to who passes it on, but for its ``migration_id``."""


def _require_room(downtime_ms: int | None, downtime_max_ms: int | None) -> None:
    if downtime_ms is not None and downtime_max_ms is not None and downtime_max_ms < downtime_ms:
        raise ValueError(f"downtime_max_ms: {downtime_max_ms} is less than downtime_ms, {downtime_ms}")


class MoveArguments(JobArguments):
    """How guests shall move.

    ``bandwidth_mib_s`` (0: no limit) and ``downtime_ms`` default to the guest's own parameters, ``deadline_s`` to 150 s
    per GiB of its memory and 60 s at least. ``downtime_ms`` grows up to ``downtime_max_ms`` where the guest writes too
    fast for it. At the deadline the migration is given up, or the guest is paused until it has moved (``force``), or
    it runs on the target while the rest of its memory follows (``postcopy``: a broken network then stops it). ``tls``:
    None is TLS where both nodes have certificates.
    """

    live: bool = True
    bandwidth_mib_s: BandwidthMibS | None = None
    downtime_ms: DowntimeMs | None = None
    downtime_max_ms: DowntimeMs | None = None
    deadline_s: TimeoutS | None = None
    on_deadline: OnDeadline = "abort"
    auto_converge: bool = False
    xbzrle: bool = False
    compression: Literal["none", "zlib", "zstd"] = "none"
    multifd_channels: Channels = 0
    postcopy: Literal["never", "if-needed", "at-once"] = "never"
    copy_storage: Literal["none", "full", "top"] = "none"
    tls: bool | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        _require_room(self.downtime_ms, self.downtime_max_ms)
        if self.compression != "none" and not self.multifd_channels:
            raise ValueError("compression: works on the channels of multifd_channels; give 2 or more")
        if self.xbzrle and self.multifd_channels:
            raise ValueError("xbzrle: does nothing with multifd_channels; choose one of them")
        if self.multifd_channels and (self.postcopy != "never" or self.on_deadline == "postcopy"):
            raise ValueError("multifd_channels: does not go together with post-copy; choose one of them")
        return self


class _Movement(NameArguments):
    target: NodeName


class MigrationInfoArguments(MoveArguments, _Movement):
    """``migration.info``: what the target has to know of the guest ``name``, with how it shall move."""


class MigrateArguments(MigrationInfoArguments):
    """``instance.migrate``: move a guest to the node ``target``. Sent to the node where it is.

    With ``dry_run`` nothing moves: the guest's memory is watched for ``sample_s``, and the result is a prediction.
    """

    dry_run: bool = False
    sample_s: Annotated[float, Field(gt=0, le=SAMPLE_MAX_S, allow_inf_nan=False)] = 1


class MigrateTuneArguments(NameArguments):
    """``instance.migrate_tune``: change what is given of a migration under way.

    ``postcopy_now`` lets the guest run on the target at once, its memory following; ``force_now`` pauses it until it
    has moved.
    """

    bandwidth_mib_s: BandwidthMibS | None = None
    downtime_ms: DowntimeMs | None = None
    downtime_max_ms: DowntimeMs | None = None
    deadline_s: TimeoutS | None = None
    on_deadline: OnDeadline | None = None
    postcopy_now: bool = False
    force_now: bool = False

    @model_validator(mode="after")
    def _changes_something(self) -> MigrateTuneArguments:
        _require_room(self.downtime_ms, self.downtime_max_ms)
        if self.postcopy_now and self.force_now:
            raise ValueError("force_now: a guest that moves by post-copy is not paused; choose one of them")
        if not self.changes():
            raise ValueError("arguments: nothing to change is given: one or more of " + ", ".join(_TUNABLE))
        return self

    def changes(self) -> dict[str, object]:
        """What is to be changed, by its name."""
        given = {name: getattr(self, name) for name in _TUNABLE}
        return {name: value for name, value in given.items() if value is not None and value is not False}


_TUNABLE = [name for name in MigrateTuneArguments.model_fields if name not in NameArguments.model_fields]


class MigrateCancelArguments(NameArguments):
    """``instance.migrate_cancel``: give up the migration of an instance, if it still can be."""


class MigrationAcceptArguments(JobArguments):
    """``migration.accept``, sent to the target: have a QEMU there that waits. ``info`` is what migration.info returned.

    The result's ``migration_id`` names the migration from here on.
    """

    info: Passed


class MigrationRunArguments(NameArguments):
    """``migration.run``, sent to the source: move the memory. ``accepted`` is what migration.accept returned."""

    accepted: Passed


class MigrationFinalizeArguments(JobArguments):
    """``migration.finalize``, sent to the target: let the guest go on there, or, without ``success``, undo accept."""

    migration_id: JobId
    success: bool = True


class MigrationRecoverArguments(JobArguments):
    """``migration.recover``, sent to the target: listen again for the rest of a post-copy whose connection broke."""

    migration_id: JobId
