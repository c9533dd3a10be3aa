"""Progress of a job on standard error: live lines on a terminal, else a line for each report with news."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hostler.cli import output
from hostler.cli.migration_display import MigrationDisplay, expected, number, sent

Show = Callable[[dict[str, Any]], None]


@contextmanager
def progress_shown() -> Iterator[Show]:
    """A callback for :meth:`hostler.Job.wait`; the live lines are gone when the block ends."""
    if not sys.stderr.isatty():
        yield _line_printer()
        return
    from rich.console import RenderableType
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

    migration = MigrationDisplay()

    class Lines(Progress):
        def get_renderables(self) -> Iterator[RenderableType]:
            yield from super().get_renderables()
            yield from migration.lines()

    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(20), TaskProgressColumn()
    with Lines(*columns, TimeElapsedColumn(), console=output.err(), transient=True) as live:
        task = live.add_task("sent", total=100)

        def show(meta: dict[str, Any]) -> None:
            migration.show(meta)
            live.update(task, description=_headline(meta), completed=number(meta, "percent"))

        yield show


def _line_printer() -> Show:
    last: object = ""

    def show(meta: dict[str, Any]) -> None:
        nonlocal last
        line = f"{number(meta, 'percent'):3.0f} %  {_in_full(meta)}"
        if (news := _news(meta) or line) != last:
            output.note(line)
        last = news

    return show


def _news(meta: dict[str, Any]) -> object:
    """What of a migration's report is worth a line: they come four times a second, each with other numbers."""
    latest = meta.get("live_migration")
    if not isinstance(latest, dict):
        return None
    steps = number(latest, "percent") // 10
    return (meta.get("phase"), latest.get("status"), latest.get("pass"), steps, bool(latest.get("verdict")))


def _in_full(meta: dict[str, Any]) -> str:
    latest = meta.get("live_migration")
    if not isinstance(latest, dict):
        return _headline(meta)
    return _clean(meta.get("phase"), "; ".join(filter(None, (sent(latest), expected(latest), latest.get("verdict")))))


def _headline(meta: dict[str, Any]) -> str:
    if meta.get("live_migration"):
        return _clean(meta.get("phase"), "the guest is on its way")
    waiting = meta.get("waiting_for")
    message = str(meta.get("message") or "")
    if waiting and not message:
        message = f"waiting for job {', '.join(map(str, waiting))}"
    return _clean(meta.get("phase"), message)


def _clean(*parts: object) -> str:
    return output.clean(": ".join(str(part) for part in parts if part))
