"""A runtime goes with its instance, and its disks are free again when it goes."""

from __future__ import annotations

import pytest
from sqlalchemy import delete, func, select
from sqlalchemy.exc import IntegrityError

from models import Database, DiskLease, Instance, Node, Runtime


@pytest.fixture
def running(database: Database) -> Database:
    with database.transaction() as session:
        session.add(Node(name="n1"))
        session.flush()
        session.add(Instance(name="web1", node="n1", state="running", spec={"name": "web1"}, runtime=_runtime("u1")))
        session.flush()
        session.add_all([_lease("a", "web1"), _lease("b", "web1")])
    return database


def test_a_runtime_that_is_deleted_gives_back_its_disks_and_leaves_its_instance(running: Database) -> None:
    with running.transaction() as session:
        session.get_one(Instance, "web1").runtime = None
    assert _counts(running) == (1, 0, 0)


def test_an_instance_that_is_deleted_takes_its_runtime_and_disks_with_it(running: Database) -> None:
    with running.transaction() as session:
        session.delete(session.get_one(Instance, "web1"))
    assert _counts(running) == (0, 0, 0)


def test_the_database_itself_deletes_what_belongs_to_a_deleted_instance(running: Database) -> None:
    with running.transaction() as session:
        session.execute(delete(Instance).where(Instance.name == "web1"))
    assert _counts(running) == (0, 0, 0)


def test_a_disk_lease_without_a_runtime_is_refused(running: Database) -> None:
    with pytest.raises(IntegrityError), running.transaction() as session:
        session.add(_lease("c", "web2"))
    assert _counts(running) == (1, 1, 2)


def test_a_second_runtime_of_an_instance_is_refused(running: Database) -> None:
    with pytest.raises(IntegrityError), running.transaction() as session:
        second = _runtime("u2")
        second.instance_name = "web1"
        session.add(second)
    assert _counts(running) == (1, 1, 2)


def _runtime(uuid: str) -> Runtime:
    return Runtime(
        node="n1",
        uuid=uuid,
        boot_id="b1",
        executable="/usr/bin/qemu",
        accelerator="tcg",
        run_dir="/run/hostler/web1",
        hardware={"format": 1},
        taps=[],
    )


def _lease(disk: str, instance: str) -> DiskLease:
    return DiskLease(
        node="n1", file_id=f"8:{disk}", path=f"/{disk}", instance_name=instance, shared=False, read_only=False
    )


def _counts(database: Database) -> tuple[int, ...]:
    with database.reading() as session:
        return tuple(
            session.scalar(select(func.count()).select_from(table)) or 0 for table in (Instance, Runtime, DiskLease)
        )
