"""Commands about jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hostler.cli import output, render
from hostler.cli.advice import advise
from hostler.cli.instances import send_and_show
from hostler.cli.options import JobOptions, examples, job_options, json_option, node_option, timeout_option
from hostler.cli.waiting import UNKNOWN, follow
from hostler.errors import OperationFailed

if TYPE_CHECKING:
    from hostler.client import Client


@click.command(
    "jobs",
    epilog=examples(
        "hostler jobs", "hostler jobs -n n1 --instance web1", "hostler jobs --state FAILURE --state REVOKED --limit 10"
    ),
)
@click.option("--instance", metavar="NAME", help="Only jobs of this instance.")
@click.option("--state", "states", multiple=True, metavar="STATE", help="Only jobs in this state; may be repeated.")
@click.option("--queries", is_flag=True, help="Also those that only look: lists, infos, checks.")
@click.option("--limit", type=int, default=50, show_default=True, help="At most this many, newest first.")
@node_option
@job_options
def jobs_command(
    instance: str | None, states: tuple[str, ...], queries: bool, limit: int, node: str, options: JobOptions
) -> None:
    """List a node's jobs, from its ledger."""
    send_and_show(
        lambda client: client.jobs.job(node, instance, states, queries, limit, job_id=options.job_id),
        options,
        render.jobs,
    )


@click.command(
    "job",
    epilog=examples(
        "hostler job 5e1d2f7c-...", "hostler job 5e1d2f7c-... --history -n n1    every phase, also of old jobs"
    ),
)
@click.argument("job_id", metavar="ID")
@click.option("--history", is_flag=True, help="Ask the node's ledger: phases, attempts, and jobs whose result expired.")
@node_option
@timeout_option
@json_option
def job_command(job_id: str, history: bool, node: str, timeout_s: float | None, as_json: bool) -> None:
    """Show the job ID: state, progress, result or error."""
    if history:
        options = JobOptions(wait=True, timeout_s=timeout_s, job_id=None, as_json=as_json)
        send_and_show(lambda client: client.job_info.job(node, job_id), options, render.job_row)
        return
    from hostler.client import Client

    with Client() as client:
        _show_snapshot(client, job_id, as_json)


def _show_snapshot(client: Client, job_id: str, as_json: bool) -> None:
    snapshot = client.job(job_id).snapshot()
    if as_json:
        output.print_json(render.snapshot(snapshot))
    else:
        render.facts({key: value for key, value in render.snapshot(snapshot).items() if key != "known"})
    if not snapshot.known:
        output.note(f"Nothing is known of it: {UNKNOWN}. The node knows more: hostler job {job_id} --history -n NODE")


@click.command("watch", epilog=examples("hostler watch 5e1d2f7c-...", "hostler watch 5e1d2f7c-... --timeout 60 --json"))
@click.argument("job_id", metavar="ID")
@timeout_option
@json_option
def watch_command(job_id: str, timeout_s: float | None, as_json: bool) -> None:
    """Wait for the job ID with live progress, whoever sent it, and print its result."""
    from hostler.client import Client

    with Client() as client:
        try:
            result = follow(client, client.job(job_id), None, timeout_s)
        except OperationFailed as exc:
            advise(exc, job_id)
            raise
    if as_json:
        output.print_json(result)
    else:
        render.result(result)
