"""The worker dies at each step that the code has, before it or after it, and no promise is broken.

Here each step is killed once, in the first operation that has it; `./dev faults sweep` kills before and after each step
of every operation.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.faults.sweep import CASES, Bed, Sweep, bed, kill_at, record

pytestmark = [pytest.mark.node, pytest.mark.timeout(600)]

seen: set[str] = set()
"""The names of steps that were killed already, in an operation before."""


@pytest.fixture(scope="module")
def mortal(qemu: None, netns: str) -> Iterator[Bed]:
    with bed(netns) as made:
        yield made


@pytest.mark.parametrize("case", CASES)
def test_a_worker_killed_at_any_step_breaks_no_promise(mortal: Bed, case: str) -> None:
    found, seed = Sweep(case), random.SystemRandom().randrange(10**6)
    rng = random.Random(seed)
    for step in record(mortal, CASES[case]):
        if step.name not in seen:
            seen.add(step.name)
            kill_at(mortal, CASES[case], step, rng.choice(("before", "after")), found)
    mortal.rest()
    assert not found.violations, f"seed {seed}"
    assert not found.not_reached, f"seed {seed}"


def test_the_steps_are_those_of_the_code(mortal: Bed) -> None:
    """What a start does is seen in its order, also what no list names."""
    names = [step.name for step in record(mortal, CASES["start"])]
    expected = [
        "commit worker.operations.ledger.Ledger.receive",
        "acknowledge",
        "commit worker.operations.start._claim",
        "fcntl.ioctl worker.network.tap.",
        "subprocess.Popen worker.network.scripts.",
        "subprocess.Popen worker.kvm.process.QemuProcess.spawn",
        "qmp cont",
        "commit worker.operations.start._record",
        "commit worker.operations.ledger.Ledger._finish",
        "store SUCCESS",
    ]
    seen_in_order = [one for name in names for one in expected if name.startswith(one)]
    assert [*dict.fromkeys(seen_in_order)] == expected
    mortal.rest()
