"""A real node for tests: a worker process with folders of its own, and everything it made removed at the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil

from hostler import embedded
from hostler.client import Client
from hostler.settings import Settings
from worker.kvm.process import qemu_processes
from worker.kvm.tiny_guest import write_disk

T = TypeVar("T")
DEADLINE_S = 30.0


def until(look: Callable[[], T], deadline_s: float = DEADLINE_S, what: str = "") -> T:
    """The first true value that ``look`` gives; an AssertionError when it gives none in time."""
    end = time.monotonic() + deadline_s
    while True:
        if value := look():
            return value
        assert time.monotonic() < end, f"did not happen within {deadline_s:g} s: {what or look}"
        time.sleep(0.02)


@dataclass
class TestNode:
    """A node whose worker is a process of its own. ``environment`` overrides settings for the next ``start_worker``."""

    __test__ = False

    name: str
    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    worker: subprocess.Popen[bytes] | None = None

    @property
    def settings(self) -> Settings:
        values = {key.removeprefix("HOSTLER_").lower(): value for key, value in self.environment.items()}
        return Settings(**{"node": self.name, "state_dir": self.root / "state", "run_dir": self.root / "run", **values})

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
        argv = command or (sys.executable, "-m", "hostler", "worker")
        with self.log_path.open("ab") as log:
            began = log.tell()
            self.worker = subprocess.Popen(argv, env=self.env, stdout=log, stderr=log, start_new_session=True)
        until(lambda: self._ready(began), what="the worker is ready")

    def _ready(self, began: int) -> bool:
        assert self.worker is not None
        said = self.log_path.read_bytes()[began:].decode(errors="replace")
        assert self.worker.poll() is None, f"the worker ended: {said}"
        return "worker is ready" in said

    def kill_worker(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Signal the worker and wait for its end."""
        if self.worker:
            self.worker.send_signal(number)
            self.worker.wait(DEADLINE_S)
            self.worker = None

    def client(self) -> Client:
        return Client(settings=self.settings)

    def cli(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run ``hostler ARGUMENTS`` as a person on this node would."""
        argv = [sys.executable, "-m", "hostler", *arguments]
        return subprocess.run(argv, env=self.env, capture_output=True, text=True, timeout=90, **options)

    def cli_json(self, *arguments: str) -> Any:
        done = self.cli(*arguments, "--json")
        assert done.stdout, f"{arguments}: exit {done.returncode}, {done.stderr}"
        return json.loads(done.stdout)

    def qemu_pids(self) -> list[int]:
        """Processes of QEMU that have anything of this node's run folder open or in their arguments."""
        folders = {path.name for path in (self.root / "run" / "guests").glob("*")} | self._known_uuids()
        return [identity.pid for uuid, identity in qemu_processes() if uuid in folders]

    def _known_uuids(self) -> set[str]:
        self._seen: set[str] = getattr(self, "_seen", set())
        self._seen |= {path.name for path in (self.root / "run" / "guests").glob("*")}
        return self._seen

    def leftovers(self) -> dict[str, Any]:
        """What should be empty when no guest runs: processes, folders, taps."""
        return {
            "processes": self.qemu_pids(),
            "folders": [path.name for path in (self.root / "run" / "guests").glob("*")],
        }

    def remove(self) -> None:
        """End everything this node started, by identity, and delete its folders."""
        pids = self.qemu_pids()
        self.kill_worker()
        for pid in {*pids, *self.qemu_pids()}:
            try:
                process = psutil.Process(pid)
                process.kill()
                process.wait(10)
            except psutil.NoSuchProcess:
                continue
        embedded.stop(self.settings)
        shutil.rmtree(self.root, ignore_errors=True)


@contextmanager
def node(name: str = "n1", **environment: str) -> Iterator[TestNode]:
    """A node without a worker yet."""
    made = TestNode(name, Path(tempfile.mkdtemp(prefix="hst-", dir="/tmp")), dict(environment))
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
