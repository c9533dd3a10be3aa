"""Commands that ask a node about instances and change nothing."""

from __future__ import annotations

import click

from hostler.cli import render
from hostler.cli.exits import Exit
from hostler.cli.instances import send_and_show
from hostler.cli.options import JobOptions, examples, job_options, node_option


@click.command("info", epilog=examples("hostler info web1", "hostler info web1 -n n1 --json"))
@click.argument("name")
@node_option
@job_options
def info_command(name: str, node: str, options: JobOptions) -> None:
    """Show everything about the instance NAME."""
    send_and_show(lambda client: client.info.job(node, name, job_id=options.job_id), options, render.facts)


@click.command("list", epilog=examples("hostler list", "hostler list -n n1 --json"))
@node_option
@job_options
def list_command(node: str, options: JobOptions) -> None:
    """List the instances of a node."""
    send_and_show(lambda client: client.list.job(node, job_id=options.job_id), options, render.instances)


@click.command("check", epilog=examples("hostler check n1 web1.yaml", "hostler check n1 - --json < web1.json"))
@click.argument("node")
@click.argument("file")
@job_options
def check_command(node: str, file: str, options: JobOptions) -> None:
    """Would NODE start the instance in FILE? Starts nothing.

    Checks the syntax here, then on the node what only the node can know: files, bridges, memory, QEMU. Exit status 1
    if the node would not start it.
    """
    from hostler.instance_file import load

    instance = load(file)
    report = send_and_show(
        lambda client: client.check.job(node, instance, job_id=options.job_id), options, render.check
    )
    if report.get("errors"):
        raise click.exceptions.Exit(Exit.JOB_FAILED)
