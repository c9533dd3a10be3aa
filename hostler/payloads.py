"""What goes into a job and what comes out of it, as types. Unknown keys and wrong types are refused.

Sizes and durations carry their unit in the name. Validation needs no host; a node checks the rest
(do the files exist, is there memory enough) before it touches anything.
"""

from __future__ import annotations

import re
from datetime import datetime
from ipaddress import ip_address
from typing import Annotated, Any, Literal, TypedDict, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from hostler.contract import INSTANCE_NAME_MAX, INSTANCE_NAME_PATTERN, TaskName
from hostler.errors import InvalidArgument
from hostler.hvparams import AbsolutePath, HvParams

MEMORY_MAX_MIB = 16 * 1024 * 1024
"""16 TiB; what a host really has is checked on the node."""
VCPUS_MAX = 4096
"""A bound against nonsense; the machine type's own limit is checked on the node."""
TIMEOUT_MAX_S = 86_400.0
SHOWN_MAX = 80
"""How much of somebody's own words an error repeats."""

_MAC = re.compile(r"([0-9a-f]{2}:){5}[0-9a-f]{2}")
_TAG = re.compile(r"[\x21-\x7e]{1,128}")
_INTERFACE = re.compile(r"[A-Za-z0-9_.:@-]{1,15}")  # IFNAMSIZ is 16 with its NUL


def _instance_name(value: str) -> str:
    if len(value) > INSTANCE_NAME_MAX:
        raise ValueError(f"is {len(value)} characters long; at most {INSTANCE_NAME_MAX} are allowed")
    if not INSTANCE_NAME_PATTERN.fullmatch(value):
        raise ValueError(
            f"{value!r} is not an instance name: labels of letters, digits, '-' and '_', joined by '.', no leading '-'"
        )
    return value


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


InstanceName = Annotated[str, AfterValidator(_instance_name)]
TimeoutS = Annotated[float, Field(gt=0, le=TIMEOUT_MAX_S, allow_inf_nan=False)]


class Payload(BaseModel):
    """Base of all payloads: strict types, unknown keys refused, unchangeable once made."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Disk(Payload):
    """A disk image or block device of the host, seen by the guest in the order of the list."""

    path: AbsolutePath = Field(description="File or block device, absolute; commas and equals signs are fine.")
    mode: Literal["rw", "ro"] = Field("rw", description="Read-only disks are not possible with disk_type ide.")
    shared: bool = Field(False, description="Other instances may open it too; every one of them has to say so.")
    format: Literal["raw", "qcow2"] = Field("raw", description="Said, never guessed from the content.")


class Nic(Payload):
    """A network card. ``bridged`` and ``routed`` get a tap and the node's ifup script; ``user`` needs no rights."""

    mac: Annotated[str, AfterValidator(_mac)] = Field(description="Unicast, as 52:54:00:12:34:56.")
    mode: Literal["bridged", "routed", "user"] = Field("bridged", description="How the card reaches the world.")
    link: Annotated[str, AfterValidator(_link)] = Field("", description="The bridge, or the routing table.")
    ip: Annotated[str, AfterValidator(_ip)] = Field("", description="Told to ifup; routed cards get a route to it.")

    @model_validator(mode="after")
    def _bridged_needs_a_link(self) -> Nic:
        if self.mode == "bridged" and not self.link:
            raise ValueError("link: a bridged card needs the bridge's name")
        return self


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
    network_port: int | None = Field(None, ge=1, le=65535, description="Port of a VNC display; kept for the master.")
    hvparams: HvParams = Field(
        default_factory=lambda: HvParams.model_validate({}), description="The virtual hardware, see below."
    )

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


JobId = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$")]


class JobArguments(Payload):
    """What every job may be told besides its own arguments: which jobs, on whichever node, have to end before it."""

    after: list[JobId] = Field(default_factory=list, max_length=1000)
    after_failure: Literal["cancel", "run"] = "cancel"


class NoArguments(JobArguments):
    """A job without arguments."""


class NameArguments(JobArguments):
    """A job about one instance."""

    name: InstanceName


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


ARGUMENTS: dict[TaskName, type[JobArguments]] = {
    TaskName.INSTANCE_START: StartArguments,
    TaskName.INSTANCE_STOP: StopArguments,
    TaskName.INSTANCE_REBOOT: RebootArguments,
    TaskName.INSTANCE_PAUSE: NameArguments,
    TaskName.INSTANCE_RESUME: NameArguments,
    TaskName.INSTANCE_CLEANUP: NameArguments,
    TaskName.INSTANCE_INFO: NameArguments,
    TaskName.INSTANCE_LIST: NoArguments,
    TaskName.INSTANCE_CONSOLE: NameArguments,
    TaskName.INSTANCE_CHECK: InstanceArguments,
    TaskName.NODE_INFO: NoArguments,
    TaskName.JOB_LIST: JobListArguments,
    TaskName.JOB_INFO: JobIdArguments,
    TaskName.JOB_CANCEL: JobIdArguments,
    TaskName.JOB_RETRY: JobRetryArguments,
    TaskName.JOB_WHY: JobIdArguments,
}
"""The arguments of every task; the one table that client, node and documentation share."""

EXCLUSIVE_TASKS = frozenset(
    {
        TaskName.INSTANCE_START,
        TaskName.INSTANCE_STOP,
        TaskName.INSTANCE_REBOOT,
        TaskName.INSTANCE_PAUSE,
        TaskName.INSTANCE_RESUME,
        TaskName.INSTANCE_CLEANUP,
    }
)
"""Jobs that change an instance; of these, one at a time per instance, in the order they were sent."""

SLOTS = {TaskName.INSTANCE_START: "start", TaskName.INSTANCE_REBOOT: "start"}
"""Classes of jobs of which a node carries out a limited number at once (HOSTLER_LIMIT_STARTS)."""


def instance_of(arguments: dict[str, Any]) -> str | None:
    """The instance that a job's raw arguments name, None where they name none or none that can exist."""
    whole = arguments.get("instance")
    name = whole.get("name") if isinstance(whole, dict) else arguments.get("name", whole)
    try:
        return _instance_name(name) if isinstance(name, str) else None
    except ValueError:
        return None


class NicView(TypedDict):
    """A network card of a running guest; ``tap`` is empty in mode ``user``."""

    mac: str
    mode: str
    link: str
    ip: str
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
        raise InvalidArgument([_describe(dict(error)) for error in exc.errors(include_url=False)]) from None


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
