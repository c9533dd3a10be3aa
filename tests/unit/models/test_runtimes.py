"""A runtime goes with its instance, and its disks are free again when it goes."""

from __future__ import annotations

import pytest
from sqlalchemy import delete, func, select, update
from sqlalchemy.exc import IntegrityError

from models import (
    Database,
    DiskLease,
    Instance,
    Job,
    LiveMigration,
    MigrationSample,
    Node,
    Runtime,
    runtime_of,
)


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


def test_a_second_runtime_of_an_instance_on_the_same_node_is_refused(running: Database) -> None:
    with pytest.raises(IntegrityError), running.transaction() as session:
        session.add(_runtime("u2", instance_name="web1"))
    assert _counts(running) == (1, 1, 2)


@pytest.fixture
def moving(running: Database) -> Database:
    """web1 runs on n1, and n2 has a QEMU of it too."""
    with running.transaction() as session:
        session.add(Node(name="n2"))
        session.flush()
        session.add(_runtime("u2", instance_name="web1", node="n2"))
        session.flush()
        session.add(_lease("a", "web1", node="n2"))
    return running


def test_each_node_has_its_own_runtime_and_the_instance_that_of_its_owner(moving: Database) -> None:
    assert _counts(moving) == (1, 2, 3)
    with moving.reading() as session:
        assert session.get_one(Instance, "web1").runtime is runtime_of(session, "n1", "web1")
        assert {node: _uuid(runtime_of(session, node, "web1")) for node in ("n1", "n2", "n3")} == {
            "n1": "u1", "n2": "u2", "n3": None,
        }  # fmt: skip


def test_a_locked_runtime_is_read_anew(moving: Database) -> None:
    with moving.transaction() as session:
        known = runtime_of(session, "n2", "web1")
        session.execute(update(Runtime).values(pid=7).execution_options(synchronize_session=False))
        assert known and known.pid is None
        assert runtime_of(session, "n2", "web1", for_update=True) is known and known.pid == 7


def test_an_instance_that_changes_its_owner_leaves_both_runtimes_and_their_disks_as_they_are(moving: Database) -> None:
    with moving.transaction() as session:
        row = session.get_one(Instance, "web1", with_for_update=True)
        assert _uuid(row.runtime) == "u1"
        row.node = "n2"
    assert _counts(moving) == (1, 2, 3)
    with moving.reading() as session:
        assert _uuid(session.get_one(Instance, "web1").runtime) == "u2"
        assert _uuid(runtime_of(session, "n1", "web1")) == "u1"
        assert {*session.scalars(select(DiskLease.node))} == {"n1", "n2"}


def test_the_owners_runtime_goes_without_the_other_ones(moving: Database) -> None:
    with moving.transaction() as session:
        session.get_one(Instance, "web1").runtime = None
    assert _counts(moving) == (1, 1, 1)
    with moving.reading() as session:
        assert _uuid(runtime_of(session, "n2", "web1")) == "u2"


def test_an_instance_that_is_deleted_takes_the_runtimes_of_all_nodes_with_it(moving: Database) -> None:
    with moving.transaction() as session:
        session.delete(session.get_one(Instance, "web1"))
    assert _counts(moving) == (0, 0, 0)


def test_a_migration_goes_with_its_job_and_its_samples_too(running: Database) -> None:
    with running.transaction() as session:
        session.add(Job(id="j1", node="n1", task="instance.migrate", arguments={}, state="SUCCESS"))
        session.flush()
        session.add(
            LiveMigration(job_id="j1", instance_name="web1", source="n1", target="n2", stage="done", options={})
        )
        session.add_all(MigrationSample(job_id="j1", data={"pass": number}) for number in (1, 2))
    with running.reading() as session:
        samples = session.scalars(select(MigrationSample).order_by(MigrationSample.id)).all()
        assert [sample.data["pass"] for sample in samples] == [1, 2]
    with running.transaction() as session:
        session.execute(delete(Job).where(Job.id == "j1"))
    with running.reading() as session:
        assert [*session.scalars(select(LiveMigration)), *session.scalars(select(MigrationSample))] == []


def _uuid(runtime: Runtime | None) -> str | None:
    return runtime.uuid if runtime else None


def _runtime(uuid: str, node: str = "n1", **more: str) -> Runtime:
    return Runtime(
        node=node,
        uuid=uuid,
        boot_id="b1",
        executable="/usr/bin/qemu",
        accelerator="tcg",
        run_dir="/run/hostler/web1",
        hardware={"format": 1},
        taps=[],
        **more,
    )


def _lease(disk: str, instance: str, node: str = "n1") -> DiskLease:
    return DiskLease(
        node=node, file_id=f"8:{disk}", path=f"/{disk}", instance_name=instance, shared=False, read_only=False
    )


def _counts(database: Database) -> tuple[int, ...]:
    with database.reading() as session:
        return tuple(
            session.scalar(select(func.count()).select_from(table)) or 0 for table in (Instance, Runtime, DiskLease)
        )
