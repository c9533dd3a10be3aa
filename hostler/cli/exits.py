"""Every way a command can end, as an exit status and as a message for people or for programs.

========  =============================================================================================
0         done
1         the job failed (for ``check``: the node would not start this instance)
2         wrong usage, settings or arguments; nothing was sent
3         the broker or the result backend cannot be reached
124       ``--timeout`` ran out; the job goes on (124 as in timeout(1))
130       interrupted from the keyboard; a job that was sent goes on
========  =============================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import click

from hostler.cli import output
from hostler.contract import ErrorCode
from hostler.errors import InvalidArgument, OperationFailed, ServiceUnreachable


class Exit(IntEnum):
    """The exit statuses of ``hostler``."""

    DONE = 0
    JOB_FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    STILL_RUNNING = 124
    INTERRUPTED = 130


class StillRunning(Exception):
    """``--timeout`` ran out before the job ended."""

    def __init__(self, job_id: str, timeout_s: float) -> None:
        self.job_id = job_id
        super().__init__(f"job {job_id} has not ended within {timeout_s:g} s; it goes on")
        self.add_note(f"Return to it: hostler watch {job_id}")


@dataclass(frozen=True)
class Problem:
    """What is shown instead of a result."""

    status: Exit
    code: str
    message: str
    details: dict[str, Any] = field(default_factory=dict)
    next_steps: Sequence[str] = ()


def run(args: Sequence[str]) -> int:
    """Run ``hostler ARGS`` and return its exit status; whatever goes wrong has been shown."""
    from hostler.cli.root import cli

    try:
        status = cli.main(args=list(args), prog_name="hostler", standalone_mode=False)
        return status if isinstance(status, int) else Exit.DONE
    except (click.Abort, KeyboardInterrupt):
        return Exit.INTERRUPTED
    except Exception as exc:
        problem = _problem(exc)
        if problem is None:
            raise
        _show(problem, exc, as_json="--json" in args)
        return problem.status


def _problem(exc: Exception) -> Problem | None:
    from hostler.settings import SettingsError

    notes: list[str] = getattr(exc, "__notes__", [])
    if isinstance(exc, OperationFailed):
        status = Exit.USAGE if isinstance(exc, InvalidArgument) else Exit.JOB_FAILED
        return Problem(status, exc.code, exc.message, exc.details, notes)
    details: dict[str, Any] = {"retryable": False}
    match exc:
        case ServiceUnreachable():
            status, code, details = Exit.UNREACHABLE, ErrorCode.NODE_UNAVAILABLE, {"retryable": True}
        case StillRunning():
            status, code, details = Exit.STILL_RUNNING, ErrorCode.TIMED_OUT, details | {"job": exc.job_id}
        case SettingsError() | click.UsageError():
            status, code = Exit.USAGE, ErrorCode.INVALID_ARGUMENT
        case click.ClickException():
            status, code = Exit.JOB_FAILED, ErrorCode.INTERNAL
        case _:
            return None
    message = exc.format_message() if isinstance(exc, click.ClickException) else str(exc)
    return Problem(status, code, message, details, notes)


def _show(problem: Problem, exc: Exception, as_json: bool) -> None:
    if as_json:
        document = {"code": str(problem.code), "message": problem.message, "details": problem.details}
        output.print_json({"error": document})
    elif isinstance(exc, click.ClickException):
        exc.show()
    else:
        _show_to_people(problem)


def _show_to_people(problem: Problem) -> None:
    fields = problem.details.get("errors")
    if isinstance(fields, list) and all(isinstance(item, dict) for item in fields) and fields:
        output.note(problem.code, style="bold red")
        for item in fields:
            output.note(f"  {item.get('field', '')}: {item.get('reason', '')}")
    else:
        output.note(f"{problem.code}: {problem.message}", style="bold red")
    for step in problem.next_steps:
        output.note(step)
