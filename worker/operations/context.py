"""What an operation is given: the node it acts for, and the job it reports to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from hostler.settings import Settings
from models import Database, Job, utc_now
from worker.errors import Cancelled
from worker.isolation import cgroups
from worker.kvm import accelerator, emulator
from worker.kvm.emulator import Features
from worker.kvm.qmp import EventLoop
from worker.network import links, scripts
from worker.operations.ledger import Also, Ledger, nothing_else
from worker.operations.steps import HandedOver, Step, nothing

CANCEL_POLL_S = 0.1
"""How soon a job that waits hears of a cancel."""

Publish = Callable[[dict[str, Any]], None]


@dataclass
class NodeContext:
    """Everything the operations of one worker share. Made once, when the worker starts."""

    settings: Settings
    database: Database
    incarnation: str
    loop: EventLoop
    ledger: Ledger = field(init=False)
    wake_at: Callable[[datetime | None], None] = field(default=lambda at: None, repr=False)
    """Tell the worker's heartbeat that something of the ledger, or a restart, is due at a time (None: nothing is)."""
    _features: tuple[list[str | int], Features] | None = field(default=None, repr=False)
    _probing: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        settings = self.settings
        limits = {"start": settings.limit_starts, "backup": settings.limit_backups}
        limits["migration"] = settings.limit_migrations
        self.ledger = Ledger(self.database, self.settings.node, self.incarnation, limits)

    @property
    def name(self) -> str:
        """The node's name."""
        return self.settings.node

    @property
    def cache_dir(self) -> Path:
        """Where probes keep what they found out; may be deleted at any time."""
        return self.settings.state_dir / "cache"

    @cached_property
    def qemu_binary(self) -> Path:
        """The emulator. Raises EmulatorMissing."""
        return emulator.find(self.settings.qemu_binary)

    def features(self) -> Features:
        """What this node's QEMU can do, asked of QEMU itself and kept until the binary changes."""
        identity = emulator.binary_identity(self.qemu_binary)
        with self._probing:
            if self._features is None or self._features[0] != identity:
                self._features = identity, emulator.probe(self.qemu_binary, self.cache_dir)
            return self._features[1]

    def kvm(self) -> accelerator.KvmProbe:
        """Whether KVM really runs a guest here, tried once per boot."""
        with self._probing:
            return accelerator.kvm_works(self.qemu_binary, self.cache_dir)

    @cached_property
    def cgroups(self) -> cgroups.Groups:
        """How this host limits what guests use."""
        return cgroups.of_host(self.settings.cgroups)

    @property
    def migration_host(self) -> str:
        """The address on which this node receives guests."""
        return self.settings.migration_address or links.first_address()

    @property
    def ifup(self) -> Path:
        """The script that connects a tap."""
        return Path(self.settings.ifup) if self.settings.ifup else scripts.shipped("ifup")

    @property
    def ifdown(self) -> Path:
        """The script that disconnects a tap."""
        return Path(self.settings.ifdown) if self.settings.ifdown else scripts.shipped("ifdown")


@dataclass(frozen=True)
class Whole:
    """The job that another one is a step of, and how the step shows there: as this phase, from percent to percent."""

    job_id: str
    publish: Callable[[Job, dict[str, Any]], None]
    phase: str
    span: tuple[int, int]

    def percent(self, of_step: int) -> int:
        """How far the whole is when its step is so far."""
        low, high = self.span
        return low + (high - low) * of_step // 100


@dataclass
class JobContext:
    """The job an operation works for: where it records its phases before their side effects, and hears of a cancel."""

    id: str
    instance: str | None
    node: NodeContext
    publish: Publish
    attempt: int = 1
    deaths: int = 0
    current_phase: str = "received"
    whole: Whole | None = None
    at_success: Also = nothing_else
    """What else becomes true in the transaction that records the job's success; it must not raise."""
    _cancel: threading.Event = field(default_factory=threading.Event, repr=False)
    _committed: bool = False
    _deciding: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def phase(self, phase: str, percent: int, message: str, also: Also = nothing_else) -> None:
        """Record in SQL, then tell whoever watches; the telling never waits and never fails the operation.

        ``also`` changes what else is true from the same moment on: one commit, of which all is there or nothing.
        Raises Cancelled, before anything is recorded, when the job was asked to give up and still can; what ``also``
        raises, nothing is recorded either.
        """
        self.check_cancelled()
        ledger, whole = self.node.ledger, self.whole
        waiting = None
        if whole is None:
            stored = ledger.advance(self.id, phase, percent, message, also)
        else:
            there = whole.job_id, whole.phase, whole.percent(percent)
            stored, waiting = ledger.advance_step(self.id, phase, percent, message, there, also)
        self.current_phase = phase
        if whole and waiting:  # whoever watches does so there
            whole.publish(waiting, self._meta(whole.phase, waiting.percent, message))
        else:
            self._tell(stored, message)

    def hand_over(
        self,
        steps: Sequence[Step],
        deadline_s: float,
        *,
        phase: tuple[str, int, str] | None = None,
        also: Also = nothing_else,
        meanwhile: Callable[[], None] = nothing,
    ) -> HandedOver:
        """Give other jobs parts of this one, which waits for them; to be raised at once, for this attempt is over.

        ``phase`` and ``also`` are as in ``phase``, at the same moment; ``meanwhile`` as HandedOver's. Safe to repeat.
        """
        wakeups = self.node.ledger.hand_over(self.id, steps, deadline_s, phase=phase, also=also)
        if phase:
            self.current_phase = phase[0]
            self._tell(*phase[1:])
        return HandedOver(wakeups, meanwhile)

    def progress(self, percent: int, message: str) -> None:
        """How far the present phase has come, as ``phase`` but without an entry in the job's history."""
        self.check_cancelled()
        self._tell(self.node.ledger.progress(self.id, percent, message), message)

    def migrating(self, percent: int, message: str, live_migration: dict[str, Any], also: Also = nothing_else) -> None:
        """How a live migration goes, in the contract's words. Never raises Cancelled: who follows it decides."""
        stored = self.node.ledger.progress(self.id, percent, message, live_migration, also)
        self.publish(self._meta(self.current_phase, stored, message) | {"live_migration": live_migration})

    def _tell(self, stored: int, message: str) -> None:
        self.publish(self._meta(self.current_phase, stored, message))

    def _meta(self, phase: str, percent: int, message: str) -> dict[str, Any]:
        return {
            "phase": phase,
            "percent": percent,
            "message": message,
            "instance": self.instance,
            "node": self.node.name,
            "updated_at": utc_now().isoformat(),
        }

    def carry_on(self) -> None:
        """The job was past its last point of return when its worker died: it finishes, cancelled or not."""
        with self._deciding:
            self._committed = True

    def commit(self) -> None:
        """From here on the job cannot be cancelled any more: it will finish. Raises Cancelled if it was just before."""
        with self._deciding:
            self.check_cancelled()
            self._committed = True

    def cancel(self) -> bool:
        """Ask the job to give up; False when it is too late for that, and it will finish."""
        with self._deciding:
            if not self._committed:
                self._cancel.set()
            return not self._committed

    @property
    def is_giving_up(self) -> bool:
        """Whether the job was asked to give up while it still could."""
        return self._cancel.is_set() and not self._committed

    def check_cancelled(self) -> None:
        """Raises Cancelled when the job was asked to give up and still can."""
        if self._cancel.is_set() and not self._committed:
            raise Cancelled(f"cancelled in phase {self.current_phase}; what had been begun was undone")

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        """Whether ``event`` came within ``timeout_s``. Raises Cancelled soon after the job was asked to give up."""
        deadline = time.monotonic() + timeout_s
        while not event.wait(max(0.0, min(CANCEL_POLL_S, deadline - time.monotonic()))):
            self.check_cancelled()
            if time.monotonic() >= deadline:
                return False
        return True

    def last_phase(self) -> tuple[str, datetime | None]:
        """The last phase that an earlier attempt recorded, and when it began; ``received`` where there was none."""
        return self.node.ledger.last_phase_of(self.id)

    def note(self, message: str) -> None:
        """Record in the job's history what was decided about it; never raises Cancelled."""
        self.node.ledger.note(self.id, message)
