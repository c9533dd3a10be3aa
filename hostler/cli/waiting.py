"""Send a job, show its progress, and give a person who waits for nothing a reason."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from hostler.cli import output
from hostler.cli.advice import advise
from hostler.cli.exits import Exit, StillRunning
from hostler.cli.progress import progress_shown
from hostler.contract import JobState, queue_name
from hostler.errors import OperationFailed, ServiceUnreachable

if TYPE_CHECKING:
    from hostler.cli.options import JobOptions
    from hostler.client import Client
    from hostler.job import Job
    from hostler.job_request import JobRequest

PICKED_UP_S = 2.0
"""A worker takes a job in milliseconds; after this long a person wonders why nothing happens."""


def run_job(client: Client, request: JobRequest, options: JobOptions) -> Any:
    """Send ``request`` and return its result. With ``--no-wait`` print the id and end the command."""
    job = client.send(request)
    if not options.wait:
        if options.as_json:
            output.print_json({"id": job.id, "task": str(request.task), "node": request.node})
        else:
            click.echo(job.id)
        raise click.exceptions.Exit(Exit.DONE)
    try:
        return follow(client, job, request.node, options.timeout_s)
    except OperationFailed as exc:
        name = request.arguments.get("name") or request.arguments.get("instance", {}).get("name")
        advise(exc, job.id, request.node, name or "NAME")
        raise


def follow(client: Client, job: Job, node: str | None, timeout_s: float | None) -> Any:
    """Wait for ``job`` with live progress. Raises what :meth:`hostler.Job.wait` raises, StillRunning for time out."""
    started = time.monotonic()
    with progress_shown() as show:
        try:
            if timeout_s is None or timeout_s > PICKED_UP_S:
                try:
                    return job.wait(PICKED_UP_S, show)
                except TimeoutError:
                    _explain_silence(client, job, node)
            left = None if timeout_s is None else max(0.0, timeout_s - (time.monotonic() - started))
            return job.wait(left, show)
        except TimeoutError:
            raise StillRunning(job.id, timeout_s or 0) from None
        except KeyboardInterrupt:
            output.note(f"The job goes on. Return to it: hostler watch {job.id}")
            raise click.exceptions.Exit(Exit.INTERRUPTED) from None
        except ServiceUnreachable as exc:
            exc.add_note(f"The job was sent and goes on. Return to it: hostler watch {job.id}")
            raise


def _explain_silence(client: Client, job: Job, node: str | None) -> None:
    if job.state is not JobState.PENDING:
        return
    waits = f"the job waits in queue {queue_name(node)}" if node else ""
    if node is None:
        output.note(f"nothing is known of job {job.id} (yet): {UNKNOWN}", style="yellow")
    elif client.ping(node):
        output.note(f"node {node}'s worker is alive but busy; {waits}", style="yellow")
    else:
        output.note(f"node {node} has no live worker (or it is busy); {waits}", style="yellow")


UNKNOWN = "there is no such job, or no worker has received it yet, or its result has expired"
"""What PENDING without any report can mean; the result backend cannot tell which."""
