"""``hostler console``: this terminal becomes the guest's."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from hostler.cli import output
from hostler.cli.options import JobOptions, examples, json_option, node_option, timeout_option
from hostler.cli.waiting import run_job


@click.command(
    "console",
    epilog=examples(
        "hostler console web1",
        "hostler console web1 < /dev/null > web1.log    only what the guest prints",
        "hostler console web1 -n n2 --print             how to reach it from elsewhere",
    ),
)
@click.argument("name")
@node_option
@click.option("--print", "print_only", is_flag=True, help="Print the command that reaches the console, and end.")
@click.option("--until-eof", is_flag=True, help="Without a terminal: end at the end of standard input.")
@timeout_option
@json_option
def console_command(
    *, name: str, node: str, print_only: bool, until_eof: bool, timeout_s: float | None, as_json: bool
) -> None:
    """Attach to the serial console of the instance NAME.

    The escape key is ^] (Ctrl and the closing bracket); it is shown first. A console serves one reader at a time:
    where nothing appears, somebody else may be attached. On another machine than the node, prints the command that
    reaches it.
    """
    from hostler.client import Client

    options = JobOptions(wait=True, timeout_s=timeout_s, job_id=None, as_json=as_json)
    with Client() as client:
        found = run_job(client, client.console.job(node, name), options)
    if as_json:
        output.print_json(found)
    elif print_only or not _attached(found, name, until_eof):
        click.echo(output.clean(_way(found)))


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


def _way(found: dict[str, Any]) -> str:
    host = found.get("host", "")
    match found.get("kind"):
        case "serial":
            return shlex.join(["ssh", "-t", str(host), shlex.join(found["command"])])
        case "vnc":
            address = f"{host}:{found.get('port')}"
            return f"VNC: {found.get('path') or address}"
        case _:
            return str(found.get("message", found))
