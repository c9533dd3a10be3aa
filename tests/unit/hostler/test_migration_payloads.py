"""The arguments of live migration: what is refused, by the name of the field, and what is taken."""

from __future__ import annotations

from typing import Any

import pytest

from hostler.contract import TaskName
from hostler.errors import InvalidArgument
from hostler.hvparams import HvParams
from hostler.migration import MigrateArguments, MigrateTuneArguments, MigrationInfoArguments
from hostler.payloads import ARGUMENTS, CHANGING_TASKS, EXCLUSIVE_TASKS, SLOTS, instance_of, parse

WEB1: dict[str, Any] = {"name": "web1", "target": "n2"}
NAN, INF = float("nan"), float("inf")


def wrong(task: TaskName, arguments: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(InvalidArgument) as refused:
        parse(ARGUMENTS[task], arguments)
    return {error["field"]: error["reason"] for error in refused.value.details["errors"]}


def test_without_options_a_guest_moves_live_as_its_own_parameters_say() -> None:
    parsed = parse(MigrateArguments, WEB1)
    assert parsed.live
    assert (parsed.bandwidth_mib_s, parsed.downtime_ms, parsed.downtime_max_ms, parsed.deadline_s) == (None,) * 4
    assert (parsed.on_deadline, parsed.postcopy, parsed.copy_storage, parsed.compression) == (
        *("abort", "never", "none", "none"),
    )
    assert (parsed.auto_converge, parsed.xbzrle, parsed.multifd_channels, parsed.tls) == (False, False, 0, None)
    assert (parsed.dry_run, parsed.sample_s) == (False, 1)


LIMITS: list[tuple[str, Any]] = [
    *(("bandwidth_mib_s", value) for value in (-1, "5", True, NAN, INF, 2**20 + 1)),
    *(("downtime_ms", value) for value in (0, -1, 60_001, 1.5, "5", True)),
    *(("downtime_max_ms", value) for value in (0, 60_001, "5")),
    *(("deadline_s", value) for value in (0, -1, 86_401, NAN, INF, "5", True)),
    *(("on_deadline", value) for value in ("", "kill", 5)),
]
OPTIONS: list[tuple[str, Any]] = [
    *LIMITS,
    *(("target", value) for value in ("", "n 2", "n/2", "n" * 64, "n2\n", None, 5)),
    *(("live", value) for value in ("yes", 1, None)),
    *((name, value) for name in ("auto_converge", "xbzrle") for value in ("yes", 1, None)),
    *(("compression", value) for value in ("", "gzip", None, True)),
    *(("multifd_channels", value) for value in (1, -1, 17, 2.0, "4", True, None)),
    *(("postcopy", value) for value in ("", "always", None, True)),
    *(("copy_storage", value) for value in ("", "all", None, True)),
    *(("tls", value) for value in ("yes", 1)),
    ("limit", 5),
]


@pytest.mark.parametrize(("field", "value"), OPTIONS)
def test_a_wrong_option_of_a_migration_is_named(field: str, value: Any) -> None:
    for task in (TaskName.INSTANCE_MIGRATE, TaskName.MIGRATION_INFO):
        assert set(wrong(task, WEB1 | {field: value})) == {field}


@pytest.mark.parametrize(("field", "value"), LIMITS)
def test_a_wrong_change_of_a_migration_is_named(field: str, value: Any) -> None:
    assert set(wrong(TaskName.INSTANCE_MIGRATE_TUNE, {"name": "web1", field: value})) == {field}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"downtime_ms": 500, "downtime_max_ms": 499}, "downtime_max_ms"),
        ({"compression": "zstd"}, "compression"),
        ({"xbzrle": True, "multifd_channels": 2}, "xbzrle"),
    ],
)
def test_options_that_do_not_go_together_are_named(options: dict[str, Any], field: str) -> None:
    assert set(wrong(TaskName.INSTANCE_MIGRATE, WEB1 | options)) == {field}


@pytest.mark.parametrize(
    "options",
    [
        {"bandwidth_mib_s": 0},
        {"bandwidth_mib_s": 0.5, "downtime_ms": 1, "downtime_max_ms": 60_000, "deadline_s": 86_400},
        {"downtime_ms": 500, "downtime_max_ms": 500},
        *({"multifd_channels": channels, "compression": "zlib"} for channels in (2, 16)),
        {"live": False, "tls": False},
        {"dry_run": True, "sample_s": 60},
    ],
)
def test_the_ends_of_what_is_allowed_are_allowed(options: dict[str, Any]) -> None:
    parsed = parse(MigrateArguments, WEB1 | options)
    assert {name: getattr(parsed, name) for name in options} == options


@pytest.mark.parametrize("value", [0, -1, 61, NAN, INF, "1", None])
def test_a_dry_run_samples_for_a_minute_at_most(value: Any) -> None:
    assert set(wrong(TaskName.INSTANCE_MIGRATE, WEB1 | {"sample_s": value})) == {"sample_s"}
    assert set(wrong(TaskName.MIGRATION_INFO, WEB1 | {"sample_s": 1})) == {"sample_s"}


def test_what_was_given_to_the_first_step_is_what_a_whole_migration_can_be_given() -> None:
    given = parse(MigrationInfoArguments, WEB1 | {"downtime_ms": 7, "postcopy": "if-needed"})
    assert MigrateArguments.model_validate(given.model_dump()).downtime_ms == 7
    assert MigrateArguments.model_validate(given.model_dump(mode="json")).postcopy == "if-needed"


def test_to_change_nothing_is_an_error_and_so_is_to_pause_what_goes_by_postcopy() -> None:
    for nothing in ({}, {"postcopy_now": False}, {"downtime_ms": None, "force_now": False}):
        reasons = wrong(TaskName.INSTANCE_MIGRATE_TUNE, {"name": "web1"} | nothing)
        assert "bandwidth_mib_s, downtime_ms" in reasons["arguments"] and "after" not in reasons["arguments"]
    both = {"name": "web1", "postcopy_now": True, "force_now": True}
    assert set(wrong(TaskName.INSTANCE_MIGRATE_TUNE, both)) == {"force_now"}
    less = {"name": "web1", "downtime_ms": 5, "downtime_max_ms": 4}
    assert set(wrong(TaskName.INSTANCE_MIGRATE_TUNE, less)) == {"downtime_max_ms"}


def test_only_what_is_given_is_changed_and_no_limit_is_a_change() -> None:
    parsed = parse(MigrateTuneArguments, {"name": "web1", "bandwidth_mib_s": 0, "force_now": True})
    assert parsed.changes() == {"bandwidth_mib_s": 0, "force_now": True}


@pytest.mark.parametrize("passed", [None, "j1", [], {}, {"migration_id": None}, {"migration_id": 5}, {"id": "j1"}])
def test_a_step_needs_what_the_one_before_returned(passed: Any) -> None:
    assert set(wrong(TaskName.MIGRATION_ACCEPT, {"info": passed})) == {"info"}
    assert set(wrong(TaskName.MIGRATION_RUN, {"name": "web1", "accepted": passed})) == {"accepted"}


def test_what_a_step_returned_is_passed_on_whatever_is_in_it() -> None:
    info = {"migration_id": "j1", "disks": [{"size": 5, "of": None}], "instance": {"name": "web1", "x": 1.5}}
    parsed: Any = parse(ARGUMENTS[TaskName.MIGRATION_ACCEPT], {"info": info})
    assert parsed.info == info


def test_a_migration_holds_its_instance_and_a_place_among_those_that_leave_the_node() -> None:
    for task in (TaskName.INSTANCE_MIGRATE, TaskName.MIGRATION_RUN):
        assert task in EXCLUSIVE_TASKS and SLOTS[task] == "migration"
    for task in (TaskName.INSTANCE_MIGRATE_CANCEL, TaskName.INSTANCE_MIGRATE_TUNE, TaskName.MIGRATION_REPORT):
        assert task not in EXCLUSIVE_TASKS and task not in SLOTS  # else they would wait for its end
    assert TaskName.MIGRATION_REPORT not in CHANGING_TASKS
    assert instance_of(WEB1) == "web1"
    assert instance_of({"info": {"migration_id": "j1"}}) is None


@pytest.mark.parametrize("caps", ["", "auto-converge", "zero-blocks:auto-converge", "x-ignore-shared:xbzrle"])
def test_capabilities_are_qemus_own_names_between_colons(caps: str) -> None:
    assert parse(HvParams, {"migration_caps": caps}).migration_caps == caps
