"""A batch of jobs: sent together, waited for together, answered in the order they were added.

However many there are, they are waited for over one connection, and nothing is asked of each job in turn (Redis; other
backends are polled, in batches where they can be).
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import chain
from math import inf

from hostler.client import Client
from hostler.errors import InvalidArgument, ServiceUnreachable
from hostler.executor_display import Display, display
from hostler.executor_part import LISTED, Part, Result, if_name, result_of, way_back
from hostler.job import Job, follow_jobs
from hostler.job_request import JobRequest


class JobExecutor:
    """Sends jobs and collects their results.

    ``verbose`` tells people how it goes, on standard error: True always, False never, None (the default) when standard
    error is a terminal. An executor may be used again: jobs may be added after results were taken, and results taken
    again. It is for one thread at a time.
    """

    def __init__(self, client: Client, *, verbose: bool | None = None) -> None:
        self._client = client
        self._verbose = verbose
        self._entries: list[list[Part]] = []
        self._pending: deque[Part] = deque()

    @property
    def jobs(self) -> list[tuple[str, str]]:
        """Name and id of every job that was sent or added by its id, for a program that wants to return to them."""
        return [(part.name, part.id) for part in self._parts() if part.job]

    def queue_job(self, name: str | None, *requests: JobRequest) -> None:
        """Add jobs (``client.TASK.job(...)``) to be sent later; ``name`` is what messages call them, and may be empty.

        Several requests are separate jobs, sent in this order, whose results come back as one list. The jobs of one
        instance run in the order sent, but the failure of one does not hold up the next.

        Each gets its id now, so that one whose sending was cut off can be sent again and takes effect once.
        Raises InvalidArgument for no request, or for something that is not one.
        """
        if not requests:
            raise _wrong("requests", "at least one is needed: client.TASK.job(...)")
        for index, request in enumerate(requests):
            if not isinstance(request, JobRequest):
                hint = "it was sent already: add_job_id" if isinstance(request, Job) else "client.TASK.job(...) is"
                raise _wrong(f"requests[{index}]", f"{request!r} is not a job to be sent; {hint}")
        ids = [request.job_id or str(uuid.uuid4()) for request in requests]
        parts = [
            Part(name or "", job_id, replace(request, job_id=job_id))
            for job_id, request in zip(ids, requests, strict=True)
        ]
        self._entries.append(parts)
        self._pending.extend(parts)

    def add_job_id(self, name: str | None, job_id: str, *, status: bool = True) -> None:
        """Add a job that somebody sent, known by its id alone.

        With ``status`` False it is a job that could not be sent, and ``job_id`` says why.
        Raises InvalidArgument for an id that no job can have.
        """
        sent = {"id": job_id, "job": self._client.job(job_id)} if status else {"refusal": job_id}
        self._entries.append([Part(name or "", **sent)])

    def submit_pending(self, each: bool = False) -> list[tuple[bool, str]]:
        """Send what was queued and not sent yet, in order; (True, id) or (False, why not) for each job of this call.

        A job that could not be sent is not tried again, and counts as failed. When the broker is lost midway, those
        after are not tried at all.

        ``each`` lets the exception escape instead, at the first job that cannot be sent. The ids of those before are
        kept; that job and those after stay queued, and the next call sends them, with the same ids.
        """
        with self._explained():
            return self._send_pending(each)

    def get_results(self, timeout_s: float | None = None) -> list[Result]:
        """Send what is still queued, wait for all jobs, and return (True, result) or (False, message) for each entry.

        The order is that of :meth:`queue_job` and :meth:`add_job_id`. With ``timeout_s``, what has not ended by then is
        (False, "still STATE, goes on: hostler watch ID"); call again to wait on. Without it, an id that nobody ever
        sends is waited for without end, since it may be sent yet.

        Raises ServiceUnreachable if the result backend does not answer, and KeyboardInterrupt: the jobs go on, both say
        how to return to them, and the results so far are kept for the next call.
        """
        deadline = inf if timeout_s is None else time.monotonic() + timeout_s
        with self._explained():
            sent = self._send_pending()
            waited_for = [part for part in self._parts() if part.is_open]
            with display(self._verbose, {part.id: part.label for part in waited_for}) as shown:
                self._tell_sent(shown, sent)
                _wait(waited_for, deadline, shown)
                _tell_rest(shown, waited_for)
        return [result_of(parts) for parts in self._entries]

    def wait_or_show(self, wait: bool, timeout_s: float | None = None) -> list[Result]:
        """With ``wait``, :meth:`get_results`. Else send what is queued, print each job's id and name, and return.

        Ids go to standard output, failures to send to standard error. Returns (True, id) or (False, message) for each
        job of the executor.
        """
        if wait:
            return self.get_results(timeout_s)
        import click

        from hostler.cli.output import clean

        self.submit_pending()
        for part in self._parts():
            if part.refusal is None:
                click.echo(clean(f"{part.id}{if_name(part.name, ': {}')}"))
            else:
                click.echo(clean(f"Failure{if_name(part.name, ' for {}')}: {part.refusal}"), err=True)
        return [(part.refusal is None, part.id if part.refusal is None else part.refusal) for part in self._parts()]

    def _parts(self) -> Iterator[Part]:
        return chain.from_iterable(self._entries)

    def _send_pending(self, each: bool = False) -> list[tuple[bool, str]]:
        outcomes, outage = [], ""
        while self._pending:
            part = self._pending[0]
            assert part.request
            try:
                if outage:
                    part.refusal = outage
                else:
                    # All through one connection: Celery keeps it in a pool, and send() returns it there.
                    part.job = self._client.send(part.request)
            except Exception as exc:
                if each:
                    raise
                part.refusal = str(exc)
                if isinstance(exc, ServiceUnreachable):
                    outage = f"not sent, because one before it could not be: {exc}"
            self._pending.popleft()
            outcomes.append((True, part.id) if part.refusal is None else (False, part.refusal))
        return outcomes

    def _tell_sent(self, shown: Display, sent: list[tuple[bool, str]]) -> None:
        ids = [job_id for ok, job_id in sent if ok]
        if ids:
            more = f", ... ({len(ids)} in all)" if len(ids) > LISTED else ""
            shown.say(f"Submitted jobs {', '.join(ids[:LISTED])}{more}")
        for part in self._parts():
            if part.refusal is not None:
                shown.say(part.ending, "red")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (KeyboardInterrupt, ServiceUnreachable) as exc:
            text = way_back(list(self._parts()), self._pending)
            if isinstance(exc, KeyboardInterrupt) and self._verbose is not False:
                from hostler.cli.output import note

                note(text)
            else:
                exc.add_note(text)
            raise


def _wait(parts: list[Part], deadline: float, shown: Display) -> None:
    by_id: dict[str, list[Part]] = {}
    for part in parts:
        by_id.setdefault(part.id, []).append(part)  # the same job may have been added twice
    waiting = {part.id: part.job for part in parts if part.job}
    with closing(follow_jobs(waiting, deadline)) as news:
        for batch in news:
            for snapshot in batch:
                for part in by_id[snapshot.id]:
                    part.take(snapshot)
                    if part.ending:
                        shown.say(part.ending, "red")
                if snapshot.finished or by_id[snapshot.id][0].vanished:
                    del waiting[snapshot.id]
                shown.show(snapshot)
            shown.settle()


def _tell_rest(shown: Display, parts: list[Part]) -> None:
    still = [part for part in parts if part.is_open and not part.vanished]
    for part in still[:LISTED]:
        shown.say(f"J{part.label[1:]}: {part.outcome[1]}", "yellow")
    if len(still) > LISTED:
        shown.say(f"... and {len(still) - LISTED} more", "yellow")
    if len(parts) > 1:
        succeeded = sum(ok for ok, _ in (part.outcome for part in parts))
        shown.say(f"{succeeded} of {len(parts)} jobs succeeded")


def _wrong(field: str, reason: str) -> InvalidArgument:
    return InvalidArgument([{"field": field, "reason": reason}])
