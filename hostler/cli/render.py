"""Results as tables for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from hostler.cli import output
from hostler.contract import InstanceState, JobState
from hostler.hidden import without_secrets

if TYPE_CHECKING:
    from hostler.job import JobSnapshot

_STYLES: dict[str, str] = {
    InstanceState.RUNNING: "green",
    InstanceState.PAUSED: "yellow",
    InstanceState.CRASHED: "bold red",
    InstanceState.UNKNOWN: "bold red",
    JobState.SUCCESS: "green",
    JobState.FAILURE: "bold red",
    JobState.REVOKED: "yellow",
}
_INSTANCE_COLUMNS = {
    "name": "NAME",
    "state": "STATE",
    "memory_mib": "MEMORY/MiB",
    "vcpus": "VCPUS",
    "pid": "PID",
    "started_at": "STARTED",
    "restart_at": "RESTART DUE",
    "node": "NODE",
}
_JOB_COLUMNS = {
    "id": "ID",
    "task": "TASK",
    "instance": "INSTANCE",
    "state": "STATE",
    "percent": "%",
    "updated_at": "UPDATED",
    "error": "ERROR",
}
_NODE_COLUMNS = {
    "node": "NODE",
    "worker": "WORKER",
    "since_at": "SINCE",
    "version": "VERSION",
    "pid": "PID",
    "instances": "GUESTS",
    "open_jobs": "OPEN JOBS",
    "marks": "MAINTENANCE",
}
_VERDICT_COLUMNS = {"name": "NAME", "verdict": "VERDICT", "node": "NODE", "reason": "REASON"}
_UID_COLUMNS = {
    "uid": "UID",
    "instance": "INSTANCE",
    "leased_at": "SINCE",
    "last_instance": "LAST INSTANCE",
    "released_at": "UNTIL",
}
_QUARANTINE_COLUMNS = {"name": "NAME", "at": "PUT ASIDE", "size_bytes": "SIZE/BYTES", "path": "PATH"}
_EMPTY: tuple[Any, ...] = (None, "", [], {})
_PHASE_COLUMNS = {"at": "AT", "phase": "PHASE", "message": "MESSAGE"}


def instances(views: Sequence[Mapping[str, Any]]) -> None:
    """One line an instance."""
    _table(views, _INSTANCE_COLUMNS, empty="No instances.")


def nodes(views: Sequence[Mapping[str, Any]]) -> None:
    """One line a node."""
    _table(views, _NODE_COLUMNS, empty="No nodes.")


def verdicts(guests: Sequence[Mapping[str, Any]]) -> None:
    """One line a guest: what became of it."""
    _table(guests, _VERDICT_COLUMNS, empty="No guests.")


def jobs(rows: Sequence[Mapping[str, Any]]) -> None:
    """One line a job."""
    _table(rows, _JOB_COLUMNS, empty="No jobs.")


def uid_leases(leases: Sequence[Mapping[str, Any]]) -> None:
    """One line a uid."""
    _table(leases, _UID_COLUMNS, empty="No uids.")


def quarantine(items: Sequence[Mapping[str, Any]]) -> None:
    """One line an item."""
    _table(items, _QUARANTINE_COLUMNS, empty="The quarantine is empty.")


def job_row(row: Mapping[str, Any]) -> None:
    """A job of the node's ledger with its phases."""
    facts({key: value for key, value in row.items() if key != "phases"})
    if row.get("phases"):
        _table(row["phases"], _PHASE_COLUMNS, empty="")


def summary(view: Mapping[str, Any]) -> None:
    """One sentence about an instance after a job."""
    how = f" ({view['how'].replace('_', ' ')})" if view.get("how") else ""
    pid = f", pid {view['pid']}" if view.get("pid") else ""
    text = f"{view.get('name')} is {view.get('state')} on {view.get('node')}{pid}{how}"
    output.out().print(output.clean(text), markup=False)


def facts(document: Mapping[str, Any]) -> None:
    """A mapping as two columns; what is empty is left out."""
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in document.items():
        if value not in _EMPTY:
            table.add_row(_cell("", key), _cell(key, value))
    output.out().print(table)


def result(document: Any) -> None:
    """The result of a job whose task is not known."""
    if isinstance(document, dict):
        facts(document)
    else:
        output.print_json(document)


def check(report: Mapping[str, Any]) -> None:
    """The errors and warnings of ``instance.check``."""
    for kind, style in (("errors", "bold red"), ("warnings", "yellow")):
        for item in report.get(kind) or ():
            text = f"{item.get('field')}: {item.get('reason')}" if isinstance(item, dict) else str(item)
            output.out().print(output.clean(f"{kind[:-1]}: {text}"), style=style, markup=False)
    if not report.get("errors"):
        output.out().print("The node would start this instance.")


def snapshot(snap: JobSnapshot) -> dict[str, Any]:
    """A job as a JSON document."""
    error = snap.error and {"code": snap.error.code, "message": snap.error.message, "details": snap.error.details}
    return {
        "id": snap.id,
        "state": str(snap.state),
        "known": snap.known,
        "task": snap.task,
        "arguments": snap.arguments and without_secrets(snap.arguments),
        "worker": snap.worker,
        "progress": snap.progress,
        "result": snap.result,
        "error": error,
        "finished_at": snap.finished_at,
    }


def _table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str], empty: str) -> None:
    from rich.table import Table

    rows = list(rows)
    if not rows:
        output.out().print(empty)
        return
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    used = [key for key in columns if any(row.get(key) not in _EMPTY for row in rows)]
    for key in used:
        table.add_column(columns[key], overflow="fold", no_wrap=key in ("id", "task", "state"))
    for row in rows:
        table.add_row(*(_cell(key, row.get(key), short=True) for key in used))
    output.out().print(table)


def _cell(key: str, value: Any, *, short: bool = False) -> Any:
    from rich.text import Text

    if isinstance(value, Mapping) and {"code", "message"} <= value.keys():
        value = value["code"] if short else f"{value['code']}: {value['message']}"
    elif isinstance(value, str) and (key == "at" or key.endswith("_at")):
        value = _moment(value, short)
    elif isinstance(value, (dict, list)):
        value = json.dumps(value, ensure_ascii=False)
    text = "" if value is None else output.clean(value)
    return Text(text, style=_STYLES.get(text, "") if key == "state" else "")


def _moment(iso: str, short: bool) -> str:
    """ISO 8601 in UTC, to the second; in a table today's time, or an earlier day's date."""
    day, time = iso[:10], f"{iso[11:19]}Z"
    if not short:
        return f"{day} {time}"
    return time if day == datetime.now(UTC).date().isoformat() else day
