"""How a live migration goes on, whoever died: (stage, what the source's QEMU says, what the target's) and what is done.

The stage is the one recorded in SQL, before what belongs to it; the rest is asked of the QEMUs, which go on without us.
There is no other way through a migration: the first attempt reads the same table. docs/recovery.md shows it, and the
faults that walk its rows are in tests/faults/migration_faults.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from worker.operations.live_migration.rows import Stage


class Side(StrEnum):
    """What is true of one of the two QEMUs."""

    GONE = "gone"
    """Its process has ended."""
    SILENT = "silent"
    """It runs and does not answer."""
    IDLE = "idle"
    """It is at no migration, or says what became of an earlier one; on the target: it waits for the source."""
    UNDER_WAY = "under way"
    """Memory or the devices' state is on its way, or being loaded."""
    STANDS_STILL = "stands still"
    """The source's, before the last part: the guest is paused, and goes on either way."""
    FAILED = "failed"
    """It has given up; the source's has let its guest go on."""
    COMPLETE = "complete"
    """All is sent, or has been loaded; with post-copy, all that the guest needs to go on."""
    FOLLOWING = "following"
    """Post-copy: the guest runs on the target, and the rest of its memory is still on its way."""


OF_QEMU = {
    "": Side.IDLE, "none": Side.IDLE, "setup": Side.UNDER_WAY, "active": Side.UNDER_WAY, "device": Side.UNDER_WAY,
    "wait-unplug": Side.UNDER_WAY, "cancelling": Side.UNDER_WAY, "pre-switchover": Side.STANDS_STILL,
    "failed": Side.FAILED, "cancelled": Side.FAILED, "completed": Side.COMPLETE, "postcopy-active": Side.FOLLOWING,
    "postcopy-paused": Side.FOLLOWING, "postcopy-recover": Side.FOLLOWING,
}  # fmt: skip
"""QEMU's words (QAPI MigrationStatus)."""


class Action(StrEnum):
    """What is done."""

    PREPARE = "prepare"
    """The target makes a QEMU that waits; one that was half made for this migration is ended first."""
    SEND = "send"
    """The source's QEMU is told to send."""
    FOLLOW = "follow"
    """It is watched until it says something else."""
    SWITCH = "switch"
    """It is recorded that there is no way back by a cancel, and the source's QEMU is told to send the last part."""
    GIVE = "give"
    """The target owns the guest from here on."""
    CONTINUE = "continue"
    """The target records that it may run, and lets the guest go on."""
    RETURN = "return"
    """The target's QEMU is ended, and the source owns the guest again."""
    GIVE_UP = "give up"
    """The source's QEMU is told to stop sending, its guest runs on if it ran, and the target removes what it made."""
    END = "end"
    """The guest has ended, on the node that owns it, as any guest does; the other side is removed."""
    CLEAN = "clean"
    """What is left on the source is removed, and the job ends."""
    ASK = "ask"
    """Nothing is concluded and nothing is touched: asked again."""


ANY = frozenset(Side)
ALIVE = ANY - {Side.GONE}


@dataclass(frozen=True)
class Row:
    """What is done in one of ``stages``, where the sides are as named."""

    stages: tuple[Stage, ...]
    source: frozenset[Side]
    target: frozenset[Side]
    action: Action
    why: str


def _row(stages: Stage | tuple[Stage, ...], source: object, target: object, action: Action, why: str) -> Row:
    def sides(given: object) -> frozenset[Side]:
        return frozenset({given}) if isinstance(given, Side) else frozenset(given)  # type: ignore[call-overload]

    return Row((stages,) if isinstance(stages, Stage) else stages, sides(source), sides(target), action, why)


TABLE = (
    _row(Stage.ACCEPTING, ANY, ANY, Action.PREPARE, "Nothing has been sent, and the guest has noticed nothing."),
    _row(
        Stage.TRANSFERRING, Side.GONE, ANY, Action.END,
        "The target cannot have all of it: the source sends the last part only once that is recorded.",
    ),
    _row((Stage.TRANSFERRING, Stage.SWITCHING), Side.SILENT, ANY, Action.ASK, "QEMU goes on by itself."),
    _row(
        Stage.TRANSFERRING, {Side.IDLE, Side.COMPLETE, Side.FAILED}, ANY, Action.SEND,
        "What QEMU says is of an earlier migration; or it failed while nobody looked, and will again.",
    ),
    _row(Stage.TRANSFERRING, Side.FOLLOWING, ANY, Action.GIVE, "QEMU has not waited for us, and goes back no more."),
    _row(Stage.TRANSFERRING, Side.UNDER_WAY, ANY, Action.FOLLOW, "Whoever died, QEMU sends on."),
    _row(
        (Stage.TRANSFERRING, Stage.SWITCHING), Side.STANDS_STILL, ANY, Action.SWITCH,
        "The guest stands still and nothing is decided, or it is and QEMU has not heard of it.",
    ),
    _row(Stage.SWITCHING, Side.UNDER_WAY, ANY, Action.FOLLOW, "The last part is on its way."),
    _row(
        Stage.SWITCHING, {Side.FAILED, Side.IDLE}, ANY, Action.GIVE_UP,
        "The source owns the guest, and the target never continues one that it does not own.",
    ),
    _row(
        Stage.SWITCHING, {Side.COMPLETE, Side.FOLLOWING}, ANY, Action.GIVE,
        "From here on the source's QEMU never continues the guest by itself.",
    ),
    _row(
        Stage.SWITCHING, Side.GONE, ANY, Action.GIVE,
        "The target alone can have the guest; it says whether it has all of it.",
    ),
    _row(Stage.MOVED, ANY, {Side.COMPLETE, Side.FOLLOWING}, Action.CONTINUE, "It is whole, and the target owns it."),
    _row(
        Stage.MOVED, ANY, {Side.UNDER_WAY, Side.IDLE}, Action.FOLLOW,
        "The target's QEMU still loads it; after half a minute it is asked again.",
    ),
    _row((Stage.MOVED, Stage.CONTINUING), ANY, Side.SILENT, Action.ASK, "It may run, or not: nobody may conclude."),
    _row(
        Stage.MOVED, ANY, {Side.FAILED, Side.GONE, Side.STANDS_STILL}, Action.RETURN,
        "It never ran on the target, as the stage tells, and with that QEMU gone it never will.",
    ),
    _row(
        Stage.CONTINUING, ANY, ALIVE - {Side.SILENT}, Action.CONTINUE,
        "To be continued twice does no harm. One that QEMU refuses to continue the first time is returned.",
    ),
    _row(
        Stage.CONTINUING, ANY, Side.GONE, Action.END,
        "It may have run on the target: the source's is older by now and never goes on.",
    ),
    _row(Stage.FINALIZED, Side.FOLLOWING, ANY, Action.FOLLOW, "The guest needs the rest of its memory."),
    _row(Stage.FINALIZED, ANY, ANY, Action.CLEAN, "The guest runs on the target."),
    _row(Stage.ABORTED, Side.GONE, ANY, Action.END, "The guest was the source's, or came back to a QEMU that is gone."),
    _row(Stage.ABORTED, ALIVE, ANY, Action.GIVE_UP, "It is given up, as recorded; what of that is missing is done."),
)  # fmt: skip
"""In this order: the first row counts that fits."""


def row_for(stage: str, source: Side, target: Side) -> Row:
    """What is done. Raises LookupError for ``done``, at which there is nothing."""
    for row in TABLE:
        if stage in row.stages and source in row.source and target in row.target:
            return row
    raise LookupError(f"a live migration that is {stage} has nothing to do")
