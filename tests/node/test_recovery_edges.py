"""Beside the cells of the recovery table: QEMUs that are not the job's, jobs that are cancelled, jobs given up."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import update

from hostler.contract import TaskName
from hostler.errors import InvalidArgument
from models import Instance, utc_now
from tests.node.recovering import Cell, Scene, Stage, open_stage
from tests.node.recovery_meanings import STATUS, assert_means
from worker.errors import AlreadyRunning, Cancelled
from worker.kvm.tiny_guest import IGNORE_KEY, IGNORING_MESSAGE
from worker.operations import recovery
from worker.operations.recovery_table import TABLE, Action, Reality, Row, row_for

pytestmark = pytest.mark.node

ROWS = [(task, row) for task, rows in TABLE.items() for row in rows]


@pytest.fixture(scope="module")
def stage(qemu: None) -> Iterator[Stage]:
    with open_stage() as opened:
        yield opened


def at_the_end_of(task: TaskName, row: Row, reality: Reality) -> Cell:
    return Cell(task, row, row.phases[-1], reality)


@pytest.mark.parametrize("another_ended", [False, True], ids=["alone", "after-one-that-ended"])
@pytest.mark.parametrize("cell", [at_the_end_of(*each, Reality.RUNNING) for each in ROWS if each[1].own], ids=str)
def test_a_qemu_that_the_job_did_not_start_is_not_touched(stage: Stage, cell: Cell, another_ended: bool) -> None:
    with stage.scene(cell, own=False) as scene:
        if another_ended:
            with stage.made.database().transaction() as session:
                session.execute(update(Instance).where(Instance.name == scene.name).values(ended_at=utc_now()))
        scene.take_up()
        if cell.task is TaskName.INSTANCE_RESTART:
            assert scene.result["how"] == "nothing_to_do"
        else:
            assert isinstance(scene.error, AlreadyRunning)
        scene.keeps("running")


def cancel_without_a_worker(scene: Scene) -> None:
    scene.worker.node.ledger.cancel(scene.job_id, "no longer wanted")


@pytest.mark.parametrize("cell", [at_the_end_of(*each, Reality.PAUSED) for each in ROWS], ids=str)
def test_a_job_cancelled_while_no_worker_ran_gives_up_unless_it_was_past_its_last_point_of_return(
    stage: Stage, cell: Cell
) -> None:
    with stage.scene(cell) as scene:
        cancel_without_a_worker(scene)
        scene.take_up()
        if cell.row.committed:
            assert_means(scene, cell.reality, cell.action)
        elif cell.action is Action.UNDO:
            assert isinstance(scene.error, Cancelled)
            assert scene.ended()
        elif cell.task is TaskName.INSTANCE_RESTART:
            assert scene.result["how"] == "nothing_to_do"
        else:
            refused_anyway = cell.task in (TaskName.INSTANCE_CLEANUP, TaskName.SNAPSHOT_REVERT)
            assert isinstance(scene.error, AlreadyRunning if refused_anyway else Cancelled)
            scene.keeps(STATUS[cell.reality])


@pytest.mark.parametrize("phase", ["continue", "pause"])
def test_a_cancelled_job_that_was_past_its_last_point_of_return_is_asked_again_while_its_qemu_is_silent(
    stage: Stage, phase: str
) -> None:
    task, row = next(each for each in ROWS if phase in each[1].phases)
    with stage.scene(Cell(task, row, phase, Reality.SILENT)) as scene:
        cancel_without_a_worker(scene)
        job = scene.take_up()
        assert not job.is_giving_up


def test_a_reboot_cancelled_while_no_worker_ran_brings_back_a_guest_that_it_has_shut_down(stage: Stage) -> None:
    row = row_for(TaskName.INSTANCE_REBOOT, "shutdown")
    with stage.scene(Cell(TaskName.INSTANCE_REBOOT, row, "shutdown", Reality.SHUT_DOWN)) as scene:
        cancel_without_a_worker(scene)
        scene.take_up()
        scene.runs_anew()


@pytest.mark.parametrize("phase", ["shutdown", "kill"])
def test_a_guest_that_could_not_be_started_anew_is_not_ended_by_a_reboot_that_goes_on(stage: Stage, phase: str) -> None:
    row = row_for(TaskName.INSTANCE_REBOOT, phase)
    with stage.scene(Cell(TaskName.INSTANCE_REBOOT, row, phase, Reality.RUNNING)) as scene:
        Path(scene.instance["disks"][0]["path"]).unlink()
        with pytest.raises(InvalidArgument, match="No such file"):
            scene.take_up()
        scene.keeps("running")


def test_a_guest_that_is_to_be_left_paused_stays_before_its_first_instruction(stage: Stage) -> None:
    row = row_for(TaskName.INSTANCE_START, "continue")
    with stage.scene(Cell(TaskName.INSTANCE_START, row, "continue", Reality.PAUSED)) as scene:
        job = scene.worker.receive(scene.job_id, scene.cell.task, scene.arguments)
        view = scene.worker.carry_out(job, scene.cell.task, scene.arguments | {"paused": True})
        assert view["state"] == "paused"
        scene.keeps("paused")


def test_a_guest_is_asked_where_it_was_started_also_when_the_run_folder_is_another_one_by_now(stage: Stage) -> None:
    row = row_for(TaskName.INSTANCE_START, "continue")
    with stage.scene(Cell(TaskName.INSTANCE_START, row, "continue", Reality.RUNNING)) as scene:
        elsewhere = stage.made.settings.model_copy(update={"run_dir": stage.made.root / "elsewhere"})
        scene.worker.node.settings = elsewhere
        scene.take_up()
        assert scene.decided(Reality.RUNNING, Action.COMPLETE)
        scene.keeps("running")


def test_a_stop_that_is_cancelled_just_when_its_time_is_up_leaves_the_guest_running(stage: Stage) -> None:
    task = TaskName.INSTANCE_STOP
    with stage.scene(Cell(task, row_for(task, "shutdown"), "shutdown", Reality.RUNNING)) as scene:
        with stage.made.serial(scene.name) as serial:
            serial.send(IGNORE_KEY)
            serial.read_until(IGNORING_MESSAGE)
        job = scene.worker.receive(scene.job_id, task, scene.arguments)

        def wait(ended: threading.Event, timeout_s: float) -> bool:
            return ended.wait(timeout_s) or not job.cancel()

        job.wait = wait  # type: ignore[method-assign]  # no cancel from outside comes between the two
        with pytest.raises(Cancelled):
            scene.worker.carry_out(job, task, scene.arguments | {"timeout_s": 0.2})
        scene.keeps("running")


@pytest.mark.parametrize("reality", [Reality.GONE, Reality.SHUT_DOWN, Reality.RUNNING])
@pytest.mark.parametrize(
    ("task", "row"),
    [pytest.param(*each, id=f"{each[0]}-{each[1].phases[0]}") for each in ROWS if each[1].phases != ("received",)],
)
def test_of_a_job_that_is_given_up_nothing_stays_half_done(
    stage: Stage, task: TaskName, row: Row, reality: Reality
) -> None:
    cell = Cell(task, row, row.phases[0], reality)  # nothing is recorded yet of what is to be given back
    with stage.scene(cell) as scene:
        job = scene.worker.receive(scene.job_id, task, scene.arguments)
        recovery.abandon(job.node, scene.worker.guests, job, task, scene.name)
        if cell.action is Action.UNDO or reality not in STATUS:
            assert scene.ended()
        else:
            scene.keeps(STATUS[reality])
            assert scene.worker.guests.get(scene.name)
