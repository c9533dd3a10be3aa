"""The running guests of this node: watched, and cleaned up after, whatever ends them.

Every QEMU is watched by its pidfd and its monitor. The end of one is handled here and nowhere else, once: it is
recorded with its reason, and what the guest had of the host is given back.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import structlog
from sqlalchemy import select
from sqlalchemy.orm import lazyload

from hostler.contract import InstanceState
from hostler.payloads import Nic
from models import Instance, Runtime, runtime_of, utc_now
from worker.errors import NetworkFailed, NotRunning, OperationError, QmpLost
from worker.kvm.folder import GuestFolder
from worker.kvm.process import ProcessIdentity, QemuProcess, boot_id, find_by_uuid
from worker.kvm.qmp import ANSWER_TIMEOUT_S, Event, Monitor
from worker.network import scripts
from worker.operations import isolating, uid_pool
from worker.operations.context import NodeContext
from worker.operations.ending import Ending, judge
from worker.operations.wanted_rows import note_end

log = structlog.get_logger(__name__)

LAST_WORDS_S = 1.0
"""How long QEMU's last events may take to arrive after its process has ended; they are in the socket's buffer."""

RETRY_S, RETRY_MAX_S = 1.0, 30.0
"""A database that is away is asked again, ever more rarely; until then the runtime's row says what is to be done."""

_BY_EVENT = {"STOP": InstanceState.PAUSED, "RESUME": InstanceState.RUNNING}
MIGRATION_EVENTS = frozenset({"MIGRATION", "MIGRATION_PASS", "STOP", "RESUME"})
UNPLUG_EVENTS = frozenset({"DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR"})
RUN_STATES = {"running": InstanceState.RUNNING, "inmigrate": InstanceState.INCOMING}
"""QEMU's words for what is not simply paused (QAPI RunState)."""


class Guest:
    """One running QEMU and how to talk to it. ``ended`` is set once its end is recorded and cleaned up after.

    ``unplugged`` is set when the guest has let go of a device, or has refused to: time to look which devices there are.
    ``job_changed`` likewise, when one of QEMU's jobs has got another status, ``migration_changed`` when a live
    migration has, and ``tuned`` when somebody changed its limits. ``stopped_at`` is when its processors last stopped,
    as QEMU says. ``ended_as`` is why, where it was ended because its guest is elsewhere. ``prepared_for`` is the live
    migration whose limits and capabilities its QEMU has been told, as the source. ``arriving``: this is the target of
    one, which tells the guest's state by itself.
    """

    def __init__(self, name: str, uuid: str, process: QemuProcess, folder: GuestFolder) -> None:
        self.name = name
        self.uuid = uuid
        self.process = process
        self.folder = folder
        self.monitor: Monitor | None = None
        self.killed_by_us = False
        self.ended_as: Ending | None = None
        self.shutdown: Event | None = None
        self.ending: Ending | None = None
        self.ended = threading.Event()
        self.observing = threading.Lock()
        self.unrecorded = False
        self.unplugged = threading.Event()
        self.job_changed = threading.Event()
        self.migration_changed = threading.Event()
        self.tuned = threading.Event()
        self.stopped_at: datetime | None = None
        self.prepared_for: str | None = None
        self.arriving = False

    def talk(self) -> Monitor:
        """The monitor. Raises QmpLost while there is no connection to it."""
        if self.monitor is None:
            raise QmpLost(f"{self.name} runs (pid {self.process.pid}), but its monitor cannot be reached")
        return self.monitor


class Guests:
    """All guests that this worker watches."""

    def __init__(self, node: NodeContext) -> None:
        self._node = node
        self._by_name: dict[str, Guest] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._workers = ThreadPoolExecutor(max_workers=8, thread_name_prefix="guest-end")

    def get(self, name: str) -> Guest | None:
        """The running guest of this name, if there is one."""
        with self._lock:
            return self._by_name.get(name)

    def need(self, name: str) -> Guest:
        """As ``get``. Raises NotRunning."""
        if guest := self.get(name):
            return guest
        raise NotRunning(f"{name} is not running", state=InstanceState.STOPPED)

    def watch(self, guest: Guest) -> None:
        """Be told of the guest's end from now on, also when it has ended in this very moment."""
        with self._lock:
            self._by_name[guest.name] = guest
        loop = self._node.loop.loop
        loop.call_soon_threadsafe(loop.add_reader, guest.process.pidfd, self._process_ended, guest)

    def on_event(self, guest: Guest, event: Event) -> None:
        """Take note of an event; called in the loop's thread."""
        name = str(event.get("event"))
        if name == "STOP":
            seconds, microseconds = event["timestamp"]["seconds"], event["timestamp"]["microseconds"]
            guest.stopped_at = datetime.fromtimestamp(seconds + microseconds / 1e6, UTC)
        if name in MIGRATION_EVENTS:
            guest.migration_changed.set()
        if name == "SHUTDOWN":
            guest.shutdown = event
        elif name == "JOB_STATUS_CHANGE":
            guest.job_changed.set()
        elif name in UNPLUG_EVENTS:
            guest.unplugged.set()
        elif name in _BY_EVENT and not guest.arriving and self.get(guest.name) is guest:
            self._workers.submit(self.observe, guest)

    def adopt(self, row: Runtime, *, killed_by_us: bool, ask: bool = True) -> Guest | None:
        """Take over a guest whose worker is gone: None where its QEMU is gone too. The guest notices nothing.

        ``killed_by_us`` says that the worker before was about to end it, or has begun to.
        A monitor that does not answer leaves the guest watched, and its state ``unknown``. Without ``ask`` it is only
        watched, and the next heartbeat asks it.
        """
        identity = identity_of(row)
        process = QemuProcess.adopt(identity) if identity else None
        if process is None:
            return None
        guest = Guest(row.instance_name, row.uuid, process, GuestFolder(Path(row.run_dir)))
        guest.killed_by_us = killed_by_us
        self.watch(guest)
        if ask:
            self.reconnect(guest)
        return guest

    def reconnect(self, guest: Guest) -> None:
        """Connect to the guest's monitor and record its state as QEMU tells it, or ``unknown``."""
        try:
            guest.monitor = Monitor.connect(
                self._node.loop, guest.folder.qmp, 5.0, lambda event: self.on_event(guest, event)
            )
        except OperationError as exc:
            log.warning("the guest's monitor does not answer", instance=guest.name, reason=str(exc))
        self.observe(guest)

    def tend(self) -> None:
        """Housekeeping at each heartbeat: reconnect what could not be reached, keep the journals small."""
        with self._lock:
            guests = list(self._by_name.values())
        for guest in guests:
            if guest.ended.is_set() or guest.process.wait(0):
                continue
            if guest.monitor and guest.monitor.wait_closed(0):
                guest.monitor.close()
                guest.monitor = None
            if guest.monitor is None:
                self.reconnect(guest)
            guest.folder.trim_journal()
        self._observe_unknown()
        uid_pool.reclaim(self._node)

    def _observe_unknown(self) -> None:
        with self._node.database.reading() as session:
            unknown = session.scalars(
                select(Instance.name).where(
                    Instance.node == self._node.name, Instance.state == InstanceState.UNKNOWN
                )
            ).all()  # fmt: skip
        with self._lock:
            guests = [guest for guest in self._by_name.values() if guest.name in unknown or guest.unrecorded]
        for guest in guests:
            self.observe(guest)

    def close(self) -> None:
        """Let go of all guests; they run on."""
        self._closing.set()
        self._workers.shutdown(wait=True)
        with self._lock:
            guests = list(self._by_name.values())
            self._by_name.clear()
        loop = self._node.loop.loop
        for guest in guests:
            loop.call_soon_threadsafe(loop.remove_reader, guest.process.pidfd)
            if guest.monitor:
                guest.monitor.close()

    def observe(self, guest: Guest, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        """Record the guest's state as QEMU tells it now, ``unknown`` when it keeps silent."""
        # One observation at a time: an older answer must not be written after a newer one.
        with guest.observing:
            state = InstanceState.UNKNOWN
            with contextlib.suppress(OperationError):
                state = RUN_STATES.get(guest.talk().status(timeout_s=timeout_s), InstanceState.PAUSED)
            guest.unrecorded = True
            with self._node.database.transaction() as session:
                row = session.get(Instance, guest.name, with_for_update=True)
                if row and row.runtime and row.runtime.uuid == guest.uuid and row.state in SETTLED:
                    row.state = state
            guest.unrecorded = False

    def soon(self, action: Callable[[Guest], None], guest: Guest) -> None:
        """Have something done that nobody waits for. That it fails is only logged."""
        self._workers.submit(self._try, action, guest)

    @staticmethod
    def _try(action: Callable[[Guest], None], guest: Guest) -> None:
        try:
            action(guest)
        except OperationError as exc:
            log.info("what was to be done with a guest failed", instance=guest.name, reason=str(exc))

    def _process_ended(self, guest: Guest) -> None:
        self._node.loop.loop.remove_reader(guest.process.pidfd)
        self._workers.submit(self._handle_end, guest)

    def _handle_end(self, guest: Guest) -> None:
        guest.ending = guest.ended_as or self._judge(guest)
        log.info("guest ended", instance=guest.name, state=guest.ending.state, reason=guest.ending.reason)
        if not self._release_patiently(guest, guest.ending):
            return
        with self._lock:
            if self._by_name.get(guest.name) is guest:
                del self._by_name[guest.name]
        guest.ended.set()

    def _release_patiently(self, guest: Guest, ending: Ending) -> bool:
        """False when the worker ends before the database is back: the next one finds a runtime without a process."""
        pause_s = RETRY_S
        while True:
            try:
                release(self._node, guest.name, guest.uuid, ending)
                return True
            except Exception:  # whatever it is: nobody else sees to this end
                log.exception("the guest's end could not be recorded; trying again", instance=guest.name)
            if self._closing.wait(pause_s):
                return False
            pause_s = min(2 * pause_s, RETRY_MAX_S)

    def _judge(self, guest: Guest) -> Ending:
        if guest.monitor:
            guest.monitor.wait_closed(LAST_WORDS_S)
        event = guest.shutdown or guest.folder.last_event("SHUTDOWN")
        return judge(
            event["data"] if event else None,
            guest.process.exit_status(),
            killed_by_us=guest.killed_by_us,
            log_tail=guest.folder.log_tail(),
        )


SETTLED = frozenset({InstanceState.RUNNING, InstanceState.PAUSED, InstanceState.UNKNOWN})
"""States that an observation may change; the others belong to the operation that set them."""


def identity_of(row: Runtime) -> ProcessIdentity | None:
    """The process a runtime means, looked for by uuid where the worker died before it wrote the pid down."""
    if row.pid is None or row.start_ticks is None:
        return find_by_uuid(row.uuid)
    identity = ProcessIdentity(row.pid, row.start_ticks, row.boot_id)
    return identity if identity.is_alive() else None


def how_it_ended(row: Runtime, *, killed_by_us: bool) -> Ending:
    """Why a QEMU ended that nobody watched, from the journal it kept itself."""
    folder = GuestFolder(Path(row.run_dir))
    event = folder.last_event("SHUTDOWN")
    if event is None and row.boot_id != boot_id():
        return Ending(InstanceState.CRASHED, "the host was rebooted or lost power", "killed")
    return judge(event["data"] if event else None, None, killed_by_us=killed_by_us, log_tail=folder.log_tail())


def release(node: NodeContext, name: str, uuid: str, ending: Ending) -> list[str]:
    """Give back all that a QEMU which has ended had of the host, and record why it ended. Safe to repeat.

    The rows go last, so that a worker killed in between leaves a runtime for the next one to release, with its ending:
    the first one recorded counts, because what it was judged by is removed. Of an instance that another node owns only
    what was here goes, and nothing is recorded of it. Returns what was removed, for people.
    """
    with node.database.transaction() as session:
        row = runtime_of(session, node.name, name, for_update=True)
        if row is None or row.uuid != uuid:
            return []
        if row.instance.node == node.name:
            row.ending = row.ending or asdict(ending)
            ending = Ending(**row.ending)
        spec, taps, folder = row.instance.spec, row.taps, GuestFolder(Path(row.run_dir))
    removed = [disconnect(node, name, spec["tags"], tap) for tap in taps]
    removed += isolating.remove_folder(node, name, folder)
    removed += isolating.take_back(node, row.hardware, uuid, row.uid)
    with node.database.transaction() as session:
        alone = [lazyload(Instance.runtime)]  # of one that another node owns it is not asked for
        instance = session.get(Instance, name, options=alone, with_for_update=True, populate_existing=True)
        runtime = runtime_of(session, node.name, name)
        ours = instance is not None and instance.node == node.name
        if runtime and runtime.uuid == uuid:
            if instance and ours:
                reason = note_end(instance, ending)
                instance.state, instance.reason, instance.ended_at = ending.state, reason, utc_now()
            session.delete(runtime)
            removed.append(f"runtime {uuid}")
        restart_at = instance.restart_at if instance and ours else None
    node.wake_at(restart_at)
    return removed


def disconnect(node: NodeContext, name: str, tags: list[str], tap: dict[str, str | int]) -> str:
    """Run ifdown for a tap that is gone or about to be; that it fails is only logged. What was done, for people."""
    nic = Nic.model_validate({key: tap[key] for key in Nic.model_fields if key in tap})
    tap_name = str(tap["name"])
    if _is_somebody_elses(tap_name, tap.get("ifindex")):
        return f"tap {tap_name}"
    try:
        scripts.run(node.ifdown, tap_name, scripts.environment(name, tags, int(tap["index"]), nic, tap_name))
    except NetworkFailed as exc:
        log.warning("ifdown failed; the tap is gone all the same", instance=name, reason=str(exc))
    return f"tap {tap_name}"


def _is_somebody_elses(tap_name: str, ifindex: int | str | None) -> bool:
    """Whether the kernel has given the name of a tap that went with its QEMU to another interface since."""
    try:
        return ifindex is not None and socket.if_nametoindex(tap_name) != int(ifindex)
    except OSError:
        return False
