"""What a person sees of a batch of jobs while it runs, on standard error: a live board on a terminal, else lines."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from heapq import heappop, heappush
from itertools import islice
from typing import TYPE_CHECKING

from hostler.cli import output
from hostler.contract import JobState

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hostler.job import JobSnapshot

_SHOWN = 5
"""Running jobs whose messages the board shows: more would scroll a small terminal away."""
_NO_REPORT = {JobState.PENDING: "no worker has taken it up yet", JobState.WAITING: "waiting for another job"}


class Display:
    """Shows nothing; the base of those that do."""

    def say(self, text: str, style: str = "") -> None:
        """A line that stays."""

    def show(self, snapshot: JobSnapshot) -> None:
        """What a job does now."""

    def settle(self) -> None:
        """All that is known so far has been shown."""


@contextmanager
def display(verbose: bool | None, labels: dict[str, str]) -> Iterator[Display]:
    """Show how the jobs go whose ids ``labels`` translates for people, in the order of the batch.

    ``verbose`` None means: to a person, who has standard error on a terminal, and to nobody else.
    """
    person = sys.stderr.isatty()
    if verbose is False or (verbose is None and not person):
        yield Display()
    elif person:
        with _live(_Board(labels)) as board:
            yield board
    else:
        yield _Lines(labels)


class _Lines(Display):
    """One job at a time is waited for aloud: the first that runs, else the first."""

    def __init__(self, labels: dict[str, str]) -> None:
        self._labels = labels
        self._order = {job_id: index for index, job_id in enumerate(labels)}
        self._open = dict.fromkeys(labels)
        self._started: set[str] = set()
        self._running: list[tuple[int, str]] = []
        self._focus: str | None = None
        self._latest: dict[str, str] = {}
        self._said = ""

    def say(self, text: str, style: str = "") -> None:
        output.note(text, style)

    def show(self, snapshot: JobSnapshot) -> None:
        job_id = snapshot.id
        if snapshot.finished:
            self._open.pop(job_id, None)
            self._latest.pop(job_id, None)
        else:
            if _runs(snapshot) and job_id not in self._started:
                self._started.add(job_id)
                heappush(self._running, (self._order[job_id], job_id))
            self._latest[job_id] = describe(snapshot)
        if job_id == self._focus:
            self._say_latest()

    def settle(self) -> None:
        if self._focus in self._open or not self._open:
            return
        while self._running and self._running[0][1] not in self._open:
            heappop(self._running)
        self._focus = self._running[0][1] if self._running else next(iter(self._open))
        self.say(f"Waiting for {self._labels[self._focus]} ...")
        self._said = ""
        self._say_latest()

    def _say_latest(self) -> None:
        text = self._latest.get(self._focus or "", "")
        if text and text != self._said:
            self.say(f"  {text}")
            self._said = text


class _Board(Display):
    """Counts, a bar, and what some of the running jobs say."""

    def __init__(self, labels: dict[str, str]) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(20), TaskProgressColumn()
        self._labels = labels
        self._bar = Progress(*columns, TimeElapsedColumn())
        self._task = self._bar.add_task("", total=len(labels))
        self._open = set(labels)
        self._failed = 0
        self._running: dict[str, str] = {}
        self._lock = threading.Lock()  # rich draws in a thread of its own

    def say(self, text: str, style: str = "") -> None:
        output.note(text, style)

    def show(self, snapshot: JobSnapshot) -> None:
        with self._lock:
            self._running.pop(snapshot.id, None)
            if snapshot.finished and snapshot.id in self._open:
                self._open.discard(snapshot.id)
                self._failed += snapshot.error is not None
            elif _runs(snapshot):
                self._running[snapshot.id] = describe(snapshot)

    def render(self) -> RenderableType:
        """The board as it is now."""
        from rich.console import Group
        from rich.text import Text

        with self._lock:
            total, still = len(self._labels), len(self._open)
            counts = f"{total - still} of {total} ended, {self._failed} failed, {len(self._running)} running"
            shown = [f"  {self._labels[job_id]}: {text}" for job_id, text in islice(self._running.items(), _SHOWN)]
        self._bar.update(self._task, completed=total - still, description=counts)
        lines = [Text(output.clean(line), no_wrap=True, overflow="ellipsis") for line in shown]
        return Group(self._bar, *lines)


@contextmanager
def _live(board: _Board) -> Iterator[_Board]:
    from rich.live import Live

    with Live(get_renderable=board.render, console=output.err(), transient=True):
        yield board


def describe(snapshot: JobSnapshot) -> str:
    """What a job that has not ended says of itself, in one line."""
    meta = snapshot.progress
    if meta is None:
        return _NO_REPORT.get(snapshot.state, snapshot.state.lower())
    percent = meta.get("percent")
    message = ": ".join(str(part) for part in (meta.get("phase"), meta.get("message")) if part)
    return f"{percent:3.0f} %  {message}" if isinstance(percent, (int, float)) else message


def _runs(snapshot: JobSnapshot) -> bool:
    return not snapshot.finished and snapshot.state not in (JobState.PENDING, JobState.WAITING)
