"""One job as its sender sees it: state, progress, result, and how to wait for them.

All of it is read from the result backend, so any program may look at any job, whoever sent it. The ledger on the node
knows more and for longer; ask it with :attr:`hostler.Client.job_info`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any

from celery import Celery
from celery.backends.redis import RedisBackend
from celery.exceptions import NotRegistered
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from hostler.contract import FINAL_JOB_STATES, ErrorCode, JobState
from hostler.errors import OperationFailed, ServiceUnreachable

OUTAGE_S = 5.0
"""A backend that was there and went away may take this long to return (a restart) before a waiting caller is told."""
_RETRY_S = 0.25
_REREAD_S = 30.0
"""How often the stored state is read while nothing is pushed: a push can be lost, and a dead peer is silent."""
_POLL_S = (0.05, 0.5)
"""Pause between two looks at a backend that cannot push: the first one, and the longest."""

OnProgress = Callable[[dict[str, Any]], object]
Meta = dict[str, Any]


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
        with reaching(f"the result backend {self._backend_url}"):
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
        goes on), ServiceUnreachable if the backend does not answer, or is lost for :data:`OUTAGE_S` (it goes on too).
        """
        last: dict[str, Any] = {}
        deadline = inf if timeout_s is None else time.monotonic() + timeout_s
        with closing(self._metas(deadline)) as metas:
            for meta in metas:
                snapshot = _snapshot(self.id, meta)
                if snapshot.error and snapshot.finished:
                    raise snapshot.error
                if snapshot.finished:
                    return snapshot.result
                if on_progress and snapshot.progress and _is_news(snapshot.progress, last):
                    last = snapshot.progress
                    on_progress(last)
        raise TimeoutError(f"job {self.id} has not ended within {timeout_s:g} s; it goes on")

    def forget(self) -> None:
        """Remove result and progress from the backend. The job itself, and its row on the node, are untouched."""
        with reaching(f"the result backend {self._backend_url}"):
            self._app.backend.forget(self.id)

    @property
    def _backend_url(self) -> str:
        return safe_url(str(self._app.backend_cls))

    def _metas(self, deadline: float) -> Generator[Meta, None, None]:
        """The stored state, then each change of it until ``deadline``, over a short loss of the backend too."""
        follow = _pushed if isinstance(self._app.backend, RedisBackend) else _polled
        reached, lost_at = False, 0.0
        while True:
            try:
                for meta in follow(self._app.backend, self.id, deadline):
                    reached, lost_at = True, 0.0
                    yield meta
                return
            except Exception as exc:
                lost_at = lost_at or time.monotonic()
                if not is_outage(exc):
                    raise
                if not reached or time.monotonic() - lost_at > OUTAGE_S:
                    raise ServiceUnreachable(_complaint(f"the result backend {self._backend_url}", exc)) from exc
            if time.monotonic() >= deadline:
                return
            time.sleep(_RETRY_S)


def _pushed(backend: Any, job_id: str, deadline: float) -> Iterator[Meta]:
    # A subscription of our own for each wait: Celery's is shared by all waits of a thread, keeps what was sent and
    # never waited for subscribed for ever, and looks at the clock once a second only.
    with backend.client.pubsub(ignore_subscribe_messages=True) as channel:
        channel.subscribe(backend.get_key_for_task(job_id))
        while True:
            # Read after subscribing, so that nothing falls between.
            yield backend.get_task_meta(job_id, cache=False)
            reread_at = min(deadline, time.monotonic() + _REREAD_S)
            while (left := reread_at - time.monotonic()) > 0:
                if message := channel.get_message(timeout=left):
                    yield backend.decode_result(message["data"])
            if reread_at == deadline:
                return


def _polled(backend: Any, job_id: str, deadline: float) -> Iterator[Meta]:
    pause, longest = _POLL_S
    while True:
        yield backend.get_task_meta(job_id, cache=False)
        left = deadline - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(pause, left))
        pause = min(pause * 1.5, longest)


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


@contextmanager
def reaching(what: str) -> Iterator[None]:
    """Turn a lost connection inside the block into ServiceUnreachable saying that ``what`` does not answer."""
    try:
        yield
    except Exception as exc:
        if not is_outage(exc):
            raise
        raise ServiceUnreachable(_complaint(what, exc)) from exc


def is_outage(exc: Exception) -> bool:
    """Whether ``exc`` is a broker's or backend's way of saying that it cannot be reached or refuses to serve us."""
    # A backend in SQL brings SQLAlchemy, which the client does not depend on: nobody raises what is not imported.
    sql: Any = sys.modules.get("sqlalchemy.exc")
    return isinstance(exc, (OSError, OperationalError, RedisError, *([sql.DBAPIError] if sql else [])))


def _complaint(what: str, exc: Exception) -> str:
    return f"{what} does not answer: {str(exc).splitlines()[0] if str(exc) else type(exc).__name__}"


def safe_url(url: str) -> str:
    """``url`` without what must not be shown: user, password and query."""
    scheme, _, rest = url.partition("://")
    place, _, query = rest.partition("?")
    # Where a password was not quoted as it must be, a part of it may stand anywhere.
    return f"{scheme}://{'...' if '@' in query else place.rpartition('@')[2]}"
