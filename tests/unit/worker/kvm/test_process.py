"""Which process is meant, on real processes: pids are used again, zombies are dead, and strangers stay untouched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tests.nodes import until
from worker.kvm.process import ProcessIdentity, QemuProcess, arguments_of, boot_id, find_by_uuid, qemu_processes

DEADLINE_S = 30.0
IGNORES_TERM = (
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); signal.pause()"
)
NULL = subprocess.DEVNULL
Run = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def run() -> Iterator[Run]:
    """Starts a child of the test that is gone at the test's end."""
    children: list[subprocess.Popen[bytes]] = []

    def start(*argv: str) -> subprocess.Popen[bytes]:
        children.append(subprocess.Popen(argv, stdin=NULL, stdout=subprocess.PIPE, stderr=NULL))
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.communicate()


@pytest.fixture
def spawn() -> Iterator[Callable[..., QemuProcess]]:
    """Starts a QemuProcess of any program; what it writes goes nowhere, or to the descriptor ``stdout``."""
    with ExitStack() as ends, Path(os.devnull).open("rb+") as null:

        def start(*argv: str, stdout: int = null.fileno()) -> QemuProcess:
            process = QemuProcess.spawn(argv, pass_fds=[], stdin=null.fileno(), stdout=stdout, stderr=null.fileno())
            ends.callback(process.close)
            ends.callback(process.kill, grace_s=0)
            return process

        yield start


def identity(child: subprocess.Popen[bytes]) -> ProcessIdentity:
    found = ProcessIdentity.of(child.pid)
    assert found
    return found


def sleeper(run: Run) -> subprocess.Popen[bytes]:
    return run("sleep", "600")


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def opened(pid: int) -> set[str]:
    names: set[str] = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            names.add(str(link.readlink()))
    return names


def zombie(run: Run) -> int:
    child = run("true")
    until(lambda: state(child.pid) == "Z")
    return child.pid


def orphan(run: Run, *argv: str) -> int:
    """A running process that is nobody's child here: its parent started it and ended."""
    program = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL).pid)"
    parent = run(sys.executable, "-c", program, *argv)
    assert parent.stdout
    pid = int(parent.stdout.readline())
    parent.wait(DEADLINE_S)
    return pid


def test_this_very_process_is_alive() -> None:
    me = ProcessIdentity.of(os.getpid())
    assert me
    assert me == ProcessIdentity(os.getpid(), me.start_ticks, boot_id())
    assert me.is_alive()


def test_a_process_that_has_ended_has_no_identity_and_its_identity_is_dead(run: Run) -> None:
    child = sleeper(run)
    gone = identity(child)
    child.kill()
    child.wait(DEADLINE_S)
    assert ProcessIdentity.of(child.pid) is None
    assert not gone.is_alive()
    assert gone.open() is None
    assert QemuProcess.adopt(gone) is None


def test_a_zombie_counts_as_dead(run: Run) -> None:
    pid = zombie(run)
    assert ProcessIdentity.of(pid) is None


def test_a_process_is_dead_as_soon_as_it_is_a_zombie(run: Run) -> None:
    child = sleeper(run)
    seen = identity(child)
    child.kill()  # and not waited for
    until(lambda: not seen.is_alive())
    assert Path(f"/proc/{child.pid}").exists()
    assert seen.open() is None


@pytest.mark.parametrize(
    "stranger",
    [
        pytest.param(lambda known: replace(known, start_ticks=known.start_ticks - 1), id="started at another time"),
        pytest.param(lambda known: replace(known, start_ticks=-1), id="start never known"),
        pytest.param(lambda known: replace(known, boot_id=str(uuid.uuid4())), id="of another boot"),
    ],
)
def test_a_pid_that_is_used_again_does_not_make_the_new_process_ours(
    run: Run, stranger: Callable[[ProcessIdentity], ProcessIdentity]
) -> None:
    child = sleeper(run)
    ours = stranger(identity(child))
    assert not ours.is_alive()
    assert ours.open() is None
    assert QemuProcess.adopt(ours) is None
    assert child.poll() is None


def test_a_process_whose_name_is_no_text_or_reads_like_another_state_is_recognised(run: Run) -> None:
    for name in (r"\xff\xfe", ") Z 1 (", "a\\nb c"):
        rename = f"open('/proc/self/comm', 'wb').write(b'{name}'); print('ready', flush=True); input()"
        child = subprocess.Popen([sys.executable, "-c", rename], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with child:
            assert child.stdout
            child.stdout.readline()
            found = identity(child)
            assert found.is_alive()
            child.kill()


def test_adopting_a_process_that_is_nobodys_child_here_watches_and_ends_it(run: Run) -> None:
    pid = orphan(run, "sleep", "600")
    known = ProcessIdentity.of(pid)
    assert known
    process = QemuProcess.adopt(known)
    assert process and process.pid == pid
    assert not process.wait(0)
    process.kill()
    assert process.wait(0)
    assert process.exit_status() is None  # its parent's to know
    assert not known.is_alive()
    process.close()


def test_a_child_of_ours_is_waited_for_and_tells_its_exit_status(spawn: Callable[..., QemuProcess]) -> None:
    process = spawn("sh", "-c", "exit 3")
    assert process.wait(DEADLINE_S)
    assert process.exit_status() == 3


def test_sigterm_ends_a_process_that_listens_to_it(spawn: Callable[..., QemuProcess]) -> None:
    process = spawn("sleep", "600")
    process.kill()
    assert process.exit_status() == -signal.SIGTERM


def test_a_process_that_ignores_sigterm_is_killed(spawn: Callable[..., QemuProcess]) -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as said:
        process = spawn(sys.executable, "-c", IGNORES_TERM, stdout=writing)
        os.close(writing)
        assert said.readline() == b"ready\n"
    process.kill(grace_s=0.2)
    assert process.exit_status() == -signal.SIGKILL
    assert not process.identity.is_alive()


def test_a_stopped_process_is_killed_too(spawn: Callable[..., QemuProcess]) -> None:
    process = spawn("sleep", "600")
    process.send_signal(signal.SIGSTOP)
    until(lambda: state(process.pid) == "T")
    process.kill(grace_s=0.1)
    assert process.exit_status() == -signal.SIGKILL


def test_ending_what_has_ended_is_no_error_and_hits_nobody_else(run: Run) -> None:
    child = sleeper(run)
    process = QemuProcess.adopt(identity(child))
    assert process
    child.kill()
    child.wait(DEADLINE_S)
    process.send_signal(signal.SIGTERM)
    process.kill()
    process.close()
    process.close()


def test_a_process_can_be_waited_for_by_one_thread_while_another_closes_it(spawn: Callable[..., QemuProcess]) -> None:
    process = spawn("sleep", "600")
    waiting = threading.Thread(target=process.wait, args=(DEADLINE_S,))
    waiting.start()
    process.kill()
    waiting.join(DEADLINE_S)
    assert not waiting.is_alive()


def test_a_signal_to_the_workers_group_does_not_reach_the_guest(spawn: Callable[..., QemuProcess]) -> None:
    process = spawn("sleep", "600")
    assert os.getsid(process.pid) == os.getpgid(process.pid) == process.pid != os.getsid(0)
    assert Path(f"/proc/{process.pid}/cwd").readlink() == Path("/")


def test_nothing_of_the_workers_environment_or_descriptors_is_passed_on(
    spawn: Callable[..., QemuProcess], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOSTLER_DATABASE_URL", "postgresql://secret@db/")
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        process = spawn("sleep", "600")
        until(lambda: arguments_of(process.pid)[:1] == ["sleep"])
        environment = Path(f"/proc/{process.pid}/environ").read_bytes()
        until(lambda: opened(process.pid) == {os.devnull})  # it reads its locale first
    assert sorted(entry.partition(b"=")[0] for entry in environment.split(b"\0")[:-1]) == [b"LC_ALL", b"PATH"]


def test_what_cannot_be_executed_is_an_os_error(spawn: Callable[..., QemuProcess]) -> None:
    with pytest.raises(FileNotFoundError):
        spawn("/no/such/qemu")


def test_a_qemu_whose_pid_was_never_written_down_is_found_by_its_uuid(run: Run) -> None:
    wanted, other = str(uuid.uuid4()), str(uuid.uuid4())
    pid = orphan(run, sys.executable, "-c", "import time; time.sleep(600)", "-name", "web1", "-uuid", wanted)
    sleeper(run)
    found = find_by_uuid(wanted)
    assert found == ProcessIdentity.of(pid)
    assert (wanted, found) in list(qemu_processes())
    assert find_by_uuid(other) is None
    assert found
    process = QemuProcess.adopt(found)
    assert process
    process.kill()
    assert find_by_uuid(wanted) is None


def test_w16_a_find_for_files_of_the_guests_name_is_not_a_guest(run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "result")  # nobody reads it, so that find waits
    finding = run("find", str(tmp_path), "-name", "web1", "-fprint", str(tmp_path / "result"))
    until(lambda: "-name" in arguments_of(finding.pid))
    assert finding.pid not in [found.pid for _, found in qemu_processes()]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["-uuid"], id="w18 an option without its value at the end"),
        pytest.param(["-uuid {}"], id="both in one word, as a shell or pgrep has them"),
        pytest.param(["--uuid={}"], id="another program's option"),
        pytest.param(["{}"], id="the uuid alone"),
        pytest.param([""], id="w17 an empty word"),
    ],
)
def test_words_that_look_like_a_guests_are_none(run: Run, arguments: list[str]) -> None:
    wanted = str(uuid.uuid4())
    child = run(sys.executable, "-c", "import time; time.sleep(600)", *(word.format(wanted) for word in arguments))
    until(lambda: len(arguments_of(child.pid)) == 3 + len(arguments))
    assert find_by_uuid(wanted) is None


@pytest.mark.parametrize("size", ["-smp 2,cores=2", "-m 1G", "-name"])
def test_w18_arguments_in_any_of_qemus_spellings_do_no_harm(run: Run, size: str) -> None:
    wanted = str(uuid.uuid4())
    child = run(sys.executable, "-c", "import time; time.sleep(600)", "-uuid", wanted, *size.split())
    assert until(lambda: find_by_uuid(wanted)) == ProcessIdentity.of(child.pid)


def test_w17_a_process_without_arguments_is_nobody(run: Run) -> None:
    assert arguments_of(zombie(run)) == []
    assert arguments_of(2**22 + 1) == []
    list(qemu_processes())
