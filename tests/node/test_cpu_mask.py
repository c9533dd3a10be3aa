"""cpu_mask on a real QEMU, as the kernel tells where its threads may run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.nodes import TestNode, tiny_instance
from tests.services import missing

pytestmark = pytest.mark.node


def allowed(pid: int) -> dict[str, str]:
    """Where each thread of a process may run, by the thread's name."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        lines = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
        found[f"{lines['Name']} {task.name}"] = lines["Cpus_allowed_list"]
    return found


@pytest.fixture
def two_processors() -> list[int]:
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        missing("A second processor", f"this process may run on {usable}")
    return usable[:2]


def test_all_threads_of_a_guest_run_on_the_processors_of_one_list_also_after_a_reboot(
    n1: TestNode, two_processors: list[int]
) -> None:
    first, second = two_processors
    n1.start(tiny_instance(n1.root, hvparams={"cpu_mask": f"{first},{second},^{first}"}, vcpus=2))
    assert {*allowed(n1.pid("web1")).values()} == {str(second)}
    n1.do("instance.reboot", name="web1", mode="hard")
    assert {*allowed(n1.pid("web1")).values()} == {str(second)}


def test_each_vcpu_runs_on_the_processors_of_its_own_list(n1: TestNode, two_processors: list[int]) -> None:
    first, second = two_processors
    n1.start(tiny_instance(n1.root, hvparams={"cpu_mask": f"{second}:{first}"}, vcpus=2))
    found = allowed(n1.pid("web1"))
    vcpus = {
        line.split()[1]: line.split()[-1] for line in n1.monitor("web1", "info cpus").splitlines() if "CPU" in line
    }
    threads = [thread.rpartition("=")[2].strip() for thread in vcpus.values()]
    lists = {name.rpartition(" ")[2]: where for name, where in found.items()}
    assert [lists[thread] for thread in threads] == [str(second), str(first)]
    assert lists[str(n1.pid("web1"))] == f"{first}{'-' if second == first + 1 else ','}{second}"


def test_a_processor_that_the_host_has_not_is_refused_and_nothing_is_left(n1: TestNode) -> None:
    failed = n1.failure("instance.start", instance=tiny_instance(n1.root, "pinned", hvparams={"cpu_mask": "4095"}))
    assert (failed.code, "4095" in failed.message) == ("INVALID_ARGUMENT", True)
    assert "pinned" not in n1.known()
