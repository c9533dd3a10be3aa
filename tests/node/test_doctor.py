"""`hostler doctor` looks at this host, starts what it judges, and says what to do."""

from __future__ import annotations

import fcntl
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hostler import embedded
from hostler import settings as settings_module
from hostler.settings import Settings
from migrations import schema
from models import Database
from tests.services import missing
from worker.doctor.checks import HOST_CHECKS, NODE_CHECKS
from worker.doctor.cli import doctor

pytestmark = pytest.mark.node

ALL = ["settings", *HOST_CHECKS, *NODE_CHECKS]
REFUSED = "redis://:geheim@127.0.0.1:1/0"
ELSEWHERE = {"HOSTLER_BROKER_URL": REFUSED, "HOSTLER_RESULT_BACKEND": REFUSED}

Run = Callable[..., Result]


@pytest.fixture
def folder() -> Iterator[Path]:
    """For state and run folder, neither there yet; the broker that the doctor started is ended."""
    with tempfile.TemporaryDirectory(prefix="hst-", dir="/tmp") as name:
        try:
            yield Path(name)
        finally:
            embedded.stop(Settings(state_dir=Path(name, "state"), broker_url="", result_backend=""))


@pytest.fixture
def run(folder: Path) -> Iterator[Run]:
    """``hostler doctor`` with these arguments and settings; others of this process do not count."""

    def invoke(*arguments: str, **environment: str) -> Result:
        settings_module.load.cache_clear()
        unset: dict[str, str | None] = dict.fromkeys(settings_module.known_names())
        given = {"HOSTLER_STATE_DIR": f"{folder}/state", "HOSTLER_RUN_DIR": f"{folder}/run", "HOSTLER_NODE": "n1"}
        return CliRunner().invoke(doctor, arguments, env=unset | given | environment, catch_exceptions=False)

    yield invoke
    settings_module.load.cache_clear()


def checks(result: Result) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in json.loads(result.stdout)["checks"]}


def test_this_host_can_run_a_node(run: Run, folder: Path) -> None:
    if not shutil.which("qemu-system-x86_64"):
        missing("QEMU", "not on PATH")
    result = run()
    assert result.exit_code == 0, result.output
    assert "This host can run a node" in result.stdout
    assert f"created {folder}/state, {folder}/state/broker" in result.stdout.replace("\n", " ")
    assert [path.name for path in (folder / "state").iterdir()] == ["broker"]
    assert not (folder / "run").exists()


def test_programs_get_every_check_in_one_shape(run: Run) -> None:
    document = json.loads(run("--json").stdout)
    assert set(document) == {"ok", "checks"}
    assert [check["name"] for check in document["checks"]] == ALL
    for check in document["checks"]:
        assert set(check) == {"name", "status", "detail", "fix"}
        assert check["status"] in ("ok", "warn", "fail") and check["detail"]
        assert check["fix"] or check["status"] == "ok"
    assert document["ok"] == all(check["status"] != "fail" for check in document["checks"])


def test_a_broker_that_runs_is_used_and_nothing_is_made(run: Run) -> None:
    run("--json")
    found = checks(run("--json"))["broker"]
    assert found["status"] == "ok"
    assert "started" not in found["detail"] and "created" not in found["detail"]


def test_a_missing_qemu_fails_with_what_to_install(run: Run) -> None:
    result = run("--json", HOSTLER_QEMU_BINARY="/nonexistent/qemu", **ELSEWHERE)
    assert result.exit_code == 1
    found = checks(result)
    assert found["qemu"]["status"] == "fail"
    assert "HOSTLER_QEMU_BINARY" in found["qemu"]["fix"] and "install" in found["qemu"]["fix"]
    assert found["kvm"]["status"] == "warn"


def test_people_get_the_fix_on_its_own_line_and_the_verdict_last(run: Run) -> None:
    lines = run(HOSTLER_QEMU_BINARY="/nonexistent/qemu", **ELSEWHERE).stdout.splitlines()
    where = next(number for number, line in enumerate(lines) if line.startswith("fail  qemu"))
    assert lines[where + 1].strip().startswith("-> set HOSTLER_QEMU_BINARY")
    assert lines[-1].startswith("This host cannot run a node yet: qemu")


def test_a_refused_database_broker_and_result_backend_fail_without_their_passwords(run: Run, folder: Path) -> None:
    result = run("--json", HOSTLER_DATABASE_URL="postgresql+psycopg://bob:geheim@127.0.0.1:1/x", **ELSEWHERE)
    assert result.exit_code == 1
    found = checks(result)
    for name, variable in (("broker", "BROKER_URL"), ("results", "RESULT_BACKEND"), ("database", "DATABASE_URL")):
        assert found[name]["status"] == "fail"
        assert f"HOSTLER_{variable}" in found[name]["fix"]
    assert "refused" in found["database"]["detail"]
    assert "geheim" not in result.stdout
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("nonsense", "not a URL"),
        ("nonsense://:geheim@x/y", "not a URL"),
        ("postgresql+nodriver://u:geheim@h/d", "not a URL"),
    ],
)
def test_a_database_that_cannot_be_is_told_as_such(run: Run, url: str, told: str) -> None:
    result = run("--json", HOSTLER_DATABASE_URL=url, **ELSEWHERE)
    assert checks(result)["database"]["status"] == "fail"
    assert told in checks(result)["database"]["detail"]
    assert "geheim" not in result.stdout


@pytest.mark.parametrize("url", ["nonsense://x", "redis://nosuchhost.invalid/0", "db+nonsense://x"])
def test_a_broker_and_a_result_backend_that_cannot_be_are_told_as_such(run: Run, url: str) -> None:
    found = checks(run("--json", HOSTLER_BROKER_URL=url, HOSTLER_RESULT_BACKEND=url))
    assert (found["broker"]["status"], found["results"]["status"]) == ("fail", "fail")


def test_a_wrong_setting_is_itself_a_failed_check(run: Run) -> None:
    result = run("--json", HOSTLER_CONCURRENCY="many")
    assert result.exit_code == 1
    assert [check["name"] for check in json.loads(result.stdout)["checks"]] == ["settings", *HOST_CHECKS]
    assert "HOSTLER_CONCURRENCY" in checks(result)["settings"]["detail"]
    assert "HOSTLER_NODDE" in checks(run("--json", HOSTLER_NODDE="n1"))["settings"]["detail"]


def test_an_old_schema_is_told_with_the_command_that_upgrades_it(run: Run, empty_database: Database) -> None:
    url = empty_database.url.render_as_string(hide_password=False)
    found = checks(run("--json", HOSTLER_DATABASE_URL=url, **ELSEWHERE))["database"]
    assert (found["status"], found["fix"]) == ("fail", "hostler db upgrade")
    schema.upgrade(empty_database)
    found = checks(run("--json", HOSTLER_DATABASE_URL=url, **ELSEWHERE))["database"]
    assert (found["status"], found["fix"]) == ("ok", "")
    assert schema.head_revision() in found["detail"]


def test_an_embedded_database_is_left_to_the_worker(run: Run, folder: Path) -> None:
    assert "made by the first worker" in checks(run("--json", **ELSEWHERE))["database"]["detail"]
    database = Database(f"sqlite+pysqlite:///{folder / 'state' / 'hostler.sqlite'}")
    with database.reading():
        pass
    found = checks(run("--json", **ELSEWHERE))["database"]
    database.dispose()
    assert found["status"] == "ok"
    assert "the next worker upgrades it" in found["detail"]


def test_results_in_a_database_are_looked_at_without_making_tables(run: Run, empty_database: Database) -> None:
    backend = "db+" + empty_database.url.render_as_string(hide_password=False)
    found = checks(run("--json", HOSTLER_BROKER_URL=REFUSED, HOSTLER_RESULT_BACKEND=backend))["results"]
    assert found["status"] == "ok", found
    with empty_database.reading() as session:
        assert not empty_database.engine.dialect.has_table(session.connection(), "celery_taskmeta")


def test_a_broker_elsewhere_that_answers_is_well(run: Run, folder: Path) -> None:
    embedded.ensure(Settings(state_dir=folder / "state", broker_url="", result_backend=""))
    url = f"redis+socket://{folder}/state/broker/redis.sock?virtual_host=0"
    found = checks(run("--json", HOSTLER_BROKER_URL=url))
    assert (found["broker"]["status"], found["results"]["status"]) == ("ok", "ok"), found


def test_whether_a_worker_lives_is_told_without_touching_its_lock(run: Run, folder: Path) -> None:
    lock = folder / "state" / "node.n1.lock"
    lock.parent.mkdir()
    lock.write_text("4711")
    assert "no worker" in checks(run("--json", **ELSEWHERE))["worker"]["detail"]
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "alive, pid 4711" in checks(run("--json", **ELSEWHERE))["worker"]["detail"]


def test_a_check_that_breaks_does_not_end_the_doctor(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(schema, "head_revision", broken)
    (folder / "some.db").touch()
    result = run("--json", HOSTLER_DATABASE_URL=f"sqlite:///{folder}/some.db", **ELSEWHERE)
    assert checks(result)["database"]["detail"] == "the check itself failed: RuntimeError: no such thing"
    assert list(checks(result)) == ALL
