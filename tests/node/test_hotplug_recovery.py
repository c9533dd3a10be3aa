"""A worker that dies while it changes a running guest neither loses nor doubles a device, wherever it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import select

from hostler.contract import TaskName
from hostler.errors import InvalidArgument
from hostler.payloads import Disk, Instance, Nic
from models import DiskLease
from tests.node.recovering import HOTPLUG, MAC, Cell, Scene, Stage, cells, open_stage
from tests.node.recovery_meanings import assert_means, taken_up_as_decided
from worker.kvm import drives
from worker.kvm.command_line.disks import cd_image, disk_device, disk_image
from worker.kvm.command_line.network import netdev, nic_device
from worker.kvm.qmp import Monitor
from worker.operations.recovery_table import Action, Reality

pytestmark = pytest.mark.node

CD_INSERT = TaskName.INSTANCE_CD_INSERT
ADD, REMOVE, NIC_ADD = TaskName.INSTANCE_DISK_ADD, TaskName.INSTANCE_DISK_REMOVE, TaskName.INSTANCE_NIC_ADD


def telling(cell: Cell) -> bool:
    """All cells of one task, of the others those that are not the same code again."""
    return cell.task is ADD or (cell.phase != "received" and cell.reality in (Reality.RUNNING, Reality.GONE))


@pytest.fixture(scope="module")
def stage(qemu: None) -> Iterator[Stage]:
    with open_stage() as opened:
        yield opened


@pytest.mark.parametrize("cell", [cell for cell in cells(*HOTPLUG) if telling(cell)], ids=str)
def test_a_job_goes_on_as_the_table_says(stage: Stage, cell: Cell) -> None:
    with stage.scene(cell) as scene:
        taken_up_as_decided(scene)


@contextmanager
def left_in_the_middle(stage: Stage, task: TaskName) -> Iterator[tuple[Scene, Monitor]]:
    """A running guest that a dead worker was changing, and QEMU's monitor, to do by hand what that worker had done."""
    (cell,) = (each for each in cells(task) if each.phase != "received" and each.reality is Reality.RUNNING)
    with stage.scene(cell) as scene:
        guest = scene.worker.guests.get(scene.name)
        assert guest
        yield scene, guest.talk()


def leases(scene: Scene) -> list[str]:
    with scene.made.reading() as session:
        return [*session.scalars(select(DiskLease.path).where(DiskLease.instance_name == scene.name))]


@pytest.mark.parametrize("done", ["the image is open", "the disk is plugged in", "all is recorded"])
def test_a_disk_is_there_once_whatever_of_it_the_dead_worker_had_done(stage: Stage, done: str) -> None:
    with left_in_the_middle(stage, ADD) as (scene, monitor):
        disk = Disk.model_validate(scene.extra_disk())
        before = Instance.model_validate(scene.instance)
        wanted = before.model_copy(update={"disks": [*before.disks, disk]})
        monitor.add_block_node(disk_image(wanted, 1, disk, is_block_device=False))
        if done != "the image is open":
            monitor.plug(disk_device(wanted, 1, disk))
        if done == "all is recorded":
            scene.take_up()
            scene.next_worker()
        scene.take_up()
        assert_means(scene, Reality.RUNNING, Action.CONTINUE)
        assert sorted(leases(scene)) == sorted([before.disks[0].path, disk.path])


@pytest.mark.parametrize("done", ["the guest let go", "the image is closed", "all is recorded"])
def test_a_disk_is_gone_whatever_of_it_the_dead_worker_had_done(stage: Stage, done: str) -> None:
    with left_in_the_middle(stage, REMOVE) as (scene, monitor):
        monitor.ask_to_unplug("disk0-device")
        if done == "the image is closed":
            guest = scene.worker.guests.get(scene.name)
            assert guest and guest.unplugged.wait(30)
            monitor.remove_block_node("disk0")
        if done == "all is recorded":
            scene.take_up()
            scene.next_worker()
        scene.take_up()
        assert_means(scene, Reality.RUNNING, Action.CONTINUE)
        assert leases(scene) == []


STEPS = ["the image is open", "the tray is open", "the old one is out", "the new one is in", "all is recorded"]


@pytest.mark.parametrize("done", STEPS)
def test_a_cd_is_in_the_drive_whatever_of_it_the_dead_worker_had_done(stage: Stage, done: str) -> None:
    with left_in_the_middle(stage, CD_INSERT) as (scene, monitor):
        path = scene.arguments["path"]
        for step in STEPS[: STEPS.index(done) + 1]:
            match step:
                case "the image is open":
                    monitor.add_block_node(cd_image("cdrom0", path, "file"))
                case "the tray is open":
                    drives.open_tray(monitor, "cdrom0-device", force=True)
                case "the old one is out":
                    drives.remove_medium(monitor, "cdrom0-device")
                case "the new one is in":
                    drives.insert_medium(monitor, "cdrom0-device", "cdrom0")
                case "all is recorded":
                    scene.take_up()
                    scene.next_worker()
        scene.take_up()
        assert_means(scene, Reality.RUNNING, Action.CONTINUE)
        assert sorted(leases(scene)) == sorted([scene.instance["disks"][0]["path"], path])


@pytest.mark.parametrize("done", ["the host's side", "the card is plugged in", "all is recorded"])
def test_a_card_is_there_once_whatever_of_it_the_dead_worker_had_done(stage: Stage, done: str) -> None:
    with left_in_the_middle(stage, NIC_ADD) as (scene, monitor):
        nic = Nic(mac=MAC, mode="user")
        wanted = Instance.model_validate(scene.instance | {"nics": [nic.model_dump()]})
        monitor.add_network(netdev(0, nic, ()), {})
        if done != "the host's side":
            monitor.plug(nic_device(wanted, 0, nic))
        if done == "all is recorded":
            scene.take_up()
            scene.next_worker()
        scene.take_up()
        assert_means(scene, Reality.RUNNING, Action.CONTINUE)
        assert scene.human("info network").count("netdev0") == 1


def test_what_an_earlier_job_left_behind_is_in_nobody_s_way(stage: Stage) -> None:
    with left_in_the_middle(stage, ADD) as (scene, monitor):
        before = Instance.model_validate(scene.instance)
        other = Disk(path=str(scene.made.root / f"{scene.name}-other.img"))
        (scene.made.root / f"{scene.name}-other.img").write_bytes(b"\0" * 2**20)
        monitor.add_block_node(disk_image(before, 1, other, is_block_device=False))
        scene.take_up()
        assert scene.error is None
        assert f"disk2: {scene.extra_disk()['path']}" in scene.human("info block -n")


def test_a_change_that_is_there_before_the_job_begins_is_refused_and_not_taken_for_its_own(stage: Stage) -> None:
    (cell,) = (each for each in cells(ADD) if each.phase == "received" and each.reality is Reality.RUNNING)
    with stage.scene(cell) as scene:
        scene.take_up()
        assert scene.error is None
        job = scene.worker.receive("another", ADD, {"name": "another"})
        with pytest.raises(InvalidArgument, match="given more than once"):
            scene.worker.carry_out(job, ADD, scene.arguments)
        scene.worker.node.ledger.succeed("another", None)
