"""Commands about the content of an instance's disks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import click

from hostler.cli import output, render
from hostler.cli.instances import send_and_show
from hostler.cli.options import JobOptions, examples, job_options, node_option


@click.group(
    "snapshot",
    epilog=examples(
        "hostler snapshot create web1 before-upgrade",
        "hostler snapshot list web1 --json",
        "hostler snapshot revert web1 before-upgrade    of a stopped instance",
        "hostler snapshot delete web1 before-upgrade    keep what was written since",
    ),
)
def snapshot_command() -> None:
    """Keep an instance's disks as they are at a moment, return to it, or give it up.

    What is written after a snapshot goes to new files beside the disks; hostler notes them as the instance's disks.
    """


@snapshot_command.command("create", epilog=examples("hostler snapshot create web1 before-upgrade"))
@click.argument("name")
@click.argument("snapshot")
@node_option
@job_options
def create_command(name: str, snapshot: str, node: str, options: JobOptions) -> None:
    """Take a snapshot called SNAPSHOT of the instance NAME, whether it runs or not."""
    send_and_show(
        lambda client: client.snapshot_create.job(node, name, snapshot, job_id=options.job_id), options, _show
    )


@snapshot_command.command("list", epilog=examples("hostler snapshot list web1"))
@click.argument("name")
@node_option
@job_options
def list_command(name: str, node: str, options: JobOptions) -> None:
    """List the snapshots of the instance NAME, the oldest first."""
    send_and_show(lambda client: client.snapshot_list.job(node, name, job_id=options.job_id), options, _show_all)


@snapshot_command.command("revert", epilog=examples("hostler snapshot revert web1 before-upgrade"))
@click.argument("name")
@click.argument("snapshot")
@node_option
@job_options
def revert_command(name: str, snapshot: str, node: str, options: JobOptions) -> None:
    """Discard what the stopped instance NAME wrote since SNAPSHOT, its latest one. The snapshot stays."""
    send_and_show(
        lambda client: client.snapshot_revert.job(node, name, snapshot, job_id=options.job_id), options, _show
    )


@snapshot_command.command("delete", epilog=examples("hostler snapshot delete web1 before-upgrade"))
@click.argument("name")
@click.argument("snapshot")
@node_option
@job_options
def delete_command(name: str, snapshot: str, node: str, options: JobOptions) -> None:
    """Give SNAPSHOT up. What the instance NAME wrote since is merged into its files; it may run meanwhile."""
    send_and_show(
        lambda client: client.snapshot_delete.job(node, name, snapshot, job_id=options.job_id), options, _show
    )


@click.command(
    "backup",
    epilog=examples(
        "hostler backup web1 --to /srv/backup/monday",
        "hostler backup web1 --to /srv/backup/monday --format raw --json",
    ),
)
@click.argument("name")
@click.option("--to", "folder", required=True, metavar="DIR", help="A folder of the node. Nothing is overwritten.")
@click.option(
    "--format", type=click.Choice(["qcow2", "raw"]), default="qcow2", show_default=True, help="Of the copies."
)
@node_option
@job_options
def backup_command(name: str, folder: str, format: Literal["raw", "qcow2"], node: str, options: JobOptions) -> None:
    """Copy all disks of the instance NAME, as they are at one moment, while it goes on."""
    send_and_show(
        lambda client: client.backup.job(node, name, folder, format=format, job_id=options.job_id),
        options,
        _show_backup,
    )


def _show(result: Mapping[str, Any]) -> None:
    text = f"snapshot {result['snapshot']} of {result['name']} is {result['state']}; its disks:"
    output.out().print(output.clean(text), markup=False, soft_wrap=True)
    for disk in result["disks"]:
        output.out().print(output.clean(f"  {disk['path']}"), markup=False, soft_wrap=True)


def _show_all(results: Sequence[Mapping[str, Any]]) -> None:
    if not results:
        output.out().print("No snapshots.")
    for result in results:
        files = ", ".join(Path(disk["base"]).name for disk in result["disks"])
        render.facts(
            {key: result[key] for key in ("snapshot", "state", "created_at")} | {"kept in": files}
        )  # fmt: skip


def _show_backup(result: Mapping[str, Any]) -> None:
    for file in result["files"]:
        mib = file["allocated_bytes"] / 2**20
        text = f"{file['disk']} -> {file['path']} ({mib:.1f} MiB, {result['how']})"
        output.out().print(output.clean(text), markup=False, soft_wrap=True)
