"""Where things are printed: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

_WIDE = 240
"""Columns of a table that is not printed on a terminal: nothing is cut there, and programs use --json anyway."""


@cache
def out() -> Console:
    """Standard output, for tables."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)


@cache
def err() -> Console:
    """Standard error, for progress and failures."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else _WIDE, soft_wrap=True)


def note(text: str, style: str = "") -> None:
    """One line on standard error."""
    err().print(clean(text), style=style, markup=False)


def print_json(document: Any) -> None:
    """``document`` as the one JSON document of standard output."""
    click.echo(json.dumps(document, ensure_ascii=False, indent=2))


def clean(text: object) -> str:
    """``text`` without control characters: it may come from a guest and must not command this terminal."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in str(text))
