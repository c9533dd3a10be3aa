"""Commands about one node's host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import click

from hostler.cli import output, render
from hostler.cli.exits import Exit
from hostler.cli.instances import send_and_show
from hostler.cli.options import JobOptions, examples, job_options, node_option


@click.group(
    "node",
    epilog=examples(
        "hostler node info -n n1", "hostler node verify -n n1 --json", "hostler node powercycle -n n1 --confirm n1"
    ),
)
def node_command() -> None:
    """Look at a node's host, check it, or reboot it."""


@node_command.command("info", epilog=examples("hostler node info", "hostler node info -n n1 --json"))
@node_option
@job_options
def info_command(node: str, options: JobOptions) -> None:
    """Show what the host has: memory, processors, QEMU, KVM, load, free space, guests."""
    send_and_show(lambda client: client.node_info.job(node, job_id=options.job_id), options, _show_info)


@node_command.command("verify", epilog=examples("hostler node verify", "hostler node verify -n n1 --json"))
@node_option
@job_options
def verify_command(node: str, options: JobOptions) -> None:
    """Check all that a node needs, and say what to do.

    Shows every problem at once: QEMU, KVM, taps, bridges of its instances, network scripts, folders, database, broker,
    clock. Errors keep the node from its work; with warnings it works with less. Exit status 1 if there are errors.

    hostler doctor looks at this host without a worker.
    """
    report = send_and_show(
        lambda client: client.verify.job(node, job_id=options.job_id), options, _show_problems
    )  # fmt: skip
    if report["errors"]:
        raise click.exceptions.Exit(Exit.JOB_FAILED)


@node_command.command(
    "powercycle",
    epilog=examples(
        "hostler node powercycle -n n1                 asks for the name once more",
        "hostler node powercycle -n n1 --confirm n1    --json",
    ),
)
@click.option("--confirm", metavar="NAME", help="The node's name once more, instead of being asked for it.")
@node_option
@job_options
def powercycle_command(node: str, confirm: str | None, options: JobOptions) -> None:
    """Reboot a node's host at once, as its reset button does.

    Nothing is shut down: the power of every guest there is cut. For a host that cannot be rebooted in good order any
    more. The node has to allow it (HOSTLER_ALLOW_POWERCYCLE=true), and its worker to live.
    """
    if confirm is not None:
        _same(node, confirm)
    # The answer shows that the worker lives. A job that waited for one would reboot the host again that somebody
    # reset by hand meanwhile; with the boot id it would not.
    facts = send_and_show(
        lambda client: client.node_info.job(node), replace(options, wait=True, as_json=False), lambda _: None
    )
    if confirm is None:
        output.note(_at_stake(facts), style="yellow")
        confirm = _same(node, click.prompt("Type the node's name to reboot it now", err=True))
    send_and_show(
        lambda client: client.powercycle.job(node, confirm, facts.get("boot_id"), job_id=options.job_id),
        options,
        lambda _: output.out().print(f"{node} reboots now.", markup=False),
    )


def _same(node: str, confirm: str) -> str:
    if confirm != node:
        raise click.BadParameter(f"{confirm!r} is not {node!r}; nothing was done", param_hint="--confirm")
    return confirm


def _at_stake(facts: Mapping[str, Any]) -> str:
    guests = ", ".join(f"{number} {state}" for state, number in sorted(facts["instances"].items())) or "none"
    up = timedelta(seconds=facts["uptime_s"])
    return f"{facts['node']} is the host {facts['host']}, up for {up}. Its guests, whose power is cut: {guests}."


def _show_info(facts: dict[str, Any]) -> None:
    render.facts(
        facts
        | {
            "numa_nodes": "; ".join(
                f"{each['node']}: {each['memory_total_mib']} MiB, {each['memory_free_mib']} free, CPUs {each['cpus']}"
                for each in facts["numa_nodes"]
            ),
            "hugepages": "; ".join(
                f"{each['size_kib']} KiB: {each['total']}, {each['free']} free" for each in facts["hugepages"]
            ),
            "instances": ", ".join(f"{number} {state}" for state, number in sorted(facts["instances"].items())),
        }
    )


def _show_problems(report: dict[str, Any]) -> None:
    for kind, style in (("errors", "bold red"), ("warnings", "yellow")):
        for item in report[kind]:
            text = output.clean(f"{kind[:-1]}: {item['subject']}: {item['what']}")
            output.out().print(text, style=style, markup=False, soft_wrap=True)
            if item["what_to_do"]:
                output.out().print(output.clean(f"  -> {item['what_to_do']}"), markup=False, soft_wrap=True)
    counted = f"{len(report['errors'])} error(s), {len(report['warnings'])} warning(s)"
    output.out().print(
        output.clean(f"{report['node']}: {counted}. Checked: {', '.join(report['checked'])}."), markup=False
    )
