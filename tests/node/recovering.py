"""What the tests of recovery share: a cell of the table is staged with a real QEMU, and the job is taken up again.

Workers are incarnations inside the test's process: they die by letting go of everything without touching a guest.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from types import SimpleNamespace
from typing import Any

import psutil
from sqlalchemy import delete, select, update

from hostler.contract import InstanceState, TaskName
from hostler.payloads import ARGUMENTS, instance_of, parse
from migrations import schema
from models import Instance, InstanceLock, Job, Runtime, utc_now
from tasks import hotplug, instance, snapshot  # noqa: F401  (their import fills OPERATIONS)
from tasks.boundary import OPERATIONS, receipt_of
from tests.node.test_displays import free_port
from tests.nodes import TestNode, node, tiny_instance, until
from worker.errors import OperationError
from worker.kvm.folder import GuestFolder
from worker.kvm.process import ProcessIdentity
from worker.kvm.qmp import EventLoop
from worker.kvm.tiny_guest import POWER_OFF_KEY
from worker.operations import incarnation
from worker.operations.context import JobContext, NodeContext
from worker.operations.guests import Guests
from worker.operations.receipts import Verdict
from worker.operations.reconcile import adopt_guests
from worker.operations.recovery_table import TABLE, Action, Reality, Row

DEAD = frozenset({Reality.NO_RUNTIME, Reality.GONE, Reality.SHUT_DOWN})
PID_IS_RECORDED = ("greeting", "continue", "record")
HOTPLUG = (
    TaskName.INSTANCE_DISK_ADD,
    TaskName.INSTANCE_DISK_REMOVE,
    TaskName.INSTANCE_DISK_RESIZE,
    TaskName.INSTANCE_NIC_ADD,
    TaskName.INSTANCE_NIC_REMOVE,
    TaskName.INSTANCE_CD_INSERT,
    TaskName.INSTANCE_CD_EJECT,
    TaskName.INSTANCE_SET_MEMORY,
    TaskName.INSTANCE_SET_PASSWORD,
)
CONTENT = (
    TaskName.SNAPSHOT_CREATE,
    TaskName.SNAPSHOT_REVERT,
    TaskName.SNAPSHOT_DELETE,
    TaskName.INSTANCE_BACKUP,
)
"""Jobs about what is on the disks."""
MAC = "52:54:00:00:00:31"
_names = (f"g{number}" for number in count())


@dataclass(frozen=True)
class Cell:
    """One cell of the table, in one of its row's phases."""

    task: TaskName
    row: Row
    phase: str
    reality: Reality

    @property
    def action(self) -> Action:
        return self.row.cells[self.reality]

    def __str__(self) -> str:
        return f"{self.task.removeprefix('instance.')}-{self.phase}-{self.reality}".replace(" ", "_")


def cells(*tasks: TaskName) -> list[Cell]:
    """Every cell of these tasks, in its row's last phase; with a QEMU of the job's own, in the first phase too."""
    return [
        Cell(task, row, phase, reality)
        for task in tasks
        for row in TABLE[task]
        for reality in row.cells
        for phase in dict.fromkeys((row.phases[0], row.phases[-1]) if _is_worth_both(row, reality) else row.phases[-1:])
    ]


def _is_worth_both(row: Row, reality: Reality) -> bool:
    return row.own and reality is not Reality.SILENT  # which takes its time


def needed_by(task: TaskName, made: TestNode) -> dict[str, Any]:
    """What a job needs of its guest, beside what all guests have."""
    for name in ("password", "other-password"):
        (made.root / name).write_text(name)
    display = {"vnc_bind_address": "127.0.0.1", "vnc_password_file": str(made.root / "password")}
    needs: dict[TaskName, dict[str, Any]] = {
        TaskName.INSTANCE_DISK_ADD: {"hvparams": {"disk_type": "virtio-scsi"}},
        TaskName.INSTANCE_DISK_REMOVE: {"hvparams": {"disk_type": "virtio-scsi"}},
        TaskName.INSTANCE_NIC_REMOVE: {"nics": [{"mac": MAC, "mode": "user"}]},
        TaskName.INSTANCE_CD_INSERT: {"hvparams": {"cdrom_drive": True}},
        TaskName.INSTANCE_CD_EJECT: {"hvparams": {"cdrom_image_path": cd(made)}},
        TaskName.INSTANCE_SET_MEMORY: {"hvparams": {"balloon": True}},
        TaskName.INSTANCE_SET_PASSWORD: {"hvparams": display, "network_port": free_port()},
    }
    return needs.get(task, {})


def cd(made: TestNode) -> str:
    """A CD image, the same for all."""
    path = made.root / "cd.iso"
    path.write_bytes(b"\0" * 2**20)
    return str(path)


class Worker:
    """A worker incarnation, just started: what its predecessor left is taken over."""

    def __init__(self, made: TestNode, loop: EventLoop) -> None:
        me = incarnation.enter(made.database(), made.name)
        self.node = NodeContext(made.settings, made.database(), me, loop)
        self.guests = Guests(self.node)
        self.left_behind = [wakeup.job_id for wakeup in self.node.ledger.take_over()]
        adopt_guests(self.node, self.guests)

    def receive(self, job_id: str, task: TaskName, arguments: dict[str, Any]) -> JobContext:
        decision = self.node.ledger.receive(receipt_of(job_id, task, arguments))
        assert decision.verdict is Verdict.RUN
        job = JobContext(job_id, instance_of(arguments), self.node, lambda meta: None, attempt=decision.attempt)
        if decision.cancelled:
            job.cancel()
        return job

    def carry_out(self, job: JobContext, task: TaskName, arguments: dict[str, Any]) -> Any:
        service = SimpleNamespace(node=self.node, guests=self.guests)
        return OPERATIONS[task](service, job, parse(ARGUMENTS[task], arguments))

    def die(self) -> None:
        self.guests.close()


class Scene:
    """One instance, one job that was left in a phase, and the worker that takes it up."""

    def __init__(self, made: TestNode, loop: EventLoop, cell: Cell) -> None:
        self.made, self.loop, self.cell = made, loop, cell
        self.name = next(_names)
        self.job_id = f"job-{self.name}"
        self.instance = tiny_instance(made.root, self.name, **needed_by(cell.task, made))
        self.old: ProcessIdentity | None = None
        self.old_uuid = ""
        self.worker = Worker(made, loop)
        self.result: Any = None
        self.error: OperationError | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        more: dict[TaskName, dict[str, Any]] = {
            TaskName.INSTANCE_STOP: {"force": self.cell.phase == "received"},
            TaskName.INSTANCE_REBOOT: {"mode": {"reset": "reset", "shutdown": "soft"}.get(self.cell.phase, "hard")},
        }
        if self.cell.task is TaskName.INSTANCE_START:
            return {"instance": self.instance}
        more |= {task: {"snapshot": "s1"} for task in CONTENT}
        more[TaskName.INSTANCE_BACKUP] = {"targets": [str(self.made.root / f"{self.name}.backup")]}
        return {"name": self.name} | (more | self._hotplug()).get(self.cell.task, {})

    def _hotplug(self) -> dict[TaskName, dict[str, Any]]:
        boot = self.instance["disks"][0]["path"]
        return {
            TaskName.INSTANCE_DISK_ADD: {"disk": self.extra_disk()},
            TaskName.INSTANCE_DISK_REMOVE: {"path": boot},
            TaskName.INSTANCE_DISK_RESIZE: {"path": boot, "size_mib": 8},
            TaskName.INSTANCE_NIC_ADD: {"nic": {"mac": MAC, "mode": "user"}},
            TaskName.INSTANCE_NIC_REMOVE: {"mac": MAC, "timeout_s": 0.1},
            TaskName.INSTANCE_CD_INSERT: {"path": cd(self.made)},
            TaskName.INSTANCE_SET_MEMORY: {"memory_mib": 8, "timeout_s": 0.1},
            TaskName.INSTANCE_SET_PASSWORD: {"kind": "vnc", "password_file": str(self.made.root / "other-password")},
        }

    def extra_disk(self) -> dict[str, Any]:
        """A disk that the guest was not started with."""
        path = self.made.root / f"{self.name}-extra.img"
        path.write_bytes(b"\0" * 2**20)
        return {"path": str(path)}

    # Before the death

    def stage(self, *, own: bool | None = None) -> None:
        """Bring about what the cell says, up to the moment when the next worker has started.

        ``own`` is whether the QEMU, where there is one, is the job's; as the row says by default.
        """
        reality = self.cell.reality
        if reality is not Reality.NO_RUNTIME or self.cell.task is not TaskName.INSTANCE_START:
            self.start_guest()
        if reality is Reality.NO_RUNTIME and self.old:
            os.kill(self.old.pid, signal.SIGKILL)
            self.made.until_state(self.name, "crashed")
        self.begin()
        self.worker.die()
        if reality is not Reality.NO_RUNTIME:
            self.leave_as_at_death(own=self.cell.row.own if own is None else own)
            self.bring_about(reality)
        self.next_worker()
        if reality is Reality.SILENT:
            self.signal(signal.SIGSTOP)

    def start_guest(self) -> None:
        starter = f"starter-{self.name}"
        arguments = {"instance": self.instance, "paused": True}
        job = self.worker.receive(starter, TaskName.INSTANCE_START, arguments)
        view = self.worker.carry_out(job, TaskName.INSTANCE_START, arguments)
        self.worker.node.ledger.succeed(starter, view)
        if self.cell.task in (TaskName.SNAPSHOT_REVERT, TaskName.SNAPSHOT_DELETE):
            self.take_snapshot()
        self.old, self.old_uuid = ProcessIdentity.of(view["pid"]), view["uuid"]
        if self.cell.phase == "shutdown" or self.cell.reality is Reality.SHUT_DOWN:  # which a guest must be up for
            self.made.monitor(self.name, "cont")
            with self.made.serial(self.name) as serial:
                serial.tick()

    def take_snapshot(self) -> None:
        """What a job about a snapshot finds."""
        job = self.worker.receive(f"taker-{self.name}", TaskName.SNAPSHOT_CREATE, self.arguments)
        self.worker.carry_out(job, TaskName.SNAPSHOT_CREATE, self.arguments)
        self.worker.node.ledger.succeed(job.id, None)

    def begin(self) -> None:
        self.worker.receive(self.job_id, self.cell.task, self.arguments)
        for phase in self.cell.row.phases[: self.cell.row.phases.index(self.cell.phase) + 1]:
            if phase != "received":
                self.worker.node.ledger.advance(self.job_id, phase, 1, "")

    def leave_as_at_death(self, *, own: bool) -> None:
        """What the dead worker had, or had not yet, written down beside the phase."""
        with self.made.database().transaction() as session:
            row = session.get_one(Instance, self.name)
            assert row.runtime
            if self.cell.phase in ("shutdown", "kill"):
                row.state = InstanceState.STOPPING
            if own:
                row.runtime.started_by = self.job_id
                if self.cell.phase != "record":
                    row.state, row.runtime.started_at, row.runtime.qemu_version = InstanceState.STARTING, None, None
                if self.cell.phase not in PID_IS_RECORDED:
                    row.runtime.pid = row.runtime.start_ticks = None

    def bring_about(self, reality: Reality) -> None:
        assert self.old
        match reality:
            case Reality.GONE:
                self.signal(signal.SIGKILL)
                until(lambda: not self.is_alive(), what="QEMU is dead")
            case Reality.SHUT_DOWN:
                with self.made.serial(self.name) as serial:
                    serial.send(POWER_OFF_KEY)
                until(lambda: not self.is_alive(), what="the guest has shut down")
            case Reality.PAUSED:
                self.human("stop")
            case Reality.RUNNING | Reality.SILENT:
                self.human("cont")
            case Reality.RESET:
                self.human("system_reset")
                until(lambda: self.resets() == 1, what="the reset is in the journal")

    def next_worker(self) -> None:
        self.worker.die()
        self.worker = Worker(self.made, self.loop)
        assert self.job_id in self.worker.left_behind

    # Taking it up

    def take_up(self) -> JobContext:
        """Carry out the job again; ``result`` or ``error`` is what came of it."""
        self.result = self.error = None
        job = self.worker.receive(self.job_id, self.cell.task, self.arguments)
        assert job.attempt > 1
        try:
            self.result = self.worker.carry_out(job, self.cell.task, self.arguments)
        except OperationError as exc:
            self.error = exc
        return job

    def take_up_later(self) -> None:
        """The heartbeat beats, and the job's next attempt begins."""
        self.worker.guests.tend()
        assert self.job_id in [wakeup.job_id for wakeup in self.worker.node.ledger.take_over()]
        self.take_up()

    @contextmanager
    def answering_once_decided(self) -> Iterator[None]:
        """A silent QEMU answers again as soon as it is decided what to do."""

        def answer() -> None:
            until(self.decisions)
            self.signal(signal.SIGCONT)

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield
        finally:
            thread.join()

    # Looking from outside

    @property
    def folder(self) -> GuestFolder:
        return GuestFolder.of(self.made.settings.run_dir, self.old_uuid)

    def human(self, command: str) -> str:
        return self.made.monitor(self.name, command)

    def signal(self, number: signal.Signals) -> None:
        assert self.old
        assert self.old.is_alive()
        os.kill(self.old.pid, number)

    def is_alive(self) -> bool:
        return self.old is not None and self.old.is_alive()

    def is_frozen(self) -> bool:
        return self.old is not None and psutil.Process(self.old.pid).status() == psutil.STATUS_STOPPED

    def resets(self) -> int:
        """How often the reset line was pulled; the guest's firmware resets its machine too, and says so."""
        return sum(not event["data"]["guest"] for event in self.folder.events("RESET"))

    def qemu_says(self) -> str:
        found = re.search(r"VM status: (\w+)", self.human("info status"))
        assert found
        return found[1]

    def row(self) -> Instance | None:
        return self.made.row(self.name)

    def job_row(self) -> Job:
        with self.made.reading() as session:
            return session.scalars(select(Job).where(Job.id == self.job_id)).one()

    def decisions(self) -> list[str]:
        """What the job's history says was decided about it."""
        return [entry["message"] for entry in self.job_row().phases if "; decided: " in entry["message"]]

    def decided(self, reality: Reality, action: Action) -> bool:
        if self.cell.phase == "received" and reality in DEAD:
            reality = Reality.NO_RUNTIME  # what ended was released already, and there is no phase that it ended in
        return f"phase {self.cell.phase}; {self.name}: {reality}; decided: {action}" in self.decisions()[-1]

    def ended(self) -> bool:
        """Whether no QEMU is there."""
        row = self.row()
        return not self.is_alive() and self.made.qemu_pids() == [] and (row is None or row.runtime is None)

    def keeps(self, state: str) -> None:
        """Insist that the QEMU of old is the only one, and in this state: in its own word and in the database's."""
        row = self.row()
        assert self.old and row and row.runtime
        assert (row.runtime.uuid, row.runtime.pid) == (self.old_uuid, self.old.pid)
        assert self.is_alive()
        assert self.made.qemu_pids() == [self.old.pid]
        assert (row.state, self.qemu_says()) == (state, state)

    def runs_anew(self) -> None:
        """Insist that a new QEMU runs, and it alone."""
        row = self.row()
        assert row and row.runtime and not self.is_alive()
        assert row.runtime.uuid != self.old_uuid
        assert self.made.qemu_pids() == [row.runtime.pid]
        assert (row.state, self.qemu_says()) == ("running", "running")

    # The end

    def finish(self) -> None:
        """End the guest as a crash does and the job as the task boundary does, and insist that nothing is left."""
        self.made.end_guests()
        try:
            self.worker.node.ledger.succeed(self.job_id, None)
            self.made.nothing_is_left()
        finally:
            self.worker.die()
            self.forget()

    def forget(self) -> None:
        """For the next scene, whatever became of this one."""
        with self.made.database().transaction() as session:
            for table in (InstanceLock, Runtime):
                session.execute(delete(table))
            session.execute(update(Job).values(state="SUCCESS", finished_at=utc_now()))


@dataclass(frozen=True)
class Stage:
    """A node without a worker process, on which scenes are played."""

    made: TestNode
    loop: EventLoop

    @contextmanager
    def scene(self, cell: Cell, *, own: bool | None = None) -> Iterator[Scene]:
        """A cell that was brought about, with nothing left of it at the end."""
        scene = Scene(self.made, self.loop, cell)
        try:
            scene.stage(own=own)
            yield scene
        finally:
            scene.finish()


@contextmanager
def open_stage() -> Iterator[Stage]:
    """A stage with the folders and the schema that a node's first worker makes."""
    with node() as made:
        made.settings.run_dir.mkdir()
        schema.ensure_current(made.database(), may_upgrade=True)
        loop = EventLoop()
        try:
            yield Stage(made, loop)
        finally:
            loop.close()
