"""The syntax of cpu_mask: Ganeti's, and exclusion."""

from __future__ import annotations

import pytest

from hostler.cpu_mask import check, expand, split

EVERY = frozenset(range(4))


@pytest.mark.parametrize(
    ("listed", "processors"),
    [
        ("all", {0, 1, 2, 3}), ("2", {2}), ("0-2", {0, 1, 2}), ("0-3,^2", {0, 1, 3}), ("^2,0-3", {0, 1, 3}),
        ("all,^0-2", {3}), ("1,3", {1, 3}), ("7-8", {7, 8}), ("all,7", {0, 1, 2, 3, 7}),
    ],
)  # fmt: skip
def test_a_list_names_processors(listed: str, processors: set[int]) -> None:
    assert check(listed) == listed
    assert expand(listed, EVERY) == processors


def test_a_mask_is_one_list_for_all_or_one_for_each_vcpu() -> None:
    assert [split(mask) for mask in ("", "0-3,^2", "0:all:2-3")] == [[], ["0-3,^2"], ["0", "all", "2-3"]]
    assert check("") == ""


@pytest.mark.parametrize(
    "mask", ["x", "1-", "-1", "0,,1", "0:", ":", "0 1", "^all", "1-2-3", "00000", "\N{SUPERSCRIPT TWO}"]
)
def test_another_syntax_is_refused(mask: str) -> None:
    with pytest.raises(ValueError, match="must be such as"):
        check(mask)


@pytest.mark.parametrize(
    ("mask", "reason"), [("3-1", "backwards"), ("0:^1", "no processor"), ("1,^0-3", "no processor")]
)
def test_a_list_without_processors_is_refused(mask: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check(mask)
