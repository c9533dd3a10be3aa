"""Either worker dies at steps of a live migration, and QEMUs, broker and network fail: no promise is broken.

Here some steps and the faults that walk the recovery table; `./dev faults migrations` kills at every step.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from tests.faults.migration_faults import FAULTS, play
from tests.faults.migration_soak import soak
from tests.faults.migrations import CASES, SIDES, Pair, Sweep, kill_at, migrating_pair, pair_on_postgres, record
from tests.faults.surroundings import Lacking
from tests.services import missing
from worker.operations.live_migration.recovery_table import row_for

pytestmark = [pytest.mark.node, pytest.mark.timeout(600)]

KILLS = 5
"""So many steps of each case, chosen anew each time."""


@pytest.fixture(scope="module")
def mortal(qemu: None) -> Iterator[Pair]:
    if os.geteuid() != 0:
        missing("A network namespace", "needs root")
    with migrating_pair() as made:
        yield made


def one_of_each_row() -> list[str]:
    """Faults that walk different rows of the table, and those that walk none of their own."""
    rows = {id(row_for(*FAULTS[name].finds)) if FAULTS[name].finds else name: name for name in FAULTS}  # type: ignore[misc]
    return [name for name in rows.values() if not FAULTS[name].on_postgres]


@pytest.mark.parametrize("name", one_of_each_row())
def test_a_fault_in_mid_migration_breaks_no_promise(mortal: Pair, name: str) -> None:
    assert play(mortal, name) == []


@pytest.mark.parametrize("name", [name for name in FAULTS if FAULTS[name].on_postgres])
def test_a_database_that_is_away_meanwhile_breaks_no_promise(qemu: None, name: str) -> None:
    try:
        with pair_on_postgres() as made:
            assert play(made, name) == []
    except Lacking as exc:
        missing("PostgreSQL", exc)


@pytest.mark.parametrize("case", [case for case in CASES if not CASES[case].apart])
def test_a_worker_killed_at_steps_of_a_migration_breaks_no_promise(mortal: Pair, case: str) -> None:
    seed = random.SystemRandom().randrange(10**6)
    rng, found = random.Random(seed), Sweep(case)
    steps = record(mortal, **CASES[case].options)
    for _ in range(KILLS):
        side = rng.choice(SIDES)
        kill_at(mortal, side, rng.choice(steps[side]), rng.choice(("before", "after")), found, **CASES[case].options)
    assert not found.violations, f"seed {seed}"
    assert found.kills > KILLS // 2, f"seed {seed}: {found.not_reached}"


def test_the_steps_are_those_of_the_code(mortal: Pair) -> None:
    steps = record(mortal)
    source = [step.name for step in steps["source"]]
    expected = ["qmp migrate", "qmp migrate-continue", "send migration.finalize", "signal SIGTERM", "store SUCCESS"]
    assert [name for name in source if name in expected] == expected
    assert {"qmp migrate-incoming", "qmp cont"} <= {step.name for step in steps["target"]}


def test_migrations_there_and_back_under_random_faults_break_no_promise(qemu: None) -> None:
    if os.geteuid() != 0:
        missing("A network namespace", "needs root")
    seed = random.SystemRandom().randrange(10**6)
    found = soak(jobs=20, guests=2, seed=seed)
    assert not found.violations, f"seed {seed}"
    assert found.faults.total() and found.ended["SUCCESS"]
