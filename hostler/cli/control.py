"""Commands that change or explain what becomes of a job."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import click

from hostler.cli import output, render
from hostler.cli.instances import send_and_show
from hostler.cli.options import JobOptions, duration_s, examples, job_options, json_option, node_option
from hostler.contract import worker_name


@click.command(
    "cancel", epilog=examples("hostler cancel 5e1d2f7c-...", "hostler cancel 5e1d2f7c-... -n n1    that node only")
)
@click.argument("job_id", metavar="ID")
@click.option("--node", "-n", metavar="NODE", help="The node that has it. Default: every node is asked.")
@json_option
def cancel_command(job_id: str, node: str | None, as_json: bool) -> None:
    """Cancel the job ID: one that has not begun never will, one that runs gives up and undoes its work.

    The answer says what became of it: revoked, requested (it is giving up), too_late (it will finish) or finished.
    """
    from hostler.client import Client

    with Client() as client:
        answer = client.job(job_id).cancel(node)
    if as_json:
        output.print_json(answer)
    else:
        click.echo(f"{answer['outcome']}: {answer['message']}")
    if answer["outcome"] not in ("revoked", "requested"):
        raise click.exceptions.Exit(1)


@click.command(
    "retry",
    epilog=examples(
        "hostler retry 5e1d2f7c-... -n n1", "hostler retry --failed -n n1 --since 2h    all that can be helped"
    ),
)
@click.argument("failed_id", metavar="ID", required=False)
@click.option("--failed", is_flag=True, help="All failed jobs of the node where a retry can help, instead of one ID.")
@click.option("--since", default="24h", show_default=True, help="With --failed: how far back, as 30m, 2h or 7d.")
@node_option
@job_options
def retry_command(failed_id: str | None, failed: bool, since: str, node: str, options: JobOptions) -> None:
    """Send a failed job again, under a new id that names the one it retries.

    It is refused while the job itself, or an earlier retry of it, has not ended.
    """
    if failed == bool(failed_id):
        raise click.UsageError("give either an ID or --failed")
    after = _time_ago(since) if failed else None
    send_and_show(
        lambda client: client.job_retry.job(node, failed_id, after, job_id=options.job_id), options, _show_retries
    )


def _show_retries(retries: list[dict[str, Any]]) -> None:
    for retry in retries:
        click.echo(f"{retry['id']}  retries {retry['task']} {retry['retry_of']}")
    if not retries:
        click.echo("nothing to retry")


def _time_ago(text: str) -> str:
    try:
        return (datetime.now(UTC) - timedelta(seconds=duration_s(text, "--since"))).isoformat()
    except (OverflowError, ValueError):
        raise click.BadParameter(f"{text!r} is longer ago than time goes", param_hint="--since") from None


@click.command("why", epilog=examples("hostler why 5e1d2f7c-... -n n1"))
@click.argument("job_id", metavar="ID")
@node_option
@json_option
def why_command(job_id: str, node: str, as_json: bool) -> None:
    """Why does the job ID not run? Says what it waits for, since when, and the safe command that resolves it."""
    from hostler.client import Client

    with Client() as client:
        if not client.ping(node):
            _say_that_nobody_is_there(node, as_json)
    options = JobOptions(wait=True, timeout_s=30, job_id=None, as_json=as_json)
    send_and_show(lambda client: client.job_why.job(node, job_id), options, _show_reasons)


def _say_that_nobody_is_there(node: str, as_json: bool) -> None:
    reason = f"node {node} has no live worker ({worker_name(node)} does not answer): nothing that is sent to it runs"
    command = f"hostler worker --node {node}"
    if as_json:
        output.print_json({"state": "PENDING", "because": [reason], "command": command})
    else:
        click.echo(f"{reason}\nOn that host: {command}")
    raise click.exceptions.Exit(1)


def _show_reasons(answer: dict[str, Any]) -> None:
    render.facts({"job": answer["id"], "state": answer["state"]})
    for sentence in answer["because"]:
        click.echo(sentence)
    if answer["command"]:
        click.echo(f"Next: {answer['command']}")
