"""The cells of the recovery table for reboots and restarts, as in test_recovery.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostler.contract import TaskName
from tests.node.recovering import Cell, Stage, cells, open_stage
from tests.node.recovery_meanings import taken_up_as_decided

pytestmark = pytest.mark.node

TASKS = (TaskName.INSTANCE_REBOOT, TaskName.INSTANCE_RESTART)


@pytest.fixture(scope="module")
def stage(qemu: None) -> Iterator[Stage]:
    with open_stage() as opened:
        yield opened


@pytest.mark.parametrize("cell", cells(*TASKS), ids=str)
def test_a_job_goes_on_as_the_table_says(stage: Stage, cell: Cell) -> None:
    with stage.scene(cell) as scene:
        taken_up_as_decided(scene)
