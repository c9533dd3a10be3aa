"""Live migration between two real QEMUs: the guest's counter goes on without gap, and its memory comes along whole."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests import dirtying_guest
from tests.migrating import HOST, MIB, PORTS, Pair, Side, pair
from tests.nodes import until
from worker.errors import MigrationFailed, QemuFailed, QmpLost, Unsupported
from worker.kvm import tiny_guest
from worker.kvm.live_migration.capabilities import Tuning, prepare
from worker.kvm.live_migration.follow import SILENCES, follow
from worker.kvm.live_migration.forecast import sample_dirty_rate
from worker.kvm.live_migration.incoming import uri
from worker.kvm.live_migration.progress import Progress
from worker.kvm.live_migration.sample import Sample
from worker.kvm.qmp import EventLoop

pytestmark = [pytest.mark.node, pytest.mark.usefixtures("qemu")]

SLOW = 4 * MIB
"""Bytes a second: so slow that a guest with a few dozen MiB stays on its way until the test has done its work."""


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hst-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def idle(loop: EventLoop, folder: Path) -> Iterator[Pair]:
    """A guest that only counts, running."""
    with pair(loop, folder) as made:
        made.boot()
        yield made


@pytest.fixture
def busy(loop: EventLoop, folder: Path) -> Iterator[Pair]:
    """A guest that writes 60 MiB/s in 24 MiB, and has been through all of them."""
    with pair(loop, folder, memory_mib=48, mib_per_s=60, range_mib=24) as made:
        made.boot()
        made.source.com1.wait_for_ticks(8)
        yield made


def statuses(side: Side) -> list[str]:
    return [event["data"]["status"] for _, event in side.events if event["event"] == "MIGRATION"]


def test_a_guest_moves_with_its_memory_and_stands_still_until_it_is_continued(idle: Pair) -> None:
    idle.start()
    idle.stop_for_switchover()
    assert (idle.source.monitor.status(), idle.target.monitor.status()) == ("finish-migrate", "inmigrate")
    idle.outgoing.switch_over()
    assert idle.source.follow(idle.outgoing).status == "completed"
    assert idle.target.follow(idle.incoming).status == "completed"
    assert (idle.source.monitor.status(), idle.target.monitor.status()) == ("postmigrate", "paused")
    assert not idle.target.com1.heard
    idle.target.monitor.continue_vcpus()
    idle.incoming.announce()
    idle.goes_on()
    assert statuses(idle.source) == ["setup", "active", "pre-switchover", "device", "completed"]
    totals = idle.outgoing.totals()
    assert totals.total_ms > 0 and totals.transferred_bytes > 0 and totals.remaining_bytes == 0


@pytest.mark.parametrize(
    "tuning",
    [
        {},
        {"multifd_channels": 4},
        {"multifd_channels": 2, "compression": "zlib"},
        {"multifd_channels": 2, "compression": "zstd"},
        {"xbzrle": True},
        {"auto_converge": True},
    ],
    ids=lambda tuning: "-".join(f"{name}={value}" for name, value in tuning.items()) or "plain",
)
def test_memory_that_is_written_meanwhile_comes_along(busy: Pair, tuning: dict[str, object]) -> None:
    busy.start(bandwidth_bytes_s=200 * MIB, **tuning)
    busy.finish()
    busy.goes_on(ticks=8)


def test_a_limit_that_is_too_low_is_judged_and_can_be_raised_under_way(busy: Pair) -> None:
    class Enough(Exception):
        pass

    progress, metas = Progress(downtime_ms=20), []

    def until_judged(sample: Sample) -> None:
        metas.append(progress.feed(sample))
        if metas[-1]["verdict"]:
            raise Enough

    busy.start(bandwidth_bytes_s=20 * MIB, downtime_ms=20)
    with pytest.raises(Enough):
        follow(busy.outgoing, busy.source.changed, until_judged)
    assert "will not converge" in metas[-1]["verdict"] and metas[-1]["eta_s"] is None
    busy.outgoing.tune(bandwidth_bytes_s=0, downtime_ms=1000)
    progress.downtime_ms = 1000
    busy.finish()
    metas += map(progress.feed, busy.source.samples)
    percents = [meta["percent"] for meta in metas]
    assert percents == sorted(percents) and max(percents[:-1]) < 100 == percents[-1]
    busy.goes_on(ticks=8)


def test_a_guest_that_is_paused_moves_paused(idle: Pair) -> None:
    idle.source.monitor.pause_vcpus()
    idle.start()
    idle.stop_for_switchover()
    idle.outgoing.switch_over()
    assert idle.source.follow(idle.outgoing).status == "completed"
    assert idle.target.follow(idle.incoming).status == "completed"
    assert idle.target.monitor.status() == "paused"
    idle.target.monitor.continue_vcpus()
    idle.goes_on()


def into_postcopy(moving: Pair) -> None:
    """The guest runs at the target; most of its memory is still at the source."""
    moving.start(postcopy=True, bandwidth_bytes_s=SLOW)
    moving.source.follow(moving.outgoing, "active")
    moving.outgoing.start_postcopy()
    moving.stop_for_switchover()
    moving.outgoing.switch_over()
    assert moving.source.follow(moving.outgoing, "postcopy-active").status == "postcopy-active"
    assert moving.target.follow(moving.incoming, "postcopy-active").status == "postcopy-active"
    moving.target.monitor.continue_vcpus()


def postcopy_ends(moving: Pair) -> None:
    moving.outgoing.tune(bandwidth_bytes_s=0)
    assert moving.source.follow(moving.outgoing).status == "completed"
    assert moving.target.follow(moving.incoming).status == "completed"
    moving.goes_on(ticks=8)
    assert moving.source.monitor.status() == "postmigrate"


def test_with_postcopy_the_guest_runs_while_its_memory_follows(busy: Pair) -> None:
    into_postcopy(busy)
    busy.target.com1.wait_for_ticks(2)
    assert busy.outgoing.query().remaining_bytes > 0
    assert busy.outgoing.cancel() is False
    assert busy.target.monitor.status() == "running"
    postcopy_ends(busy)


def test_a_postcopy_whose_connection_broke_goes_on_over_a_new_one(busy: Pair) -> None:
    into_postcopy(busy)
    busy.outgoing.pause_postcopy()
    assert busy.source.follow(busy.outgoing, "postcopy-paused").status == "postcopy-paused"
    assert busy.target.follow(busy.incoming, "postcopy-paused").status == "postcopy-paused"
    busy.outgoing.recover(uri(HOST, busy.incoming.recover(HOST, PORTS)))
    postcopy_ends(busy)


def test_a_target_that_does_not_listen_again_leaves_a_postcopy_paused(
    busy: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    into_postcopy(busy)
    busy.incoming.pause_postcopy()
    assert busy.source.follow(busy.outgoing, "postcopy-paused").status == "postcopy-paused"
    monkeypatch.setattr("worker.kvm.live_migration.outgoing.RECOVER_TIMEOUT_S", 0.2)
    with socket.create_server((HOST, 0)) as nobody:
        nothing = nobody.getsockname()[1]
    with pytest.raises(MigrationFailed, match="could not be reached again") as failed:
        busy.outgoing.recover(uri(HOST, nothing))
    assert failed.value.details["retryable"] is True
    busy.outgoing.recover(uri(HOST, busy.incoming.recover(HOST, PORTS)))
    postcopy_ends(busy)


@pytest.mark.parametrize("when", ["active", "pre-switchover"])
def test_a_cancelled_migration_leaves_the_guest_running_at_the_source(busy: Pair, when: str) -> None:
    busy.start(bandwidth_bytes_s=SLOW if when == "active" else 0)
    assert busy.source.follow(busy.outgoing, when).status == when
    assert busy.outgoing.cancel() is True
    assert busy.source.follow(busy.outgoing).status == "cancelled"
    busy.source_counts()
    assert busy.target.process.wait(30) == 1, "QEMU ends when the guest that it waited for does not come"


@pytest.mark.parametrize("when", ["active", "pre-switchover"])
def test_a_target_that_dies_leaves_the_guest_running_at_the_source(busy: Pair, when: str) -> None:
    busy.start(bandwidth_bytes_s=SLOW if when == "active" else 0)
    assert busy.source.follow(busy.outgoing, when).status == when
    busy.target.process.kill()
    busy.target.process.wait()
    if when == "pre-switchover":
        busy.outgoing.switch_over()
    last = busy.source.follow(busy.outgoing)
    assert last.status == "failed"
    busy.source_counts()


def test_a_target_that_hangs_in_the_switchover_can_be_given_up(idle: Pair) -> None:
    idle.start()
    idle.stop_for_switchover()
    os.kill(idle.target.process.pid, signal.SIGSTOP)
    idle.outgoing.switch_over()
    assert idle.source.follow(idle.outgoing, "device").status == "device", "not completed: the target has said nothing"
    assert idle.outgoing.cancel() is True
    assert idle.source.follow(idle.outgoing).status == "cancelled"
    idle.source_counts()


def test_a_target_that_cannot_read_the_guest_leaves_it_running_at_the_source(loop: EventLoop, folder: Path) -> None:
    tiny_guest.write_disk(folder / "disk")
    disk = ["-m", "16", "-drive", f"file={folder}/disk,format=raw,if=none,id=disk", "-device", "virtio-blk,drive=disk"]
    with ExitStack() as stack:
        source = stack.enter_context(closing(Side(loop, folder, "source", *disk, "-device", "virtio-rng-pci")))
        target = stack.enter_context(closing(Side(loop, folder, "target", *disk, "-incoming", "defer")))
        moving = Pair(source, target)
        moving.boot()
        moving.start()
        moving.stop_for_switchover()
        moving.outgoing.switch_over()
        assert source.follow(moving.outgoing).status == "failed"
        moving.source_counts()


def test_nobody_listening_is_a_failure_with_qemus_reason(idle: Pair) -> None:
    idle.prepare(Tuning())
    with socket.create_server((HOST, 0)) as nobody:
        port = nobody.getsockname()[1]
    idle.outgoing.start(uri(HOST, port))
    last = idle.source.follow(idle.outgoing)
    assert last.status == "failed" and "refused" in last.error
    idle.source_counts()
    idle.start()
    idle.finish()
    idle.goes_on()


def test_a_port_that_is_taken_is_passed_over(idle: Pair) -> None:
    with socket.create_server((HOST, 0)) as other:
        taken = other.getsockname()[1]
        assert idle.incoming.status() == "none"
        with pytest.raises(MigrationFailed, match="no port is free") as failed:
            idle.incoming.listen(HOST, [taken, PORTS[0]], taken={PORTS[0]})
        assert failed.value.details["retryable"] is True
        port = idle.incoming.listen(HOST, [taken, *PORTS])
        assert port in PORTS
    idle.prepare(Tuning())
    idle.outgoing.start(uri(HOST, port))
    idle.finish()
    idle.goes_on()


def test_an_address_that_is_not_this_hosts_is_refused_at_once(idle: Pair) -> None:
    with pytest.raises(QemuFailed, match="Cannot assign requested address"):
        idle.incoming.listen("192.0.2.1", PORTS)


def test_a_guest_moves_over_ipv6(idle: Pair) -> None:
    if not Path("/proc/net/if_inet6").exists():
        pytest.skip("this host has no IPv6")
    idle.prepare(Tuning())
    idle.outgoing.start(uri("::1", idle.incoming.listen("::1", PORTS)))
    idle.finish()
    idle.goes_on()


def test_what_qemu_cannot_do_is_named_before_anything_is_changed(idle: Pair) -> None:
    class Old:
        version = "6.0.0"

        def execute(self, command: str, *_: object) -> list[dict[str, object]]:
            known = idle.source.monitor.execute("query-migrate-capabilities")
            assert command == "query-migrate-capabilities"
            return [each for each in known if each["capability"] not in ("multifd", "postcopy-ram")]

    with pytest.raises(Unsupported, match="cannot migrate with postcopy") as refused:
        prepare(Old(), Tuning(postcopy=True), incoming=False)  # type: ignore[arg-type]
    assert refused.value.details["arguments"] == ["postcopy"]


def test_an_unknown_compression_is_named(idle: Pair) -> None:
    with pytest.raises(Unsupported, match="compression lz5"):
        prepare(idle.source.monitor, Tuning(multifd_channels=2, compression="lz5"), incoming=False)


def test_postcopy_into_a_qemu_that_may_not_use_userfaultfd_is_refused_by_name(loop: EventLoop, folder: Path) -> None:
    setting = Path("/proc/sys/vm/unprivileged_userfaultfd")
    if os.geteuid() != 0 or not shutil.which("setpriv") or not setting.exists() or setting.read_text() != "0\n":
        pytest.skip("needs root, setpriv and a kernel that refuses userfaultfd to others")
    folder.chmod(0o777)
    with closing(Side(loop, folder, "target", "-incoming", "defer", user=65534)) as target:
        with pytest.raises(Unsupported, match="userfaultfd") as refused:
            prepare(target.monitor, Tuning(postcopy=True), incoming=True)
        assert refused.value.details["arguments"] == ["postcopy"]


def test_an_earlier_attempts_settings_do_not_last(idle: Pair) -> None:
    prepare(idle.source.monitor, Tuning(xbzrle=True, postcopy=True, auto_converge=True), incoming=False)
    prepare(idle.source.monitor, Tuning(), incoming=False)
    on = {each["capability"] for each in idle.source.monitor.execute("query-migrate-capabilities") if each["state"]}
    assert on == {"events", "return-path", "late-block-activate", "pause-before-switchover"}


def test_a_silent_qemu_is_asked_again_before_it_is_given_up(idle: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.kvm.live_migration.sample.QUERY_TIMEOUT_S", 0.05)
    idle.start(bandwidth_bytes_s=MIB // 16)
    idle.source.follow(idle.outgoing, "active")
    asked = []

    def stop_after_two() -> None:
        asked.append(1)
        os.kill(idle.source.process.pid, signal.SIGSTOP if len(asked) in (2, 3) else signal.SIGCONT)
        if len(asked) == 6:
            raise StopIteration

    with pytest.raises(StopIteration):
        follow(idle.outgoing, idle.source.changed, check=stop_after_two)
    os.kill(idle.source.process.pid, signal.SIGSTOP)
    asked.clear()
    with pytest.raises(QmpLost):
        follow(idle.outgoing, idle.source.changed, check=lambda: asked.append(1))
    assert len(asked) == SILENCES
    os.kill(idle.source.process.pid, signal.SIGCONT)
    monkeypatch.undo()
    idle.outgoing.tune(bandwidth_bytes_s=0)
    idle.finish()
    idle.goes_on()


def test_the_dirty_rate_of_a_guest_is_measured_without_harm(busy: Pair) -> None:
    measured = sample_dirty_rate(busy.source.monitor) / MIB
    assert 10 < measured <= 60, "24 MiB are written over and over in each second, 60 MiB in all"
    busy.source_counts()


def test_a_guest_that_finds_a_page_it_did_not_write_says_so(loop: EventLoop, folder: Path) -> None:
    """Else the tests that trust it could not fail."""
    memory, disk = folder / "memory", folder / "disk"
    dirtying_guest.write_disk(disk, mib_per_s=20, range_mib=8)
    ram = ["-object", f"memory-backend-file,id=ram,size=16M,mem-path={memory},share=on", "-m", "16"]
    drive = ["-drive", f"file={disk},format=raw,if=none,id=disk", "-device", "virtio-blk-pci,drive=disk"]
    with closing(Side(loop, folder, "source", *ram, "-machine", "memory-backend=ram", *drive)) as guest:
        guest.monitor.continue_vcpus()
        guest.com1.wait_for_ticks(8)
        assert dirtying_guest.CORRUPT_MESSAGE not in guest.com1.heard
        with memory.open("r+b") as ram_file:
            ram_file.seek(dirtying_guest.FIRST_ADDRESS + 4 * MIB)
            ram_file.write(bytes(4))
        until(lambda: dirtying_guest.CORRUPT_MESSAGE in guest.com1.heard)
