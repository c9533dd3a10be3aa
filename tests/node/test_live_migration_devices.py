"""Guests whose disks are block devices move to nodes that have block devices of their own under the same paths."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hostler.errors import OperationFailed
from tests.node.migration_peers import LOG_END, log_of, run, write_writer
from tests.node.test_golden_lines import loop_device
from tests.nodes import TestNode, until
from tests.pairs import apart, end_guests, migrate, phase_of, ticks_on
from worker.kvm import images
from worker.kvm.tiny_guest import write_disk

pytestmark = pytest.mark.node

MIB = 2**20
SIZE = 8 * MIB
OLD_AT = 5 * MIB


@dataclass
class Scene:
    """Two nodes, what each sees in the folder of the guest's disks, and the first one's path of it."""

    nodes: list[TestNode]
    folders: list[Path]
    stack: ExitStack

    def device(self, side: int, name: str, size_bytes: int, fill: bytes = b"\0") -> Path:
        """A block device of the node's own, blank at its beginning, in the place of what is at this name."""
        backing = self.nodes[0].root / f"backing-{len([*self.nodes[0].root.iterdir()])}"
        backing.write_bytes(bytes(MIB) + fill * (size_bytes - MIB))
        place = self.folders[side] / name
        place.unlink(missing_ok=True)
        place.symlink_to(self.stack.enter_context(loop_device(backing)))
        return place

    def instance(self, **formats: str) -> dict[str, Any]:
        disks = [{"path": str(self.folders[0] / name), "format": format} for name, format in formats.items()]
        hvparams = {"disk_type": "ide", "kvm_flag": "disabled"}
        return {"name": "web1", "memory_mib": 16, "vcpus": 1, "disks": disks, "hvparams": hvparams}


@pytest.fixture(scope="module")
def shared(qemu: None) -> Iterator[Scene]:
    with apart() as (nodes, folders), ExitStack() as stack:
        yield Scene(nodes, folders, stack)


@pytest.fixture
def scene(shared: Scene) -> Iterator[Scene]:
    """Nothing is on the nodes but what a test makes."""
    yield shared
    end_guests(shared.nodes)
    shared.stack.close()
    for folder in shared.folders:
        for path in folder.iterdir():
            path.unlink()


def writing_guest(scene: Scene) -> Path:
    """A guest on the first node that writes its log to a block device without end."""
    disk = scene.device(0, "web1", SIZE)
    write_writer(disk)
    with disk.open("r+b") as file:
        file.seek(OLD_AT)
        file.write(os.urandom(MIB))
    return disk


def content(path: Path, begin: int, end: int) -> bytes:
    with path.open("rb") as file:
        file.seek(begin)
        return file.read(end - begin)


def refused(source: TestNode, target: TestNode) -> OperationFailed:
    """A migration that must fail, after which the guest runs on."""
    failed = source.failure("instance.migrate", name="web1", target=target.name, copy_storage="full")
    assert source.info("web1")["state"] == "running"
    return failed


def test_a_disk_is_copied_from_a_block_device_to_another_and_back(scene: Scene) -> None:
    one, other = scene.nodes
    here, there = writing_guest(scene), scene.device(1, "web1", SIZE, b"\xff")
    images.create(str(scene.folders[0] / "data"), "qcow2", 4 * MIB)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 1M", str(scene.folders[0] / "data"))
    data = scene.device(1, "data", SIZE, b"\xff")
    one.start(scene.instance(web1="raw", data="qcow2"))
    until(lambda: log_of(here) > 100, what="the guest writes")
    migrate(one, other, copy_storage="full")
    written = log_of(here)
    until(lambda: log_of(there) > written + 100, what="it writes on there")
    assert content(there, LOG_END, SIZE) == content(here, LOG_END, SIZE)
    failed = refused(other, one)  # its old disks are there
    assert {each["field"] for each in failed.details["errors"]} == {"disks[0].path", "disks[1].path"}
    assert "has content" in failed.message and "none here" in failed.message and "(node n1)" in failed.message
    assert log_of(here) == written
    here, old = scene.device(0, "web1", SIZE), scene.device(0, "data", SIZE)
    migrate(other, one, copy_storage="full")
    written = log_of(there)
    until(lambda: log_of(here) > written + 100, what="it writes on here")
    assert content(here, LOG_END, SIZE) == content(there, LOG_END, SIZE)
    one.do("instance.stop", name="web1", force=True)
    for path in (old, data):
        run("qemu-io", "-f", "qcow2", "-c", "read -P 7 1M 1M", str(path))
        run("qemu-img", "check", "-f", "qcow2", str(path))


def test_the_top_alone_is_copied_into_a_block_device_and_lies_on_the_same_file(scene: Scene) -> None:
    one, other = scene.nodes
    base, top = one.root / "base.img", scene.device(1, "web1", SIZE, b"\xff")
    write_disk(base)
    images.create_overlay(str(scene.folders[0] / "web1"), str(base), "raw")
    one.start(scene.instance(web1="qcow2"))
    count = ticks_on(one, "web1", 0)
    migrate(one, other, copy_storage="top")
    assert ticks_on(other, "web1", count) > count
    assert images.backing_file(str(top)) == (str(base), "raw")


def test_a_block_device_that_is_missing_too_small_or_in_use_is_named_and_not_touched(scene: Scene) -> None:
    one, other = scene.nodes
    writing_guest(scene)
    one.start(scene.instance(web1="raw"))
    place = scene.folders[1] / "web1"

    def why() -> str:
        failed = refused(one, other)
        assert (failed.code, failed.details["errors"][0]["field"]) == ("INVALID_ARGUMENT", "disks[0].path")
        assert "(node n2)" in failed.message
        return failed.message

    assert f"none here; make one of {SIZE} bytes" in why()
    assert not place.exists()
    small = scene.device(1, "web1", SIZE - 512, b"\xff")
    assert f"has {SIZE - 512} bytes, and the disk needs exactly {SIZE}" in why()
    assert content(small, 0, SIZE) == bytes(MIB) + b"\xff" * (SIZE - 512 - MIB)
    scene.device(1, "web1", SIZE + 512)
    assert f"has {SIZE + 512} bytes, and the disk needs exactly {SIZE}" in why()
    scene.device(1, "web1", SIZE)
    other.start({**scene.instance(web1="raw"), "name": "web2"})
    assert "is in use by instance web2" in why()


def test_a_migration_that_is_cancelled_leaves_the_targets_block_device_blank(scene: Scene) -> None:
    one, other = scene.nodes
    here, there = writing_guest(scene), scene.device(1, "web1", SIZE)
    one.start(scene.instance(web1="raw"))
    until(lambda: log_of(here) > 100, what="the guest writes")
    job = one.send("instance.migrate", name="web1", target="n2", copy_storage="full", bandwidth_mib_s=0.5)
    until(lambda: phase_of(one, job) == "storage" and any(content(there, 0, MIB)), what="it is copied")
    job.cancel()
    until(lambda: phase_of(one, job) and not any(content(there, 0, MIB)), what="it is blank again")
    before = log_of(here)
    until(lambda: log_of(here) > before, what="the guest writes on")
    migrate(one, other, copy_storage="full")
