"""The monitor against a real QEMU, and against servers that do what a QEMU in trouble does."""

from __future__ import annotations

import json
import queue
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.nodes import until
from worker.errors import OperationError, QemuFailed, QmpLost
from worker.kvm.qmp import Event, EventLoop, Monitor

DEADLINE_S = 30.0
GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": ""}, "capabilities": []}}
Start = Callable[..., "subprocess.Popen[bytes]"]
Connect = Callable[..., Monitor]


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def connect(loop: EventLoop, events: list[Event]) -> Iterator[Connect]:
    """Connects to a monitor; its events go to ``events``; hung up at the test's end."""
    open_ones: list[Monitor] = []

    def start(path: Path, timeout_s: float = DEADLINE_S) -> Monitor:
        open_ones.append(Monitor.connect(loop, path, timeout_s, events.append))
        return open_ones[-1]

    yield start
    for monitor in open_ones:
        monitor.close()


class Peer:
    """The other end of a monitor in the hands of the test."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._unread = ""

    def read(self) -> dict[str, Any]:
        """The next command; JSON itself says where it ends."""
        while True:
            with suppress(ValueError):
                command, end = json.JSONDecoder().raw_decode(self._unread)
                self._unread = self._unread[end:].lstrip()
                return dict(command)
            received = self._socket.recv(4096)
            assert received, f"the worker hung up; unread: {self._unread!r}"
            self._unread += received.decode()

    def send(self, *messages: object) -> None:
        self.send_bytes(b"".join(json.dumps(message).encode() + b"\r\n" for message in messages))

    def send_bytes(self, data: bytes) -> None:
        self._socket.sendall(data)

    def negotiate(self) -> None:
        self.send(GREETING)
        assert self.read()["execute"] == "qmp_capabilities"
        self.send({"return": {}})

    def answer(self, value: object = None) -> str:
        command = self.read()
        self.send({"return": value or {}, "id": command["id"]})
        return str(command["execute"])

    def hang_up(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def serve(short_dir: Path) -> Iterator[Callable[[Callable[[Peer], None]], Path]]:
    """Serves one monitor by a function of the test; an error in it is the test's."""
    threads: list[threading.Thread] = []
    sockets: list[socket.socket] = []
    errors: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    def start(script: Callable[[Peer], None]) -> Path:
        path = short_dir / f"qmp{len(threads)}"
        listener = socket.socket(socket.AF_UNIX)
        sockets.append(listener)
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(DEADLINE_S)

        def run() -> None:
            try:
                connection, _ = listener.accept()
                sockets.append(connection)
                connection.settimeout(DEADLINE_S)
                script(Peer(connection))
            except BaseException as exc:
                errors.put(exc)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return path

    yield start
    for thread in threads:
        thread.join(DEADLINE_S)
    for each in sockets:
        each.close()
    assert errors.empty(), errors.get()


def test_a_real_qemu_greets_with_its_version_and_tells_its_state(
    qemu: Start, connect: Connect, short_dir: Path, qemu_binary: Path
) -> None:
    qemu(short_dir / "qmp")
    monitor = connect(short_dir / "qmp")
    said = subprocess.run([qemu_binary, "--version"], capture_output=True, text=True, check=True).stdout
    assert f"version {monitor.version} " in said or f"version {monitor.version}\n" in said
    assert monitor.status() == "prelaunch"


def test_each_command_does_to_a_real_qemu_what_its_name_says(
    qemu: Start, connect: Connect, short_dir: Path, events: list[Event]
) -> None:
    qemu(short_dir / "qmp", "-machine", "pc,accel=tcg", "-m", "8")
    monitor = connect(short_dir / "qmp")
    monitor.continue_vcpus()
    assert monitor.status() == "running"
    monitor.pause_vcpus()
    assert monitor.status() == "paused"
    monitor.pause_vcpus()
    monitor.continue_vcpus()
    monitor.continue_vcpus()
    assert monitor.status() == "running"
    monitor.press_power_button()
    monitor.reset()
    wanted = ["RESUME", "STOP", "RESUME", "POWERDOWN", "RESET"]
    until(lambda: len([event for event in events if event["event"] in wanted]) == len(wanted))
    assert [event["event"] for event in events if event["event"] in wanted] == wanted


def test_what_a_real_qemu_refuses_is_told_in_its_own_words_and_the_monitor_works_on(
    qemu: Start, connect: Connect, short_dir: Path
) -> None:
    qemu(short_dir / "qmp")
    monitor = connect(short_dir / "qmp")
    with pytest.raises(QemuFailed, match=r"QEMU refused no-such: .*not been found") as refused:
        monitor.execute("no-such")
    assert refused.value.details == {"retryable": False, "qemu_class": "CommandNotFound"}
    with pytest.raises(QemuFailed, match="QEMU refused device_del"):
        monitor.execute("device_del", {"id": "no-such-device"})
    assert monitor.status() == "prelaunch"


def test_the_last_event_before_qemus_end_is_delivered_before_the_monitor_counts_as_closed(
    qemu: Start, connect: Connect, short_dir: Path, events: list[Event]
) -> None:
    process = qemu(short_dir / "qmp")
    monitor = connect(short_dir / "qmp")
    monitor.execute("quit")
    assert monitor.wait_closed(DEADLINE_S)
    assert [event["data"] for event in events if event["event"] == "SHUTDOWN"] == [
        {"guest": False, "reason": "host-qmp-quit"}
    ]
    assert process.wait(DEADLINE_S) == 0
    with pytest.raises(QmpLost):
        monitor.status()


def test_a_qemu_ended_by_a_signal_says_so_in_its_last_event(
    qemu: Start, connect: Connect, short_dir: Path, events: list[Event]
) -> None:
    process = qemu(short_dir / "qmp")
    monitor = connect(short_dir / "qmp")
    process.send_signal(signal.SIGTERM)
    assert monitor.wait_closed(DEADLINE_S)
    assert {"guest": False, "reason": "host-signal"} in [event.get("data") for event in events]


def test_a_qemu_that_is_killed_is_lost_not_failed(
    qemu: Start, connect: Connect, short_dir: Path, events: list[Event]
) -> None:
    process = qemu(short_dir / "qmp")
    monitor = connect(short_dir / "qmp")
    process.kill()
    assert monitor.wait_closed(DEADLINE_S)
    assert events == []
    with pytest.raises(QmpLost, match="query-status"):
        monitor.status()


def test_a_qemu_that_hangs_is_lost_after_the_deadline_and_answers_again_when_it_runs_on(
    qemu: Start, connect: Connect, short_dir: Path
) -> None:
    process = qemu(short_dir / "qmp")
    monitor = connect(short_dir / "qmp")
    process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(QmpLost, match=r"did not answer query-name within 0\.2 s") as lost:
            monitor.execute("query-name", timeout_s=0.2)
        assert lost.value.details["retryable"] is True
        assert not monitor.wait_closed(0)
    finally:
        process.send_signal(signal.SIGCONT)
    # the late answer, {}, belongs to nobody
    assert monitor.execute("query-status")["status"] == "prelaunch"


def test_a_hung_qemu_that_does_not_greet_is_lost_after_the_deadline(
    qemu: Start, connect: Connect, short_dir: Path
) -> None:
    process = qemu(short_dir / "qmp")
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(QmpLost, match=r"did not greet on its monitor within 0\.2 s"):
        connect(short_dir / "qmp", timeout_s=0.2)


def test_late_answers_are_not_taken_for_the_answers_of_later_commands(
    serve: Callable[..., Path], connect: Connect
) -> None:
    gave_up = threading.Event()

    def script(peer: Peer) -> None:
        peer.negotiate()
        late = [peer.read() for _ in range(3)]
        assert gave_up.wait(DEADLINE_S)
        command = peer.read()
        peer.send(*({"return": {"status": "late"}, "id": each["id"]} for each in late))
        peer.send({"return": {"status": "in time"}, "id": command["id"]})
        peer.answer({"status": "afterwards"})

    monitor = connect(serve(script))
    for _ in range(3):
        with pytest.raises(QmpLost, match="did not answer query-status"):
            monitor.execute("query-status", timeout_s=0.05)
    gave_up.set()
    assert monitor.status() == "in time"
    assert monitor.status() == "afterwards"


def test_answers_out_of_order_find_their_callers(serve: Callable[..., Path], connect: Connect) -> None:
    def script(peer: Peer) -> None:
        peer.negotiate()
        for command in reversed([peer.read() for _ in range(10)]):
            peer.send({"event": "NOISE", "timestamp": {}}, {"return": command["arguments"], "id": command["id"]})

    monitor = connect(serve(script))
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda number: monitor.execute("echo", {"number": number}), range(10)))
    assert answers == [{"number": number} for number in range(10)]


@pytest.mark.parametrize(
    "greeting",
    [
        pytest.param(b"HTTP/1.1 400 Bad Request\r\n\r\n", id="another protocol"),
        pytest.param(b"\xff\xfe\x00\x01\n", id="bytes that are no text"),
        pytest.param(b"[1, 2, 3]\n", id="JSON that is no object"),
        pytest.param(b'{"return": {}}\n', id="an answer before the greeting"),
        pytest.param(b'{"QMP": "7.2"}\n', id="a greeting of another shape"),
        pytest.param(b'{"QMP": {"version": {}, "capabilities": 5}}\n', id="a greeting with wrong types"),
    ],
)
def test_what_does_not_greet_as_qemu_does_has_failed(
    serve: Callable[..., Path], connect: Connect, greeting: bytes
) -> None:
    with pytest.raises(QemuFailed, match="does not speak QMP"):
        connect(serve(lambda peer: peer.send_bytes(greeting)))


def test_a_qemu_that_hangs_up_in_the_middle_of_its_greeting_is_not_connected(
    serve: Callable[..., Path], connect: Connect
) -> None:
    with pytest.raises(OperationError):
        connect(serve(lambda peer: (peer.send_bytes(b'{"QMP": {"ver'), peer.hang_up())))


def test_a_version_that_is_not_told_is_no_error(serve: Callable[..., Path], connect: Connect) -> None:
    def script(peer: Peer) -> None:
        peer.send({"QMP": {"version": {}, "capabilities": []}})
        peer.read()
        peer.send({"return": {}})

    assert connect(serve(script)).version == "0.0.0"


def test_a_qemu_that_refuses_the_negotiation_has_failed(serve: Callable[..., Path], connect: Connect) -> None:
    def script(peer: Peer) -> None:
        peer.send(GREETING)
        peer.read()
        peer.send({"error": {"class": "GenericError", "desc": "no"}})

    with pytest.raises(QemuFailed, match="does not speak QMP"):
        connect(serve(script))


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(lambda peer: peer.hang_up(), id="at once"),
        pytest.param(lambda peer: (peer.send(GREETING), peer.read(), peer.hang_up()), id="in the negotiation"),
        pytest.param(lambda peer: (peer.negotiate(), peer.hang_up()), id="as soon as it has negotiated"),
    ],
)
def test_a_qemu_that_hangs_up_before_it_is_ready_is_lost(
    serve: Callable[..., Path], connect: Connect, script: Callable[[Peer], None]
) -> None:
    with pytest.raises(QmpLost):
        connect(serve(script)).status()


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(lambda peer: None, id="not a word"),
        pytest.param(lambda peer: peer.send_bytes(b'{"QMP": {'), id="half a greeting"),
        pytest.param(lambda peer: peer.send(GREETING), id="no answer to the negotiation"),
    ],
)
def test_a_qemu_that_keeps_silent_is_lost_after_the_deadline(
    serve: Callable[..., Path], connect: Connect, script: Callable[[Peer], None]
) -> None:
    with pytest.raises(QmpLost, match=r"did not greet on its monitor within 0\.2 s"):
        connect(serve(script), timeout_s=0.2)


def test_a_socket_nobody_listens_at_is_lost(connect: Connect, short_dir: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(short_dir / "qmp"))
    with pytest.raises(QmpLost):
        connect(short_dir / "qmp")


@pytest.mark.parametrize(
    "noise",
    [
        pytest.param(b"what?\n", id="no JSON"),
        pytest.param(b"[]\n", id="no object"),
        pytest.param(b'{"return": {}, "id": []}\n', id="an id that cannot be one"),
        pytest.param(b'{"return": {}, "id": "x"}\n{"error": {"class": "x", "desc": ""}}\n', id="an error"),
        pytest.param(b"\xff" * 100 + b"\n", id="no text"),
        pytest.param(b"x" * 11 * 1024 * 1024, id="a line without end"),
    ],
)
def test_garbage_instead_of_an_answer_is_a_lost_connection_for_every_caller(
    serve: Callable[..., Path], connect: Connect, noise: bytes
) -> None:
    def script(peer: Peer) -> None:
        peer.negotiate()
        peer.read()
        peer.read()
        try:
            peer.send_bytes(noise)
        except OSError:
            return  # it has heard enough

    monitor = connect(serve(script))
    with ThreadPoolExecutor(2) as pool:
        callers = [pool.submit(monitor.execute, "query-status") for _ in range(2)]
        for caller in callers:
            with pytest.raises(QmpLost, match="broke during query-status"):
                caller.result()
    with pytest.raises(QmpLost):
        monitor.status()
    assert monitor.wait_closed(DEADLINE_S)
    monitor.close()


def test_an_answer_that_is_neither_result_nor_error_is_a_lost_connection_or_a_refusal(
    serve: Callable[..., Path], connect: Connect
) -> None:
    def script(peer: Peer) -> None:
        peer.negotiate()
        peer.send({"id": peer.read()["id"]})

    with pytest.raises(OperationError):
        connect(serve(script)).status()


def test_every_event_sent_before_the_end_is_delivered_in_order(
    serve: Callable[..., Path], connect: Connect, events: list[Event]
) -> None:
    sent = [{"event": "E", "data": {"number": number}, "timestamp": {}} for number in range(500)]

    def script(peer: Peer) -> None:
        peer.negotiate()
        peer.answer()
        peer.send(*sent)
        peer.hang_up()

    monitor = connect(serve(script))
    monitor.execute("x")
    assert monitor.wait_closed(DEADLINE_S)
    assert events == sent


def test_events_before_garbage_are_delivered_too(
    serve: Callable[..., Path], connect: Connect, events: list[Event]
) -> None:
    shutdown = {"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-shutdown"}, "timestamp": {}}

    def script(peer: Peer) -> None:
        peer.negotiate()
        peer.answer()
        peer.send(shutdown)
        peer.send_bytes(b"\x7fELF\n")

    monitor = connect(serve(script))
    monitor.execute("x")
    assert monitor.wait_closed(DEADLINE_S)
    assert events == [shutdown]


def test_an_event_that_its_receiver_cannot_take_does_not_cost_the_next_ones(
    serve: Callable[..., Path], loop: EventLoop
) -> None:
    heard: list[str] = []

    def take(event: Event) -> None:
        heard.append(event["event"])
        if event["event"] == "BAD":
            raise ValueError(event)

    def script(peer: Peer) -> None:
        peer.negotiate()
        peer.answer()
        peer.send(*({"event": name, "timestamp": {}} for name in ("BAD", "SHUTDOWN")))
        peer.hang_up()

    with closing(Monitor.connect(loop, serve(script), DEADLINE_S, take)) as monitor:
        monitor.execute("x")
        assert monitor.wait_closed(DEADLINE_S)
    assert heard == ["BAD", "SHUTDOWN"]


def test_hanging_up_ends_neither_the_guest_nor_the_next_connection(
    qemu: Start, connect: Connect, short_dir: Path
) -> None:
    process = qemu(short_dir / "qmp")
    for _ in range(3):
        monitor = connect(short_dir / "qmp")
        assert monitor.status() == "prelaunch"
        monitor.close()
        monitor.close()
        assert monitor.wait_closed(DEADLINE_S)
        with pytest.raises(QmpLost):
            monitor.status()
    assert process.poll() is None


def test_twenty_monitors_share_a_loop_and_a_silent_one_delays_no_other(
    serve: Callable[..., Path], connect: Connect
) -> None:
    released = threading.Event()

    def silent(peer: Peer) -> None:
        peer.negotiate()
        peer.read()
        released.wait(DEADLINE_S)

    def talking(peer: Peer) -> None:
        peer.negotiate()
        for _ in range(20):
            peer.answer({"status": "running"})

    monitors = [connect(serve(silent if number == 0 else talking)) for number in range(20)]
    with ThreadPoolExecutor(20) as pool:
        lost = pool.submit(monitors[0].execute, "query-status", timeout_s=2 * DEADLINE_S)
        heard = [pool.submit(lambda each: [each.status() for _ in range(20)], monitor) for monitor in monitors[1:]]
        assert [future.result(DEADLINE_S) for future in heard] == [["running"] * 20] * 19
        assert not lost.done()
        released.set()
        monitors[0].close()
        with pytest.raises(QmpLost):
            lost.result(DEADLINE_S)


def test_twenty_real_qemus_are_served_by_one_loop_at_once(qemu: Start, connect: Connect, short_dir: Path) -> None:
    paths = [short_dir / f"qmp{number}" for number in range(20)]
    for path in paths:
        qemu(path, "-machine", "none", "-name", path.name)
    with ThreadPoolExecutor(20) as pool:
        monitors = list(pool.map(connect, paths))
        names = list(pool.map(lambda monitor: monitor.execute("query-name"), monitors))
    assert names == [{"name": path.name} for path in paths]


def test_a_caller_is_not_kept_longer_than_its_deadline_by_a_loop_that_is_stuck(
    serve: Callable[..., Path], loop: EventLoop, connect: Connect
) -> None:
    monitor = connect(serve(lambda peer: peer.negotiate()))
    stuck, released = threading.Event(), threading.Event()
    loop.loop.call_soon_threadsafe(lambda: (stuck.set(), released.wait(DEADLINE_S)))
    assert stuck.wait(DEADLINE_S)
    before = time.monotonic()
    try:
        with pytest.raises(QmpLost, match="did not answer"):
            monitor.execute("query-status", timeout_s=0.1)
        assert time.monotonic() - before < DEADLINE_S
    finally:
        released.set()
