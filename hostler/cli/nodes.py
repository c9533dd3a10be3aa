"""The command about nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from hostler.cli import render
from hostler.cli.instances import send_and_show
from hostler.cli.options import JobOptions, examples, job_options

if TYPE_CHECKING:
    from hostler.client import Client
    from hostler.job_request import JobRequest


@click.command("nodes", epilog=examples("hostler nodes", "hostler nodes -n n1 --json    as n1's database has them"))
@click.option("--node", "-n", metavar="NODE", help="The node to ask. Default: whichever answers first.")
@job_options
def nodes_command(node: str | None, options: JobOptions) -> None:
    """List all nodes: worker, guests, open jobs, drained, holding its jobs back, or fenced.

    SINCE is when a living worker started, or when an absent one gave its last sign of life. Guests run on without a
    worker; they are shown as last recorded.
    """

    def build(client: Client) -> JobRequest:
        return client.node_list.job(node or client.living_node(), job_id=options.job_id)

    send_and_show(build, options, _show)


def _show(nodes: list[dict[str, Any]]) -> None:
    render.nodes([
        node | {"since_at": node["since"], "instances": _counted(node["instances"]), "marks": _marks(node)}
        for node in nodes
    ])  # fmt: skip


def _marks(node: dict[str, Any]) -> str:
    return ", ".join(word for word in ("drained", "held", "fenced") if node.get(f"{word}_at"))


def _counted(instances: dict[str, int]) -> str:
    return ", ".join(f"{number} {state}" for state, number in sorted(instances.items()))
