"""``hostler doctor`` for people and for programs."""

from __future__ import annotations

from dataclasses import asdict

import click
from rich.table import Table
from rich.text import Text

from hostler.cli import output
from worker.doctor.check import Check, Status
from worker.doctor.checks import run_all

_STYLES: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, for programs.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check what this host needs to run guests, and say how to get what is missing.

    Looks at QEMU, at KVM by booting something under it, at taps, rights, folders and free space, and connects to
    broker, results and database as the HOSTLER_* settings name them. An embedded broker is started if it does not run.

    Exit status: 0 if nothing failed (warnings are no failures), else 1.
    """
    checks = list(run_all())
    ok = all(check.status != "fail" for check in checks)
    if as_json:
        output.print_json({"ok": ok, "checks": [asdict(check) for check in checks]})
    else:
        _print(checks)
    ctx.exit(0 if ok else 1)


def _print(checks: list[Check]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for column in ("status", "name"):
        table.add_column(column, no_wrap=True)
    table.add_column("finding", overflow="fold")
    for check in checks:
        table.add_row(Text(check.status, _STYLES[check.status]), check.name, Text(output.clean(check.detail)))
        if check.fix:
            table.add_row("", "", Text(f"-> {output.clean(check.fix)}", "cyan"))
    output.out().print(table)
    click.echo(f"\n{_summary(checks)}")


def _summary(checks: list[Check]) -> str:
    failed = [check.name for check in checks if check.status == "fail"]
    warned = [check.name for check in checks if check.status == "warn"]
    if failed:
        return f"This host cannot run a node yet: {', '.join(failed)}."
    limits = f", with limits: {', '.join(warned)}" if warned else ""
    return f"This host can run a node{limits}."
