"""The recovery table of live migration has one answer for whatever can be found, and each row is walked by a fault."""

from __future__ import annotations

from itertools import product

import pytest

from tests.faults.migration_faults import FAULTS
from worker.operations.live_migration.recovery_table import ALIVE, OF_QEMU, TABLE, Action, Row, Side, row_for
from worker.operations.live_migration.rows import BEFORE_THE_SWITCH, ON_THE_TARGET, SOURCE_OWNS, Stage

OPEN = {*Stage} - {Stage.DONE}

WITHOUT_A_FAULT = {
    ("transferring", Side.FOLLOWING): "QEMU always waits before the switch; for one that did not",
    ("switching", Side.FAILED): "QEMU fails between the last part and its end: no moment at which that can be made",
    ("switching", Side.UNDER_WAY): "some milliseconds; tests/faults/migrations.py kills there at random",
    ("moved", Side.IDLE): "as above, on the target",
    ("finalized", Side.FOLLOWING): "the sweep of post-copy kills there",
    ("aborted", Side.GONE): "both QEMUs killed: the target returns it to nobody",
}
"""Rows that no fault finds for sure, by a stage and side they fit, and why."""

OUTCOMES = {
    Action.PREPARE: {"target"}, Action.FOLLOW: {"target"}, Action.SWITCH: {"target"}, Action.ASK: {"target"},
    Action.CONTINUE: {"target"}, Action.CLEAN: {"target"}, Action.GIVE: {"target", "crashed"},
    Action.SEND: {"target", "source"}, Action.RETURN: {"source", "crashed"}, Action.GIVE_UP: {"source"},
    Action.END: {"crashed", "crashed there"},
}  # fmt: skip


def rows_of(stage: Stage) -> list[Row]:
    return [row for row in TABLE if stage in row.stages]


@pytest.mark.parametrize("stage", sorted(OPEN))
def test_whatever_is_found_there_is_an_answer(stage: Stage) -> None:
    for source, target in product(Side, Side):
        assert row_for(stage, source, target).why.endswith(".")


def test_nothing_is_done_about_one_that_is_done() -> None:
    with pytest.raises(LookupError):
        row_for(Stage.DONE, Side.COMPLETE, Side.COMPLETE)


def test_every_row_is_the_answer_to_something() -> None:
    reached = {id(row_for(stage, *sides)) for stage in OPEN for sides in product(Side, Side)}
    assert [row for row in TABLE if id(row) not in reached] == []


def test_a_qemu_that_keeps_silent_is_never_ended() -> None:
    for stage, other in product(OPEN - {Stage.ABORTED, Stage.FINALIZED, Stage.ACCEPTING}, Side):
        decides = (Side.SILENT, other) if stage in SOURCE_OWNS else (other, Side.SILENT)
        assert row_for(stage, *decides).action is Action.ASK


def test_what_may_have_run_on_the_target_never_goes_back() -> None:
    for stage, source, target in product((Stage.CONTINUING, Stage.FINALIZED), Side, Side):
        assert row_for(stage, source, target).action not in (Action.RETURN, Action.GIVE_UP)


def test_only_the_owner_s_side_is_ever_continued() -> None:
    for stage, source, target in product(OPEN, Side, Side):
        action = row_for(stage, source, target).action
        assert action is not Action.CONTINUE or stage in ON_THE_TARGET, (stage, source, target)
        assert action is not Action.GIVE_UP or stage in SOURCE_OWNS | {Stage.ABORTED}
        assert action is not Action.SEND or stage in BEFORE_THE_SWITCH


def test_every_word_of_qemu_means_something() -> None:
    assert {*OF_QEMU.values()} == ALIVE - {Side.SILENT}


@pytest.mark.parametrize("name", [name for name in FAULTS if FAULTS[name].finds])
def test_a_fault_ends_as_its_row_says(name: str) -> None:
    fault = FAULTS[name]
    assert fault.finds
    assert fault.owner in OUTCOMES[row_for(*fault.finds).action]


def test_every_row_is_walked_by_a_fault_or_says_why_not() -> None:
    walked = {id(row_for(*fault.finds)) for fault in FAULTS.values() if fault.finds}
    excused = {id(row_for(stage, side, side)) for stage, side in WITHOUT_A_FAULT}
    assert [row for row in TABLE if id(row) not in walked | excused] == []
