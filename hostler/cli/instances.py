"""Commands that change an instance."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import click

from hostler.cli import output, render
from hostler.cli.options import JobOptions, examples, job_options, node_option
from hostler.cli.waiting import run_job

if TYPE_CHECKING:
    from hostler.client import Client
    from hostler.job_request import JobRequest

guest_timeout_option = click.option(
    "--guest-timeout",
    "guest_timeout_s",
    type=float,
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="How long the guest may take to shut down.",
)


def send_and_show(
    build: Callable[[Client], JobRequest], options: JobOptions, show: Callable[[Any], None] = render.summary
) -> Any:
    """Send the job that ``build`` makes, wait as ``options`` say, print its result and return it."""
    from hostler.client import Client

    with Client() as client:
        result = run_job(client, build(client), options)
    if options.as_json:
        output.print_json(result)
    else:
        show(result)
    return result


@click.command(
    "start",
    epilog=examples(
        "hostler start n1 web1.yaml",
        "hostler start n1 web1.yaml --paused       then: hostler resume web1 -n n1",
        "generate-instance web1 | hostler start n1 - --json",
    ),
)
@click.argument("node")
@click.argument("file")
@click.option("--paused", is_flag=True, help="Build the guest and leave it before its first instruction.")
@job_options
def start_command(node: str, file: str, paused: bool, options: JobOptions) -> None:
    """Start the instance described in FILE on NODE.

    FILE is YAML or JSON; - is standard input. The smallest one:

    \b
      name: web1
      memory_mib: 512
      disks: [{path: /srv/web1.raw}]

    Unknown keys are refused; hostler check tells whether the node would start it.
    """
    from hostler.instance_file import load

    instance = load(file)
    send_and_show(lambda client: client.start.job(node, instance, paused=paused, job_id=options.job_id), options)


@click.command(
    "stop",
    epilog=examples(
        "hostler stop web1",
        "hostler stop web1 --guest-timeout 300 --on-timeout fail    never kill it",
        "hostler stop web1 --force                                  kill it now",
    ),
)
@click.argument("name")
@click.option("--force", is_flag=True, help="Kill the guest at once, as if its power cord were pulled.")
@guest_timeout_option
@click.option(
    "--on-timeout",
    type=click.Choice(["force", "fail"]),
    default="force",
    show_default=True,
    help="Kill a guest that does not shut down in time, or let the job fail.",
)
@node_option
@job_options
def stop_command(
    *,
    name: str,
    node: str,
    force: bool,
    guest_timeout_s: float,
    on_timeout: Literal["force", "fail"],
    options: JobOptions,
) -> None:
    """Stop the instance NAME: ask the guest to shut down (ACPI), and kill it if it does not."""
    send_and_show(
        lambda client: client.stop.job(
            node,
            name,
            force=force,
            timeout_s=guest_timeout_s,
            on_timeout=on_timeout,
            job_id=options.job_id,
        ),
        options,
    )


@click.command(
    "reboot", epilog=examples("hostler reboot web1", "hostler reboot web1 --mode reset    as by its reset button")
)
@click.argument("name")
@click.option(
    "--mode",
    type=click.Choice(["soft", "hard", "reset"]),
    default="soft",
    show_default=True,
    help="soft: shut down, then start with the saved hardware. hard: kill, then start. reset: the reset line.",
)
@guest_timeout_option
@node_option
@job_options
def reboot_command(
    name: str, node: str, mode: Literal["soft", "hard", "reset"], guest_timeout_s: float, options: JobOptions
) -> None:
    """Reboot the instance NAME."""
    send_and_show(lambda client: client.reboot.job(node, name, mode, guest_timeout_s, job_id=options.job_id), options)


@click.command("pause", epilog=examples("hostler pause web1", "hostler pause web1 -n n1"))
@click.argument("name")
@node_option
@job_options
def pause_command(name: str, node: str, options: JobOptions) -> None:
    """Halt the processors of the instance NAME; its memory stays."""
    send_and_show(lambda client: client.pause.job(node, name, job_id=options.job_id), options)


@click.command("resume", epilog=examples("hostler resume web1"))
@click.argument("name")
@node_option
@job_options
def resume_command(name: str, node: str, options: JobOptions) -> None:
    """Let the paused instance NAME go on."""
    send_and_show(lambda client: client.resume.job(node, name, job_id=options.job_id), options)


@click.command("cleanup", epilog=examples("hostler cleanup web1", "hostler cleanup web1 --json"))
@click.argument("name")
@node_option
@job_options
def cleanup_command(name: str, node: str, options: JobOptions) -> None:
    """Remove what the instance NAME left on the node.

    Only for an instance that does not run. Prints what was removed, released or put into quarantine.
    """
    send_and_show(lambda client: client.cleanup.job(node, name, job_id=options.job_id), options, render.result)
