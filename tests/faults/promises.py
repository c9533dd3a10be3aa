"""The eight promises of hostler, looked at from outside: processes, interfaces, rows, results, and QEMU's own monitor.

No worker is asked, so that none can be wrong about itself. Meant for a moment of rest: every job that was sent has had
the time to end. Nothing here changes anything.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

import psutil
from celery import Celery
from sqlalchemy import select

from hostler.contract import FINAL_JOB_STATES
from models import Base, DiskLease, Incarnation, Instance, InstanceLock, Job, JobParent, Runtime, UidLease
from tests.faults.outside import MONITOR_S, ask, born, counter, migration_ports, open_taps, qemu_of, taps_of
from tests.nodes import TestNode, until

RUNS, PAUSED = {"running"}, {"paused"}
AT_REST = {"stopped", "crashed"}


@dataclass(frozen=True)
class Sent:
    """A job that was sent, and how it may have ended: ``SUCCESS``, ``REVOKED`` or the code of an error.

    ``effect`` says what is wrong with what the job brought about, and nothing where that happened once.
    """

    id: str
    ends: frozenset[str] = frozenset({"SUCCESS"})
    effect: Callable[[], str | None] = lambda: None


@dataclass(frozen=True)
class Ran:
    """A tiny guest as it was before a fault that is none of its business."""

    node: TestNode
    name: str
    pid: int
    born: float
    counter: int


class _Look:
    """One node: its rows, and its QEMUs as the kernel has them."""

    def __init__(self, node: TestNode) -> None:
        self.node = node
        self.qemus = [qemu for pid in node.qemu_pids() if (qemu := qemu_of(pid))]
        node.database().dispose()  # connections of before the fault may be dead
        with node.reading() as session:

            def rows(table: type[Any]) -> Sequence[Any]:
                return session.scalars(select(table).where(table.node == node.name)).all()

            self.instances: Sequence[Instance] = rows(Instance)
            self.runtimes: Sequence[Runtime] = rows(Runtime)
            self.disks: Sequence[DiskLease] = rows(DiskLease)
            self.uids: Sequence[UidLease] = [lease for lease in rows(UidLease) if not lease.released_at]
            self.locks: Sequence[InstanceLock] = rows(InstanceLock)
            self.workers: Sequence[Incarnation] = [worker for worker in rows(Incarnation) if not worker.ended_at]
            self.jobs: Sequence[Job] = sorted(rows(Job), key=lambda job: job.sequence)
            self.children = {*session.scalars(select(JobParent.job_id))}


def violations(
    nodes: TestNode | Sequence[TestNode],
    jobs: Sequence[Sent] = (),
    *,
    untouched: Sequence[Ran] = (),
    finished: Mapping[str, datetime] | None = None,
    secrets: Sequence[str] = (),
    clock_stepped: bool = False,
) -> list[str]:
    """Every promise that is broken, as a sentence that begins with the promise's number.

    ``untouched`` are guests that must not have noticed anything, as ``ran`` saw them before. ``finished`` is when jobs
    had ended at an earlier look (``finished_at``). ``secrets`` must be nowhere. Where the clock was stepped, times say
    nothing about the order of jobs.
    """
    looks = [_Look(node) for node in ([nodes] if isinstance(nodes, TestNode) else nodes)]
    found = [*_one_qemu(looks), *_uids(looks), *_ended_once(looks, jobs, finished or {})]
    found += [] if clock_stepped else _one_at_a_time(looks)
    found += [*_untouched(untouched)]
    for look in looks:
        found += [*_leaks(look), *_secrets(look, secrets), *_states(look)]
    return found


def ran(node: TestNode, *names: str) -> list[Ran]:
    """Guests that run now, for ``violations`` to tell later whether they ran on."""
    pids = {name: node.pid(name) for name in names}
    return [
        Ran(node, name, pid, psutil.Process(pid).create_time(), until(lambda name=name: counter(node, name)))
        for name, pid in pids.items()
    ]


def finished_at(nodes: Sequence[TestNode]) -> dict[str, datetime]:
    """When each job that has ended did so."""
    return {job.id: job.finished_at for node in nodes for job in _Look(node).jobs if job.finished_at}


def _one_qemu(looks: Sequence[_Look]) -> Iterator[str]:
    qemus = [qemu for look in looks for qemu in look.qemus]
    for what, key in (("instance", lambda qemu: qemu.name), ("uuid", lambda qemu: qemu.uuid)):
        for value, count in Counter(map(key, qemus)).items():
            if count > 1:
                yield f"1: {count} QEMUs run for {what} {value}: {[qemu.pid for qemu in qemus if key(qemu) == value]}"
    shared = {lease.file_id for look in looks for lease in look.disks if lease.shared}
    for disk in {disk for qemu in qemus for disk in qemu.disks} - shared:
        if len(pids := [qemu.pid for qemu in qemus if disk in qemu.disks]) > 1:
            yield f"1: disk {disk} is open for writing in QEMUs {pids}"
    for look in looks:
        named = {runtime.uuid: runtime for runtime in look.runtimes}
        for qemu in look.qemus:
            if qemu.uuid not in named:
                yield f"1: QEMU {qemu.pid} of {qemu.name} runs, and no runtime names it"
            elif named[qemu.uuid].pid != qemu.pid or named[qemu.uuid].instance_name != qemu.name:
                yield f"1: QEMU {qemu.pid} of {qemu.name} is {named[qemu.uuid].pid} in its runtime"


def _uids(looks: Sequence[_Look]) -> Iterator[str]:
    for look in looks:
        leased = {lease.uid: lease.instance_name for lease in look.uids if lease.instance_name}
        in_use = Counter(runtime.uid for runtime in look.runtimes if runtime.uid is not None)
        yield from (f"2: uid {uid} is that of {count} runtimes" for uid, count in in_use.items() if count > 1)
        for name, count in Counter(leased.values()).items():
            if count > 1:
                yield f"2: {name} holds {count} uids"
        mine = {qemu.pid: qemu.name for qemu in look.qemus}
        for process in psutil.process_iter() if leased else ():
            with suppress(psutil.NoSuchProcess):
                for uid in {*process.uids()} & {*leased}:
                    if mine.get(process.pid) != leased[uid]:
                        yield f"2: uid {uid} is leased to {leased[uid]}, and process {process.pid} has it"
        for runtime in look.runtimes:
            for qemu in look.qemus:
                if runtime.uuid == qemu.uuid and runtime.uid is not None and qemu.uids != {runtime.uid}:
                    yield f"2: QEMU {qemu.pid} of {qemu.name} runs as {sorted(qemu.uids)}, not as uid {runtime.uid}"


def _ended_once(looks: Sequence[_Look], jobs: Iterable[Sent], finished: Mapping[str, datetime]) -> Iterator[str]:
    rows = {row.id: (row, look.node) for look in looks for row in look.jobs}
    for job in jobs:
        if job.id not in rows:
            yield f"3: job {job.id} was sent, and no ledger has it"
            continue
        row, node = rows[job.id]
        what = f"3: job {job.id} ({row.task})"
        if row.state not in FINAL_JOB_STATES or row.finished_at is None:
            yield f"{what} has not ended: {row.state}, {row.phase}, {row.message}"
            continue
        end = (row.error or {}).get("code") if row.state == "FAILURE" else row.state
        if end not in job.ends:
            yield f"{what} ended as {end} and not as {' or '.join(sorted(job.ends))}: {row.error}"
        if wrong := _differs(node, row):
            yield f"{what} is {row.state} in the ledger, and {wrong}"
        if finished.get(job.id, row.finished_at) != row.finished_at:
            yield f"{what} ended at {finished[job.id]} and again at {row.finished_at}"
        if wrong := job.effect():
            yield f"{what}: {wrong}"


def _differs(node: TestNode, row: Job) -> str:
    """How the result backend, asked by somebody who knows nothing of hostler, differs from the row."""
    with bare(node) as app:
        result = app.AsyncResult(row.id)
        state, value = result.state, result.result
    if state != row.state:
        return f"its result is {state}"
    if state == "SUCCESS":
        return "" if value == row.result else f"its result is {value}, not {row.result}"
    wanted = (row.error or {}).get("code")
    return f"its failure is {value!r}" if state == "FAILURE" and [*value.args][:1] != [wanted] else ""


def bare(node: TestNode) -> Celery:
    """Celery alone, with this node's broker and results; to be closed by the caller."""
    settings = node.settings
    return Celery(broker=settings.effective_broker_url, backend=settings.effective_result_backend, set_as_current=False)


def all_ready(node: TestNode, job_ids: Iterable[str]) -> bool:
    """Whether a bare Celery client sees all these jobs ended."""
    with bare(node) as app:
        return all(app.AsyncResult(job_id).ready() for job_id in job_ids)


def _one_at_a_time(looks: Sequence[_Look]) -> Iterator[str]:
    queues: dict[str, list[Job]] = defaultdict(list)
    for look in looks:
        for job in look.jobs:
            if job.instance_name and job.started_at:
                queues[job.instance_name].append(job)
    children = {child for look in looks for child in look.children}
    for name, queue in queues.items():
        for before, after in pairwise(sorted(queue, key=lambda job: job.started_at)):
            if before.finished_at is None or before.finished_at > after.started_at:
                yield f"4: job {after.id} of {name} began before job {before.id} had ended"
        in_line = [job for job in sorted(queue, key=lambda job: job.sequence) if job.id not in children]
        for before, after in pairwise(in_line):
            if before.started_at > after.started_at:
                yield f"4: job {after.id} of {name} came after job {before.id} and began first"


def _untouched(guests: Iterable[Ran]) -> Iterator[str]:
    for guest in guests:
        row = guest.node.row(guest.name)
        if not row or not row.runtime or row.runtime.pid != guest.pid or born(guest.pid) != guest.born:
            yield f"5: {guest.name} ran as pid {guest.pid}, and does not any more"
            continue
        now = counter(guest.node, guest.name)
        if now < guest.counter:
            yield f"5: {guest.name} counted to {guest.counter}, and began anew: {now}"
        elif row.state in RUNS:
            try:
                until(lambda guest=guest, now=now: counter(guest.node, guest.name) > now, MONITOR_S)
            except AssertionError:
                yield f"5: {guest.name} counted to {now}, and counts no more"


def _leaks(look: _Look) -> Iterator[str]:
    runtimes = {runtime.uuid: runtime for runtime in look.runtimes}
    folders = {path.name for path in (look.node.settings.run_dir / "guests").glob("*")}
    yield from (f"6: folder {name} belongs to no runtime" for name in sorted(folders - {*runtimes}))
    for uuid in {*runtimes} - {qemu.uuid for qemu in look.qemus}:
        yield f"6: the runtime of {runtimes[uuid].instance_name} names pid {runtimes[uuid].pid}, which is gone"
    taps = {tap["name"] for runtime in look.runtimes for tap in runtime.taps}
    held = {tap for qemu in look.qemus for tap in qemu.taps} | (
        taps_of(look.node) if "netns" in look.node.prefix else set()
    )
    yield from (f"6: tap {tap} belongs to no runtime" for tap in sorted(held - taps))
    yield from (f"6: a runtime names tap {tap}, which is gone" for tap in sorted(taps - held))
    names = {runtime.instance_name for runtime in look.runtimes}
    for disk in look.disks:
        if disk.instance_name not in names:
            yield f"6: disk {disk.path} is leased to {disk.instance_name}, which has no runtime"
    for lease in look.uids:
        if lease.instance_name and lease.instance_name not in names:
            yield f"6: uid {lease.uid} is leased to {lease.instance_name}, which has no runtime"
    yield from _forgotten_rows(look)
    worker = look.node.worker
    if worker and worker.poll() is None:
        process = psutil.Process(worker.pid)
        for child in process.children():
            with suppress(psutil.NoSuchProcess):
                if child.status() == psutil.STATUS_ZOMBIE:
                    yield f"6: process {child.pid} has ended, and the worker did not see to it"
        if "netns" in look.node.prefix and (ports := migration_ports(look.node)):  # elsewhere they may be others'
            yield f"6: somebody listens on {ports}, and no guest comes in"
        if taps_held := open_taps(worker.pid):
            yield f"6: the worker holds taps {sorted(taps_held)}"


def _forgotten_rows(look: _Look) -> Iterator[str]:
    jobs = {job.id: job for job in look.jobs}
    pid = look.node.worker.pid if look.node.worker and look.node.worker.poll() is None else None
    alive = {worker.id for worker in look.workers if worker.pid == pid}
    for worker in look.workers:
        if worker.id not in alive:
            yield f"6: incarnation {worker.id} (pid {worker.pid}) is dead, and its row says that it lives"
    for lock in look.locks:
        job = jobs.get(lock.job_id)
        if job is None or job.state in FINAL_JOB_STATES:
            state = job.state if job else "known to nobody"
            yield f"6: {lock.instance_name} is held by job {lock.job_id}, which is {state}"
    for job in look.jobs:
        if job.slot_taken and job.state in FINAL_JOB_STATES:
            yield f"6: job {job.id} has ended and keeps its place among the {job.slot} jobs"
        if job.claimed_by and job.finished_at is None and job.claimed_by not in alive:
            yield f"6: job {job.id} is claimed by incarnation {job.claimed_by}, which is dead"


def _secrets(look: _Look, secrets: Sequence[str]) -> Iterator[str]:
    for secret in secrets:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if any(secret in argument for argument in process.cmdline()):
                    yield f"7: a secret is in the arguments of process {process.pid}"
        for path in look.node.root.rglob("*"):
            with suppress(OSError):
                if path.is_file() and path.suffix != ".img" and secret.encode() in path.read_bytes():
                    yield f"7: a secret is in the file {path.relative_to(look.node.root)}"
        with look.node.reading() as session:
            for table in Base.metadata.sorted_tables:
                if any(secret in repr(row) for row in session.execute(select(table))):
                    yield f"7: a secret is in a row of {table.name}"
        with bare(look.node) as app:
            for job in look.jobs:
                if secret in repr(app.backend.get_task_meta(job.id, cache=False)):
                    yield f"7: a secret is in the result of job {job.id}"


def _states(look: _Look) -> Iterator[str]:
    live = {qemu.name: qemu for qemu in look.qemus}
    busy = {lock.instance_name for lock in look.locks}
    for row in look.instances:
        qemu = live.get(row.name)
        if qemu is None:
            if row.state not in AT_REST:
                yield f"8: {row.name} is {row.state} in the ledger, and has no QEMU"
            continue
        said = ask(qemu.folder, "info status")
        possible = {"unknown"} if said is None else RUNS if "status: running" in said else PAUSED
        if row.state not in possible and row.name not in busy:
            yield f"8: {row.name} is {row.state} in the ledger, and its QEMU says {said and said.strip()!r}"
