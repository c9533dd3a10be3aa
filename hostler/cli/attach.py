"""``hostler console``: this terminal becomes the guest's, or says how to reach the guest's screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from hostler.cli import output
from hostler.cli.options import JobOptions, examples, json_option, node_option, timeout_option
from hostler.cli.viewers import way_to
from hostler.cli.waiting import run_job


@click.command(
    "console",
    epilog=examples(
        "hostler console web1",
        "hostler console web1 < /dev/null > web1.log    only what the guest prints",
        "hostler console web1 -n n2 --print             how to reach it from elsewhere",
        "hostler console web1 --vnc                     what a viewer needs for its screen",
    ),
)
@click.argument("name")
@node_option
@click.option("--print", "print_only", is_flag=True, help="Print the command that reaches the console, and end.")
@click.option("--vnc", "kind", flag_value="vnc", help="Print how to reach its VNC display, and end.")
@click.option("--spice", "kind", flag_value="spice", help="Likewise its SPICE display.")
@click.option("--until-eof", is_flag=True, help="Without a terminal: end at the end of standard input.")
@timeout_option
@json_option
def console_command(
    *,
    name: str,
    node: str,
    print_only: bool,
    kind: Literal["vnc", "spice"] | None,
    until_eof: bool,
    timeout_s: float | None,
    as_json: bool,
) -> None:
    """Attach to the serial console of the instance NAME, or tell how to reach its screen.

    The escape key is ^] (Ctrl and the closing bracket); it is shown first. A console serves one reader at a time:
    where nothing appears, somebody else may be attached. On another machine than the node, prints the command that
    reaches it. Of a guest without a serial port the display is told. A display's password is never shown.
    """
    from hostler.client import Client

    options = JobOptions(wait=True, timeout_s=timeout_s, job_id=None, as_json=as_json)
    with Client() as client:
        found = run_job(client, client.console.job(node, name, kind), options)
    if as_json:
        output.print_json(found)
    elif kind and found.get("kind") != kind:
        raise click.ClickException(output.clean(way_to(found)))
    elif print_only or not _attached(found, name, until_eof):
        click.echo(output.clean(way_to(found)))


def _attached(found: dict[str, Any], name: str, until_eof: bool) -> bool:
    path = Path(str(found.get("path") or ""))
    if found.get("kind") != "serial":
        return False
    from hostler.console import attach

    try:
        if not path.is_socket():
            return False
        ending = attach(path, name, until_eof=until_eof)
    except OSError as exc:
        raise click.ClickException(f"cannot attach to {path}: {exc.strerror}; try it as root on the node") from exc
    output.note(f"Console of {name}: {ending}.")
    return True
