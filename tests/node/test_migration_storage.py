"""Disks that source and target do not share: mirrored between two real QEMUs while the guest writes its log."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.node.migration_peers import (
    HOST,
    LOG_END,
    PORTS,
    Peer,
    log_of,
    peers,
    prepare,
    run,
    same,
    write_writer,
)
from tests.nodes import until
from worker.errors import MigrationFailed, QemuFailed
from worker.kvm import images
from worker.kvm.live_migration import storage
from worker.kvm.live_migration.nbd import Address
from worker.kvm.qmp import EventLoop

pytestmark = [pytest.mark.node, pytest.mark.usefixtures("qemu")]
MIB = 2**20
SIZE = 32 * MIB
OLD_AT = 20 * MIB
"""Content that was there before, behind the log."""
SLOW = 64 * 1024


def disk(path: Path, format: str = "raw") -> dict[str, Any]:
    return {"path": str(path), "format": format}


def writing_disk(path: Path) -> Path:
    """A raw disk of the writing guest, with a megabyte of old content."""
    images.create(str(path), "raw", SIZE)
    write_writer(path)
    with path.open("r+b") as file:
        file.seek(OLD_AT)
        file.write(os.urandom(MIB))
    return path


@contextmanager
def pair(place: Path, loop: EventLoop, size: int = SIZE) -> Iterator[tuple[Peer, Peer, Address]]:
    """A writing guest on the source, and a target that has its empty disk exported."""
    here, there = writing_disk(place / "here.img"), place / "there.img"
    storage.create_image(str(there), "raw", size)
    with peers(loop, place, ([disk(here)], [disk(there)])) as (source, target):
        address = storage.export_disks(target.monitor, {"disk0": "disk0"}, HOST, PORTS)
        source.monitor.continue_vcpus()
        source.until_counting()
        yield source, target, address


def move(source: Peer, target: Peer) -> None:
    """The migration, with what belongs to its disks; the guest stands still on the target."""
    port = prepare(source, target)
    source.ask("migrate", {"uri": f"tcp:{HOST}:{port}"})
    source.until_migration("pre-switchover")
    storage.finish_mirrors(source.monitor, source.changed)
    source.ask("migrate-continue", {"state": "pre-switchover"})
    assert source.until_migration("completed", "failed") == "completed"
    assert target.until_migration("completed", "failed") == "completed"
    storage.stop_exports(target.monitor)


def test_a_guest_that_writes_all_the_time_finds_every_record_on_the_targets_disks(place: Path, loop: EventLoop) -> None:
    here = [writing_disk(place / "a.img"), place / "a.qcow2"]
    images.create(str(here[1]), "qcow2", SIZE)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 3M 2M", str(here[1]))
    there = [place / "b.img", place / "b.qcow2"]
    for path, format in zip(there, ("raw", "qcow2"), strict=True):
        storage.create_image(str(path), format, SIZE)
    sides = tuple([disk(raw), disk(qcow2, "qcow2")] for raw, qcow2 in (here, there))
    with peers(loop, place, (sides[0], sides[1])) as (source, target):
        names = {"disk0": "disk0", "disk1": "disk1"}
        address = storage.export_disks(target.monitor, names, HOST, PORTS)
        source.monitor.continue_vcpus()
        source.until_counting()
        for name in names:
            storage.start_mirror(source.monitor, name, name, address, bandwidth_bytes_s=SLOW)
        source.until_counting()  # it writes while it is copied
        assert {job.status for job in storage.mirrors(source.monitor)} == {"running"}
        seen: list[tuple[int, int]] = []
        storage.set_bandwidth(source.monitor, 0)
        storage.follow(source.monitor, source.changed, lambda *counts: seen.append(counts))
        done, total = zip(*seen, strict=True)
        assert (sorted(done), sorted(total)) == ([*done], [*total])
        assert done[-1] >= MIB + 2 * MIB
        source.until_counting()
        move(source, target)
        assert source.monitor.status() == "postmigrate"
        written = log_of(here[0])
        assert log_of(there[0]) == written
        assert same(here[0], "raw", there[0], "raw")
        assert same(here[1], "qcow2", there[1], "qcow2")
        assert source.nbd_is_left() == target.nbd_is_left() == []
        target.monitor.continue_vcpus()
        assert target.until_counting() > written
        target.monitor.execute("stop")
        assert log_of(there[0]) > written == log_of(here[0])
    # What was a hole here is one there: the guest's disks did not become thick.
    assert there[0].stat().st_blocks * 512 < LOG_END + 4 * MIB < SIZE
    assert there[1].stat().st_size < SIZE / 2
    run("qemu-img", "check", "-f", "qcow2", str(there[1]))


def test_only_what_lies_above_a_shared_backing_file_is_copied_with_sync_top(place: Path, loop: EventLoop) -> None:
    base, here, there = writing_disk(place / "base.img"), place / "here.qcow2", place / "there.qcow2"
    larger = SIZE + MIB
    for top in (here, there):
        storage.create_image(str(top), "qcow2", larger, backing=(str(base), "raw"))
    with peers(loop, place, ([disk(here, "qcow2")], [disk(there, "qcow2")])) as (source, target):
        address = storage.export_disks(target.monitor, {"disk0": "disk0"}, HOST, PORTS)
        source.monitor.continue_vcpus()
        source.until_counting()
        storage.start_mirror(source.monitor, "disk0", "disk0", address, sync="top")
        storage.follow(source.monitor, source.changed)
        source.until_counting()
        move(source, target)
        target.monitor.continue_vcpus()
        target.until_counting()
        target.monitor.execute("stop")
    raw = place / "there.img"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(there), str(raw))
    assert log_of(raw)
    assert own_extents(there) and not [start for start in own_extents(there) if LOG_END <= start < SIZE]
    assert log_of(base) == 0  # below, nothing was written


def own_extents(overlay: Path) -> list[int]:
    extents = json.loads(run("qemu-img", "map", "--output=json", "-f", "qcow2", str(overlay)))
    return [extent["start"] for extent in extents if extent["depth"] == 0]


def while_copying(source: Peer, target: Peer, address: Address) -> None:
    storage.start_mirror(source.monitor, "disk0", "disk0", address, bandwidth_bytes_s=SLOW)


def when_ready(source: Peer, target: Peer, address: Address) -> None:
    storage.start_mirror(source.monitor, "disk0", "disk0", address)
    storage.follow(source.monitor, source.changed)


def at_the_switch(source: Peer, target: Peer, address: Address) -> None:
    when_ready(source, target, address)
    source.ask("migrate", {"uri": f"tcp:{HOST}:{prepare(source, target)}"})
    source.until_migration("pre-switchover")
    source.ask("migrate_cancel")
    source.until_migration("cancelled")


def after_the_last_copy(source: Peer, target: Peer, address: Address) -> None:
    when_ready(source, target, address)
    source.ask("migrate", {"uri": f"tcp:{HOST}:{prepare(source, target)}"})
    source.until_migration("pre-switchover")
    storage.finish_mirrors(source.monitor, source.changed)
    source.ask("migrate_cancel")
    source.until_migration("cancelled")


def with_a_silent_target(source: Peer, target: Peer, address: Address) -> None:
    when_ready(source, target, address)
    target.process.send_signal(signal.SIGSTOP)

    def waits() -> bool:  # for the write of a record that the target does not take
        (job,) = storage.mirrors(source.monitor)
        return job.done_bytes < job.total_bytes

    until(waits, what="the guest's write hangs")


@pytest.mark.parametrize("stage", [while_copying, when_ready, at_the_switch, after_the_last_copy, with_a_silent_target])
def test_given_up_the_guest_goes_on_with_its_own_disk_and_nothing_is_left(
    place: Path, loop: EventLoop, stage: Callable[[Peer, Peer, Address], None]
) -> None:
    with pair(place, loop) as (source, target, address):
        stage(source, target, address)
        storage.end_mirrors(source.monitor, source.changed)
        storage.end_mirrors(source.monitor, source.changed)
        assert source.nbd_is_left() == []
        if stage in (at_the_switch, after_the_last_copy):
            assert target.process.wait(30), "a target whose source gave up ends by itself"
        else:
            target.process.send_signal(signal.SIGCONT)
            storage.stop_exports(target.monitor)
            storage.stop_exports(target.monitor)
            assert target.nbd_is_left() == []
        assert source.monitor.status() == "running"
        source.until_counting()
        source.monitor.execute("stop")
        assert log_of(place / "here.img")


def test_a_target_that_dies_fails_the_copying_and_not_the_guest(place: Path, loop: EventLoop) -> None:
    with pair(place, loop) as (source, target, address):
        when_ready(source, target, address)
        target.process.kill(grace_s=0)
        with pytest.raises(MigrationFailed, match="the copying of disk0 to the target failed"):
            storage.follow(source.monitor, source.changed, check=lambda: source.until_counting(1) and None)
            until(lambda: storage.require_sound(source.monitor) and None)
        with pytest.raises(MigrationFailed):
            storage.finish_mirrors(source.monitor, source.changed)
        storage.end_mirrors(source.monitor, source.changed)
        assert source.nbd_is_left() == []
        source.until_counting()


def test_a_silent_source_does_not_keep_the_target_from_closing_its_disks(place: Path, loop: EventLoop) -> None:
    with pair(place, loop) as (source, target, address):
        when_ready(source, target, address)
        source.process.send_signal(signal.SIGSTOP)
        storage.stop_exports(target.monitor)
        assert target.nbd_is_left() == []
        source.process.send_signal(signal.SIGCONT)
        source.until_counting()


def test_a_worker_that_died_while_it_finished_is_followed_by_one_that_does(place: Path, loop: EventLoop) -> None:
    with pair(place, loop) as (source, target, address):
        when_ready(source, target, address)
        source.ask("migrate", {"uri": f"tcp:{HOST}:{prepare(source, target)}"})
        source.until_migration("pre-switchover")
        source.ask("block-job-cancel", {"device": "mirror-disk0", "force": False})
        until(lambda: [each.status for each in storage.mirrors(source.monitor)] == ["concluded"])
        with pytest.raises(MigrationFailed, match="ended by somebody else"):
            storage.finish_mirrors(source.monitor, source.changed)
        for _ in range(2):
            storage.finish_mirrors(source.monitor, source.changed, again=True)
        assert source.nbd_is_left() == []
        assert same(place / "here.img", "raw", place / "there.img", "raw")


def test_what_is_not_copied_yet_cannot_be_finished(place: Path, loop: EventLoop) -> None:
    with pair(place, loop) as (source, target, address):
        while_copying(source, target, address)
        with pytest.raises(MigrationFailed, match="disk0 is not copied yet"):
            storage.finish_mirrors(source.monitor, source.changed)
        assert [job.status for job in storage.mirrors(source.monitor)] == ["running"]
        storage.set_bandwidth(source.monitor, 0)
        storage.follow(source.monitor, source.changed)


def test_the_waiting_ends_when_its_check_says_so(place: Path, loop: EventLoop) -> None:
    def check() -> None:
        raise TimeoutError("enough")

    with pair(place, loop) as (source, target, address):
        while_copying(source, target, address)
        with pytest.raises(TimeoutError, match="enough"):
            storage.follow(source.monitor, source.changed, check=check)
        assert [job.status for job in storage.mirrors(source.monitor)] == ["running"]


def test_a_target_disk_of_another_size_is_not_written_to(place: Path, loop: EventLoop) -> None:
    with pair(place, loop, size=SIZE + 512) as (source, _, address):
        empty = (place / "there.img").stat().st_blocks
        with pytest.raises(MigrationFailed, match=f"disk0 has {SIZE} bytes here and {SIZE + 512} on the target"):
            storage.start_mirror(source.monitor, "disk0", "disk0", address)
        assert source.nbd_is_left() == []
        assert (place / "there.img").stat().st_blocks == empty


def test_a_mirror_that_qemu_refuses_leaves_no_connection(place: Path, loop: EventLoop) -> None:
    with pair(place, loop) as (source, target, address):
        with pytest.raises(QemuFailed):
            storage.start_mirror(source.monitor, "disk0", "disk0", address, bandwidth_bytes_s=-1)
        assert source.nbd_is_left() == []
        assert target.folder.log_tail() == "", "it was asked politely"
        storage.start_mirror(source.monitor, "disk0", "disk0", address)


@contextmanager
def answering(said: bytes) -> Iterator[Address]:
    """A server that says this and nothing more."""
    with socket.create_server((HOST, 0)) as server:
        stop = threading.Event()

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(said)
                stop.wait(30)

        thread = threading.Thread(target=serve)
        thread.start()
        yield Address(HOST, server.getsockname()[1])
        stop.set()
        thread.join()


def test_qemu_and_its_guest_are_not_troubled_with_a_target_that_will_not_do(
    place: Path, loop: EventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would serve nobody while it tries to connect."""
    monkeypatch.setattr("worker.kvm.live_migration.nbd.TIMEOUT_S", 0.5)
    with pair(place, loop) as (source, target, address):
        opened: list[Any] = []
        monkeypatch.setattr(source.monitor, "add_block_node", opened.append)

        def refused(address: Address, name: str, reason: str) -> None:
            with pytest.raises(MigrationFailed, match=reason):
                storage.start_mirror(source.monitor, name, "disk0", address)

        refused(address, "disk7", "it has no such disk")
        with answering(b"SSH-2.0-OpenSSH_9.2p1 Debian-2") as other:
            refused(other, "disk0", "is no NBD server")
        with answering(b"") as silent:
            refused(silent, "disk0", "cannot be reached at 127.0.0.1 port .*timed out")
        refused(silent, "disk0", "Connection refused")
        assert opened == []
        source.until_counting()
        target.process.send_signal(signal.SIGSTOP)
        refused(address, "disk0", "timed out")
        target.process.send_signal(signal.SIGCONT)


def test_a_port_in_use_is_passed_over_and_where_none_is_free_nothing_is_exported(place: Path, loop: EventLoop) -> None:
    with pair(place, loop) as (_, target, first):
        storage.stop_exports(target.monitor)
        with socket.create_server((HOST, 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(MigrationFailed, match=r"no port is free .*: 1 refused") as failed:
                storage.export_disks(target.monitor, {"disk0": "disk0"}, HOST, [port])
            assert failed.value.details["retryable"] is True
            assert target.nbd_is_left() == []
            found = storage.export_disks(target.monitor, {"disk0": "disk0"}, HOST, [port, first.port])
        assert found == first


def test_a_disk_that_cannot_be_exported_leaves_no_server(place: Path, loop: EventLoop) -> None:
    with pair(place, loop) as (_, target, first):
        storage.stop_exports(target.monitor)
        with pytest.raises(QemuFailed, match="disk9"):
            storage.export_disks(target.monitor, {"disk0": "disk0", "disk9": "disk9"}, HOST, [first.port])
        assert target.nbd_is_left() == []
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, first.port), 5)


def test_a_targets_image_replaces_an_empty_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.touch()
    storage.create_image(str(path), "raw", MIB)
    assert (path.stat().st_size, path.stat().st_mode & 0o777) == (MIB, 0o600)
    with pytest.raises(QemuFailed, match="File exists"):
        storage.create_image(str(path), "qcow2", 2 * MIB)
    assert path.read_bytes() == bytes(MIB)
    top = tmp_path / "top.qcow2"
    storage.create_image(str(top), "qcow2", 3 * MIB, backing=(str(path), "raw"))
    assert images.backing_files(str(top)) == [str(path)]
    assert images.virtual_size(str(top), "qcow2") == 3 * MIB
    with pytest.raises(QemuFailed, match="cannot be made"):
        storage.create_image(str(tmp_path / "nowhere" / "disk.img"), "raw", MIB)
