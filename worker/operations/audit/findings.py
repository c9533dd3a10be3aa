"""What an audit reports, and what the kinds of findings are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from hostler.contract import TaskName
from worker.kvm.process import ProcessIdentity
from worker.operations.audit.host_facts import HostFacts
from worker.operations.audit.records import Records
from worker.operations.context import JobContext, NodeContext
from worker.operations.guests import Guests
from worker.operations.receipts import Ended


class Finding(TypedDict):
    """One disagreement. ``evidence`` holds only what stays the same as long as the thing itself does."""

    id: str
    kind: str
    subject: str
    instance: str | None
    evidence: dict[str, Any]
    explanation: str
    repair: dict[str, Any] | None


@dataclass(frozen=True)
class Seen:
    """Everything one look saw. ``alive`` has the process of each runtime that has one, ``watched`` the uuids of the
    guests that the worker watches."""

    node: str
    guests_dir: Path
    records: Records
    host: HostFacts
    alive: dict[str, ProcessIdentity]
    watched: frozenset[str]


@dataclass
class Bench:
    """What a repair is given. ``ended`` collects the jobs that have to be woken afterwards."""

    node: NodeContext
    guests: Guests
    job: JobContext
    seen: Seen
    ended: Ended = field(default_factory=Ended)


@dataclass(frozen=True)
class Kind:
    """A kind of findings.

    ``mend`` repairs one that was seen a moment ago and says what it did; it raises OperationError when it could not.
    ``of_ledger``: it is about jobs themselves, so that a job which holds the instance is no reason to leave it.
    ``by_id_only``: its repair ends a process, so that nothing but its id asks for it.
    """

    name: str
    find: Callable[[Seen], Iterator[Finding]]
    mend: Callable[[Bench, Finding], str] | None = None
    of_ledger: bool = False
    by_id_only: bool = False


def finding(
    kind: str,
    subject: object,
    explanation: str,
    *,
    instance: str | None = None,
    repair: TaskName | None = None,
    evidence: dict[str, Any],
) -> Finding:
    """A finding, with the job that repairs it: ``instance.cleanup``, ``node.repair``, or none."""
    finding_id = f"{kind}:{subject}"
    arguments: dict[str, Any] = {"ids": [finding_id], "dry_run": False}
    if repair == TaskName.INSTANCE_CLEANUP:
        arguments = {"name": instance}
    return {
        "id": finding_id,
        "kind": kind,
        "subject": str(subject),
        "instance": instance,
        "evidence": evidence,
        "explanation": explanation,
        "repair": {"task": str(repair), "arguments": arguments} if repair else None,
    }
