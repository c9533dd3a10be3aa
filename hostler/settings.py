"""All settings, read from the environment (``HOSTLER_*``). One class serves client and node.

A name that begins with ``HOSTLER_`` and is none of these is refused: a misspelt setting must not be ignored in silence.
"""

from __future__ import annotations

import os
import re
import socket
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from hostler.contract import KEEP_MAX_S, KEEP_MIN_S, NODE_PATTERN

PREFIX = "HOSTLER_"
DIR_MAX = 55
"""Unix socket paths end at 107 bytes (sun_path in unix(7)); a guest's longest is /guests/<uuid>/monitor, 52."""


class SettingsError(Exception):
    """A setting is wrong. The text names it, says why, and what would be right. Nothing was started."""


def _default_node() -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:63] or "localhost"


def _default_state_dir() -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib/hostler")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "hostler"


def _default_run_dir() -> Path:
    if os.geteuid() == 0:
        return Path("/run/hostler")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "hostler" if runtime else Path(f"/tmp/hostler-{os.geteuid()}")  # noqa: S108


def _node(value: str) -> str:
    if not NODE_PATTERN.fullmatch(value):
        raise ValueError(f"{value!r} is not a node name: letters, digits, '.', '_', '-', at most 63")
    return value


def _url(value: str) -> str:
    if value and "://" not in value:
        raise ValueError(f"{value!r} is not a URL such as redis://host:6379/0")
    return value


def _short_absolute_dir(value: Path) -> Path:
    if not value.is_absolute():
        raise ValueError(f"{str(value)!r} is not an absolute path")
    if len(os.fsencode(value)) > DIR_MAX:
        raise ValueError(f"{str(value)!r} is longer than {DIR_MAX} bytes, too long for the unix sockets below it")
    return value


def _absolute_or_empty(value: str) -> str:
    if value and not Path(value).is_absolute():
        raise ValueError(f"{value!r} is not an absolute path")
    return value


def _ports(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d{1,5})-(\d{1,5})", value.strip())
    if not match or not 0 < int(match[1]) <= int(match[2]) <= 65535:
        raise ValueError(f"{value!r} is not a port range such as 49152-49215")
    return int(match[1]), int(match[2])


def _kept_s(value: int) -> int:
    if value and not KEEP_MIN_S <= value <= KEEP_MAX_S:
        raise ValueError(f"{value} is neither 0, for ever, nor between {KEEP_MIN_S} and {KEEP_MAX_S} seconds")
    return value


Dir = Annotated[Path, AfterValidator(_short_absolute_dir)]
KeptS = Annotated[int, AfterValidator(_kept_s)]


class Settings(BaseSettings):
    """Where things are on this machine. Every field is the environment name without ``HOSTLER_``, in lower case."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True)

    node: Annotated[str, AfterValidator(_node)] = Field(default_factory=_default_node, description="This node's name.")
    state_dir: Dir = Field(default_factory=_default_state_dir, description="Durable files: database, broker, logs.")
    run_dir: Dir = Field(default_factory=_default_run_dir, description="Sockets and chroots of running guests.")
    broker_url: Annotated[str, AfterValidator(_url)] = Field(
        "", description="Any broker Celery supports; empty is the embedded one."
    )
    result_backend: str = Field("", description="Any result backend Celery supports; empty is the embedded one.")
    database_url: str = Field("", description="Any SQLAlchemy URL; empty is SQLite below the state folder.")
    qemu_binary: str = Field("", description="The emulator; empty is qemu-system-<arch> from PATH.")
    migration_address: str = Field("", description="Where this node receives guests; empty is its first address.")
    migration_ports: Annotated[tuple[int, int], NoDecode, BeforeValidator(_ports)] = Field(
        (49152, 49215), description="Ports for incoming migrations, as FIRST-LAST."
    )
    migration_tls: Literal["off", "allowed", "required"] = Field(
        "allowed",
        description="Memory and disks of moving guests under TLS: never, where asked for or possible, always.",
    )
    migration_tls_dir: Annotated[str, AfterValidator(_absolute_or_empty)] = Field(
        "",
        description="Folder with ca-cert.pem, server-cert.pem, server-key.pem, client-cert.pem, client-key.pem for it.",
    )
    cgroups: Literal["auto", "off"] = Field(
        "auto", description="Whether guests get control groups of their own, where this host has them (version 2)."
    )
    ifup: str = Field("", description="Network script, run as SCRIPT TAP; empty is the one shipped.")
    ifdown: str = Field("", description="Network script, run as SCRIPT TAP; empty is the one shipped.")
    log_format: Literal["", "console", "json"] = Field("", description="Empty: console on a terminal, else json.")
    qemu_timeout_s: float = Field(30.0, gt=0, le=600, description="How long QEMU may take to greet or answer.")
    concurrency: int = Field(64, ge=1, le=1024, description="Jobs that run at once on this node.")
    limit_starts: int = Field(
        default_factory=lambda: max(4, 2 * (os.cpu_count() or 1)),
        ge=1,
        description="Starts and reboots at once on this node, others wait; empty is two per CPU, at least four.",
    )
    limit_backups: int = Field(2, ge=1, description="Backups at once on this node; others wait.")
    limit_migrations: int = Field(2, ge=1, description="Guests that leave this node at once; others wait.")
    limit_incoming: int = Field(2, ge=1, description="Guests that arrive on this node at once; others wait.")
    keep_jobs_s: KeptS = Field(
        7 * 86400, description="How long ended jobs stay in the ledger; 0 is for ever. Those that only look: a day."
    )
    keep_failures_s: KeptS = Field(90 * 86400, description="The same for jobs that failed or were revoked.")
    audit_interval_s: float = Field(
        600, ge=0, le=86_400, description="How often the worker compares database and host by itself; 0 is never."
    )
    allow_powercycle: bool = Field(
        False, description="Whether the job node.powercycle may reboot this host, at once; its worker has to be root."
    )

    @property
    def embedded_broker(self) -> bool:
        """Whether the broker is the one below the state folder."""
        return not self.broker_url

    @property
    def embedded_database(self) -> bool:
        """Whether the database is the SQLite file below the state folder."""
        return not self.database_url

    @property
    def broker_socket(self) -> Path:
        """The embedded broker's unix socket."""
        return self.state_dir / "broker" / "redis.sock"

    @property
    def effective_broker_url(self) -> str:
        """The broker's URL, the embedded one's where none is set."""
        return self.broker_url or f"redis+socket://{self.broker_socket}?virtual_host=0"

    @property
    def effective_result_backend(self) -> str:
        """The result backend's URL: as set, else the Redis that is the broker, else the embedded one."""
        if self.result_backend:
            return self.result_backend
        return self.broker_url if self.broker_url.startswith("redis") else self._embedded_url

    @property
    def _embedded_url(self) -> str:
        return f"redis+socket://{self.broker_socket}?virtual_host=0"

    @property
    def needs_embedded_server(self) -> bool:
        """Whether broker or results live in the embedded server."""
        return self._embedded_url in (self.effective_broker_url, self.effective_result_backend)

    @property
    def effective_database_url(self) -> str:
        """The database's SQLAlchemy URL."""
        return self.database_url or f"sqlite+pysqlite:///{self.state_dir / 'hostler.sqlite'}"


def known_names() -> set[str]:
    """Every environment name that is a setting."""
    return {PREFIX + name.upper() for name in Settings.model_fields}


@cache
def load() -> Settings:
    """The settings of this process, read once. Raises SettingsError naming the variable and the reason."""
    unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known_names())
    if unknown:
        raise SettingsError(f"unknown setting {', '.join(unknown)}; known are {', '.join(sorted(known_names()))}")
    try:
        return Settings()
    except ValidationError as exc:
        problems = (f"{PREFIX}{str(error['loc'][0]).upper()}: {_reason(error['msg'])}" for error in exc.errors())
        raise SettingsError("; ".join(problems)) from None


def _reason(message: str) -> str:
    return message.removeprefix("Value error, ")
