"""The emulator is asked what it can do, and KVM is believed when a guest has run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.nodes import until
from tests.services import missing
from worker.kvm import accelerator, emulator
from worker.kvm.emulator import EmulatorBroken, EmulatorMissing
from worker.kvm.tiny_guest import BANNER

pytestmark = pytest.mark.node

QUICK_S = 1.0
"""Only for what never answers: everything else gets the deadline."""
DEADLINE_S = 30.0
GREETING = '{"QMP": {"version": {}, "capabilities": []}}'


@pytest.fixture
def qemu() -> Path:
    try:
        return emulator.find()
    except EmulatorMissing as exc:
        missing("QEMU", exc)


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Something that opens as /dev/kvm does, so that a test of what follows runs on hosts without KVM as well."""
    path = tmp_path / "kvm"
    path.touch()
    monkeypatch.setattr(accelerator, "KVM_DEVICE", path)
    return path


@pytest.fixture
def own_temp_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files go; empty at the end of the test, too."""
    path = tmp_path / "temp"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    yield path
    assert list(path.iterdir()) == []


def program(folder: Path, script: str) -> Path:
    """A stand-in for QEMU; each run of it adds a line to the file ``runs`` beside it."""
    path = folder / "qemu"
    path.write_text(f'#!/bin/bash\necho $$ >> "{folder}/runs"\n{script}\n')
    path.chmod(0o755)
    return path


def runs(folder: Path) -> list[int]:
    """The process ids of the runs so far."""
    path = folder / "runs"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


def assert_gone(folder: Path) -> None:
    """Nothing that was started lives; what somebody else has to reap may be there, dead."""
    assert runs(folder)
    deadline = time.monotonic() + DEADLINE_S
    while any(belongs(process, runs(folder)) for process in psutil.process_iter()):
        assert time.monotonic() < deadline, "a process of the probe is still there"
        time.sleep(0.01)


def belongs(process: psutil.Process, sessions: list[int]) -> bool:
    try:
        return os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ProcessLookupError):
        return False


def test_the_probe_reads_qemus_own_words(qemu: Path, cache_dir: Path) -> None:
    found = emulator.probe(qemu, cache_dir)
    assert found.version > (5, 0, 0)
    assert found.version_text.startswith(".".join(map(str, found.version)))
    assert found.arch == emulator.host_arch()
    assert {"max", "qemu64"} <= found.cpu_models
    pc = found.machines["pc"]
    assert (pc.alias, pc.deprecated) == ("pc", False)
    assert found.machines[pc.name] == pc
    assert pc.cpu_max > 1
    assert sum(machine.is_default for machine in set(found.machines.values())) <= 1


def test_the_answer_is_kept_until_the_binary_changes(qemu: Path, tmp_path: Path, cache_dir: Path) -> None:
    binary = program(tmp_path, f'exec {qemu} "$@"')
    first = emulator.probe(binary, cache_dir)
    assert emulator.probe(binary, cache_dir) == first
    assert len(runs(tmp_path)) == 1
    os.utime(binary, (1, 1))
    assert emulator.probe(binary, cache_dir) == first
    assert len(runs(tmp_path)) == 2
    assert_gone(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b'{"identity": [], "features": {}}', b"\xff\xfe"])
def test_a_damaged_cache_is_replaced(qemu: Path, cache_dir: Path, damage: bytes) -> None:
    first = emulator.probe(qemu, cache_dir)
    (file,) = cache_dir.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage)
    assert emulator.probe(qemu, cache_dir) == first
    assert list(cache_dir.iterdir()) == [file]
    assert len(file.read_bytes()) == len(whole)


def test_a_cache_that_cannot_be_written_is_done_without(qemu: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert emulator.probe(qemu, tmp_path / "file" / "cache").machines


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo no such library >&2; exit 127", "exited with 127; it said: no such library"),
        ("exit 0", "exited with 0"),
        ("kill -SEGV $$", "exited with -11"),
        ("sleep 1000", "no answer within"),
        ("sleep 1000 & wait", "no answer within"),
        ("yes", "not QMP: b'y"),
        ("cat /dev/zero", "no answer within|not QMP"),
        ("echo '[1]'", "not QMP"),
        ("echo {}", "does not greet as QMP"),
        (f"echo '{GREETING}'; exit 1", "exited with 1"),
        (f"echo '{GREETING}'; read x; sleep 1000", "no answer within"),
        (f"echo '{GREETING}'; while read x; do echo '{{\"return\": {{}}}}'; done", "not QEMU's"),
        (f"echo '{GREETING}'; while read x; do echo '{{\"return\": 7}}'; done", "not QEMU's"),
        (f'echo \'{GREETING}\'; while read x; do echo \'{{"error": {{"desc": "no"}}}}\'; done', "capabilities failed"),
        (f"echo '{GREETING}'; yes '{{\"event\": \"RESUME\"}}'", "no answer within"),
    ],
)
def test_a_program_that_is_not_qemu_is_told_as_such_and_ended(
    tmp_path: Path, cache_dir: Path, own_temp_dir: Path, script: str, told: str
) -> None:
    binary = program(tmp_path, script)
    with pytest.raises(EmulatorBroken, match=told) as caught:
        emulator.probe(binary, cache_dir, timeout_s=QUICK_S if "no answer" in told else DEADLINE_S)
    assert str(binary) in str(caught.value)
    assert_gone(tmp_path)
    assert not cache_dir.exists()


@pytest.mark.parametrize("probe", ["emulator.probe", "accelerator.kvm_works"])
def test_a_probe_that_is_under_way_dies_with_a_worker_that_is_killed(
    tmp_path: Path, qemu: Path, device: Path, probe: str
) -> None:
    # A real QEMU that is asked nothing: the process that probes is stopped in the middle by its own child.
    binary = program(tmp_path, f"kill -STOP $PPID; exec {qemu} -display none -machine none -S -monitor stdio")
    script = (
        "import sys; from pathlib import Path; from worker.kvm import accelerator, emulator\n"
        "accelerator.KVM_DEVICE = Path(sys.argv[3])\n"
        f"{probe}(Path(sys.argv[1]), Path(sys.argv[2]), {DEADLINE_S})"
    )
    argv = [sys.executable, "-c", script, str(binary), str(tmp_path / "cache"), str(device)]
    with subprocess.Popen(argv) as worker:
        try:
            until(lambda: runs(tmp_path) and qemu.name in psutil.Process(runs(tmp_path)[0]).name())
            assert psutil.Process(worker.pid).status() == psutil.STATUS_STOPPED
        finally:
            worker.kill()
    assert_gone(tmp_path)


def test_a_file_that_is_no_program_is_told_as_such(tmp_path: Path, cache_dir: Path) -> None:
    binary = tmp_path / "qemu"
    binary.write_bytes(b"\x7fELF and no more")
    binary.chmod(0o755)
    with pytest.raises(EmulatorBroken, match="cannot be run: Exec format error"):
        emulator.probe(binary, cache_dir)


def test_a_binary_that_is_not_there_is_missing(tmp_path: Path, cache_dir: Path) -> None:
    with pytest.raises(EmulatorMissing, match="No such file"):
        emulator.probe(tmp_path / "qemu", cache_dir)
    with pytest.raises(EmulatorMissing, match=r"HOSTLER_QEMU_BINARY: no program '/nowhere/qemu'.*apt install"):
        emulator.find("/nowhere/qemu")


def test_without_any_emulator_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(emulator, "RHEL_BINARY", tmp_path / "qemu-kvm")
    with pytest.raises(EmulatorMissing, match=r"apt install qemu-system-.*dnf install qemu-kvm.*HOSTLER_QEMU_BINARY"):
        emulator.find()
    program(tmp_path, "").rename(tmp_path / "qemu-kvm")
    assert emulator.find() == tmp_path / "qemu-kvm"


def test_the_setting_is_a_path_or_a_name_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = program(tmp_path, "")
    assert emulator.find(str(binary)) == binary
    monkeypatch.setenv("PATH", str(tmp_path))
    assert emulator.find("qemu") == binary


def test_the_answer_about_this_host_has_a_reason_and_leaves_nothing(
    qemu: Path, cache_dir: Path, own_temp_dir: Path
) -> None:
    found = accelerator.kvm_works(qemu, cache_dir)
    assert found.reason
    assert accelerator.kvm_works(qemu, cache_dir) == found


def test_a_guest_that_greets_is_the_proof(
    qemu: Path, tmp_path: Path, cache_dir: Path, device: Path, own_temp_dir: Path
) -> None:
    under_tcg = f'args=("${{@/#kvm/tcg}}"); exec {qemu} "${{args[@]/#host/max}}"'
    binary = program(tmp_path, under_tcg)
    assert accelerator.kvm_works(binary, cache_dir, DEADLINE_S) == (
        accelerator.KvmProbe(works=True, reason="a guest booted under KVM")
    )
    assert_gone(tmp_path)


@pytest.mark.parametrize("script", ["sleep 1000", "sleep 1000 & wait", "yes", "cat /dev/zero"])
def test_a_guest_that_does_not_run_is_told_and_ended(
    tmp_path: Path, cache_dir: Path, device: Path, own_temp_dir: Path, script: str
) -> None:
    found = accelerator.kvm_works(program(tmp_path, script), cache_dir, QUICK_S)
    assert found == accelerator.KvmProbe(works=False, reason=f"the guest did not run within {QUICK_S:g} s")
    assert_gone(tmp_path)


def test_qemu_ending_by_itself_is_told_with_its_words(tmp_path: Path, cache_dir: Path, device: Path) -> None:
    found = accelerator.kvm_works(program(tmp_path, "echo failed to set MSR >&2; exit 1"), cache_dir)
    assert found == accelerator.KvmProbe(False, "QEMU ended instead of running the guest: failed to set MSR")


def test_what_a_boot_has_shown_is_kept(tmp_path: Path, cache_dir: Path, device: Path) -> None:
    binary = program(tmp_path, f"printf '{BANNER.decode().strip()}\\r\\n'; sleep 1000")
    assert accelerator.kvm_works(binary, cache_dir).works
    assert accelerator.kvm_works(binary, cache_dir).works
    assert len(runs(tmp_path)) == 1
    assert accelerator.kvm_works(binary, cache_dir, use_cache=False).works
    assert len(runs(tmp_path)) == 2
    assert_gone(tmp_path)


@pytest.mark.parametrize("damage", ["", "{", "[]"])
def test_what_cannot_be_read_is_found_out_again(tmp_path: Path, cache_dir: Path, device: Path, damage: str) -> None:
    binary = program(tmp_path, "exit 1")
    accelerator.kvm_works(binary, cache_dir)
    (file,) = cache_dir.iterdir()
    file.write_text(damage)
    accelerator.kvm_works(binary, cache_dir)
    assert len(runs(tmp_path)) == 2


def test_another_boot_or_another_binary_is_tried_again(
    tmp_path: Path, cache_dir: Path, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = program(tmp_path, "exit 1")
    accelerator.kvm_works(binary, cache_dir)
    os.utime(binary, (1, 1))
    accelerator.kvm_works(binary, cache_dir)
    assert len(runs(tmp_path)) == 2
    (tmp_path / "boot_id").write_text("another boot\n")
    monkeypatch.setattr(accelerator, "BOOT_ID", tmp_path / "boot_id")
    accelerator.kvm_works(binary, cache_dir)
    assert len(runs(tmp_path)) == 3


def test_without_the_device_nothing_is_started_and_nothing_kept(tmp_path: Path, cache_dir: Path, device: Path) -> None:
    device.unlink()
    found = accelerator.kvm_works(program(tmp_path, "exit 1"), cache_dir)
    assert found == accelerator.KvmProbe(False, f"{device} cannot be opened: No such file or directory")
    assert runs(tmp_path) == []
    assert not cache_dir.exists()


def test_a_device_that_this_user_may_not_open_is_told(tmp_path: Path, cache_dir: Path, device: Path) -> None:
    device.unlink()
    device.mkdir()  # cannot be opened for writing, not even by root
    found = accelerator.kvm_works(program(tmp_path, "exit 1"), cache_dir)
    assert (found.works, found.reason) == (False, f"{device} cannot be opened: Is a directory")
