"""Progress of a job on standard error: one live line on a terminal, else a line for each report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hostler.cli import output

Show = Callable[[dict[str, Any]], None]


@contextmanager
def progress_shown() -> Iterator[Show]:
    """A callback for :meth:`hostler.Job.wait`; the live line is gone when the block ends."""
    if not sys.stderr.isatty():
        yield _line_printer()
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(20), TaskProgressColumn()
    with Progress(*columns, TimeElapsedColumn(), console=output.err(), transient=True) as live:
        task = live.add_task("sent", total=100)
        yield lambda meta: live.update(task, description=_text(meta), completed=_percent(meta))


def _line_printer() -> Show:
    last = ""

    def show(meta: dict[str, Any]) -> None:
        nonlocal last
        line = f"{_percent(meta):3.0f} %  {_text(meta)}"
        if line != last:
            output.note(line)
        last = line

    return show


def _text(meta: dict[str, Any]) -> str:
    waiting = meta.get("waiting_for")
    message = str(meta.get("message") or "")
    if waiting and not message:
        message = f"waiting for job {', '.join(map(str, waiting))}"
    return output.clean(": ".join(filter(None, (str(meta.get("phase") or ""), message))))


def _percent(meta: dict[str, Any]) -> float:
    percent = meta.get("percent")
    return float(percent) if isinstance(percent, (int, float)) else 0.0
