"""Faults in mid-job, as data: ``SCENARIOS`` names each one, ``play`` provokes it and tells what became of it.

Every scenario finds a node in the middle of its work (``tests/faults/bed.py``), provokes its fault, and returns once
the host is whole again. What was sent must then end, and no promise be broken.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import psutil
import redis
from sqlalchemy import text

from hostler import embedded
from hostler.contract import queue_name
from models import utc_now
from tests.faults.bed import Bed, bed
from tests.faults.surroundings import (
    Clock,
    Postgres,
    Redis,
    SmallDisk,
    clock,
    own_redis,
    postgres,
    small_state_disk,
)
from tests.nodes import TestNode, tiny_instance, until

AWAY_S = 5.0
"""How long something is away or stands still in the test suite; the report takes 30."""

Provoke = Callable[[Bed, Any], None]
Surroundings = Callable[[TestNode], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Scenario:
    """A fault, and what the node has to stand on for it."""

    provoke: Provoke
    on: Surroundings


@dataclass
class Played:
    """What became of a scenario."""

    name: str
    jobs: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    saw: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    took_s: float = 0.0


SCENARIOS: dict[str, Scenario] = {}


def play(name: str, away_s: float = AWAY_S) -> Played:
    """Provoke a fault on a node of its own. Raises Lacking where this host has not what it needs."""
    began, scenario, played = time.monotonic(), SCENARIOS[name], Played(name)
    with bed(away_s) as made, scenario.on(made.node) as ground:
        made.secrets = getattr(ground, "secrets", [])
        try:
            made.load()
            scenario.provoke(made, ground)
            made.release()
            played.violations = made.settle()
            played.jobs, played.ends, played.saw = len(made.jobs), dict(made.ends()), made.saw
        finally:
            made.end()
    played.took_s = time.monotonic() - began
    return played


def scenario(name: str, on: Surroundings = lambda _: nullcontext()) -> Callable[[Provoke], Provoke]:
    """Enter a function as a scenario."""

    def enter(provoke: Provoke) -> Provoke:
        SCENARIOS[name] = Scenario(provoke, on)
        return provoke

    return enter


# The worker


@scenario("the worker is told to end, and waits for its jobs")
def _sigterm(made: Bed, _: None) -> None:
    assert made.node.worker
    made.node.worker.send_signal(signal.SIGTERM)
    made.release()
    made.saw.append(f"the worker ended with {made.node.worker.wait(60)}")
    made.node.worker = None
    made.node.start_worker()


@scenario("the worker is told to end at once")
def _sigquit(made: Bed, _: None) -> None:
    made.kill_worker(signal.SIGQUIT)
    made.node.start_worker()


@scenario("the worker is killed, twice")
def _sigkill(made: Bed, _: None) -> None:
    made.kill_worker(signal.SIGKILL)
    made.node.start_worker()
    made.kill_worker(signal.SIGKILL)
    made.release()
    made.node.start_worker()


@scenario("the worker stands still for a while")
def _sigstop(made: Bed, _: None) -> None:
    with made.suspended():
        made.release()
        made.send("meanwhile", "instance.list")
        time.sleep(made.away_s)


# QEMU


@scenario("QEMU is killed during a start, a stop and a reboot")
def _qemu(made: Bed, _: None) -> None:
    made.expect("slow", "QEMU_FAILED")
    made.expect("child", "REVOKED")
    for name in ("slow", "stubborn", "rebooted"):
        made.kill_qemu(name)


@scenario("QEMU is killed while no worker runs")
def _qemu_alone(made: Bed, _: None) -> None:
    made.kill_worker(signal.SIGKILL)
    for name in ("slow", "stubborn", "rebooted"):
        made.kill_qemu(name)
    made.release()
    made.node.start_worker()


# The broker


@scenario("the broker is killed and comes back at once")
def _broker_killed(made: Bed, _: None) -> None:
    made.send("queued", "instance.list")
    _kill_broker(made)
    made.release()
    until(lambda: embedded.status(made.node.settings).running, what="the worker started the broker again")
    embedded.ensure(made.node.settings)


def _kill_broker(made: Bed) -> None:
    pid = embedded.status(made.node.settings).pid
    assert pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: not embedded.status(made.node.settings).running)


@scenario("the broker is killed when it has just told of a message")
def _broker_killed_in_delivery(made: Bed, _: None) -> None:
    with _queue(made) as (server, _key):
        until(lambda: _is_read(server), what="the worker waits for a message")
        with made.suspended():
            made.send("told", "instance.list")
            until(lambda: not _is_read(server), what="the broker told of the message")
            _kill_broker(made)


@scenario("broker and results are away for a while", own_redis)
def _broker_away(made: Bed, server: Redis) -> None:
    server.stop()
    made.release()
    made.try_to_send("meanwhile", "instance.list")
    time.sleep(made.away_s)
    server.start()


# Messages


@contextmanager
def _queue(made: Bed) -> Iterator[tuple[redis.Redis, str]]:
    """The embedded broker, and the key under which it has the node's messages, the newest first."""
    with redis.Redis(unix_socket_path=str(made.node.settings.broker_socket)) as server:
        yield server, queue_name(made.node.name)


def _is_read(server: redis.Redis) -> bool:
    """Whether a reader waits for the next message; it does so for a moment at a time."""
    return any("b" in client["flags"] for client in server.client_list())


@contextmanager
def _messages(made: Bed) -> Iterator[Callable[[], list[bytes]]]:
    """Messages that are sent meanwhile, the oldest first, are not read before ``_put`` puts them back as one likes."""
    with _queue(made) as (server, queue), made.suspended():
        until(lambda: not _is_read(server), what="nobody waits for a message any more")

        def take() -> list[bytes]:
            found = server.lrange(queue, 0, -1)
            server.delete(queue)
            return [bytes(message) for message in reversed(found)]

        yield take


def _put(made: Bed, messages: list[bytes]) -> None:
    with _queue(made) as (server, queue):
        server.lpush(queue, *messages)


def _some_jobs(made: Bed) -> None:
    made.send("new", "instance.start", instance=tiny_instance(made.node.root, "new"))
    made.send("bad", "instance.pause", "UNKNOWN_INSTANCE", name="nobody")
    made.send("list", "instance.list")
    made.send("behind", "instance.resume", name="stubborn")
    made.send("parent", "instance.list")
    made.send("later", "instance.info", name="calm", after=[made.jobs["parent"].id])


@scenario("every message comes twice")
def _twice(made: Bed, _: None) -> None:
    with _messages(made) as take:
        _some_jobs(made)
        messages = take()
        _put(made, [copy for message in messages for copy in (message, message)])
    made.release()
    until(lambda: not made.unfinished())
    _put(made, messages)


@scenario("messages come in the wrong order")
def _backwards(made: Bed, _: None) -> None:
    with _messages(made) as take:
        _some_jobs(made)
        _put(made, take()[::-1])


# The database


@scenario("PostgreSQL crashes and comes back at once", postgres)
def _database_restarts(made: Bed, server: Postgres) -> None:
    server.stop()
    made.release()
    server.start()


@scenario("PostgreSQL is away for a while", postgres)
def _database_away(made: Bed, server: Postgres) -> None:
    with _mute(made, "pause") as pause:
        made.await_(pause, "pause")
        server.stop()
    made.release()  # and its monitor answers: what was done has to be written down
    made.send("meanwhile", "instance.list")
    time.sleep(made.away_s)
    server.start()


@scenario("PostgreSQL drops connections in the middle of transactions", postgres)
def _database_drops(made: Bed, server: Postgres) -> None:
    cut_all = text(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE wait_event_type = 'Lock' AND pid <> pg_backend_pid()"
    )
    engine = made.node.database().engine
    with engine.connect() as holder, engine.execution_options(isolation_level="AUTOCOMMIT").connect() as other:
        for table in ("jobs", "instances", "runtimes"):
            holder.execute(text(f"LOCK TABLE {table} IN EXCLUSIVE MODE"))
            made.release()
            made.send(table, "instance.start", instance=tiny_instance(made.node.root, table))
            cut = until(lambda: other.execute(cut_all).all(), what="a transaction is under way")
            made.saw.append(f"{len(cut)} connections were cut that waited to write {table}")
            holder.rollback()


# The disk


@scenario("the disk below the state folder is full for a while", small_state_disk)
def _disk_full(made: Bed, disk: SmallDisk) -> None:
    disk.fill()
    try:
        made.release()
        made.try_to_send("meanwhile", "instance.list")
        time.sleep(made.away_s)
        made.try_to_send("later", "instance.list")
    finally:
        disk.free()
        running = embedded.status(made.node.settings).running
        made.saw.append(f"the broker {'ran on' if running else 'had ended'}")


# The clock


@scenario("the clock is set forward and back by an hour", clock)
def _clock_steps(made: Bed, clock: Clock) -> None:
    made.clock_stepped = True
    for number, seconds in enumerate((3600, 0, -3600, 0)):
        clock.step(seconds)
        made.send(f"list-{number}", "instance.list").wait(30)
        row = made.row(f"list-{number}")
        assert row and row.finished_at
        seen_s = (row.finished_at - utc_now()).total_seconds()
        made.saw.append(f"a job ended {seen_s:+.0f} s from now by the worker's clock")


@scenario("the clock is set back by an hour while a job is put off", clock)
def _clock_steps_back(made: Bed, clock: Clock) -> None:
    made.clock_stepped = True
    with _mute(made, "put-off") as pause:
        made.await_(pause, "RETRY")
        clock.step(-3600)
        made.release()


@contextmanager
def _mute(made: Bed, label: str) -> Iterator[str]:
    """A pause of a guest whose monitor keeps silent meanwhile."""
    made.send("mute", "instance.start", instance=tiny_instance(made.node.root, "mute")).wait(30)
    qemu = psutil.Process(made.node.pid("mute"))
    qemu.suspend()
    try:
        made.send(label, "instance.pause", name="mute")
        yield label
    finally:
        qemu.resume()
