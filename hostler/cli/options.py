"""Options that many commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class JobOptions:
    """How a job is sent and waited for."""

    wait: bool
    timeout_s: float | None
    job_id: str | None
    as_json: bool


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
timeout_option = click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Wait at most this long; the job itself goes on. Default: wait for its end.",
)


def _default_node(context: click.Context, parameter: click.Parameter, value: str | None) -> str:
    if value is not None:
        return value
    from hostler.settings import load

    return load().node


node_option = click.option(
    "--node",
    "-n",
    metavar="NODE",
    callback=_default_node,
    help="The node that shall act. Default: HOSTLER_NODE, else this host's name.",
)


def job_options(command: Command) -> Command:
    """Add the options of every command that sends a job; the command gets them as ``options``."""

    @click.option("--no-wait", is_flag=True, help="Print the job's id and do not wait for its end.")
    @timeout_option
    @click.option("--job-id", metavar="ID", help="Choose the job's id; the same id, sent twice, takes effect once.")
    @json_option
    @wraps(command)
    def with_options(
        *args: Any, no_wait: bool, timeout_s: float | None, job_id: str | None, as_json: bool, **kwargs: Any
    ) -> Any:
        return command(*args, options=JobOptions(not no_wait, timeout_s, job_id, as_json), **kwargs)

    return with_options  # type: ignore[return-value]  # the same command, with four parameters gathered into one


def duration_s(text: str, option: str) -> int:
    """``90s``, ``30m``, ``2h`` or ``7d`` in seconds. Raises click.BadParameter, naming the option."""
    match = re.fullmatch(r"([0-9]{1,15})([smhd])", text)
    if not match:
        raise click.BadParameter(f"{text!r} is not a time such as 30m, 2h or 7d", param_hint=option)
    return int(match[1]) * _UNITS_S[match[2]]


def examples(*lines: str) -> str:
    r"""An epilog that click leaves as it is (``\b`` switches its wrapping off)."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
