"""The command that shows where a node's database and its host disagree, and has that repaired."""

from __future__ import annotations

import shlex
from typing import Any

import click

from hostler.cli import output, render
from hostler.cli.exits import Exit
from hostler.cli.instances import send_and_show
from hostler.cli.options import JobOptions, examples, job_options, node_option
from hostler.contract import TaskName


@click.command(
    "audit",
    epilog=examples(
        "hostler audit -n n1                                      look; changes nothing",
        "hostler audit -n n1 --repair-all                         what would be repaired",
        "hostler audit -n n1 --repair-all --yes                   repair it",
        "hostler audit -n n1 --repair folder:0f3c9a1e-... --yes   repair this one",
    ),
)
@node_option
@click.option("--repair", "ids", metavar="ID", multiple=True, help="Repair the finding ID; may be given several times.")
@click.option("--repair-all", is_flag=True, help="Repair every finding that can be, except those that end a process.")
@click.option("--yes", is_flag=True, help="Really repair. Without it only what would be done is shown.")
@job_options
def audit_command(node: str, ids: tuple[str, ...], repair_all: bool, yes: bool, options: JobOptions) -> None:
    """Compare a node's database with its host.

    Shows what leaked, what is missing and what is stuck, with what was seen and how it is repaired. What jobs are at
    work on is left out. Exit status 1 if anything was found, or left unrepaired.
    """
    if ids and repair_all:
        raise click.UsageError("give either --repair or --repair-all")
    if yes and not (ids or repair_all):
        raise click.UsageError("--yes goes with --repair or --repair-all")
    if ids or repair_all:
        report = send_and_show(
            lambda client: client.repair.job(node, ids, dry_run=not yes, job_id=options.job_id), options, _show_report
        )
        open_ones = report["left"] + report["would_do"]
    else:
        open_ones = send_and_show(
            lambda client: client.audit.job(node, job_id=options.job_id), options, _show_audit
        )["findings"]  # fmt: skip
    if open_ones:
        raise click.exceptions.Exit(Exit.JOB_FAILED)


def _show_audit(result: dict[str, Any]) -> None:
    for finding in result["findings"]:
        render.facts(
            {
                "finding": finding["id"],
                "instance": finding["instance"],
                "what": finding["explanation"],
                "seen": ", ".join(f"{key} {value}" for key, value in finding["evidence"].items() if value is not None),
                "repair": repair_command(result["node"], finding) or "none by hostler, see above",
            }
        )
        output.out().print()
    checked = ", ".join(f"{number} {what.replace('_', ' ')}" for what, number in result["checked"].items())
    found = f"{len(result['findings'])} finding(s)" if result["findings"] else "Database and host agree"
    output.out().print(output.clean(f"{found} on {result['node']}. Compared: {checked}."), markup=False)
    if busy := result["in_motion"]:
        output.note(f"Left out, because jobs are at work on them: {', '.join(busy)}")


def repair_command(node: str, finding: dict[str, Any]) -> str:
    """What a person types to have a finding repaired; empty where nothing does."""
    repair = finding["repair"]
    if repair is None:
        return ""
    if repair["task"] == TaskName.INSTANCE_CLEANUP:
        return f"hostler cleanup {repair['arguments']['name']} -n {node}"
    return f"hostler audit -n {node} --repair {shlex.quote(finding['id'])} --yes"


def _show_report(report: dict[str, Any]) -> None:
    for title, key, text in (
        ("repaired", "done", "what"),
        ("would repair", "would_do", "what"),
        ("left", "left", "why"),
    ):
        for item in report[key]:
            output.out().print(output.clean(f"{title} {item['id']}: {item[text]}"), markup=False, soft_wrap=True)
    if report["would_do"]:
        output.note("Nothing was done yet. Add --yes to repair.")
    elif not report["done"] and not report["left"]:
        output.out().print("Nothing to repair.")
