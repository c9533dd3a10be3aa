"""The uid pool: nobody gets a uid that somebody has, also not of two that ask in the same moment."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from sqlalchemy import select

from hostler.errors import InvalidArgument
from hostler.settings import Settings
from hostler.uid_ranges import expand, format_ranges, parse_ranges
from models import Database, Instance, Node, Runtime, UidLease
from tests.services import missing
from worker.errors import UidPoolExhausted
from worker.isolation.in_use import uids_in_use
from worker.operations import uid_pool
from worker.operations.context import NodeContext

DEADLINE_S = 60.0
FIRST = 1_000_000_000 + 100 * os.getpid()
"""Uids that no process of the host has, unless a test of this process gives it one."""
POOL = f"{FIRST}-{FIRST + 31}"
UUID = "00000000-0000-0000-0000-{:012}"


def node_of(database: Database, run_dir: Path, name: str = "n1") -> NodeContext:
    return NodeContext(Settings(node=name, run_dir=run_dir), database, "unused", None)  # type: ignore[arg-type]


@pytest.fixture
def node(database: Database) -> Iterator[NodeContext]:
    with database.transaction() as session:
        session.add_all([Node(name="n1"), Node(name="n2")])
    with tempfile.TemporaryDirectory(prefix="hst-", dir="/tmp") as run_dir:
        yield node_of(database, Path(run_dir))


def lease(node: NodeContext, number: int, avoid: set[int] | None = None) -> int:
    with node.database.transaction() as session:
        return uid_pool.lease(session, node.name, f"web{number}", UUID.format(number), avoid or set())


def release(node: NodeContext, number: int) -> int | None:
    return uid_pool.release(node, UUID.format(number))


def held(node: NodeContext) -> dict[int, str]:
    return {each["uid"]: each["instance"] for each in uid_pool.show(node)["leases"]}


def test_ranges_are_added_shown_and_removed_as_they_were_added(node: NodeContext) -> None:
    assert uid_pool.show(node) == {"node": "n1", "ranges": "", "size": 0, "free": 0, "leases": []}
    assert uid_pool.add(node, "30000-30009, 20000-20009")["ranges"] == "20000-20009, 30000-30009"
    assert uid_pool.add(node, "20010")["size"] == 21
    assert uid_pool.remove(node, "20000-20009,20010")["ranges"] == "30000-30009"
    assert uid_pool.show(node_of(node.database, node.settings.run_dir, "n2"))["ranges"] == ""


def test_a_refused_change_changes_nothing(node: NodeContext) -> None:
    uid_pool.add(node, "20000-20009")
    for change, text in ((uid_pool.add, "1000,20009-20010"), (uid_pool.remove, "20000-20009,7"), (uid_pool.add, "x")):
        with pytest.raises(InvalidArgument) as refused:
            change(node, text)
        assert refused.value.details["errors"][0]["field"] == "ranges"
    assert uid_pool.show(node)["ranges"] == "20000-20009"


def test_a_job_that_is_carried_out_again_finds_its_own_change_and_is_content(node: NodeContext) -> None:
    uid_pool.add(node, "20000-20009")
    assert uid_pool.add(node, "20000-20009,30000", again=True)["ranges"] == "20000-20009, 30000"
    assert uid_pool.remove(node, "30000,30001", again=True)["ranges"] == "20000-20009"


def test_the_uid_that_was_free_for_the_longest_time_is_handed_out_first(node: NodeContext) -> None:
    uid_pool.add(node, f"{FIRST}-{FIRST + 2}")
    assert [lease(node, number) for number in range(3)] == [FIRST, FIRST + 1, FIRST + 2]
    assert [release(node, number) for number in (1, 2, 0)] == [FIRST + 1, FIRST + 2, FIRST]
    assert [lease(node, number) for number in range(3, 6)] == [FIRST + 1, FIRST + 2, FIRST]


def test_history_says_who_had_a_uid_last(node: NodeContext) -> None:
    uid_pool.add(node, POOL)
    lease(node, 1)
    release(node, 1)
    assert uid_pool.show(node)["leases"] == []
    [last] = uid_pool.show(node, history=True)["leases"]
    assert (last["uid"], last["instance"], last["last_instance"]) == (FIRST, None, "web1")
    assert last["released_at"] > last["leased_at"]


def test_an_empty_pool_and_a_used_up_one_say_what_to_do(node: NodeContext) -> None:
    with pytest.raises(UidPoolExhausted, match="hostler uid-pool add 20000-20099 -n n1"):
        lease(node, 1)
    uid_pool.add(node, f"{FIRST}")
    lease(node, 1)
    with pytest.raises(UidPoolExhausted, match="all 1 uids of node n1's pool are in use"):
        lease(node, 2)
    assert held(node) == {FIRST: "web1"}


def test_a_uid_that_was_taken_out_of_the_pool_stays_with_its_guest_and_is_not_handed_out_again(
    node: NodeContext,
) -> None:
    uid_pool.add(node, f"{FIRST}")
    lease(node, 1)
    shown = uid_pool.remove(node, f"{FIRST}")
    assert (shown["size"], shown["free"], held(node)) == (0, 0, {FIRST: "web1"})
    release(node, 1)
    with pytest.raises(UidPoolExhausted):
        lease(node, 2)


def test_the_end_of_an_earlier_qemu_does_not_free_what_a_later_one_has(node: NodeContext) -> None:
    uid_pool.add(node, f"{FIRST}")
    with node.database.transaction() as session:
        uid_pool.lease(session, "n1", "web1", UUID.format(1), set())
    assert release(node, 1) == FIRST
    with node.database.transaction() as session:
        uid_pool.lease(session, "n1", "web1", UUID.format(2), set())
    assert release(node, 1) is None
    assert held(node) == {FIRST: "web1"}


def test_two_nodes_have_pools_of_their_own(node: NodeContext) -> None:
    other = node_of(node.database, node.settings.run_dir, "n2")
    uid_pool.add(node, f"{FIRST}")
    uid_pool.add(other, f"{FIRST}")
    assert lease(node, 1) == lease(other, 2) == FIRST
    release(node, 2)
    assert (held(node), held(other)) == ({FIRST: "web1"}, {FIRST: "web2"})


@pytest.fixture
def process_of_the_pool() -> Iterator[subprocess.Popen[str]]:
    """A process with the first uid as its real one alone, which the owner of /proc/PID does not tell."""
    if os.geteuid() != 0:
        missing("Another uid", "needs root")
    program = f"import os; os.setresuid({FIRST}, 0, 0); print('up', flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout and process.stdout.readline() == "up\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_uid_that_a_process_of_the_host_has_is_neither_handed_out_nor_freed(
    node: NodeContext, process_of_the_pool: subprocess.Popen[str]
) -> None:
    uid_pool.add(node, f"{FIRST}-{FIRST + 1}")
    assert FIRST in uids_in_use()
    assert lease(node, 1, uids_in_use()) == FIRST + 1
    lease(node, 2)
    assert release(node, 2) is None
    assert held(node) == {FIRST: "web2", FIRST + 1: "web1"}
    process_of_the_pool.communicate("\n")
    assert release(node, 2) == FIRST


def test_a_zombie_has_no_uid_any_more(process_of_the_pool: subprocess.Popen[str]) -> None:
    assert process_of_the_pool.stdin
    process_of_the_pool.stdin.write("\n")
    process_of_the_pool.stdin.flush()
    os.waitid(os.P_PID, process_of_the_pool.pid, os.WEXITED | os.WNOWAIT)
    assert "State:\tZ" in Path(f"/proc/{process_of_the_pool.pid}/status").read_text()
    assert FIRST not in uids_in_use()


def test_a_uid_that_owns_a_file_of_ours_is_freed_only_when_that_is_gone(node: NodeContext) -> None:
    if os.geteuid() != 0:
        missing("Another uid", "needs root")
    uid_pool.add(node, f"{FIRST}")
    lease(node, 1)
    left = node.settings.run_dir / "guests" / "left"
    left.mkdir(parents=True)
    os.chown(left, FIRST, FIRST)
    assert release(node, 1) is None
    uid_pool.reclaim(node)
    assert held(node) == {FIRST: "web1"}
    left.rmdir()
    uid_pool.reclaim(node)
    assert held(node) == {}


def test_what_a_runtime_has_is_not_reclaimed(node: NodeContext) -> None:
    uid_pool.add(node, POOL)
    lease(node, 1)
    lease(node, 2)
    with node.database.transaction() as session:
        session.add(Instance(name="web1", node="n1", state="running", spec={}))
        session.flush()
        session.add(
            Runtime(
                instance_name="web1", node="n1", uuid=UUID.format(1), boot_id="b", executable="", accelerator="tcg",
                run_dir="", hardware={}, taps=[],
            )
        )  # fmt: skip
    uid_pool.reclaim(node)
    assert held(node) == {FIRST: "web1"}


def racer(url: str, run_dir: Path, first: int, start: Barrier, won: Queue[list[int | str | None]]) -> None:
    """The main function of a process that starts 16 guests at once."""
    database = Database(url)
    node = node_of(database, run_dir)

    def attempt(number: int) -> int | None:
        try:
            return lease(node, number)
        except UidPoolExhausted:
            return None

    try:
        start.wait(DEADLINE_S)
        with ThreadPoolExecutor(16) as threads:
            won.put([*threads.map(attempt, range(first, first + 16))])
    except BaseException as exc:
        won.put([repr(exc)])
        raise
    finally:
        database.dispose()


@pytest.mark.parametrize("used_before", [False, True], ids=["new pool", "used pool"])
def test_of_64_that_ask_at_once_in_four_processes_32_get_a_uid_each_and_32_are_refused(
    node: NodeContext, used_before: bool
) -> None:
    uid_pool.add(node, POOL)
    if used_before:
        for number in range(100, 132):
            lease(node, number)
        for number in range(100, 132):
            _free_without_looking(node, number)
    context = multiprocessing.get_context("spawn")
    start, won = context.Barrier(4), context.Queue()
    url = node.database.url.render_as_string(hide_password=False)
    processes = [
        context.Process(target=racer, args=(url, node.settings.run_dir, first, start, won)) for first in (0, 16, 32, 48)
    ]
    try:
        for process in processes:
            process.start()
        found = [uid for _ in processes for uid in won.get(timeout=DEADLINE_S)]
    finally:
        for process in processes:
            process.join(DEADLINE_S)
            process.kill()
    assert found.count(None) == 32
    assert {*found} - {None} == {*expand(parse_ranges(POOL))}
    assert len(held(node)) == 32 and uid_pool.show(node)["free"] == 0
    for number in range(64):
        _free_without_looking(node, number)
    assert uid_pool.show(node) == {"node": "n1", "ranges": format_ranges(parse_ranges(POOL)), "size": 32, "free": 32,
                                   "leases": []}  # fmt: skip


def _free_without_looking(node: NodeContext, number: int) -> None:
    # Looking through /proc is tested above; 64 times would be slow.
    with node.database.reading() as session:
        uid = session.scalar(select(UidLease.uid).where(UidLease.runtime_uuid == UUID.format(number)))
    if uid is not None:
        assert release(node, number) == uid


def test_leases_have_one_holder_whatever_is_asked(node: NodeContext) -> None:
    uid_pool.add(node, POOL)
    for number in range(32):
        lease(node, number)
    with node.database.reading() as session:
        rows = session.scalars(select(UidLease)).all()
    assert len({row.uid for row in rows}) == len({row.runtime_uuid for row in rows}) == 32
    assert all(uuid.UUID(row.runtime_uuid) for row in rows if row.runtime_uuid)
