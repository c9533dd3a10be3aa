"""Commands that move a running guest to another node."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from hostler.cli import migration_plot, migration_report, output, render
from hostler.cli.exits import Exit
from hostler.cli.instances import send_and_show
from hostler.cli.options import JobOptions, examples, job_options, node_option

Command = TypeVar("Command", bound=Callable[..., Any])

_LIMITS = (
    click.option("--bandwidth-mib-s", type=float, metavar="MIB", help="At most this much a second; 0 is no limit."),
    click.option(
        "--downtime-ms", type=int, metavar="MS", help="Aim at this: the guest stands still so long at its end."
    ),
    click.option(
        "--downtime-max-ms", type=int, metavar="MS", help="Let it grow up to this where the guest writes much."
    ),
    click.option(
        "--deadline-s", type=float, metavar="SECONDS", help="Default: 150 s per GiB of memory, at least 60 s."
    ),
    click.option(
        "--on-deadline",
        type=click.Choice(["abort", "force", "postcopy"]),
        help="Then: give up (the default), pause the guest until it has moved, or switch to post-copy.",
    ),
)


def limit_options(command: Command) -> Command:
    """Add the limits of a migration, which can be changed under way too."""
    for option in reversed(_LIMITS):
        command = option(command)
    return command


@click.command(
    "migrate",
    epilog=examples(
        "hostler migrate web1 --to n2",
        "hostler migrate web1 --to n2 --dry-run                   how long would it take?",
        "hostler migrate web1 --to n2 --bandwidth-mib-s 200 --downtime-ms 50 --downtime-max-ms 500",
        "hostler migrate web1 --to n2 --postcopy if-needed        it always ends, whatever the guest writes",
        "hostler migrate web1 --to n2 --copy-storage full         no storage is shared",
        "hostler migrate web1 -n n1 --to n2 --no-wait --json      then: hostler watch ID",
    ),
)
@click.argument("name")
@click.option("--to", "target", required=True, metavar="NODE", help="The node it shall move to.")
@click.option("--live/--non-live", default=None, help="non-live: paused while it moves.  [default: live]")
@limit_options
@click.option("--auto-converge", is_flag=True, default=None, help="Slow the guest down where it writes too fast.")
@click.option("--xbzrle", is_flag=True, default=None, help="Send only what changed within a page.")
@click.option("--compression", type=click.Choice(["none", "zlib", "zstd"]), help="Of the channels.")
@click.option("--multifd-channels", type=int, metavar="N", help="Send on so many connections at once: 2 to 16.")
@click.option(
    "--postcopy",
    type=click.Choice(["never", "if-needed", "at-once"]),
    help="Let the guest run on the target while the rest of its memory follows; it waits should the network break.",
)
@click.option(
    "--copy-storage", type=click.Choice(["none", "full", "top"]), help="Copy its disks too: whole, or the topmost file."
)
@click.option("--tls/--no-tls", default=None, help="Encrypt what is sent.  [default: where both nodes can]")
@click.option("--dry-run", is_flag=True, default=None, help="Move nothing: watch what the guest writes, and predict.")
@node_option
@job_options
def migrate_command(name: str, target: str, node: str, options: JobOptions, **how: Any) -> None:
    """Move the instance NAME from its node (-n) to another one while it runs.

    It runs on exactly one of both nodes all the time, whatever breaks on the way; where it is afterwards, and how it
    went, is printed. Both nodes need to see its disks under the same paths, or --copy-storage.
    """
    send_and_show(
        lambda client: client.migrate.job(node, name, target, job_id=options.job_id, **_given(how)),
        options,
        migration_report.show_result,
    )


@click.command(
    "migrate-cancel", epilog=examples("hostler migrate-cancel web1 -n n1", "hostler migrate-cancel web1 --json")
)
@click.argument("name")
@node_option
@job_options
def migrate_cancel_command(name: str, node: str, options: JobOptions) -> None:
    """Give up the migration of the instance NAME, which then runs on where it was.

    The node (-n) is the one that it leaves. Once it is being switched over, it is too late.
    """
    answer = send_and_show(
        lambda client: client.migrate_cancel.job(node, name, job_id=options.job_id), options, _show_outcome
    )
    if answer["outcome"] not in ("revoked", "requested"):
        raise click.exceptions.Exit(Exit.JOB_FAILED)


@click.command(
    "migrate-tune",
    epilog=examples(
        "hostler migrate-tune web1 -n n1 --bandwidth-mib-s 0      no limit any more",
        "hostler migrate-tune web1 --downtime-max-ms 2000 --deadline-s 600",
        "hostler migrate-tune web1 --postcopy-now                 it needs --postcopy, or --on-deadline postcopy",
    ),
)
@click.argument("name")
@limit_options
@click.option("--postcopy-now", is_flag=True, default=None, help="Let it run on the target now; its memory follows.")
@click.option("--force-now", is_flag=True, default=None, help="Pause it now, so that it has moved soon.")
@node_option
@job_options
def migrate_tune_command(name: str, node: str, options: JobOptions, **changes: Any) -> None:
    """Change the limits of the migration that the instance NAME is in.

    The node (-n) is the one that it leaves.
    """
    send_and_show(
        lambda client: client.migrate_tune.job(node, name, job_id=options.job_id, **_given(changes)),
        options,
        _show_tuned,
    )


@click.command(
    "migration-report",
    epilog=examples(
        "hostler migration-report 5e1d2f7c-...",
        "hostler migration-report 5e1d2f7c-... --plot web1.png",
        "hostler migration-report 5e1d2f7c-... -n n2 --json       with every look at it",
    ),
)
@click.argument("migration_id", metavar="ID")
@click.option(
    "--plot", "file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Draw it: .png, .svg."
)
@node_option
@job_options
def migration_report_command(migration_id: str, file: Path | None, node: str, options: JobOptions) -> None:
    """Say how the migration with the job ID went, or goes: times, standstill, bytes, what was decided and why.

    Every node of the same database knows it. --plot needs: pip install 'hostler[plot]'
    """
    if file:
        migration_plot.require_plotting(file)
    document = send_and_show(
        lambda client: client.migration_report.job(node, migration_id, job_id=options.job_id),
        options,
        migration_report.show_stored,
    )
    if file:
        migration_plot.plot(document, file)
        output.note(f"drawn: {file}")


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _show_outcome(answer: Mapping[str, Any]) -> None:
    output.out().print(output.clean(f"{answer['outcome']}: {answer['message']}"), markup=False, soft_wrap=True)


def _show_tuned(answer: Mapping[str, Any]) -> None:
    render.facts({"migration": answer["job"], "instance": answer["name"], **answer["changed"]})
