"""Ranges of uids as text, such as ``20000-20099, 20200``: inclusive, in ascending order, no uid in two of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

UID_MAX = 2**32 - 2
"""The largest uid: the one after it, 2^32-1, means "no uid" to the kernel."""
SYSTEM_UIDS = range(1000)
"""Those of the distribution's services, root among them."""
OVERFLOW_UID = 65534
"""``nobody``: what the kernel and several services use for whom they do not know."""
POOL_MAX = 65_536
"""A pool's uids are looked through at every start of a guest that gets one."""

_RANGE = re.compile(r"\s*([0-9]{1,20})\s*(?:-\s*([0-9]{1,20})\s*)?", re.ASCII)


class Uids(NamedTuple):
    """The uids from ``first`` to ``last``, both included."""

    first: int
    last: int

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


def parse_ranges(text: str) -> list[Uids]:
    """``text`` as sorted ranges, as they were given: neighbours are not merged. Empty items are skipped.

    Raises ValueError for what is no range, is upside down, holds a uid no process can have, or has one twice.
    """
    ranges = sorted(_range(item) for item in text.split(",") if item.strip())
    for before, after in pairwise(ranges):
        if after.first <= before.last:
            raise ValueError(f"{after} overlaps {before}")
    return ranges


def format_ranges(ranges: Iterable[Uids]) -> str:
    """The text of ``ranges``, such as ``1000-1099, 2000``."""
    return ", ".join(map(str, ranges))


def expand(ranges: Iterable[Uids]) -> Iterator[int]:
    """Every uid of ``ranges``, each once, in their order."""
    for first, last in ranges:
        yield from range(first, last + 1)


def size(ranges: Iterable[Uids]) -> int:
    """How many uids they are."""
    return sum(last - first + 1 for first, last in ranges)


def add_ranges(pool: Iterable[Uids], new: Iterable[Uids]) -> list[Uids]:
    """``pool`` with ``new``. Raises ValueError, naming the range, where one overlaps what is there."""
    before = list(pool)
    for uids in new:
        for known in before:
            if uids.first <= known.last and known.first <= uids.last:
                raise ValueError(f"{uids} overlaps {known}, which the pool has already")
    together = sorted([*before, *new])
    if size(together) > POOL_MAX:
        raise ValueError(f"a pool of {size(together)} uids is too large; at most {POOL_MAX} are possible")
    return together


def remove_ranges(pool: Iterable[Uids], old: Iterable[Uids]) -> list[Uids]:
    """``pool`` without ``old``. Raises ValueError, naming it, for a range that was not added exactly so."""
    left = list(pool)
    for uids in old:
        if uids not in left:
            raise ValueError(f"the pool has no range {uids}; its ranges are: {format_ranges(left) or 'none'}")
        left.remove(uids)
    return left


def require_harmless(ranges: Iterable[Uids], *, force: bool) -> None:
    """Raises ValueError for root, and without ``force`` for uids that a distribution's own services may have."""
    for uids in ranges:
        if uids.first == 0:
            raise ValueError(f"{uids} holds 0, which is root: no guest ever gets it")
        if not force and uids.first in SYSTEM_UIDS:
            raise ValueError(f"{uids} holds uids below {SYSTEM_UIDS.stop}, which services of the host may have")
        if not force and uids.first <= OVERFLOW_UID <= uids.last:
            raise ValueError(f"{uids} holds {OVERFLOW_UID}, which is nobody and shared by several services")


def _range(item: str) -> Uids:
    match = _RANGE.fullmatch(item)
    if not match:
        raise ValueError(f"{item.strip()[:80]!r} is neither a uid nor a range such as 20000-20099")
    uids = Uids(int(match[1]), int(match[2] or match[1]))
    if uids.first > uids.last:
        raise ValueError(f"{uids} is upside down: {uids.first} is more than {uids.last}")
    if uids.last > UID_MAX:
        raise ValueError(f"{uids} is beyond the largest uid, {UID_MAX}")
    return uids
