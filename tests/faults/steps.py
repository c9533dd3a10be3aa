"""``hostler worker`` with every step known at which it can be killed: ``python -m tests.faults.steps PLAN LOG``.

A step is a side effect of hostler's own code: a commit that wrote, a command to QEMU, a signal, a process, an ioctl, a
file or folder made or removed, a message acknowledged or sent, a result stored. They are not listed anywhere: hooks
below the code see them as they happen, named by the function they happen in, so that a new step is killed without
anybody adding a test. What the worker does in its heartbeat, or to tell how a migration goes, is no step of a job.

The plan, a file, says where to die: ``{"serial": 7, "step": "commit worker.operations.ledger.Ledger.advance", "nth": 2,
"when": "before"}``. Steps are counted anew with each serial, and written to the log.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from celery.app.base import Celery
from celery.backends.base import Backend
from celery.worker.request import Request
from sqlalchemy import Engine, event
from sqlalchemy.orm import Session

from worker.kvm.process import QemuProcess
from worker.kvm.qmp import Monitor

OURS = ("worker.", "tasks.")
AUDITED = {
    "fcntl.ioctl", "os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil.rmtree",
    "socket.bind", "subprocess.Popen",
}  # fmt: skip
NOT_OF_A_JOB = {"heartbeat", "migration-teller"}
"""Threads of which nothing depends on when they act: how often they do is chance."""
READING = {"SELECT", "PRAGMA", "BEGIN", "SHOW", "SET"}


class Recorder:
    """Counts the steps of the present serial, and ends the process at the one that the plan names."""

    def __init__(self, plan: Path, log: Path) -> None:
        self._plan_path = plan
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._stamp: tuple[int, int] | None = None
        self._plan: dict[str, Any] = {}
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()

    def before(self, step: str) -> int:
        """A step is about to happen; which one of its name it is."""
        if threading.current_thread().name in NOT_OF_A_JOB:
            return 0
        with self._lock:
            self._look()
            if not self._plan:
                return 0
            self._seen[step] += 1
            nth = self._seen[step]
            os.write(self._log, f"{json.dumps([self._plan['serial'], step, nth])}\n".encode())
        self._die_if_planned(step, nth, "before")
        return nth

    def after(self, step: str, nth: int) -> None:
        """It has happened."""
        self._die_if_planned(step, nth, "after")

    def wants_after(self, step: str, nth: int) -> bool:
        return bool(nth) and (self._plan.get("step"), self._plan.get("nth"), self._plan.get("when")) == (
            step, nth, "after",
        )  # fmt: skip

    def _die_if_planned(self, step: str, nth: int, when: str) -> None:
        if nth and (step, nth, when) == (self._plan.get("step"), self._plan.get("nth"), self._plan.get("when")):
            os.kill(os.getpid(), signal.SIGKILL)

    def _look(self) -> None:
        try:
            found = self._plan_path.stat()
        except FileNotFoundError:
            self._plan = {}
            return
        if (found.st_ino, found.st_mtime_ns) != self._stamp:
            self._stamp = found.st_ino, found.st_mtime_ns
            self._plan = json.loads(self._plan_path.read_text())
            self._seen.clear()


def caller() -> tuple[str, FrameType | None]:
    """The innermost function of hostler's that is not the plumbing around a transaction, and its frame."""
    frame: FrameType | None = sys._getframe(1)
    while frame:
        module = str(frame.f_globals.get("__name__", ""))
        if frame.f_code.co_name == "_get_default_tempdir":
            return "", None  # tries where it may write, once a process
        if module.startswith(OURS) and module != "worker.operations.patience":
            return f"{module}.{frame.f_code.co_qualname}", frame
        frame = frame.f_back
    return "", None


def watch_commits(recorder: Recorder) -> None:
    """A transaction that only read is no step."""

    def note_write(connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.split(None, 1)[0].upper() not in READING:
            connection.info["wrote"] = True

    def before(connection: Any) -> None:
        where, _ = caller()
        if connection.info.pop("wrote", False) and where:
            step = f"commit {where}"
            local.committing = step, recorder.before(step)

    def after(_session: Session) -> None:
        if committed := getattr(local, "committing", None):
            local.committing = None
            recorder.after(*committed)

    local = threading.local()
    event.listen(Engine, "before_cursor_execute", note_write)
    event.listen(Engine, "commit", before)
    event.listen(Session, "after_commit", after)


def watch_system_calls(recorder: Recorder) -> None:
    """Through the interpreter's audit events, which come before the act; after it is the next line of the caller."""

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name not in AUDITED and not (name == "open" and _writes(arguments)):
            return
        where, frame = caller()
        if frame is None:
            return
        step = f"{name} {where}"
        nth = recorder.before(step)
        if recorder.wants_after(step, nth):
            frame.f_trace = lambda *_: recorder.after(step, nth)
            sys.settrace(lambda *_: None)

    sys.addaudithook(hook)


def _writes(arguments: tuple[Any, ...]) -> bool:
    _path, _mode, flags = arguments
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def watch_calls(recorder: Recorder) -> None:
    """What no audit event tells: commands to QEMU, signals, and what goes to the broker and the result backend."""

    def wrap(owner: type[Any], method: str, name: Any) -> None:
        original = getattr(owner, method)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not (step := name(*args, **kwargs)):
                return original(*args, **kwargs)
            nth = recorder.before(step)
            try:
                return original(*args, **kwargs)
            finally:
                recorder.after(step, nth)  # also of what failed: a port that was taken, an outage

        setattr(owner, method, wrapped)

    wrap(Monitor, "execute", lambda _, command, *args, **kwargs: "" if "query" in command else f"qmp {command}")
    wrap(QemuProcess, "send_signal", lambda _, number: f"signal {number.name}")
    wrap(Request, "acknowledge", lambda request: "" if request.acknowledged else "acknowledge")
    wrap(Celery, "send_task", lambda _, task, *args, **kwargs: f"send {task}")
    wrap(Backend, "store_result", lambda _, task_id, result, state, *args, **kwargs: f"store {state}")


if __name__ == "__main__":
    made = Recorder(Path(sys.argv[1]), Path(sys.argv[2]))
    watch_commits(made)
    watch_system_calls(made)
    watch_calls(made)
    from hostler.cli import main

    sys.argv = ["hostler", "worker"]
    main()
