"""Looking at the node: once, or twice where something is suspicious."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from models import Runtime, utc_now
from worker.kvm.process import ProcessIdentity
from worker.operations.audit import guest_kinds, host_facts, host_kinds, job_kinds, records
from worker.operations.audit.findings import Finding, Kind, Seen
from worker.operations.audit.host_facts import HostFacts
from worker.operations.context import JobContext, NodeContext
from worker.operations.guests import Guests

KINDS: tuple[Kind, ...] = (*job_kinds.KINDS, *guest_kinds.KINDS, *host_kinds.KINDS)
"""Every kind, in the order in which repairs are made."""

SECOND_LOOK_S = 0.3
"""A look reads the database, then the host: what changes in between looks wrong, and no longer so after this."""


@dataclass(frozen=True)
class Look:
    """``findings`` are suspicions until a second look has the very same; ``busy`` are about instances that a job holds
    (``held``, with the lock), and so none."""

    seen: Seen
    findings: list[Finding]
    busy: list[Finding]
    held: dict[str, Any]


def look(node: NodeContext, guests: Guests, own_job: str = "") -> Look:
    """One look at database and host. What the job ``own_job`` holds is not left out."""
    seen = _see(node, guests)
    held = seen.records.held(but=own_job)
    findings: list[Finding] = []
    busy: list[Finding] = []
    for kind in KINDS:
        for found in kind.find(seen):
            in_motion = not kind.of_ledger and found["instance"] in held
            (busy if in_motion else findings).append(found)
    return Look(seen, _one_qemu_first(findings), busy, held)


def _one_qemu_first(findings: list[Finding]) -> list[Finding]:
    """What says that a guest does not run is not to be believed, let alone made so, while a QEMU of its name runs."""
    strange = {found["instance"]: found["id"] for found in findings if found["kind"] == "process"}
    about_guests = {kind.name for kind in guest_kinds.KINDS}
    for found in findings:
        if found["kind"] in about_guests and found["repair"] and found["instance"] in strange:
            found["repair"] = None
            found["explanation"] += f". But a QEMU of that name runs: settle {strange[found['instance']]} first"
    return findings


def _see(node: NodeContext, guests: Guests) -> Seen:
    guests_dir = node.settings.run_dir / "guests"
    recorded = records.read(node)
    uids = [range(pool.first_uid, pool.last_uid + 1) for pool in recorded.uid_ranges]
    uids += [range(lease.uid, lease.uid + 1) for lease in recorded.uid_leases]
    host = host_facts.gather(guests_dir, uids, node.cgroups)
    host = _without_others(node, host, {row.uuid for row in recorded.runtimes})
    alive = {row.uuid: identity for row in recorded.runtimes if (identity := _process(row, host))}
    watched = frozenset(
        guest.uuid for row in recorded.runtimes if (guest := guests.get(row.instance_name)) and guest.uuid == row.uuid
    )
    return Seen(node.name, guests_dir, recorded, host, alive, watched)


def _without_others(node: NodeContext, host: HostFacts, known: set[str]) -> HostFacts:
    """Without what belongs to another node of the database that shares this host and its run folder."""
    uuids = ({process.uuid for process in host.processes} | host.folders.keys() | host.empty_groups) - known
    others = records.known_elsewhere(node, sorted(uuids))
    return HostFacts(
        processes=[process for process in host.processes if process.uuid not in others],
        folders={uuid: entries for uuid, entries in host.folders.items() if uuid not in others},
        own_taps=host.own_taps,
        interfaces=host.interfaces,
        pids_by_uid=host.pids_by_uid,
        empty_groups=host.empty_groups - others,
    )


def _process(row: Runtime, host: HostFacts) -> ProcessIdentity | None:
    if row.pid is None or row.start_ticks is None:
        return next((process.identity for process in host.processes if process.uuid == row.uuid), None)
    identity = ProcessIdentity(row.pid, row.start_ticks, row.boot_id)
    return identity if identity.is_alive() else None


def twice(node: NodeContext, guests: Guests, job: JobContext) -> Look:
    """A look whose findings stand: where one found something, what another one a moment later finds too."""
    job.phase("audit", 10, "comparing the database with the host")
    first = look(node, guests, job.id)
    if not first.findings:
        return first
    job.phase("second look", 40, f"{len(first.findings)} suspicion(s); looking again in a moment")
    job.wait(threading.Event(), SECOND_LOOK_S)
    second = look(node, guests, job.id)
    stand = [found for found in second.findings if found in first.findings]
    return Look(second.seen, stand, second.busy, second.held)


def audit(node: NodeContext, guests: Guests, job: JobContext) -> dict[str, Any]:
    """Where database and host disagree, how much was compared, and which instances jobs are at work on."""
    result = twice(node, guests, job)
    recorded, host = result.seen.records, result.seen.host
    return {
        "node": node.name,
        "checked_at": utc_now().isoformat(),
        "findings": result.findings,
        "checked": {
            "processes": len([*host_kinds.ours(result.seen)]),
            "folders": len(host.folders),
            "instances": len(recorded.states),
            "runtimes": len(recorded.runtimes),
            "disk_leases": len(recorded.disk_leases),
            "uid_leases": len(recorded.uid_leases),
            "locks": len(recorded.locks),
            "jobs": len(recorded.jobs_at_work) + len(recorded.waiting),
        },
        "in_motion": {name: lock.job_id for name, lock in sorted(result.held.items())},
    }
