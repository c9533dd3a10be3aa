"""Guests in control groups of version 2, on a Linux host of the test's own: its kernel has both controllers free."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import linux_host
from tests.nodes import TestNode, tiny_instance

pytestmark = [pytest.mark.node, pytest.mark.timeout(600)]


def test_guests_are_held_to_their_limits_and_their_groups_go_with_them(qemu: None, tmp_path: Path) -> None:
    said = linux_host.run("tests.cgroup_host", tmp_path, timeout_s=400)
    assert said[:-1] == ["Folders", "memory", "time", "removed", "worker", "guest", "crash", "stop", "audit"]


@pytest.mark.slow
def test_where_systemd_runs_the_host_guests_are_in_scopes_with_their_limits(qemu: None, tmp_path: Path) -> None:
    said = linux_host.run("tests.cgroup_host", tmp_path, timeout_s=500, systemd=True)
    assert said[:-1] == ["Scopes", "worker", "guest", "crash", "stop", "audit"]


def test_a_limit_that_this_host_cannot_set_is_refused_by_name_and_nothing_is_left(new_node: TestNode) -> None:
    new_node.environment["HOSTLER_CGROUPS"] = "off"
    new_node.start_worker()
    limited = tiny_instance(new_node.root, hvparams={"cgroup_memory_max_mib": 256, "cgroup_cpu_weight": 10})
    failed = new_node.failure("instance.start", instance=limited)
    assert failed.code == "UNSUPPORTED"
    assert {each["field"] for each in failed.details["errors"]} == {
        "instance.hvparams.cgroup_memory_max_mib", "instance.hvparams.cgroup_cpu_weight",
    }  # fmt: skip
    assert "HOSTLER_CGROUPS is off" in failed.message
    new_node.nothing_is_left()
