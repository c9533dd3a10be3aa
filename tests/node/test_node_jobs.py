"""node.info, node.verify and node.powercycle on a real worker, as programs and as people ask for them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.nodes import DEADLINE_S, FakeQemu, TestNode, tiny_instance, until
from worker.kvm.process import boot_id
from worker.operations import powercycle

pytestmark = pytest.mark.node

# A worker that finds a pipe where the kernel's trigger is, and a program that does nothing where reboot(8) is.
HARMLESS = """
import sys
from pathlib import Path
from worker.operations import powercycle
powercycle.means = lambda: powercycle.Means(Path({pipe!r}), ("false",))
from hostler.cli import main
sys.argv[1:] = ["worker"]
sys.exit(main())
"""


@dataclass
class Kernel:
    """What a worker that reboots its host would tell the kernel, letter by letter."""

    path: Path
    pipe: int

    def letters(self) -> bytes:
        with suppress(BlockingIOError):
            return os.read(self.pipe, 100)
        return b""

    def worker(self) -> tuple[str, ...]:
        """The command of a worker that cannot reach the real one."""
        assert callable(powercycle.means)
        return sys.executable, "-c", HARMLESS.format(pipe=str(self.path))


@pytest.fixture
def kernel(new_node: TestNode) -> Iterator[Kernel]:
    path = new_node.root / "sysrq-trigger"
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        yield Kernel(path, pipe)
    finally:
        new_node.kill_worker()
        os.close(pipe)


def test_the_facts_of_a_node_for_programs_and_for_people(n1: TestNode) -> None:
    n1.start(tiny_instance(n1.root))
    facts = n1.cli_json("node", "info")
    assert (facts["node"], facts["boot_id"], facts["instances"]) == ("n1", boot_id(), {"running": 1})
    assert facts["accelerator"] in ("kvm", "tcg") and facts["accelerator_reason"]
    assert facts["qemu_version"] and facts["qemu_binary"] and facts["qemu_problem"] is None
    assert facts["state_dir"] == str(n1.settings.state_dir) and facts["state_dir_free_mib"] > 0
    assert n1.worker and facts["worker_pid"] == n1.worker.pid
    shown = n1.cli("node", "info")
    assert shown.returncode == 0 and "1 running" in shown.stdout and facts["qemu_version"] in shown.stdout


def test_a_node_in_order_has_no_errors(n1: TestNode) -> None:
    found = n1.cli_json("node", "verify")
    assert found["errors"] == []
    assert {"qemu", "kvm", "tun", "state_dir", "run_dir", "database", "boot_id", "ifup", "bridges"} <= {
        *found["checked"]
    }
    shown = n1.cli("node", "verify")
    assert shown.returncode == 0 and "n1: 0 error(s)" in shown.stdout


def test_all_that_broke_under_a_worker_is_told_at_once(new_node: TestNode) -> None:
    qemu, script = FakeQemu(new_node.root), new_node.root / "ifup"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    new_node.environment |= {"HOSTLER_QEMU_BINARY": str(qemu.path), "HOSTLER_IFUP": str(script)}
    new_node.start_worker()
    qemu.path.unlink()
    script.chmod(0o644)
    shutil.rmtree(new_node.settings.run_dir)
    failed = new_node.cli("node", "verify", "--json")
    assert failed.returncode == 1
    errors = {error["subject"]: error for error in json.loads(failed.stdout)["errors"]}
    assert {"qemu", "ifup", "run_dir"} <= errors.keys()
    assert all(error["what"] and error["what_to_do"] for error in errors.values())
    shown = new_node.cli("node", "verify")
    assert shown.returncode == 1 and f"-> chmod 0755 {script}" in shown.stdout
    assert str(qemu.path) in new_node.do("node.info")["qemu_problem"]


def test_a_host_is_rebooted_once_whatever_is_delivered_again(new_node: TestNode, kernel: Kernel) -> None:
    new_node.environment["HOSTLER_ALLOW_POWERCYCLE"] = "true"
    new_node.start_worker(*kernel.worker())
    assert new_node.failure("node.powercycle", confirm="n2").details["errors"][0]["field"] == "confirm"
    assert new_node.failure("node.powercycle").details["errors"][0]["field"] == "confirm"
    before = new_node.send("node.powercycle", job_id="mine", confirm="n1", boot_id=boot_id())
    assert before.wait(DEADLINE_S) is None
    assert until(kernel.letters) == b"b"
    new_node.send("node.powercycle", job_id="mine", confirm="n1")
    until(lambda: b"dropped a duplicate delivery" in new_node.log_path.read_bytes())
    new_node.kill_worker()  # as the host's end does
    new_node.start_worker(*kernel.worker())
    new_node.send("node.powercycle", job_id="mine", confirm="n1")
    assert new_node.do("job.info", id="mine")["state"] == "SUCCESS"
    until(lambda: new_node.log_path.read_bytes().count(b"dropped a duplicate delivery") == 2)
    new_node.kill_worker(signal.SIGTERM)  # it would wait for an act that is under way
    assert kernel.letters() == b""


def test_a_person_types_the_nodes_name_and_sees_what_is_at_stake(new_node: TestNode, kernel: Kernel) -> None:
    new_node.environment["HOSTLER_ALLOW_POWERCYCLE"] = "true"
    new_node.start_worker(*kernel.worker())
    new_node.start(tiny_instance(new_node.root))
    wrong = new_node.cli("node", "powercycle", input="n2\n")
    assert wrong.returncode == 2 and "nothing was done" in wrong.stderr and "1 running" in wrong.stderr
    assert new_node.cli("node", "powercycle", "--confirm", "yes").returncode == 2
    assert not [job for job in new_node.do("job.list", queries=True) if job["task"] == "node.powercycle"]
    right = new_node.cli("node", "powercycle", input="n1\n")
    assert (right.returncode, right.stdout) == (0, "n1 reboots now.\n"), right.stderr
    assert until(kernel.letters) == b"b"
    silent = new_node.cli("node", "powercycle", "--confirm", "n1", "--json")
    assert json.loads(silent.stdout) is None and "Type" not in silent.stderr
    assert until(kernel.letters) == b"b"


def test_a_cancelled_powercycle_reboots_nothing(new_node: TestNode, kernel: Kernel) -> None:
    new_node.environment["HOSTLER_ALLOW_POWERCYCLE"] = "true"
    new_node.start_worker(*kernel.worker())
    job = new_node.send("node.powercycle", confirm="n1", after=["never-sent"])
    until(lambda: job.state == "WAITING")
    assert new_node.do("job.cancel", id=job.id)["outcome"] == "revoked"
    new_node.send("node.powercycle", job_id=job.id, confirm="n1")
    until(lambda: b"dropped a duplicate delivery" in new_node.log_path.read_bytes())
    new_node.kill_worker(signal.SIGTERM)
    assert kernel.letters() == b""


def test_a_node_allows_no_powercycle_by_default(new_node: TestNode, kernel: Kernel) -> None:
    new_node.start_worker(*kernel.worker())
    refused = new_node.failure("node.powercycle", confirm="n1")
    assert refused.code == "UNSUPPORTED" and "HOSTLER_ALLOW_POWERCYCLE=true" in refused.message
    assert new_node.cli("node", "powercycle", "--confirm", "n1").returncode == 1
    new_node.kill_worker(signal.SIGTERM)
    assert kernel.letters() == b""
