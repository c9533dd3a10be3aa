"""What a benchmark found: measured values and what follows from them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Figures:
    """One quantity, measured several times. ``at_most`` is the aim for its median, None where there is none."""

    label: str
    unit: str
    values: tuple[float, ...]
    at_most: float | None = None

    @classmethod
    def of(cls, label: str, unit: str, values: Iterable[float], at_most: float | None = None) -> Self:
        """The figures for ``values``, of which there is at least one."""
        return cls(label, unit, tuple(values), at_most)

    @property
    def median(self) -> float:
        """Half of the values are below."""
        return statistics.median(self.values)

    @property
    def p95(self) -> float:
        """95 of 100 values are below, interpolated; with few values little more than the largest."""
        return self._quantiles(20)[-1]

    @property
    def iqr(self) -> float:
        """The width of the middle half of the values."""
        quartiles = self._quantiles(4)
        return quartiles[-1] - quartiles[0]

    def _quantiles(self, parts: int) -> list[float]:
        if len(self.values) == 1:
            return [self.values[0]]
        return statistics.quantiles(self.values, n=parts, method="inclusive")

    def beyond(self, limit: Figures, label: str, at_most: float | None = None) -> Figures:
        """How much each value is above the median of ``limit``, which has the same unit."""
        return Figures.of(label, self.unit, (value - limit.median for value in self.values), at_most)

    def over(self, limit: Figures, label: str, at_most: float | None = None) -> Figures:
        """How many times the median of ``limit`` each value is."""
        return Figures.of(label, "times", (value / limit.median for value in self.values), at_most)

    @property
    def verdict(self) -> str:
        """The aim and whether the median keeps it; empty without an aim."""
        if self.at_most is None:
            return ""
        return f"<= {self.at_most:g}: {'kept' if self.median <= self.at_most else 'MISSED'}"

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        return {
            "label": self.label,
            "unit": self.unit,
            "median": self.median,
            "p95": self.p95,
            "iqr": self.iqr,
            "n": len(self.values),
            "at_most": self.at_most,
            "values": list(self.values),
        }


@dataclass(frozen=True)
class Result:
    """Everything one benchmark found, in the order to be shown."""

    figures: tuple[Figures, ...]
    notes: tuple[str, ...] = ()
