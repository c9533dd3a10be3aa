"""Giving a guest's QEMU rights of its own, and taking them back: a uid, access to its files, a root folder."""

from __future__ import annotations

import pwd
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import structlog
from sqlalchemy import or_, select

from hostler.errors import InvalidArgument
from hostler.hvchecks import LIMITS
from hostler.payloads import Instance
from models import DiskLease, Runtime, runtime_of
from worker.errors import QemuFailed, Unsupported
from worker.isolation import acl, cgroups
from worker.isolation.in_use import uids_in_use
from worker.kvm.command_line.disks import CDROMS
from worker.kvm.command_line.options import Confinement
from worker.kvm.emulator import Features
from worker.kvm.folder import GuestFolder
from worker.operations import quarantine, uid_pool
from worker.operations.context import NodeContext

log = structlog.get_logger(__name__)

Problem = tuple[str, str]
Files = dict[str, bool]
"""By path: whether the guest writes to it."""


def assign_uid(node: NodeContext, instance: Instance, uuid: str) -> int:
    """The uid that the instance's QEMU shall have, written into its runtime.

    Raises InvalidArgument or UidPoolExhausted; then it has none.
    """
    from_pool = instance.hvparams.security_model == "pool"
    uid = None if from_pool else _uid_of_login(instance.hvparams.security_domain)
    avoid = uids_in_use() if from_pool else set()  # before the transaction: no other guest gets them meanwhile
    with node.database.transaction() as session:
        if uid is None:
            uid = uid_pool.lease(session, node.name, instance.name, uuid, avoid)
        session.get_one(Runtime, (instance.name, node.name)).uid = uid
    return uid


def grant_files(instance: Instance, uid: int) -> None:
    """Let ``uid`` open the instance's files, and no others. Raises Unsupported; some may be granted by then."""
    for path, writes in files_of(instance).items():
        try:
            acl.grant(Path(path), uid, write=writes)
        except OSError as exc:
            if not writes:  # a CD on a read-only file system; QEMU opens it before it gives up its rights
                log.info("a guest's uid cannot be let read a file", path=path, uid=uid, reason=exc.strerror)
                continue
            raise Unsupported(
                f"uid {uid} cannot be given access to {path}: {exc.strerror}. Its file system must support access "
                "control lists; else use security_model none"
            ) from exc


def let_write(node: NodeContext, instance: Instance, path: str) -> bool:
    """Let the instance's QEMU, which runs, open a file again to write to it. False where it cannot reach it any more.

    Raises OSError.
    """
    if instance.hvparams.use_chroot or not all(parent.stat().st_mode & stat.S_IXOTH for parent in Path(path).parents):
        return False
    with node.database.reading() as session:
        runtime = runtime_of(session, node.name, instance.name)
    if runtime and runtime.uid is not None:
        acl.grant(Path(path), runtime.uid, write=True)
    return True


def revoke_files(node: NodeContext, name: str, paths: Iterable[str], uid: int) -> None:
    """Take back what ``grant_files`` gave; files that another guest of the same uid has stay open to it, and those that
    this guest has on the node it has moved to, where its uid may be the same and the storage shared."""
    here, elsewhere = Runtime.node == node.name, Runtime.node != node.name
    with node.database.reading() as session:
        others = session.scalars(
            select(Runtime)
            .where(Runtime.uid == uid)
            .where(or_(here & (Runtime.instance_name != name), elsewhere & (Runtime.instance_name == name)))
        ).all()
    kept = {path for other in others for path in files_of(Instance.model_validate(other.hardware))}
    for path in {*paths} - kept:
        try:
            acl.revoke(Path(path), uid)
        except OSError as exc:
            log.info("a file's access list was left as it is", path=path, uid=uid, reason=exc.strerror)


def files_of(instance: Instance) -> Files:
    """What QEMU may open again while the guest runs: disks, CDs, floppy, firmware."""
    hvparams = instance.hvparams
    files = {getattr(hvparams, field): False for field in (*CDROMS, "uefi_code_path")}
    files |= {hvparams.floppy_image_path: True, hvparams.uefi_vars_path: True}
    files |= {disk.path: disk.mode == "rw" for disk in instance.disks}
    return {path: writes for path, writes in files.items() if path}


def confinement_of(instance: Instance, features: Features, folder: GuestFolder, uid: int | None) -> Confinement:
    """How QEMU is told to give up its rights. Makes the folder that it is confined to."""
    hvparams = instance.hvparams
    if hvparams.use_chroot:
        folder.chroot.mkdir(mode=0o700)  # ours: a QEMU with another uid cannot put anything there
    return Confinement(
        run_as={"user": hvparams.security_domain, "pool": f"{uid}:{uid}"}.get(hvparams.security_model, ""),
        chroot=str(folder.chroot) if hvparams.use_chroot else "",
        run_with=features.run_with,
    )


def take_back(node: NodeContext, hardware: object, uuid: str, uid: int | None) -> list[str]:
    """All that a QEMU which has ended had by its uid. Safe to repeat. Returns what was released, for people."""
    if uid is None:
        return []
    instance = Instance.model_validate(hardware)
    with node.database.reading() as session:  # a disk that was about to be plugged in is leased before it is recorded
        own = DiskLease.node == node.name, DiskLease.instance_name == instance.name
        leased = session.scalars(select(DiskLease.path).where(*own)).all()
    revoke_files(node, instance.name, [*files_of(instance), *leased], uid)
    freed = uid_pool.release(node, uuid)
    return [] if freed is None else [f"uid {freed}"]


def enter_group(node: NodeContext, instance: Instance, uuid: str) -> list[str]:
    """Make the control group of the instance's QEMU. Returns what puts QEMU into it, before its command line.

    Raises QemuFailed; then there is none.
    """
    hvparams = instance.hvparams
    limits = cgroups.Limits(
        memory_max_bytes=hvparams.cgroup_memory_max_mib * 2**20 or None,
        cpu_max_percent=hvparams.cgroup_cpu_max_percent or None,
        cpu_weight=hvparams.cgroup_cpu_weight or None,
    )
    try:
        return node.cgroups.enter(uuid, limits)
    except OSError as exc:
        raise QemuFailed(f"QEMU's control group cannot be made: {exc.filename}: {exc.strerror}") from exc


def remove_folder(node: NodeContext, name: str, folder: GuestFolder) -> list[str]:
    """Remove the guest's folder and its control group; what is in its chroot is put into quarantine first.

    Returns all that, for people.
    """
    removed = quarantine.put_aside(node, name, folder)
    try:
        removed += ["control group"] if node.cgroups.remove(folder.path.name) else []
    except OSError as exc:
        log.warning("a guest's control group was left", path=exc.filename, reason=exc.strerror)
    return [*removed, f"folder {folder.path}"] if folder.remove() else removed


def problems(node: NodeContext, instance: Instance) -> Iterator[Problem]:
    """What keeps the instance's login from being one of its own."""
    if instance.hvparams.security_model == "user":
        with suppress(KeyError):  # said by hardware.problems
            uid = pwd.getpwnam(instance.hvparams.security_domain).pw_uid
            if uid_pool.is_member(node, uid):
                yield "hvparams.security_domain", f"its uid {uid} belongs to the pool of node {node.name}"


def unsupported(node: NodeContext, instance: Instance) -> Iterator[Problem]:
    """Limits that this host cannot set."""
    for name in LIMITS:
        if getattr(instance.hvparams, name) and not node.cgroups.limits:
            yield f"hvparams.{name}", node.cgroups.about


def warnings(instance: Instance) -> Iterator[Problem]:
    """Disks that guests of other uids can read too, because everybody can."""
    if instance.hvparams.security_model == "none" or instance.hvparams.use_chroot:
        return
    for index, disk in enumerate(instance.disks):
        with suppress(OSError):
            if (mode := stat.S_IMODE(Path(disk.path).stat().st_mode)) & stat.S_IRWXO:
                yield (
                    f"disks[{index}].path",
                    f"everybody on this host may open {disk.path!r} (mode {mode:04o}); chmod o= it",
                )


def _uid_of_login(login: str) -> int:
    try:
        return pwd.getpwnam(login).pw_uid
    except KeyError:
        reason = f"Unknown security domain user {login}"
        raise InvalidArgument([{"field": "instance.hvparams.security_domain", "reason": reason}]) from None
