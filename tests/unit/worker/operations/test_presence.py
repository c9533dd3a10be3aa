"""Who has a worker, as the database says, on each kind of database."""

from __future__ import annotations

from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sqlalchemy import delete, select, update

from models import Database, Incarnation, Instance, Node, utc_now
from tests.unit.worker.operations.ledgers import ids, ledger_of, receipt, succeed
from worker.operations import presence, why
from worker.operations.context import NodeContext
from worker.operations.presence import ABSENT_AFTER

A_MOMENT = timedelta(seconds=1)


def change(database: Database, node: str, **values: Any) -> None:
    with database.transaction() as session:
        session.execute(update(Incarnation).where(Incarnation.node == node).values(**values))


def silent(database: Database, node: str) -> datetime:
    """Let the node's worker have missed its beats; the time of the last one."""
    last = utc_now() - ABSENT_AFTER - A_MOMENT
    change(database, node, heartbeat_at=last)
    return last


def context(database: Database, node: str = "n1") -> NodeContext:
    return cast(NodeContext, SimpleNamespace(database=database, name=node))


def test_a_node_is_absent_when_its_worker_ended_or_missed_three_beats(database: Database) -> None:
    for node in ("alive", "ended", "late", "silent"):
        ledger_of(database, node)
    ended = utc_now() - timedelta(days=1)
    change(database, "ended", ended_at=ended)
    change(database, "late", heartbeat_at=utc_now() - ABSENT_AFTER + 5 * A_MOMENT)
    last = silent(database, "silent")
    found = presence.presences(database)
    assert {name: node.alive for name, node in found.items()} == {
        "alive": True, "ended": False, "late": True, "silent": False,
    }  # fmt: skip
    assert (found["ended"].since, found["silent"].since) == (ended, last)
    since = ended.isoformat(timespec="seconds")
    assert found["ended"].absence == f"node ended has no worker since {since}; start one there: hostler worker"


def test_only_the_newest_worker_of_a_node_counts(database: Database) -> None:
    ledger_of(database, "n1")
    change(database, "n1", started_at=utc_now() - timedelta(days=2), ended_at=utc_now())
    ledger_of(database, "n1")
    assert presence.presences(database)["n1"].alive
    last = utc_now() - timedelta(hours=1)
    with database.transaction() as session:
        session.execute(update(Incarnation).where(Incarnation.ended_at.is_(None)).values(heartbeat_at=last))
    assert presence.presences(database)["n1"].since == last


def test_a_node_whose_workers_are_all_forgotten_is_absent_without_a_time(database: Database) -> None:
    ledger_of(database)
    with database.transaction() as session:
        session.execute(delete(Incarnation))
    assert presence.presences(database)["n1"].absence == "node n1 has no worker; start one there: hostler worker"


def test_the_first_of_the_living_watches(database: Database) -> None:
    for node in ("n3", "n1", "n2"):
        ledger_of(database, node)
    assert [presence.is_watcher(database, node) for node in ("n1", "n2", "n3")] == [True, False, False]
    silent(database, "n1")
    assert [presence.is_watcher(database, node) for node in ("n1", "n2", "n3")] == [False, True, False]
    change(database, "n2", ended_at=utc_now())
    assert presence.is_watcher(database, "n3")


def test_open_jobs_come_in_their_order_and_piece_by_piece(database: Database) -> None:
    ledger, other = ledger_of(database), ledger_of(database, "n2")
    for job_id in ("c", "b", "a"):
        ledger.receive(receipt(job_id))
    other.receive(receipt("x", "web2"))
    first, second = presence.open_jobs(database, "n1", 0, 2)
    assert (first.id, second.id) == ("c", "b")
    assert [job.id for job in presence.open_jobs(database, "n1", second.sequence, 2)] == ["a"]
    assert [presence.has_begun(job) for job in (first, second)] == [True, False]
    succeed(ledger, "c")
    assert [job.id for job in presence.open_jobs(database, "n1", 0, 9)] == ["b", "a"]
    assert set(presence.known_jobs(database, ["c", "x", "never"])) == {"c", "x"}


def test_the_list_of_nodes_counts_guests_by_state_and_open_jobs(database: Database) -> None:
    ledger = ledger_of(database)
    ledger_of(database, "n2")
    silent(database, "n2")
    ledger.receive(receipt("j1"))
    ledger.receive(receipt("j2"))
    ledger.receive(receipt("asking", None))
    with database.transaction() as session:
        for name, state in (("web1", "running"), ("web2", "running"), ("web3", "crashed")):
            session.add(Instance(name=name, node="n2", state=state, spec={}))
    first, second = presence.list_nodes(context(database), "asking")
    assert (first["node"], first["worker"], first["instances"], first["open_jobs"]) == ("n1", "alive", {}, 2)
    assert first["pid"] and first["version"] == "0"
    assert (second["node"], second["worker"], second["pid"], second["open_jobs"]) == ("n2", "absent", None, 0)
    assert second["instances"] == {"running": 2, "crashed": 1}


def test_why_says_first_that_the_jobs_node_has_no_worker(database: Database) -> None:
    ledger_of(database, "n1")
    ledger = ledger_of(database, "n2")
    ledger.receive(receipt("j1"))
    ledger.receive(receipt("j2"))
    assert why.explain(context(database), "j2")["because"][0].startswith("instance web1 is held")
    silent(database, "n2")
    explained = why.explain(context(database), "j2")
    assert explained["because"][0].startswith("node n2 has no worker since ")
    assert explained["because"][1].startswith("instance web1 is held")
    assert explained["command"] == "hostler worker --node n2"
    assert ids(ledger.succeed("j1", None).wakeups) == ["j2"]
    assert why.explain(context(database), "j1")["because"][0].startswith("it has ended as SUCCESS")
    # Whoever answers has a worker, however late its heartbeat is.
    assert "no worker" not in why.explain(context(database, "n2"), "j2")["because"][0]


@pytest.mark.parametrize(
    ("at", "first", "command"),
    [
        ("n2", "node n2 has no worker since", "hostler worker --node n2"),
        ("typo", "no worker of node typo was ever seen; check the name", "hostler cancel j9"),
        ("n1", "its message lies in queue node.n1, with 7 before it; the worker takes it", "hostler jobs -n n1"),
    ],
)
def test_why_explains_a_job_that_nobody_received(database: Database, at: str, first: str, command: str) -> None:
    for node in ("n1", "n2"):
        ledger_of(database, node)
    silent(database, "n2")
    explained = why.explain_unreceived(context(database), "j9", at, "instance.list", 7)
    assert explained["because"][0].startswith(first)
    assert f"queue node.{at}, with 7 before it" in explained["because"][-1]
    assert (explained["command"], explained["state"]) == (command, "PENDING")
    with database.reading() as session:
        assert set(session.scalars(select(Node.name))) == {"n1", "n2"}
