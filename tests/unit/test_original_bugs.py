"""Bugs of the original that no other test has in its name; docs/parity.md has all of them with their tests."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostler.payloads import Instance as InstancePayload
from hostler.settings import Settings
from migrations import schema
from models import Database, Instance, Node, Runtime, UidLease
from worker.kvm.arguments import HostPart, build, render
from worker.operations import isolating, uid_pool
from worker.operations.context import NodeContext

FIRST = 3_900_100_000
"""Uids that no process of a host has."""
UUID = "00000000-0000-0000-0000-000000000001"
SPEC = InstancePayload.model_validate({"name": "web1", "memory_mib": 16, "hvparams": {"security_model": "pool"}})


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeContext]:
    """A node with web1 about to be started, and a pool of its own."""
    database = Database(f"sqlite+pysqlite:///{tmp_path / 'hostler.sqlite'}")
    schema.upgrade(database)
    runtime = Runtime(
        instance_name="web1", node="n1", uuid=UUID, boot_id="b", executable="", accelerator="tcg", run_dir="",
        hardware=SPEC.model_dump(mode="json"), taps=[],
    )  # fmt: skip
    with database.transaction() as session:
        session.add(Node(name="n1"))
        session.flush()
        session.add(Instance(name="web1", node="n1", state="starting", spec={}, runtime=runtime))
    with tempfile.TemporaryDirectory(prefix="hst-", dir="/tmp") as run_dir:
        yield NodeContext(Settings(node="n1", run_dir=Path(run_dir)), database, "unused", None)  # type: ignore[arg-type]
    database.dispose()


def test_w1_a_uid_is_a_number_on_record_and_is_released_by_what_was_recorded(node: NodeContext) -> None:
    uid_pool.add(node, f"{FIRST}")
    isolating.assign_uid(node, SPEC, UUID)
    with node.database.reading() as session:
        runtime = session.get_one(Runtime, ("web1", "n1"))
    assert runtime.uid == FIRST
    assert isolating.take_back(node, runtime.hardware, runtime.uuid, runtime.uid) == [f"uid {FIRST}"]
    assert uid_pool.show(node)["free"] == 1


def test_w19_a_uid_that_was_never_leased_or_is_free_already_is_released_without_an_error(node: NodeContext) -> None:
    uid_pool.add(node, f"{FIRST}")
    assert uid_pool.release(node, UUID) is None
    isolating.assign_uid(node, SPEC, UUID)
    assert [uid_pool.release(node, UUID), uid_pool.release(node, UUID)] == [FIRST, None]
    with node.database.transaction() as session:
        session.delete(session.get_one(UidLease, ("n1", FIRST)))
    assert isolating.take_back(node, SPEC, UUID, FIRST) == []


def test_w39_all_processes_are_looked_at_once_however_large_the_pool_is(
    node: NodeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []

    def all_but_the_last_are_used() -> set[int]:
        looks.append("look")
        return {*range(FIRST, FIRST + 999)}

    monkeypatch.setattr(isolating, "uids_in_use", all_but_the_last_are_used)
    monkeypatch.setattr(uid_pool, "uids_in_use", all_but_the_last_are_used)
    uid_pool.add(node, f"{FIRST}-{FIRST + 999}")
    assert isolating.assign_uid(node, SPEC, UUID) == FIRST + 999
    assert looks == ["look"]


def test_w29_building_and_rendering_a_line_change_nothing_that_they_were_given() -> None:
    devices = {"disks": [{"path": "/disk"}], "nics": [{"mac": "52:54:00:00:00:01", "mode": "user"}]}
    instance = InstancePayload.model_validate({"name": "web1", "memory_mib": 16, **devices})
    host = HostPart(uuid=UUID, accelerator="tcg", qmp_fd=10, monitor_fd=11, block_devices=frozenset({"/disk"}))
    before = copy.deepcopy((instance, host))
    options = build(instance, host)
    argv = render("qemu", options)
    assert render("qemu", options) == argv == render("qemu", build(instance, host))
    assert (instance, host) == before
