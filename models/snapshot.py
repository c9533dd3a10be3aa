"""Snapshots of instances' disks."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base, UtcDateTime, document, key, utc_now


class Snapshot(Base):
    """A moment of all writable disks of an instance, kept in files that nobody writes to any more.

    ``layers`` has, for each disk, the overlay that took the writes from that moment on (``path``), the file below it
    with the content of that moment (``base``, ``base_format``), and the disk's first file (``root``). A higher ``id``
    is a later snapshot. ``state`` is ``creating``, ``ready``, ``deleting`` (being merged: its content is that moment's
    no more) or ``pivoting`` (likewise, and its running guest is paused for the merge's last milliseconds).
    """

    __tablename__ = "snapshots"
    __table_args__ = (UniqueConstraint("instance_name", "name"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    instance_name: Mapped[str] = mapped_column(key(), ForeignKey("instances.name", ondelete="CASCADE"))
    name: Mapped[str] = mapped_column(key(64))
    state: Mapped[str] = mapped_column(key(16))
    job_id: Mapped[str] = mapped_column(key())
    layers: Mapped[list[dict[str, Any]]] = mapped_column(document())
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)
