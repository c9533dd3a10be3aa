"""The recovery table has an answer for whatever an operation can leave behind, as its code says."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from hostler.contract import TaskName
from hostler.payloads import EXCLUSIVE_TASKS
from tasks import instance
from worker import operations
from worker.operations.recovery_table import TABLE, Action, Reality, Row, row_for

FOLDER = Path(operations.__file__).parent
MIGRATIONS = {TaskName.INSTANCE_MIGRATE, TaskName.MIGRATION_RUN}
"""They have a table of their own: two nodes take part (test_migration_recovery_table.py)."""
TASKS = sorted(TABLE)
ALIVE = (Reality.SILENT, Reality.PAUSED, Reality.RUNNING)


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def functions(file: Path) -> dict[str, ast.FunctionDef]:
    if not file.exists():
        return {}  # a package
    return {node.name: node for node in parsed(file).body if isinstance(node, ast.FunctionDef)}


def imported(file: Path) -> dict[str, tuple[Path, str]]:
    """The names that a module has from the operations, with their module and what they are called there."""
    return {
        alias.asname or alias.name: (FOLDER / f"{str(node.module).split('.', 2)[2].replace('.', '/')}.py", alias.name)
        for node in parsed(file).body
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("worker.operations.")
        for alias in node.names
    }


def reachable(file: Path, name: str, seen: set[tuple[Path, str]]) -> Iterator[ast.FunctionDef]:
    """A function and all of the operations' functions that it names, and so on."""
    file, name = imported(file).get(name, (file, name))
    if (file, name) in seen or name not in functions(file):
        return
    seen.add((file, name))
    yield (function := functions(file)[name])
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            yield from reachable(file, node.id, seen)


def entry_of(task: TaskName) -> tuple[Path, str]:
    """The operation that a task calls: ``module.name`` or an imported name, with the job among its arguments."""
    file, function = carrying_out(task)
    names = {alias.asname or alias.name: (node, alias.name) for node in parsed(file).body
             if isinstance(node, ast.ImportFrom) for alias in node.names}  # fmt: skip
    returned = function.body[-1]
    assert isinstance(returned, ast.Return) and isinstance(returned.value, ast.Call)
    called = ast.unparse(returned.value.func).split(".")
    node, name = names[called[0]]
    module = name if len(called) == 2 else str(node.module).rpartition(".")[2]
    return FOLDER / f"{module}.py", called[1] if len(called) == 2 else name


def carrying_out(task: TaskName) -> tuple[Path, ast.FunctionDef]:
    """The function that is the task, and the module it is in."""
    for file in Path(instance.__file__).parent.glob("*.py"):
        for function in functions(file).values():
            if f"operation(TaskName.{task.name})" in map(ast.unparse, function.decorator_list):
                return file, function
    raise AssertionError(f"no operation carries out {task}")


def recorded_phases(task: TaskName) -> set[str]:
    """Every phase that the task's operation can record, itself or in what it calls."""
    calls = [
        ast.unparse(node.args[0])
        for function in reachable(*entry_of(task), set())
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "phase"
    ]
    return {phase_of(task, argument) for argument in calls}


def phase_of(task: TaskName, argument: str) -> str:
    if argument == "task.removeprefix('instance.')":
        return task.removeprefix("instance.")
    phase = ast.literal_eval(argument)  # another computed phase: teach it to this test
    assert isinstance(phase, str)
    return phase


def rows() -> list[tuple[TaskName, Row]]:
    return [(task, row) for task in TABLE for row in TABLE[task]]


def test_every_task_that_changes_an_instance_is_in_the_table_and_no_other_one() -> None:
    assert {*TABLE} == EXCLUSIVE_TASKS - MIGRATIONS


@pytest.mark.parametrize("task", TASKS)
def test_the_table_has_just_the_phases_that_the_operation_records_each_in_one_row(task: TaskName) -> None:
    named = [phase for row in TABLE[task] for phase in row.phases]
    assert sorted(named) == sorted({"received"} | recorded_phases(task))


def test_phases_are_found_in_functions_of_other_modules_too() -> None:
    assert recorded_phases(TaskName.INSTANCE_REBOOT) >= {"reset", "kill", "rebuild", "claim", "record"}
    assert recorded_phases(TaskName.INSTANCE_PAUSE) == {"pause"}


def test_every_row_has_an_action_for_every_reality() -> None:
    for task, row in rows():
        resets = {Reality.RESET} if "reset" in row.phases else set()
        assert {*row.cells} == ({*Reality} - {Reality.RESET}) | resets, (task, row.phases)


def test_every_row_says_why() -> None:
    for task, row in rows():
        assert row.why.endswith("."), (task, row.phases)


def test_only_a_qemu_that_the_job_started_is_ended_to_undo_its_start() -> None:
    for task, row in rows():
        assert row.own or Action.UNDO not in row.cells.values(), (task, row.phases)


def test_what_had_only_been_looked_at_is_begun_and_may_still_be_cancelled() -> None:
    for task in TABLE:
        row = row_for(task, "received")
        assert {*row.cells.values()} == {Action.BEGIN}
        assert not row.committed


def test_a_qemu_that_may_run_a_guest_is_never_ended_because_it_is_silent() -> None:
    """But for a job that was about to kill it."""
    for task, row in rows():
        if row.committed and "kill" not in row.phases and "claim" not in row.phases:
            assert row.cells[Reality.SILENT] in (Action.ASK, Action.BEGIN), (task, row.phases)
            assert Action.UNDO not in [row.cells[reality] for reality in ALIVE], (task, row.phases)


def test_a_job_cannot_complete_by_what_keeps_silent() -> None:
    for task, row in rows():
        assert row.cells[Reality.SILENT] is not Action.COMPLETE, (task, row.phases)


def test_a_phase_that_is_not_in_the_table_is_an_error() -> None:
    with pytest.raises(LookupError, match=r"instance\.stop has no phase 'reset'"):
        row_for(TaskName.INSTANCE_STOP, "reset")
