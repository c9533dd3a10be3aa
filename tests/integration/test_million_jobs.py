"""The ledger with a million ended jobs: what it really asks PostgreSQL, and how much of the table is read for it.

Every statement that reaches the database is explained at that very moment, in its own transaction, and undone: once as
it is planned for its values, once as a prepared statement is planned that is used often.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from types import SimpleNamespace
from typing import Any, NamedTuple

import psycopg
import pytest
from sqlalchemy import Connection, event, text

from hostler.payloads import JobListArguments
from migrations import schema
from models import Database, utc_now
from tests.services import postgresql_database
from tests.unit.worker.operations.ledgers import again, ledger_of
from worker.operations import incarnation, queries, why
from worker.operations.ledger import Ledger
from worker.operations.pruning import BATCH, Cutoffs, prune
from worker.operations.receipts import Receipt, Verdict

pytestmark = [pytest.mark.postgresql, pytest.mark.timeout(300)]

JOBS = 1_000_000
OPEN = 600
NODES = 3
BUSY, QUIET, IDLE = "n1", "quiet", "idle"
DAY_S = 86400
HOUR = timedelta(hours=1)
SILENT = {"code": "QMP_LOST", "message": "QEMU is silent", "details": {"retryable": True}}

FEW = 300
"""What one job's affairs may cost: the open jobs of its node, and a page of others."""
PLANNING = 50
"""What PostgreSQL adds, and more, before it prefers the plan for all values to one for the values given."""
BLOCKS_PER_ROW = 2
"""An index that is read from end to end, or all of a node's in it, has many more."""

# A job every two seconds: one in five only looks, one in a hundred failed, one in ten comes after another, and a worker
# lives for a thousand. The node `quiet` has the oldest quarter of all jobs and none since: averages are wrong for it.
LOAD = f"""
CREATE TEMP TABLE clock AS SELECT now() AT TIME ZONE 'utc' AS t;
ALTER TABLE job_parents SET UNLOGGED;
ALTER TABLE live_migrations SET UNLOGGED;
ALTER TABLE migration_samples SET UNLOGGED;
ALTER TABLE jobs SET UNLOGGED;
INSERT INTO nodes SELECT 'n' || g, t FROM generate_series(1, {NODES}) g, clock;
INSERT INTO nodes SELECT unnest(ARRAY['{QUIET}', '{IDLE}']), t FROM clock;
INSERT INTO incarnations (id, node, pid, start_ticks, boot_id, version, started_at, heartbeat_at, ended_at)
    SELECT 'w' || g, CASE WHEN g < -100 THEN '{IDLE}' ELSE 'n' || 1 + abs(g) % {NODES} END, 1, 1, 'b', '0', at, at, at
    FROM generate_series(-200, 1000) g, clock, LATERAL (SELECT t - (999 - g) * interval '2000 seconds' AS at) e;
INSERT INTO jobs (id, node, task, instance_name, arguments, state, phase, percent, message, phases, priority,
        waiting_for, attempts, claimed_by, slot, slot_taken, after_failure, retries, resumes, retry_of, error,
        received_at, started_at, updated_at, finished_at)
    SELECT 'job' || g, CASE WHEN g <= {JOBS // 4} THEN '{QUIET}' ELSE 'n' || 1 + g % {NODES} END,
        CASE WHEN looks THEN 'instance.info' ELSE 'instance.start' END, CASE WHEN NOT looks THEN 'web' || g % 1999 END,
        '{{}}', CASE g % 100 WHEN 1 THEN 'FAILURE' WHEN 2 THEN 'REVOKED' ELSE 'SUCCESS' END, 'record', 100, '', '[]', 0,
        '[]', 1, 'w' || g / 1000, CASE WHEN NOT looks THEN 'start' END, false, 'cancel', 0, 0,
        CASE WHEN g % 1000 = 7 THEN 'job' || g - 6 END,
        CASE WHEN g % 100 = 1 THEN '{{"details": {{"retryable": true}}}}'::jsonb END, at, at, at, at
    FROM generate_series(1, {JOBS}) g, clock,
        LATERAL (SELECT t - ({JOBS} - g) * interval '2 seconds' AS at, g % 5 = 0 AS looks) e;
INSERT INTO job_parents SELECT 'job' || g, 'job' || g - 10 FROM generate_series(11, {JOBS}, 10) g;
INSERT INTO jobs (id, node, task, instance_name, arguments, state, phase, percent, message, phases, priority, waits_on,
        waiting_for, attempts, claimed_by, slot, slot_taken, after_failure, retries, resumes, retry_at,
        received_at, updated_at)
    SELECT 'open' || g, 'n' || 1 + g % {NODES}, 'instance.start', 'web' || g, '{{}}', state, 'start', 0, '', '[]', 0,
        CASE WHEN state = 'WAITING' THEN (ARRAY['parents', 'instance', 'limit'])[1 + g / 15 % 3] END, '[]', 1,
        CASE WHEN state = 'STARTED' THEN 'w1000' END, 'start', state = 'STARTED', 'cancel', 0, 0,
        CASE WHEN state = 'RETRY' THEN t + interval '1 hour' END, t, t
    FROM generate_series(1, {OPEN}) g, clock,
        LATERAL (SELECT (ARRAY['WAITING', 'WAITING', 'STARTED', 'RETRY', 'PENDING'])[1 + g / 3 % 5]) e (state);
INSERT INTO job_parents SELECT id, 'job' || {JOBS} - sequence % 100 FROM jobs WHERE waits_on = 'parents';
INSERT INTO job_parents SELECT id, 'not received yet' FROM jobs WHERE waits_on = 'parents'
"""


AtMost = Callable[..., Any]


class Cost(NamedTuple):
    """What a statement read of ``jobs`` and ``job_parents``."""

    rows: int
    blocks: int
    scanned_whole: bool
    statement: str
    plan: str


class Watch:
    """Explains each statement of a database as it comes."""

    def __init__(self, database: Database) -> None:
        self.costs: list[Cost] = []
        event.listen(database.engine, "before_cursor_execute", self._explain)

    def _explain(
        self, connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
    ) -> None:
        given = parameters[0] if executemany else parameters
        names = [*dict.fromkeys(re.findall(r"%\((\w+)\)s", statement))]
        prepared = re.sub(r"%\((\w+)\)s", lambda match: f"${1 + names.index(match[1])}", statement)
        with psycopg.ClientCursor(connection.connection.driver_connection) as own:
            values = ", ".join(own.mogrify("%s", [given[name]]) for name in names)
            plans = []
            alone = own.connection.autocommit  # a query outside of a transaction gets one for this
            if alone:
                own.execute("BEGIN")
            for mode in ("force_custom_plan", "force_generic_plan"):
                own.execute("SAVEPOINT explaining")
                own.execute(f"SET LOCAL plan_cache_mode = {mode}")
                own.execute(f"PREPARE explained AS {prepared}".replace("%%", "%"))
                execute = f"EXECUTE explained ({values})" if values else "EXECUTE explained"
                own.execute(f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) {execute}")
                plans.append(own.fetchone()[0][0]["Plan"])  # type: ignore[index]  # EXPLAIN has a row
                own.execute("ROLLBACK TO SAVEPOINT explaining")
                own.execute("DEALLOCATE explained")
            if alone:
                own.execute("ROLLBACK")
        for plan in plans:
            if plan["Total Cost"] <= plans[0]["Total Cost"] + PLANNING:
                self._note(statement, plan)

    def _note(self, statement: str, plan: dict[str, Any]) -> None:
        nodes = [*walk(plan)]
        reads = [node for node in nodes if "Scan" in node["Node Type"]]
        rows = sum(
            (node["Actual Rows"] + node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0))
            * node["Actual Loops"]
            for node in reads
            if node.get("Relation Name") in (None, "jobs", "job_parents")
        )
        whole = any(
            node["Node Type"] == "Seq Scan" and node["Relation Name"] in ("jobs", "job_parents") for node in reads
        )
        blocks = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
        outline = [
            f"{node['Node Type']} {node.get('Index Name') or node.get('Relation Name') or ''}".strip() for node in nodes
        ]
        self.costs.append(Cost(rows, blocks, whole, " ".join(statement.split()), " < ".join(outline)))


def walk(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from walk(child)


@contextmanager
def foreign_keys_checked_at_the_end(connection: Connection) -> Iterator[None]:
    """Half of the time would go into checking them row by row."""
    query = """SELECT conrelid::regclass, conname, pg_get_constraintdef(oid) FROM pg_constraint
               WHERE contype = 'f' AND conrelid::regclass::text IN ('jobs', 'job_parents')"""
    keys = connection.execute(text(query)).all()
    for table, name, _ in keys:
        connection.execute(text(f"ALTER TABLE {table} DROP CONSTRAINT {name}"))
    yield
    for table, name, definition in keys:
        connection.execute(text(f"ALTER TABLE {table} ADD CONSTRAINT {name} {definition}"))


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    with postgresql_database() as url:
        made = Database(url)
        try:
            schema.upgrade(made)
            with made.engine.begin() as connection:
                connection.execute(text("SET LOCAL synchronous_commit = off"))
                with foreign_keys_checked_at_the_end(connection):
                    for statement in LOAD.split(";\n"):
                        connection.exec_driver_sql(statement.replace("%", "%%"))
                connection.execute(text("ANALYZE"))
            yield made
        finally:
            made.dispose()


@pytest.fixture(scope="module")
def watch(database: Database) -> Watch:
    return Watch(database)


@pytest.fixture
def at_most(watch: Watch) -> AtMost:
    """``with at_most(rows): ...``: each statement that is executed there may read so many."""

    @contextmanager
    def bounded(rows: int, blocks_per_row: int = BLOCKS_PER_ROW) -> Iterator[None]:
        watch.costs.clear()
        yield
        assert watch.costs
        for cost in watch.costs:
            assert not cost.scanned_whole, cost
            assert cost.rows <= rows, cost
            assert cost.blocks <= blocks_per_row * rows, cost

    return bounded


@pytest.fixture(scope="module")
def ledger(database: Database) -> Ledger:
    return Ledger(database, BUSY, ledger_of(database, BUSY)._incarnation, {"start": 60})


def start(job_id: str, instance: str, *after: str, **more: Any) -> Receipt:
    arguments = {"instance": {"name": instance}}
    return Receipt(job_id, "instance.start", arguments, instance, slot="start", after=after, **more)


def test_a_worker_that_begins_reads_what_is_open_and_no_more(
    ledger: Ledger, database: Database, at_most: AtMost
) -> None:
    with at_most(FEW):
        incarnation.beat(database, incarnation.enter(database, BUSY))
        assert ledger.unpublished()
        assert ledger.next_retry_at()
        assert len(ledger.take_over()) > 50


def test_a_job_from_its_receipt_to_its_end(ledger: Ledger, database: Database, at_most: AtMost) -> None:
    with at_most(FEW):
        assert ledger.receive(Receipt("look", "instance.list", {}, None)).verdict is Verdict.RUN
        assert ledger.receive(start("j1", "web5")).verdict is Verdict.RUN
        assert ledger.receive(start("j1", "web5")).verdict is Verdict.DROP
        assert ledger.receive(start("j2", "web5")).verdict is Verdict.WAIT
        assert ledger.receive(start("j3", "web6", "j1", "job3")).verdict is Verdict.WAIT
        assert ledger.receive(start("j4", "web7", "j3")).verdict is Verdict.WAIT
        ledger.advance("j1", "spawn", 50, "starting QEMU")
        assert ledger.knows("j1") and not ledger.knows("nobody")
        ended = ledger.succeed("j1", {})
        assert {wakeup.job_id for wakeup in ended.wakeups} >= {"j2", "j3"}
        for wakeup in ended.wakeups:
            if wakeup.job_id in ("j2", "j3"):
                ledger.receive(again(wakeup))
        ledger.fail("j2", SILENT)
        assert ledger.revoke("j3", "enough").revoked == ["j4"]
        ledger.succeed("look", [])


def test_a_class_that_is_full(ledger: Ledger, database: Database, at_most: AtMost) -> None:
    full = Ledger(database, BUSY, ledger._incarnation, {"start": 1})
    with at_most(FEW):
        assert full.receive(start("s1", "web1001")).verdict is Verdict.WAIT
        assert full.overdue().wakeups == []


def test_what_a_heartbeat_does(ledger: Ledger, at_most: AtMost) -> None:
    with at_most(FEW):
        ledger.due()
        ledger.overdue()
        assert ledger.forgotten(-HOUR)


def test_cancelling_and_trying_again(ledger: Ledger, at_most: AtMost) -> None:
    with at_most(FEW):
        ledger.receive(Receipt("c1", "instance.pause", {}, "web1500"))
        ledger.receive(Receipt("c2", "instance.pause", {}, "web1500"))
        for job_id in ("c1", "c2", "not received yet", "job17"):
            ledger.cancel(job_id, "enough")
        assert ledger.postpone("c1", SILENT)
        ledger.fail("c1", SILENT)
        ledger.retry("c1")
        assert len(ledger.retry_failed(utc_now() - HOUR, 5)) == 5


def test_looking_at_jobs(database: Database, at_most: AtMost) -> None:
    for node in (BUSY, QUIET):
        context: Any = SimpleNamespace(name=node, database=database)
        with at_most(FEW):
            assert len(queries.list_jobs(context, JobListArguments())) == 50
            assert len(queries.list_jobs(context, JobListArguments(queries=True))) == 50
            for state in ("FAILURE", "REVOKED", "SUCCESS"):
                assert len(queries.list_jobs(context, JobListArguments(states=[state]))) == 50
            queries.list_jobs(context, JobListArguments(states=["RETRY"]))
        with at_most(2 * JOBS // 1999):  # all that its ledger has of an instance
            assert len(queries.list_jobs(context, JobListArguments(instance="web77"))) > 40
            assert queries.list_jobs(context, JobListArguments(instance="web77", states=["FAILURE"]))
            assert queries.list_jobs(context, JobListArguments(instance="nobody")) == []
    context = SimpleNamespace(name=BUSY, database=database)
    with at_most(FEW):
        waiting = queries.list_jobs(context, JobListArguments(states=["WAITING"]))[0]["id"]
        assert queries.job_info(context, waiting)["id"] == waiting
        assert why.explain(context, waiting)["because"]


def test_pruning_reads_a_batch_at_a_time(database: Database, at_most: AtMost) -> None:
    cutoffs = Cutoffs.ago(7 * DAY_S, 90 * DAY_S)
    with at_most(3 * BATCH, blocks_per_row=4):  # for each job several look-ups
        assert sum(step.removed.total() for step in islice(prune(database, QUIET, cutoffs, dry_run=True), 9)) > BATCH
        assert not [step for step in prune(database, IDLE, cutoffs) if step.removed]  # and it forgets old workers
        steps = [*islice(prune(database, BUSY, cutoffs), 20)]
    assert sum(step.removed.total() for step in steps) > 5 * BATCH
