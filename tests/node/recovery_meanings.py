"""What each action of the recovery table means for each operation, as it is seen from outside afterwards.

An action without a meaning here is a KeyError: a new row of the table, or a new action in one, is not passed over.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

from hostler.contract import TaskName
from tests.node.recovering import CONTENT, DEAD, HOTPLUG, Scene
from tests.nodes import until
from worker.errors import AlreadyRunning, NotRunning, QmpLost, TimedOut
from worker.operations.recovery_table import Action, Reality

Meaning = Callable[[Scene, Reality], None]
STATUS = {Reality.PAUSED: "paused", Reality.RUNNING: "running", Reality.SILENT: "running", Reality.RESET: "paused"}
"""How a guest is that nobody touched since it was staged; one that was silent ran."""


def taken_up_as_decided(scene: Scene) -> None:
    """The job is taken up, and what the table says comes true."""
    action, reality = scene.cell.action, scene.cell.reality
    if reality is Reality.SILENT and action in (Action.BEGIN, Action.CONTINUE):  # spares the wait for its deadlines
        with scene.answering_once_decided():
            scene.take_up()
    else:
        scene.take_up()
    assert scene.decided(reality, action)
    if action is Action.ASK:
        _asks(scene)
        scene.signal(signal.SIGCONT)
        scene.take_up_later()
        reality, action = Reality.RUNNING, scene.cell.row.cells[Reality.RUNNING]
        assert scene.decided(reality, action)
    assert_means(scene, reality, action)


def assert_means(scene: Scene, reality: Reality, action: Action) -> None:
    MEANINGS[scene.cell.task, action](scene, reality)


def _asks(scene: Scene) -> None:
    assert isinstance(scene.error, QmpLost)
    assert f"hostler stop {scene.name} --force" in scene.error.message
    row, guest = scene.row(), scene.worker.guests.get(scene.name)
    assert row and row.runtime and scene.old and guest
    assert (row.state, row.runtime.uuid, guest.process.pid) == ("unknown", scene.old_uuid, scene.old.pid)
    assert scene.is_frozen()
    assert scene.made.qemu_pids() == [scene.old.pid]


def _is_refused(scene: Scene, reality: Reality) -> None:
    assert isinstance(scene.error, AlreadyRunning)
    scene.keeps(STATUS[reality])


def _starts_or_is_refused(scene: Scene, reality: Reality) -> None:
    _starts_anew(scene, reality) if reality in DEAD else _is_refused(scene, reality)


def _restarts_or_has_nothing_to_do(scene: Scene, reality: Reality) -> None:
    if reality in DEAD:
        return _starts_anew(scene, reality)
    assert scene.result["how"] == "nothing_to_do"
    scene.keeps(STATUS[reality])
    return None


def _starts_anew(scene: Scene, reality: Reality) -> None:
    assert scene.error is None
    scene.runs_anew()
    assert scene.result["state"] == "running"


def _start_is_complete(scene: Scene, reality: Reality) -> None:
    assert scene.error is None
    if reality is Reality.SHUT_DOWN:
        assert (scene.result["state"], scene.result["reason"]) == ("stopped", "the guest shut down")
        assert scene.ended()
        return
    scene.keeps("running")
    assert scene.result["started_at"] and scene.result["qemu_version"]
    assert scene.old and scene.result["pid"] == scene.old.pid


def _stops_from_the_beginning(scene: Scene, reality: Reality) -> None:
    assert scene.error is None
    assert scene.result["how"] == ("already_stopped" if reality in DEAD else "killed")
    assert scene.ended()


def _stops(scene: Scene, reality: Reality) -> None:
    assert scene.error is None
    assert scene.result["how"] == ("killed" if scene.cell.phase == "kill" else "guest_shutdown")
    assert scene.result["state"] == "stopped"
    assert scene.ended()


def _stop_is_complete(scene: Scene, reality: Reality) -> None:
    assert scene.error is None
    assert scene.result["how"] == ("guest_shutdown" if reality is Reality.SHUT_DOWN else "killed")
    assert scene.ended()
    unasked = reality is Reality.NO_RUNTIME or (reality, scene.cell.phase) == (Reality.GONE, "shutdown")
    assert scene.result["state"] == ("crashed" if unasked else "stopped")


def _reboots_from_the_beginning(scene: Scene, reality: Reality) -> None:
    if reality in DEAD:
        assert isinstance(scene.error, NotRunning)
        assert scene.ended()
    else:
        _starts_anew(scene, reality)


def _reboots(scene: Scene, reality: Reality) -> None:
    if scene.cell.phase != "reset":
        return _starts_anew(scene, reality)
    assert scene.error is None
    scene.keeps(STATUS[reality])
    until(lambda: scene.resets() == 1, what="QEMU writes the reset into its journal")
    return None


def _reboot_is_complete(scene: Scene, reality: Reality) -> None:
    if scene.cell.phase != "reset":
        return _start_is_complete(scene, reality)
    assert scene.error is None
    assert scene.resets() == 1  # and not a second time
    scene.keeps("paused")
    return None


def _becomes(state: str) -> Meaning:
    def becomes(scene: Scene, reality: Reality) -> None:
        assert scene.error is None
        assert scene.result["state"] == state
        scene.keeps(state)

    return becomes


def _becomes_or_is_not_there(state: str) -> Meaning:
    def becomes(scene: Scene, reality: Reality) -> None:
        if reality in DEAD:
            assert isinstance(scene.error, NotRunning)
            assert scene.ended()
        else:
            _becomes(state)(scene, reality)

    return becomes


def _cleans_up(scene: Scene, reality: Reality) -> None:
    assert scene.error is None
    row = scene.row()
    assert row and row.state == "stopped"
    assert row.reason == ("the guest shut down" if reality is Reality.SHUT_DOWN else row.reason)
    assert scene.ended()


def _cleans_up_or_is_refused(scene: Scene, reality: Reality) -> None:
    _cleans_up(scene, reality) if reality in DEAD else _is_refused(scene, reality)


def _changes_the_guest(scene: Scene, reality: Reality) -> None:
    if reality in DEAD:
        assert isinstance(scene.error, NotRunning)
        assert scene.ended()
        return
    if scene.cell.task in (TaskName.INSTANCE_NIC_REMOVE, TaskName.INSTANCE_SET_MEMORY):  # the guest has to help
        assert isinstance(scene.error, TimedOut)
    else:
        assert scene.error is None
        assert _has_changed(scene)
    scene.keeps(STATUS[reality])


def _has_changed(scene: Scene) -> bool:
    row = scene.row()
    assert row
    boot = scene.instance["disks"][0]["path"]
    disks = [disk["path"] for disk in row.spec["disks"]]
    open_images = scene.human("info block -n")
    match scene.cell.task:
        case TaskName.INSTANCE_DISK_ADD:
            extra = scene.extra_disk()["path"]
            return disks == [boot, extra] and open_images.count(f"disk1: {extra}") == 1
        case TaskName.INSTANCE_DISK_REMOVE:
            return disks == [] and boot not in open_images
        case TaskName.INSTANCE_DISK_RESIZE:
            return Path(boot).stat().st_size == 8 * 2**20
        case TaskName.INSTANCE_NIC_ADD:
            return len(row.spec["nics"]) == 1 and scene.human("info network").count("nic0: ") == 1
        case TaskName.INSTANCE_CD_INSERT:
            return bool(row.spec["hvparams"]["cdrom_image_path"]) and open_images.count("cd.iso (raw") == 1
        case TaskName.INSTANCE_CD_EJECT:
            return not row.spec["hvparams"]["cdrom_image_path"] and "cd.iso" not in open_images
    return bool(row.spec["hvparams"]["vnc_password_file"].endswith("/other-password"))


def _changes_the_disks(scene: Scene, reality: Reality) -> None:
    if scene.cell.task is TaskName.SNAPSHOT_REVERT and reality not in DEAD:
        return _is_refused(scene, reality)
    assert scene.error is None
    row, boot = scene.row(), Path(scene.instance["disks"][0]["path"])
    overlay = Path(f"{boot}.s1.qcow2")
    deleted = scene.cell.task is TaskName.SNAPSHOT_DELETE
    backed_up = scene.cell.task is TaskName.INSTANCE_BACKUP
    assert row and row.spec["disks"][0]["path"] == str(boot if deleted or backed_up else overlay)
    assert overlay.exists() == (not deleted and not backed_up)
    assert Path(scene.arguments.get("targets", [boot])[0]).exists()
    if reality not in DEAD:
        assert "No active jobs" in scene.human("info block-jobs")
        scene.keeps(STATUS[reality])
    return None


MEANINGS: dict[tuple[TaskName, Action], Meaning] = {
    (TaskName.INSTANCE_START, Action.BEGIN): _starts_or_is_refused,
    (TaskName.INSTANCE_START, Action.UNDO): _starts_anew,
    (TaskName.INSTANCE_START, Action.COMPLETE): _start_is_complete,
    (TaskName.INSTANCE_RESTART, Action.BEGIN): _restarts_or_has_nothing_to_do,
    (TaskName.INSTANCE_RESTART, Action.UNDO): _starts_anew,
    (TaskName.INSTANCE_RESTART, Action.COMPLETE): _start_is_complete,
    (TaskName.INSTANCE_STOP, Action.BEGIN): _stops_from_the_beginning,
    (TaskName.INSTANCE_STOP, Action.CONTINUE): _stops,
    (TaskName.INSTANCE_STOP, Action.COMPLETE): _stop_is_complete,
    (TaskName.INSTANCE_REBOOT, Action.BEGIN): _reboots_from_the_beginning,
    (TaskName.INSTANCE_REBOOT, Action.CONTINUE): _reboots,
    (TaskName.INSTANCE_REBOOT, Action.UNDO): _starts_anew,
    (TaskName.INSTANCE_REBOOT, Action.COMPLETE): _reboot_is_complete,
    (TaskName.INSTANCE_PAUSE, Action.BEGIN): _becomes_or_is_not_there("paused"),
    (TaskName.INSTANCE_PAUSE, Action.CONTINUE): _becomes("paused"),
    (TaskName.INSTANCE_PAUSE, Action.COMPLETE): _becomes("paused"),
    (TaskName.INSTANCE_RESUME, Action.BEGIN): _becomes_or_is_not_there("running"),
    (TaskName.INSTANCE_RESUME, Action.CONTINUE): _becomes("running"),
    (TaskName.INSTANCE_RESUME, Action.COMPLETE): _becomes("running"),
    (TaskName.INSTANCE_CLEANUP, Action.BEGIN): _cleans_up_or_is_refused,
    (TaskName.INSTANCE_CLEANUP, Action.CONTINUE): _cleans_up,
    **{(task, action): _changes_the_guest for task in HOTPLUG for action in (Action.BEGIN, Action.CONTINUE)},
    **{(task, action): _changes_the_disks for task in CONTENT for action in (Action.BEGIN, Action.CONTINUE)},
}
