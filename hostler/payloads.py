"""What goes into a job and what comes out of it, as types. Unknown keys and wrong types are refused.

Sizes and durations carry their unit in the name. Validation needs no host; a node checks the rest
(do the files exist, is there memory enough) before it touches anything.
"""

from __future__ import annotations

import re
from datetime import datetime
from ipaddress import ip_address
from itertools import count
from typing import Annotated, Any, Literal, TypedDict, TypeVar

from pydantic import AfterValidator, Field, ValidationError, model_validator

from hostler.contract import KEEP_MAX_S, KEEP_MIN_S, TaskName
from hostler.errors import InvalidArgument
from hostler.hvchecks import CROSS_CHECK, check_instance
from hostler.hvparams import MEMORY_MAX_MIB, HvParams
from hostler.hvtypes import AbsolutePath
from hostler.job_arguments import (
    InstanceName,
    JobArguments,
    JobId,
    NameArguments,
    NoArguments,
    Payload,
    TimeoutS,
    instance_name,
)
from hostler.maintenance import DrainArguments, FenceArguments, HoldArguments, UnfenceArguments
from hostler.migration import (
    MigrateArguments,
    MigrateCancelArguments,
    MigrateTuneArguments,
    MigrationAcceptArguments,
    MigrationFinalizeArguments,
    MigrationInfoArguments,
    MigrationRecoverArguments,
    MigrationRunArguments,
)
from hostler.uid_ranges import parse_ranges, require_harmless

DISK_MAX_MIB = 1024 * 1024 * 1024
"""1 PiB; what the storage really has is known when it is written."""
VCPUS_MAX = 4096
"""A bound against nonsense; the machine type's own limit is checked on the node."""
VLAN_MAX = 4094
"""802.1Q has 12 bits for it; 0 and 4095 are reserved."""
SHOWN_MAX = 80
"""How much of somebody's own words an error repeats."""

_MAC = re.compile(r"([0-9a-f]{2}:){5}[0-9a-f]{2}")
_TAG = re.compile(r"[\x21-\x7e]{1,128}")
_INTERFACE = re.compile(r"[A-Za-z0-9_.:@-]{1,15}")  # IFNAMSIZ is 16 with its NUL


def _mac(value: str) -> str:
    mac = value.lower()
    if not _MAC.fullmatch(mac):
        raise ValueError(f"{value!r} is not a MAC address such as 52:54:00:12:34:56")
    if int(mac[:2], 16) & 1:
        raise ValueError(f"{value!r} is a multicast address; a card needs a unicast one")
    return mac


def _link(value: str) -> str:
    if value and not _INTERFACE.fullmatch(value):
        raise ValueError(f"{value!r} is not an interface name (at most 15 letters, digits, '_', '.', ':', '@', '-')")
    return value


def _ip(value: str) -> str:
    return str(ip_address(value)) if value else value


def _tags(value: list[str]) -> list[str]:
    for tag in value:
        if not _TAG.fullmatch(tag):
            raise ValueError(f"{tag!r} is not a tag: 1 to 128 visible ASCII characters, no space")
    return value


class Disk(Payload):
    """A disk image or block device of the host, seen by the guest in the order of the list."""

    path: AbsolutePath = Field(description="File or block device, absolute; commas and equals signs are fine.")
    mode: Literal["rw", "ro"] = Field("rw", description="Read-only disks are not possible with disk_type ide.")
    shared: bool = Field(False, description="Other instances may open it too; every one of them has to say so.")
    format: Literal["raw", "qcow2"] = Field("raw", description="Said, never guessed from the content.")


class Nic(Payload):
    """A network card. ``user`` needs no rights; all other modes get a tap and the node's ifup script."""

    mac: Annotated[str, AfterValidator(_mac)] = Field(description="Unicast, as 52:54:00:12:34:56.")
    mode: Literal["bridged", "routed", "openvswitch", "user"] = Field(
        "bridged", description="How the card reaches the world."
    )
    link: Annotated[str, AfterValidator(_link)] = Field("", description="The bridge, or the routing table.")
    ip: Annotated[str, AfterValidator(_ip)] = Field("", description="Told to ifup; routed cards get a route to it.")
    vlan: int = Field(
        0,
        ge=0,
        le=VLAN_MAX,
        description="VLAN of the bridge that the card is in, untagged for the guest; 0 is the bridge's own.",
    )

    @model_validator(mode="after")
    def _bridges_have_names_and_vlans(self) -> Nic:
        on_a_bridge = self.mode in ("bridged", "openvswitch")
        if on_a_bridge and not self.link:
            raise ValueError(f"link: a card of mode {self.mode} needs the bridge's name")
        if self.vlan and not on_a_bridge:
            raise ValueError(f"vlan: a card of mode {self.mode} is on no bridge that could have VLANs")
        return self


class Placement(Payload):
    """Where the devices of a machine are that was changed while it ran: no longer where their order puts them.

    ``disks`` and ``nics`` are the numbers in the names of their devices, in the order of the lists; ``slots`` and
    ``scsi_ids`` are places on the PCI and SCSI buses by the name of the device. ``no_rom`` are the numbers of cards
    that nothing boots from, because their QEMU could not read a ROM for them when they were plugged in.
    """

    disks: list[Annotated[int, Field(ge=0, le=255)]] = Field(default_factory=list)
    nics: list[Annotated[int, Field(ge=0, le=255)]] = Field(default_factory=list)
    no_rom: list[Annotated[int, Field(ge=0, le=255)]] = Field(default_factory=list)
    slots: dict[str, Annotated[int, Field(ge=0, le=31)]] = Field(default_factory=dict)
    scsi_ids: dict[str, Annotated[int, Field(ge=0, le=255)]] = Field(default_factory=dict)


class Instance(Payload):
    """A guest as the master wants it."""

    name: InstanceName = Field(description="One name on all nodes that share the database; at most 255 characters.")
    memory_mib: int = Field(ge=1, le=MEMORY_MAX_MIB, description="Memory in MiB; at most what the host has.")
    vcpus: int = Field(1, ge=1, le=VCPUS_MAX, description="Virtual processors; at most what the machine type has.")
    disks: list[Disk] = Field(default_factory=list, max_length=24, description="In the guest's order.")
    nics: list[Nic] = Field(default_factory=list, max_length=8, description="In the guest's order.")
    tags: Annotated[list[str], AfterValidator(_tags)] = Field(
        default_factory=list, description="Told to the network scripts."
    )
    network_port: int | None = Field(None, ge=1, le=65535, description="Port of the VNC or SPICE display.")
    autostart: bool = Field(False, description="Start it again after the host was rebooted, if it was wanted running.")
    restart_policy: Literal["never", "on-crash", "always"] = Field(
        "never", description="always: also after the guest shut itself down. What an operator stopped stays stopped."
    )
    restart_max: int = Field(5, ge=1, le=100, description="Restarts in a row, before a person is needed.")
    restart_delay_s: float = Field(
        5, ge=0, le=3600, allow_inf_nan=False, description="Doubles with each restart in a row, up to five minutes."
    )
    hvparams: HvParams = Field(
        default_factory=lambda: HvParams.model_validate({}), description="The virtual hardware, see below."
    )
    placement: Placement | None = Field(
        None, description="Left out by senders; the node notes here where hotplug put devices, so that they stay there."
    )

    def numbered_disks(self) -> list[tuple[int, Disk]]:
        """The disks in their order, each with the number that its device is named by."""
        return [*zip(self.placement.disks if self.placement else count(), self.disks, strict=False)]

    def numbered_nics(self) -> list[tuple[int, Nic]]:
        """The cards in their order, each with the number that its device is named by."""
        return [*zip(self.placement.nics if self.placement else count(), self.nics, strict=False)]

    @model_validator(mode="after")
    def _each_device_has_one_number(self) -> Instance:
        placement = self.placement or Placement(disks=[*range(len(self.disks))], nics=[*range(len(self.nics))])
        for numbers, devices in ((placement.disks, self.disks), (placement.nics, self.nics)):
            if not len({*numbers}) == len(numbers) == len(devices):
                raise ValueError("placement: needs a number, each another one, for every disk and for every card")
        return self

    @model_validator(mode="after")
    def _each_disk_and_mac_once(self) -> Instance:
        for field, values in (
            ("disks", [disk.path for disk in self.disks]),
            ("nics", [nic.mac for nic in self.nics]),
        ):
            for value in values:
                if values.count(value) > 1:
                    raise ValueError(f"{field}: {value!r} is given more than once")
        return self

    @model_validator(mode="after")
    def _hvparams_suit_the_rest(self) -> Instance:
        check_instance(self)
        return self


class RepairArguments(JobArguments):
    """``node.repair``: the findings of ``node.audit`` to act on, by id; without any, all that can be repaired."""

    ids: list[Annotated[str, Field(min_length=1, max_length=600)]] = Field(default_factory=list, max_length=1000)
    dry_run: bool = True


class PowercycleArguments(JobArguments):
    """``node.powercycle``: reboot the host at once. ``confirm`` repeats the node's name.

    With ``boot_id`` (of ``node.info``) only if the host was not rebooted since, so that a job that waited for a worker
    does not reboot a host again that somebody has reset by hand.
    """

    confirm: Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$")]
    boot_id: Annotated[str, Field(pattern=r"^[0-9a-f-]{36}$")] | None = None


def _uid_ranges(value: str) -> str:
    if not parse_ranges(value):
        raise ValueError("no range is given; one is 20000-20099, several are 20000-20099,20200")
    return value


UidRangesText = Annotated[str, Field(max_length=10_000), AfterValidator(_uid_ranges)]


class UidPoolShowArguments(JobArguments):
    """``uid_pool.show``: with ``history`` also the uids that are free again, and who had each last."""

    history: bool = False


class UidPoolAddArguments(JobArguments):
    """``uid_pool.add``: uids that the node may give to guests. ``force`` allows those of the host's services but root.

    They need no login of their own.
    """

    ranges: UidRangesText
    force: bool = False

    @model_validator(mode="after")
    def _harmless(self) -> UidPoolAddArguments:
        try:
            require_harmless(parse_ranges(self.ranges), force=self.force)
        except ValueError as exc:
            raise ValueError(f"ranges: {exc}") from None
        return self


class UidPoolRemoveArguments(JobArguments):
    """``uid_pool.remove``: each range as it was added. A guest that has one of the uids keeps it until it ends."""

    ranges: UidRangesText


class QuarantineReleaseArguments(JobArguments):
    """``quarantine.release``: delete what was put aside, by the names that ``quarantine.list`` gives."""

    names: list[Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")]] = Field(
        min_length=1, max_length=1000
    )


class ConsoleArguments(NameArguments):
    """``instance.console``: of the kind asked for; without one the first there is of serial, vnc, spice."""

    kind: Literal["serial", "vnc", "spice"] | None = None


class InstanceArguments(JobArguments):
    """A job that carries a whole instance."""

    instance: Instance


class StartArguments(InstanceArguments):
    """``instance.start``: with ``paused`` the guest is built and left before its first instruction."""

    paused: bool = False


class StopArguments(NameArguments):
    """``instance.stop``: ask through ACPI and wait ``timeout_s``; ``force`` kills at once."""

    force: bool = False
    timeout_s: TimeoutS = 120
    on_timeout: Literal["force", "fail"] = "force"


class RebootArguments(NameArguments):
    """``instance.reboot``: ACPI and saved hardware, kill and saved hardware, or the reset line."""

    mode: Literal["soft", "hard", "reset"] = "soft"
    timeout_s: TimeoutS = 120


class RestartArguments(NameArguments):
    """``instance.restart``: start what does not run again, as it was. Nothing is done where that is wanted no more.

    The node itself sends all causes but ``operator``.
    """

    cause: Literal["operator", "crash", "shutdown", "boot"] = "operator"


class DiskAddArguments(NameArguments):
    """``instance.disk_add``: plug a disk into a running guest, as its last one."""

    disk: Disk


class DiskRemoveArguments(NameArguments):
    """``instance.disk_remove``: the disk of this path; the guest has ``timeout_s`` to let go of it."""

    path: AbsolutePath
    timeout_s: TimeoutS = 30


class DiskResizeArguments(NameArguments):
    """``instance.disk_resize``: make the disk of this path larger."""

    path: AbsolutePath
    size_mib: int = Field(ge=1, le=DISK_MAX_MIB)


class NicAddArguments(NameArguments):
    """``instance.nic_add``: plug a network card into a running guest, as its last one."""

    nic: Nic


class NicRemoveArguments(NameArguments):
    """``instance.nic_remove``: the card of this address; the guest has ``timeout_s`` to let go of it."""

    mac: Annotated[str, AfterValidator(_mac)]
    timeout_s: TimeoutS = 30


class CdEjectArguments(NameArguments):
    """``instance.cd_eject``: empty a CD drive. The guest has ``timeout_s`` to unlock it; ``force`` does not ask."""

    drive: Literal["cdrom", "cdrom2"] = "cdrom"
    timeout_s: TimeoutS = 30
    force: bool = False


class CdInsertArguments(CdEjectArguments):
    """``instance.cd_insert``: put the image of this path into a CD drive, in the place of what is in it."""

    path: AbsolutePath


class SetMemoryArguments(NameArguments):
    """``instance.set_memory``: by its balloon, within ``timeout_s``; at most what the guest was built with.

    That is ``memory_max_mib``, or what it was started with; ``memory_min_mib`` is the least.
    """

    memory_mib: int = Field(ge=1, le=MEMORY_MAX_MIB)
    timeout_s: TimeoutS = 30


class SetPasswordArguments(NameArguments):
    """``instance.set_password``: the display's new password is the only line of a file on the node."""

    kind: Literal["vnc", "spice"]
    password_file: AbsolutePath


class SnapshotArguments(NameArguments):
    """``snapshot.create``, ``revert`` and ``delete``: a snapshot of all writable disks of an instance, by its name."""

    snapshot: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]


class BackupArguments(NameArguments):
    """``instance.backup``: whole copies of all disks as they are at one moment, in new files of the node.

    Either a folder, in which they are called ``NAME.diskNUMBER.FORMAT``, or the path of each, in the disks' order.
    """

    target_dir: AbsolutePath | None = None
    targets: list[AbsolutePath] = Field(default_factory=list, max_length=24)
    format: Literal["raw", "qcow2"] = "qcow2"

    @model_validator(mode="after")
    def _one_of_both(self) -> BackupArguments:
        if (self.target_dir is None) == (not self.targets):
            raise ValueError("target_dir: give either target_dir or targets")
        if len({*self.targets}) < len(self.targets):
            raise ValueError("targets: each has to be another file")
        return self


class JobListArguments(JobArguments):
    """``job.list``: the node's latest jobs, newest first, optionally of one instance or one state.

    Jobs that only look (lists, infos, checks) are left out unless ``queries`` is set.
    """

    instance: InstanceName | None = None
    states: list[str] = Field(default_factory=list)
    queries: bool = False
    limit: int = Field(50, ge=1, le=1000)


class JobIdArguments(JobArguments):
    """A job about another job."""

    id: JobId


class JobRetryArguments(JobArguments):
    """``job.retry``: send one failed job again under a new id, or all that failed since a time (ISO 8601)."""

    id: JobId | None = None
    failed_since: str | None = None
    limit: int = Field(100, ge=1, le=1000)

    @model_validator(mode="after")
    def _one_of_both(self) -> JobRetryArguments:
        if (self.id is None) == (self.failed_since is None):
            raise ValueError("id: give either id or failed_since")
        if self.failed_since is not None and datetime.fromisoformat(self.failed_since).tzinfo is None:
            raise ValueError("failed_since: needs a time zone, such as 2026-01-31T12:00:00+00:00")
        return self


class JobPruneArguments(JobArguments):
    """``job.prune``: remove from the node's ledger what ended long ago; the node's settings count where none is given.

    Failures are jobs that failed or were revoked.
    """

    older_than_s: int | None = Field(None, ge=KEEP_MIN_S, le=KEEP_MAX_S)
    failures_older_than_s: int | None = Field(None, ge=KEEP_MIN_S, le=KEEP_MAX_S)
    dry_run: bool = False


ARGUMENTS: dict[TaskName, type[JobArguments]] = {
    TaskName.INSTANCE_START: StartArguments,
    TaskName.INSTANCE_STOP: StopArguments,
    TaskName.INSTANCE_REBOOT: RebootArguments,
    TaskName.INSTANCE_RESTART: RestartArguments,
    TaskName.INSTANCE_PAUSE: NameArguments,
    TaskName.INSTANCE_RESUME: NameArguments,
    TaskName.INSTANCE_CLEANUP: NameArguments,
    TaskName.INSTANCE_DISK_ADD: DiskAddArguments,
    TaskName.INSTANCE_DISK_REMOVE: DiskRemoveArguments,
    TaskName.INSTANCE_DISK_RESIZE: DiskResizeArguments,
    TaskName.INSTANCE_NIC_ADD: NicAddArguments,
    TaskName.INSTANCE_NIC_REMOVE: NicRemoveArguments,
    TaskName.INSTANCE_CD_INSERT: CdInsertArguments,
    TaskName.INSTANCE_CD_EJECT: CdEjectArguments,
    TaskName.INSTANCE_SET_MEMORY: SetMemoryArguments,
    TaskName.INSTANCE_SET_PASSWORD: SetPasswordArguments,
    TaskName.INSTANCE_INFO: NameArguments,
    TaskName.INSTANCE_LIST: NoArguments,
    TaskName.INSTANCE_CONSOLE: ConsoleArguments,
    TaskName.INSTANCE_CHECK: InstanceArguments,
    TaskName.INSTANCE_BACKUP: BackupArguments,
    TaskName.INSTANCE_MIGRATE: MigrateArguments,
    TaskName.INSTANCE_MIGRATE_CANCEL: MigrateCancelArguments,
    TaskName.INSTANCE_MIGRATE_TUNE: MigrateTuneArguments,
    TaskName.MIGRATION_INFO: MigrationInfoArguments,
    TaskName.MIGRATION_ACCEPT: MigrationAcceptArguments,
    TaskName.MIGRATION_RUN: MigrationRunArguments,
    TaskName.MIGRATION_FINALIZE: MigrationFinalizeArguments,
    TaskName.MIGRATION_RECOVER: MigrationRecoverArguments,
    TaskName.MIGRATION_REPORT: JobIdArguments,
    TaskName.SNAPSHOT_CREATE: SnapshotArguments,
    TaskName.SNAPSHOT_LIST: NameArguments,
    TaskName.SNAPSHOT_REVERT: SnapshotArguments,
    TaskName.SNAPSHOT_DELETE: SnapshotArguments,
    TaskName.NODE_INFO: NoArguments,
    TaskName.NODE_LIST: NoArguments,
    TaskName.NODE_AUDIT: NoArguments,
    TaskName.NODE_REPAIR: RepairArguments,
    TaskName.UID_POOL_SHOW: UidPoolShowArguments,
    TaskName.UID_POOL_ADD: UidPoolAddArguments,
    TaskName.UID_POOL_REMOVE: UidPoolRemoveArguments,
    TaskName.QUARANTINE_LIST: NoArguments,
    TaskName.QUARANTINE_RELEASE: QuarantineReleaseArguments,
    TaskName.NODE_VERIFY: NoArguments,
    TaskName.NODE_POWERCYCLE: PowercycleArguments,
    TaskName.NODE_DRAIN: DrainArguments,
    TaskName.NODE_UNDRAIN: NoArguments,
    TaskName.NODE_HOLD: HoldArguments,
    TaskName.NODE_UNHOLD: NoArguments,
    TaskName.NODE_FENCE: FenceArguments,
    TaskName.NODE_UNFENCE: UnfenceArguments,
    TaskName.JOB_LIST: JobListArguments,
    TaskName.JOB_INFO: JobIdArguments,
    TaskName.JOB_CANCEL: JobIdArguments,
    TaskName.JOB_RETRY: JobRetryArguments,
    TaskName.JOB_WHY: JobIdArguments,
    TaskName.JOB_PRUNE: JobPruneArguments,
}
"""The arguments of every task; the one table that client, node and documentation share."""

EXCLUSIVE_TASKS = frozenset(
    {
        TaskName.INSTANCE_START,
        TaskName.INSTANCE_STOP,
        TaskName.INSTANCE_REBOOT,
        TaskName.INSTANCE_RESTART,
        TaskName.INSTANCE_PAUSE,
        TaskName.INSTANCE_RESUME,
        TaskName.INSTANCE_CLEANUP,
        TaskName.INSTANCE_DISK_ADD,
        TaskName.INSTANCE_DISK_REMOVE,
        TaskName.INSTANCE_DISK_RESIZE,
        TaskName.INSTANCE_NIC_ADD,
        TaskName.INSTANCE_NIC_REMOVE,
        TaskName.INSTANCE_CD_INSERT,
        TaskName.INSTANCE_CD_EJECT,
        TaskName.INSTANCE_SET_MEMORY,
        TaskName.INSTANCE_SET_PASSWORD,
        TaskName.INSTANCE_BACKUP,
        TaskName.INSTANCE_MIGRATE,
        TaskName.MIGRATION_RUN,
        TaskName.SNAPSHOT_CREATE,
        TaskName.SNAPSHOT_REVERT,
        TaskName.SNAPSHOT_DELETE,
    }
)
"""Jobs that change an instance; of these, one at a time per instance, in the order they were sent."""

HELD_TASKS = EXCLUSIVE_TASKS | {TaskName.MIGRATION_ACCEPT, TaskName.NODE_DRAIN}
"""Jobs that a node which holds its jobs back does not begin."""

CHANGING_TASKS = EXCLUSIVE_TASKS | {
    TaskName.INSTANCE_MIGRATE_CANCEL,
    TaskName.INSTANCE_MIGRATE_TUNE,
    TaskName.MIGRATION_INFO,
    TaskName.MIGRATION_ACCEPT,
    TaskName.MIGRATION_FINALIZE,
    TaskName.MIGRATION_RECOVER,
    TaskName.NODE_REPAIR,
    TaskName.NODE_POWERCYCLE,
    TaskName.NODE_DRAIN,
    TaskName.NODE_UNDRAIN,
    TaskName.NODE_HOLD,
    TaskName.NODE_UNHOLD,
    TaskName.NODE_FENCE,
    TaskName.NODE_UNFENCE,
    TaskName.JOB_PRUNE,
    TaskName.UID_POOL_ADD,
    TaskName.UID_POOL_REMOVE,
    TaskName.QUARANTINE_RELEASE,
}
"""Jobs that change something. The others only look: lists leave them out, and they are forgotten soon."""

SLOTS = {
    TaskName.INSTANCE_START: "start",
    TaskName.INSTANCE_REBOOT: "start",
    TaskName.INSTANCE_RESTART: "start",
    TaskName.INSTANCE_BACKUP: "backup",
    TaskName.INSTANCE_MIGRATE: "migration",
    TaskName.MIGRATION_RUN: "migration",
}
"""Classes of jobs of which a node carries out a limited number at once: HOSTLER_LIMIT_STARTS, _BACKUPS, _MIGRATIONS."""


def instance_of(arguments: dict[str, Any]) -> str | None:
    """The instance that a job's raw arguments name, None where they name none or none that can exist."""
    whole = arguments.get("instance")
    name = whole.get("name") if isinstance(whole, dict) else arguments.get("name", whole)
    try:
        return instance_name(name) if isinstance(name, str) else None
    except ValueError:
        return None


class NicView(TypedDict):
    """A network card of a running guest; ``tap`` is empty in mode ``user``."""

    mac: str
    mode: str
    link: str
    ip: str
    vlan: int
    tap: str


class InstanceView(TypedDict, total=False):
    """What a node tells of an instance. Times are ISO 8601 in UTC; ``pid`` and what follows from it null when down."""

    name: str
    node: str
    state: str
    pid: int | None
    memory_mib: int
    vcpus: int
    uid: int | None
    nics: list[NicView]
    started_at: str | None
    ended_at: str | None
    reason: str | None
    wanted: str
    autostart: bool
    restart_policy: str
    restarts: int
    restart_at: str | None
    qemu_version: str | None
    machine: str | None
    accelerator: str | None
    uuid: str | None
    tags: list[str]
    disks: list[dict[str, Any]]
    run_dir: str | None
    how: str


PayloadT = TypeVar("PayloadT", bound=Payload)


def parse(model: type[PayloadT], arguments: object) -> PayloadT:
    """``arguments`` as a ``model``.

    Raises InvalidArgument naming every wrong field as a path such as ``instance.disks[0].path``, with the reason and,
    where it is short, the value. Nothing else is looked at.
    """
    try:
        return model.model_validate(arguments)
    except ValidationError as exc:
        errors = [dict(error) for error in exc.errors(include_url=False)]
        raise InvalidArgument([each for error in errors for each in _descriptions(error)]) from None


def _descriptions(error: dict[str, Any]) -> list[dict[str, str]]:
    if error["type"] != CROSS_CHECK:
        return [_describe(error)]
    place = "".join(_step(part) for part in error["loc"])
    return [{"field": f"{place}.{field}".lstrip("."), "reason": why} for field, why in error["ctx"]["problems"]]


def _describe(error: dict[str, Any]) -> dict[str, str]:
    field = "".join(_step(part) for part in error["loc"]).lstrip(".")
    reason = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        reason = "is not supported"
    elif error["type"] == "missing":
        reason = "is missing"
    elif error["type"] == "value_error" and (cross := re.match(r"([a-z_]+): ", reason)):
        field = f"{field}.{cross[1]}".lstrip(".")
        reason = reason.removeprefix(cross[0])
    elif error["type"] != "value_error" and len(repr(error["input"])) <= SHOWN_MAX:
        reason = f"{reason[0].lower()}{reason[1:]} (got {error['input']!r})"
    return {"field": field or "arguments", "reason": reason}


def _step(part: int | str) -> str:
    if isinstance(part, int):
        return f"[{part}]"
    # A key that nobody knows can be anything; an error is kept where there is no room for some of it (NUL in SQL).
    shown = part if part.isprintable() else ascii(part)
    return f".{shown}" if len(shown) <= SHOWN_MAX else f".{shown[:SHOWN_MAX]}..."
