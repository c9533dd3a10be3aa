"""Who waits for whom: writers on SQLite one by one, readers for nobody."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import select

from migrations import schema
from models import Database, DatabaseUnusable, Job, Node


@pytest.fixture
def sqlite_database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite+pysqlite:///{tmp_path / 'hostler.sqlite'}")
    try:
        schema.upgrade(database)
        yield database
    finally:
        database.dispose()


def test_a_transaction_is_the_only_writer_on_sqlite_so_that_no_increment_is_lost(sqlite_database: Database) -> None:
    with sqlite_database.transaction() as session:
        session.add(Node(name="n1"))
        session.flush()
        session.add(Job(id="j1", node="n1", task="job.list", arguments={}, state="PENDING"))

    def increment_100_times() -> None:
        for _ in range(100):
            with sqlite_database.transaction() as session:
                job = session.scalars(select(Job)).one()
                job.attempts = job.attempts + 1

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(increment_100_times) for _ in range(2)]:
            done.result()
    with sqlite_database.reading() as session:
        assert session.scalars(select(Job.attempts)).one() == 200


def test_a_reader_does_not_wait_for_a_writer_and_sees_what_was_before(database: Database) -> None:
    with database.transaction() as session:
        session.add(Node(name="n1"))
    with database.transaction() as writer:
        writer.add(Node(name="n2"))
        writer.flush()
        with database.reading() as reader:
            assert reader.scalars(select(Node.name)).all() == ["n1"]
    with database.reading() as reader:
        assert sorted(reader.scalars(select(Node.name))) == ["n1", "n2"]


def test_a_transaction_that_raises_leaves_nothing(database: Database) -> None:
    class OnPurpose(Exception):
        pass

    with pytest.raises(OnPurpose), database.transaction() as session:
        session.add(Node(name="n1"))
        session.flush()
        raise OnPurpose
    with database.reading() as session:
        assert session.scalars(select(Node)).all() == []


def test_the_folder_of_an_embedded_database_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    database = Database(f"sqlite+pysqlite:///{tmp_path / 'state' / 'hostler.sqlite'}")
    try:
        with database.reading():
            pass
        assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    finally:
        database.dispose()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_database_in_memory_is_refused_because_it_would_forget_every_job(url: str) -> None:
    with pytest.raises(DatabaseUnusable, match="in memory"):
        Database(url)
