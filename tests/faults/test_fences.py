"""The worker that fences a dead node dies at some steps of it; `./dev faults fences` kills it at every one."""

from __future__ import annotations

import random

import pytest

from tests.faults.fences import sweep

pytestmark = [pytest.mark.node, pytest.mark.timeout(300)]

KILLS = 2
"""So many steps, chosen anew each time."""


def test_a_worker_killed_at_steps_of_a_fence_breaks_no_promise(qemu: None) -> None:
    seed = random.SystemRandom().randrange(10**6)
    found = sweep(KILLS, seed)
    assert not found.violations, f"seed {seed}"
    assert found.kills, f"seed {seed}: {found.not_reached}"
