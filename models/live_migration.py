"""Guests that move from one node to another: what both sides have to know, and how it went."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Boolean, ForeignKey, Index, Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base, UtcDateTime, document, key, serial, utc_now


class LiveMigration(Base):
    """One job ``instance.migrate``, and kept as long as it: written by both nodes, each in its turn.

    ``stage`` is how far it has come. ``source_uuid`` and ``target_uuid`` are the runtimes of the two sides; the target
    listens at ``host`` and ``port``. ``info`` is what the target is told of the guest. ``stopped_at`` is when the
    source's processors stopped and ``resumed_at`` when the target's ran, each by its own node's clock; at
    ``switched_at`` the target became the owner.
    """

    __tablename__ = "live_migrations"
    __table_args__ = (Index(None, "instance_name"), Index(None, "source", "stage"), Index(None, "target", "stage"))

    job_id: Mapped[str] = mapped_column(key(), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    instance_name: Mapped[str] = mapped_column(key())
    # No references to nodes: to insert one would wait for locks of the other node, in an order that is not ours.
    source: Mapped[str] = mapped_column(key(63))
    target: Mapped[str] = mapped_column(key(63))
    stage: Mapped[str] = mapped_column(key(16))
    source_uuid: Mapped[str | None] = mapped_column(key(36))
    target_uuid: Mapped[str | None] = mapped_column(key(36))
    host: Mapped[str | None] = mapped_column(String(255))
    port: Mapped[int | None] = mapped_column(Integer)
    options: Mapped[dict[str, Any]] = mapped_column(document())
    was_paused: Mapped[bool] = mapped_column(Boolean, default=False)
    info: Mapped[dict[str, Any]] = mapped_column(document(), default=dict)
    prediction: Mapped[dict[str, Any] | None] = mapped_column(document())
    report: Mapped[dict[str, Any]] = mapped_column(document(), default=dict)
    started_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)
    stopped_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    resumed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    switched_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class MigrationSample(Base):
    """How a migration stood at a time: ``data`` is what its job then reported as ``live_migration``."""

    __tablename__ = "migration_samples"

    id: Mapped[int] = mapped_column(serial(), primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(key(), ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)
    data: Mapped[dict[str, Any]] = mapped_column(document())
