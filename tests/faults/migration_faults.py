"""Faults in mid-migration, as data: ``FAULTS`` names each one, ``play`` provokes it and tells what was broken."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from hostler import embedded
from hostler.client import Job
from hostler.errors import ServiceUnreachable
from models import LiveMigration, Runtime, runtime_of
from tests.faults.migrations import NAME, Pair
from tests.faults.outside import ask
from tests.nodes import TestNode, until
from tests.pairs import frozen, hurry, slowly, stage_of
from worker.operations.guests import identity_of
from worker.operations.live_migration.recovery_table import OF_QEMU, Side, row_for
from worker.operations.live_migration.rows import Stage

RECORD = "commit worker.operations.live_migration.rows.move_on"
HAND_OVER = "commit worker.operations.ledger.Ledger.hand_over"
ACCEPTS, GIVES = 1, 2
"""Which hand-over it is: in that to finalize the target also becomes the owner."""
TAKEN, FINALIZE = "acknowledge", 2
"""The target's worker has taken a message: the second one is that to continue the guest."""

Provoke = Callable[[Pair], Job]
Found = tuple[Stage, Side, Side]
"""The stage, and what is true of the QEMUs of source and target."""


@dataclass(frozen=True)
class Fault:
    """What happens, how the job then ends, and who has the guest: ``source`` or ``target``, or on which it ended:
    ``crashed``, on the source, or ``crashed there``. ``finds`` is what the next worker finds, a row of the recovery
    table."""

    provoke: Provoke
    end: str = "SUCCESS"
    owner: str = "target"
    finds: Found | None = None
    on_postgres: bool = False


FAULTS: dict[str, Fault] = {}


def fault(
    name: str, end: str = "SUCCESS", owner: str = "target", *, finds: Found | None = None, on_postgres: bool = False
) -> Callable[[Provoke], Provoke]:
    """Enter a function as a fault."""

    def enter(provoke: Provoke) -> Provoke:
        FAULTS[name] = Fault(provoke, end, owner, finds, on_postgres)
        return provoke

    return enter


def play(made: Pair, name: str) -> list[str]:
    """Provoke a fault in a migration; what is wrong once all is at rest."""
    made.forget_connections()  # those of before the last fault
    made.rest()
    made.seen()
    source, target = made.source.name, made.target.name
    chosen = FAULTS[name]
    found.clear()
    job = chosen.provoke(made)
    for bed in made.beds.values():
        bed.no_plan()
    owner = target if chosen.owner in ("target", "crashed there") else source
    wrong = made.wrong(job, frozenset({chosen.end}), owner, runs="crashed" not in chosen.owner)
    if chosen.finds and row_for(*chosen.finds) not in [row_for(*each) for each in found]:
        wrong.append(f"it was to find {chosen.finds}, and found {found}")
    if wrong:
        made.start_anew()
    return [f"{name}: {what}" for what in wrong]


found: list[Found] = []
"""What there was to be found in the present fault."""


def look(made: Pair, job: Job) -> None:
    """Note what a worker would find now."""
    with made.nodes[0].reading() as session:
        row = session.get_one(LiveMigration, job.id)
        runtimes = {node: runtime_of(session, node, NAME) for node in (row.source, row.target)}
    source, target = (_side(runtimes[node]) for node in (row.source, row.target))
    found.append((Stage(row.stage), source, target))


def _side(runtime: Runtime | None) -> Side:
    if runtime is None or identity_of(runtime) is None:
        return Side.GONE
    if (said := ask(Path(runtime.run_dir), "info migrate")) is None:
        return Side.SILENT
    status = re.search(r"Migration status: (\S+)", said)
    return OF_QEMU[status[1] if status else ""]


def kill_qemu(node: TestNode) -> None:
    """kill -9, and wait until the kernel has ended it, which closes its files first; the worker may be slower."""
    pids = node.qemu_pids()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    until(lambda: not any(map(_lives, pids)))


def _lives(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return False


@contextmanager
def dead_at(made: Pair, side: str, step: str, when: str, nth: int = 1, **options: Any) -> Iterator[Job]:
    """A migration in which one side's worker has died at a step; the next one is started at the end."""
    bed = made.sides()[side]
    bed.plan(step=step, nth=nth, when=when)
    job = made.send(**options)
    worker = bed.node.worker
    assert worker
    until(lambda: worker.poll() is not None, what=f"the {side}'s worker dies {when} {step}")
    bed.no_plan()
    try:
        yield job
        look(made, job)
    finally:
        bed.node.kill_worker()
        bed.start_worker()


@contextmanager
def held_at_the_switch(made: Pair) -> Iterator[Job]:
    """A migration whose target has all, and whose worker stands still, so that the guest does too."""
    source, target = made.source, made.target
    job = slowly(source, target)
    with frozen(target):
        hurry(source)
        until(lambda: stage_of(source, job) == "moved", what="the target has all")
        yield job
        look(made, job)


# QEMU


@fault("the source's QEMU is killed in mid-transfer", "NOT_RUNNING", "crashed")
def _source_qemu(made: Pair) -> Job:
    job = slowly(made.source, made.target)
    kill_qemu(made.source)
    return job


@fault(
    "the source's QEMU is killed in mid-transfer, and no worker looks",
    "NOT_RUNNING",
    "crashed",
    finds=(Stage.TRANSFERRING, Side.GONE, Side.UNDER_WAY),
)
def _source_qemu_unseen(made: Pair) -> Job:
    source = made.source
    job = slowly(source, made.target)
    source.kill_worker()
    kill_qemu(source)
    look(made, job)
    made.beds[source.name].start_worker()
    return job


@fault(
    "the source's QEMU is killed when it has just sent all, and its worker before",
    finds=(Stage.SWITCHING, Side.GONE, Side.COMPLETE),
)
def _source_qemu_sent(made: Pair) -> Job:
    source = made.source
    with dead_at(made, "source", HAND_OVER, "before", GIVES) as job:
        kill_qemu(source)
    return job


@fault(
    "the source's QEMU is killed before it sends the last part, and its worker before",
    "MIGRATION_FAILED",
    "crashed",
    finds=(Stage.SWITCHING, Side.GONE, Side.GONE),
)
def _source_qemu_before_switch(made: Pair) -> Job:
    source = made.source
    with dead_at(made, "source", "qmp migrate-continue", "before") as job:
        kill_qemu(source)
    return job


@fault("the source's QEMU is killed when the target owns the guest", finds=(Stage.MOVED, Side.GONE, Side.COMPLETE))
def _source_qemu_moved(made: Pair) -> Job:
    with held_at_the_switch(made) as job:
        kill_qemu(made.target)  # the owner is the target by now, so this is the source
    return job


@fault(
    "the target's QEMU is killed before it hears of the source",
    "MIGRATION_FAILED",
    "source",
    finds=(Stage.TRANSFERRING, Side.IDLE, Side.GONE),
)
def _target_qemu_waiting(made: Pair) -> Job:
    target = made.target
    with dead_at(made, "source", "qmp migrate", "before") as job:
        kill_qemu(target)
    return job


@fault("the target's QEMU is killed in mid-transfer", "MIGRATION_FAILED", "source")
def _target_qemu(made: Pair) -> Job:
    job = slowly(made.source, made.target)
    kill_qemu(made.target)
    return job


@fault(
    "the target's QEMU is killed when it has all and has not run",
    "MIGRATION_FAILED",
    "source",
    finds=(Stage.MOVED, Side.COMPLETE, Side.GONE),
)
def _target_qemu_moved(made: Pair) -> Job:
    with held_at_the_switch(made) as job:
        kill_qemu(made.source)  # the owner is the target by now
    return job


@fault(
    "the target's QEMU is killed when it has just been continued, and its worker before",
    "MIGRATION_FAILED",
    "crashed there",
    finds=(Stage.CONTINUING, Side.COMPLETE, Side.GONE),
)
def _target_qemu_ran(made: Pair) -> Job:
    target = made.target
    with dead_at(made, "target", "qmp cont", "after") as job:
        kill_qemu(target)
    return job


@fault("both QEMUs are killed when the target has all", "MIGRATION_FAILED", "crashed")
def _both_qemus(made: Pair) -> Job:
    source, target = made.source, made.target
    with held_at_the_switch(made) as job:
        kill_qemu(source)
        kill_qemu(target)
    return job


@fault(
    "the target's QEMU is killed in mid-transfer, and no worker looks",
    "MIGRATION_FAILED",
    "source",
    finds=(Stage.TRANSFERRING, Side.FAILED, Side.GONE),
)
def _target_qemu_unseen(made: Pair) -> Job:
    source, target = made.source, made.target
    job = slowly(source, target)
    source.kill_worker()
    kill_qemu(target)
    until(lambda: look(made, job) or found[-1][1] == Side.FAILED, what="the source's QEMU gives up")
    made.beds[source.name].start_worker()
    return job


@fault("post-copy: the target's QEMU is killed when it has not run", "MIGRATION_FAILED", "crashed")
def _target_qemu_postcopy(made: Pair) -> Job:
    target = made.target
    with dead_at(made, "target", TAKEN, "after", FINALIZE, postcopy="at-once", bandwidth_mib_s=0.2) as job:
        kill_qemu(target)
    return job


@fault("the source's QEMU keeps silent for a while", finds=(Stage.TRANSFERRING, Side.SILENT, Side.UNDER_WAY))
def _source_silent(made: Pair) -> Job:
    source = made.source
    job = slowly(source, made.target)
    qemu = psutil.Process(source.pid(NAME))
    qemu.suspend()
    time.sleep(9)
    look(made, job)
    qemu.resume()
    hurry(source)
    return job


@fault("the target's QEMU keeps silent when it has all", finds=(Stage.MOVED, Side.COMPLETE, Side.SILENT))
def _target_silent(made: Pair) -> Job:
    target = made.target
    with held_at_the_switch(made) as job:
        qemu = psutil.Process(target.pid(NAME))
        qemu.suspend()
    time.sleep(8)
    qemu.resume()
    return job


# Workers, and what the next one finds


def _dies(name: str, side: str, step: str, when: str, nth: int, finds: Found) -> None:
    @fault(name, finds=finds)
    def provoke(made: Pair) -> Job:
        with dead_at(made, side, step, when, nth) as job:
            pass
        return job


_dies("the source's worker dies when it has handed over", "source", HAND_OVER, "after", ACCEPTS,
      (Stage.ACCEPTING, Side.IDLE, Side.IDLE))  # fmt: skip
_dies("the source's worker dies before it lets its QEMU send", "source", "qmp migrate", "before", 1,
      (Stage.TRANSFERRING, Side.IDLE, Side.IDLE))  # fmt: skip
_dies("the source's worker dies before it records the switch", "source", RECORD, "before", 1,
      (Stage.TRANSFERRING, Side.STANDS_STILL, Side.UNDER_WAY))  # fmt: skip
_dies("the source's worker dies when it has recorded the switch", "source", RECORD, "after", 1,
      (Stage.SWITCHING, Side.STANDS_STILL, Side.UNDER_WAY))  # fmt: skip
_dies("the source's worker dies when all is sent", "source", HAND_OVER, "before", GIVES,
      (Stage.SWITCHING, Side.COMPLETE, Side.COMPLETE))  # fmt: skip
_dies("the target's worker dies when it has all", "target", TAKEN, "after", FINALIZE,
      (Stage.MOVED, Side.COMPLETE, Side.COMPLETE))  # fmt: skip
_dies("the target's worker dies before it lets the guest go on", "target", "qmp cont", "before", 1,
      (Stage.CONTINUING, Side.COMPLETE, Side.COMPLETE))  # fmt: skip
_dies("the target's worker dies when it has let the guest go on", "target", "qmp cont", "after", 1,
      (Stage.CONTINUING, Side.COMPLETE, Side.COMPLETE))  # fmt: skip
_dies("the source's worker dies before it cleans up", "source", "signal SIGTERM", "before", 1,
      (Stage.FINALIZED, Side.COMPLETE, Side.COMPLETE))  # fmt: skip


@fault(
    "the source's worker dies when it has recorded that it gives up",
    "REVOKED",
    "source",
    finds=(Stage.ABORTED, Side.UNDER_WAY, Side.UNDER_WAY),
)
def _gives_up(made: Pair) -> Job:
    bed = made.beds[made.source.name]
    job = slowly(bed.node, made.target)
    bed.plan(step=RECORD, nth=1, when="after")
    job.cancel()
    worker = bed.node.worker
    assert worker
    until(lambda: worker.poll() is not None, what="it dies when it has given up")
    look(made, job)
    bed.no_plan()
    bed.node.kill_worker()
    bed.start_worker()
    return job


def _kill_both(made: Pair) -> None:
    for bed in made.beds.values():
        bed.node.kill_worker()
    for bed in made.beds.values():
        bed.start_worker()


@fault("both workers are killed in mid-transfer")
def _both_workers(made: Pair) -> Job:
    source = made.source
    job = slowly(source, made.target)
    _kill_both(made)
    hurry(source)
    return job


@fault("both workers are killed when the target has all")
def _both_workers_moved(made: Pair) -> Job:
    with held_at_the_switch(made) as job:
        made.beds[made.target.name].node.kill_worker()
    made.rest()
    _kill_both(made)
    return job


@fault(
    "the source's worker is dead while the guest is sent, and it is sent whole",
    finds=(Stage.TRANSFERRING, Side.UNDER_WAY, Side.UNDER_WAY),
)
def _source_away(made: Pair) -> Job:
    source = made.source
    job = slowly(source, made.target)
    source.kill_worker()
    look(made, job)
    time.sleep(3)
    made.beds[source.name].start_worker()
    hurry(source)
    return job


@fault("the target's worker is dead while the guest is sent")
def _target_away(made: Pair) -> Job:
    source, target = made.source, made.target
    job = slowly(source, target)
    target.kill_worker()
    hurry(source)
    until(lambda: stage_of(source, job) == "moved", what="the target has all")
    made.beds[target.name].start_worker()
    return job


# What they stand on


@fault("the broker is killed in mid-transfer, and comes back")
def _broker(made: Pair) -> Job:
    source = made.source
    job = slowly(source, made.target)
    pid = embedded.status(made.nodes[0].settings).pid
    assert pid
    os.kill(pid, signal.SIGKILL)
    until(
        lambda: (
            not embedded.status(made.nodes[0].settings).running or embedded.status(made.nodes[0].settings).pid != pid
        )
    )
    embedded.ensure(made.nodes[0].settings)
    made.forget_connections()
    hurry(source)
    return job


@fault("PostgreSQL crashes in mid-transfer, and comes back", on_postgres=True)
def _database(made: Pair) -> Job:
    source = made.source
    job = slowly(source, made.target, bandwidth_mib_s=0.1)
    assert made.server
    made.server.stop()
    time.sleep(2)
    made.server.start()
    made.forget_connections()
    return job


@fault("PostgreSQL is away while the guest is switched over", on_postgres=True)
def _database_away(made: Pair) -> Job:
    job = slowly(made.source, made.target, bandwidth_mib_s=0.2)
    assert made.server
    made.server.stop()
    time.sleep(8)
    made.server.start()
    made.forget_connections()
    return job


# The network


@contextmanager
def cut(made: Pair, seconds: float = 0) -> Iterator[None]:
    """The cable between the nodes is pulled meanwhile, and for so long after."""
    for site in made.sites:
        site.ip("link", "set", "uplink", "down")
    try:
        yield
        time.sleep(seconds)
    finally:
        for site in made.sites:
            site.ip("link", "set", "uplink", "up")


def ended(job: Job) -> None:
    """Wait for the job's end, however it ends."""
    with suppress(Exception):
        job.wait(60)


def cancelled(job: Job) -> bool:
    """Whether it could be asked to give up: a client whose broker was killed has to ask twice."""
    with suppress(ServiceUnreachable):
        job.cancel()
        return True
    return False


@fault("the link is cut before anything is sent", "MIGRATION_FAILED", "source")
def _link_before(made: Pair) -> Job:
    with cut(made):
        job = made.send()
        ended(job)
    return job


@fault("the link is cut in mid-transfer, and mended")
def _link_mended(made: Pair) -> Job:
    source = made.source
    job = slowly(source, made.target)
    with cut(made, 3):
        pass
    hurry(source)
    return job


@fault("the link is cut in mid-transfer, and somebody cancels", "REVOKED", "source")
def _link_cancelled(made: Pair) -> Job:
    job = slowly(made.source, made.target)
    with cut(made):
        until(lambda: cancelled(job))
        ended(job)
    return job


@fault("the link is cut when the guest stands still, and mended")
def _link_at_the_switch(made: Pair) -> Job:
    with ExitStack() as mended, dead_at(made, "source", "qmp migrate-continue", "before") as job:
        mended.enter_context(cut(made, 3))
    return job


@fault("the link is cut when the target has all")
def _link_after(made: Pair) -> Job:
    with held_at_the_switch(made) as job, cut(made):
        pass
    with cut(made):
        ended(job)
    return job
