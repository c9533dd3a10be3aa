"""Whether a guest is started again: the rules as tables, and their traces in the database."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from hostler.contract import InstanceState
from hostler.errors import InvalidArgument
from hostler.payloads import Instance as Payload
from hostler.payloads import RestartArguments, StartArguments, parse
from hostler.settings import Settings
from models import Database, Instance, Runtime, utc_now
from tests.unit.worker.operations.ledgers import RUN, again, ledger_of, locks, row
from worker.kvm.process import boot_id
from worker.operations import wanted, wanted_rows
from worker.operations.context import NodeContext
from worker.operations.ending import Ending
from worker.operations.ledger import Ledger
from worker.operations.receipts import Receipt, Wakeup
from worker.operations.wanted import GOOD_RUN, RUNNING, STOPPED, End, Intent, Policy

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
STATE = InstanceState
CRASHED = End(STATE.CRASHED, STATE.RUNNING, timedelta(seconds=30))
SHUT_DOWN = End(STATE.STOPPED, STATE.RUNNING, timedelta(seconds=30))
HOST_LOST = End(STATE.CRASHED, STATE.RUNNING, timedelta(days=1), same_boot=False)
POLICIES = ("never", "on-crash", "always")


def in_s(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


# The rules


@pytest.mark.parametrize(
    ("end", "outcomes"),
    [
        (CRASHED, ((RUNNING, None), (RUNNING, in_s(5)), (RUNNING, in_s(5)))),
        (SHUT_DOWN, ((STOPPED, None), (STOPPED, None), (RUNNING, in_s(5)))),
        (HOST_LOST, ((RUNNING, None), (RUNNING, None), (RUNNING, None))),
    ],
    ids=["crashed", "shut down from inside", "host lost"],
)
def test_what_becomes_of_a_guest_that_ended(end: End, outcomes: tuple[tuple[str, datetime | None], ...]) -> None:
    for policy, outcome in zip(POLICIES, outcomes, strict=True):
        intent = wanted.after_end(Policy(restart_policy=policy), Intent(RUNNING), end, NOW)
        assert (intent.wanted, intent.restart_at) == outcome, policy
        assert (intent.restarts, intent.note) == (0, "")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("end", [CRASHED, SHUT_DOWN, HOST_LOST])
def test_what_is_wanted_stopped_stays_so_however_it_ends(policy: str, end: End) -> None:
    assert wanted.after_end(Policy(restart_policy=policy), Intent(STOPPED), end, NOW) == Intent(STOPPED)


@pytest.mark.parametrize("before", [STATE.STARTING, STATE.STOPPING, STATE.INCOMING, STATE.MIGRATING])
@pytest.mark.parametrize("state", [STATE.CRASHED, STATE.STOPPED])
def test_an_end_during_an_operation_is_the_operations_own(before: STATE, state: STATE) -> None:
    end = End(state, before, timedelta(days=1))
    assert wanted.after_end(Policy(restart_policy="always"), Intent(RUNNING, 3), end, NOW) == Intent(RUNNING, 3)


@pytest.mark.parametrize("before", [STATE.PAUSED, STATE.UNKNOWN, STATE.RUNNING])
def test_a_guest_that_ends_in_any_other_state_is_started_again(before: STATE) -> None:
    end = End(STATE.CRASHED, before, timedelta())
    assert wanted.after_end(Policy(restart_policy="on-crash"), Intent(RUNNING), end, NOW).restart_at == in_s(5)


@pytest.mark.parametrize(
    ("delay_s", "delays_s"),
    [
        (5, (5, 10, 20, 40, 80, 160, 300, 300)),
        (0, (0, 0, 0)),
        (200, (200, 300, 300)),
        (3600, (3600, 3600)),
        (0.1, (0.1, 0.2)),
    ],
)
def test_the_delay_doubles_up_to_five_minutes(delay_s: float, delays_s: tuple[float, ...]) -> None:
    policy = Policy(restart_policy="on-crash", restart_max=100, restart_delay_s=delay_s)
    for restarts, expected_s in enumerate(delays_s):
        intent = wanted.after_end(policy, Intent(RUNNING, restarts), CRASHED, NOW)
        assert (intent.restart_at, intent.restarts) == (in_s(expected_s), restarts)
    wanted.after_end(policy, Intent(RUNNING, 99), CRASHED, NOW)  # no overflow


def test_restarts_in_a_row_are_bounded_and_a_good_run_ends_the_row() -> None:
    policy = Policy(restart_policy="on-crash", restart_max=2)
    given_up = wanted.after_end(policy, Intent(RUNNING, 2), CRASHED, NOW)
    assert (given_up.wanted, given_up.restarts, given_up.restart_at) == (RUNNING, 2, None)
    assert given_up.note == "restarted 2 time(s) in a row, and not again by itself: find out why, then start it"
    for ran, counted in ((GOOD_RUN - timedelta(seconds=1), given_up), (GOOD_RUN, Intent(RUNNING, 0, in_s(5)))):
        assert wanted.after_end(policy, Intent(RUNNING, 2), End(STATE.CRASHED, STATE.RUNNING, ran), NOW) == counted


@pytest.mark.parametrize(
    ("policy", "restarts", "restart_at"),
    [("never", 0, None), ("on-crash", 1, in_s(10)), ("always", 2, in_s(20)), ("on-crash", 5, None)],
)
def test_a_restart_that_fails_counts_as_a_crash(policy: str, restarts: int, restart_at: datetime | None) -> None:
    intent = wanted.after_failure(Policy(restart_policy=policy), Intent(RUNNING, restarts), NOW)
    assert (intent.wanted, intent.restarts, intent.restart_at) == (RUNNING, restarts, restart_at)


@pytest.mark.parametrize(
    ("autostart", "before", "after"),
    [
        (True, Intent(RUNNING, 4, in_s(60)), Intent(RUNNING, 0, NOW)),
        (True, Intent(STOPPED), Intent(STOPPED)),
        (False, Intent(RUNNING, 4, in_s(60)), Intent(RUNNING, 4)),
        (False, Intent(STOPPED), Intent(STOPPED)),
    ],
)
def test_after_a_boot_autostart_alone_decides(autostart: bool, before: Intent, after: Intent) -> None:
    for policy in POLICIES:
        assert wanted.after_boot(Policy(autostart=autostart, restart_policy=policy), before, NOW) == after


@pytest.mark.parametrize(
    ("cause", "is_wanted", "state", "same_boot", "reason"),
    [
        ("crash", RUNNING, "crashed", True, ""),
        ("shutdown", RUNNING, "stopped", True, ""),
        ("boot", RUNNING, "crashed", True, ""),
        ("operator", STOPPED, "stopped", False, ""),
        ("operator", RUNNING, "crashed", True, ""),
        ("crash", STOPPED, "crashed", True, "wanted stopped"),
        ("boot", STOPPED, "stopped", True, "wanted stopped"),
        ("crash", RUNNING, "running", True, "it is running"),
        ("operator", STOPPED, "paused", True, "it is paused"),
        ("crash", RUNNING, "unknown", True, "it is unknown"),
        ("crash", RUNNING, "crashed", False, "no autostart"),
    ],
)
def test_a_restart_is_carried_out_only_where_it_is_still_wanted(
    cause: str, is_wanted: str, state: str, same_boot: bool, reason: str
) -> None:
    why = wanted.why_not(Policy(), cause, is_wanted, state, same_boot=same_boot)
    assert bool(why) == bool(reason)
    assert reason in why
    if not same_boot:
        assert wanted.why_not(Policy(autostart=True), cause, is_wanted, state, same_boot=same_boot) == ""


def test_a_policy_is_read_from_a_saved_spec_also_from_one_that_says_nothing() -> None:
    said = {"autostart": True, "restart_policy": "always", "restart_max": 7, "restart_delay_s": 0.5}
    spec = Payload.model_validate({"name": "web1", "memory_mib": 16} | said).model_dump(mode="json")
    assert Policy.of(spec) == Policy(**said)  # type: ignore[arg-type]
    unsaid = Payload.model_validate({"name": "web1", "memory_mib": 16}).model_dump(mode="json")
    assert Policy.of(unsaid) == Policy.of({}) == Policy()


# Their traces


class Bench:
    """A node's database with one instance, ``web1``, that ran until just now."""

    def __init__(self, database: Database, **spec: Any) -> None:
        self.database = database
        ledger = ledger_of(database)
        self.woken_at: list[datetime | None] = []
        self.node = NodeContext(Settings(node="n1"), database, "unused", None)  # type: ignore[arg-type]
        self.node.ledger, self.node.wake_at = ledger, self.woken_at.append
        self.add("web1", **spec)

    @property
    def ledger(self) -> Ledger:
        return self.node.ledger

    def add(self, name: str, **spec: Any) -> None:
        columns = {"state": "running", "wanted": RUNNING, "boot_id": boot_id()}
        columns |= {
            key: spec.pop(key) for key in ("state", "wanted", "boot_id", "restart_at", "restarts") if key in spec
        }
        with self.database.transaction() as session:
            session.add(Instance(name=name, node="n1", spec={"name": name} | spec, **columns))

    def row(self, name: str = "web1") -> Instance:
        with self.database.reading() as session:
            return session.get_one(Instance, name)

    def due(self, name: str = "web1", ago_s: float = 1) -> list[Wakeup]:
        """The jobs made once the restart of ``name`` is due."""
        with self.database.transaction() as session:
            session.get_one(Instance, name).restart_at = utc_now() - timedelta(seconds=ago_s)
        return wanted_rows.due(self.node)

    def end(self, state: InstanceState = STATE.CRASHED, *, ran_s: float = 30, boot: str = "") -> str:
        """Record the end of a QEMU of ``web1``; the reason recorded."""
        with self.database.transaction() as session:
            instance = session.get_one(Instance, "web1")
            started_at = utc_now() - timedelta(seconds=ran_s)
            instance.runtime = Runtime(
                node="n1", uuid="u", boot_id=boot or boot_id(), executable="", accelerator="tcg", run_dir="",
                hardware={}, taps=[], started_at=started_at,
            )  # fmt: skip
            reason = wanted_rows.note_end(instance, Ending(state, "it fell over", "killed"))
            instance.runtime, instance.state, instance.reason = None, state, reason
            return reason


def test_a_restart_that_is_due_becomes_one_job_in_the_transaction_that_clears_it(database: Database) -> None:
    bench = Bench(database, restart_policy="on-crash")
    assert bench.end() == "it fell over"
    restart_at = bench.row().restart_at
    assert restart_at and wanted_rows.next_at(bench.node) == restart_at
    assert timedelta() < restart_at - utc_now() <= timedelta(seconds=5)
    assert wanted_rows.due(bench.node) == []
    (wakeup,) = bench.due()
    assert (wakeup.task, wakeup.node, wakeup.priority) == ("instance.restart", "n1", 0)
    assert wakeup.arguments == {"name": "web1", "cause": "crash"}
    job = row(database, wakeup.job_id)
    assert (job.state, job.instance_name, job.slot) == ("PENDING", "web1", "start")
    instance = bench.row()
    assert (instance.wanted, instance.restarts, instance.restart_at) == (RUNNING, 1, None)
    assert (wanted_rows.due(bench.node), wanted_rows.next_at(bench.node)) == ([], None)
    assert bench.ledger.receive(Receipt(wakeup.job_id, wakeup.task, wakeup.arguments, "web1", slot="start")) == RUN
    assert locks(database) == {"web1": wakeup.job_id}


def test_a_job_whose_waker_died_is_found_by_the_next_worker(database: Database) -> None:
    bench = Bench(database, restart_policy="on-crash")
    bench.end()
    (wakeup,) = bench.due()
    (found,) = ledger_of(database).take_over()
    assert (found, bench.ledger.receive(again(found))) == (wakeup, RUN)


def test_a_worker_that_dies_before_the_job_is_written_down_leaves_the_restart_due(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(database, restart_policy="on-crash")
    bench.end()
    with monkeypatch.context() as dying:
        dying.setattr("worker.operations.ledger.wakeup", lambda job: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bench.due()
    assert (bench.row().restarts, bench.row().restart_at is None, locks(database)) == (0, False, {})
    assert len(wanted_rows.due(bench.node)) == 1
    assert len(ledger_of(database).take_over()) == 1


def test_another_nodes_instance_is_not_touched(database: Database) -> None:
    bench = Bench(database, restart_policy="on-crash", autostart=True, boot_id="before")
    other = NodeContext(Settings(node="n2"), database, "unused", None)  # type: ignore[arg-type]
    other.ledger = ledger_of(database, "n2")
    bench.due()
    bench.add("web2", boot_id="before", autostart=True, restart_at=utc_now())
    wanted_rows.note_boot(other)
    wanted_rows.want_stopped(other, "web2")
    with pytest.raises(RuntimeError), wanted_rows.stopping(other, "web2"):
        raise RuntimeError
    assert (wanted_rows.next_at(other), wanted_rows.due(other)) == (None, [])
    assert (bench.row("web2").wanted, bench.row("web2").restart_at is None) == (RUNNING, False)


def test_restarts_in_a_row_are_counted_until_no_more_are_made(database: Database) -> None:
    bench = Bench(database, restart_policy="always", restart_max=2)
    for restarts in (1, 2):
        bench.end(STATE.STOPPED)
        (wakeup,) = bench.due()
        assert (bench.row().restarts, wakeup.arguments["cause"]) == (restarts, "shutdown")
    assert bench.end().startswith("it fell over; restarted 2 time(s) in a row")
    assert (bench.row().restarts, bench.row().restart_at, bench.row().wanted) == (2, None, RUNNING)


def test_whoever_starts_it_and_a_good_run_begin_the_count_anew(database: Database) -> None:
    bench = Bench(database, restart_policy="on-crash", restarts=5)
    bench.end(ran_s=GOOD_RUN.total_seconds() + 1)
    assert (bench.row().restarts, bench.row().restart_at is None) == (0, False)
    with database.transaction() as session:
        wanted_rows.note_running(session.get_one(Instance, "web1"), 0)
    assert (bench.row().restarts, bench.row().restart_at, bench.row().wanted) == (0, None, RUNNING)


def test_a_stop_calls_a_restart_off(database: Database) -> None:
    bench = Bench(database, restart_policy="always")
    bench.end()
    wanted_rows.want_stopped(bench.node, "web1")
    assert (bench.row().wanted, bench.row().restart_at) == (STOPPED, None)
    assert (wanted_rows.next_at(bench.node), wanted_rows.due(bench.node)) == (None, [])
    wanted_rows.want_stopped(bench.node, "nobody")


@pytest.mark.parametrize(
    ("state", "has_runtime", "expected"),
    [("running", True, RUNNING), ("unknown", True, RUNNING), ("stopping", True, STOPPED), ("stopped", False, STOPPED)],
)
def test_a_stop_that_fails_leaves_a_guest_that_runs_on_wanted_running(
    database: Database, state: str, has_runtime: bool, expected: str
) -> None:
    bench = Bench(database)
    with pytest.raises(RuntimeError), wanted_rows.stopping(bench.node, "web1"):
        assert bench.row().wanted == STOPPED
        with database.transaction() as session:
            instance = session.get_one(Instance, "web1")
            instance.state = state
            if has_runtime:
                instance.runtime = Runtime(node="n1", uuid="u", boot_id="b", executable="", accelerator="tcg",
                                           run_dir="", hardware={}, taps=[])  # fmt: skip
        raise RuntimeError
    assert bench.row().wanted == expected


def test_a_failed_restart_is_put_down_and_tried_again_until_no_more(database: Database) -> None:
    bench = Bench(database, restart_policy="on-crash", restart_max=2, state="crashed", restarts=1)
    wanted_rows.note_failure(bench.node, "web1", "its disk is gone")
    assert bench.row().reason == "it could not be started again: its disk is gone"
    assert bench.woken_at == [bench.row().restart_at] != [None]
    bench.due()
    wanted_rows.note_failure(bench.node, "web1", "its disk is gone")
    assert str(bench.row().reason).endswith("its disk is gone; restarted 2 time(s) in a row, and not again by itself: "
                                            "find out why, then start it")  # fmt: skip
    assert (bench.row().restart_at, bench.woken_at[1:]) == (None, [None])


def test_after_a_boot_what_has_autostart_and_was_wanted_running_is_started_in_order_of_names(
    database: Database,
) -> None:
    bench = Bench(database, autostart=True, boot_id="before", state="crashed", restarts=5)
    bench.add("db1", autostart=True, boot_id="before", state="stopped")
    bench.add("no-autostart", boot_id="before", state="crashed", restart_at=utc_now())
    bench.add("stopped", autostart=True, boot_id="before", state="stopped", wanted=STOPPED)
    bench.add("this-boot", autostart=True, state="crashed")
    for _ in range(2):  # a worker that is killed before they are jobs looks again
        wanted_rows.note_boot(bench.node)
    wakeups = wanted_rows.due(bench.node)
    assert [wakeup.arguments for wakeup in wakeups] == [
        {"name": "db1", "cause": "boot"}, {"name": "web1", "cause": "boot"}
    ]  # fmt: skip
    assert (bench.row().restarts, bench.row().boot_id) == (1, boot_id())
    wanted_rows.note_boot(bench.node)
    assert wanted_rows.due(bench.node) == []


def test_a_guest_lost_with_its_host_waits_for_the_decision_after_the_boot(database: Database) -> None:
    bench = Bench(database, autostart=True, restart_policy="on-crash", boot_id="before")
    bench.end(boot="before")
    assert (bench.row().wanted, bench.row().restart_at) == (RUNNING, None)
    wanted_rows.note_boot(bench.node)
    assert [wakeup.arguments["cause"] for wakeup in wanted_rows.due(bench.node)] == ["boot"]


# What may be said


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ("autostart", 1), ("restart_policy", "sometimes"), ("restart_max", 0), ("restart_max", 101),
        ("restart_max", 1.5), ("restart_delay_s", -1), ("restart_delay_s", 3601), ("restart_delay_s", float("nan")),
    ],
)  # fmt: skip
def test_a_policy_that_means_nothing_is_refused(said: str, value: Any) -> None:
    with pytest.raises(InvalidArgument) as refused:
        parse(StartArguments, {"instance": {"name": "web1", "memory_mib": 16, said: value}})
    assert [error["field"] for error in refused.value.details["errors"]] == [f"instance.{said}"]


@pytest.mark.parametrize(("delay_s", "most"), [(0, 1), (3600, 100)])
def test_the_bounds_of_a_policy_are_within_it(delay_s: float, most: int) -> None:
    spec = {"name": "web1", "memory_mib": 16, "restart_delay_s": delay_s, "restart_max": most}
    assert parse(StartArguments, {"instance": spec}).instance.restart_max == most


def test_a_restart_has_a_cause_that_is_known() -> None:
    assert parse(RestartArguments, {"name": "web1"}).cause == "operator"
    with pytest.raises(InvalidArgument):
        parse(RestartArguments, {"name": "web1", "cause": "boredom"})
