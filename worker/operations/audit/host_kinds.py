"""On the host, but not in the database: QEMU processes, guests' folders, taps and uids that no runtime accounts for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict

from hostler.contract import TaskName
from hostler.payloads import SLOTS, instance_of
from worker.errors import OperationError
from worker.kvm.folder import GuestFolder
from worker.kvm.process import QemuProcess
from worker.operations.audit.findings import Bench, Finding, Kind, Seen, finding
from worker.operations.audit.host_facts import QemuSeen


def ours(seen: Seen) -> Iterator[QemuSeen]:
    """The QEMUs of this node, known or not: they write their journal into their folder below the node's."""
    for process in seen.host.processes:
        if process.journal == str(GuestFolder(seen.guests_dir / process.uuid).journal):
            yield process


def _processes(seen: Seen) -> Iterator[Finding]:
    known = {row.uuid: row.instance_name for row in seen.records.runtimes}
    for process in ours(seen):
        if seen.alive.get(process.uuid) == process.identity:
            continue
        double = process.uuid in known
        yield finding(
            "process",
            f"{process.identity.pid}-{process.identity.start_ticks}",
            f"a second QEMU runs with the uuid of {known[process.uuid]}; both may write to the same disks. Find out "
            "which one serves the guest, and end the other by hand"
            if double
            else f"a QEMU runs (pid {process.identity.pid}) that the database knows nothing of; it may hold disks. Its "
            "repair ends it: first make sure that nobody needs it",
            instance=known.get(process.uuid) or instance_of({"name": process.name}),
            repair=None if double else TaskName.NODE_REPAIR,
            evidence=asdict(process.identity)
            | {"uuid": process.uuid, "name": process.name, "executable": process.executable, "journal": process.journal}
            | {"taps": sorted(process.taps or ())},
        )


def _end_process(bench: Bench, found: Finding) -> str:
    suspect = next(
        process
        for process in ours(bench.seen)
        if process.identity.pid == found["evidence"]["pid"]
        and process.identity.start_ticks == found["evidence"]["start_ticks"]
    )
    if process := QemuProcess.adopt(suspect.identity):
        try:
            process.kill()
        finally:
            process.close()
    GuestFolder(bench.seen.guests_dir / suspect.uuid).remove()
    with suppress(OSError):  # what is left of it is a finding of its own
        bench.node.cgroups.remove(suspect.uuid)
    return f"ended QEMU (pid {suspect.identity.pid}) and removed its folder"


def _known(seen: Seen) -> set[str]:
    return {row.uuid for row in seen.records.runtimes} | {process.uuid for process in seen.host.processes}


def _folders(seen: Seen) -> Iterator[Finding]:
    for uuid in sorted(seen.host.folders.keys() - _known(seen)):
        yield finding(
            "folder",
            uuid,
            "the folder of a guest that is no more; no QEMU runs with this uuid, and the database knows none",
            repair=TaskName.NODE_REPAIR,
            evidence={"path": str(seen.guests_dir / uuid), "entries": sorted(seen.host.folders[uuid])},
        )


def _remove_folder(bench: Bench, found: Finding) -> str:
    try:
        GuestFolder(bench.seen.guests_dir / found["subject"]).remove()
    except OSError as exc:
        raise OperationError(f"{found['evidence']['path']} cannot be removed: {exc.strerror}") from exc
    return f"removed {found['evidence']['path']}"


def _groups(seen: Seen) -> Iterator[Finding]:
    for uuid in sorted(seen.host.empty_groups - _known(seen)):
        yield finding(
            "control_group",
            uuid,
            "the control group of a guest that is no more; no process is in it",
            repair=TaskName.NODE_REPAIR,
            evidence={"uuid": uuid},
        )


def _remove_group(bench: Bench, found: Finding) -> str:
    try:
        bench.node.cgroups.remove(found["subject"])
    except OSError as exc:
        raise OperationError(f"{exc.filename} cannot be removed: {exc.strerror}") from exc
    return f"removed the control group {found['subject']}"


def _taps(seen: Seen) -> Iterator[Finding]:
    starting = {task for task, slot in SLOTS.items() if slot == "start"}
    if any(job.task in starting for job in seen.records.jobs_at_work):
        return  # a start has its taps open for a moment before it has written them down
    for tap in sorted(seen.host.own_taps & seen.host.interfaces.keys()):
        yield finding(
            "tap",
            f"{tap}.{seen.host.interfaces[tap]}",
            f"the worker keeps tap {tap} open, of a start that is over. It goes with the worker: restart that; its "
            "guests run on",
            evidence={"tap": tap, "ifindex": seen.host.interfaces[tap], "holder": "worker"},
        )


def _unrecorded_taps(seen: Seen) -> Iterator[Finding]:
    recorded = {row.uuid: (row.instance_name, {tap["name"] for tap in row.taps}) for row in seen.records.runtimes}
    for process in seen.host.processes:
        if seen.alive.get(process.uuid) != process.identity:
            continue
        name, known = recorded[process.uuid]
        for tap in sorted((process.taps or frozenset()) - known - {""}):
            yield finding(
                "guest_tap",
                f"{name}/{tap}",
                f"{name}'s QEMU has tap {tap} open, which the database does not say; it goes when the guest is "
                "stopped, but ifdown will not be run for it",
                instance=name,
                evidence={"tap": tap, "pid": process.identity.pid},
            )


def _uids(seen: Seen) -> Iterator[Finding]:
    leased = {lease.uid for lease in seen.records.uid_leases}
    for uid, pids in sorted(seen.host.pids_by_uid.items()):
        if uid not in leased:
            yield finding(
                "uid",
                uid,
                f"uid {uid} belongs to the pool, is leased to no guest, and processes run under it; a guest that got "
                "it could be reached by them. End them, or take the uid out of the pool",
                evidence={"uid": uid, "pid": pids[0]},  # the lowest: the others come and go
            )


KINDS = [
    Kind("process", _processes, _end_process, by_id_only=True),
    Kind("folder", _folders, _remove_folder),
    Kind("control_group", _groups, _remove_group),
    Kind("tap", _taps),
    Kind("guest_tap", _unrecorded_taps),
    Kind("uid", _uids),
]
