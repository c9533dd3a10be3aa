"""Databases for tests: a scratch one on each kind of server, made for the test and dropped at its end.

The servers are the local ones, or those of TEST_POSTGRESQL_URL and TEST_MARIADB_URL, whose users may create databases.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
from sqlalchemy import URL, Connection, create_engine, make_url
from sqlalchemy.exc import OperationalError

from migrations import schema
from models import Database

POSTGRESQL_URL = "postgresql+psycopg://postgres@127.0.0.1/test"
MARIADB_URL = "mysql+pymysql://root@127.0.0.1/test"


def missing(service: str, why: object) -> NoReturn:
    """Skip the test for want of a service; on CI (``CI=true``), where all of them must be there, fail it."""
    text = f"{service} is missing: {why}"
    if os.environ.get("CI") == "true":
        pytest.fail(text, pytrace=False)
    pytest.skip(text)


@contextmanager
def postgresql_database() -> Iterator[str]:
    """The URL of an empty PostgreSQL database. It is dropped at the end, whoever is still connected to it."""
    with _server("PostgreSQL", os.environ.get("TEST_POSTGRESQL_URL") or POSTGRESQL_URL) as (server, url):
        server.exec_driver_sql(f'CREATE DATABASE "{url.database}"')
        try:
            yield url.render_as_string(hide_password=False)
        finally:
            server.exec_driver_sql(f'DROP DATABASE "{url.database}" WITH (FORCE)')


@contextmanager
def mariadb_database(charset: str = "utf8mb4") -> Iterator[str]:
    """The URL of an empty MariaDB database. It is dropped at the end, whoever is still connected to it."""
    with _server("MariaDB", os.environ.get("TEST_MARIADB_URL") or MARIADB_URL) as (server, url):
        server.exec_driver_sql(f"CREATE DATABASE `{url.database}` CHARACTER SET {charset}")
        try:
            yield url.render_as_string(hide_password=False)
        finally:
            _end_connections(server, url)
            server.exec_driver_sql(f"DROP DATABASE `{url.database}`")


@contextmanager
def _server(service: str, address: str) -> Iterator[tuple[Connection, URL]]:
    url = make_url(address)
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    try:
        try:
            server = engine.connect()
        except OperationalError as exc:
            missing(service, exc.orig)
        with server:
            yield server, url.set(database=f"hostler_test_{os.getpid()}_{secrets.token_hex(4)}")
    finally:
        engine.dispose()


def _end_connections(server: Connection, url: URL) -> None:
    # An open transaction of a failed test would keep DROP DATABASE waiting for a day.
    query = f"SELECT id FROM information_schema.processlist WHERE db = '{url.database}'"
    for connection_id in server.exec_driver_sql(query).scalars().all():
        try:
            server.exec_driver_sql(f"KILL {connection_id}")
        except OperationalError as exc:
            if not exc.orig or exc.orig.args[0] != 1094:  # ER_NO_SUCH_THREAD: it went by itself
                raise


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param("postgresql", marks=pytest.mark.postgresql),
        pytest.param("mariadb", marks=pytest.mark.mariadb),
    ]
)
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database without tables; the test runs once for each kind."""
    if request.param == "sqlite":
        yield f"sqlite+pysqlite:///{tmp_path / 'hostler.sqlite'}"
        return
    with postgresql_database() if request.param == "postgresql" else mariadb_database() as url:
        yield url


@pytest.fixture
def empty_database(empty_database_url: str) -> Iterator[Database]:
    """A database without tables; the test runs once for each kind."""
    database = Database(empty_database_url)
    try:
        yield database
    finally:
        database.dispose()


@pytest.fixture
def database(empty_database: Database) -> Database:
    """A database with all tables; the test runs once for each kind."""
    schema.upgrade(empty_database)
    return empty_database
