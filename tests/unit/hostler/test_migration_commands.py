"""``hostler migrate`` and its siblings without a node: what is sent, and what people are shown."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import click
import matplotlib
import pytest
from click.testing import CliRunner
from rich.console import Console

from hostler import Client, JobRequest, OperationFailed, settings
from hostler.cli import migration, migration_plot, migration_report, progress, run
from hostler.cli.advice import advise
from hostler.cli.amounts import duration, rate, size, sparkline
from hostler.cli.exits import Exit
from hostler.cli.migration_display import MigrationDisplay
from hostler.cli.options import JobOptions
from hostler.contract import TaskName
from hostler.settings import Settings

GIB = 2**30
META: dict[str, Any] = {
    "status": "active",
    **{"total_bytes": 2 * GIB, "transferred_bytes": GIB, "remaining_bytes": GIB, "pass": 3, "percent": 45.5},
    **{"throughput_bytes_s": 300 * 2**20, "dirty_rate_bytes_s": 40 * 2**20, "expected_downtime_ms": 210},
    **{"eta_s": 3.4, "eta_confidence": 0.8, "verdict": None, "storage": None},
}
REPORT: dict[str, Any] = {
    **{"name": "web1", "source": "n1", "target": "n2", "kind": "live", "state": "running", "node": "n2"},
    **{"setup_ms": 12, "total_ms": 4210, "qemu_total_ms": 3500, "downtime_ms": 110, "downtime_seen_ms": 120.4},
    **{"downtime_limit_ms": 300, "transferred_bytes": 3 * GIB, "total_bytes": 2 * GIB, "passes": 3},
    **{"throughput_bytes_s": 500 * 2**20, "postcopy": False, "tls": True, "prediction": None, "samples": 2},
    "decisions": [{"at": "2030-01-01T12:00:01+00:00", "what": "raise-downtime", "why": "it needs 300 ms"}],
}
SAMPLES = [
    {"at": f"2030-01-01T12:00:{second:02}+00:00", **META, "remaining_bytes": (5 - second) * GIB} for second in range(5)
]
STORED: dict[str, Any] = {
    **{"job": "j1", "name": "web1", "source": "n1", "target": "n2", "stage": "done"},
    **{"report": REPORT, "samples": SAMPLES},
}


@pytest.fixture(autouse=True)
def _unreachable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No broker anywhere: exit status 3 would mean that something was sent."""
    monkeypatch.setenv("HOSTLER_BROKER_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("HOSTLER_NODE", "n1")
    settings.load.cache_clear()
    yield
    settings.load.cache_clear()


# What is sent


def sent_by(monkeypatch: pytest.MonkeyPatch, *arguments: str, answer: Any = None) -> JobRequest:
    """The job a command would send; ``answer`` is its result."""
    sent: list[JobRequest] = []

    def instead(build: Any, options: JobOptions, show: Any) -> Any:
        with Client(settings=Settings(broker_url="redis://127.0.0.1:1/0", node="n1")) as client:
            sent.append(build(client))
        if answer is not None:
            show(answer)
        return answer

    monkeypatch.setattr(migration, "send_and_show", instead)
    command = getattr(migration, f"{arguments[0].replace('-', '_')}_command")
    done = CliRunner().invoke(command, arguments[1:], catch_exceptions=False, standalone_mode=False)
    assert done.exception is None
    (request,) = sent
    return request


def test_a_plain_migration_sends_the_guest_and_where_to_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    request = sent_by(monkeypatch, "migrate", "web1", "--to", "n2")
    assert request == JobRequest(TaskName.INSTANCE_MIGRATE, "n1", {"name": "web1", "target": "n2"}, None)


EVERY_OPTION = {
    "--bandwidth-mib-s": ("200", "bandwidth_mib_s", 200.0),
    "--downtime-ms": ("50", "downtime_ms", 50),
    "--downtime-max-ms": ("500", "downtime_max_ms", 500),
    "--deadline-s": ("90", "deadline_s", 90.0),
    "--on-deadline": ("force", "on_deadline", "force"),
    "--postcopy": ("if-needed", "postcopy", "if-needed"),
    "--copy-storage": ("top", "copy_storage", "top"),
}


def test_each_option_is_the_argument_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [word for option, (value, _, _) in EVERY_OPTION.items() for word in (option, value)]
    flags = ["--non-live", "--auto-converge", "--no-tls", "--dry-run", "-n", "n3", "--job-id", "mine"]
    request = sent_by(monkeypatch, "migrate", "web1", "--to", "n2", *words, *flags)
    assert (request.node, request.job_id) == ("n3", "mine")
    assert request.arguments == {
        **{"name": "web1", "target": "n2", "live": False, "auto_converge": True, "tls": False, "dry_run": True},
        **{name: value for _, name, value in EVERY_OPTION.values()},
    }
    assert sent_by(monkeypatch, "migrate", "web1", "--to", "n2", "--xbzrle", "--tls").arguments == {
        **{"name": "web1", "target": "n2", "xbzrle": True, "tls": True}
    }
    channels = ["--multifd-channels", "4", "--compression", "zstd"]
    assert sent_by(monkeypatch, "migrate", "web1", "--to", "n2", *channels).arguments == {
        **{"name": "web1", "target": "n2", "multifd_channels": 4, "compression": "zstd"}
    }


def test_tune_sends_what_is_given_and_a_limit_of_nothing_is_something(monkeypatch: pytest.MonkeyPatch) -> None:
    request = sent_by(monkeypatch, "migrate-tune", "web1", "--bandwidth-mib-s", "0", "--force-now")
    assert request.arguments == {"name": "web1", "bandwidth_mib_s": 0.0, "force_now": True}


@pytest.mark.parametrize(("outcome", "status"), [("requested", 0), ("revoked", 0), ("too_late", 1), ("finished", 1)])
def test_a_cancel_that_changes_nothing_fails(outcome: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migration, "send_and_show", lambda *_: {"outcome": outcome, "message": "so"})
    assert CliRunner().invoke(migration.migrate_cancel_command, ["web1"]).exit_code == status


@pytest.mark.parametrize(
    "arguments",
    [
        ["migrate", "web1"],
        ["migrate", "--to", "n2"],
        ["migrate", "web1", "--to", "n 2"],
        ["migrate", "../web1", "--to", "n2"],
        ["migrate", "web1", "--to", "n2", "--downtime-ms", "0"],
        ["migrate", "web1", "--to", "n2", "--downtime-ms", "soon"],
        ["migrate", "web1", "--to", "n2", "--downtime-ms", "9", "--downtime-max-ms", "8"],
        ["migrate", "web1", "--to", "n2", "--bandwidth-mib-s", "nan"],
        ["migrate", "web1", "--to", "n2", "--on-deadline", "kill"],
        ["migrate", "web1", "--to", "n2", "--multifd-channels", "1"],
        ["migrate", "web1", "--to", "n2", "--compression", "zlib"],
        ["migrate", "web1", "--to", "n2", "-n", "no such/node"],
        ["migrate-cancel"],
        ["migrate-cancel", "a b"],
        ["migrate-tune", "web1"],
        ["migrate-tune", "web1", "--postcopy-now", "--force-now"],
        ["migration-report"],
        ["migration-report", "two words"],
        ["migration-report", "j1", "--plot", "web1.doc"],
        ["migration-report", "j1", "--plot", "/no/such/folder/web1.png"],
    ],
)
def test_wrong_usage_exits_with_2_and_nothing_is_sent(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == Exit.USAGE
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["migrate", "web1", "--to", "n2"],
        ["migrate-cancel", "web1"],
        ["migrate-tune", "web1", "--postcopy-now"],
        ["migration-report", "j1", "--plot", "web1.svg"],
    ],
)
def test_what_is_right_is_sent(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == Exit.UNREACHABLE
    assert "does not answer" in capsys.readouterr().err


def test_after_a_failed_migration_the_next_step_is_its_report(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = OperationFailed("MIGRATION_FAILED", "the deadline has passed", {"migration_id": "m1"})
    advise(failed, "j1", "n1", "web1")
    assert "How it went: hostler migration-report m1 -n n1" in failed.__notes__


def test_what_failed_without_being_a_migration_has_no_report() -> None:
    failed = OperationFailed("MIGRATION_FAILED", "2 of 3 guests did not leave", {"verdicts": []})
    advise(failed, "drain1", "n1")
    assert failed.__notes__ == ["Its history: hostler job drain1 --history -n n1"]


# What people are shown


def test_a_report_says_what_happened_and_compares_asked_with_measured(capsys: pytest.CaptureFixture[str]) -> None:
    migration_report.show_result(REPORT)
    head, *rows = capsys.readouterr().out.splitlines()
    assert head == "web1 moved while it ran, from node n1 to node n2; it is running on node n2"
    assert [line.split(maxsplit=1) for line in rows[:1]] == [
        ["time", "4.2 s in all, QEMU's own 3.5 s, to prepare it 12 ms"]
    ]
    assert rows[1].split("still")[1].strip() == (
        "120 ms as both nodes saw it, 110 ms as QEMU says, asked for: at most 300 ms"
    )
    assert rows[2].split(maxsplit=1)[1] == "3.0 GiB sent of 2.0 GiB, 3 passes, 500 MiB/s"
    assert rows[-2:] == ["decided on the way:", "  12:00:01Z  raise-downtime: it needs 300 ms"]


def test_a_report_compares_with_what_was_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    prediction = {"total_s": 2.8, "downtime_ms": 200, "dirty_rate_bytes_s": 5, "converges": True}
    migration_report.show_result(REPORT | {"prediction": prediction})
    shown = capsys.readouterr().out
    assert "2.8 s; it took 3.5 s (+25 %)" in shown
    assert "200 ms; it was 120 ms" in shown


@pytest.mark.parametrize("missing", sorted(REPORT.keys() - {"kind", "decisions"}))
def test_a_report_without_one_of_its_numbers_is_shown_all_the_same(
    missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    migration_report.show_result({name: value for name, value in REPORT.items() if name != missing})
    migration_report.show_result(REPORT | {missing: None})
    assert "decided on the way:" in capsys.readouterr().out


def test_a_guest_that_does_not_run_is_moved_without_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    names = {"name": "web1", "source": "n1", "target": "n2", "node": "n2"}
    migration_report.show_result(names | {"kind": "cold", "state": "stopped", "decisions": [], "samples": 0})
    assert capsys.readouterr().out == "web1 moved; it does not run, from node n1 to node n2; it is stopped on node n2\n"


@pytest.mark.parametrize(
    ("prediction", "words"),
    [
        ({"total_s": 12.3, "downtime_ms": 250, "dirty_rate_bytes_s": 2**20, "converges": True}, ["12 s", "250 ms"]),
        ({"total_s": None, "downtime_ms": None, "dirty_rate_bytes_s": 2**30, "converges": False}, ["--postcopy"]),
    ],
)
def test_a_dry_run_says_that_nothing_moved_and_what_would_be(
    prediction: dict[str, Any], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    migration_report.show_result({"name": "web1", "source": "n1", "target": "n2", "prediction": prediction})
    shown = capsys.readouterr().out
    assert shown.startswith("web1: nothing was moved.")
    assert all(word in shown for word in [*words, rate(prediction["dirty_rate_bytes_s"])])


def test_a_stored_report_tells_an_ended_one_a_failed_one_and_one_under_way_apart(
    capsys: pytest.CaptureFixture[str],
) -> None:
    migration_report.show_stored(STORED)
    assert "it is running on node n2" in capsys.readouterr().out
    failure = {"code": "MIGRATION_FAILED", "message": "the deadline \x1b[2J has passed"}
    migration_report.show_stored(STORED | {"report": {"decisions": REPORT["decisions"], "failure": failure}})
    shown = capsys.readouterr().out
    assert "web1, from node n1 to node n2: did not move\nMIGRATION_FAILED: the deadline" in shown
    assert "raise-downtime" in shown and "\x1b" not in shown
    migration_report.show_stored(STORED | {"stage": "transferring", "report": None})
    shown = capsys.readouterr().out
    assert "web1, from node n1 to node n2: transferring" in shown and "moved" not in shown


# A migration under way


def drawn(display: MigrationDisplay) -> list[str]:
    console = Console(file=StringIO(), width=120, color_system=None)
    for line in display.lines():
        console.print(line)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue().splitlines()


def test_a_migration_under_way_is_drawn_with_its_numbers_and_how_they_went() -> None:
    display = MigrationDisplay()
    for left in (4, 3, 2, 1):
        display.show({"live_migration": META | {"remaining_bytes": left * GIB, "dirty_rate_bytes_s": left}})
    bar, numbers, expected, left, written = drawn(display)
    assert bar.split()[0] == "memory" and bar.endswith("46%") and "━" in bar
    assert numbers == ("  active, pass 3: 1.0 GiB sent, 1.0 GiB of 2.0 GiB left, 300 MiB/s; the guest writes 1 B/s")
    assert expected == "  done in about 3.4 s (80 % sure); it will stand still for about 210 ms"
    assert left.split() == ["left", "█▆▅▃"] and written.split() == ["written", "█▆▅▃"]


def test_a_verdict_and_disks_on_their_way_are_drawn_and_command_no_terminal() -> None:
    display = MigrationDisplay()
    storage = {"total_bytes": 4 * GIB, "transferred_bytes": GIB}
    display.show({"live_migration": META | {"verdict": "needs \x1b[2J 900 ms", "storage": storage, "eta_s": None}})
    shown = drawn(display)
    assert "  disks: 1.0 GiB of 4.0 GiB copied" in shown
    assert shown[-1].startswith("  needs ") and "\x1b" not in shown[-1]
    assert not any("sure" in line for line in shown)


def test_a_job_that_moves_nothing_has_no_such_lines() -> None:
    display = MigrationDisplay()
    display.show({"phase": "spawn", "percent": 60})
    assert drawn(display) == []


def test_a_long_migration_is_remembered_coarsely_and_to_its_end() -> None:
    display = MigrationDisplay()
    for look in range(20_000, 0, -1):
        display.show({"live_migration": META | {"remaining_bytes": look}})
    assert len(display._history) <= 4096
    line = next(line for line in drawn(display) if line.startswith("  left"))
    assert (line.split()[1][0], line.split()[1][-1]) == ("█", "▁")


def test_what_is_no_terminal_gets_a_line_where_there_is_news_and_not_four_a_second(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress.progress_shown() as show:
        show({"phase": "setup", "percent": 20, "message": "ready"})
        for percent in (10.0, 11.0, 12.5, 19.9, 20.0):
            show({"phase": "transfer", "percent": 30, "live_migration": META | {"percent": percent}})
        show({"phase": "transfer", "percent": 31, "live_migration": META | {"percent": 20.1, "verdict": "never"}})
        show({"phase": "switch", "percent": 90, "message": "switching"})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[2] for line in lines] == ["setup:", *["transfer:"] * 3, "switch:"]
    assert "done in about 3.4 s (80 % sure)" in lines[1] and lines[3].endswith("; never")


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (size(0), "0 B"), (size(1023), "1023 B"), (size(1024), "1.0 KiB"), (size(812 * 2**20), "812 MiB"),
        (size(2.04 * GIB), "2.0 GiB"), (size(5000 * 2**40), "5000 TiB"), (rate(2**20), "1.0 MiB/s"),
        (duration(0), "0 ms"), (duration(0.12), "120 ms"), (duration(4.21), "4.2 s"), (duration(59), "59 s"),
        (duration(59.7), "1 min 0 s"), (duration(200), "3 min 20 s"), (duration(3900), "1 h 5 min"),
    ],
)  # fmt: skip
def test_amounts_are_as_people_read_them(shown: str, text: str) -> None:
    assert shown == text


def test_a_sparkline_is_as_wide_as_its_values_and_never_wider_than_its_place() -> None:
    assert sparkline([], 10) == ""
    assert sparkline([0, 0], 10) == "▁▁"
    assert sparkline([0, 7, 3.5], 10) == "▁█▅"
    assert sparkline([0] * 500 + [8] * 500, 4) == "▁▁██"
    assert len(sparkline(range(1001), 40)) == 40


# Its picture


def png_size(file: Path) -> tuple[int, int]:
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])  # type: ignore[return-value]


def test_a_report_is_drawn_as_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "web1.png"
    sent_by(monkeypatch, "migration-report", "j1", "--plot", str(file), answer=STORED)
    assert png_size(file) == (1200, 720)


def test_a_picture_has_all_three_lines_and_its_decisions(tmp_path: Path) -> None:
    file = tmp_path / "web1.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        migration_plot.plot(STORED, file)
    drawn_text = file.read_text()
    for text in ("left to send", "sent", "written by the guest", "raise-downtime", "web1: n1 to n2", "MiB/s"):
        assert text in drawn_text, text


def test_without_matplotlib_the_error_says_what_to_install_before_anything_is_sent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert run(["migration-report", "j1", "--plot", "web1.png"]) == Exit.USAGE
    assert "pip install 'hostler[plot]'" in capsys.readouterr().err


def test_a_migration_without_a_sample_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(click.UsageError, match="nothing to draw"):
        migration_plot.plot(STORED | {"samples": []}, tmp_path / "web1.png")
    assert not [*tmp_path.iterdir()]
