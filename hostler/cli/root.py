"""The command ``hostler`` itself: its help, and its subcommands, each loaded only when it is needed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

import click

from hostler import __version__

PLUGIN_GROUP = "hostler.commands"
"""Entry points of this group are further commands. The client imports nothing of the node; the node plugs in here."""

_MODULES: Mapping[str, Mapping[str, str]] = {
    "Instances": {
        "start": "hostler.cli.instances",
        "stop": "hostler.cli.instances",
        "reboot": "hostler.cli.instances",
        "pause": "hostler.cli.instances",
        "resume": "hostler.cli.instances",
        "cleanup": "hostler.cli.instances",
        "disk": "hostler.cli.hotplug",
        "cd": "hostler.cli.hotplug",
        "nic": "hostler.cli.hotplug",
        "memory": "hostler.cli.hotplug",
        "password": "hostler.cli.hotplug",
        "info": "hostler.cli.queries",
        "list": "hostler.cli.queries",
        "check": "hostler.cli.queries",
        "console": "hostler.cli.attach",
        "snapshot": "hostler.cli.snapshots",
        "backup": "hostler.cli.snapshots",
    },
    "Live migration": {
        "migrate": "hostler.cli.migration",
        "migrate-cancel": "hostler.cli.migration",
        "migrate-tune": "hostler.cli.migration",
        "migration-report": "hostler.cli.migration",
    },
    "Nodes": {
        "nodes": "hostler.cli.nodes",
        "node": "hostler.cli.node",
        "drain": "hostler.cli.maintenance",
        "undrain": "hostler.cli.maintenance",
        "hold": "hostler.cli.maintenance",
        "unhold": "hostler.cli.maintenance",
        "fence": "hostler.cli.maintenance",
        "unfence": "hostler.cli.maintenance",
        "audit": "hostler.cli.audit",
        "uid-pool": "hostler.cli.isolation",
        "quarantine": "hostler.cli.isolation",
    },
    "Jobs": {
        "jobs": "hostler.cli.jobs",
        "job": "hostler.cli.jobs",
        "watch": "hostler.cli.jobs",
        "why": "hostler.cli.control",
        "cancel": "hostler.cli.control",
        "retry": "hostler.cli.control",
    },
}
_NODE_COMMANDS = {
    "worker": "Run this node's worker.",
    "doctor": "Check what this host needs to run guests.",
    "db": "Look at and upgrade the database's schema.",
}
_EMBEDDED = {"embedded": "hostler.cli.embedded"}
_ALL = {name: module for section in (*_MODULES.values(), _EMBEDDED) for name, module in section.items()}


class _Root(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_ALL, *_node_help()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _ALL:
            command: click.Command = getattr(import_module(_ALL[cmd_name]), _attribute(cmd_name))
            return command
        found = _plugins().get(cmd_name)
        if found is not None:
            return _load(found)
        return _unavailable(cmd_name, _ABSENT.format(cmd_name)) if cmd_name in _NODE_COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections = {title: _short_help(modules) for title, modules in _MODULES.items()}
        sections["This machine"] = _short_help(_EMBEDDED) | _node_help()
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(list(rows.items()))


_ABSENT = (
    "'hostler {}' is part of the node distribution 'hostler'; only the client, 'hostler-client', is installed here.\n"
    "On a node, in an environment of its own: pip install hostler"
)


def _attribute(command: str) -> str:
    return f"{command.replace('-', '_')}_command"


def _short_help(modules: Mapping[str, str]) -> dict[str, str]:
    commands = {name: getattr(import_module(module), _attribute(name)) for name, module in modules.items()}
    return {name: command.get_short_help_str(limit=60) for name, command in commands.items()}


def _node_help() -> dict[str, str]:
    # Never loads a plug-in: one that is slow or broken must not spoil the help of all others.
    others = {name: "" for name in sorted(_plugins()) if name not in _ALL}
    return others | _NODE_COMMANDS


def _plugins() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=PLUGIN_GROUP)}


def _load(entry: EntryPoint) -> click.Command:
    try:
        command = entry.load()
    except Exception as exc:
        reason = f"'hostler {entry.name}' cannot be loaded from {entry.value}: {type(exc).__name__}: {exc}"
        return _unavailable(entry.name, reason)
    if not isinstance(command, click.Command):
        return _unavailable(entry.name, f"'hostler {entry.name}': {entry.value} is not a command")
    return command


def _unavailable(name: str, reason: str) -> click.Command:
    def refuse(**_: object) -> None:
        raise click.UsageError(reason, ctx=None)

    settings = {"ignore_unknown_options": True, "allow_extra_args": True}
    return click.Command(name, callback=refuse, context_settings=settings, add_help_option=False)


@click.group(cls=_Root, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hostler")
def cli() -> None:
    """Run the life of KVM guests as jobs on their nodes.

    \b
    A first guest:
      hostler worker                     on the node; leave it running
      hostler start $(hostname) web1.yaml
      hostler list
      hostler console web1               the escape key is shown first
      hostler stop web1

    Every command sends a job to a node, shows its progress, and prints its result; add --json for programs.
    Ctrl-C leaves the waiting, never the job: hostler watch ID returns to it.

    Exit status: 0 done, 1 the job failed, 2 wrong usage or argument, 3 broker or results cannot be reached, 124
    --timeout ran out, 130 interrupted. HOSTLER_BROKER_URL and HOSTLER_RESULT_BACKEND say where the service is; by
    default an embedded broker on this machine is started.
    """
