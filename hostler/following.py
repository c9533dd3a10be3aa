"""What the result backend says of jobs as it changes: of one job, or of ten thousand at once.

Redis pushes every change; all jobs share one subscription, and what is stored is read in batches. Other backends are
polled, in batches where they can be (SQL).
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from itertools import islice
from typing import Any

from celery import Celery
from celery.backends.redis import RedisBackend

from hostler.contract import JobState
from hostler.errors import ServiceUnreachable
from hostler.outage import complaint, is_outage, safe_url

OUTAGE_S = 5.0
"""A backend that was there and went away may take this long to return (a restart) before a waiting caller is told."""
_RETRY_S = 0.25
_REREAD_S = 30.0
"""How often the stored state is read while nothing is pushed: a push can be lost, and a dead peer is silent."""
_POLL_S = (0.05, 0.5)
"""Pause between two looks at a backend that cannot push: the first one, and the longest for a quick backend."""
_BATCH = 500
"""Jobs in one request: about 20 kB of names for Redis, and below the 999 variables that old SQLite allows."""

Meta = dict[str, Any]
News = list[tuple[str, Meta]]


def follow(app: Celery, waiting: dict[str, Any], deadline: float) -> Generator[News, None, None]:
    """What is stored for each job in ``waiting`` (its keys), then each change of it, until ``deadline``.

    The caller takes out of ``waiting`` what it wants no more news of; when nothing is left in it, this ends. What is
    stored is told even when the deadline (of the monotonic clock) has passed. A short loss of the backend is bridged.

    Raises ServiceUnreachable if the backend does not answer at first, or is lost for :data:`OUTAGE_S`.
    """
    watch = _pushed if isinstance(app.backend, RedisBackend) else _polled
    reached, lost_at = False, 0.0
    while waiting:
        try:
            for batch in watch(app.backend, waiting, deadline):
                reached, lost_at = True, 0.0
                if news := [(job_id, meta) for job_id, meta in batch if job_id in waiting]:
                    yield news
            return
        except Exception as exc:
            lost_at = lost_at or time.monotonic()
            if not is_outage(exc):
                raise
            if not reached or time.monotonic() - lost_at > OUTAGE_S:
                raise ServiceUnreachable(complaint(f"the result backend {backend_url(app)}", exc)) from exc
        if time.monotonic() >= deadline:
            return
        time.sleep(_RETRY_S)


def backend_url(app: Celery) -> str:
    """The result backend of ``app`` as it may be shown."""
    return safe_url(str(app.backend_cls))


def _pushed(backend: Any, waiting: dict[str, Any], deadline: float) -> Iterator[News]:
    if len(waiting) > _BATCH:
        # Of ten thousand jobs, those that have ended need no subscription. Of a few, no report shall be missed.
        yield from _read(backend, waiting)
        if not waiting or time.monotonic() >= deadline:
            return
    # A subscription of our own for each wait: Celery's is shared by all waits of a thread, keeps what was sent and
    # never waited for subscribed for ever, and looks at the clock once a second only.
    jobs = {backend.get_key_for_task(job_id): job_id for job_id in waiting}
    with backend.client.pubsub() as channel:
        for keys in _batches(jobs):
            channel.subscribe(*keys)
        yield from _heard(backend, channel, jobs, waiting, deadline)


def _heard(
    backend: Any, channel: Any, jobs: dict[bytes, str], waiting: dict[str, Any], deadline: float
) -> Iterator[News]:
    unread: dict[str, None] = {}
    reread_at = time.monotonic() + _REREAD_S
    while waiting:
        left = 0.0 if unread else max(0.0, min(deadline, reread_at) - time.monotonic())
        message = channel.get_message(timeout=left)
        if message and message["type"] == "message":
            job_id = jobs[message["channel"]]
            unread.pop(job_id, None)  # from here on, whatever happens to it is heard
            yield [(job_id, backend.decode_result(message["data"]))]
        elif message and message["type"] == "subscribe":
            # To be read after the confirmation, so that nothing falls between. Should redis-py reconnect without a word
            # (it does if told to retry), there is another confirmation, and what was missed is read.
            unread[jobs[message["channel"]]] = None
        # Reports that came meanwhile go first: a result that is read would hide them.
        if unread and (message is None or len(unread) >= _BATCH):
            yield from _read(backend, unread)
            unread = {}
        now = time.monotonic()
        if now >= min(deadline, reread_at):
            yield from _read(backend, waiting)
            reread_at = now + _REREAD_S
        if now >= deadline:
            return


def _polled(backend: Any, waiting: dict[str, Any], deadline: float) -> Iterator[News]:
    pause, longest = _POLL_S
    while True:
        began = time.monotonic()
        yield from _read(backend, waiting)
        now = time.monotonic()
        if not waiting or now >= deadline:
            return
        # Never more than half of the time is spent asking, however many the jobs and however slow the backend.
        time.sleep(min(max(pause, now - began), deadline - now))
        pause = min(pause * 1.5, longest)


def _read(backend: Any, job_ids: Iterable[str]) -> Iterator[News]:
    if isinstance(backend, RedisBackend):
        read = _read_redis
    else:
        read = _read_sql if hasattr(backend, "ResultSession") else _read_each
    for batch in _batches(list(job_ids)):
        yield read(backend, batch)


def _read_redis(backend: Any, job_ids: list[str]) -> News:
    stored = backend.mget([backend.get_key_for_task(job_id) for job_id in job_ids])
    return [
        (job_id, backend.decode_result(payload) if payload else _nothing())
        for job_id, payload in zip(job_ids, stored, strict=True)
    ]


def _read_sql(backend: Any, job_ids: list[str]) -> News:
    # Celery asks for one row at a time; this is its query and its decoding for many.
    row = backend.task_cls
    with backend.ResultSession() as session:
        found = {task.task_id: task.to_dict() for task in session.query(row).filter(row.task_id.in_(job_ids))}
    for meta in found.values():
        meta.update({name: backend.decode(meta[name]) for name in ("args", "kwargs") if meta.get(name) is not None})
    return [(job_id, backend.meta_from_decoded(found[job_id]) if job_id in found else _nothing()) for job_id in job_ids]


def _read_each(backend: Any, job_ids: list[str]) -> News:
    return [(job_id, backend.get_task_meta(job_id, cache=False)) for job_id in job_ids]


def _nothing() -> Meta:
    return {"status": str(JobState.PENDING), "result": None}


def _batches(items: Iterable[Any]) -> Iterator[list[Any]]:
    rest = iter(items)
    while batch := list(islice(rest, _BATCH)):
        yield batch
