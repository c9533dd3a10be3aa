"""What the ledger promises when many act in the same moment, on each kind of database."""

from __future__ import annotations

import multiprocessing
import queue
import random
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from sqlalchemy import select

from models import Database, Job
from tests.unit.worker.operations.ledgers import again, ledger_of, locks, receipt, row, succeed
from tests.unit.worker.operations.racers import DEADLINE_S, racer, receive_at_once
from worker.operations.ledger import Ledger
from worker.operations.receipts import Receipt, Verdict, Wakeup

ROUNDS = [f"web{number}" for number in range(50)]
Verdicts = dict[str, list[str]]


@contextmanager
def another(database: Database) -> Iterator[Database]:
    """The same database as another worker sees it: through connections of its own."""
    other = Database(database.url)
    try:
        yield other
    finally:
        other.dispose()


def in_threads(database: Database) -> Verdicts:
    start = threading.Barrier(2)

    def race(node: str) -> list[str]:
        with another(database) as own:
            return receive_at_once(own, node, ROUNDS, start)

    with ThreadPoolExecutor(2) as pool:
        racing = {node: pool.submit(race, node) for node in ("n1", "n2")}
        return {node: future.result() for node, future in racing.items()}


def in_processes(database: Database) -> Verdicts:
    context = multiprocessing.get_context("spawn")
    start, verdicts = context.Barrier(2), context.Queue()
    url = database.url.render_as_string(hide_password=False)
    racers = [context.Process(target=racer, args=(url, node, ROUNDS, start, verdicts)) for node in ("n1", "n2")]
    try:
        for process in racers:
            process.start()
        return dict(verdicts.get(timeout=DEADLINE_S) for _ in racers)
    finally:
        for process in racers:
            process.join(DEADLINE_S)
            process.kill()


@pytest.mark.parametrize("race", [in_threads, in_processes])
def test_of_two_nodes_that_want_an_instance_at_once_one_gets_it_and_the_other_gets_it_next(
    database: Database, race: Callable[[Database], Verdicts]
) -> None:
    nodes = {node: ledger_of(database, node) for node in ("n1", "n2")}
    verdicts = race(database)
    for number, instance in enumerate(ROUNDS):
        found = {verdicts[node][number]: node for node in nodes}
        assert set(found) == {"RUN", "WAIT"}, (instance, verdicts)
        winner, loser = found["RUN"], found["WAIT"]
        assert row(database, f"{instance}-{loser}").waiting_for == [f"{instance}-{winner}"]
        wakeup = succeed(nodes[winner], f"{instance}-{winner}")
        assert wakeup and (wakeup.job_id, wakeup.node) == (f"{instance}-{loser}", loser)
        assert nodes[loser].receive(again(wakeup)).verdict is Verdict.RUN
        assert succeed(nodes[loser], wakeup.job_id) is None
    assert locks(database) == {}


def test_one_id_sent_to_two_nodes_at_once_is_a_job_of_one_of_them(database: Database) -> None:
    ledgers = [ledger_of(database, node) for node in ("n1", "n2")]
    start = threading.Barrier(2)

    def deliver(ledger: Ledger, job_id: str) -> Verdict:
        start.wait(DEADLINE_S)
        return ledger.receive(receipt(job_id, job_id)).verdict

    with ThreadPoolExecutor(2) as pool:
        for job_id in ROUNDS:
            verdicts = list(pool.map(deliver, ledgers, [job_id] * 2))
            assert sorted(verdict.name for verdict in verdicts) == ["DROP", "RUN"]


def test_a_job_parked_while_the_holder_ends_is_never_forgotten(database: Database) -> None:
    """It either sees the lock free and runs, or is seen by who frees it."""
    n1, n2 = ledger_of(database, "n1"), ledger_of(database, "n2")
    start = threading.Barrier(2)

    def end(instance: str) -> Wakeup | None:
        start.wait(DEADLINE_S)
        return succeed(n1, f"{instance}-1")

    def deliver(instance: str) -> Verdict:
        start.wait(DEADLINE_S)
        return n2.receive(receipt(f"{instance}-2", instance)).verdict

    with ThreadPoolExecutor(2) as pool:
        for instance in ROUNDS:
            n1.receive(receipt(f"{instance}-1", instance))
            ending, arriving = pool.submit(end, instance), pool.submit(deliver, instance)
            wakeup = ending.result()
            assert arriving.result() is (Verdict.WAIT if wakeup else Verdict.RUN)
            assert locks(database)[instance] == f"{instance}-2"


def test_a_second_message_of_the_job_that_is_next_does_not_entangle_with_the_end_of_the_one_before(
    database: Database,
) -> None:
    n1, n2 = ledger_of(database, "n1"), ledger_of(database, "n2")
    start = threading.Barrier(2)

    def end(instance: str) -> Wakeup | None:
        start.wait(DEADLINE_S)
        return succeed(n1, f"{instance}-1")

    def deliver(instance: str) -> Verdict:
        start.wait(DEADLINE_S)
        return n2.receive(receipt(f"{instance}-2", instance)).verdict

    with ThreadPoolExecutor(2) as pool:
        for instance in ROUNDS:
            n1.receive(receipt(f"{instance}-1", instance))
            assert n2.receive(receipt(f"{instance}-2", instance)).verdict is Verdict.WAIT
            ending, arriving = pool.submit(end, instance), pool.submit(deliver, instance)
            wakeup = ending.result()
            assert wakeup and wakeup.job_id == f"{instance}-2"
            if arriving.result() is Verdict.WAIT:  # it came before the lock was handed on
                assert n2.receive(again(wakeup)).verdict is Verdict.RUN
            assert row(database, wakeup.job_id).attempts == 1


class Site:
    """Two nodes, eight threads that deliver whatever a queue holds, and what they saw each other do."""

    def __init__(self, database: Database) -> None:
        self.ledgers = {node: ledger_of(database, node) for node in ("n1", "n2")}
        self.messages: queue.Queue[tuple[str, Receipt] | None] = queue.Queue()
        self.running: set[str] = set()
        self.ran: dict[str, list[str]] = defaultdict(list)
        self.lock = threading.Lock()
        self.errors: list[Exception] = []

    def send(self, node: str, message: Receipt) -> None:
        self.messages.put((node, message))

    def work(self) -> None:
        while message := self.messages.get():
            try:
                self._deliver(*message)
            except Exception as exc:
                self.errors.append(exc)
            finally:
                self.messages.task_done()

    def _deliver(self, node: str, message: Receipt) -> None:
        ledger = self.ledgers[node]
        if ledger.receive(message).verdict is not Verdict.RUN:
            return
        instance = str(message.instance_name)
        with self.lock:
            assert instance not in self.running, f"two jobs of {instance} at a time"
            self.running.add(instance)
            self.ran[instance].append(message.job_id)
        ledger.advance(message.job_id, "pause", 50, "")
        with self.lock:
            self.running.remove(instance)
        if wakeup := succeed(ledger, message.job_id, {"name": instance}):
            self.send(wakeup.node, again(wakeup))


def test_eight_threads_run_200_jobs_of_five_instances_once_each_one_at_a_time_in_their_order(
    database: Database,
) -> None:
    site, chance = Site(database), random.Random(7)
    nodes = {f"j{number:03}": f"n{1 + number % 2}" for number in range(200)}
    sent = [receipt(job_id, f"web{number % 5}") for number, job_id in enumerate(nodes)]
    at_once = {message.job_id for message in chance.sample(sent, 20)}
    for message in [copy for each in sent for copy in [each] * (1 + (each.job_id in at_once))]:
        site.send(nodes[message.job_id], message)
    for message in chance.sample(sent, 50):  # when it runs, waits or is done
        site.send(nodes[message.job_id], message)
    with ThreadPoolExecutor(8) as pool:
        working = [pool.submit(site.work) for _ in range(8)]
        site.messages.join()
        for _ in working:
            site.messages.put(None)
        for thread in working:
            thread.result()
    assert site.errors == []
    with database.reading() as session:
        rows = session.scalars(select(Job).order_by(Job.sequence)).all()
    received = {name: [job.id for job in rows if job.instance_name == name] for name in site.ran}
    assert Counter(job for jobs in site.ran.values() for job in jobs) == Counter(nodes.keys())
    assert {(job.state, job.attempts) for job in rows} == {("SUCCESS", 1)}
    assert dict(site.ran) == received
    assert locks(database) == {}
