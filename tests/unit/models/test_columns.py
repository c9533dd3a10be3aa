"""What is written is what is read, to the microsecond and the letter's case, on every database."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from sqlalchemy import select
from sqlalchemy.exc import StatementError

from migrations import schema
from models import Database, Job, Node
from tests.services import mariadb_database

TOKYO = timezone(timedelta(hours=9))


def test_a_time_comes_back_as_the_same_instant_in_utc_with_its_microseconds(database: Database) -> None:
    written = datetime(2024, 2, 29, 8, 30, 15, 123_457, tzinfo=TOKYO)
    with database.transaction() as session:
        session.add(Node(name="n1", created_at=written))
    with database.reading() as session:
        read = session.get_one(Node, "n1").created_at
    assert read == written
    assert read.tzinfo is UTC
    assert read.isoformat() == "2024-02-28T23:30:15.123457+00:00"


def test_times_are_compared_as_instants_in_a_query(database: Database) -> None:
    earlier = datetime(2024, 1, 1, 12, 0, 0, 1, tzinfo=UTC)
    with database.transaction() as session:
        session.add_all(
            [Node(name="n1", created_at=earlier), Node(name="n2", created_at=earlier + timedelta.resolution)]
        )
    with database.reading() as session:
        found = session.scalars(select(Node.name).where(Node.created_at > earlier.astimezone(TOKYO))).all()
    assert found == ["n2"]


def test_a_time_without_a_zone_is_refused_and_nothing_is_written(database: Database) -> None:
    with pytest.raises(StatementError, match="a time without a zone"), database.transaction() as session:
        session.add(Node(name="n1", created_at=datetime(2024, 1, 1)))
    with database.reading() as session:
        assert session.scalars(select(Node)).all() == []


def test_names_that_differ_in_case_are_different_names(database: Database) -> None:
    with database.transaction() as session:
        session.add_all([Node(name="web1"), Node(name="Web1")])
    with database.reading() as session:
        assert session.scalars(select(Node.name).where(Node.name == "Web1")).all() == ["Web1"]
        assert session.get(Node, "WEB1") is None


def test_a_job_keeps_documents_and_long_text_of_every_script(database: Database) -> None:
    text = "überlaufen 溢れた 🐧 " * 5000  # beyond the 64 KiB of MariaDB's TEXT
    arguments = {"name": "web1", "text": text, "big": 2**53, "nested": [{"a": None}, True, 1.5, ""]}
    _write_job(database, arguments=arguments, message=text)
    with database.reading() as session:
        job = session.scalars(select(Job)).one()
    assert (job.arguments, job.message) == (arguments, text)
    assert (job.phases, job.waiting_for, job.result, job.error) == ([], [], None, None)


def test_a_result_of_none_is_null_in_sql(database: Database) -> None:
    _write_job(database, arguments={}, result=None)
    with database.reading() as session:
        assert session.scalars(select(Job.id).where(Job.result.is_(None))).all() == ["j1"]


def test_jobs_are_counted_in_the_order_they_were_written(database: Database) -> None:
    with database.transaction() as session:
        session.add(Node(name="n1"))
    for name in ("c", "a", "b"):
        with database.transaction() as session:
            session.add(Job(id=name, node="n1", task="job.list", arguments={}, state="PENDING"))
    with database.reading() as session:
        assert session.scalars(select(Job.id).order_by(Job.sequence)).all() == ["c", "a", "b"]


@pytest.mark.mariadb
def test_a_mariadb_made_for_latin1_keeps_text_of_every_script() -> None:
    with mariadb_database(charset="latin1") as url:
        database = Database(url)
        try:
            schema.upgrade(database)
            _write_job(database, arguments={"text": "溢れた 🐧"}, message="溢れた 🐧")
            with database.reading() as session:
                job = session.scalars(select(Job)).one()
            assert (job.message, job.arguments["text"]) == ("溢れた 🐧", "溢れた 🐧")
        finally:
            database.dispose()


def _write_job(database: Database, **fields: object) -> None:
    with database.transaction() as session:
        session.add(Node(name="n1"))
        session.flush()
        session.add(Job(id="j1", node="n1", task="instance.start", state="PENDING", **fields))
