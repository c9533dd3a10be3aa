"""The syntax of ``cpu_mask``, Ganeti's: which processors of the host a guest's QEMU may run on.

``0-3,8,^2`` are processors 0, 1, 3 and 8 for the whole guest; ``0:1:2-3`` gives each of three vCPUs its own. ``all`` is
every processor of the host, so that ``all,^0`` leaves one to the host.
"""

from __future__ import annotations

import re

LIMIT = 8192
"""More processors than Linux can have."""

_WORD = re.compile(r"all|\^?[0-9]{1,4}(-[0-9]{1,4})?", re.ASCII)


def split(mask: str) -> list[str]:
    """The lists that ``mask`` consists of: one for all vCPUs together, or one for each; none where it is empty."""
    return mask.split(":") if mask else []


def expand(listed: str, every: frozenset[int]) -> frozenset[int]:
    """The processors that one list names; ``every`` are those that ``all`` means."""
    words = listed.split(",")
    excluded = (_range(word[1:]) for word in words if word.startswith("^"))
    chosen = (every if word == "all" else _range(word) for word in words if not word.startswith("^"))
    return frozenset().union(*chosen).difference(*excluded)


def check(mask: str) -> str:
    """``mask`` itself. Raises ValueError where it is not of this syntax, or names no processor."""
    for listed in split(mask):
        words = listed.split(",")
        if not all(map(_WORD.fullmatch, words)):
            raise ValueError(f"must be such as all, 0-3,^2 or, one by one, 0:1:2-3, not {mask!r}")
        if backwards := [word for word in words if word != "all" and not _range(word.removeprefix("^"))]:
            raise ValueError(f"{backwards[0]!r} runs backwards")
        if not expand(listed, frozenset(range(LIMIT))):
            raise ValueError(f"{listed!r} names no processor")
    return mask


def _range(word: str) -> range:
    first, _, last = word.partition("-")
    return range(int(first), int(last or first) + 1)
