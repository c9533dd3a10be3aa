"""A worker that dies at work on a snapshot or a backup loses no write and leaves nothing, wherever it was."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hostler.contract import TaskName
from tests.node.recovering import CONTENT, Cell, Scene, Stage, cells, open_stage
from tests.node.recovery_meanings import taken_up_as_decided
from tests.nodes import until
from tests.services import missing
from worker.errors import OperationError
from worker.kvm import block, images
from worker.kvm.qmp import Monitor
from worker.operations import snapshot_rows, snapshots
from worker.operations.recovery_table import Reality

pytestmark = pytest.mark.node

CREATE, DELETE, REVERT = TaskName.SNAPSHOT_CREATE, TaskName.SNAPSHOT_DELETE, TaskName.SNAPSHOT_REVERT
AT = 2**20


class Died(BaseException):
    """The worker is killed here."""


@pytest.fixture(scope="module")
def stage(qemu: None) -> Iterator[Stage]:
    try:
        images.find()
    except OperationError as exc:
        missing("qemu-img", exc.message)
    with open_stage() as opened:
        yield opened


@pytest.mark.parametrize("cell", cells(*CONTENT), ids=str)
def test_a_job_goes_on_as_the_table_says(stage: Stage, cell: Cell) -> None:
    with stage.scene(cell) as scene:
        taken_up_as_decided(scene)


def write(scene: Scene, byte: int) -> None:
    for command in (f"write -P {byte} {AT} 64k", "flush"):
        assert "error" not in scene.human(f'qemu-io -d disk0-device "{command}"').lower()


def content_is(scene: Scene, byte: int) -> bool:
    """Of the instance's disk as its next start would open it."""
    row = scene.row()
    assert row
    disk = row.spec["disks"][0]
    command = ["qemu-io", "-U", "-r", "-f", disk["format"], "-c", f"read -P {byte} {AT} 64k", disk["path"]]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode == 0 and "failed" not in done.stdout


def dying(stage: Stage, task: TaskName, patch: pytest.MonkeyPatch, owner: Any, name: str, *, late: bool) -> Scene:
    """A guest whose worker died just before, or just after, a step of a job."""
    cell = next(each for each in cells(task) if each.reality is Reality.RUNNING and each.phase != "received")
    scene = Scene(stage.made, stage.loop, cell)
    os.truncate(scene.instance["disks"][0]["path"], 4 * 2**20)
    scene.start_guest()
    scene.human("cont")
    write(scene, 0x22)
    if task is REVERT:
        scene.human("quit")
        stage.made.until_state(scene.name, "stopped", "crashed")
    real: Callable[..., Any] = getattr(owner, name)

    def step(*args: Any, **kwargs: Any) -> Any:
        if late:
            real(*args, **kwargs)
        raise Died

    with patch.context() as patched:
        patched.setattr(owner, name, step)
        job = scene.worker.receive(scene.job_id, task, scene.arguments)
        with pytest.raises(Died):
            scene.worker.carry_out(job, task, scene.arguments)
    return scene


def revived(scene: Scene) -> None:
    scene.next_worker()
    scene.take_up()
    assert scene.error is None, scene.error


STEPS = [
    (CREATE, snapshot_rows, "insert"),
    (CREATE, images, "create_overlay"),
    (CREATE, snapshot_rows, "exchange"),
    (CREATE, Monitor, "add_block_node"),
    (CREATE, block, "take_snapshot"),
    (CREATE, snapshot_rows, "set_state"),
    (DELETE, snapshot_rows, "lease_for_merge"),
    (DELETE, block, "start_commit"),
    (DELETE, Monitor, "pause_vcpus"),
    (DELETE, snapshot_rows, "exchange"),
    (DELETE, block, "complete"),
    (DELETE, snapshots, "_go_on"),
    (DELETE, snapshots, "_remove"),
    (DELETE, snapshot_rows, "forget"),
]


@pytest.mark.parametrize("ends", [False, True], ids=["runs-on", "ends-meanwhile"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("task", "owner", "name"), STEPS, ids=[f"{task}-{name}" for task, _, name in STEPS])
def test_no_write_is_lost_whichever_step_the_worker_died_at(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, task: TaskName, owner: Any, name: str, late: bool, ends: bool
) -> None:
    scene = dying(stage, task, monkeypatch, owner, name, late=late)
    try:
        # A guest that is paused for a merge's last moment cannot write; any other one does, with no worker there.
        byte = 0x22 if scene.qemu_says() == "paused" and task is DELETE else 0x33
        if byte == 0x33:
            write(scene, byte)
        if ends:
            scene.human("quit")
            until(lambda: not scene.is_alive(), what="QEMU has ended")
        revived(scene)
        if not ends:
            assert scene.is_alive()
            assert "No active jobs" in scene.human("info block-jobs")
            write(scene, byte)
            scene.human("quit")
            scene.made.until_state(scene.name, "stopped", "crashed")
        assert content_is(scene, byte)
        kept = snapshot_rows.snapshots_of(scene.worker.node, scene.name)
        assert [row.state for row in kept] == (["ready"] if task is CREATE else [])
        boot = scene.instance["disks"][0]["path"]
        assert Path(f"{boot}.s1.qcow2").exists() == (task is CREATE)
    finally:
        scene.finish()


def test_a_guest_that_ran_before_a_merge_runs_after_it_though_the_worker_died_while_it_was_paused(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = dying(stage, DELETE, monkeypatch, block, "complete", late=False)
    try:
        assert scene.qemu_says() == "paused"
        revived(scene)
        assert scene.qemu_says() == "running"
    finally:
        scene.finish()


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "name"), [(images, "create_overlay"), (images, "make_durable")])
def test_a_revert_is_carried_out_whole_though_the_worker_died(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, late: bool
) -> None:
    scene = dying(stage, REVERT, monkeypatch, owner, name, late=late)
    try:
        revived(scene)
        assert content_is(scene, 0)
        assert not [*stage.made.root.glob(f"{scene.name}*.new")]
    finally:
        scene.finish()


def test_a_snapshot_that_nobody_finished_is_settled_by_the_next_job(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = dying(stage, CREATE, monkeypatch, snapshot_rows, "set_state", late=False)
    try:
        scene.worker.node.ledger.fail(scene.job_id, {"code": "INTERNAL", "message": "", "details": {}})
        write(scene, 0x33)
        scene.human("quit")
        stage.made.until_state(scene.name, "stopped", "crashed")
        job = scene.worker.receive(f"next-{scene.name}", CREATE, {"name": scene.name, "snapshot": "s2"})
        scene.worker.carry_out(job, CREATE, {"name": scene.name, "snapshot": "s2"})
        scene.worker.node.ledger.succeed(job.id, None)
        kept = snapshot_rows.snapshots_of(scene.worker.node, scene.name)
        assert [(row.name, row.state) for row in kept] == [("s1", "ready"), ("s2", "ready")]
        assert content_is(scene, 0x33)
    finally:
        scene.finish()
