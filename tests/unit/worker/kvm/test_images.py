"""qemu-img on real files: made without overwriting, merged so that it can be done twice, ended with its owner."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.services import missing
from worker.errors import Cancelled, QemuFailed
from worker.kvm import images

MIB = 2**20


@pytest.fixture(autouse=True)
def _qemu_img() -> None:
    try:
        images.find()
    except QemuFailed as exc:
        missing("qemu-img", exc.message)


@pytest.fixture
def base(tmp_path: Path) -> str:
    path = tmp_path / "base, with=odd:name.img"
    path.write_bytes(b"\x11" * MIB)
    path.chmod(0o640)
    return str(path)


def overlay_of(base: str) -> str:
    images.create_overlay(f"{base}.s1.qcow2", base, "raw")
    return f"{base}.s1.qcow2"


def io(path: str, command: str) -> str:
    done = subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, path], capture_output=True, text=True, check=True)
    return done.stdout


def unwatched(share: float) -> None:
    assert 0 <= share <= 1


def test_an_overlay_is_the_same_disk_with_the_same_owner_and_holds_nothing_until_something_is_written(
    base: str,
) -> None:
    overlay = overlay_of(base)
    assert images.virtual_size(overlay, "qcow2") == MIB
    assert images.backing_files(overlay) == [base]
    assert images.backing_files(base) == []
    assert Path(overlay).stat().st_mode == Path(base).stat().st_mode
    assert not images.holds_data(overlay)
    io(overlay, "write -P 0x22 0 64k")
    assert images.holds_data(overlay)
    assert not images.holds_data(f"{base}.none")


def test_zeros_written_over_content_are_data(base: str) -> None:
    overlay = overlay_of(base)
    io(overlay, "write -z 0 64k")
    assert images.holds_data(overlay)


def test_a_merge_may_be_done_twice(base: str) -> None:
    overlay = overlay_of(base)
    io(overlay, "write -P 0x22 0 64k")
    for _ in range(2):
        images.commit(overlay, unwatched)
        assert Path(base).read_bytes() == b"\x22" * 65536 + b"\x11" * (MIB - 65536)


def test_an_image_lies_on_another_file_with_the_same_content_after_a_rebase(base: str, tmp_path: Path) -> None:
    overlay, other = overlay_of(base), str(tmp_path / "other.img")
    Path(other).write_bytes(Path(base).read_bytes())
    images.rebase(overlay, other, "raw")
    assert images.backing_files(overlay) == [other]


def test_files_upon_files_are_found_the_nearest_first_also_by_a_name_relative_to_the_file(tmp_path: Path) -> None:
    images.create(str(tmp_path / "a"), "qcow2", MIB)
    for above, below in (("b", "a"), ("c", "b")):
        options = ["-f", "qcow2", "-F", "qcow2", "-b", below, above]
        subprocess.run(["qemu-img", "create", "-q", *options], check=True, cwd=tmp_path)
    assert images.backing_files(str(tmp_path / "c")) == [str(tmp_path / "b"), str(tmp_path / "a")]


@pytest.mark.parametrize("version", ["0.10", "1.1"])
def test_a_file_says_on_which_it_lies_and_in_which_format_that_is(tmp_path: Path, base: str, version: str) -> None:
    top = str(tmp_path / "top.qcow2")
    command = [images.find(), "create", "-q", "-f", "qcow2", "-o", f"compat={version}", "-b", base, "-F", "raw", top]
    subprocess.run(command, check=True)
    assert images.backing_file(top) == (base, "raw")
    subprocess.run([images.find(), "rebase", "-u", "-b", "", top], check=True)
    assert images.backing_file(top) is None
    assert images.backing_file(base) is None


def test_nothing_is_overwritten(base: str) -> None:
    for make in (lambda: images.create(base, "raw", MIB), lambda: images.create_overlay(base, base, "raw")):
        with pytest.raises(QemuFailed, match="File exists"):
            make()
    assert Path(base).read_bytes() == b"\x11" * MIB


def test_what_qemu_img_refuses_is_told_in_its_words(base: str) -> None:
    with pytest.raises(QemuFailed, match=r"qemu-img info failed: .*not in qcow2 format"):
        images.virtual_size(base, "qcow2")


def test_a_copy_that_is_no_longer_wanted_ends_with_its_process(base: str, tmp_path: Path) -> None:
    target = str(tmp_path / "target")
    images.create(target, "raw", MIB)

    def give_up(share: float) -> None:
        raise Cancelled("no longer wanted")

    with pytest.raises(Cancelled):
        images.convert(base, "raw", target, "raw", give_up)
    assert not strays(target)


def strays(path: str) -> list[str]:
    found = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [entry.name for entry in found if path in images.arguments_of(int(entry.name))]


def test_a_process_that_a_dead_worker_left_is_ended_and_no_other_one(tmp_path: Path) -> None:
    mine, other = str(tmp_path / "mine"), str(tmp_path / "other")
    command = "import time; time.sleep(600)"
    processes = [
        subprocess.Popen(["qemu-img", "-c", command, path], executable=sys.executable) for path in (mine, other)
    ]
    try:
        deadline = time.monotonic() + 10
        while not (strays(mine) and strays(other)):
            assert time.monotonic() < deadline
        images.end_strays([mine])
        assert processes[0].wait(10) < 0
        assert processes[1].poll() is None
    finally:
        for process in processes:
            process.kill()
            process.wait()
