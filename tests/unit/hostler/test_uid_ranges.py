"""Ranges of uids: as Ganeti reads and writes them, without what was wrong there (root as a member, overlaps)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler.uid_ranges import (
    POOL_MAX,
    UID_MAX,
    Uids,
    add_ranges,
    expand,
    format_ranges,
    parse_ranges,
    remove_ranges,
    require_harmless,
    size,
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "ranges"),
    [
        ("", []),
        (" , ,", []),
        ("8000", [(8000, 8000)]),
        ("1000-5000,8000", [(1000, 5000), (8000, 8000)]),
        ("8000,1000-5000", [(1000, 5000), (8000, 8000)]),
        ("1-2,3-4", [(1, 2), (3, 4)]),
        (" 1000 - 1001 , 7 ", [(7, 7), (1000, 1001)]),
        (f"{UID_MAX}", [(UID_MAX, UID_MAX)]),
        ("0", [(0, 0)]),
    ],
)
def test_text_is_read_sorted_and_neighbours_are_not_merged(text: str, ranges: list[tuple[int, int]]) -> None:
    assert parse_ranges(text) == ranges


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1-2-3", "'1-2-3' is neither"),
        ("-5", "'-5' is neither"),
        ("5-", "'5-' is neither"),
        ("x", "'x' is neither"),
        ("1.5", "neither"),
        ("1_000", "neither"),
        ("١٢", "neither"),
        ("0x10", "neither"),
        ("9" * 5000, "neither"),
        ("2-1", "2-1 is upside down"),
        (f"{UID_MAX + 1}", "beyond the largest uid"),
        (f"1-{2**32}", "beyond the largest uid"),
        ("1-10,10-20", "10-20 overlaps 1-10"),
        ("7,7", "7 overlaps 7"),
    ],
)
def test_what_is_no_range_is_refused_by_name(text: str, reason: str) -> None:
    with pytest.raises(ValueError) as refused:
        parse_ranges(text)
    assert reason in str(refused.value)
    assert len(str(refused.value)) < 200


def test_ranges_are_written_with_a_comma_and_a_space() -> None:
    assert format_ranges(parse_ranges("200,1-100")) == "1-100, 200"


ranges = st.lists(st.integers(0, 60_000), unique=True, max_size=20).map(
    lambda edges: [Uids(first, last) for first, last in zip(sorted(edges)[::2], sorted(edges)[1::2], strict=False)]
)


@given(ranges)
def test_reading_what_was_written_gives_the_same(given_ranges: list[Uids]) -> None:
    assert parse_ranges(format_ranges(given_ranges)) == given_ranges
    assert len({*expand(given_ranges)}) == size(given_ranges)


@given(ranges, st.data())
def test_a_range_that_is_added_can_be_removed_and_leaves_nothing(pool: list[Uids], data: st.DataObject) -> None:
    first = data.draw(st.integers(60_001, 60_100))
    new = [Uids(first, data.draw(st.integers(first, first + 100)))]
    assert remove_ranges(add_ranges(pool, new), new) == pool


def test_a_range_that_overlaps_the_pool_is_refused() -> None:
    for text in ("150", "100-200", "1-100", "200-300", "1-1000"):
        with pytest.raises(ValueError, match="overlaps 100-200, which the pool has already"):
            add_ranges(parse_ranges("100-200"), parse_ranges(text))


def test_only_exactly_what_was_added_is_removed() -> None:
    pool = parse_ranges("100-200, 300")
    with pytest.raises(ValueError, match=r"no range 100-150; its ranges are: 100-200, 300"):
        remove_ranges(pool, parse_ranges("100-150"))
    with pytest.raises(ValueError, match=r"no range 7; its ranges are: none"):
        remove_ranges([], parse_ranges("7"))
    assert remove_ranges(pool, parse_ranges("300")) == [(100, 200)]


def test_a_pool_has_a_bound() -> None:
    assert size(add_ranges([], [Uids(1000, 1000 + POOL_MAX - 1)])) == POOL_MAX
    with pytest.raises(ValueError, match="too large"):
        add_ranges([Uids(1, 1)], [Uids(1000, 1000 + POOL_MAX - 1)])


@pytest.mark.parametrize(("text", "forced"), [("0", False), ("0-5", False), ("1-5", True), ("999", True),
                                              ("500-2000", True), ("65534", True), ("60000-70000", True)])  # fmt: skip
def test_uids_of_services_need_force_and_root_is_never_a_member(text: str, forced: bool) -> None:
    with pytest.raises(ValueError):
        require_harmless(parse_ranges(text), force=False)
    if forced:
        require_harmless(parse_ranges(text), force=True)
    else:
        with pytest.raises(ValueError, match="root"):
            require_harmless(parse_ranges(text), force=True)


def test_other_uids_are_harmless() -> None:
    require_harmless(parse_ranges("1000-65533, 65535-100000"), force=False)
