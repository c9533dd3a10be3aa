"""Disks that are copied: what an operator changes reaches them, and one that fails is noticed at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostler.errors import OperationFailed
from hostler.job import Job
from tests.faults.promises import Sent
from tests.nodes import TestNode, tiny_instance, until
from tests.pairs import apart, end_guests, in_order, phase_of, ticks_on

pytestmark = pytest.mark.node

MIB = 2**20
FOR_MINUTES = 0.05
"""MiB/s, at which the disk alone would take minutes."""
A_FEW_SECONDS = 0.2
"""MiB/s, for the 1 MiB that QEMU counts at least, and then for the memory."""
PROMPTLY_S = 20.0


@pytest.fixture(scope="module")
def shared(qemu: None) -> Iterator[tuple[list[TestNode], list[Path]]]:
    with apart() as scene:
        yield scene


@pytest.fixture
def both(shared: tuple[list[TestNode], list[Path]]) -> Iterator[list[TestNode]]:
    """Nothing is on the nodes but what a test makes."""
    nodes, folders = shared
    yield nodes
    end_guests(nodes)
    for folder in folders:
        for path in folder.iterdir():
            path.unlink()


def started(node: TestNode, size_bytes: int) -> int:
    """A guest that runs, with a disk that has to be copied."""
    instance: dict[str, Any] = tiny_instance(node.root)
    disk = node.root / "private" / "web1"
    disk.write_bytes(Path(instance["disks"][0]["path"]).read_bytes().ljust(size_bytes, b"x"))
    instance["disks"][0]["path"] = str(disk)
    node.start(instance)
    with node.serial("web1") as serial:
        return serial.tick()


def copying(node: TestNode, bandwidth_mib_s: float = FOR_MINUTES) -> Job:
    """A migration with its disks."""
    return node.send("instance.migrate", name="web1", target="n2", copy_storage="full", bandwidth_mib_s=bandwidth_mib_s)


def copied_at(node: TestNode) -> str:
    """What QEMU says of the disks that it copies."""
    return node.monitor("web1", "info block-jobs")


def test_a_new_bandwidth_reaches_the_disks_and_then_the_memory(both: list[TestNode]) -> None:
    a, b = both
    before = started(a, 16 * MIB)
    job = copying(a)
    until(lambda: "mirror-" in copied_at(a), what="its disk is copied")
    a.do("instance.migrate_tune", name="web1", bandwidth_mib_s=1)
    until(lambda: f"speed limit {MIB} bytes/s" in copied_at(a), PROMPTLY_S, what="the disk's new limit")
    until(lambda: f"{MIB} bytes" in a.monitor("web1", "info migrate_parameters"), PROMPTLY_S, what="the memory's")
    a.do("instance.migrate_tune", name="web1", bandwidth_mib_s=64)
    report = job.wait(PROMPTLY_S)
    assert (report["bandwidth_mib_s"], len(report["copied"])) == (64, 1)
    assert ticks_on(b, "web1", before) > before
    assert in_order(both, Sent(job.id)) == []


def test_a_wish_while_disks_are_copied_is_kept_for_the_memory(both: list[TestNode]) -> None:
    a, b = both
    before = started(a, 3 * MIB)
    job = copying(a)
    until(lambda: "mirror-" in copied_at(a), what="its disk is copied")
    a.do("instance.migrate_tune", name="web1", bandwidth_mib_s=1, force_now=True)
    report = job.wait(2 * PROMPTLY_S)
    assert [decision["what"] for decision in report["decisions"]] == ["force"]
    assert ticks_on(b, "web1", before) > before


def test_a_copy_that_fails_while_memory_is_sent_is_noticed_at_once(both: list[TestNode]) -> None:
    a, b = both
    before = started(a, 512)
    job = copying(a, A_FEW_SECONDS)
    until(lambda: phase_of(a, job) == "transfer", what="memory is on its way")
    a.do("instance.migrate_tune", name="web1", bandwidth_mib_s=0.001)
    a.monitor("web1", "block_job_cancel -f mirror-disk0")
    with pytest.raises(OperationFailed) as failed:
        job.wait(PROMPTLY_S)
    assert (failed.value.code, failed.value.details["node"]) == ("MIGRATION_FAILED", "n1")
    assert "the copying of disk0 to the target failed" in failed.value.message
    assert ticks_on(a, "web1", before) > before
    assert in_order(both, Sent(job.id, frozenset({"MIGRATION_FAILED"}))) == []
    assert b.qemu_pids() == []
