"""Acting on findings, beside no job: a repair has the instance for itself, and looks again before it acts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from hostler.payloads import RepairArguments
from models import InstanceLock
from worker.errors import InstanceBusy, OperationError
from worker.operations.audit.auditing import KINDS, Look, look, twice
from worker.operations.audit.findings import Bench, Finding, Kind
from worker.operations.context import JobContext, NodeContext
from worker.operations.guests import Guests
from worker.operations.job_rows import hand_on, locked_lock
from worker.operations.receipts import Ended

log = structlog.get_logger(__name__)

Report = dict[str, list[dict[str, str]]]


def repair(node: NodeContext, guests: Guests, job: JobContext, arguments: RepairArguments) -> tuple[Report, Ended]:
    """Audit anew and repair what still holds: the findings ``ids``, or all that can be repaired.

    A QEMU that nobody knows is ended only where its id is named. Returns what was done, would be done under
    ``dry_run``, and was left with the reason; and whom that wakes.
    """
    ended = Ended()
    _let_go(node, job.id, ended)  # of what an earlier attempt held whose worker died
    found = twice(node, guests, job)
    report: Report = {"done": [], "would_do": [], "left": []}
    known = {finding["id"]: finding for finding in found.findings}
    wanted = [*dict.fromkeys(arguments.ids or known)]
    for number, finding_id in enumerate(wanted):
        finding = known.get(finding_id)
        if why := _why_left(finding, finding_id, found, named=bool(arguments.ids)):
            report["left"].append({"id": finding_id, "why": why})
        elif finding and arguments.dry_run:
            report["would_do"].append({"id": finding_id, "what": finding["explanation"]})
        elif finding:
            job.phase("repair", 50 + 50 * number // len(wanted), finding_id)
            _act(Bench(node, guests, job, found.seen, ended), finding, report)
    return report, ended


def _why_left(finding: Finding | None, finding_id: str, found: Look, *, named: bool) -> str:
    """Why a finding is not to be repaired; empty when it is."""
    if finding is None:
        return _why_absent(finding_id, found)
    if finding["repair"] is None:
        return f"nothing is done about it by itself: {finding['explanation']}"
    if _kind_of(finding).by_id_only and not named:
        return "its repair ends a process; name its id to have that done"
    return ""


def _why_absent(finding_id: str, found: Look) -> str:
    busy = next((other for other in found.busy if other["id"] == finding_id), None)
    if busy is None:
        return "there is no such finding now: it is gone, or passed"
    return (
        f"{busy['instance']} is held by job {found.held[str(busy['instance'])].job_id}; ask again when that has ended"
    )


def _kind_of(finding: Finding) -> Kind:
    return next(kind for kind in KINDS if kind.name == finding["kind"])


def _act(bench: Bench, finding: Finding, report: Report) -> None:
    kind = _kind_of(finding)
    assert kind.mend
    try:
        with _alone(bench, None if kind.of_ledger else finding["instance"]):
            what = _mend(bench, kind.mend, finding)
    except OperationError as exc:
        report["left"].append({"id": finding["id"], "why": exc.message})
        return
    log.info("repaired", finding=finding["id"], what=what)
    report["done"].append({"id": finding["id"], "what": what})


def _mend(bench: Bench, mend: Callable[[Bench, Finding], str], finding: Finding) -> str:
    now = look(bench.node, bench.guests, bench.job.id)
    bench.seen = now.seen
    if finding in now.findings:
        return mend(bench, finding)
    if any(other["id"] == finding["id"] for other in (*now.findings, *now.busy)):
        raise OperationError("it changed in this very moment; look again")
    return "it is gone, by itself or with an earlier repair"


@contextmanager
def _alone(bench: Bench, instance: str | None) -> Iterator[None]:
    """Hold the instance as a job of its own would. Raises InstanceBusy when another one has it."""
    if instance is None:
        yield
        return
    _take(bench, instance)
    try:
        yield
    finally:
        _let_go(bench.node, bench.job.id, bench.ended)


def _take(bench: Bench, instance: str) -> None:
    try:
        with bench.node.database.transaction() as session:
            if lock := locked_lock(session, instance):
                raise InstanceBusy(f"{instance} is held by job {lock.job_id}; ask again when that has ended")
            session.add(InstanceLock(instance_name=instance, job_id=bench.job.id, node=bench.node.name))
    except IntegrityError:
        raise InstanceBusy(f"a job took {instance} in this very moment; ask again when that has ended") from None


def _let_go(node: NodeContext, job_id: str, ended: Ended) -> None:
    with node.database.reading() as session:
        names = session.scalars(select(InstanceLock.instance_name).where(InstanceLock.job_id == job_id)).all()
    for name in names:
        with node.database.transaction() as session:
            wakeups = hand_on(session, locked_lock(session, name), job_id)
        ended.wakeups += wakeups
