"""``hostler uid-pool`` and ``hostler quarantine`` without a node: what is refused before anything is sent."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostler import Client, InvalidArgument, settings
from hostler.cli import run
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


BAD_RANGES = ["", ",", "x", "2-1", "1-2-3", "20000-20001,20001", "0", "0-9", "999", "65534", "4294967295", "5-"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["uid-pool", "add"],
        ["uid-pool", "remove"],
        ["uid-pool", "remove", "x"],
        *(["uid-pool", "add", "--", ranges] for ranges in BAD_RANGES),
        ["uid-pool", "add", "--force", "0-9"],
        ["uid-pool", "show", "-n", "no such/node"],
        ["quarantine", "release"],
        ["quarantine", "release", "../hostler.sqlite"],
        ["quarantine", "release", ".hidden"],
        ["quarantine", "release", ""],
    ],
)
def test_wrong_usage_exits_with_2_and_nothing_is_sent(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == Exit.USAGE
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["uid-pool", "show"],
        ["uid-pool", "add", "20000-20099, 20200"],
        ["uid-pool", "add", "--force", "100-200,65534"],
        ["uid-pool", "remove", "100-200"],
        ["quarantine", "list"],
        ["quarantine", "release", "web1.example.org-20260131T120000Z-0f3c9a1e.tar"],
    ],
)
def test_what_is_right_is_sent(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == Exit.UNREACHABLE
    assert "does not answer" in capsys.readouterr().err


def test_the_client_names_the_field() -> None:
    with Client(settings=Settings(broker_url="redis://127.0.0.1:1/0", node="n1")) as client:
        with pytest.raises(InvalidArgument) as refused:
            client.uid_pool_add("n1", "0-5", force=True)
        assert [error["field"] for error in refused.value.details["errors"]] == ["ranges"]
        job = client.uid_pool_add.job("n1", "20000-20099,20200")
        assert (str(job.task), job.arguments) == ("uid_pool.add", {"ranges": "20000-20099,20200"})
