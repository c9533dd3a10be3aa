"""Draining and fencing without a node: what is sent, and what is refused before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
import pytest
from click.testing import CliRunner

from hostler import Client, InvalidArgument, JobRequest, settings
from hostler.cli import maintenance, run
from hostler.cli.exits import Exit
from hostler.contract import TaskName
from hostler.maintenance import DrainArguments
from hostler.migration import MigrationInfoArguments, MoveArguments
from hostler.settings import Settings


@pytest.fixture(autouse=True)
def _unreachable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No broker anywhere: exit status 3 would mean that something was sent."""
    monkeypatch.setenv("HOSTLER_BROKER_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("HOSTLER_NODE", "n1")
    settings.load.cache_clear()
    yield
    settings.load.cache_clear()


@pytest.fixture
def client() -> Iterator[Client]:
    with Client(settings=Settings(node="n1", broker_url="redis://127.0.0.1:1/0")) as made:
        yield made


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch, client: Client) -> list[JobRequest]:
    """The jobs that commands build; none of them is sent."""
    built: list[JobRequest] = []
    monkeypatch.setattr(client, "living_node", lambda: "n2")
    monkeypatch.setattr(maintenance, "send_and_show", lambda build, *_: built.append(build(client)))
    return built


@pytest.mark.parametrize(
    ("command", "arguments", "task", "node", "expected"),
    [
        (maintenance.drain_command, ["n1", "--auto"], TaskName.NODE_DRAIN, "n1", {"auto": True}),
        (
            maintenance.drain_command,
            ["n1", "--to", "n2, n3", "--allow-shutdown", "--parallel", "3", "--downtime-ms", "50"],
            TaskName.NODE_DRAIN,
            "n1",
            {"targets": ["n2", "n3"], "allow_shutdown": True, "parallel": 3, "downtime_ms": 50},
        ),
        (maintenance.undrain_command, ["n1"], TaskName.NODE_UNDRAIN, "n1", {}),
        (
            maintenance.hold_command,
            ["n1", "--reason", "new switch"],
            TaskName.NODE_HOLD,
            "n1",
            {"reason": "new switch"},
        ),
        (maintenance.unhold_command, ["n1"], TaskName.NODE_UNHOLD, "n1", {}),
        (
            maintenance.fence_command,
            ["n1", "--yes-it-is-off", "--restart-on", "n2,n3"],
            TaskName.NODE_FENCE,
            "n2",
            {"node": "n1", "confirm": "it is off", "restart_on": ["n2", "n3"]},
        ),
        (maintenance.unfence_command, ["n1", "--via", "n3"], TaskName.NODE_UNFENCE, "n3", {"node": "n1"}),
    ],
)
def test_a_command_sends_what_it_says(
    command: click.Command,
    arguments: list[str],
    task: TaskName,
    node: str,
    expected: dict[str, Any],
    sent: list[JobRequest],
) -> None:
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert [(each.task, each.node, each.arguments) for each in sent] == [(task, node, expected)]


@pytest.mark.parametrize(
    "arguments",
    [
        ["drain", "n1"],
        ["drain", "n1", "--auto", "--to", "n2"],
        ["drain", "n1", "--to", "no such/node"],
        ["fence", "n1"],
        ["fence", "n1", "--restart-on", "n2"],
    ],
)
def test_wrong_usage_sends_nothing(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == Exit.USAGE
    assert capsys.readouterr().err


def test_the_client_refuses_a_fence_without_the_words(client: Client) -> None:
    with pytest.raises(InvalidArgument) as refused:
        client.fence.job("n2", "n1", "yes")
    assert [each["field"] for each in refused.value.details["errors"]] == ["confirm"]


def test_only_what_is_said_of_how_guests_move_is_passed_on_to_each_migration() -> None:
    arguments = DrainArguments(auto=True, allow_shutdown=True, bandwidth_mib_s=20, postcopy="if-needed", after=["j1"])
    assert arguments.of_each_migration() == {"bandwidth_mib_s": 20, "postcopy": "if-needed"}
    assert {*MoveArguments.model_fields} <= {*MigrationInfoArguments.model_fields}
    assert [*MigrationInfoArguments.model_fields][2:5] == ["name", "target", "live"]
