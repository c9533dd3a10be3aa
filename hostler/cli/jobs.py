"""Commands about jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from hostler.cli import migration_report, output, render
from hostler.cli.advice import advise
from hostler.cli.instances import send_and_show
from hostler.cli.options import JobOptions, duration_s, examples, job_options, json_option, node_option, timeout_option
from hostler.cli.waiting import UNKNOWN, follow
from hostler.errors import OperationFailed

if TYPE_CHECKING:
    from hostler.client import Client


@click.group(
    "jobs",
    invoke_without_command=True,
    epilog=examples(
        "hostler jobs",
        "hostler jobs -n n1 --instance web1",
        "hostler jobs --state FAILURE --state REVOKED --limit 10",
        "hostler jobs prune --dry-run",
    ),
)
@click.option("--instance", metavar="NAME", help="Only jobs of this instance.")
@click.option("--state", "states", multiple=True, metavar="STATE", help="Only jobs in this state; may be repeated.")
@click.option("--queries", is_flag=True, help="Also those that only look: lists, infos, checks.")
@click.option("--limit", type=int, default=50, show_default=True, help="At most this many, newest first.")
@node_option
@job_options
@click.pass_context
def jobs_command(
    context: click.Context,
    /,
    *,
    instance: str | None,
    states: tuple[str, ...],
    queries: bool,
    limit: int,
    node: str,
    options: JobOptions,
) -> None:
    """List a node's jobs, from its ledger; with COMMAND, do something about all of them."""
    if context.invoked_subcommand:
        _refuse_options_before(context)
        return
    send_and_show(
        lambda client: client.jobs.job(node, instance, states, queries, limit, job_id=options.job_id),
        options,
        render.jobs,
    )


def _refuse_options_before(context: click.Context) -> None:
    # Else `hostler jobs -n n1 prune` would prune another node.
    for parameter in context.command.params:
        if context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{parameter.opts[0]} belongs after '{context.invoked_subcommand}'", context)


def _duration(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    return None if value is None else duration_s(value, parameter.opts[0])


@jobs_command.command(
    "prune",
    epilog=examples(
        "hostler jobs prune --dry-run",
        "hostler jobs prune -n n1 --older-than 12h",
        "hostler jobs prune --older-than 7d --failures-older-than 30d --json",
    ),
)
@click.option("--older-than", "older_than_s", metavar="TIME", callback=_duration, help="As 30m, 12h or 7d.")
@click.option(
    "--failures-older-than",
    "failures_older_than_s",
    metavar="TIME",
    callback=_duration,
    help="The same for jobs that failed or were revoked.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@node_option
@job_options
def prune_command(
    older_than_s: int | None, failures_older_than_s: int | None, dry_run: bool, node: str, options: JobOptions
) -> None:
    """Remove jobs that ended long ago from a node's ledger.

    The node does so by itself every hour; by default its settings count here too (HOSTLER_KEEP_JOBS_S,
    HOSTLER_KEEP_FAILURES_S). Jobs that only look are kept for a day at most. What an unfinished job comes after or
    retries stays.
    """
    send_and_show(
        lambda client: client.prune.job(node, older_than_s, failures_older_than_s, dry_run, job_id=options.job_id),
        options,
        _show_pruned,
    )


def _show_pruned(answer: dict[str, Any]) -> None:
    word, number = ("removed", answer["removed"]) if "removed" in answer else ("would remove", answer["would_remove"])
    by_state = ", ".join(f"{count} {state}" for state, count in answer["by_state"].items() if count)
    click.echo(f"{word} {number} jobs" + (f" ({by_state})" if by_state else ""))
    if answer["kept"]:
        click.echo(f"kept {answer['kept']} that are as old: unfinished jobs come after them or retry them")


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
    elif migration_report.is_report(result):
        migration_report.show_result(result)
    else:
        render.result(result)
