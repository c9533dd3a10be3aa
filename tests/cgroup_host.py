"""What tests/node/test_cgroups.py has a Linux host of its own do: guests in real control groups. Run nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from hostler import Client
from hostler.payloads import InstanceView
from tests.linux_host import SAID
from tests.nodes import tiny_instance, until
from worker.isolation import cgroups
from worker.isolation.cgroups import Folders, Limits, Scopes

MOUNT = Path("/sys/fs/cgroup")
GROUPS = MOUNT / "hostler"
LIMITS = {"cgroup_memory_max_mib": 256, "cgroup_cpu_max_percent": 20, "cgroup_cpu_weight": 30}
DEADLINE_S = 120.0
MIB = 2**20


def say(text: str) -> None:
    """A line for the test outside."""
    print(f"{SAID}{text}", flush=True)


def ran(through: list[str], *argv: str) -> int:
    """Run a program in a group, and how it ended."""
    return subprocess.run([*through, *argv], capture_output=True, check=False).returncode


def number(path: Path, name: str) -> int:
    """A value of a file with lines of names and values."""
    return int(dict(line.split() for line in path.read_text().splitlines())[name])


def a_program_has_no_more_than_its_limits(groups: Folders) -> None:
    """A hog of memory is killed by the kernel; a hog of time is held back; an empty group goes."""
    hog = ("busybox", "dd", "if=/dev/zero", "of=/dev/null", "count=1")
    through = groups.enter("memory", Limits(memory_max_bytes=32 * MIB))
    assert ran(through, *hog, f"bs={8 * MIB}") == 0
    assert ran(through, *hog, f"bs={128 * MIB}") == -9
    assert number(GROUPS / "memory" / "memory.events", "oom_kill") == 1
    say("memory")
    through = groups.enter("time", Limits(cpu_max_percent=20))
    assert ran(through, "busybox", "timeout", "2", "busybox", "sh", "-c", "while :; do :; done") != 0
    assert number(GROUPS / "time" / "cpu.stat", "nr_throttled") > 0
    say("time")
    through = groups.enter("waits", Limits())
    with subprocess.Popen([*through, "busybox", "sleep", "60"]) as waits:
        until(lambda: (GROUPS / "waits" / "cgroup.procs").read_text() == f"{waits.pid}\n")
        assert {*groups.uuids()} == {"memory", "time"}
        assert raised(lambda: groups.remove("waits")).startswith("[Errno 16]")
        waits.kill()
    assert [groups.remove(name) for name in ("memory", "time", "waits", "waits")] == [True, True, True, False]
    assert ran(["/bin/sh", *groups.enter("gone", Limits())[1:-1], "/nowhere/cgroup.procs"], "busybox", "true") != 0
    groups.remove("gone")
    say("removed")


def raised(act: Callable[[], object]) -> str:
    """What an OSError says."""
    try:
        act()
    except OSError as exc:
        return str(exc)
    raise AssertionError("nothing was raised")


def guests_have_groups_of_their_own(root: Path, *, systemd: bool) -> None:
    """A real worker's guests: in their groups with their limits, which go with them however they end."""
    os.environ |= {"HOSTLER_NODE": "n1", "HOSTLER_STATE_DIR": f"{root}/state", "HOSTLER_RUN_DIR": f"{root}/run"}
    with (root / "worker.log").open("wb") as log:
        argv = [sys.executable, "-m", "hostler", "worker"]
        worker = subprocess.Popen(argv, stdout=log, stderr=log)
    until(lambda: b"worker is ready" in (root / "worker.log").read_bytes(), DEADLINE_S, "the worker is ready")
    say("worker")
    with Client() as client:
        info = client.start("n1", tiny_instance(root, hvparams=LIMITS)).wait(DEADLINE_S)
        folder = group_of(info)
        assert (folder / "memory.max").read_text() == f"{256 * MIB}\n"
        assert (folder / "cpu.max").read_text() == "20000 100000\n"
        assert (folder / "cpu.weight").read_text() == "30\n"
        assert int((folder / "memory.current").read_text()) > 8 * MIB, "its memory is another group's"
        assert group(worker.pid) == group(os.getpid())
        until(lambda: number(folder / "cpu.stat", "nr_periods") > 0, DEADLINE_S)
        say("guest")
        os.kill(info["pid"], 9)
        until(lambda: client.info("n1", "web1").wait(DEADLINE_S)["state"] == "crashed", DEADLINE_S)
        assert not folder.exists()
        say("crash")
        folder = group_of(client.start("n1", tiny_instance(root, "web2")).wait(DEADLINE_S))
        assert (folder / "memory.max").read_text() == "max\n"
        client.stop("n1", "web2", force=True).wait(DEADLINE_S)
        until(lambda: not folder.exists(), DEADLINE_S if systemd else 0, "the group is gone")
        say("stop")
        assert client.audit("n1").wait(DEADLINE_S)["findings"] == []
        if not systemd:
            a_group_that_was_left_is_found_and_removed(client)
        say("audit")
    worker.terminate()
    worker.wait(DEADLINE_S)


def a_group_that_was_left_is_found_and_removed(client: Client) -> None:
    """systemd leaves none."""
    left = "01234567-89ab-4def-8123-456789abcdef"
    (GROUPS / left).mkdir()
    found = client.audit("n1").wait(DEADLINE_S)["findings"]
    assert [each["id"] for each in found] == [f"control_group:{left}"], found
    client.repair("n1", dry_run=False).wait(DEADLINE_S)
    assert not (GROUPS / left).exists()


def group(pid: int | None) -> str:
    """The group of a process, below the mount."""
    return Path(f"/proc/{pid}/cgroup").read_text().strip().removeprefix("0::/")


def group_of(info: InstanceView) -> Path:
    """The folder of a guest's group, whose only process is its QEMU."""
    folder = MOUNT / group(info["pid"])
    assert folder in (GROUPS / info["uuid"], MOUNT / "hostler.slice" / f"hostler-{info['uuid']}.scope")
    assert (folder / "cgroup.procs").read_text() == f"{info['pid']}\n"
    return folder


def main() -> Literal[0]:
    """Everything, one after the other; the first thing that is not so ends it."""
    began = time.monotonic()
    groups = cgroups.of_host("auto")
    say(type(groups).__name__)
    if isinstance(groups, Folders):
        a_program_has_no_more_than_its_limits(groups)
    with tempfile.TemporaryDirectory(prefix="hst-") as folder:
        try:
            guests_have_groups_of_their_own(Path(folder), systemd=isinstance(groups, Scopes))
        except BaseException:
            print((Path(folder) / "worker.log").read_text()[-4000:], flush=True)
            raise
    say(f"took {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
