"""One job of a batch: to be sent, sent, or never to be; what is known of it, and how that is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hostler.contract import JobState
from hostler.job import Job, JobSnapshot
from hostler.job_request import JobRequest

Result = tuple[bool, Any]

LISTED = 20
"""Jobs that are listed one by one for a person; more do not fit on a terminal, and are counted."""
_LEDGER_MAX = 1000
"""What ``hostler jobs`` lists at most."""
_ARCHIVED = "the result backend knew the job and does so no more (expired, forgotten, or its data was lost)"
_UNKNOWN = "there is no such job, or no worker has received it yet, or its result has expired"


@dataclass(eq=False)
class Part:
    """A job of the batch. Sent: ``job`` is there; never to be sent: ``refusal`` says why."""

    name: str
    id: str = ""
    request: JobRequest | None = None
    job: Job | None = None
    refusal: str | None = None
    latest: JobSnapshot | None = None
    vanished: bool = False

    def take(self, snapshot: JobSnapshot) -> None:
        """Learn what the backend says now; that it knows nothing any more does not unlearn what it said."""
        self.vanished = not snapshot.known and self.latest is not None and self.latest.known
        if not self.vanished:
            self.latest = snapshot

    @property
    def is_open(self) -> bool:
        """Whether it was sent and its end is not known."""
        return self.job is not None and not (self.latest and self.latest.finished)

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"job {self.id}{if_name(self.name, ' for {}')}"

    @property
    def outcome(self) -> Result:
        """(True, result), or (False, what is the matter)."""
        if self.refusal is not None:
            return False, self.refusal
        if self.latest and self.latest.finished:
            return (False, str(self.latest.error)) if self.latest.error else (True, self.latest.result)
        if self.vanished:
            return False, f"archived, cannot check its result: {_ARCHIVED}. {self._ledger}"
        if self.latest and not self.latest.known and not self.request:
            return False, f"still unknown: {_UNKNOWN}. Wait on: hostler watch {self.id}. {self._ledger}"
        return False, f"still {self.latest.state if self.latest else 'unknown'}, goes on: hostler watch {self.id}"

    @property
    def ending(self) -> str:
        """The line for people when it has ended otherwise than well; empty if it has not."""
        if self.refusal is not None:
            return f"Failed to submit job{if_name(self.name, ' for {}')}: {self.refusal}"
        if self.vanished:
            return f"J{self.label[1:]} has been archived, cannot check its result"
        if self.latest is None or self.latest.error is None:
            return ""
        how = "has been cancelled" if self.latest.state is JobState.REVOKED else "has failed"
        return f"J{self.label[1:]} {how}: {self.latest.error}"

    @property
    def _ledger(self) -> str:
        worker = (self.latest.worker or "") if self.latest else ""
        node = self.request.node if self.request else worker.partition("@")[2] or "NODE"
        return f"Its node knows: hostler job {self.id} --history -n {node}"


def result_of(parts: Sequence[Part]) -> Result:
    """The result of what was queued under one name: that of its one job, or the list of those of its jobs."""
    outcomes = [part.outcome for part in parts]
    if len(parts) == 1:
        return outcomes[0]
    if all(ok for ok, _ in outcomes):
        return True, [result for _, result in outcomes]
    failures = [
        f"request {number} of {len(parts)}, job {part.id}: {message}"
        for number, (part, (ok, message)) in enumerate(zip(parts, outcomes, strict=True), 1)
        if not ok
    ]
    return False, ("partial failure: " if len(failures) < len(parts) else "") + "; ".join(failures)


def way_back(parts: Sequence[Part], unsent: Sequence[Part]) -> str:
    """How to return to those of ``parts`` that go on. The first of ``unsent`` may have been cut off half sent."""
    still = [part for part in parts if part.is_open]
    lines = [f"Jobs that were sent and go on: {len(still)}. Return to them:"] if still else []
    lines += [f"  hostler watch {part.id}{if_name(part.name, '    # {}')}" for part in still[:LISTED]]
    if len(still) > LISTED:
        nodes = sorted({part.request.node for part in still if part.request})
        lines.append(f"  and {len(still) - LISTED} more; their nodes list them:")
        limit = min(len(still), _LEDGER_MAX)
        lines += [f"  hostler jobs --limit {limit} -n {node}" for node in nodes[:LISTED] or ["NODE"]]
    if unsent:
        lines.append(f"Jobs that were not sent: {len(unsent)}; of the first, {unsent[0].id}, it is not certain.")
    return "\n".join(lines) or "No job goes on."


def if_name(name: str, text: str) -> str:
    """``text`` with the name in it, or nothing for a job that is known by its id alone."""
    return text.format(name) if name else ""
