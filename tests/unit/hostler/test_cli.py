"""The command line without a service: help, usage, exit statuses, plug-ins."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import click
import pytest

from hostler import settings
from hostler.cli import output, render, root, run
from hostler.cli.exits import Exit
from hostler.contract import ErrorCode

COMMANDS = [*root._ALL]


@pytest.fixture(autouse=True)
def _unreachable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No broker anywhere: exit status 3 would mean that something was sent."""
    monkeypatch.setenv("HOSTLER_BROKER_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("HOSTLER_NODE", "n1")
    settings.load.cache_clear()
    yield
    settings.load.cache_clear()


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "embedded"])
def test_the_help_of_each_command_teaches_by_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == Exit.DONE
    shown = capsys.readouterr().out
    assert f"hostler {command}" in shown.partition("Examples:")[2]
    assert "--json" in shown


def test_the_help_lists_every_command_and_the_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == Exit.DONE
    shown = capsys.readouterr().out
    for name in (*COMMANDS, *root._NODE_COMMANDS):
        assert f"\n  {name} " in shown
    assert "Exit status: 0 done" in shown


def test_the_help_loads_neither_celery_nor_pydantic_nor_rich_nor_a_plug_in() -> None:
    program = "import sys; from hostler.cli import run; run(['--help']); "
    program += "print([name for name in ('celery', 'pydantic', 'rich', 'yaml', 'worker') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_python_m_hostler_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "hostler", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("hostler, version ")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["stop"],
        ["stop", "web1", "--on-timeout", "perhaps"],
        ["list", "--timeout", "0"],
        ["list", "--timeout", "soon"],
        ["info", "../etc"],
        ["info", "-n", "no such/node", "web1"],
        ["start", "n1", "/no/such/file.yaml"],
        ["reboot", "web1", "--guest-timeout", "-5"],
        ["jobs", "--limit", "0"],
        ["job", ""],
        ["pause", "web1", "--job-id", ""],
    ],
)
def test_wrong_usage_and_wrong_arguments_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == Exit.USAGE
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err


def test_each_wrong_field_has_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "web1.yaml"
    path.write_text("name: -web1\nmemory_mib: 0\nmemroy: 1\n")
    assert run(["start", "n1", str(path)]) == Exit.USAGE
    first, *fields = capsys.readouterr().err.splitlines()
    assert first == "INVALID_ARGUMENT"
    assert [line.split(":")[0].strip() for line in fields] == [
        "instance.name",
        "instance.memory_mib",
        "instance.memroy",
    ]


@pytest.mark.parametrize("arguments", [["info", "../etc", "--json"], ["stop", "--json"], ["job", "--jsonn", "--json"]])
def test_wrong_arguments_are_a_json_document_for_programs(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == Exit.USAGE
    document = json.loads(capsys.readouterr().out)
    assert document["error"]["code"] == ErrorCode.INVALID_ARGUMENT
    assert document["error"].keys() == {"code", "message", "details"}


def test_a_misspelt_setting_exits_with_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOSTLER_BROKER_URI", "redis://localhost")
    assert run(["list"]) == Exit.USAGE
    assert "HOSTLER_BROKER_URI" in capsys.readouterr().err


def test_a_unknown_transport_exits_with_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOSTLER_BROKER_URL", "carrier-pigeon://:secret@roof")
    assert run(["list"]) == Exit.USAGE
    shown = capsys.readouterr().err
    assert "carrier-pigeon://roof" in shown and "secret" not in shown


def test_an_unreachable_broker_exits_with_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list"]) == Exit.UNREACHABLE
    assert "does not answer" in capsys.readouterr().err


# Plug-ins


def plug(monkeypatch: pytest.MonkeyPatch, **plugins: str) -> None:
    entries = [EntryPoint(name, value, root.PLUGIN_GROUP) for name, value in plugins.items()]
    monkeypatch.setattr(root, "entry_points", lambda group: entries)


@click.command()
@click.argument("word")
def echo(word: str) -> None:
    """Say it."""
    click.echo(word)


not_a_command = 42


def test_a_plug_in_is_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "plugged", sys.modules[__name__])
    plug(monkeypatch, worker="plugged:echo")
    assert run(["worker", "hello"]) == Exit.DONE
    assert capsys.readouterr().out == "hello\n"


@pytest.mark.parametrize("value", ["no_such_module:command", "hostler.contract:no_such_name", "plugged:not_a_command"])
def test_a_broken_plug_in_breaks_itself_only(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "plugged", sys.modules[__name__])
    plug(monkeypatch, doctor=value, extra=value)
    assert run(["--help"]) == Exit.DONE
    assert "\n  extra" in capsys.readouterr().out
    assert run(["doctor", "--anything", "goes"]) == Exit.USAGE
    assert "hostler doctor" in capsys.readouterr().err
    assert run(["list"]) == Exit.UNREACHABLE


@pytest.mark.parametrize("command", ["worker", "doctor", "db"])
def test_a_node_command_without_the_node_distribution_says_what_to_install(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plug(monkeypatch)
    assert run([command, "--node", "n1"]) == Exit.USAGE
    shown = capsys.readouterr().err
    assert "part of the node distribution 'hostler'" in shown and "'hostler-client'" in shown


# Tables


def test_text_from_a_guest_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    render.facts({"message": "\x1b]0;owned\x07 [bold]kept[/bold]"})
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "[bold]kept[/bold]" in shown
    assert output.clean("a\x1bb\nc") == "a\N{REPLACEMENT CHARACTER}b\nc"


def test_a_table_of_nothing_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    render.instances([])
    render.jobs([])
    assert capsys.readouterr().out == "No instances.\nNo jobs.\n"


def test_a_job_of_the_ledger_is_shown_with_its_phases(capsys: pytest.CaptureFixture[str]) -> None:
    phase = {"phase": "spawn", "at": "2030-01-01T00:00:00+00:00", "message": "QEMU runs"}
    error = {"code": "QEMU_FAILED", "message": "it exited", "details": {}}
    render.job_row({"id": "x", "state": "FAILURE", "error": error, "phases": [phase]})
    shown = capsys.readouterr().out
    assert "QEMU_FAILED: it exited" in shown and "QEMU runs" in shown


def test_a_list_of_jobs_is_short_and_leaves_empty_columns_out(capsys: pytest.CaptureFixture[str]) -> None:
    error = {"code": "QEMU_FAILED", "message": "it exited", "details": {}}
    row = {"id": "x", "task": "instance.start", "state": "FAILURE", "percent": 40, "error": error}
    render.jobs([{**row, "updated_at": "2020-01-01T00:00:00.5+00:00", "waiting_for": []}])
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["ID", "TASK", "STATE", "%", "UPDATED", "ERROR"]
    assert line.split() == ["x", "instance.start", "FAILURE", "40", "2020-01-01", "QEMU_FAILED"]


def test_a_check_shows_errors_and_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    render.check({"errors": [{"field": "disks[0].path", "reason": "does not exist"}], "warnings": ["slow"]})
    assert capsys.readouterr().out == "error: disks[0].path: does not exist\nwarning: slow\n"
    render.check({"errors": [], "warnings": []})
    assert capsys.readouterr().out == "The node would start this instance.\n"
