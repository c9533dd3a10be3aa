"""The commands about what keeps guests apart: ``hostler uid-pool`` and ``hostler quarantine``."""

from __future__ import annotations

from typing import Any

import click

from hostler.cli import output, render
from hostler.cli.instances import send_and_show
from hostler.cli.options import JobOptions, examples, job_options, node_option


@click.group(
    "uid-pool",
    epilog=examples(
        "hostler uid-pool add 20000-20099 -n n1",
        "hostler uid-pool show -n n1 --json",
        "hostler uid-pool remove 20000-20099 -n n1",
    ),
)
def uid_pool_command() -> None:
    """Show and change a node's uids for guests.

    A guest with the hypervisor parameter security_model=pool runs under a uid of this pool, which no other guest and no
    process of the host has. The uids need no logins.
    """


@uid_pool_command.command("show")
@node_option
@click.option("--history", is_flag=True, help="Also show uids that are free again, and who had each last.")
@job_options
def show(node: str, history: bool, options: JobOptions) -> None:
    """Show the ranges, and which guest has which uid."""
    send_and_show(lambda client: client.uid_pool_show.job(node, history, job_id=options.job_id), options, _show_pool)


@uid_pool_command.command("add")
@click.argument("ranges")
@node_option
@click.option("--force", is_flag=True, help="Also uids below 1000 and nobody, which services of the host may have.")
@job_options
def add(ranges: str, node: str, force: bool, options: JobOptions) -> None:
    """Add RANGES, such as 20000-20099,20200."""
    send_and_show(
        lambda client: client.uid_pool_add.job(node, ranges, force, job_id=options.job_id), options, _show_pool
    )


@uid_pool_command.command("remove")
@click.argument("ranges")
@node_option
@job_options
def remove(ranges: str, node: str, options: JobOptions) -> None:
    """Take RANGES out, each as it was added. Guests keep the uids they have until they end."""
    send_and_show(lambda client: client.uid_pool_remove.job(node, ranges, job_id=options.job_id), options, _show_pool)


@click.group(
    "quarantine",
    epilog=examples("hostler quarantine list -n n1 --json", "hostler quarantine release NAME -n n1    delete it"),
)
def quarantine_command() -> None:
    """Show and delete what QEMUs left in their chroots.

    Nothing should ever be in there: QEMU has no reason to write a file. What is found may mean that a guest broke out
    of its QEMU. It is kept as a tar archive below the node's state folder; look at it there before you release it.
    """


@quarantine_command.command("list")
@node_option
@job_options
def list_items(node: str, options: JobOptions) -> None:
    """List what was put aside."""
    send_and_show(lambda client: client.quarantine_list.job(node, job_id=options.job_id), options, _show_quarantine)


@quarantine_command.command("release")
@click.argument("names", nargs=-1, required=True)
@node_option
@job_options
def release(names: tuple[str, ...], node: str, options: JobOptions) -> None:
    """Delete items by NAME."""
    send_and_show(
        lambda client: client.quarantine_release.job(node, names, job_id=options.job_id), options, _show_released
    )


def _show_pool(pool: dict[str, Any]) -> None:
    ranges = f"{pool['ranges']} ({pool['size']} uids, {pool['free']} free)" if pool["size"] else "none"
    output.out().print(output.clean(f"Uids for guests on {pool['node']}: {ranges}"), markup=False)
    if pool["leases"]:
        render.uid_leases(pool["leases"])


def _show_quarantine(found: dict[str, Any]) -> None:
    render.quarantine(found["items"])


def _show_released(result: dict[str, Any]) -> None:
    for name in result["released"]:
        output.out().print(output.clean(f"Deleted {name}."), markup=False)
