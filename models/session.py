"""Engines and transactions. A transaction is short: none is open across QMP, fork, network or sleep."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry

URL_EXAMPLE = "postgresql+psycopg://hostler:password@host/hostler"

POOL_OVERFLOW = 64
"""As many connections beyond the pool as jobs may run at once."""

SQLITE_BUSY_TIMEOUT_S = 30
"""How long a writer waits for another one's transaction; ours last milliseconds."""


class DatabaseUnusable(Exception):
    """HOSTLER_DATABASE_URL cannot be used as it is. The text says why, and holds no password. Nothing was opened."""


class Database:
    """A database and the two ways to use it: ``transaction()`` to change, ``reading()`` to look.

    Making one connects to nothing yet, but makes the folder of an SQLite file. Raises DatabaseUnusable.
    """

    def __init__(self, url: str | URL) -> None:
        try:
            self.url = make_url(url)
            self.engine = _create_engine(self.url)
        except ModuleNotFoundError as exc:
            raise DatabaseUnusable(
                f"HOSTLER_DATABASE_URL asks for the driver {exc.name}, which is not installed; MariaDB's comes with"
                " hostler[mariadb], written mysql+pymysql://user:password@host/database"
            ) from None
        except (ArgumentError, ValueError):  # their texts may quote a password
            raise DatabaseUnusable(
                f"HOSTLER_DATABASE_URL is not a URL SQLAlchemy knows, such as {URL_EXAMPLE}"
            ) from None
        except OSError as exc:
            raise DatabaseUnusable(f"cannot make the database's folder: {exc}") from None
        self._sessions = sessionmaker(self.engine, expire_on_commit=False)
        # SQLite's waiting writers sleep and try again, in no order, and some starve; a lock makes them a queue.
        self._writer = threading.Lock() if self.is_sqlite else nullcontext()
        self._for_reading: dict[str, Any] = {"hostler_read_only": True}
        if self.url.get_backend_name() == "postgresql":
            # Under READ COMMITTED a transaction that only reads adds nothing but two round trips, BEGIN and ROLLBACK.
            self._for_reading["isolation_level"] = "AUTOCOMMIT"

    @property
    def is_sqlite(self) -> bool:
        """Whether this is SQLite, which has one writer at a time and no row locks."""
        return self.url.get_backend_name() == "sqlite"

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """A session that commits at the end and rolls back on an exception. On SQLite it is the only writer."""
        with self._writer, self._sessions.begin() as session:
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session that changes nothing and waits for no writer. Each query sees what is committed by then."""
        with self._sessions() as session:
            session.connection(execution_options=self._for_reading)
            yield session

    def dispose(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def _create_engine(url: URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        # No ping before each use, a round trip each time: after a restart one transaction fails and empties the pool,
        # and those that must not fail are repeated.
        return create_engine(url, pool_size=8, max_overflow=POOL_OVERFLOW, isolation_level="READ COMMITTED")
    if url.database in (None, "", ":memory:"):
        raise DatabaseUnusable("HOSTLER_DATABASE_URL is an SQLite database in memory, which would forget every job")
    Path(str(url.database)).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    engine = create_engine(url, connect_args={"timeout": SQLITE_BUSY_TIMEOUT_S}, max_overflow=POOL_OVERFLOW)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: DBAPIConnection, _record: ConnectionPoolEntry) -> None:
    # The driver's own BEGIN comes too late (at the first write), which lets two readers both decide to write.
    connection.isolation_level = None
    cursor = connection.cursor()
    _write_ahead(cursor)
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _write_ahead(cursor: DBAPICursor) -> None:
    """Several processes may open a new file at once; for this change SQLite does not wait for the others by itself."""
    deadline = time.monotonic() + SQLITE_BUSY_TIMEOUT_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as exc:
            if "locked" not in str(exc) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _begin_sqlite(connection: Any) -> None:
    read_only = connection.get_execution_options().get("hostler_read_only")
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")
