"""Upgraders at the same time, and upgraders that meet somebody else's lock or rows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import func, select, text

from migrations import locking, schema
from migrations.locking import exclusive_connection
from models import Database, Instance, Node, Runtime, session

UPGRADER = """
import sys, alembic.command
from migrations import schema
from models import Database
print("ready", flush=True)
sys.stdin.readline()
database = Database(sys.argv[1])
schema.ensure_current(database, may_upgrade=True)
print(schema.current_revision(database), flush=True)
"""


def test_upgraders_that_start_together_all_succeed(empty_database_url: str) -> None:
    with ExitStack() as stack:
        upgraders = [stack.enter_context(_upgrader(empty_database_url)) for _ in range(4)]
        for upgrader in upgraders:
            assert upgrader.stdout and upgrader.stdout.readline() == "ready\n"
        for upgrader in upgraders:
            assert upgrader.stdin
            upgrader.stdin.write("go\n")
            upgrader.stdin.flush()
        ends = [upgrader.communicate(timeout=60) for upgrader in upgraders]
    assert [(out, err) for out, err in ends] == [(f"{schema.head_revision()}\n", "")] * 4


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch, empty_database_url: str) -> Iterator[Database]:
    monkeypatch.setattr(locking, "TURN_TIMEOUT_S", 1)
    monkeypatch.setattr(locking, "LOCK_TIMEOUT_S", 1)
    monkeypatch.setattr(session, "SQLITE_BUSY_TIMEOUT_S", 1)
    database = Database(empty_database_url)
    try:
        yield database
    finally:
        database.dispose()


def test_an_upgrader_whose_turn_never_comes_says_so_and_changes_nothing(impatient: Database) -> None:
    with exclusive_connection(impatient), pytest.raises(schema.SchemaLocked, match="locked by somebody else"):
        schema.upgrade(impatient)
    assert schema.current_revision(impatient) is None
    schema.upgrade(impatient)


def test_a_schema_migration_does_not_hang_behind_an_open_transaction(impatient: Database) -> None:
    schema.upgrade(impatient)
    with impatient.transaction() as holder:
        holder.execute(text("SELECT * FROM uid_leases"))
        with pytest.raises(schema.SchemaLocked, match="open transaction"):
            schema.downgrade(impatient, "base")
    assert schema.current_revision(impatient) == schema.head_revision()
    schema.downgrade(impatient, "base")


def test_copying_a_table_on_sqlite_keeps_the_rows_that_refer_to_it(tmp_path: Path) -> None:
    database = _with_a_guest(tmp_path)
    with exclusive_connection(database) as connection:
        operations = Operations(MigrationContext.configure(connection))
        with operations.batch_alter_table("instances", recreate="always") as table:
            table.alter_column("reason", new_column_name="why")
    with database.reading() as reader:
        assert reader.scalar(select(func.count()).select_from(Runtime)) == 1
        assert reader.execute(text("PRAGMA foreign_keys")).scalar() == 1
    database.dispose()


def test_a_schema_migration_on_sqlite_that_loses_a_row_others_refer_to_is_taken_back(tmp_path: Path) -> None:
    database = _with_a_guest(tmp_path)
    with pytest.raises(schema.SchemaError, match="runtimes refers to one in instances that is not there"):  # noqa: SIM117
        with exclusive_connection(database) as connection:
            connection.execute(text("DELETE FROM instances"))
    with database.reading() as reader:
        assert reader.scalar(select(func.count()).select_from(Instance)) == 1
    database.dispose()


def _with_a_guest(folder: Path) -> Database:
    database = Database(f"sqlite+pysqlite:///{folder / 'hostler.sqlite'}")
    schema.upgrade(database)
    runtime = Runtime(
        node="n1", uuid="u1", boot_id="b1", executable="/q", accelerator="tcg", run_dir="/r", hardware={}, taps=[]
    )
    with database.transaction() as writer:
        writer.add(Node(name="n1"))
        writer.flush()
        writer.add(Instance(name="web1", node="n1", state="running", spec={}, runtime=runtime))
    return database


class _upgrader:
    """A process that waits for a line and then upgrades; it is ended with the block, whatever happens."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-c", UPGRADER, self.url],
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
            cwd=Path(schema.__file__).parents[1],
        )
        return self.process

    def __exit__(self, *_exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
