"""The table of the original's behaviours names code and tests that are there, and leaves no number out."""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from docs.parity_table import Row, Status, rows

TESTS = Path(__file__).parents[1]
ROWS = [pytest.param(row, id=number) for number, row in rows()]
NUMBERS = [*map(str, range(1, 120)), *(f"W{number}" for number in range(1, 48))]


def test_every_behaviour_and_every_bug_has_exactly_one_row_in_the_order_of_their_numbers() -> None:
    assert [number for number, _ in rows()] == NUMBERS


@pytest.mark.parametrize("row", ROWS)
def test_every_place_in_the_code_is_there(row: Row) -> None:
    for place in row.code:
        module, _, name = place.partition(":")
        found: object = import_module(module)
        for part in filter(None, name.split(".")):
            assert hasattr(found, part), f"{module} has no {name}"
            found = getattr(found, part)


@pytest.mark.parametrize("row", ROWS)
def test_every_test_is_there_once(row: Row) -> None:
    for test in row.tests:
        path, _, name = test.partition("::")
        assert (TESTS / path).is_file(), f"there is no {path}"
        if name or path.endswith(".py"):
            assert functions(TESTS / path)[name] == 1, f"{path} has no {name}"


@pytest.mark.parametrize("row", ROWS)
def test_nothing_is_called_done_without_a_test_nor_anything_else_without_a_reason(row: Row) -> None:
    if row.status in (Status.DONE, Status.CHANGED):
        assert row.code and any("::test_" in test for test in row.tests)
    assert bool(row.why) is (row.status is not Status.DONE)
    assert not (row.status is Status.BY_CONSTRUCTION and row.tests), "a bug with a test is done"


@pytest.mark.parametrize("row", ROWS)
def test_what_a_row_says_fits_into_a_table(row: Row) -> None:
    assert row.what
    assert not {"|", "\n"} & {*"".join((row.what, row.why, *row.code, *row.tests))}


@cache
def functions(path: Path) -> Counter[str]:
    tree = ast.parse(path.read_text())
    return Counter(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
