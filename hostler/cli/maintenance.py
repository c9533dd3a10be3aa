"""Commands that empty a node of its guests, or give up one whose host is off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from hostler.cli import output, render
from hostler.cli.instances import send_and_show
from hostler.cli.migration import limit_options
from hostler.cli.options import JobOptions, examples, job_options

IT_IS_OFF = "it is off"


def _names(context: click.Context, parameter: click.Parameter, value: str | None) -> list[str]:
    return [name.strip() for name in value.split(",") if name.strip()] if value else []


via_option = click.option("--via", "-n", metavar="NODE", help="The living node to ask. Default: which answers first.")


@click.command(
    "drain",
    epilog=examples(
        "hostler drain n1 --auto                       then: maintenance, then hostler undrain n1",
        "hostler drain n1 --to n2,n3 --bandwidth-mib-s 200 --postcopy if-needed",
        "hostler drain n1 --to n2 --allow-shutdown     what cannot move is asked to shut down",
        "hostler drain n1 --auto --no-wait --json      then: hostler watch ID",
    ),
)
@click.argument("node")
@click.option("--to", "targets", callback=_names, metavar="A,B", help="The nodes that shall take the guests.")
@click.option("--auto", is_flag=True, help="All nodes that can take some.")
@click.option("--allow-shutdown", is_flag=True, help="Ask a guest that cannot be moved to shut down (ACPI).")
@click.option(
    "--parallel", type=int, metavar="N", help="At most so many at once.  [default and most: the node's limit]"
)
@limit_options
@click.option("--auto-converge", is_flag=True, default=None, help="Slow guests down that write too fast.")
@click.option("--postcopy", type=click.Choice(["never", "if-needed", "at-once"]), help="As of hostler migrate.")
@click.option("--copy-storage", type=click.Choice(["none", "full", "top"]), help="Copy the disks too.")
@click.option("--tls/--no-tls", default=None, help="Encrypt what is sent.  [default: where both nodes can]")
@job_options
def drain_command(
    node: str,
    targets: list[str],
    auto: bool,
    allow_shutdown: bool,
    parallel: int | None,
    options: JobOptions,
    **how: Any,
) -> None:
    """Move every guest of NODE to other nodes, and start none there any more.

    The largest first, each to where the most memory is free. A guest that cannot be moved runs on and does not stop the
    others; the job then fails and says what became of each. No guest is powered off without --allow-shutdown. A drain
    that was interrupted, or is sent again, goes on with what is left. The node stays drained: hostler undrain NODE
    """
    if auto == bool(targets):
        raise click.UsageError("give either --to or --auto")
    given = {name: value for name, value in how.items() if value is not None}
    send_and_show(
        lambda client: client.drain.job(
            node,
            targets,
            auto=auto,
            allow_shutdown=allow_shutdown,
            parallel=parallel,
            job_id=options.job_id,
            **given,
        ),
        options,
        _show_drained,
    )


@click.command("undrain", epilog=examples("hostler undrain n1", "hostler undrain n1 --json"))
@click.argument("node")
@job_options
def undrain_command(node: str, options: JobOptions) -> None:
    """Let NODE take guests in again. No guest comes back by itself."""
    send_and_show(
        lambda client: client.undrain.job(node, job_id=options.job_id),
        options,
        lambda result: _say(
            f"{node} takes guests in again; it did not since {result['drained_at']}."
            if result["drained_at"]
            else f"{node} was not drained."
        ),
    )


@click.command(
    "hold",
    epilog=examples(
        'hostler hold n1 --reason "new switch, until 4"     then: the work, then hostler unhold n1',
        "hostler hold n1 --json",
    ),
)
@click.argument("node")
@click.option("--reason", default="", metavar="TEXT", help="Told to whoever asks why a job waits.")
@job_options
def hold_command(node: str, reason: str, options: JobOptions) -> None:
    """Let NODE begin no more jobs that change its guests; they wait, in order, also when its worker is restarted.

    What has begun goes on, and so do its guests, jobs that only look, cancels, and parts of other nodes' migrations.
    """
    send_and_show(
        lambda client: client.hold.job(node, reason, job_id=options.job_id),
        options,
        lambda result: _say(f"{node} holds its jobs back since {result['held_at']}, until: hostler unhold {node}"),
    )


@click.command("unhold", epilog=examples("hostler unhold n1", "hostler unhold n1 --json"))
@click.argument("node")
@job_options
def unhold_command(node: str, options: JobOptions) -> None:
    """Let the jobs go that NODE held back."""
    send_and_show(
        lambda client: client.unhold.job(node, job_id=options.job_id),
        options,
        lambda result: _say(
            f"{node} begins jobs again; {result['jobs']} waited, since {result['held_at']} at the longest."
            if result["held_at"]
            else f"{node} held no jobs back."
        ),
    )


@click.command(
    "fence",
    epilog=examples(
        "hostler fence n1 --yes-it-is-off                       then: hostler start n2 web1.yaml",
        "hostler fence n1 --yes-it-is-off --restart-on n2,n3    those that were wanted running",
        "hostler fence n1 --yes-it-is-off --json",
    ),
)
@click.argument("node")
@click.option("--yes-it-is-off", "off", is_flag=True, help="You made sure that the host has no power.")
@click.option("--restart-on", callback=_names, metavar="A,B", help="Start its guests there, largest first.")
@via_option
@job_options
def fence_command(node: str, off: bool, restart_on: list[str], via: str | None, options: JobOptions) -> None:
    """Give up NODE, whose host is off, so that its guests can be started on other nodes.

    Make sure first that it is off, and stays so: a guest that ran on two hosts would destroy its disks. Refused while
    the node's worker lives. Afterwards no worker starts there, until the host was booted, or: hostler unfence NODE
    """
    if not off:
        raise click.UsageError(f"make sure that the host of {node} has no power, then say so: --yes-it-is-off")
    send_and_show(
        lambda client: client.fence.job(
            via or client.living_node(), node, IT_IS_OFF, restart_on, job_id=options.job_id
        ),
        options,
        _show_fenced,
    )


@click.command("unfence", epilog=examples("hostler unfence n1", "hostler unfence n1 -n n2 --json"))
@click.argument("node")
@via_option
@job_options
def unfence_command(node: str, via: str | None, options: JobOptions) -> None:
    """Let NODE, which was fenced, have a worker again.

    Only when no QEMU of it is left there: its guests may run elsewhere by now. Not needed for a host that was booted
    since, whose worker sees that by itself.
    """
    send_and_show(
        lambda client: client.unfence.job(via or client.living_node(), node, job_id=options.job_id),
        options,
        lambda result: _say(f"{node} may have a worker again." if result["fenced_at"] else f"{node} was not fenced."),
    )


def _show_drained(result: Mapping[str, Any]) -> None:
    render.verdicts(result["verdicts"])
    _say(f"{result['node']} has no guest left, and takes none in until: hostler undrain {result['node']}")


def _show_fenced(result: Mapping[str, Any]) -> None:
    render.verdicts(result["guests"])
    _say(f"{result['node']} is fenced since {result['fenced_at']}; {result['jobs']} job(s) of it were ended.")


def _say(text: str) -> None:
    output.out().print(output.clean(text), markup=False, soft_wrap=True)
