"""One job as its sender sees it: state, progress, result, and how to wait for them.

All of it is read from the result backend, so any program may look at any job, whoever sent it. The ledger on the node
knows more and for longer; ask it with :attr:`hostler.Client.job_info`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import inf
from typing import Any

from celery import Celery
from celery.exceptions import NotRegistered

from hostler.contract import FINAL_JOB_STATES, ErrorCode, JobState, worker_name
from hostler.errors import OperationFailed, ServiceUnreachable
from hostler.following import Meta, backend_url, follow
from hostler.outage import is_outage, reaching, safe_url

__all__ = ["Job", "JobSnapshot", "failure", "follow_jobs", "reaching", "safe_url"]

CANCEL_TIMEOUT_S = 2.0
"""A worker answers in milliseconds; asking all of them means waiting this long for the last."""

_CANCEL_OUTCOMES = ("requested", "too_late", "finished", "revoked", "running")
"""Of several nodes' answers the one that knows most: a node that never saw the job says revoked or running."""

OnProgress = Callable[[dict[str, Any]], object]


@dataclass(frozen=True)
class JobSnapshot:
    """What the result backend says of a job at one moment.

    ``known`` is false when it holds nothing at all: there is no such job, or no worker has received it yet, or its
    result has expired. Which one, only the node can tell. ``task``, ``arguments`` and ``worker`` are None until a
    worker has reported.
    """

    id: str
    state: JobState
    known: bool = True
    progress: dict[str, Any] | None = None
    result: Any = None
    error: OperationFailed | None = None
    task: str | None = None
    arguments: dict[str, Any] | None = None
    worker: str | None = None
    finished_at: str | None = None

    @property
    def finished(self) -> bool:
        """Whether the job has ended, well or not."""
        return self.state in FINAL_JOB_STATES


class Job:
    """A job that was sent, by its id. Made by :class:`hostler.Client`; reading it raises ServiceUnreachable if need be.

    Every property asks the backend anew; take a :meth:`snapshot` to see several of them at one moment.
    """

    def __init__(self, app: Celery, job_id: str) -> None:
        self._app = app
        self.id = job_id

    def __repr__(self) -> str:
        return f"Job({self.id!r})"

    def snapshot(self) -> JobSnapshot:
        """Everything the backend knows of the job now."""
        with reaching(f"the result backend {backend_url(self._app)}"):
            return _snapshot(self.id, self._app.backend.get_task_meta(self.id, cache=False))

    @property
    def state(self) -> JobState:
        """The job's state; PENDING also for an id nobody has ever seen."""
        return self.snapshot().state

    @property
    def progress(self) -> dict[str, Any] | None:
        """The latest report (``phase``, ``percent``, ``message``, ...), or None outside PROGRESS and WAITING."""
        return self.snapshot().progress

    @property
    def result(self) -> Any:
        """What the job returned, or None as long as it has not succeeded."""
        return self.snapshot().result

    @property
    def error(self) -> OperationFailed | None:
        """Why the job failed or was cancelled, or None."""
        return self.snapshot().error

    def wait(self, timeout_s: float | None = None, on_progress: OnProgress | None = None) -> Any:
        """Wait for the end of the job and return its result.

        ``on_progress`` is called, in this thread, with each report, the current one first. Redis pushes them; other
        backends are polled and may skip some. Any number of threads may wait, for one job or for many.

        Raises OperationFailed if the job failed or was cancelled, TimeoutError after ``timeout_s`` seconds (the job
        goes on), ServiceUnreachable if the backend does not answer, or is lost for
        :data:`hostler.following.OUTAGE_S` (it goes on too).
        """
        last: dict[str, Any] = {}
        deadline = inf if timeout_s is None else time.monotonic() + timeout_s
        with closing(follow(self._app, {self.id: self}, deadline)) as news:
            for ((_, meta),) in news:
                snapshot = _snapshot(self.id, meta)
                if snapshot.error and snapshot.finished:
                    raise snapshot.error
                if snapshot.finished:
                    return snapshot.result
                if on_progress and snapshot.progress and _is_news(snapshot.progress, last):
                    last = snapshot.progress
                    on_progress(last)
        raise TimeoutError(f"job {self.id} has not ended within {timeout_s:g} s; it goes on")

    def cancel(self, node: str | None = None) -> dict[str, str]:
        """Cancel the job, on ``node`` or on whichever node has it.

        The answer is ``{"id", "outcome", "message"}``, ``outcome`` one of ``revoked`` (it had not begun, and never
        will), ``requested`` (it is giving up and undoing its work: ``wait`` raises CANCELLED soon), ``too_late`` (it
        will finish) or ``finished``. Raises ServiceUnreachable when no worker answers: nothing is cancelled then.
        """
        to = {"destination": [worker_name(node)], "limit": 1} if node else {}
        with reaching("the broker"):
            try:
                replies = self._revoke(**to)
            except Exception as exc:
                if not is_outage(exc):
                    raise
                # The pool may have kept a connection of before a restart of the broker. To ask twice does no harm.
                with self._app.connection_for_write() as fresh:
                    replies = self._revoke(connection=fresh, **to)
        answers = [answer for reply in replies or () for said in reply.values() for answer in said.get("ok", ())]
        if not answers:
            raise ServiceUnreachable(f"no worker answered the request to cancel job {self.id}; nothing was cancelled")
        return min(answers, key=lambda answer: _CANCEL_OUTCOMES.index(answer["outcome"]))

    def _revoke(self, **to: Any) -> Any:
        return self._app.control.revoke(self.id, terminate=True, reply=True, timeout=CANCEL_TIMEOUT_S, **to)

    def forget(self) -> None:
        """Remove result and progress from the backend. The job itself, and its row on the node, are untouched."""
        with reaching(f"the result backend {backend_url(self._app)}"):
            self._app.backend.forget(self.id)


def follow_jobs(jobs: dict[str, Job], deadline: float) -> Generator[list[JobSnapshot], None, None]:
    """Snapshots of ``jobs`` (of one client, by id) now and whenever they change; see :func:`hostler.following.follow`.

    The caller takes out of ``jobs`` what it wants no more news of.
    """
    if not jobs:
        return
    with closing(follow(next(iter(jobs.values()))._app, jobs, deadline)) as news:
        for batch in news:
            yield [_snapshot(job_id, meta) for job_id, meta in batch]


def _snapshot(job_id: str, meta: Meta) -> JobSnapshot:
    state, value = _state(str(meta["status"])), meta.get("result")
    return JobSnapshot(
        id=job_id,
        state=state,
        known=state is not JobState.PENDING,
        progress=value if state in (JobState.PROGRESS, JobState.WAITING) and isinstance(value, dict) else None,
        result=value if state is JobState.SUCCESS else None,
        error=failure(state, value) if state in (JobState.FAILURE, JobState.REVOKED) else None,
        task=meta.get("name"),
        arguments=meta.get("kwargs"),
        worker=meta.get("worker"),
        finished_at=meta.get("date_done") if state in FINAL_JOB_STATES else None,
    )


def _state(word: str) -> JobState:
    # A task may report a word of its own; whatever it is, the job has been taken up and has not ended.
    return JobState(word) if word in JobState.__members__ else JobState.STARTED


def _is_news(progress: dict[str, Any], last: dict[str, Any]) -> bool:
    # What was read and what was pushed just before it arrive in either order.
    return progress != last and str(progress.get("updated_at", "")) >= str(last.get("updated_at", ""))


def failure(state: JobState, raised: object) -> OperationFailed:
    """The OperationFailed behind whatever class the backend made of it, known by its arguments."""
    arguments: Sequence[Any] = getattr(raised, "args", ())
    if isinstance(raised, OperationFailed):
        return raised
    if len(arguments) == 3 and isinstance(arguments[0], str) and isinstance(arguments[2], dict):
        return OperationFailed(arguments[0], str(arguments[1]), arguments[2])
    if state is JobState.REVOKED:
        return OperationFailed(ErrorCode.CANCELLED, f"the job was cancelled ({raised})")
    if isinstance(raised, NotRegistered):
        return OperationFailed(ErrorCode.UNSUPPORTED, f"the node's worker knows no task {raised}; is it older than we?")
    return OperationFailed(ErrorCode.INTERNAL, f"{type(raised).__name__}: {raised}")
