"""Amounts as people read them: sizes, rates, durations, and how a number went."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_BARS = "▁▂▃▄▅▆▇█"


def size(count: float) -> str:
    """Bytes: ``812 MiB``, ``2.0 GiB``."""
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.1f} {_UNITS[unit]}" if unit and count < 10 else f"{count:.0f} {_UNITS[unit]}"


def rate(bytes_s: float) -> str:
    """Bytes per second."""
    return f"{size(bytes_s)}/s"


def duration(seconds: float) -> str:
    """``120 ms``, ``4.2 s``, ``3 min 20 s``, ``1 h 5 min``."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    if not minutes:
        return f"{left} s"
    if minutes < 60:
        return f"{minutes} min {left} s"
    return f"{minutes // 60} h {minutes % 60} min"


def sparkline(values: Sequence[float], width: int) -> str:
    """The values from left to right, scaled from 0 to the largest; more than ``width`` are averaged to so many."""
    count = min(width, len(values))
    edges = [at * len(values) // count for at in range(count + 1)] if count else []
    means = [sum(values[low:high]) / (high - low) for low, high in pairwise(edges)]
    top = max(means, default=0.0) or 1.0
    return "".join(_BARS[round(max(0.0, mean) / top * (len(_BARS) - 1))] for mean in means)
