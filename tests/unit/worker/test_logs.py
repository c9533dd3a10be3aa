"""The log: one line an event, JSON for machines, text on a terminal. Tried in processes of their own: it is global."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parents[3]
PROGRAM = """
import logging, structlog, sys
from worker import logs
logs.configure(sys.argv[1], sys.argv[2])
"""
SPEAK = """
structlog.get_logger("worker.x").info("guest ended", instance="web1", reason="two\\nlines")
logging.getLogger("some.library").warning("it said %s", "this")
structlog.get_logger("worker.x").debug("detail")
"""


def run(log_format: str, level: str = "INFO", program: str = SPEAK, **options: Any) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", PROGRAM + program, log_format, level]
    return subprocess.run(argv, cwd=PROJECT, text=True, timeout=30, **({"capture_output": True} | options))


def lines(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_json_is_one_object_a_line_for_our_events_and_a_librarys() -> None:
    ours, theirs = lines(run("json"))
    assert {"event": "guest ended", "instance": "web1", "reason": "two\nlines", "level": "info"}.items() <= ours.items()
    assert ours["logger"] == "worker.x"
    assert (theirs["event"], theirs["level"], theirs["logger"]) == ("it said this", "warning", "some.library")
    assert all(entry["timestamp"].endswith("Z") for entry in (ours, theirs))


def test_an_exception_is_one_line_of_json_too() -> None:
    program = "try:\n    1 / 0\nexcept ZeroDivisionError:\n    structlog.get_logger().exception('it broke')\n"
    (entry,) = lines(run("json", program=program))
    assert entry["event"] == "it broke"
    assert "ZeroDivisionError: division by zero" in entry["exception"]


def test_without_a_terminal_the_default_is_json() -> None:
    assert len(lines(run(""))) == 2


def test_console_is_text_without_colours_where_there_is_no_terminal() -> None:
    done = run("console")
    assert "guest ended" in done.stderr
    assert "instance=web1" in done.stderr
    assert "\x1b" not in done.stderr
    with pytest.raises(ValueError, match=r"Expecting value|Extra data"):
        json.loads(done.stderr.splitlines()[0])


def test_on_a_terminal_the_default_is_text_with_colours() -> None:
    reader, terminal = pty.openpty()
    try:
        run("", capture_output=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=terminal)
        said = os.read(reader, 65536)
    finally:
        os.close(terminal)
        os.close(reader)
    assert b"guest ended" in said
    assert b"\x1b[" in said
    assert b'"event"' not in said


@pytest.mark.parametrize(("level", "events"), [("DEBUG", 3), ("INFO", 2), ("WARNING", 1), ("ERROR", 0)])
def test_the_level_decides_what_is_said(level: str, events: int) -> None:
    assert len(lines(run("json", level))) == events


def test_configuring_twice_says_everything_once() -> None:
    assert len(lines(run("json", program="logs.configure('json', 'INFO')\n" + SPEAK))) == 2


def test_what_cannot_be_said_in_json_is_said_as_python_shows_it() -> None:
    program = (
        "import pathlib\nstructlog.get_logger().info('x', path=pathlib.Path('/a'), data=b'\\xff', bad='\\ud800')\n"
    )
    (entry,) = lines(run("json", program=program))
    assert "/a" in entry["path"]
