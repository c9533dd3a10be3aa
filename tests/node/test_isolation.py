"""Guests kept apart: every security model started for real, and read back from /proc what its QEMU may do."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, select

from hostler.errors import OperationFailed
from models import Runtime, UidLease
from tests.nodes import DEADLINE_S, FakeQemu, TestNode, node, tiny_instance, until
from tests.services import missing

pytestmark = pytest.mark.node

FIRST = 2_000_000_000 + 100 * os.getpid()
"""Uids without a login, which no process of the host has but guests of this test process."""
POOL = {"security_model": "pool"}
USER = {"security_model": "user", "security_domain": "nobody"}
CHROOT = {"use_chroot": True}
NOBODY = 65534
ALL_RIGHTS = int(re.findall(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())[0], 16)


@pytest.fixture(scope="module", autouse=True)
def _root() -> None:
    if os.geteuid() != 0:
        missing("Other uids", "needs root")


@pytest.fixture
def pool(n1: TestNode) -> Iterator[TestNode]:
    """The node, with three uids for guests."""
    ranges = f"{FIRST}-{FIRST + 2}"
    n1.do("uid_pool.add", ranges=ranges)
    yield n1
    n1.end_guests()
    n1.do("uid_pool.remove", ranges=ranges)
    with n1.database().transaction() as session:
        session.execute(delete(UidLease))


def instance(made: TestNode, name: str = "web1", **hvparams: Any) -> dict[str, Any]:
    built = tiny_instance(made.root, name, hvparams=hvparams)
    disk(made, name).chmod(0o600)
    return built


def disk(made: TestNode, name: str = "web1") -> Path:
    return made.root / f"{name}.img"


def status(pid: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.split() for key, value in (line.split(":", 1) for line in lines)}


def holders(made: TestNode) -> dict[int, str]:
    """Which guest has which uid."""
    return {lease["uid"]: lease["instance"] for lease in made.do("uid_pool.show")["leases"]}


def nothing_is_left(made: TestNode, *names: str) -> None:
    made.nothing_is_left()
    assert holders(made) == {}
    assert made.do("node.audit")["findings"] == []
    for name in names:
        assert os.listxattr(disk(made, name)) == []
        assert stat.S_IMODE(disk(made, name).stat().st_mode) == 0o600


@pytest.mark.parametrize("hvparams", [{}, CHROOT, USER, USER | CHROOT, POOL, POOL | CHROOT], ids=str)
def test_qemu_has_the_rights_that_its_security_model_gives_it_and_no_more(
    pool: TestNode, hvparams: dict[str, Any]
) -> None:
    uid = {"user": NOBODY, "pool": FIRST}.get(hvparams.get("security_model", ""), 0)
    view = pool.start(instance(pool, **hvparams))
    assert view["uid"] == (uid or None)
    found, folder = status(view["pid"]), view["run_dir"]
    assert {*found["Uid"]} == {str(uid)}
    if uid != NOBODY:  # whose group the distribution chose
        assert {*found["Gid"]} == {str(uid)}
        assert {*found["Groups"]} <= {str(uid)}
    assert "0" not in found["Gid"] or not uid
    assert int(found["CapEff"][0], 16) == int(found["CapPrm"][0], 16) == (0 if uid else ALL_RIGHTS)
    assert (found["Seccomp"], found["NoNewPrivs"]) == (["2"], ["1"])
    confined = f"{folder}/chroot" if hvparams.get("use_chroot") else "/"
    assert str(Path(f"/proc/{view['pid']}/root").readlink()) == confined
    own = (str(disk(pool)), f"{folder}/journal", f"{folder}/qemu.log", "/memfd:", "socket:", "anon_inode:", "pipe:")
    links = [str(link.readlink()) for link in Path(f"/proc/{view['pid']}/fd").iterdir()]
    assert [link for link in links if not link.startswith((*own, "/dev/null"))] == []
    with pool.serial("web1") as serial:
        assert serial.tick() < serial.tick()
    pool.do("instance.stop", name="web1", force=True)
    nothing_is_left(pool, "web1")


def test_a_pool_guest_can_open_its_own_disk_and_nobody_elses(pool: TestNode) -> None:
    uids = {name: pool.start(instance(pool, name, **POOL))["uid"] for name in ("web1", "web2")}
    assert {*uids.values()} == {FIRST, FIRST + 1} == {*holders(pool)}
    pool.root.chmod(0o711)
    assert {(name, disk) for name, uid in uids.items() for disk in uids if may_write(pool, disk, uid)} == {
        ("web1", "web1"), ("web2", "web2"),
    }  # fmt: skip
    pool.do("instance.stop", name="web1", force=True)
    assert not may_write(pool, "web1", uids["web1"])
    assert may_write(pool, "web2", uids["web2"])


def may_write(made: TestNode, name: str, uid: int) -> bool:
    done = subprocess.run(["/bin/sh", "-c", f": >>{name}.img"], cwd=made.root, user=uid, group=uid, extra_groups=[],
                          capture_output=True)  # fmt: skip
    return done.returncode == 0


def test_a_disk_that_guests_share_stays_open_to_those_that_run(pool: TestNode) -> None:
    built = [instance(pool, name, **POOL) for name in ("web1", "web2")]
    shared = {"path": str(disk(pool)), "shared": True}
    first, second = (pool.start(each | {"disks": [shared]})["uid"] for each in built)
    pool.root.chmod(0o711)
    assert may_write(pool, "web1", first) and may_write(pool, "web1", second)
    pool.do("instance.stop", name="web1", force=True)
    assert not may_write(pool, "web1", first)
    assert may_write(pool, "web1", second)
    pool.do("instance.stop", name="web2", force=True)
    nothing_is_left(pool, "web1")


def test_two_guests_of_one_login_that_share_a_disk_do_not_take_it_from_each_other(pool: TestNode) -> None:
    built = [instance(pool, name, **USER) for name in ("web1", "web2")]
    for each in built:
        pool.start(each | {"disks": [{"path": str(disk(pool)), "shared": True}]})
    pool.root.chmod(0o711)
    pool.do("instance.stop", name="web1", force=True)
    assert may_write(pool, "web1", NOBODY)
    pool.do("instance.stop", name="web2", force=True)
    nothing_is_left(pool, "web1")


def test_of_more_guests_than_uids_the_rest_is_refused_and_leaves_nothing(pool: TestNode) -> None:
    names = [f"many{number}" for number in range(6)]
    jobs = {name: pool.send("instance.start", instance=instance(pool, name, **POOL)) for name in names}
    views, refused = {}, {}
    for name, job in jobs.items():
        try:
            views[name] = job.wait(DEADLINE_S)
        except OperationFailed as failed:
            refused[name] = failed
    assert (len(views), len(refused)) == (3, 3)
    assert {*holders(pool)} == {view["uid"] for view in views.values()} == {FIRST, FIRST + 1, FIRST + 2}
    for name, failed in refused.items():
        assert (failed.code, failed.details["retryable"]) == ("UID_POOL_EXHAUSTED", True)
        assert os.listxattr(disk(pool, name)) == []
    assert {name for name in pool.known() if name.startswith("many")} == {*views}
    for view in views.values():
        assert {*status(view["pid"])["Uid"]} == {str(view["uid"])}
    pool.end_guests()
    nothing_is_left(pool, *names)


def test_a_reboot_takes_one_uid_and_gives_the_one_before_back(pool: TestNode) -> None:
    before = pool.start(instance(pool, **POOL))["uid"]
    view = pool.do("instance.reboot", name="web1", mode="hard")
    assert view["uid"] != before  # the one that was free for the longest time
    assert holders(pool) == {view["uid"]: "web1"}
    assert {*status(view["pid"])["Uid"]} == {str(view["uid"])}


def test_a_login_that_is_not_there_or_not_fit_is_refused_before_anything_is_done(pool: TestNode) -> None:
    pool.do("uid_pool.add", ranges=f"{NOBODY}", force=True)
    for login, reason in (
        ("no-such-login", "Unknown security domain user"),
        ("root", "is root"),
        ("nobody", f"its uid {NOBODY} belongs to the pool of node n1"),
    ):
        built = instance(pool, "other", security_model="user", security_domain=login)
        failed = pool.failure("instance.start", instance=built)
        assert failed.code == "INVALID_ARGUMENT"
        [error] = failed.details["errors"]
        assert error["field"] == "instance.hvparams.security_domain" and reason in error["reason"]
    pool.do("uid_pool.remove", ranges=f"{NOBODY}")
    nothing_is_left(pool, "other")
    assert "other" not in pool.known()


def test_a_disk_that_everybody_may_read_is_worth_a_warning(pool: TestNode) -> None:
    built = instance(pool, **POOL)
    assert "instance.disks[0].path" not in warnings(pool, built)
    disk(pool).chmod(0o604)
    assert "(mode 0604); chmod o= it" in warnings(pool, built)["instance.disks[0].path"]
    assert "instance.disks[0].path" not in warnings(pool, instance(pool) | {"disks": built["disks"]})


def warnings(made: TestNode, built: dict[str, Any]) -> dict[str, str]:
    report = made.do("instance.check", instance=built)
    assert report["errors"] == []
    return {each["field"]: each["reason"] for each in report["warnings"]}


def test_a_file_system_without_access_lists_is_named_and_nothing_is_left(pool: TestNode) -> None:
    built, where = instance(pool, **POOL), pool.root / "ramfs"
    where.mkdir()
    mounted = subprocess.run(["mount", "-t", "ramfs", "ramfs", str(where)], capture_output=True, text=True)
    if mounted.returncode:
        missing("A file system without access lists", mounted.stderr.strip())
    try:
        (where / "data.img").write_bytes(disk(pool).read_bytes())
        built["disks"].append({"path": str(where / "data.img")})
        failed = pool.failure("instance.start", instance=built)
        assert failed.code == "UNSUPPORTED"
        assert f"{where}/data.img" in failed.message and "access control lists" in failed.message
        nothing_is_left(pool, "web1")
    finally:
        subprocess.run(["umount", str(where)], check=True)


def test_the_next_worker_gives_back_what_a_guest_had_that_ended_without_one(pool: TestNode) -> None:
    view = pool.start(instance(pool, **POOL))
    pool.kill_worker()
    os.kill(view["pid"], 9)
    pool.start_worker()
    until(lambda: not pool.leftovers(), what="the guest is cleaned up after")
    nothing_is_left(pool, "web1")


def test_a_lease_that_somebody_removed_does_not_keep_the_rest_from_being_given_back(pool: TestNode) -> None:
    pool.start(instance(pool, **POOL))
    with pool.database().transaction() as session:
        session.execute(delete(UidLease))
    pool.do("instance.stop", name="web1", force=True)
    nothing_is_left(pool, "web1")


def test_what_a_qemu_left_in_its_chroot_is_kept_for_a_person(pool: TestNode) -> None:
    view = pool.start(instance(pool, **CHROOT))
    (Path(view["run_dir"]) / "chroot" / "evil").write_text("hello")
    pool.do("instance.stop", name="web1", force=True)
    [item] = pool.cli_json("quarantine", "list")["items"]
    assert item["name"].startswith("web1-") and item["size_bytes"] > 5
    with tarfile.open(item["path"]) as tar:
        content = tar.extractfile("evil")
        assert content and content.read() == b"hello"
    assert "possibly its guest broke out" in pool.log_path.read_text()
    nothing_is_left(pool, "web1")
    failed = pool.failure("quarantine.release", names=[item["name"], "other.tar"])
    assert failed.code == "INVALID_ARGUMENT" and Path(item["path"]).exists()
    assert pool.cli("quarantine", "release", item["name"]).stdout == f"Deleted {item['name']}.\n"
    assert pool.cli("quarantine", "list").stdout == "The quarantine is empty.\n"


def test_a_confined_qemu_of_the_pool_cannot_put_anything_into_its_chroot(pool: TestNode) -> None:
    view = pool.start(instance(pool, **POOL | CHROOT))
    info = (Path(view["run_dir"]) / "chroot").stat()
    assert (info.st_uid, stat.S_IMODE(info.st_mode)) == (0, 0o700)


@pytest.mark.parametrize("mode", ["exits", "greets and dies", "refuses cont"])
def test_a_start_that_fails_gives_uid_and_disk_back(qemu: None, mode: str) -> None:
    with node() as made:
        fake = FakeQemu(made.root)
        made.environment["HOSTLER_QEMU_BINARY"] = str(fake.path)
        made.start_worker()
        made.do("uid_pool.add", ranges=f"{FIRST}")
        made.do("node.info")  # probed while it works
        fake.mode = mode
        failed = made.failure("instance.start", instance=instance(made, **POOL))
        assert failed.code == "QEMU_FAILED"
        nothing_is_left(made, "web1")
        with made.reading() as session:
            assert [*session.scalars(select(UidLease.last_instance))] == ["web1"]
            assert [*session.scalars(select(Runtime.uid))] == []
        fake.mode = "works"
        assert made.start(instance(made, **POOL))["uid"] == FIRST


def test_a_start_that_the_next_worker_takes_up_ends_with_one_uid(qemu: None) -> None:
    with node() as made:
        fake = FakeQemu(made.root)
        made.environment["HOSTLER_QEMU_BINARY"] = str(fake.path)
        made.start_worker()
        made.do("uid_pool.add", ranges=f"{FIRST}-{FIRST + 1}")
        made.do("node.info")
        fake.mode = "hangs"
        job = made.send("instance.start", instance=instance(made, **POOL))
        until(made.qemu_pids, what="QEMU was spawned")
        made.kill_worker()
        fake.mode = "works"
        made.start_worker()
        view = job.wait(DEADLINE_S)
        assert holders(made) == {view["uid"]: "web1"} == {FIRST + 1: "web1"}
        assert {*status(view["pid"])["Uid"]} == {str(view["uid"])}
        made.do("instance.stop", name="web1", force=True)
        nothing_is_left(made, "web1")
