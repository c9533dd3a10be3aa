"""One upgrader of a database at a time, and none that hangs behind somebody else's lock."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from migrations.errors import SchemaError, SchemaLocked
from models import Database

TURN_TIMEOUT_S = 120
"""How long to wait for another upgrader. It then does our work, so this waits longer than for a lock."""

LOCK_TIMEOUT_S = 10
"""How long a statement may wait for a table: all who come later wait behind it, so that it must give up soon."""

POSTGRESQL_LOCK_ID = 0x686F73746C6572
"""``hostler`` in ASCII, read as a number. PostgreSQL's advisory locks are the database's own."""

POSTGRESQL_LOCK_NOT_AVAILABLE = "55P03"
MARIADB_LOCK_WAIT_TIMEOUT = 1205


@contextmanager
def exclusive_connection(db: Database) -> Iterator[Connection]:
    """A connection that no other upgrader has beside it. Closing it gives back the lock and all its session settings.

    On SQLite it is inside the one transaction that is the lock; elsewhere in none, so that each schema migration has
    its own. Raises SchemaLocked when the lock, or one that a statement inside the block needs, is not to be had.
    """
    prepare = _LOCKS.get(db.engine.dialect.name, _no_lock)
    try:
        with db.engine.connect() as connection:
            connection.detach()
            with prepare(connection):
                yield connection
    except OperationalError as exc:
        if _waited_too_long(exc.orig):
            raise SchemaLocked(db.url) from exc
        raise


@contextmanager
def _postgresql(connection: Connection) -> Iterator[None]:
    connection.exec_driver_sql(f"SET lock_timeout = '{TURN_TIMEOUT_S}s'")
    connection.exec_driver_sql(f"SELECT pg_advisory_lock({POSTGRESQL_LOCK_ID})")
    connection.exec_driver_sql(f"SET lock_timeout = '{LOCK_TIMEOUT_S}s'")
    connection.commit()
    yield


@contextmanager
def _mariadb(connection: Connection) -> Iterator[None]:
    # The name is the whole server's and at most 64 characters long, hence the hash of the database's name.
    turn = f"SELECT GET_LOCK(CONCAT('hostler.', MD5(DATABASE())), {TURN_TIMEOUT_S})"
    if connection.exec_driver_sql(turn).scalar() != 1:
        raise SchemaLocked(connection.engine.url)
    connection.exec_driver_sql(
        f"SET SESSION lock_wait_timeout = {LOCK_TIMEOUT_S}, innodb_lock_wait_timeout = {LOCK_TIMEOUT_S}"
    )
    connection.commit()
    yield


@contextmanager
def _sqlite(connection: Connection) -> Iterator[None]:
    # Changing a table means to drop and rename a copy, and a drop deletes what refers to it. The switch is without
    # effect inside a transaction, hence on the driver's connection, past SQLAlchemy's BEGIN.
    connection.connection.cursor().execute("PRAGMA foreign_keys=OFF")
    with connection.begin():
        yield
        dangling = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
        if dangling is not None:
            raise SchemaError(
                f"a row of table {dangling[0]} refers to one in {dangling[2]} that is not there; the schema was left"
                " as it was"
            )


def _no_lock(_connection: Connection) -> AbstractContextManager[None]:
    return nullcontext()


def _waited_too_long(error: BaseException | None) -> bool:
    return (
        getattr(error, "sqlstate", None) == POSTGRESQL_LOCK_NOT_AVAILABLE
        or getattr(error, "args", ())[:1] == (MARIADB_LOCK_WAIT_TIMEOUT,)
        or getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY  # the rest of the number says why
    )


_LOCKS: dict[str, Callable[[Connection], AbstractContextManager[None]]] = {
    "postgresql": _postgresql,
    "mysql": _mariadb,
    "mariadb": _mariadb,
    "sqlite": _sqlite,
}
