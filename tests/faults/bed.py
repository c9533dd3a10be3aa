"""A node in the middle of its work: what every scenario finds, and how it is seen afterwards to have kept its promises.

    calm       a guest that runs, and that nobody has any business with
    stubborn   ignores its power button; a stop waits for it, behind that a start, behind that a pause
    rebooted   ignores it too; a soft reboot waits for it, behind that a resume
    slow       its start, with a tap and a user network, waits for a QEMU that hangs; behind it a job that comes after

``release`` lets all of them go on.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from hostler import Job, embedded
from hostler.contract import FINAL_JOB_STATES
from models import Job as JobRow
from tests.faults.promises import Ran, Sent, finished_at, ran, violations
from tests.nodes import QEMU, Serial, TestNode, node, tiny_instance, until
from worker.kvm.tiny_guest import BYE_MESSAGE, IGNORE_KEY, IGNORING_MESSAGE, POWER_OFF_KEY

SETTLE_S = 75.0
"""Longer than the slowest healing there is: a message that was lost is sent again after half a minute."""
FORGIVING_S = 10.0
"""For what is allowed to come a little after a job's end: its result, the release of what it had."""

QEMU_SCRIPT = """\
#!/bin/sh
name= previous=
for argument; do [ "$previous" = -name ] && name=$argument; previous=$argument; done
case " $* " in
*" -machine none "*) ;;
*) echo "$name" >>{root}/spawned; while [ -e "{root}/hold.$name" ]; do sleep 0.05; done ;;
esac
exec {qemu} "$@"
"""
IF_SCRIPT = '#!/bin/sh\necho "{script} $INSTANCE" >>{root}/networked\n'
TAP = {"mac": "52:54:00:00:00:01", "mode": "bridged", "link": "br0"}
USER = {"mac": "52:54:00:00:00:02", "mode": "user"}


class Bed:
    """A node, the jobs sent to it, and what was seen."""

    def __init__(self, made: TestNode, away_s: float) -> None:
        self.node = made
        self.away_s = away_s
        self.jobs: dict[str, Sent] = {}
        self.saw: list[str] = []
        self.untouched: list[Ran] = []
        self.secrets: list[str] = []
        self.deaths = 0
        """How often a worker or a QEMU died in mid-job: so many QEMUs more may have been started."""
        self.clock_stepped = False
        self._serials: dict[str, Path] = {}
        for name, text in (("qemu", QEMU_SCRIPT), ("ifup", IF_SCRIPT), ("ifdown", IF_SCRIPT)):
            (made.root / name).write_text(text.format(root=made.root, qemu=QEMU, script=name))
            (made.root / name).chmod(0o755)
            made.environment["HOSTLER_QEMU_BINARY" if name == "qemu" else f"HOSTLER_{name.upper()}"] = str(
                made.root / name
            )
        made.environment["HOSTLER_QEMU_TIMEOUT_S"] = "300"

    # Sending

    def send(self, label: str, task: str, /, *ends: str, **arguments: Any) -> Job:
        """Send a job that ends as ``SUCCESS``, or as one of ``ends``."""
        job = self.node.send(task, job_id=f"{label}-{secrets.token_hex(4)}", **arguments)
        self.jobs[label] = Sent(job.id, frozenset(ends or {"SUCCESS"}))
        return job

    def try_to_send(self, label: str, task: str, /, **arguments: Any) -> None:
        """Send a job while that may be impossible. Only what the client was not refused has to end."""
        try:
            self.send(label, task, **arguments)
            self.saw.append(f"a client could send {task}")
        except Exception as exc:
            self.jobs.pop(label, None)
            self.saw.append(
                f"a client that sent {task} was told: {type(exc).__name__}: {str(exc).splitlines()[0][:160]}"
            )

    def expect(self, label: str, *ends: str) -> None:
        """A job may end so, and not as was thought when it was sent."""
        self.jobs[label] = replace(self.jobs[label], ends=frozenset(ends))

    def row(self, label: str) -> JobRow | None:
        """What the database has of a job; None while it has not, or is away."""
        with suppress(SQLAlchemyError), self.node.reading() as session:
            return session.scalar(select(JobRow).where(JobRow.id == self.jobs[label].id))
        self.node.database().dispose()
        return None

    def is_in(self, label: str, *words: str) -> bool:
        """Whether a job's state or phase is one of ``words``."""
        row = self.row(label)
        return bool(row and {row.state, row.phase} & {*words})

    def await_(self, label: str, *words: str, within_s: float = 30) -> None:
        """Wait for a job to be in such a state or phase."""
        until(lambda: self.is_in(label, *words), within_s, f"{label} is in {words}")

    # The work

    def load(self) -> None:
        """Start the worker, and get it into the middle of everything."""
        root = self.node.root
        self.node.start_worker()
        for name in ("calm", "stubborn", "rebooted"):
            self.send(f"first-{name}", "instance.start", instance=tiny_instance(root, name))
        for name in ("calm", "stubborn", "rebooted"):
            self.await_(f"first-{name}", "SUCCESS")
            self._serials[name] = Path(self.node.row(name).runtime.run_dir) / "serial"  # type: ignore[union-attr]
        for name in ("stubborn", "rebooted"):
            with Serial(self._serials[name]) as serial:
                serial.tick()
                serial.send(IGNORE_KEY)
                serial.read_until(IGNORING_MESSAGE)
        self.untouched = ran(self.node, "calm")
        (root / "hold.slow").touch()
        slow = tiny_instance(root, "slow") | {"nics": [TAP, USER]}
        self.send("slow", "instance.start", instance=slow)
        self.send("stop", "instance.stop", name="stubborn", timeout_s=600)
        self.send("start", "instance.start", instance=tiny_instance(root, "stubborn"))
        self.send("pause", "instance.pause", name="stubborn")
        self.send("reboot", "instance.reboot", name="rebooted", timeout_s=600)
        self.send("resume", "instance.resume", name="rebooted")
        self.send("child", "instance.info", name="slow", after=[self.jobs["slow"].id])
        for name, count in (("calm", 1), ("stubborn", 2), ("rebooted", 2), ("slow", 1)):
            label = "slow" if name == "slow" else f"first-{name}"
            self.jobs[label] = replace(self.jobs[label], effect=partial(self._spawned_too_often, name, count))
        for label, word in (("slow", "greeting"), ("stop", "shutdown"), ("reboot", "shutdown")):
            self.await_(label, word)
        for label in ("start", "pause", "resume", "child"):
            self.await_(label, "WAITING")

    def _spawned_too_often(self, name: str, most: int) -> str | None:
        count = Counter((self.node.root / "spawned").read_text().split())[name]
        return f"{count} QEMUs were started for {name}" if count > most + self.deaths else None

    def release(self) -> None:
        """Let everything go on: the guests power off from inside, the hanging QEMU hangs no more."""
        (self.node.root / "hold.slow").unlink(missing_ok=True)
        for name in ("stubborn", "rebooted"):
            if path := self._serials.pop(name, None):
                with suppress(OSError, AssertionError), Serial(path) as serial:
                    serial.tick()
                    serial.send(POWER_OFF_KEY)
                    serial.read_until(BYE_MESSAGE)

    # What scenarios do

    def kill_worker(self, number: signal.Signals) -> None:
        """End the worker by a signal, in mid-job."""
        self.deaths += 1
        self.saw.append(f"the worker ended with {self.node.kill_worker(number)} after {number.name}")

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The worker is stopped meanwhile, as a machine that swaps or is snapshotted stops it."""
        assert self.node.worker
        self.node.worker.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.node.worker.send_signal(signal.SIGCONT)

    def kill_qemu(self, name: str) -> None:
        """kill -9."""
        self.deaths += 1
        for pid in self.node.qemu_pids():
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"-name" in argv and argv[argv.index(b"-name") + 1] == name.encode():
                os.kill(pid, signal.SIGKILL)

    def forget_connections(self) -> None:
        """Use none of the client's and the database's connections of before the fault."""
        if self.node._client:
            self.node._client.close()
            self.node._client = None
        self.node.database().dispose()

    def end(self) -> None:
        """End every process, while all they stand on is still there."""
        if self.node.worker and self.node.worker.poll() is None:
            self.node.kill_worker()
        for pid in self.node.qemu_pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not self.node.qemu_pids())
        embedded.stop(self.node.settings)

    # Afterwards

    def settle(self) -> list[str]:
        """Wait until every job has ended and all is at rest; what is then wrong."""
        self.forget_connections()
        with suppress(AssertionError):
            until(lambda: not self.unfinished(), SETTLE_S)
        if not self.unfinished():
            finished = finished_at([self.node])
            self.node.do("instance.list")  # every message sent before has been read
        else:
            finished = {}
        found: list[str] = []

        def look() -> bool:
            found[:] = violations(
                self.node, [*self.jobs.values()], untouched=self.untouched, finished=finished,
                secrets=self.secrets, clock_stepped=self.clock_stepped,
            )  # fmt: skip
            return not found

        with suppress(AssertionError):
            until(look, FORGIVING_S)
        return found

    def unfinished(self) -> list[str]:
        """The labels of the jobs that have not ended."""
        return [label for label in self.jobs if not self.is_in(label, *FINAL_JOB_STATES)]

    def ends(self) -> Counter[str]:
        """How many jobs ended how."""
        rows = [self.row(label) for label in self.jobs]
        return Counter(
            str((row.error or {}).get("code") if row.state == "FAILURE" else row.state) if row else "?" for row in rows
        )


@contextmanager
def bed(away_s: float) -> Iterator[Bed]:
    """A node for one scenario, in a network namespace of its own where that can be had. All of it is removed."""
    with _netns() as prefix, node(prefix=prefix) as made:
        yield Bed(made, away_s)


@contextmanager
def _netns() -> Iterator[tuple[str, ...]]:
    if os.geteuid() != 0 or not shutil.which("ip"):
        yield ()
        return
    name = f"hst-{secrets.token_hex(4)}"
    subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
    try:
        yield ("ip", "netns", "exec", name)
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)
