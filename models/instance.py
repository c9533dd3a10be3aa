"""Instances, the runtimes of those that have a QEMU, and the disks these hold."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Boolean, ForeignKey, Index, Integer, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column, relationship

from models.base import Base, UtcDateTime, document, key, long_text, utc_now

RUNTIME_FORMAT = 1
"""Version of what ``Runtime.hardware`` holds; a worker refuses to reuse hardware written by a newer one."""


class Instance(Base):
    """A guest, known by one name on all nodes that share the database. The row outlives its QEMU processes."""

    __tablename__ = "instances"
    __table_args__ = (Index(None, "node", "state"),)

    name: Mapped[str] = mapped_column(key(), primary_key=True)
    node: Mapped[str] = mapped_column(key(63), ForeignKey("nodes.name"))
    state: Mapped[str] = mapped_column(key(16))
    reason: Mapped[str | None] = mapped_column(long_text())
    spec: Mapped[dict[str, Any]] = mapped_column(document())
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)
    changed_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now, onupdate=utc_now)
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

    runtime: Mapped[Runtime | None] = relationship(
        # No join: PostgreSQL cannot lock the row (FOR UPDATE) on the nullable side of one.
        back_populates="instance",
        cascade="all, delete-orphan",
        lazy="selectin",
    )


class Runtime(Base):
    """One QEMU of an instance: who it is, what it was built from, and what the host gave it.

    It exists from just before the first side effect of a start until everything it names has been given back. A reader
    learns from ``pid`` whether the process was spawned. ``ending`` is written when QEMU has ended, before anything is
    given back: what it was judged by goes too. ``uuid`` is new at every start and stands in QEMU's arguments,
    so that a process can be found and told apart even where the pid was not yet written.
    """

    __tablename__ = "runtimes"

    instance_name: Mapped[str] = mapped_column(
        key(), ForeignKey("instances.name", ondelete="CASCADE"), primary_key=True
    )
    node: Mapped[str] = mapped_column(key(63), ForeignKey("nodes.name"), index=True)
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

    instance: Mapped[Instance] = relationship(back_populates="runtime")


class DiskLease(Base):
    """A file or device that a runtime has open on its node, by identity and not by path (links, bind mounts)."""

    __tablename__ = "disk_leases"
    __table_args__ = (UniqueConstraint("node", "file_id", "instance_name"), Index(None, "instance_name"))

    id: Mapped[int] = mapped_column(primary_key=True)
    node: Mapped[str] = mapped_column(key(63), ForeignKey("nodes.name"))
    file_id: Mapped[str] = mapped_column(key(64))
    path: Mapped[str] = mapped_column(String(4096))
    instance_name: Mapped[str] = mapped_column(key(), ForeignKey("runtimes.instance_name", ondelete="CASCADE"))
    shared: Mapped[bool] = mapped_column(Boolean)
    read_only: Mapped[bool] = mapped_column(Boolean)
