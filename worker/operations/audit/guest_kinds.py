"""In the database, but not on the host: runtimes, instances' states and leases that nothing stands behind any more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from sqlalchemy import select

from hostler.contract import InstanceState, TaskName
from hostler.payloads import Instance
from models import DiskLease, Node, Runtime, UidLease, runtime_of, utc_now
from models import Instance as InstanceRow
from worker.errors import OperationError
from worker.kvm.command_line.disks import CDROMS
from worker.kvm.folder import GuestFolder
from worker.operations import checks
from worker.operations.audit.findings import Bench, Finding, Kind, Seen, finding
from worker.operations.guests import SETTLED, how_it_ended, release
from worker.operations.views import iso

OVER = (InstanceState.STOPPED, InstanceState.CRASHED)
PASSING = (InstanceState.STARTING, InstanceState.STOPPING)
CLEANUP, REPAIR = TaskName.INSTANCE_CLEANUP, TaskName.NODE_REPAIR


def _dead_runtimes(seen: Seen) -> Iterator[Finding]:
    for row in seen.records.runtimes:
        if row.uuid in seen.alive or row.uuid in seen.watched:  # the end of one that is watched is being handled
            continue
        yield finding(
            "dead_runtime",
            row.instance_name,
            f"the database has a running QEMU for {row.instance_name} (pid {row.pid}), and there is none",
            instance=row.instance_name,
            repair=CLEANUP if row.instance_name in seen.records.states else REPAIR,  # a cleanup is for the owner's
            evidence={
                **_who(row),
                "state": seen.records.states.get(row.instance_name),
                "run_dir": row.run_dir,
                "taps": [tap["name"] for tap in row.taps],
            },
        )


def _who(row: Runtime) -> dict[str, object]:
    return {"uuid": row.uuid, "pid": row.pid, "start_ticks": row.start_ticks, "boot_id": row.boot_id}


def _release(bench: Bench, found: Finding) -> str:
    row = next(row for row in bench.seen.records.runtimes if row.uuid == found["evidence"]["uuid"])
    try:
        removed = release(bench.node, row.instance_name, row.uuid, how_it_ended(row, killed_by_us=False))
    except OSError as exc:
        raise OperationError(f"{row.run_dir} cannot be removed: {exc.strerror}") from exc
    return f"removed {', '.join(removed)}"


def _unwatched(seen: Seen) -> Iterator[Finding]:
    for row in seen.records.runtimes:
        if row.uuid in seen.alive and row.uuid not in seen.watched:
            yield finding(
                "unwatched",
                row.instance_name,
                f"{row.instance_name} runs (pid {seen.alive[row.uuid].pid}), but the worker does not watch it; its "
                "repair adopts it, and the guest notices nothing",
                instance=row.instance_name,
                repair=REPAIR,
                evidence=_who(row) | {"state": seen.records.states.get(row.instance_name)},
            )


def _states(seen: Seen) -> Iterator[Finding]:
    runtimes = {row.instance_name: row for row in seen.records.runtimes}
    for name, state in sorted(seen.records.states.items()):
        row = runtimes.get(name)
        if row is None and state not in OVER:
            yield finding(
                "state",
                name,
                f"{name} is on record as {state}, but has no runtime, and no job is at work on it",
                instance=name,
                repair=CLEANUP,
                evidence={"state": state, "runtime": None},
            )
        elif row and row.uuid in seen.alive and state in (*OVER, *PASSING):
            yield finding(
                "state",
                name,
                f"{name} is on record as {state}, but its QEMU runs, and no job is at work on it; its repair asks "
                "QEMU what it does",
                instance=name,
                repair=REPAIR,
                evidence={"state": state, "runtime": row.uuid, "pid": row.pid},
            )


def _settle(bench: Bench, found: Finding) -> str:
    """Have a QEMU watched, and the state of an instance of ours be as it says, or stopped where there is none."""
    name = str(found["instance"])
    with bench.node.database.transaction() as session:
        row = session.get_one(InstanceRow, name, with_for_update=True, populate_existing=True)
        runtime = runtime_of(session, bench.node.name, name)
        ours = row.node == bench.node.name
        if runtime is None and ours:
            row.state, row.reason = InstanceState.STOPPED, row.reason or "cleaned up"
            return f"{name} is stopped"
        if runtime is None:
            return f"{name} has no QEMU here"
        if ours and row.state not in SETTLED:
            row.state = InstanceState.UNKNOWN
    guest = bench.guests.get(name)
    if guest and guest.uuid == runtime.uuid:
        bench.guests.observe(guest)
    elif guest or not bench.guests.adopt(runtime, killed_by_us=False):
        raise OperationError(f"{name} cannot be adopted: its QEMU has ended, or another one is watched in its place")
    with bench.node.database.reading() as session:
        state = session.scalar(select(InstanceRow.state).where(InstanceRow.name == name))
    return f"{name} is watched and {state}"


def _missing_folders(seen: Seen) -> Iterator[Finding]:
    for row in seen.records.runtimes:
        folder = GuestFolder(Path(row.run_dir))
        if row.uuid not in seen.alive or folder.path.parent != seen.guests_dir:
            continue
        wanted = [folder.qmp, folder.monitor, folder.journal]
        wanted += [folder.serial] if row.hardware["hvparams"].get("serial_console") else []
        missing = [path.name for path in wanted if path.name not in seen.host.folders.get(row.uuid, ())]
        if missing:
            yield finding(
                "guest_folder",
                row.instance_name,
                f"{row.instance_name} runs, but files of it were deleted: its monitor or console cannot be reached "
                "again, nor can the next worker tell why it ended. Stop it and start it again when that suits",
                instance=row.instance_name,
                evidence={"path": row.run_dir, "missing": missing, "pid": row.pid},
            )


def _missing_taps(seen: Seen) -> Iterator[Finding]:
    taps = {process.uuid: process.taps for process in seen.host.processes}
    for row in seen.records.runtimes:
        held = taps.get(row.uuid)
        if row.uuid not in seen.alive or held is None:
            continue
        for tap in row.taps:
            if tap["name"] not in held:
                yield finding(
                    "guest_tap",
                    f"{row.instance_name}/{tap['name']}",
                    f"{row.instance_name}'s card {tap['index']} is cut off: its tap {tap['name']} was deleted. Stop "
                    "the guest and start it again when that suits",
                    instance=row.instance_name,
                    evidence={"tap": tap["name"], "ifindex": tap.get("ifindex"), "pid": row.pid},
                )


def _stray_leases(seen: Seen) -> Iterator[Finding]:
    running = {row.instance_name for row in seen.records.runtimes}
    for lease in seen.records.disk_leases:
        if lease.instance_name not in running:
            yield finding(
                "disk_lease",
                lease.id,
                f"{lease.path} is kept for {lease.instance_name}, which has no QEMU here; nobody else can have it",
                instance=lease.instance_name,
                repair=REPAIR,
                evidence={"path": lease.path, "file_id": lease.file_id, "node": seen.node},
            )


def _free_disk(bench: Bench, found: Finding) -> str:
    with bench.node.database.transaction() as session:
        session.get(Node, bench.node.name, with_for_update=True)
        lease = session.get(DiskLease, int(found["subject"]))
        if lease:
            session.delete(lease)
    return f"freed {found['evidence']['path']}"


def _missing_leases(seen: Seen) -> Iterator[Finding]:
    leased = {(lease.instance_name, what) for lease in seen.records.disk_leases for what in (lease.path, lease.file_id)}
    for row in seen.records.runtimes:
        missing = [path for path in _opened(row) if not {(row.instance_name, what) for what in _names(path)} & leased]
        if missing and row.uuid in seen.alive:
            yield finding(
                "missing_lease",
                row.instance_name,
                f"{row.instance_name} runs with {', '.join(missing)} open, but the database does not keep it from "
                "others, who could open it a second time",
                instance=row.instance_name,
                repair=REPAIR,
                evidence={"paths": missing, "pid": row.pid},
            )


def _opened(row: Runtime) -> list[str]:
    cds = (row.hardware["hvparams"].get(field) for field in CDROMS)
    return [*dict.fromkeys([*(disk["path"] for disk in row.hardware["disks"]), *filter(None, cds)])]


def _names(path: str) -> Iterator[str]:
    # A file that is open by two paths has one lease, by either; one that was exchanged since is another file by now.
    yield path
    with suppress(OSError):
        yield checks.file_id(path)


def _lease_disks(bench: Bench, found: Finding) -> str:
    name, paths = str(found["instance"]), found["evidence"]["paths"]
    with bench.node.database.transaction() as session:
        session.get(Node, bench.node.name, with_for_update=True)
        instance = Instance.model_validate(session.get_one(Runtime, (name, bench.node.name)).hardware)
        held = session.scalars(select(DiskLease).where(DiskLease.node == bench.node.name)).all()
        others = [lease for lease in held if lease.instance_name != name]
        if conflicts := [reason for _, reason in checks.conflicts(instance, others)]:
            raise OperationError(f"{'; '.join(conflicts)}. Stop one of the two at once")
        own = {lease.file_id for lease in held if lease.instance_name == name}
        alone = [checks.alone(instance, disk) for disk in checks.opened(instance).values() if disk.path in paths]
        leases = {lease.file_id: lease for each in alone for lease in checks.leases(bench.node.name, each)}
        session.add_all(lease for file_id, lease in leases.items() if file_id not in own)
    return f"{', '.join(paths)} is kept for {name}"


def _stray_uids(seen: Seen) -> Iterator[Finding]:
    running = {row.instance_name: row.uid for row in seen.records.runtimes}
    for lease in seen.records.uid_leases:
        if running.get(str(lease.instance_name)) != lease.uid:
            pids = seen.host.pids_by_uid.get(lease.uid, [])
            yield finding(
                "uid_lease",
                lease.uid,
                f"uid {lease.uid} is leased to {lease.instance_name}, which has no QEMU with it here"
                + ("; but processes still run under it" if pids else ""),
                instance=lease.instance_name,
                repair=None if pids else REPAIR,
                evidence={"uid": lease.uid, "leased_at": iso(lease.leased_at), "pid": pids[0] if pids else None},
            )


def _free_uid(bench: Bench, found: Finding) -> str:
    with bench.node.database.transaction() as session:
        lease = session.get(UidLease, (bench.node.name, int(found["subject"])), with_for_update=True)
        if lease and lease.instance_name == found["instance"]:
            lease.instance_name, lease.released_at = None, utc_now()
    return f"freed uid {found['subject']}"


KINDS = [
    Kind("dead_runtime", _dead_runtimes, _release),
    Kind("unwatched", _unwatched, _settle),
    Kind("state", _states, _settle),
    Kind("guest_folder", _missing_folders),
    Kind("guest_tap", _missing_taps),
    Kind("disk_lease", _stray_leases, _free_disk),
    Kind("missing_lease", _missing_leases, _lease_disks),
    Kind("uid_lease", _stray_uids, _free_uid),
]
