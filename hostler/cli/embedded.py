"""``hostler embedded``: the broker and result store that need no server of their own."""

from __future__ import annotations

from dataclasses import asdict

import click

from hostler.cli import output, render
from hostler.cli.options import examples, json_option


@click.group(
    "embedded", epilog=examples("hostler embedded status", "hostler embedded start", "hostler embedded stop --json")
)
def embedded_command() -> None:
    """The embedded broker below the state folder.

    Used where HOSTLER_BROKER_URL is not set: a Redis or Valkey server on a unix socket, shared by all workers and
    clients of the same HOSTLER_STATE_DIR. It is started when first needed, so these commands are seldom necessary.
    """


@embedded_command.command("status", epilog=examples("hostler embedded status --json"))
@json_option
def status_command(as_json: bool) -> None:
    """Show whether it is needed and whether it answers."""
    _show_status(as_json)


@embedded_command.command("start", epilog=examples("hostler embedded start"))
@json_option
def start_command(as_json: bool) -> None:
    """Start it, unless it runs already."""
    from hostler import embedded
    from hostler.settings import load

    settings = load()
    embedded.ensure(settings)
    if not settings.needs_embedded_server:
        output.note("It is not needed: HOSTLER_BROKER_URL and HOSTLER_RESULT_BACKEND name servers.")
    _show_status(as_json)


@embedded_command.command("stop", epilog=examples("hostler embedded stop"))
@json_option
def stop_command(as_json: bool) -> None:
    """Stop it. Queued jobs and results stay on disk for its next start; guests go on."""
    from hostler import embedded
    from hostler.settings import load

    stopped = embedded.stop(load())
    if as_json:
        output.print_json({"stopped": stopped})
    else:
        click.echo("The embedded broker was stopped." if stopped else "The embedded broker was not running.")


def _show_status(as_json: bool) -> None:
    from hostler import embedded
    from hostler.settings import load

    status = asdict(embedded.status(load()))
    if as_json:
        output.print_json(status)
    else:
        render.facts(status)
