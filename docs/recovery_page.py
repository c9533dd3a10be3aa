"""Renders docs/recovery.md from the recovery table, so that the two cannot disagree."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

from worker.operations.ledger import ATTEMPTS_MAX
from worker.operations.live_migration.recovery_table import TABLE as MIGRATION_TABLE
from worker.operations.live_migration.recovery_table import Action as MigrationAction
from worker.operations.live_migration.recovery_table import Side
from worker.operations.live_migration.rows import Stage
from worker.operations.recovery_table import TABLE, Action, Reality, Row

RECOVERY = Path(__file__).with_name("recovery.md")

HEAD = f"""\
# When a worker dies

Generated from the code by `./dev docs`; do not edit. A test walks the tables below cell by cell, with a real QEMU.

A worker that is killed, upgraded or stopped takes no guest with it, and none of its jobs is lost: each is a row in SQL,
with the phase it was in. A phase is recorded before the side effect that belongs to it. The next worker of the node,
before it takes its first message,

1. frees the jobs its predecessor held; each keeps its id, its instance and its recorded phases,
2. adopts the guests that run, and records the end of those that ended meanwhile, from the journal QEMU kept itself,
3. sends each freed job's message again. The job looks up its last phase, finds out what is true of its instance, and
   does what the table says. The decision is in the job's history: `hostler job ID --history` shows it.

A job whose worker died {ATTEMPTS_MAX} times is not tried again: a half-started QEMU is ended, any other one is left
alone and watched, and the job fails and says in which phase it was."""

MARKS = """\
In the tables, **\\*** marks phases past the last point of return: a job that was cancelled while no worker ran gives up
and undoes its work in the other ones, and finishes in these, unless nothing of it is in effect any more. **†** marks
phases in which only a QEMU counts that this very job started. One that somebody else started is never touched: to such
a job, it is as if there was none."""


MIGRATION = """\
One job over two workers, which goes on from the stage that is recorded in SQL and from what the two QEMUs say, whoever
died: the first attempt reads the same table. `instances.node` owns the guest, and only the owner's worker ever lets a
QEMU of it run: up to `switching` and in `aborted` that is the source, from `moved` on the target. The first row counts
that fits. `./dev faults migrations` kills either worker at each step, either QEMU, broker, database and link, and looks
at the promises afterwards."""


def render() -> str:
    """The whole page."""
    legends = (*_legend("What can be true", Reality), *_legend("What is done", Action))
    return "\n".join([HEAD, *legends, *_tables(), *_migrations()]) + "\n"


def _legend(title: str, enum: type[StrEnum]) -> Iterator[str]:
    yield from ("", f"## {title}", "", "| | |", "| --- | --- |")
    told = _docstrings(enum)
    for member in enum:
        yield f"| **{member}** | {told[member.name]} |"


def _docstrings(enum: type[StrEnum]) -> dict[str, str]:
    """What stands below each member in the enum's source."""
    body = ast.parse(inspect.getsource(enum)).body[0]
    assert isinstance(body, ast.ClassDef)
    told = {}
    for member, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(member, ast.Assign) and isinstance(member.targets[0], ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            assert isinstance(text, ast.Constant), f"{member.targets[0].id} has no docstring"
            told[member.targets[0].id] = " ".join(str(text.value).split())
    return told


def _tables() -> Iterator[str]:
    yield from ("", "## The tables", "", MARKS)
    for task, rows in TABLE.items():
        realities = [reality for reality in Reality if any(reality in row.cells for row in rows)]
        yield from ("", f"### {task}", "")
        yield f"| phases | {' | '.join(realities)} | why |"
        yield "| --- |" + " --- |" * (len(realities) + 1)
        for row in rows:
            cells = " | ".join(row.cells.get(reality, "") for reality in realities)
            yield f"| {_phases(row)} | {cells} | {row.why} |"


def _migrations() -> Iterator[str]:
    """Live migration: what counts are the stage in SQL and both QEMUs."""
    yield from ("", "## Live migration", "", MIGRATION)
    for title, enum in (("Stages", Stage), ("What is true of either QEMU", Side), ("What is done", MigrationAction)):
        yield from (line.replace("## ", "### ", 1) for line in _legend(title, enum))
    yield from ("", "### The table", "", "| stage | the source's QEMU | the target's QEMU | | why |")
    yield "| --- | --- | --- | --- | --- |"
    for row in MIGRATION_TABLE:
        stages = ", ".join(f"`{stage}`" for stage in row.stages)
        yield f"| {stages} | {_sides(row.source)} | {_sides(row.target)} | {row.action} | {row.why} |"


def _sides(sides: frozenset[Side]) -> str:
    if sides == frozenset(Side):
        return "any"
    missing = frozenset(Side) - sides
    return (
        ", ".join(side for side in Side if side in sides)
        if len(missing) > 2
        else "any but " + ", ".join(side for side in Side if side in missing)
    )


def _phases(row: Row) -> str:
    marks = ("\\*" if row.committed else "") + ("†" if row.own else "")
    return " ".join(filter(None, (", ".join(f"`{phase}`" for phase in row.phases), marks)))
