"""Results as a table that is Markdown too, to be pasted into docs/benchmarks.md as it is."""

from __future__ import annotations

import sys

from rich import box
from rich.console import Console
from rich.table import Table

from tests.benchmarks.figures import Figures, Result

WIDTH = 140
"""Wide enough for every row: a broken line would end a Markdown table."""


def show(about: dict[str, str], results: dict[str, tuple[str, Result]]) -> None:
    """Print what was measured on, the table, and the notes."""
    console = Console(file=sys.stdout, width=WIDTH, highlight=False)
    for what, value in about.items():
        console.print(f"- {what}: {value}", markup=False)
    console.print(_table(results))
    for name, (_, result) in results.items():
        for note in filter(None, result.notes):
            console.print(f"- {name}: {note}", markup=False)


def _table(results: dict[str, tuple[str, Result]]) -> Table:
    table = Table(box=box.MARKDOWN)
    for title in ("benchmark", "what"):
        table.add_column(title, no_wrap=True)
    for title in ("median", "p95", "IQR", "n"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    table.add_column("aim", no_wrap=True)
    for name, (_, result) in results.items():
        for figures in result.figures:
            table.add_row(name, *_cells(figures))
    return table


def _cells(figures: Figures) -> list[str]:
    digits = 2 if figures.unit == "times" or figures.median < 20 else 1
    measured = [f"{value:,.{digits}f}" for value in (figures.median, figures.p95, figures.iqr)]
    return [figures.label, *measured, str(len(figures.values)), figures.unit, figures.verdict]
