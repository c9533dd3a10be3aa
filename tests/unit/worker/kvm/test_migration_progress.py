"""What is said of a live migration: percent, ETA, verdict and prediction, from samples alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.kvm.live_migration.forecast import MIB, forecast, predict
from worker.kvm.live_migration.incoming import uri
from worker.kvm.live_migration.progress import Progress
from worker.kvm.live_migration.sample import Sample, read

GIB = 2**30


def sample(at: float, status: str = "active", **more: Any) -> Sample:
    return Sample(at=at, status=status, total_bytes=GIB, total_ms=int(at * 1000), **more)


def sending(rate: int, dirty: int, passes: int = 2, remaining: int = 200 * MIB, samples: int = 10) -> list[Sample]:
    """At a steady ``rate`` and ``dirty`` rate in bytes/s, four samples a second."""
    return [
        sample(
            number / 4,
            transferred_bytes=rate * number // 4,
            remaining_bytes=remaining,
            dirty_pages_rate=dirty // 4096,
            passes=passes,
        )
        for number in range(1, samples + 1)
    ]


def fed(samples: list[Sample], downtime_ms: int = 300) -> dict[str, Any]:
    progress = Progress(downtime_ms)
    return [progress.feed(each) for each in samples][-1]


STATUSES = [
    "setup",
    "active",
    "pre-switchover",
    "device",
    "postcopy-active",
    "postcopy-paused",
    "failed",
    "colo",
    "new",
]
ANY_SAMPLE = st.builds(
    Sample,
    at=st.just(0.0),
    status=st.sampled_from(STATUSES),
    total_bytes=st.integers(0, 2**45),
    transferred_bytes=st.integers(0, 2**50),
    remaining_bytes=st.integers(0, 2**45),
    dirty_pages_rate=st.integers(0, 2**30),
    mbps=st.floats(0, 1e6),
    passes=st.integers(0, 1000),
    total_ms=st.integers(0, 10**9),
    expected_downtime_ms=st.integers(0, 10**9),
)


@given(st.lists(st.tuples(st.floats(0, 10), ANY_SAMPLE), max_size=20), st.integers(1, 60_000))
def test_percent_never_falls_and_is_below_100_until_it_is_complete(
    steps: list[tuple[float, Sample]], downtime_ms: int
) -> None:
    progress, at, before = Progress(downtime_ms), 0.0, 0.0
    for pause_s, each in steps:
        at += pause_s
        meta = progress.feed(Sample(**{**each.__dict__, "at": at}))
        assert before <= meta["percent"] < 100
        assert 0 <= meta["eta_confidence"] <= 1
        assert meta["eta_s"] is None or 0 <= meta["eta_s"] < math.inf
        assert (meta["eta_s"] is None) <= (meta["eta_confidence"] == 0)
        before = meta["percent"]
    assert progress.feed(Sample(at=at + 1, status="completed", total_bytes=1))["percent"] == 100


def test_throughput_is_what_was_sent_and_follows_a_change_smoothly() -> None:
    steady = fed(sending(100 * MIB, 0))
    assert steady["throughput_bytes_s"] == pytest.approx(100 * MIB, rel=0.01)
    samples = sending(100 * MIB, 0)
    halved = sample(samples[-1].at + 0.25, transferred_bytes=samples[-1].transferred_bytes + 50 * MIB // 4, passes=2)
    assert 90 * MIB < fed([*samples, halved])["throughput_bytes_s"] < 100 * MIB


def test_a_break_in_which_nothing_is_sent_does_not_count_as_slow() -> None:
    samples = sending(100 * MIB, 0)
    late = sample(60.0, "pre-switchover", transferred_bytes=samples[-1].transferred_bytes, passes=2)
    assert fed([*samples, late])["throughput_bytes_s"] == pytest.approx(100 * MIB, rel=0.01)


def test_an_eta_counts_the_passes_that_are_still_to_come() -> None:
    alone = fed(sending(100 * MIB, 0))
    beside = fed(sending(100 * MIB, 50 * MIB))
    assert alone["eta_s"] == pytest.approx(2.0, abs=0.1)
    assert alone["eta_s"] < beside["eta_s"] < 4.1
    assert alone["eta_confidence"] > beside["eta_confidence"] > 0


def test_the_first_pass_gives_less_confidence_as_the_dirty_rate_is_not_known_yet() -> None:
    first, later = (fed(sending(100 * MIB, 0, passes=passes)) for passes in (1, 2))
    assert first["eta_confidence"] < later["eta_confidence"]


def test_without_throughput_nothing_is_foretold() -> None:
    meta = fed([sample(0.1, "setup")])
    assert (meta["eta_s"], meta["eta_confidence"], meta["verdict"], meta["percent"]) == (None, 0.0, None, 0.0)


def test_a_guest_that_writes_faster_than_we_send_gets_a_verdict_and_no_eta() -> None:
    meta = fed(sending(30 * MIB, 80 * MIB, passes=3, remaining=27 * MIB))
    assert meta["verdict"] == (
        "will not converge at 30 MiB/s: the guest writes 80 MiB/s; needs 900 ms of downtime or 88 MiB/s"
    )
    assert meta["eta_s"] is None


def test_in_the_first_pass_there_is_no_verdict() -> None:
    assert fed(sending(30 * MIB, 80 * MIB, passes=1))["verdict"] is None


def test_a_longer_downtime_takes_the_verdict_back() -> None:
    samples = sending(30 * MIB, 80 * MIB, passes=3, remaining=27 * MIB)
    assert fed(samples, downtime_ms=1000)["verdict"] is None


def test_in_postcopy_what_the_guest_writes_is_no_matter() -> None:
    active = sending(50 * MIB, 80 * MIB)
    after = [
        Sample(**{**each.__dict__, "status": "postcopy-active", "at": each.at + 3, "remaining_bytes": 100 * MIB})
        for each in active
    ]
    meta = fed(after)
    assert meta["eta_s"] == pytest.approx(2.0, abs=0.1) and meta["verdict"] is None


def test_qemus_answer_is_read_with_what_it_leaves_out() -> None:
    assert read({}, 5.0) == Sample(at=5.0, status="none")
    answer = {"status": "active", "total-time": 7, "ram": {"dirty-sync-count": 3, "dirty-pages-rate": 2, "mbps": 8.5}}
    known = read(answer, 5.0)
    assert (known.total_ms, known.passes, known.dirty_rate_bytes_s, known.mbps) == (7, 3, 8192, 8.5)


@pytest.mark.parametrize(
    ("status", "ended"),
    [("none", True), ("completed", True), ("failed", True), ("cancelled", True)]
    + [(status, False) for status in ("setup", "device", "wait-unplug", "cancelling", "colo", "a-word-of-tomorrow")],
)
def test_only_three_words_and_none_are_an_end(status: str, ended: bool) -> None:
    assert Sample(at=0.0, status=status).ended is ended


def test_an_idle_guest_is_predicted_to_take_its_memory_over_the_bandwidth() -> None:
    assert predict(GIB, 0, 100 * MIB, 300) == {
        "total_s": pytest.approx(10.24),
        "downtime_ms": 0,
        "dirty_rate_bytes_s": 0,
        "converges": True,
    }


def test_a_guest_that_writes_too_fast_is_predicted_not_to_converge() -> None:
    assert predict(GIB, 200 * MIB, 100 * MIB, 300)["converges"] is False
    assert predict(GIB, 200 * MIB, 0, 300)["converges"] is True, "unlimited is faster than that"


@given(
    st.integers(1, 2**44), st.integers(0, 2**35), st.integers(1, 2**35), st.integers(1, 60_000)
)  # fmt: skip
def test_a_forecast_comes_to_an_end_and_keeps_to_the_downtime(memory: int, dirty: int, speed: int, limit: int) -> None:
    expected = forecast(memory, dirty, speed, limit)
    assert 0 <= expected.seconds < math.inf
    assert expected.seconds >= memory / speed * 0.999
    assert not expected.converges or expected.downtime_ms <= limit * 1.001


def test_an_ipv6_address_gets_brackets() -> None:
    assert (uri("192.0.2.1", 7), uri("2001:db8::1", 7)) == ("tcp:192.0.2.1:7", "tcp:[2001:db8::1]:7")
