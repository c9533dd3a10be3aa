"""What the boundary makes of a message before it runs, and of an exception after."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError, OperationalError

from hostler.contract import ErrorCode, TaskName
from hostler.errors import InvalidArgument, OperationFailed
from hostler.payloads import ARGUMENTS, EXCLUSIVE_TASKS
from tasks import hotplug, instance, isolation, job, maintenance, migration, node, snapshot
from tasks.boundary import OPERATIONS, REFUSED_MAX, as_failure, is_transient, receipt_of
from tasks.outcome import as_error
from worker.errors import NotRunning, OperationError, QmpLost, UnknownInstance

WEB1: dict[str, Any] = {"name": "web1", "memory_mib": 64}


def test_every_task_of_the_contract_has_an_operation_and_no_other() -> None:
    assert {hotplug, instance, isolation, job, maintenance, migration, node, snapshot}  # their import fills OPERATIONS
    assert set(OPERATIONS) == set(TaskName) == set(ARGUMENTS)


@pytest.mark.parametrize("task", TaskName)
def test_only_jobs_that_change_an_instance_hold_it(task: TaskName) -> None:
    for arguments in ({"name": "web1"}, {"instance": WEB1}):
        receipt = receipt_of("j1", task, arguments)
        fits = "refused" not in receipt.arguments
        assert receipt.instance_name == ("web1" if fits and task in EXCLUSIVE_TASKS else None)
        assert (receipt.job_id, receipt.task) == ("j1", task)
        assert receipt.arguments == (arguments if fits else {"refused": ascii(arguments)})


@pytest.mark.parametrize(
    ("task", "arguments"),
    [
        ("instance.stop", {"name": "web1", "timeout_s": -1}),
        ("instance.stop", {"name": "a b"}),
        ("instance.stop", {"name": "web1", "note": "nul \0"}),
        ("instance.stop", {"name": "web1", "note\0": "x"}),
        ("instance.stop", {"name": "web1", "note": "\ud800"}),
        ("instance.stop", {"name": "web1", "timeout_s": float("nan")}),
        ("instance.start", {"instance": WEB1 | {"tags": ["x" * 1_000_000]}}),
        ("instance.start", {}),
        ("no.such.task", {"name": "web1"}),
        ("no.such.task\0", {}),
    ],
)
def test_what_will_be_refused_waits_for_nobody_and_is_kept_as_text(task: str, arguments: dict[str, Any]) -> None:
    receipt = receipt_of("j1", task, arguments)
    assert receipt.instance_name is None
    kept = receipt.arguments["refused"]
    assert kept == ascii(arguments)[:REFUSED_MAX]
    assert kept.isascii()
    assert "\0" not in kept
    assert list(receipt.arguments) == ["refused"]


def test_an_operations_error_keeps_its_code_words_and_details() -> None:
    failure = as_failure(UnknownInstance("web1", "n1"))
    assert type(failure) is OperationFailed
    assert (failure.code, failure.details) == ("UNKNOWN_INSTANCE", {"retryable": False, "instance": "web1"})
    lost = as_failure(QmpLost("silent", state="unknown"))
    assert as_error(lost) == {
        "code": "QMP_LOST",
        "message": "silent",
        "details": {"retryable": True, "state": "unknown"},
    }


def test_wrong_arguments_become_the_contracts_one_exception() -> None:
    failure = as_failure(InvalidArgument([{"field": "name", "reason": "is missing"}]))
    assert type(failure) is OperationFailed
    assert failure.args == (
        "INVALID_ARGUMENT",
        "name: is missing",
        {"retryable": False, "errors": [{"field": "name", "reason": "is missing"}]},
    )


@pytest.mark.parametrize(
    "error",
    [
        OperationalError("SELECT secret", {"password": "secret"}, ConnectionRefusedError("refused")),
        IntegrityError("INSERT secret", {}, ValueError("duplicate")),
    ],
)
def test_a_database_error_tells_neither_statement_nor_values(error: Exception) -> None:
    failure = as_failure(error)
    assert failure.code == ErrorCode.INTERNAL
    assert failure.retryable
    assert "secret" not in json.dumps(failure.args)


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), KeyError("x"), OSError(5, "I/O error")])
def test_what_nobody_expected_is_internal_and_names_itself(error: Exception) -> None:
    failure = as_failure(error)
    assert failure.code == ErrorCode.INTERNAL
    assert failure.message == f"{type(error).__name__}: {error}"
    assert not failure.retryable


def test_every_failure_is_json() -> None:
    for error in (OperationError("x"), NotRunning("x", state="stopped"), ValueError("\ud800"), RuntimeError()):
        json.dumps(as_failure(error).args)


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (QmpLost("silent"), True),
        (OperationalError("x", {}, Exception("away")), True),
        (NotRunning("x"), False),
        (InvalidArgument([{"field": "name", "reason": "is missing"}]), False),
        (ValueError("a defect of ours"), False),
    ],
)
def test_only_what_passes_by_itself_is_tried_again_by_itself(error: Exception, transient: bool) -> None:
    assert is_transient(error) is transient
