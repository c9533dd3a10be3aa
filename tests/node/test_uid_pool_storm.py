"""64 guests for 32 uids, sent by four processes at once: 32 run, each as another user, of the rest nothing is left.

Real QEMUs; the lease alone is raced in tests/unit/worker/operations/test_uid_pool.py.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import select

from hostler.errors import OperationFailed
from models import UidLease
from tests.nodes import TestNode, node, tiny_instance
from tests.services import empty_database_url, missing

__all__ = ["empty_database_url"]

pytestmark = pytest.mark.node

FIRST = 2_000_000_000 + 100 * os.getpid()
"""Uids without a login, which no process of the host has but guests of this test process."""
UIDS = range(FIRST, FIRST + 32)
NAMES = [f"web{number}" for number in range(64)]
DEADLINE_S = 120.0
SENDER = """\
    import json, sys
    from hostler import Client
    client = Client()
    instances = json.loads(sys.stdin.readline())
    print("ready", flush=True)
    sys.stdin.readline()
    for instance in instances:
        print(client.send(client.start.job("n1", instance)).id, flush=True)
    client.close()
"""


@pytest.fixture(autouse=True)
def _root() -> None:
    if os.geteuid() != 0:
        missing("Other uids", "needs root")


def send_at_once(made: TestNode, instances: list[dict[str, Any]]) -> list[str]:
    """Have four processes send a start of a quarter of the instances each; the jobs' ids, in the instances' order."""
    argv = [sys.executable, "-c", textwrap.dedent(SENDER)]
    senders = [
        subprocess.Popen(argv, env=made.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    try:
        for number, sender in enumerate(senders):
            say(sender, instances[16 * number : 16 * number + 16])
        assert [sender.stdout.readline() for sender in senders if sender.stdout] == ["ready\n"] * 4
        for sender in senders:
            say(sender, "go")
        return [line for sender in senders for line in sender.communicate(timeout=DEADLINE_S)[0].split()]
    finally:
        for sender in senders:
            sender.kill()
            sender.wait()


def say(sender: subprocess.Popen[str], what: object) -> None:
    assert sender.stdin
    sender.stdin.write(json.dumps(what) + "\n")
    sender.stdin.flush()


def held(made: TestNode) -> dict[int, str]:
    return {lease["uid"]: lease["instance"] for lease in made.do("uid_pool.show")["leases"]}


def test_of_64_real_starts_at_once_32_get_a_uid_each_and_32_are_refused(qemu: None, empty_database_url: str) -> None:
    settings = {"HOSTLER_DATABASE_URL": empty_database_url, "HOSTLER_LIMIT_STARTS": "64"}
    with node(**settings) as made:
        assert made.cli("db", "upgrade").returncode == 0
        made.start_worker()
        made.do("uid_pool.add", ranges=f"{UIDS[0]}-{UIDS[-1]}")
        instances = [tiny_instance(made.root, name, hvparams={"security_model": "pool"}) for name in NAMES]
        disks = {name: Path(instance["disks"][0]["path"]) for name, instance in zip(NAMES, instances, strict=True)}
        for disk in disks.values():
            disk.chmod(0o600)
        views, refused = {}, {}
        ids = dict(zip(NAMES, send_at_once(made, instances), strict=True))
        for name, job_id in ids.items():
            job = made.client().job(job_id)
            try:
                views[name] = job.wait(DEADLINE_S)
            except OperationFailed as failed:
                refused[name] = failed
        assert (len(views), len(refused)) == (32, 32)
        assert {(failed.code, failed.details["retryable"]) for failed in refused.values()} == {
            ("UID_POOL_EXHAUSTED", True)
        }
        assert {view["uid"] for view in views.values()} == {*UIDS}
        assert held(made) == {view["uid"]: name for name, view in views.items()}
        for view in views.values():
            assert {*psutil.Process(view["pid"]).uids()} == {view["uid"]}
        assert made.known() == {*views} and len(made.qemu_pids()) == 32
        assert [name for name in refused if os.listxattr(disks[name])] == []
        for job in [made.send("instance.stop", name=name, force=True) for name in views]:
            job.wait(DEADLINE_S)
        nothing_is_left(made, disks)


def nothing_is_left(made: TestNode, disks: dict[str, Path]) -> None:
    made.nothing_is_left()
    assert held(made) == {} and made.do("uid_pool.show")["free"] == 32
    assert made.do("node.audit")["findings"] == []
    with made.reading() as session:
        assert [*session.scalars(select(UidLease.instance_name).where(UidLease.instance_name.is_not(None)))] == []
    for disk in disks.values():
        assert (os.listxattr(disk), stat.S_IMODE(disk.stat().st_mode)) == ([], 0o600)
