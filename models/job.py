"""The ledger: every job a node accepted, and which job holds which instance."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Boolean, ForeignKey, Index, Integer, SmallInteger, String
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base, UtcDateTime, document, key, long_text, serial, utc_now


class Job(Base):
    """A job, from its receipt on. Celery's message only wakes it; this row decides.

    ``sequence`` is the order of receipt. ``claimed_by`` names the worker incarnation that carries it out; a row that is
    claimed or final is never carried out by a second delivery of its message. ``phase`` is recorded before the side
    effect it names; ``phases`` keeps each one with its time. ``step_of`` is the job that this one is a step of, on
    another node; ``resumes`` is how often a job went on after a step of it on another node.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        Index(None, "node", "received_at"),
        Index(None, "node", "state", "received_at"),
        Index(None, "node", "state", "finished_at"),
        Index(None, "instance_name", "state", "sequence"),
        Index(None, "claimed_by", "finished_at"),
    )

    sequence: Mapped[int] = mapped_column(serial(), primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(key(), unique=True)
    node: Mapped[str] = mapped_column(key(63), ForeignKey("nodes.name"))
    task: Mapped[str] = mapped_column(key(128))
    instance_name: Mapped[str | None] = mapped_column(key())
    arguments: Mapped[dict[str, Any]] = mapped_column(document())
    state: Mapped[str] = mapped_column(key(16))
    phase: Mapped[str] = mapped_column(String(64), default="received")
    percent: Mapped[int] = mapped_column(SmallInteger, default=0)
    message: Mapped[str] = mapped_column(long_text(), default="")
    phases: Mapped[list[dict[str, Any]]] = mapped_column(document(), default=list)
    priority: Mapped[int] = mapped_column(SmallInteger, default=0)
    waits_on: Mapped[str | None] = mapped_column(key(16))
    waiting_for: Mapped[list[str]] = mapped_column(document(), default=list)
    live_migration: Mapped[dict[str, Any] | None] = mapped_column(document())
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    claimed_by: Mapped[str | None] = mapped_column(key(36), ForeignKey("incarnations.id"))
    slot: Mapped[str | None] = mapped_column(key(16))
    slot_taken: Mapped[bool] = mapped_column(Boolean, default=False)
    after_failure: Mapped[str] = mapped_column(key(16), default="cancel")
    cancel_requested_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    retries: Mapped[int] = mapped_column(Integer, default=0)
    retry_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    retry_of: Mapped[str | None] = mapped_column(key(), index=True)
    step_of: Mapped[str | None] = mapped_column(key(), index=True)
    resumes: Mapped[int] = mapped_column(Integer, default=0)
    result: Mapped[Any | None] = mapped_column(document())
    error: Mapped[dict[str, Any] | None] = mapped_column(document())
    received_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now, onupdate=utc_now)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class InstanceLock(Base):
    """The job that may change an instance now. Taken and handed on in the transaction that changes the jobs' states."""

    __tablename__ = "instance_locks"

    instance_name: Mapped[str] = mapped_column(key(), primary_key=True)
    job_id: Mapped[str] = mapped_column(key())
    node: Mapped[str] = mapped_column(key(63), ForeignKey("nodes.name"))
    taken_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)


class JobParent(Base):
    """A job that has to end before another may begin, on whichever node; it need not have been received yet."""

    __tablename__ = "job_parents"

    job_id: Mapped[str] = mapped_column(key(), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    parent_id: Mapped[str] = mapped_column(key(), primary_key=True, index=True)
