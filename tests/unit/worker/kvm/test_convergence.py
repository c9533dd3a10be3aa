"""What is done about a live migration that does not come to its end, and when."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.kvm.live_migration.convergence import STUCK_S, Convergence, Decision, Limits

MIB = 2**20
LIMITS = Limits(downtime_ms=100, deadline_s=60)


def meta(
    number: int, remaining_mib: float, status: str = "active", sent_mib: float = 0, speed: int = 50
) -> dict[str, Any]:
    return {
        "status": status,
        "pass": number,
        "remaining_bytes": int(remaining_mib * MIB),
        "transferred_bytes": int(sent_mib * MIB),
        "throughput_bytes_s": speed * MIB,
    }


def passes(judge: Convergence, *sizes_mib: float, speed: int = 50) -> list[Decision]:
    """What is decided while passes begin with so much to send, a second each."""
    looks = [meta(number, size, sent_mib=number, speed=speed) for number, size in enumerate(sizes_mib, start=1)]
    decided = [judge.decide(look, second) for second, look in enumerate(looks)]
    return [decision for decision in decided if decision]


def test_passes_that_shrink_are_left_alone() -> None:
    assert (
        passes(Convergence(replace(LIMITS, downtime_max_ms=5000, postcopy="if-needed")), 1000, 400, 200, 90, 30) == []
    )


def test_the_first_pass_is_no_measure() -> None:
    judge = Convergence(replace(LIMITS, downtime_max_ms=5000, postcopy="if-needed"))
    assert passes(judge, 100, 100) == []


def test_a_pass_that_does_not_shrink_raises_the_downtime_to_what_is_needed() -> None:
    (decision,) = passes(Convergence(replace(LIMITS, downtime_max_ms=5000)), 1000, 40, 39)
    assert (decision.what, decision.value) == ("raise-downtime", 858)  # 39 MiB at 50 MiB/s, and a tenth
    assert (
        decision.why == "pass 3 has 39.0 MiB to send, the best before it had 40.0 MiB; a downtime of 858 ms is needed"
    )


def test_the_downtime_is_raised_no_further_than_allowed_and_not_twice_to_the_same() -> None:
    judge = Convergence(replace(LIMITS, downtime_max_ms=150))
    decisions = passes(judge, 1000, 40, 40, 40, 40)
    assert [decision.value for decision in decisions] == [150]
    assert judge.limits.downtime_ms == 150


def test_without_a_maximum_the_downtime_stays() -> None:
    assert passes(Convergence(LIMITS), 1000, 40, 40, 40) == []


def test_a_best_pass_counts_though_a_worse_one_came_between() -> None:
    judge = Convergence(replace(LIMITS, downtime_max_ms=10_000))
    assert [each.what for each in passes(judge, 1000, 100, 50, 80)] == ["raise-downtime"]


def test_postcopy_comes_when_no_downtime_that_is_allowed_would_do_and_once() -> None:
    judge = Convergence(replace(LIMITS, downtime_max_ms=150, postcopy="if-needed"))
    assert [each.what for each in passes(judge, 1000, 40, 40, 40, 40)] == ["postcopy"]


def test_a_downtime_that_would_do_is_tried_before_postcopy() -> None:
    judge = Convergence(replace(LIMITS, downtime_max_ms=1000, postcopy="if-needed"))
    assert [each.what for each in passes(judge, 1000, 40, 40, 80)] == ["raise-downtime", "postcopy"]


def test_postcopy_at_once_begins_with_the_first_pass() -> None:
    judge = Convergence(replace(LIMITS, postcopy="at-once"))
    assert judge.decide(meta(0, 0, "setup"), 0) is None
    decision = judge.decide(meta(1, 1000), 0.1)
    assert decision and decision.what == "postcopy"
    assert judge.decide(meta(1, 900, sent_mib=5), 0.2) is None


@pytest.mark.parametrize("what", ["abort", "force", "postcopy"])
def test_at_the_deadline_what_was_asked_for_is_done_once(what: Any) -> None:
    judge = Convergence(replace(LIMITS, on_deadline=what))
    assert judge.decide(meta(4, 30, sent_mib=1), 59.9) is None
    decision = judge.decide(meta(4, 30, sent_mib=2), 60.0)
    assert decision == Decision(what, "the deadline of 60 s is over in pass 4, with 30.0 MiB to send")
    assert judge.decide(meta(5, 30, sent_mib=3), 61.0) is None


def test_a_deadline_that_was_moved_counts_from_then_on() -> None:
    judge = Convergence(LIMITS)
    judge.limits = replace(judge.limits, deadline_s=5)
    decision = judge.decide(meta(2, 30, sent_mib=1), 6)
    assert decision and decision.what == "abort"


def test_before_anything_was_sent_a_deadline_can_only_abort() -> None:
    decision = Convergence(replace(LIMITS, on_deadline="postcopy")).decide(meta(0, 0, "setup"), 60)
    assert decision and decision.what == "abort"


def test_a_connection_that_carries_nothing_is_given_up_even_where_the_guest_was_forced_to_pause() -> None:
    judge = Convergence(replace(LIMITS, on_deadline="force"))
    forced = judge.decide(meta(3, 30, sent_mib=9), 60)
    assert forced and forced.what == "force"
    assert judge.decide(meta(3, 30, sent_mib=9), 60 + STUCK_S - 1) is None
    given_up = judge.decide(meta(3, 30, sent_mib=9), 60 + STUCK_S)
    assert given_up == Decision("abort", "not a byte was sent for 60 s")


@pytest.mark.parametrize(
    "status", ["pre-switchover", "device", "completed", "postcopy-active", "cancelling", "failed", "wait-unplug"]
)
def test_past_the_transfer_nothing_is_decided(status: str) -> None:
    judge = Convergence(replace(LIMITS, downtime_max_ms=5000, postcopy="at-once"))
    assert judge.decide(meta(9, 40, status), 1000) is None


@given(
    st.lists(st.tuples(st.integers(0, 4), st.floats(0, 2000), st.floats(0, 30)), max_size=30),
    st.sampled_from(["abort", "force", "postcopy"]),
    st.sampled_from(["never", "if-needed", "at-once"]),
    st.integers(0, 5000),
)
def test_nothing_is_decided_twice(steps: list[tuple[int, float, float]], last: Any, postcopy: Any, most: int) -> None:
    judge = Convergence(Limits(100, 60, most, last, postcopy))
    number, elapsed_s, seen = 1, 0.0, []
    for more, remaining_mib, pause_s in steps:
        number, elapsed_s = number + more, elapsed_s + pause_s
        if decision := judge.decide(meta(number, remaining_mib, sent_mib=elapsed_s), elapsed_s):
            seen.append((decision.what, decision.value))
    assert len(seen) == len(set(seen))
    raised = [value for what, value in seen if what == "raise-downtime"]
    assert raised == sorted(raised) and all(100 < (value or 0) <= most for value in raised)
