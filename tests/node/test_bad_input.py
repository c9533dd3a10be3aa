"""Bad input is refused with the right code, the field and the reason, before anything happens."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from hostler.contract import queue_name
from hostler.errors import OperationFailed
from tests.nodes import FakeQemu, TestNode, node, tiny_instance, until
from worker.kvm.tiny_guest import IGNORE_KEY, IGNORING_MESSAGE, write_disk

pytestmark = pytest.mark.node

CARD = {"mac": "52:54:00:00:00:01", "mode": "user"}


def fields(failed: OperationFailed) -> list[str]:
    """The fields that are named; each with a reason."""
    assert failed.code == "INVALID_ARGUMENT", failed
    assert not failed.retryable
    for error in failed.details["errors"]:
        assert error["reason"], failed.details
        assert error["field"] in failed.message
    return [error["field"] for error in failed.details["errors"]]


def refused(n1: TestNode, instance: Any, **kwargs: Any) -> OperationFailed:
    """The failure of a start that must leave nothing, and nothing known."""
    before = n1.known()
    failed = n1.failure("instance.start", instance=instance, **kwargs)
    assert not n1.leftovers()
    assert n1.known() == before
    return failed


BAD_NAMES = ["a/b", "..", ".", "", "a..b", "a b", "-a", "n" * 300, "größe", "web1\n", "a\0b", "$(reboot)", 7, None]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_a_name_that_is_none(n1: TestNode, name: Any) -> None:
    assert fields(refused(n1, tiny_instance(n1.root) | {"name": name})) == ["instance.name"]
    assert fields(n1.failure("instance.stop", name=name)) == ["name"]


@pytest.mark.parametrize("path", ["/a\nb", "/a\0b", "a.img", "", "/a/../b", "//a", "/a/", 7, None], ids=repr)
def test_a_disk_path_that_is_none(n1: TestNode, path: Any) -> None:
    assert fields(refused(n1, tiny_instance(n1.root) | {"disks": [{"path": path}]})) == ["instance.disks[0].path"]


@pytest.mark.parametrize("field", ["kernel_path", "initrd_path", "cdrom_image_path"])
@pytest.mark.parametrize("path", ["/a\nb", "a.img", "/a/../b", "/no/such/file", "/tmp"])
def test_another_path_that_is_none(n1: TestNode, field: str, path: str) -> None:
    hvparams = {"kernel_path": "/etc/hostname"} | {field: path}
    failed = refused(n1, tiny_instance(n1.root, hvparams=hvparams))
    assert fields(failed) == [f"instance.hvparams.{field}"]


@pytest.mark.parametrize("name", ["a,b.img", "a=b.img", "id=x,file=y,,z.img", "a b.img", "ä'\"\\.img", "{a}.img"])
def test_a_path_with_characters_that_mean_something_to_qemu_is_a_path(n1: TestNode, name: str) -> None:
    instance = tiny_instance(n1.root, "odd")
    disk = n1.root / name
    write_disk(disk)
    instance["disks"] = [{"path": str(disk)}]
    n1.start(instance)
    opened = {str(path.readlink()) for path in Path(f"/proc/{n1.pid('odd')}/fd").iterdir()}
    assert str(disk) in opened
    with n1.serial("odd") as serial:
        serial.tick()


def test_files_that_are_missing_are_all_named_at_once(n1: TestNode) -> None:
    hvparams = {"kernel_path": "/no/kernel", "initrd_path": "/no/initrd"}
    instance = tiny_instance(n1.root, hvparams=hvparams) | {"disks": [{"path": "/no/disk"}, {"path": str(n1.root)}]}
    failed = refused(n1, instance)
    assert sorted(fields(failed)) == [
        "instance.disks[0].path",
        "instance.disks[1].path",
        "instance.hvparams.initrd_path",
        "instance.hvparams.kernel_path",
    ]
    assert "No such file or directory" in failed.message
    assert "neither a file nor a block device" in failed.message


def test_a_read_only_disk_is_refused_on_ide_and_never_open_for_writing_elsewhere(n1: TestNode) -> None:
    instance = tiny_instance(n1.root, hvparams={"disk_type": "paravirtual"})
    extra = n1.root / "extra.img"
    extra.write_bytes(bytes(2**20))
    instance["disks"].append({"path": str(extra), "mode": "ro"})
    try:
        failed = refused(n1, instance | {"hvparams": instance["hvparams"] | {"disk_type": "ide"}})
        assert fields(failed) == ["instance.disks[1].mode"]
        assert "an IDE disk cannot be read-only" in failed.message
        n1.start(instance)
        lines = [line for line in n1.monitor("web1", "info block").splitlines() if str(extra) in line]
        assert lines and all("read-only" in line for line in lines)
        assert open_flags(n1, extra) == {os.O_RDONLY}
        assert open_flags(n1, Path(instance["disks"][0]["path"])) == {os.O_RDWR}
    finally:
        n1.end_guests()
        extra.unlink()


def open_flags(n1: TestNode, path: Path) -> set[int]:
    """How web1's QEMU has a file open."""
    folder = Path(f"/proc/{n1.pid('web1')}")
    fds = [link.name for link in (folder / "fd").iterdir() if link.readlink() == path]
    flags = ((folder / "fdinfo" / fd).read_text().split("flags:\t")[1].split()[0] for fd in fds)
    return {int(each, 8) & os.O_ACCMODE for each in flags}


def test_a_disk_that_is_given_twice(n1: TestNode) -> None:
    instance = tiny_instance(n1.root)
    instance["disks"] *= 2
    assert fields(refused(n1, instance)) == ["instance.disks"]


@pytest.mark.parametrize("kind", ["the path itself", "a symlink", "a hard link", "a symlinked folder"])
def test_a_disk_that_another_running_instance_uses(n1: TestNode, kind: str) -> None:
    instance = tiny_instance(n1.root)
    n1.start(instance, paused=True)
    disk = Path(instance["disks"][0]["path"])
    link = n1.root / "link"
    if kind == "a symlink":
        link.symlink_to(disk)
    elif kind == "a hard link":
        link.hardlink_to(disk)
    elif kind == "a symlinked folder":
        link.symlink_to(n1.root)
    path = {"the path itself": disk, "a symlinked folder": link / disk.name}.get(kind, link)
    try:
        thief = tiny_instance(n1.root, "thief") | {"disks": [{"path": str(path)}]}
        failed = n1.failure("instance.start", instance=thief)
        assert fields(failed) == ["instance.disks[0].path"]
        assert "in use by instance web1" in failed.message
        assert n1.qemu_pids() == [n1.pid("web1")]
        assert "thief" not in n1.known()
        read_only = {"disks": [{"path": str(path), "mode": "ro"}], "hvparams": {"kvm_flag": "disabled"}}
        failed = n1.failure("instance.start", instance=tiny_instance(n1.root, "thief") | read_only)
        assert fields(failed) == ["instance.disks[0].path"]
    finally:
        link.unlink(missing_ok=True)


def test_a_disk_that_two_instances_share_in_so_many_words_is_no_conflict(n1: TestNode) -> None:
    instance = tiny_instance(n1.root)
    instance["disks"][0]["shared"] = True
    n1.start(instance, paused=True)
    assert n1.start(instance | {"name": "web2"}, paused=True)["state"] == "paused"


@pytest.mark.parametrize("value", [0, -1, "16", 16.5, True, None, [], 2**70, 10**9], ids=repr)
def test_memory_that_is_none(n1: TestNode, value: Any) -> None:
    assert fields(refused(n1, tiny_instance(n1.root, memory_mib=value))) == ["instance.memory_mib"]


def test_memory_beyond_the_hosts(n1: TestNode) -> None:
    failed = refused(n1, tiny_instance(n1.root, memory_mib=16 * 1024 * 1024))
    assert fields(failed) == ["instance.memory_mib"]
    assert "this host has" in failed.message


@pytest.mark.parametrize("value", [0, -1, "1", 1.5, True, None, 4000, 10**9, 2**70], ids=repr)
def test_vcpus_that_are_none(n1: TestNode, value: Any) -> None:
    assert fields(refused(n1, tiny_instance(n1.root, vcpus=value))) == ["instance.vcpus"]


@pytest.mark.parametrize("instance", [None, [], "web1", 7, True, {}], ids=repr)
def test_an_instance_that_is_no_object(n1: TestNode, instance: Any) -> None:
    named = fields(refused(n1, instance))
    assert named == (["instance.name", "instance.memory_mib"] if instance == {} else ["instance"])


def test_unknown_keys_at_every_level(n1: TestNode) -> None:
    instance = tiny_instance(n1.root, hvparams={"spice": 1}) | {"nics": [CARD | {"speed": 1}], "color": "blue"}
    instance["disks"][0]["size"] = 1
    failed = refused(n1, instance, urgent=True)
    assert sorted(fields(failed)) == [
        "instance.color", "instance.disks[0].size", "instance.hvparams.spice", "instance.nics[0].speed", "urgent",
    ]  # fmt: skip
    assert {error["reason"] for error in failed.details["errors"]} == {"is not supported"}


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"disks": {}}, "instance.disks"),
        ({"disks": [7]}, "instance.disks[0]"),
        ({"nics": [CARD | {"mac": "52:54"}]}, "instance.nics[0].mac"),
        ({"nics": [CARD | {"mac": "53:54:00:00:00:01"}]}, "instance.nics[0].mac"),
        ({"nics": [CARD | {"mode": "magic"}]}, "instance.nics[0].mode"),
        ({"nics": [CARD | {"mode": "bridged"}]}, "instance.nics[0].link"),
        ({"nics": [CARD | {"mode": "bridged", "link": "no-such-bridge"}]}, "instance.nics[0].link"),
        ({"nics": [CARD | {"mode": "bridged", "link": "../../etc"}]}, "instance.nics[0].link"),
        ({"nics": [CARD | {"ip": "999.1.1.1"}]}, "instance.nics[0].ip"),
        ({"nics": [CARD, CARD]}, "instance.nics"),
        ({"tags": ["a b"]}, "instance.tags"),
        ({"hvparams": {"acpi": "yes"}}, "instance.hvparams.acpi"),
        ({"hvparams": {"kernel_args": "a\nb"}}, "instance.hvparams.kernel_args"),
        ({"hvparams": {"disk_type": "floppy"}}, "instance.hvparams.disk_type"),
        ({"hvparams": {"machine_version": "vax-11"}}, "instance.hvparams.machine_version"),
        ({"hvparams": {"machine_version": "pc,accel=kvm"}}, "instance.hvparams.machine_version"),
        ({"hvparams": {"cpu_type": "z80"}}, "instance.hvparams.cpu_type"),
        ({"hvparams": {"cpu_type": "max,+vmx"}}, "instance.hvparams.cpu_type"),
        ({"hvparams": {"boot_order": "cdrom"}}, "instance.hvparams.cdrom_image_path"),
        ({"vcpus": 256}, "instance.vcpus"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_parameter_that_is_wrong(n1: TestNode, more: dict[str, Any], field: str) -> None:
    assert fields(refused(n1, tiny_instance(n1.root, **more))) == [field]


def test_kvm_where_it_does_not_work_or_kvm_where_it_does(n1: TestNode) -> None:
    instance = tiny_instance(n1.root, hvparams={"kvm_flag": "enabled"})
    if n1.do("node.info")["kvm_works"]:
        assert n1.start(instance)["accelerator"] == "kvm"
        return
    failed = refused(n1, instance)
    assert fields(failed) == ["instance.hvparams.kvm_flag"]
    assert "KVM does not work on this host" in failed.message


def test_without_kvm_flag_a_guest_runs_with_what_works(n1: TestNode) -> None:
    works = n1.do("node.info")["kvm_works"]
    view = n1.start(tiny_instance(n1.root, hvparams={"kvm_flag": ""}))
    assert view["accelerator"] == ("kvm" if works else "tcg")
    with n1.serial("web1") as serial:
        serial.tick()


@pytest.mark.parametrize(
    ("task", "kwargs", "field"),
    [
        ("instance.stop", {"name": "web1", "timeout_s": 0}, "timeout_s"),
        ("instance.stop", {"name": "web1", "timeout_s": -1}, "timeout_s"),
        ("instance.stop", {"name": "web1", "timeout_s": "5"}, "timeout_s"),
        ("instance.stop", {"name": "web1", "timeout_s": 10**9}, "timeout_s"),
        ("instance.stop", {"name": "web1", "on_timeout": "cry"}, "on_timeout"),
        ("instance.stop", {"name": "web1", "force": 1}, "force"),
        ("instance.stop", {}, "name"),
        ("instance.reboot", {"name": "web1", "mode": "gently"}, "mode"),
        ("instance.info", {"name": ["web1"]}, "name"),
        ("instance.list", {"name": "web1"}, "name"),
        ("instance.start", {}, "instance"),
        ("job.list", {"limit": 0}, "limit"),
        ("job.info", {"id": ""}, "id"),
    ],
    ids=str,
)
def test_arguments_that_are_wrong(n1: TestNode, task: str, kwargs: dict[str, Any], field: str) -> None:
    assert fields(n1.failure(task, **kwargs)) == [field]


def test_positional_arguments(n1: TestNode) -> None:
    assert fields(n1.failure("instance.stop", "web1")) == ["args"]
    assert fields(n1.failure("instance.start", tiny_instance(n1.root))) == ["args"]
    assert not n1.leftovers()


def test_what_will_be_refused_does_not_wait_behind_a_job_at_work(n1: TestNode) -> None:
    n1.start(tiny_instance(n1.root))
    with n1.serial("web1") as serial:
        serial.tick()
        serial.send(IGNORE_KEY)
        serial.read_until(IGNORING_MESSAGE)
    stop = n1.send("instance.stop", name="web1", timeout_s=60)
    n1.until_state("web1", "stopping")
    assert fields(n1.failure("instance.pause", name="web1", why="tired")) == ["why"]
    assert fields(n1.failure("instance.stop", name="web1", timeout_s=-1)) == ["timeout_s"]
    assert stop.state == "PROGRESS"
    n1.end_guests()
    stop.wait(30)


@pytest.mark.parametrize(
    ("body", "content_type", "encoding"),
    [
        (b'[[], {"name": "we', "application/json", "utf-8"),
        (b"", "application/json", "utf-8"),
        (b"7", "application/json", "utf-8"),
        (b"[]", "application/json", "utf-8"),
        (b'{"name": "web1"}', "application/json", "utf-8"),
        (b'[7, {"name": "web1"}, {}]', "application/json", "utf-8"),
        (b"[[], [], {}]", "application/json", "utf-8"),
        (b"\xff\xfe\x00", "application/json", "utf-8"),
        (b"\x80\x04}.", "application/x-python-serialize", "binary"),
        (b"- a", "application/x-yaml", "utf-8"),
        (b"hello", "text/plain", "utf-8"),
        (b"[" * 100_000, "application/json", "utf-8"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_message_that_cannot_be_read_fails_its_job_and_harms_nobody(
    n1: TestNode, body: bytes, content_type: str, encoding: str
) -> None:
    assert n1.worker
    job_id = f"unreadable-{os.urandom(4).hex()}"
    publish(n1, body, content_type, encoding, headers={"id": job_id, "task": "instance.stop"})
    job = n1.client().job(job_id)
    with pytest.raises(OperationFailed) as raised:
        job.wait(30)
    assert raised.value.code == "INVALID_ARGUMENT"
    assert raised.value.details["errors"]
    assert_unharmed(n1)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"id": "x" * 300, "task": "instance.stop"},
        {"id": "a b\n", "task": "instance.stop"},
        {"id": None, "task": None},
        {"id": 7, "task": 7},
        {"id": "no-such-task", "task": "instance.explode"},
        {"id": "deep", "task": "instance.stop", "retries": "many", "timelimit": 7, "eta": "soon", "expires": "later"},
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_message_with_headers_of_nonsense_harms_nobody(n1: TestNode, headers: dict[str, Any]) -> None:
    publish(n1, b'[[], {"name": "web1"}, {}]', "application/json", "utf-8", headers=headers)
    assert_unharmed(n1)


@pytest.mark.parametrize("raw", [b"", b"hello", b"{}", b"[1", b"null", b"\xff"], ids=repr)
def test_what_is_no_message_at_all_harms_nobody(n1: TestNode, raw: bytes) -> None:
    with redis.Redis(unix_socket_path=str(n1.settings.broker_socket)) as server:
        server.lpush(queue_name("n1"), raw)
        until(lambda: not server.llen(queue_name("n1")))
    assert_unharmed(n1)


def publish(n1: TestNode, body: bytes, content_type: str, encoding: str, headers: dict[str, Any]) -> None:
    with n1.client()._app.connection_for_write() as connection, connection.Producer() as producer:
        producer.publish(
            body,
            routing_key=queue_name("n1"),
            exchange=queue_name("n1"),
            declare=[n1.client()._queue("n1")],
            content_type=content_type,
            content_encoding=encoding,
            headers=headers,
        )


def assert_unharmed(n1: TestNode) -> None:
    """The worker has read everything in its queue and works on."""
    assert n1.worker
    pid = n1.worker.pid
    assert isinstance(n1.do("instance.list"), list)
    assert n1.worker.poll() is None
    assert n1.worker.pid == pid
    assert not n1.leftovers()


@pytest.fixture(scope="module")
def fake(qemu: None) -> Iterator[tuple[TestNode, FakeQemu]]:
    with node(HOSTLER_QEMU_TIMEOUT_S="2") as made:
        program = FakeQemu(made.root)
        made.environment["HOSTLER_QEMU_BINARY"] = str(program.path)
        made.start_worker()
        yield made, program


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("exits", ["exit code 1", "the moon is full"]),
        ("hangs", ["did not greet", "2 s"]),
        ("talks garbage", ["does not speak QMP"]),
        ("closes", ["closed its monitor before greeting"]),
        ("greets and dies", ["exit code 1", "the lights went out"]),
    ],
)
def test_a_qemu_that_misbehaves(fake: tuple[TestNode, FakeQemu], mode: str, said: list[str]) -> None:
    n1, program = fake
    program.mode = mode
    instance = tiny_instance(n1.root)
    failed = refused(n1, instance)
    assert failed.code == "QEMU_FAILED"
    for words in said:
        assert words in failed.message
    program.mode = "works"
    assert n1.start(instance)["state"] == "running"
    n1.end_guests()
