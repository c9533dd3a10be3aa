"""Instances, the runtimes of those that have a QEMU, and the disks these hold."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    String,
    UniqueConstraint,
)
from sqlalchemy.orm import Mapped, Session, mapped_column, relationship

from models.base import Base, UtcDateTime, document, key, long_text, utc_now

RUNTIME_FORMAT = 1
"""Version of what ``Runtime.hardware`` holds; a worker refuses to reuse hardware written by a newer one."""


class Instance(Base):
    """A guest, known by one name on all nodes that share the database. The row outlives its QEMU processes.

    ``node`` owns it: of its QEMUs only the one there may run, and ``runtime`` is that one's. Another node may have one
    too for a while, to which it moves or from which it came; ``runtime_of`` finds that.

    ``wanted`` is what its operator wants it to be, ``running`` or ``stopped``, whatever it is. ``restarts`` counts
    those in a row that hostler began by itself; ``restart_at`` is when the next one is due. ``boot_id`` is that of the
    host when the instance last ran, or was to be started again.
    """

    __tablename__ = "instances"
    __table_args__ = (Index(None, "node", "state"), Index(None, "node", "restart_at"))

    name: Mapped[str] = mapped_column(key(), primary_key=True)
    node: Mapped[str] = mapped_column(key(63), ForeignKey("nodes.name"))
    state: Mapped[str] = mapped_column(key(16))
    reason: Mapped[str | None] = mapped_column(long_text())
    spec: Mapped[dict[str, Any]] = mapped_column(document())
    wanted: Mapped[str] = mapped_column(key(16), default="stopped")
    restarts: Mapped[int] = mapped_column(Integer, default=0)
    restart_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    boot_id: Mapped[str | None] = mapped_column(key(36))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)
    changed_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now, onupdate=utc_now)
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

    runtime: Mapped[Runtime | None] = relationship(
        # The name alone is what it takes from here: that the instance is another node's now changes no runtime.
        primaryjoin="and_(Instance.name == foreign(Runtime.instance_name), Instance.node == Runtime.node)",
        # Not joined: PostgreSQL cannot lock the row (FOR UPDATE) on the nullable side of a join.
        cascade="all, delete-orphan",
        lazy="selectin",
    )


class Runtime(Base):
    """One QEMU of an instance on a node: who it is, what it was built from, and what the host gave it.

    It exists from just before the first side effect of a start until everything it names has been given back. A reader
    learns from ``pid`` whether the process was spawned. ``ending`` is written when QEMU has ended, before anything is
    given back: what it was judged by goes too. ``started_by`` is the job that made it. ``uuid`` is new at every start
    and stands in QEMU's arguments, so that a process can be found and told apart even where the pid was not yet
    written.
    """

    __tablename__ = "runtimes"

    instance_name: Mapped[str] = mapped_column(
        key(), ForeignKey("instances.name", ondelete="CASCADE"), primary_key=True
    )
    node: Mapped[str] = mapped_column(key(63), ForeignKey("nodes.name"), primary_key=True, index=True)
    uuid: Mapped[str] = mapped_column(key(36), unique=True)
    format: Mapped[int] = mapped_column(Integer, default=RUNTIME_FORMAT)
    boot_id: Mapped[str] = mapped_column(key(36))
    pid: Mapped[int | None] = mapped_column(BigInteger)
    start_ticks: Mapped[int | None] = mapped_column(BigInteger)
    executable: Mapped[str] = mapped_column(String(4096))
    qemu_version: Mapped[str | None] = mapped_column(String(64))
    machine: Mapped[str | None] = mapped_column(String(128))
    accelerator: Mapped[str] = mapped_column(String(16))
    uid: Mapped[int | None] = mapped_column(BigInteger)
    run_dir: Mapped[str] = mapped_column(String(255))
    hardware: Mapped[dict[str, Any]] = mapped_column(document())
    taps: Mapped[list[dict[str, Any]]] = mapped_column(document())
    ending: Mapped[dict[str, Any] | None] = mapped_column(document())
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    started_by: Mapped[str | None] = mapped_column(key())

    instance: Mapped[Instance] = relationship(viewonly=True)
    """The instance, which another node may own: look at its ``node`` before its state is taken for this QEMU's."""


def runtime_of(session: Session, node: str, name: str, *, for_update: bool = False) -> Runtime | None:
    """What ``node`` has of an instance, whichever node owns it; with ``for_update`` locked, and read anew."""
    return session.get(Runtime, (name, node), with_for_update=for_update or None, populate_existing=for_update)


class DiskLease(Base):
    """A file or device that a runtime has open on its node, by identity and not by path (links, bind mounts)."""

    __tablename__ = "disk_leases"
    __table_args__ = (
        ForeignKeyConstraint(
            ["instance_name", "node"], ["runtimes.instance_name", "runtimes.node"], ondelete="CASCADE"
        ),
        UniqueConstraint("node", "file_id", "instance_name"),
        Index(None, "instance_name", "node"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    node: Mapped[str] = mapped_column(key(63), ForeignKey("nodes.name"))
    file_id: Mapped[str] = mapped_column(key(64))
    path: Mapped[str] = mapped_column(String(4096))
    instance_name: Mapped[str] = mapped_column(key())
    shared: Mapped[bool] = mapped_column(Boolean)
    read_only: Mapped[bool] = mapped_column(Boolean)
