"""``hostler cancel``, ``retry`` and ``why`` without a node, and what the client makes of several nodes' answers."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import click
import pytest

from hostler import Client, ServiceUnreachable, settings
from hostler.cli import run
from hostler.cli.control import _show_reasons, _show_retries, _time_ago
from hostler.cli.exits import Exit
from hostler.settings import Settings


@pytest.fixture(autouse=True)
def _unreachable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No broker anywhere: exit status 3 would mean that something was sent."""
    monkeypatch.setenv("HOSTLER_BROKER_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("HOSTLER_NODE", "n1")
    settings.load.cache_clear()
    yield
    settings.load.cache_clear()


@pytest.mark.parametrize(
    "arguments",
    [
        ["cancel"],
        ["cancel", ""],
        ["cancel", "two words"],
        ["retry"],
        ["retry", "j1", "--failed"],
        ["retry", "--failed", "--since", "soon"],
        ["retry", "--failed", "--since", "h"],
        ["retry", "--failed", "--since", ""],
        ["retry", "--failed", "--since", "-2h"],
        ["retry", "--failed", "--since", "99999999999d"],
        ["retry", "two words"],
        ["retry", "j1", "-n", "no such/node"],
        ["why"],
        ["why", "j1", "-n", "no such/node"],
    ],
)
def test_wrong_usage_exits_with_2_and_nothing_is_sent(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == Exit.USAGE
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err


@pytest.mark.parametrize("arguments", [["cancel", "j1"], ["retry", "j1"], ["retry", "--failed"], ["why", "j1"]])
def test_an_unreachable_broker_exits_with_3(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == Exit.UNREACHABLE
    assert "does not answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "ago"), [("90s", timedelta(seconds=90)), ("30m", timedelta(minutes=30)), ("2h", timedelta(hours=2)),
                      ("7d", timedelta(days=7)), ("0s", timedelta())],
)  # fmt: skip
def test_how_far_back_is_a_number_and_a_unit(text: str, ago: timedelta) -> None:
    before = datetime.now(UTC)
    since = datetime.fromisoformat(_time_ago(text))
    assert before - ago <= since <= datetime.now(UTC) - ago


@pytest.mark.parametrize("text", ["1", "1.5h", "h1", "1w", " 1h", "1h "])
def test_any_other_time_is_refused_by_its_option(text: str) -> None:
    with pytest.raises(click.BadParameter) as refused:
        _time_ago(text)
    assert refused.value.param_hint == "--since"


def test_each_retry_is_shown_with_what_it_retries(capsys: pytest.CaptureFixture[str]) -> None:
    _show_retries([{"id": "new", "retry_of": "old", "task": "instance.stop"}])
    _show_retries([])
    assert capsys.readouterr().out == "new  retries instance.stop old\nnothing to retry\n"


def test_reasons_are_sentences_and_a_command_where_there_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    answer = {
        "id": "j1",
        "state": "WAITING",
        "because": ["it comes after", "job j0"],
        "command": "hostler why j0 -n n1",
    }
    _show_reasons(answer)
    shown = capsys.readouterr().out.splitlines()
    assert shown[-3:] == ["it comes after", "job j0", "Next: hostler why j0 -n n1"]
    _show_reasons(answer | {"command": ""})
    assert "Next" not in capsys.readouterr().out


ANSWERS = [
    (["requested", "running"], "requested"),
    (["running", "too_late"], "too_late"),
    (["revoked", "finished"], "finished"),
    (["revoked", "requested"], "requested"),
    (["revoked", "revoked"], "revoked"),
]


@pytest.mark.parametrize(("said", "believed"), ANSWERS)
def test_of_several_nodes_the_one_that_has_the_job_is_believed(
    said: list[str], believed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies = [{f"hostler@n{at}": {"ok": [{"id": "j1", "outcome": word}]}} for at, word in enumerate(said)]
    assert cancelled_with(replies, monkeypatch)["outcome"] == believed


@pytest.mark.parametrize("replies", [None, [], [{"hostler@n1": {"error": "no such command"}}]])
def test_no_answer_means_that_nothing_was_cancelled(replies: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ServiceUnreachable, match="nothing was cancelled"):
        cancelled_with(replies, monkeypatch)


def cancelled_with(replies: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    with Client(settings=Settings()) as client:
        monkeypatch.setattr(client._app.control, "revoke", lambda *_, **__: replies)
        return client.job("j1").cancel()
