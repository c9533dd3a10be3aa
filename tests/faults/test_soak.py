"""Random jobs under random faults, a short run of what `./dev faults soak` does at length."""

from __future__ import annotations

import random

import pytest

from tests.faults.soak import soak

pytestmark = [pytest.mark.node, pytest.mark.timeout(600)]


def test_random_jobs_under_random_faults_break_no_promise(qemu: None) -> None:
    seed = random.SystemRandom().randrange(10**6)
    found = soak(jobs=100, guests=6, seed=seed)
    assert not found.violations, f"seed {seed}"
    assert found.faults.total() and found.ended["SUCCESS"]
