"""What the client makes of whatever the result backend gives back."""

from __future__ import annotations

import pytest
from celery.exceptions import NotRegistered, TaskRevokedError

from hostler import JobState, OperationFailed
from hostler.job import failure, safe_url


class Elsewhere(Exception):
    """A class the backend made up, because the node's own is not importable here."""


def test_a_failure_is_rebuilt_from_its_arguments_whatever_its_class() -> None:
    rebuilt = failure(JobState.FAILURE, Elsewhere("QEMU_FAILED", "no such machine", {"retryable": True}))
    assert (rebuilt.code, rebuilt.message, rebuilt.retryable) == ("QEMU_FAILED", "no such machine", True)


@pytest.mark.parametrize(
    ("state", "raised", "code", "words"),
    [
        (JobState.FAILURE, Elsewhere("only a message"), "INTERNAL", "Elsewhere: only a message"),
        (JobState.FAILURE, Elsewhere("A", "B", "not details"), "INTERNAL", "Elsewhere"),
        (JobState.FAILURE, None, "INTERNAL", "None"),
        (JobState.FAILURE, NotRegistered("instance.fly"), "UNSUPPORTED", "instance.fly"),
        (JobState.REVOKED, TaskRevokedError("terminated"), "CANCELLED", "terminated"),
        (JobState.REVOKED, Elsewhere("CANCELLED", "by you", {"state": "running"}), "CANCELLED", "by you"),
    ],
)
def test_every_failure_gets_a_code_of_the_contract(state: JobState, raised: object, code: str, words: str) -> None:
    rebuilt = failure(state, raised)
    assert isinstance(rebuilt, OperationFailed)
    assert rebuilt.code == code and words in rebuilt.message


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:se/cret@host:6379/0?password=x", "redis://host:6379/0"),
        ("redis://user:se?cret@host:6379/0", "redis://..."),
        ("redis://:secret@host:6379/0?password=x", "redis://host:6379/0"),
        ("redis+socket:///run/redis.sock?virtual_host=0&password=x", "redis+socket:///run/redis.sock"),
        ("amqp://user:p%40ss@rabbit//", "amqp://rabbit//"),
        ("db+postgresql://u:p@h/results", "db+postgresql://h/results"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert safe_url(url) == shown
