"""The node's uids for guests: which there are, and which guest has which.

A uid is leased in the transaction that writes it into the guest's runtime, and freed only when nothing of the host has
it any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import structlog
from sqlalchemy import CursorResult, delete, select, update
from sqlalchemy.orm import Session

from hostler.errors import InvalidArgument
from hostler.uid_ranges import Uids, add_ranges, expand, format_ranges, parse_ranges, remove_ranges, size
from models import Node, Runtime, UidLease, UidRange, utc_now
from worker.errors import UidPoolExhausted
from worker.isolation.in_use import owned_by, uids_in_use
from worker.operations.context import NodeContext
from worker.operations.views import iso

log = structlog.get_logger(__name__)

_USED = select(UidLease.uid, UidLease.instance_name, UidLease.released_at)


def show(node: NodeContext, *, history: bool = False) -> dict[str, Any]:
    """Ranges, how many uids they are, and who has which; with ``history`` also those that are free again."""
    with node.database.reading() as session:
        pool = _pool(session, node.name)
        rows = session.scalars(select(UidLease).where(UidLease.node == node.name).order_by(UidLease.uid)).all()
    held = [row for row in rows if row.instance_name]
    leased = sum(any(uids.first <= row.uid <= uids.last for uids in pool) for row in held)
    return {
        "node": node.name,
        "ranges": format_ranges(pool),
        "size": size(pool),
        "free": size(pool) - leased,
        "leases": [_lease_view(row) for row in (rows if history else held)],
    }


def add(node: NodeContext, text: str, *, again: bool = False) -> dict[str, Any]:
    """Add ranges to the pool. ``again`` says that this very job may have done so already.

    Raises InvalidArgument, without effect, for a range that overlaps one of the pool.
    """
    with _changing(node) as pool:
        new = parse_ranges(text)
        pool[:] = add_ranges(pool, [uids for uids in new if not again or uids not in pool])
    return show(node)


def remove(node: NodeContext, text: str, *, again: bool = False) -> dict[str, Any]:
    """Take ranges out of the pool, each as it was added. A guest that has one of the uids keeps it until it ends.

    ``again`` as in ``add``. Raises InvalidArgument, without effect, for a range that the pool does not have.
    """
    with _changing(node) as pool:
        old = parse_ranges(text)
        pool[:] = remove_ranges(pool, [uids for uids in old if not again or uids in pool])
    return show(node)


def lease(session: Session, node: str, name: str, uuid: str, avoid: Iterable[int]) -> int:
    """Give a guest a uid, in the caller's transaction: the one that has been free for the longest time.

    ``avoid`` are uids that something of the host has, found out before. Raises UidPoolExhausted.
    """
    session.get(Node, node, with_for_update=True)
    pool, avoided = _pool(session, node), {*avoid}
    known = {row.uid: row for row in session.execute(_USED.where(UidLease.node == node))}
    holder = {"instance_name": name, "last_instance": name, "runtime_uuid": uuid, "leased_at": utc_now()}
    usable = [uid for uid in expand(pool) if uid not in avoided]
    for uid in usable:
        if uid not in known:
            session.add(UidLease(node=node, uid=uid, **holder))
            session.flush()
            return uid
    free = [uid for uid in usable if known[uid].instance_name is None]
    for uid in sorted(free, key=lambda uid: known[uid].released_at):
        # The node's row keeps others away; were it not so, of two that want the uid one would change no row.
        one = update(UidLease).where(UidLease.node == node, UidLease.uid == uid, UidLease.instance_name.is_(None))
        if _changed(session, one.values(**holder, released_at=None)):
            return uid
    raise UidPoolExhausted(
        f"all {size(pool)} uids of node {node}'s pool are in use, by guests or by other processes; add some: "
        f"hostler uid-pool add RANGES -n {node}"
        if pool
        else f"node {node} has no uids for guests; add some: hostler uid-pool add 20000-20099 -n {node}",
        size=size(pool),
    )


def release(node: NodeContext, uuid: str) -> int | None:
    """Free the uid that the QEMU with this uuid had, if it had one; it must have ended. Safe to repeat.

    Returns the uid. One that something of the host still has is kept, and freed by ``reclaim`` later: then, as where
    there is none, the answer is None.
    """
    with node.database.reading() as session:
        held = session.scalar(select(UidLease.uid).where(UidLease.node == node.name, UidLease.runtime_uuid == uuid))
    return held if held is not None and _free(node, held, uuid) else None


def reclaim(node: NodeContext) -> None:
    """Free uids whose guest is no more, and which could not be freed at its end."""
    of_none = ~select(Runtime.uuid).where(Runtime.uuid == UidLease.runtime_uuid).exists()
    with node.database.reading() as session:
        left = session.scalars(
            select(UidLease.runtime_uuid).where(
                UidLease.node == node.name, UidLease.instance_name.is_not(None), of_none
            )
        ).all()
    for uuid in filter(None, left):
        release(node, uuid)


def is_member(node: NodeContext, uid: int) -> bool:
    """Whether the pool has this uid."""
    with node.database.reading() as session:
        return any(uids.first <= uid <= uids.last for uids in _pool(session, node.name))


def _free(node: NodeContext, uid: int, uuid: str) -> bool:
    files = [str(path) for path in owned_by(uid, node.settings.run_dir)]
    if files or uid in uids_in_use():
        log.warning("a uid is still in use and stays leased", uid=uid, files=files, uuid=uuid)
        return False
    free = {"instance_name": None, "runtime_uuid": None, "released_at": utc_now()}
    one = update(UidLease).where(UidLease.node == node.name, UidLease.uid == uid, UidLease.runtime_uuid == uuid)
    with node.database.transaction() as session:
        return _changed(session, one.values(**free))


def _changed(session: Session, statement: Any) -> bool:
    result = session.execute(statement.execution_options(synchronize_session=False))
    assert isinstance(result, CursorResult)
    return result.rowcount == 1


def _pool(session: Session, node: str) -> list[Uids]:
    found = select(UidRange.first_uid, UidRange.last_uid).where(UidRange.node == node)
    return sorted(Uids(row.first_uid, row.last_uid) for row in session.execute(found))


@contextmanager
def _changing(node: NodeContext) -> Iterator[list[Uids]]:
    """The node's ranges, to be changed in place. A ValueError leaves them as they were, and is InvalidArgument."""
    with node.database.transaction() as session:
        session.get(Node, node.name, with_for_update=True)
        before = _pool(session, node.name)
        after = [*before]
        try:
            yield after
        except ValueError as exc:
            raise InvalidArgument([{"field": "ranges", "reason": str(exc)}]) from None
        for first, last in {*before} - {*after}:
            one = UidRange.node == node.name, UidRange.first_uid == first, UidRange.last_uid == last
            session.execute(delete(UidRange).where(*one))
        for first, last in {*after} - {*before}:
            session.add(UidRange(node=node.name, first_uid=first, last_uid=last))


def _lease_view(row: UidLease) -> dict[str, Any]:
    return {
        "uid": row.uid,
        "instance": row.instance_name,
        "last_instance": row.last_instance,
        "leased_at": iso(row.leased_at),
        "released_at": iso(row.released_at),
    }
