"""Every cell of the recovery table, with a real QEMU: a job whose worker died goes on as the table says.

Those of reboots and restarts are in test_recovery_reboot.py, so that the two can run side by side; those of changes of
a running guest in test_hotplug_recovery.py, those of snapshots and backups in test_snapshot_recovery.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostler.contract import TaskName
from tests.node.recovering import CONTENT, HOTPLUG, Cell, Stage, cells, open_stage
from tests.node.recovery_meanings import taken_up_as_decided
from worker.operations.recovery_table import TABLE

pytestmark = pytest.mark.node

ELSEWHERE = (TaskName.INSTANCE_REBOOT, TaskName.INSTANCE_RESTART, *HOTPLUG, *CONTENT)
TASKS = [task for task in TABLE if task not in ELSEWHERE]


@pytest.fixture(scope="module")
def stage(qemu: None) -> Iterator[Stage]:
    with open_stage() as opened:
        yield opened


@pytest.mark.parametrize("cell", cells(*TASKS), ids=str)
def test_a_job_goes_on_as_the_table_says(stage: Stage, cell: Cell) -> None:
    with stage.scene(cell) as scene:
        taken_up_as_decided(scene)
