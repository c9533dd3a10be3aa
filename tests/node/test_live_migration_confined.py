"""Guests whose QEMU gave up its rights move too: with images held by descriptors and cards without a ROM."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults.promises import Sent
from tests.node.test_confined_changes import roms
from tests.nodes import TestNode, tiny_instance, until
from tests.pairs import apart, end_guests, frozen, hurry, in_order, migrate, slowly, stage_of, ticks_on

pytestmark = pytest.mark.node

MIB = 2**20
FIRST = 2_000_000_000 + 100 * os.getpid() + 50
"""A uid without a login, which no process of the host has but a guest of this test process."""
MODELS = {"pool": {"security_model": "pool"}, "pool and chroot": {"security_model": "pool", "use_chroot": True}}


@pytest.fixture(scope="module")
def made(qemu: None) -> Iterator[tuple[list[TestNode], list[Path]]]:
    with apart() as (nodes, folders):
        for number, node in enumerate(nodes):
            node.do("uid_pool.add", ranges=f"{FIRST + 10 * number}-{FIRST + 10 * number + 3}")
        yield nodes, folders


@pytest.fixture
def shared(made: tuple[list[TestNode], list[Path]]) -> Iterator[tuple[list[TestNode], list[Path]]]:
    yield made
    nodes, folders = made
    end_guests(nodes)
    for path in [path for folder in folders for path in folder.iterdir()]:
        path.unlink()


def file(folder: Path, name: str) -> Path:
    """A file with content that nobody but root may open."""
    path = folder / name
    path.write_bytes(os.urandom(2 * MIB))
    path.chmod(0o600)
    return path


def opened_by_descriptor(node: TestNode) -> int:
    """How many images QEMU holds that it could not have opened itself."""
    return node.monitor("web1", "info block").count("/dev/fdset/")


@pytest.mark.parametrize("model", MODELS)
def test_a_confined_guest_moves_with_all_that_was_plugged_in(
    shared: tuple[list[TestNode], list[Path]], model: str
) -> None:
    (one, other), (here, there) = shared
    built = tiny_instance(here, hvparams={"disk_type": "virtio-scsi", "cdrom_drive": True} | MODELS[model])
    paths = [Path(built["disks"][0]["path"]), file(here, "extra.img")]
    paths[0].chmod(0o600)
    one.start(built)
    one.do("instance.disk_add", name="web1", disk={"path": str(paths[1])})
    one.do("instance.cd_insert", name="web1", path=str(file(one.root, "cd.iso")))
    one.do("instance.nic_add", name="web1", nic={"mac": "52:54:00:00:00:01", "mode": "user"})
    assert opened_by_descriptor(one) == 2
    cards = roms(one)
    assert len(cards) == ("chroot" not in model), "in a chroot there is no file of a ROM"
    for path in paths:
        os.link(path, there / path.name)
    count = ticks_on(one, "web1", 0)
    failed_at_the_end(one, other)
    count = ticks_on(one, "web1", count)
    migrate(one, other)
    assert ticks_on(other, "web1", count) > count
    assert (roms(other), owner_of(other)) == (cards, other.name)
    other.do("instance.disk_remove", name="web1", path=str(paths[1]))
    other.do("instance.disk_add", name="web1", disk={"path": str(paths[1])})
    assert opened_by_descriptor(other) == 1
    for path in paths:
        path.unlink()
    count = ticks_on(other, "web1", count)
    migrate(other, one, copy_storage="full")
    assert ticks_on(one, "web1", count) > count
    assert (roms(one), owner_of(one)) == (cards, one.name)
    one.do("instance.disk_remove", name="web1", path=str(paths[1]))
    one.do("instance.stop", name="web1", force=True)
    assert [path.read_bytes() for path in paths] == [(there / path.name).read_bytes() for path in paths]
    assert in_order([one, other]) == []


def owner_of(node: TestNode) -> str:
    """The node from whose pool QEMU's uid is."""
    return f"n{(psutil.Process(node.pid('web1')).uids().real - FIRST) // 10 + 1}"


def failed_at_the_end(source: TestNode, target: TestNode) -> None:
    """The target's QEMU dies with all of the guest: the source's has let go of its images, and takes them again."""
    job = slowly(source, target)
    with frozen(target):
        hurry(source)
        until(lambda: stage_of(source, job) == "moved", what="the target has all")
        for pid in target.qemu_pids():
            os.kill(pid, signal.SIGKILL)
    until(lambda: stage_of(source, job) == "done", what="it is given up")
    until(lambda: in_order([source, target], Sent(job.id, frozenset({"MIGRATION_FAILED"}))) == [])
