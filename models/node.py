"""Nodes, and the worker processes that acted for them one after another."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base, UtcDateTime, key, utc_now


class Node(Base):
    """A host that runs guests. Its row is also what short transactions lock to decide about the node's disks.

    A drained node starts no guest and takes none in, since ``drained_at`` by the job ``drained_by``. One
    that holds its jobs begins none that changes its guests, since ``held_at`` by the job ``held_by``. A fenced one is
    known to be off: since ``fenced_at`` by ``fenced_by`` its guests are other nodes' to start, and no worker starts
    there as long as the host has not been booted since (``fenced_boot_id`` is that of its last worker).
    """

    __tablename__ = "nodes"

    name: Mapped[str] = mapped_column(key(63), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)
    drained_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    drained_by: Mapped[str | None] = mapped_column(key())
    held_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    held_by: Mapped[str | None] = mapped_column(key())
    held_reason: Mapped[str | None] = mapped_column(String(200))
    fenced_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    fenced_by: Mapped[str | None] = mapped_column(key())
    fenced_boot_id: Mapped[str | None] = mapped_column(key(36))


class Incarnation(Base):
    """One run of a node's worker. Jobs and guests name the incarnation that acts; a dead one acts no more.

    A process is known by pid, start time (clock ticks since boot, field 22 of proc(5)'s stat) and boot id: a pid alone
    is used again.
    """

    __tablename__ = "incarnations"
    __table_args__ = (Index(None, "node", "ended_at"),)

    id: Mapped[str] = mapped_column(key(36), primary_key=True)
    node: Mapped[str] = mapped_column(key(63), ForeignKey("nodes.name"))
    pid: Mapped[int] = mapped_column(BigInteger)
    start_ticks: Mapped[int] = mapped_column(BigInteger)
    boot_id: Mapped[str] = mapped_column(key(36))
    version: Mapped[str] = mapped_column(String(64))
    started_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)
    heartbeat_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
