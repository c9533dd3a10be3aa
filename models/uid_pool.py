"""The uids that a node may give to guests, and which guest has which."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base, UtcDateTime, key, utc_now


class UidRange(Base):
    """An inclusive range of uids of one node's pool."""

    __tablename__ = "uid_ranges"
    __table_args__ = (UniqueConstraint("node", "first_uid", "last_uid"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    node: Mapped[str] = mapped_column(key(63), ForeignKey("nodes.name"))
    first_uid: Mapped[int] = mapped_column(BigInteger)
    last_uid: Mapped[int] = mapped_column(BigInteger)


class UidLease(Base):
    """A uid of the pool that was ever leased. The primary key is the promise: one guest at a time per node and uid.

    ``instance_name`` and ``runtime_uuid`` say which QEMU has it; both are null when it is free, and the uuid keeps the
    end of an earlier QEMU from freeing what a later one of the same instance has. A released lease keeps its row with
    ``last_instance``, so that the least recently used uid is handed out first, and a file that turns up can be traced.
    """

    __tablename__ = "uid_leases"
    __table_args__ = (Index(None, "node", "instance_name"),)

    node: Mapped[str] = mapped_column(key(63), ForeignKey("nodes.name"), primary_key=True)
    uid: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    instance_name: Mapped[str | None] = mapped_column(key())
    runtime_uuid: Mapped[str | None] = mapped_column(key(36))
    last_instance: Mapped[str | None] = mapped_column(key())
    leased_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)
    released_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
