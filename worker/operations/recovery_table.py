"""How a job goes on whose worker died: (operation, phase, what is true) and what the next worker does.

The phase is the last one the dead worker recorded, before its side effect; what is true is asked of SQL, /proc, QEMU's
monitor and its journal (``recovery.find_out``). A test walks the table cell by cell, and docs/recovery.md shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from hostler.contract import TaskName


class Reality(StrEnum):
    """What is true of the instance's QEMU on this node."""

    NO_RUNTIME = "no runtime"
    """SQL knows of no QEMU, and of none that ended since the phase began."""
    GONE = "gone"
    """QEMU ended without the guest's doing: killed, crashed, or the host was rebooted."""
    SHUT_DOWN = "shut down"
    """The guest shut itself down, as QEMU's journal says."""
    SILENT = "silent"
    """QEMU runs and does not answer."""
    PAUSED = "paused"
    """QEMU answers and the guest's processors stand still: paused, or not yet started."""
    RUNNING = "running"
    """QEMU answers and the guest runs."""
    RESET = "was reset"
    """QEMU's journal has a reset since the phase began. Looked for in phase ``reset`` alone."""


class Action(StrEnum):
    """What the next worker does."""

    BEGIN = "begin"
    """Nothing of it has taken effect: from its first phase."""
    CONTINUE = "continue"
    """Go on at the phase it was in."""
    COMPLETE = "complete"
    """It has taken effect, wholly or nearly: what is missing of it is done, and the job ends."""
    UNDO = "undo"
    """End the half-started QEMU, in which no guest ran yet, give all back, and go on before that start."""
    ASK = "ask"
    """Nothing can be concluded and nothing is touched: asked again as a transient failure; if it stays so the job
    fails, the instance is ``unknown``, and an operator decides."""


Cells = Mapping[Reality, Action]


@dataclass(frozen=True)
class Row:
    """What to do about a job that was in one of ``phases``.

    ``committed``: it is past its last point of return. ``own``: only a QEMU that this very job started counts; the
    guest may have had another one all the time, which is then not the job's to touch.
    """

    phases: tuple[str, ...]
    cells: Cells
    why: str
    committed: bool = False
    own: bool = False


_LOOKED_AT = (
    Reality.NO_RUNTIME, Reality.GONE, Reality.SHUT_DOWN, Reality.SILENT, Reality.PAUSED, Reality.RUNNING,
)  # fmt: skip


def _cells(
    no_runtime: Action, gone: Action, shut_down: Action, silent: Action, paused: Action, running: Action
) -> Cells:
    return dict(zip(_LOOKED_AT, (no_runtime, gone, shut_down, silent, paused, running), strict=True))


BEGIN, CONTINUE, COMPLETE, UNDO, ASK = Action
ALWAYS_BEGIN = _cells(BEGIN, BEGIN, BEGIN, BEGIN, BEGIN, BEGIN)

_LOOKING = Row(("received", "validate"), ALWAYS_BEGIN, "It had only looked; what is in its way it finds itself.")
_STARTING = Row(
    ("claim", "uid", "network", "sockets", "spawn", "greeting"),
    _cells(BEGIN, UNDO, UNDO, UNDO, UNDO, COMPLETE),
    "The guest's processors were never started before phase continue, so that ending its QEMU destroys nothing. One "
    "that runs all the same was continued by somebody, and is kept.",
    own=True,
)
_STARTED = Row(
    ("continue", "record"),
    _cells(BEGIN, UNDO, COMPLETE, ASK, COMPLETE, COMPLETE),
    "The guest may have run: a QEMU that lives is kept and recorded. One that shut itself down has been started.",
    committed=True,
    own=True,
)
_SHUTTING_DOWN = "A button pressed twice does no harm; the guest may not have seen the first."
_KILLING = "It was past its last point of return; a signal sent twice does no harm."

START = (_LOOKING, _STARTING, _STARTED)


def _hotplug(phase: str) -> tuple[Row, ...]:
    why = (
        "QEMU is asked what of it there is, and what is missing is done. A guest that ended has nothing that could be "
        "changed: the job says so, unless the change was recorded before."
    )
    cells = _cells(BEGIN, BEGIN, BEGIN, ASK, CONTINUE, CONTINUE)
    return Row(("received",), ALWAYS_BEGIN, "It had only looked."), Row((phase,), cells, why, committed=True)


_SNAPSHOT = (
    "What QEMU has open decides, or, without one, whether anything was written to the new files: then the snapshot was "
    "taken, and is kept; else what is there of it is removed, and it begins anew."
)
_MERGING = (
    "A merge that goes on in QEMU is waited for, one that is done is recorded, and else it is begun again: it does no "
    "harm to merge twice. Without a QEMU the files are merged as they are."
)

TABLE: dict[TaskName, tuple[Row, ...]] = {
    TaskName.INSTANCE_START: START,
    TaskName.INSTANCE_RESTART: START,
    TaskName.INSTANCE_STOP: (
        Row(("received",), ALWAYS_BEGIN, "It had only looked."),
        Row(("shutdown",), _cells(COMPLETE, COMPLETE, COMPLETE, ASK, CONTINUE, CONTINUE), _SHUTTING_DOWN),
        Row(("kill",), _cells(COMPLETE, COMPLETE, COMPLETE, CONTINUE, CONTINUE, CONTINUE), _KILLING, committed=True),
    ),
    TaskName.INSTANCE_REBOOT: (
        Row(("received",), ALWAYS_BEGIN, "It had only looked."),
        Row(
            ("reset",),
            {**_cells(BEGIN, BEGIN, BEGIN, ASK, CONTINUE, CONTINUE), Reality.RESET: COMPLETE},
            "QEMU's journal tells whether the reset line was pulled. A guest that ended cannot be reset.",
            committed=True,
        ),
        Row(("shutdown",), _cells(CONTINUE, CONTINUE, CONTINUE, ASK, CONTINUE, CONTINUE), _SHUTTING_DOWN),
        Row(("kill",), _cells(CONTINUE, CONTINUE, CONTINUE, CONTINUE, CONTINUE, CONTINUE), _KILLING, committed=True),
        Row(
            ("rebuild", *_STARTING.phases),
            _cells(CONTINUE, UNDO, UNDO, UNDO, UNDO, COMPLETE),
            "The guest was ended to be started anew, so it is; " + _STARTING.why[0].lower() + _STARTING.why[1:],
            committed=True,
            own=True,
        ),
        replace(_STARTED, cells=_cells(CONTINUE, UNDO, COMPLETE, ASK, COMPLETE, COMPLETE)),
    ),
    TaskName.INSTANCE_PAUSE: (
        Row(("received",), ALWAYS_BEGIN, "It had only looked."),
        Row(
            ("pause",),
            _cells(BEGIN, BEGIN, BEGIN, ASK, COMPLETE, CONTINUE),
            "A guest that ended cannot be paused: the job says so.",
            committed=True,
        ),
    ),
    TaskName.INSTANCE_RESUME: (
        Row(("received",), ALWAYS_BEGIN, "It had only looked."),
        Row(
            ("resume",),
            _cells(BEGIN, BEGIN, BEGIN, ASK, CONTINUE, COMPLETE),
            "A guest that ended cannot be resumed: the job says so.",
            committed=True,
        ),
    ),
    TaskName.INSTANCE_CLEANUP: (
        Row(("received",), ALWAYS_BEGIN, "It had only looked."),
        Row(
            ("cleanup",),
            _cells(CONTINUE, CONTINUE, CONTINUE, BEGIN, BEGIN, BEGIN),
            "What was given back is not looked for again. A guest that lives after all is refused.",
            committed=True,
        ),
    ),
    TaskName.INSTANCE_DISK_ADD: _hotplug("plug"),
    TaskName.INSTANCE_DISK_REMOVE: _hotplug("unplug"),
    TaskName.INSTANCE_DISK_RESIZE: _hotplug("resize"),
    TaskName.INSTANCE_NIC_ADD: _hotplug("plug"),
    TaskName.INSTANCE_NIC_REMOVE: _hotplug("unplug"),
    TaskName.INSTANCE_CD_INSERT: _hotplug("medium"),
    TaskName.INSTANCE_CD_EJECT: _hotplug("medium"),
    TaskName.INSTANCE_SET_MEMORY: _hotplug("balloon"),
    TaskName.INSTANCE_SET_PASSWORD: _hotplug("password"),
    TaskName.SNAPSHOT_CREATE: (Row(("received", "overlay", "snapshot"), ALWAYS_BEGIN, _SNAPSHOT),),
    TaskName.SNAPSHOT_REVERT: (
        Row(("received", "overlay"), ALWAYS_BEGIN, "The new files were not yet in their place; they are made anew."),
        Row(
            ("exchange",),
            _cells(CONTINUE, CONTINUE, CONTINUE, BEGIN, BEGIN, BEGIN),
            "The files that are not yet exchanged are. With a guest that runs after all it is refused.",
            committed=True,
        ),
    ),
    TaskName.SNAPSHOT_DELETE: (
        Row(("received",), ALWAYS_BEGIN, "It had only looked."),
        Row(("merge",), _cells(CONTINUE, CONTINUE, CONTINUE, ASK, CONTINUE, CONTINUE), _MERGING, committed=True),
    ),
    TaskName.INSTANCE_BACKUP: (
        Row(
            ("received", "copy"),
            ALWAYS_BEGIN,
            "A copy is of one moment: what is there of it, in QEMU and as files, is removed, and it begins anew.",
        ),
        Row(
            ("publish",),
            _cells(CONTINUE, CONTINUE, CONTINUE, ASK, CONTINUE, CONTINUE),
            "The copies were complete: those that have not got their names yet get them.",
            committed=True,
        ),
    ),
}
"""Jobs that are not in the table change nothing, or look anew at what is true, and begin anew."""


def row_for(task: TaskName, phase: str) -> Row:
    """The row of the table. Raises LookupError for a phase the operation does not have."""
    for row in TABLE[task]:
        if phase in row.phases:
            return row
    raise LookupError(f"{task} has no phase {phase!r} in the recovery table")
