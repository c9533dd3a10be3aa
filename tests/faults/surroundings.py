"""What a node stands on in a scenario, in our own hands: a PostgreSQL, a Redis, a small disk, a clock.

Each is a context manager that is given the node before its worker starts, sets what has to be set, and removes all it
made. ``Lacking`` says what this host has not.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from migrations import schema
from tests.nodes import TestNode, until

PASSWORD = "correct-horse-battery"
"""Stands in the database's URL, and must stand nowhere else."""
PATIENCE_S = 30


class Lacking(Exception):
    """This host has not what the scenario needs."""


def _root() -> None:
    if os.geteuid() != 0:
        raise Lacking("it needs root")


def _run(*argv: str | Path) -> None:
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/", timeout=60)
    assert not done.returncode, f"{argv}: {done.stdout}"


class Postgres:
    """A PostgreSQL server of our own on a unix socket."""

    secrets = (PASSWORD,)

    def __init__(self, folder: Path) -> None:
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
        if not programs:
            raise Lacking("PostgreSQL's programs are not in /usr/lib/postgresql")
        _root()
        self._programs, self._data, self._folder = programs[-1], folder / "data", folder
        shutil.chown(folder, "postgres", "postgres")
        self._as_postgres("initdb", "-U", "hostler", "-A", "trust", "--no-sync")
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://hostler:{PASSWORD}@/postgres?host={self._folder}"

    def start(self) -> None:
        """Start it, and wait until it serves."""
        options = f"-c listen_addresses= -c unix_socket_directories={self._folder} -c max_connections=120"
        self._as_postgres("pg_ctl", "-w", "-l", str(self._folder / "log"), "-o", options, "start")

    def stop(self) -> None:
        """End it as a crash does: nobody is asked, nothing is flushed."""
        self._as_postgres("pg_ctl", "-w", "-m", "immediate", "stop")

    def _as_postgres(self, program: str, *arguments: str) -> None:
        user = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups")
        _run(*user, self._programs / program, "-D", self._data, *arguments)


@contextmanager
def postgres(node: TestNode) -> Iterator[Postgres]:
    """The node's database is a PostgreSQL of our own."""
    folder = Path(tempfile.mkdtemp(prefix="hst-pg-", dir="/tmp"))
    try:
        server = Postgres(folder)
        node.environment["HOSTLER_DATABASE_URL"] = server.url
        schema.upgrade(node.database())
        yield server
    finally:
        if (pid_file := folder / "data" / "postmaster.pid").exists():
            os.kill(int(pid_file.read_text().split()[0]), signal.SIGQUIT)
            until(lambda: not pid_file.exists())
        shutil.rmtree(folder, ignore_errors=True)


class Redis:
    """A Redis of our own on a unix socket, as durable as the embedded one."""

    def __init__(self, folder: Path) -> None:
        if not (program := shutil.which("redis-server") or shutil.which("valkey-server")):
            raise Lacking("neither redis-server nor valkey-server is on PATH")
        self.socket = folder / "socket"
        self._argv = [program, "--port", "0", "--unixsocket", str(self.socket), "--dir", str(folder), "--save", ""]
        self._argv += ["--appendonly", "yes", "--appendfsync", "always", "--logfile", str(folder / "log")]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis+socket://{self.socket}?virtual_host=0"

    def start(self) -> None:
        """Start it, and wait until it serves."""
        self._process = subprocess.Popen(self._argv, start_new_session=True)
        with redis.Redis(unix_socket_path=str(self.socket)) as client:
            until(lambda: _answers(client), PATIENCE_S)

    def stop(self) -> None:
        """Kill it."""
        if self._process:
            self._process.kill()
            self._process.wait()


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


@contextmanager
def own_redis(node: TestNode) -> Iterator[Redis]:
    """Broker and results are a Redis of our own, which nobody else starts again."""
    folder = Path(tempfile.mkdtemp(prefix="hst-rd-", dir="/tmp"))
    server = Redis(folder)
    node.environment |= {"HOSTLER_BROKER_URL": server.url, "HOSTLER_RESULT_BACKEND": server.url}
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


class SmallDisk:
    """A file system of a few MiB that can be filled."""

    def __init__(self, folder: Path) -> None:
        self._filler = folder / "filler"

    def fill(self) -> None:
        """Leave not a byte."""
        with self._filler.open("ab", buffering=0) as file:
            for size in (65536, 4096, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue

    def free(self) -> None:
        """Give the space back."""
        self._filler.unlink(missing_ok=True)


@contextmanager
def small_state_disk(node: TestNode) -> Iterator[SmallDisk]:
    """The state folder is a file system of its own, of 24 MiB."""
    _root()
    folder = node.settings.state_dir
    folder.mkdir(mode=0o700)
    _run("mount", "-t", "tmpfs", "-o", "size=24m,mode=0700", "tmpfs", folder)
    try:
        yield SmallDisk(folder)
    finally:
        _run("umount", "--lazy", folder)


_STEPPED_CLOCK = """\
import datetime, pathlib, time

# Not by libfaketime: it takes the monotonic deadline of time.sleep for a wall-clock time.
file, now_ns, now = pathlib.Path({file!r}), time.time_ns, datetime.datetime.now
offset_s = lambda: int(file.read_text())
time.time_ns = lambda: now_ns() + offset_s() * 10**9
time.time = lambda: time.time_ns() / 10**9

class Any(type):
    def __instancecheck__(cls, value):
        return isinstance(value, true)

true = datetime.datetime

class Stepped(true, metaclass=Any):
    @classmethod
    def now(cls, tz=None):
        return now(tz) + datetime.timedelta(seconds=offset_s())

    @classmethod
    def utcnow(cls):
        return cls.now(datetime.timezone.utc).replace(tzinfo=None)

datetime.datetime = Stepped
"""


class Clock:
    """The worker's wall clock. Its monotonic clock goes on undisturbed, as it does when a host's clock is set."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.step(0)

    def step(self, seconds: int) -> None:
        """Set the clock to the true time and so much."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds}")
        new.rename(self._file)


@contextmanager
def clock(node: TestNode) -> Iterator[Clock]:
    """The worker sees a clock of ours."""
    folder = node.root / "clock"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_STEPPED_CLOCK.format(file=str(folder / "offset_s")))
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    node.prefix = (*node.prefix, "env", f"PYTHONPATH={path}")
    yield Clock(folder / "offset_s")
