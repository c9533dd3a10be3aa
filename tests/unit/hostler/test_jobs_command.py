"""``hostler jobs`` and ``hostler jobs prune`` without a node: what is sent, what is shown, what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hostler import Client, InvalidArgument, settings
from hostler.cli import jobs, run
from hostler.cli.exits import Exit
from hostler.job_request import JobRequest
from hostler.settings import Settings

ANSWER = {"removed": 12, "kept": 1, "by_state": {"FAILURE": 2, "REVOKED": 0, "SUCCESS": 10}}


@pytest.fixture(autouse=True)
def _node(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No broker anywhere: exit status 3 would mean that something was sent."""
    monkeypatch.setenv("HOSTLER_BROKER_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("HOSTLER_NODE", "n1")
    settings.load.cache_clear()
    yield
    settings.load.cache_clear()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[JobRequest]:
    """The jobs that commands send; nobody carries them out."""
    requests: list[JobRequest] = []

    def note(build: Callable[[Client], JobRequest], *_: object) -> None:
        with Client(settings=Settings()) as client:
            requests.append(build(client))

    monkeypatch.setattr(jobs, "send_and_show", note)
    return requests


@pytest.mark.parametrize(
    ("arguments", "node", "expected"),
    [
        ([], "n1", {}),
        (["-n", "n2", "--instance", "web1", "--limit", "5"], "n2", {"instance": "web1", "limit": 5}),
        (["--state", "FAILURE", "--state", "REVOKED", "--queries"], "n1",
         {"states": ["FAILURE", "REVOKED"], "queries": True}),
    ],
)  # fmt: skip
def test_without_a_subcommand_jobs_are_listed(
    arguments: list[str], node: str, expected: dict[str, Any], sent: list[JobRequest]
) -> None:
    assert run(["jobs", *arguments]) == Exit.DONE
    assert [(request.task, request.node, request.arguments) for request in sent] == [("job.list", node, expected)]


@pytest.mark.parametrize(
    ("arguments", "node", "expected"),
    [
        ([], "n1", {}),
        (["-n", "n2", "--dry-run"], "n2", {"dry_run": True}),
        (["--older-than", "30m", "--failures-older-than", "90d"], "n1",
         {"older_than_s": 1800, "failures_older_than_s": 90 * 86400}),
        (["--older-than", "12h"], "n1", {"older_than_s": 12 * 3600}),
        (["--older-than", "600s"], "n1", {"older_than_s": 600}),
    ],
)  # fmt: skip
def test_what_to_prune_is_said_in_ages(
    arguments: list[str], node: str, expected: dict[str, Any], sent: list[JobRequest]
) -> None:
    assert run(["jobs", "prune", *arguments]) == Exit.DONE
    assert [(request.task, request.node, request.arguments) for request in sent] == [("job.prune", node, expected)]


@pytest.mark.parametrize(
    "arguments",
    [
        ["-n", "n2", "prune"],
        ["--limit", "5", "prune"],
        ["--json", "prune"],
        ["no-such-command"],
        ["prune", "j1"],
        ["prune", "--older-than", "soon"],
        ["prune", "--older-than", "7"],
        ["prune", "--older-than", "0d"],
        ["prune", "--older-than", "9m"],
        ["prune", "--older-than", "-7d"],
        ["prune", "--older-than", "9" * 15 + "d"],
        ["prune", "--older-than", "9" * 5000 + "d"],
        ["prune", "--failures-older-than", ""],
    ],
)
def test_wrong_usage_exits_with_2_and_nothing_is_sent(
    arguments: list[str], sent: list[JobRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["jobs", *arguments]) == Exit.USAGE
    assert sent == []
    shown = capsys.readouterr()
    assert shown.err or '"error"' in shown.out


def test_an_option_before_prune_is_refused_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    run(["jobs", "-n", "n2", "prune"])
    assert "--node belongs after 'prune'" in capsys.readouterr().err


def test_people_are_told_how_many_went_and_why_some_stayed(capsys: pytest.CaptureFixture[str]) -> None:
    jobs._show_pruned(ANSWER)
    jobs._show_pruned({"would_remove": 0, "kept": 0, "by_state": {"SUCCESS": 0}})
    assert capsys.readouterr().out.splitlines() == [
        "removed 12 jobs (2 FAILURE, 10 SUCCESS)",
        "kept 1 that are as old: unfinished jobs come after them or retry them",
        "would remove 0 jobs",
    ]


@pytest.mark.parametrize("age_s", [0, 599, -1, 3_153_600_001, 1e6, "7d", True])
def test_a_client_refuses_what_may_yet_be_delivered_again_and_what_is_no_age(age_s: Any) -> None:
    with Client(settings=Settings()) as client:
        for field in ("older_than_s", "failures_older_than_s"):
            with pytest.raises(InvalidArgument, match=field):
                client.prune.job("n1", **{field: age_s})
