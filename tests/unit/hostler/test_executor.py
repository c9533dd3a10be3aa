"""A batch of jobs: what it takes, what it says of each, and what a person is shown. Nothing here is sent."""

from __future__ import annotations

from typing import Any

import pytest

from hostler import Client, InvalidArgument, JobExecutor, JobRequest, JobState, OperationFailed, TaskName
from hostler.executor_display import display
from hostler.executor_part import Part, result_of, way_back
from hostler.job import JobSnapshot


@pytest.fixture
def client() -> Client:
    """A client of a broker that does not exist: whatever were sent would fail."""
    return Client("redis://127.0.0.1:1/0")


@pytest.fixture
def request_() -> JobRequest:
    return JobRequest(TaskName.INSTANCE_STOP, "n1", {"name": "web1"}, "id1")


def part(client: Client, name: str = "web1", job_id: str = "id1", **given: Any) -> Part:
    return Part(name, job_id, job=client.job(job_id), **given)


def snapshot(state: JobState, job_id: str = "id1", **given: Any) -> JobSnapshot:
    return JobSnapshot(job_id, state, known=state is not JobState.PENDING, **given)


def progress(percent: int, job_id: str = "id1") -> JobSnapshot:
    meta = {"phase": "spawn", "percent": percent, "message": "QEMU is\x1b[2J up"}
    return snapshot(JobState.PROGRESS, job_id, progress=meta)


# What is taken


def test_queueing_nothing_is_refused(client: Client) -> None:
    with pytest.raises(InvalidArgument, match="requests: at least one"):
        JobExecutor(client).queue_job("web1")


def test_a_job_that_was_sent_already_is_refused_with_the_way_to_add_it(client: Client, request_: JobRequest) -> None:
    executor = JobExecutor(client)
    with pytest.raises(InvalidArgument, match=r"requests\[1\]: .*add_job_id"):
        executor.queue_job("web1", request_, client.job("id2"))  # type: ignore[arg-type]
    assert executor.get_results() == [], "nothing of it was queued"


@pytest.mark.parametrize("job_id", ["", "two\nlines", None, True])
def test_an_id_that_no_job_can_have_is_refused(client: Client, job_id: Any) -> None:
    with pytest.raises(InvalidArgument, match="id: "):
        JobExecutor(client).add_job_id("web1", job_id)


def test_a_batch_of_nothing_has_no_results_and_asks_nobody(client: Client) -> None:
    executor = JobExecutor(client)
    assert (executor.submit_pending(), executor.get_results(), executor.wait_or_show(False)) == ([], [], [])


def test_a_failure_at_submission_is_a_result_in_its_place(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    executor = JobExecutor(client, verbose=True)
    executor.add_job_id("web1", "the cluster is drained", status=False)
    executor.add_job_id(None, "no quota", status=False)
    assert executor.get_results() == [(False, "the cluster is drained"), (False, "no quota")]
    assert executor.jobs == []
    assert capsys.readouterr().err.splitlines() == [
        "Failed to submit job for web1: the cluster is drained",
        "Failed to submit job: no quota",
    ]


# What is said


@pytest.mark.parametrize(
    ("name", "state", "error", "words"),
    [
        ("web1", JobState.FAILURE, ("QEMU_FAILED", "no"), "Job id1 for web1 has failed: QEMU_FAILED: no"),
        ("", JobState.FAILURE, ("QEMU_FAILED", "no"), "Job id1 has failed: QEMU_FAILED: no"),
        ("web1", JobState.REVOKED, ("CANCELLED", "by you"), "Job id1 for web1 has been cancelled: CANCELLED: by you"),
        ("", JobState.REVOKED, ("CANCELLED", "by you"), "Job id1 has been cancelled: CANCELLED: by you"),
    ],
)
def test_a_bad_end_is_told_with_the_name_if_there_is_one(
    client: Client, name: str, state: JobState, error: tuple[str, str], words: str
) -> None:
    ended = part(client, name)
    ended.take(snapshot(state, error=OperationFailed(*error)))
    assert ended.ending == words
    assert ended.outcome == (False, ": ".join(error))


def test_an_archived_job_is_neither_failed_nor_unknown(client: Client) -> None:
    gone = part(client)
    gone.take(snapshot(JobState.STARTED, worker="hostler@n7"))
    gone.take(snapshot(JobState.PENDING))
    assert gone.ending == "Job id1 for web1 has been archived, cannot check its result"
    ok, message = gone.outcome
    assert not ok and message.startswith("archived, cannot check its result")
    assert "hostler job id1 --history -n n7" in message


def test_an_archived_job_that_is_heard_of_again_is_believed(client: Client) -> None:
    restored = part(client)
    for seen in (snapshot(JobState.STARTED), snapshot(JobState.PENDING), snapshot(JobState.SUCCESS, result=1)):
        restored.take(seen)
    assert restored.outcome == (True, 1)


def test_an_added_id_nobody_knows_is_still_unknown_and_a_sent_one_still_pending(
    client: Client, request_: JobRequest
) -> None:
    added, sent = part(client), part(client, request=request_)
    for each in (added, sent):
        each.take(snapshot(JobState.PENDING))
    assert added.outcome[1].startswith("still unknown: there is no such job, or no worker has received it yet")
    assert sent.outcome == (False, "still PENDING, goes on: hostler watch id1")


def test_several_jobs_of_one_name_have_one_result(client: Client) -> None:
    parts = [part(client, job_id=f"id{number}") for number in (1, 2)]
    for number, each in enumerate(parts, 1):
        each.take(snapshot(JobState.SUCCESS, each.id, result=number))
    assert result_of(parts) == (True, [1, 2])
    assert result_of(parts[:1]) == (True, 1)


def test_a_partial_failure_says_which_and_a_whole_one_lists_all(client: Client) -> None:
    parts = [part(client, job_id=f"id{number}") for number in (1, 2)]
    parts[0].take(snapshot(JobState.SUCCESS, "id1"))
    parts[1].take(snapshot(JobState.FAILURE, "id2", error=OperationFailed("QEMU_FAILED", "no")))
    assert result_of(parts) == (False, "partial failure: request 2 of 2, job id2: QEMU_FAILED: no")
    parts[0].take(snapshot(JobState.FAILURE, "id1", error=OperationFailed("NOT_RUNNING", "off")))
    whole = "request 1 of 2, job id1: NOT_RUNNING: off; request 2 of 2, job id2: QEMU_FAILED: no"
    assert result_of(parts) == (False, whole)


def test_the_way_back_lists_what_goes_on_and_counts_the_rest(client: Client, request_: JobRequest) -> None:
    parts = [part(client, "", f"id{number}", request=request_) for number in range(2000)]
    parts[0].take(snapshot(JobState.SUCCESS, "id0"))
    text = way_back(parts, [Part("late", "id2000", request_)])
    assert "go on: 1999" in text and "hostler watch id1\n" in text and "watch id0" not in text
    assert "and 1979 more" in text and "hostler jobs --limit 1000 -n n1" in text
    assert "not sent: 1; of the first, id2000, it is not certain" in text
    assert len(text.splitlines()) < 30
    assert way_back([], []) == "No job goes on."


# What is shown


def test_lines_wait_aloud_for_the_first_that_runs_then_for_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    labels = {f"id{number}": f"job id{number} for web{number}" for number in (1, 2, 3)}
    waiting = snapshot(JobState.WAITING, "id1", progress={"message": "behind job id9"})
    rounds = [
        [waiting, progress(10, "id3"), snapshot(JobState.PENDING, "id2")],
        [progress(10, "id3"), progress(60, "id3")],
        [snapshot(JobState.SUCCESS, "id3")],
        [snapshot(JobState.SUCCESS, "id1")],
        [snapshot(JobState.FAILURE, "id2", error=OperationFailed("A", "b"))],
    ]
    with display(True, labels) as shown:
        for batch in rounds:
            for news in batch:
                shown.show(news)
            shown.settle()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "Waiting for job id3 for web3 ...",
        "   10 %  spawn: QEMU is\N{REPLACEMENT CHARACTER}[2J up",
        "   60 %  spawn: QEMU is\N{REPLACEMENT CHARACTER}[2J up",
        "Waiting for job id1 for web1 ...",
        "  behind job id9",
        "Waiting for job id2 for web2 ...",
        "  no worker has taken it up yet",
    ]


@pytest.mark.parametrize("verbose", [False, None])
def test_nobody_is_shown_anything_unless_asked_or_on_a_terminal(
    verbose: bool | None, capsys: pytest.CaptureFixture[str]
) -> None:
    with display(verbose, {"id1": "job id1"}) as shown:
        shown.say("Submitted")
        shown.show(progress(10))
        shown.settle()
    assert capsys.readouterr() == ("", "")
