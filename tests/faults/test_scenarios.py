"""Every fault in mid-job: what was sent ends, once, and no promise is broken."""

from __future__ import annotations

import pytest

from tests.faults.scenarios import SCENARIOS, play
from tests.faults.surroundings import Lacking
from tests.services import missing

pytestmark = pytest.mark.node


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_fault_in_mid_job_breaks_no_promise(qemu: None, name: str) -> None:
    try:
        played = play(name)
    except Lacking as exc:
        missing("What this scenario needs", exc)
    assert played.violations == []
    assert sum(played.ends.values()) == played.jobs
