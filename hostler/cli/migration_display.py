"""A live migration under way, in the lines below a job's progress bar."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hostler.cli import output
from hostler.cli.amounts import duration, rate, size, sparkline

if TYPE_CHECKING:
    from rich.console import RenderableType

_WIDTH = 40
_KEPT = 4096
"""Looks that are remembered for the sparklines; of more, every other one is forgotten."""


class MigrationDisplay:
    """What the reports of one job have said about its migration."""

    def __init__(self) -> None:
        self._latest: dict[str, Any] = {}
        self._history: list[tuple[float, float]] = []

    def show(self, meta: dict[str, Any]) -> None:
        """Take in a report. Nothing is shown before one of them is about a migration, nor of a job that is at none."""
        latest = meta.get("live_migration")
        if not isinstance(latest, dict):
            return
        self._latest = latest
        self._history.append((number(latest, "remaining_bytes"), number(latest, "dirty_rate_bytes_s")))
        if len(self._history) > _KEPT:
            del self._history[1::2]

    def lines(self) -> Iterator[RenderableType]:
        """The lines as they are now."""
        if not self._latest:
            return
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        latest = self._latest
        bar = Table.grid(padding=(0, 1))
        bar.add_row("  memory", ProgressBar(100, number(latest, "percent"), width=_WIDTH), _percent(latest))
        yield bar
        for sentence in (sent(latest), expected(latest), _storage(latest)):
            if sentence:
                yield Text(f"  {output.clean(sentence)}")
        for title, values in zip(("left", "written"), zip(*self._history, strict=True), strict=True):
            yield Text(f"  {title:7} {sparkline(values, _WIDTH)}", style="dim")
        if latest.get("verdict"):
            yield Text(f"  {output.clean(latest['verdict'])}", style="yellow")


def sent(latest: dict[str, Any]) -> str:
    """What has been sent and what is left, at which speed."""
    done, total, left = (number(latest, f"{name}_bytes") for name in ("transferred", "total", "remaining"))
    pace = f", pass {latest['pass']}" if latest.get("pass") else ""
    return (
        f"{latest.get('status')}{pace}: {size(done)} sent, {size(left)} of {size(total)} left, "
        f"{rate(number(latest, 'throughput_bytes_s'))}; the guest writes {rate(number(latest, 'dirty_rate_bytes_s'))}"
    )


def expected(latest: dict[str, Any]) -> str:
    """When it will be done, and for how long the guest then stands still; empty where nothing can be said."""
    parts = []
    if latest.get("eta_s") is not None:
        sure = number(latest, "eta_confidence") * 100
        parts.append(f"done in about {duration(number(latest, 'eta_s'))} ({sure:.0f} % sure)")
    if latest.get("expected_downtime_ms"):
        parts.append(f"it will stand still for about {duration(number(latest, 'expected_downtime_ms') / 1000)}")
    return "; ".join(parts)


def _storage(latest: dict[str, Any]) -> str:
    storage = latest.get("storage")
    if not isinstance(storage, dict):
        return ""
    return f"disks: {size(number(storage, 'transferred_bytes'))} of {size(number(storage, 'total_bytes'))} copied"


def _percent(latest: dict[str, Any]) -> str:
    return f"{number(latest, 'percent'):.0f}%"


def number(document: dict[str, Any], name: str) -> float:
    """A number that may be missing: 0 then."""
    value = document.get(name)
    return float(value) if isinstance(value, (int, float)) else 0.0
