"""A real node for tests: a worker process with folders of its own, and everything it made removed at the end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
from sqlalchemy import select
from sqlalchemy.orm import Session

from hostler import embedded
from hostler.client import Client, Job
from hostler.errors import OperationFailed
from hostler.settings import Settings
from models import Database, DiskLease, Instance, InstanceLock, Runtime
from worker.kvm.tiny_guest import TICK_PREFIX, write_disk

T = TypeVar("T")
DEADLINE_S = 30.0
QEMU = shutil.which("qemu-system-x86_64") or "/usr/bin/qemu-system-x86_64"
TICK_LINE = re.compile(rb"(?m)^" + TICK_PREFIX + rb"([0-9a-f]{8})\r\n")
WORKER = (sys.executable, "-m", "hostler", "worker")
CELERY_WORKER = (sys.executable, "-m", "celery", "-A", "worker", "worker", "-l", "INFO")


def until(look: Callable[[], T], deadline_s: float = DEADLINE_S, what: str = "") -> T:
    """The first true value that ``look`` gives; an AssertionError when it gives none in time."""
    end = time.monotonic() + deadline_s
    while True:
        if value := look():
            return value
        assert time.monotonic() < end, f"did not happen within {deadline_s:g} s: {what or look}"
        time.sleep(0.02)


class Serial:
    """A guest's serial console, read up to what one waits for."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._unread = b""

    def __enter__(self) -> Serial:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def read_until(self, pattern: bytes | re.Pattern[bytes], deadline_s: float = DEADLINE_S) -> re.Match[bytes]:
        """The first match; what stands before it is dropped, what follows is kept for the next call."""
        end = time.monotonic() + deadline_s
        wanted = re.compile(re.escape(pattern)) if isinstance(pattern, bytes) else pattern
        while not (found := wanted.search(self._unread)):
            received = self._received(end - time.monotonic())
            assert received, f"{wanted.pattern!r} did not come; unread: {self._unread!r}"
            self._unread += received
        self._unread = self._unread[found.end() :]
        return found

    def tick(self) -> int:
        """The number on the tiny guest's next line."""
        return int(self.read_until(TICK_LINE)[1], 16)

    def is_silent_for(self, seconds: float) -> bool:
        """Whether the guest prints nothing for so long; what it printed before is dropped."""
        self.drain()
        return not self._received(seconds)

    def drain(self) -> bytes:
        """What has arrived by now and was not read."""
        self._socket.setblocking(False)
        with suppress(BlockingIOError):
            while received := self._socket.recv(4096):
                self._unread += received
        drained, self._unread = self._unread, b""
        return drained

    def is_open(self) -> bool:
        """Whether the other side has not hung up, after waiting for it to say something or to hang up."""
        self._socket.settimeout(DEADLINE_S)
        with suppress(ConnectionResetError):
            return bool(self._socket.recv(4096))
        return False

    def _received(self, timeout_s: float) -> bytes:
        self._socket.settimeout(max(0.001, timeout_s))
        with suppress(TimeoutError):
            return self._socket.recv(4096)
        return b""


@dataclass
class TestNode:
    """A node whose worker is a process of its own. ``environment`` overrides settings for the next ``start_worker``.

    ``prefix`` is put in front of the worker's command: ``ip netns exec NAME`` gives it a network of its own.
    """

    __test__ = False

    name: str
    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    worker: subprocess.Popen[bytes] | None = None
    _client: Client | None = None
    _database: Database | None = None

    @property
    def settings(self) -> Settings:
        values: dict[str, Any] = {
            key.removeprefix("HOSTLER_").lower(): value for key, value in self.environment.items()
        }
        return Settings(**{"node": self.name, "state_dir": self.root / "state", "run_dir": self.root / "run"} | values)

    @property
    def env(self) -> dict[str, str]:
        own = {key: value for key, value in os.environ.items() if not key.startswith("HOSTLER_")}
        return own | {
            "HOSTLER_NODE": self.name,
            "HOSTLER_STATE_DIR": str(self.root / "state"),
            "HOSTLER_RUN_DIR": str(self.root / "run"),
            **self.environment,
        }

    @property
    def log_path(self) -> Path:
        return self.root / "worker.log"

    def start_worker(self, *command: str) -> None:
        """Start the worker and wait until it is ready."""
        with self.log_path.open("ab") as log:
            began = log.tell()
            argv = [*self.prefix, *(command or WORKER)]
            self.worker = subprocess.Popen(
                argv, env=self.env, cwd=self.root, stdout=log, stderr=log, start_new_session=True
            )
        until(lambda: self._ready(began), what="the worker is ready")

    def _ready(self, began: int) -> bool:
        assert self.worker is not None
        said = self.log_path.read_bytes()[began:].decode(errors="replace")
        assert self.worker.poll() is None, f"the worker ended: {said}"
        return "worker is ready" in said

    def kill_worker(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Signal the worker, wait for its end, and return its exit status."""
        if self.worker is None:
            return 0
        self.worker.send_signal(number)
        try:
            return self.worker.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.worker.kill()
            self.worker.wait()
            raise
        finally:
            self.worker = None

    def restart_worker(self) -> None:
        """SIGKILL, and the next one."""
        self.kill_worker()
        self.start_worker()

    def refused_worker(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a worker that is expected to end by itself."""
        env = self.env | environment
        argv = [*self.prefix, *(command or WORKER)]
        return subprocess.run(argv, env=env, cwd=self.root, capture_output=True, text=True, timeout=DEADLINE_S)

    def client(self) -> Client:
        """A client of this node, closed with it."""
        if self._client is None:
            self._client = Client(settings=self.settings)
        return self._client

    def send(self, task: str, /, *args: Any, job_id: str | None = None, **kwargs: Any) -> Job:
        """Send a job as a bare ``send_task`` does: nothing is checked on this side."""
        client = self.client()
        embedded.ensure(self.settings)
        sent = client._app.send_task(
            task, args=args, kwargs=kwargs, task_id=job_id, queue=client._queue(self.name), add_to_parent=False
        )
        return client.job(sent.id)

    def do(self, task: str, /, **kwargs: Any) -> Any:
        """Send a job and wait for its result."""
        return self.send(task, **kwargs).wait(DEADLINE_S)

    def failure(self, task: str, /, *args: Any, **kwargs: Any) -> OperationFailed:
        """Send a job that must fail, and return its failure."""
        job = self.send(task, *args, **kwargs)
        try:
            result = job.wait(DEADLINE_S)
        except OperationFailed as failed:
            return failed
        raise AssertionError(f"{task} succeeded: {result}")

    def start(self, instance: dict[str, Any], **kwargs: Any) -> Any:
        """Start an instance and wait for its view."""
        return self.do("instance.start", instance=instance, **kwargs)

    def info(self, name: str) -> Any:
        """The instance's view."""
        return self.do("instance.info", name=name)

    def until_state(self, name: str, *states: str) -> Any:
        """The instance's row once it is in one of ``states``; no job is sent, so that nothing is provoked."""
        return until(lambda: self._in_state(name, states), what=f"{name} is {' or '.join(states)}")

    def _in_state(self, name: str, states: tuple[str, ...]) -> Instance | None:
        row = self.row(name)
        return row if row and row.state in states else None

    def row(self, name: str) -> Instance | None:
        """What the database has of an instance."""
        with self.reading() as session:
            return session.get(Instance, name)

    def serial(self, name: str) -> Serial:
        """The instance's serial console; it has one reader at a time."""
        return Serial(Path(self._runtime(name).run_dir) / "serial")

    def monitor(self, name: str, command: str) -> str:
        """Type a command at the guest's second monitor, the one for people; what it answers."""
        with Serial(Path(self._runtime(name).run_dir) / "monitor") as monitor:
            monitor.read_until(b"(qemu) ")
            monitor.send(command.encode() + b"\n")
            if command == "quit":
                while monitor.is_open():
                    pass
                return ""
            answer = monitor.read_until(re.compile(rb"\n((?s:.*))\(qemu\) "))[1]
            return answer.decode()

    def _runtime(self, name: str) -> Runtime:
        row = self.row(name)
        assert row and row.runtime, f"{name} does not run"
        return row.runtime

    def pid(self, name: str) -> int:
        """The pid of the instance's QEMU."""
        pid = self._runtime(name).pid
        assert pid is not None
        return pid

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A look at the node's database, past its worker."""
        with self.database().reading() as session:
            yield session

    def database(self) -> Database:
        if self._database is None:
            self._database = Database(self.settings.effective_database_url)
        return self._database

    def cli(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run ``hostler ARGUMENTS`` as a person on this node would."""
        argv = [sys.executable, "-m", "hostler", *arguments]
        return subprocess.run(argv, env=self.env, capture_output=True, text=True, timeout=90, **options)

    def cli_json(self, *arguments: str) -> Any:
        done = self.cli(*arguments, "--json")
        assert done.stdout, f"{arguments}: exit {done.returncode}, {done.stderr}"
        return json.loads(done.stdout)

    def qemu_pids(self) -> list[int]:
        """Processes that are, or pretend to be, a QEMU of this node: their standard output is a journal below it."""
        journals = f"{self.root}/run/guests/"
        return [pid for pid in psutil.pids() if _output_of(pid).startswith(journals)]

    def leftovers(self) -> dict[str, list[str]]:
        """What must be empty when no guest runs and no job is at work."""
        guests = self.root / "run" / "guests"
        with self.reading() as session:
            found: dict[str, list[Any]] = {
                "processes": self.qemu_pids(),
                "folders": [path.name for path in guests.iterdir()] if guests.is_dir() else [],
                "taps": self.tap_fds(),
                "runtimes": [*session.scalars(select(Runtime.instance_name))],
                "disk leases": [*session.scalars(select(DiskLease.path))],
                "instance locks": [*session.scalars(select(InstanceLock.instance_name))],
            }
        return {what: [str(item) for item in items] for what, items in found.items() if items}

    def tap_fds(self) -> list[str]:
        """Open taps of the worker and of its QEMUs; a tap lives as long as one of them."""
        pids = [self.worker.pid, *self.qemu_pids()] if self.worker else self.qemu_pids()
        return [link for pid in pids for link in _open_files(pid) if link == "/dev/net/tun"]

    def known(self) -> set[str]:
        """The names of the instances the database knows."""
        with self.reading() as session:
            return {*session.scalars(select(Instance.name))}

    def nothing_is_left(self) -> None:
        """Wait for the last clean-up, then insist."""
        with suppress(AssertionError):
            until(lambda: not self.leftovers(), deadline_s=5)
        assert not self.leftovers()

    def end_guests(self) -> None:
        """Kill every guest and wait until the worker has cleaned up after it."""
        for pid in self.qemu_pids():
            _kill(pid)
        if self.worker and self.worker.poll() is None:
            self.nothing_is_left()

    def remove(self) -> None:
        """End everything this node started, by identity, and delete its folders."""
        if self._client:
            self._client.close()
        if self._database:
            self._database.dispose()
        if self.worker and self.worker.poll() is None:
            self.kill_worker()
        for pid in self.qemu_pids():
            _kill(pid)
        embedded.stop(self.settings)
        shutil.rmtree(self.root, ignore_errors=True)


def _output_of(pid: int) -> str:
    with suppress(OSError):
        return str(Path(f"/proc/{pid}/fd/1").readlink())
    return ""


def _open_files(pid: int) -> list[str]:
    found = []
    with suppress(OSError):
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                found.append(str(path.readlink()))
    return found


def _kill(pid: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        process.kill()
        process.wait(10)


@contextmanager
def node(name: str = "n1", *, prefix: tuple[str, ...] = (), **environment: str) -> Iterator[TestNode]:
    """A node without a worker yet."""
    made = TestNode(name, Path(tempfile.mkdtemp(prefix="hst-", dir="/tmp")), dict(environment), prefix)
    try:
        yield made
    finally:
        made.remove()


def tiny_instance(root: Path, name: str = "web1", **more: Any) -> dict[str, Any]:
    """An instance that boots the 512-byte guest from a disk of its own."""
    disk = root / f"{name}.img"
    if not disk.exists():
        write_disk(disk)
    hvparams = {"disk_type": "ide", "kvm_flag": "disabled"} | more.pop("hvparams", {})
    return {"name": name, "memory_mib": 16, "vcpus": 1, "disks": [{"path": str(disk)}], "hvparams": hvparams} | more


_FAKE_QEMU = """\
    #!{python} -IS
    import json, os, pathlib, re, socket, sys, time

    def listener():
        fd = next(m[1] for a in sys.argv if (m := re.match("socket,id=qmp,fd=([0-9]+)", a)))
        return socket.socket(fileno=int(fd))

    def say(connection, document):
        connection.sendall(json.dumps(document).encode() + b"\\r\\n")

    version = {{"qemu": {{"major": 7, "minor": 2, "micro": 0}}, "package": ""}}
    greeting = {{"QMP": {{"version": version, "capabilities": []}}}}
    probing = "none" in [value for option, value in zip(sys.argv, sys.argv[1:]) if option == "-machine"]
    mode = pathlib.Path(__file__).with_suffix(".mode").read_text().strip()
    if probing and mode == "hangs in the probe" or not probing and mode == "hangs":
        time.sleep(600)
    if probing or mode in ("works", "hangs in the probe"):
        os.execv({qemu!r}, [sys.argv[0], *sys.argv[1:]])
    if mode == "exits":
        sys.exit("qemu: the moon is full")
    connection, _ = listener().accept()
    if mode == "talks garbage":
        connection.sendall(b"220 mail.example.org ESMTP ready\\r\\n" * 3)
        time.sleep(600)
    if mode == "closes":
        connection.close()
        time.sleep(600)
    say(connection, greeting)
    while received := connection.recv(65536):  # a command comes as a whole, with or without a line's end
        command = json.loads(received)
        if mode == "greets and dies":
            sys.exit("qemu: the lights went out")
        if command["execute"] == "cont" and mode == "dies at cont":
            sys.exit("qemu: a cosmic ray")
        if command["execute"] == "cont" and mode == "refuses cont":
            say(connection, {{"error": {{"class": "GenericError", "desc": "not today"}}, "id": command.get("id")}})
        else:
            say(connection, {{"return": {{}}, "id": command.get("id")}})
    """


class FakeQemu:
    """A program for HOSTLER_QEMU_BINARY: QEMU itself, or one that behaves as ``mode`` says, changeable at any time."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "qemu"
        self.path.write_text(textwrap.dedent(_FAKE_QEMU).format(python=sys.executable, qemu=QEMU))
        self.path.chmod(0o755)
        self.mode = "works"

    @property
    def mode(self) -> str:
        return self.path.with_suffix(".mode").read_text()

    @mode.setter
    def mode(self, mode: str) -> None:
        self.path.with_suffix(".mode").write_text(mode)

    def look_new(self) -> None:
        """Make the node probe it again."""
        now = time.time_ns()
        os.utime(self.path, ns=(now, now))
