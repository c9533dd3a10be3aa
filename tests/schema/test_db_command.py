"""``hostler db``: what it prints, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import text

from hostler import settings
from migrations import schema
from migrations.cli import db
from models import Database

Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    def invoke(url: str, *words: str) -> Result:
        monkeypatch.setenv("HOSTLER_DATABASE_URL", url)
        settings.load.cache_clear()
        return CliRunner().invoke(db, words)

    yield invoke
    settings.load.cache_clear()


def test_status_upgrade_status_on_an_empty_database(run: Run, empty_database_url: str) -> None:
    head = schema.head_revision()
    before = run(empty_database_url, "status")
    assert before.exit_code == 1
    assert f"pending   {head}" in before.output and "hostler db upgrade" in before.output
    upgraded = run(empty_database_url, "upgrade")
    assert upgraded.exit_code == 0, upgraded.output
    assert f"  {head} " in upgraded.output and f"is at revision {head}" in upgraded.output
    after = run(empty_database_url, "status")
    assert (after.exit_code, "up to date" in after.output) == (0, True)
    again = run(empty_database_url, "upgrade")
    assert (again.exit_code, f"  {head} " in again.output) == (0, False)


def test_status_tells_programs_the_same(run: Run, empty_database_url: str) -> None:
    result = run(empty_database_url, "status", "--json")
    facts = json.loads(result.output)
    assert result.exit_code == 1
    assert (facts["revision"], facts["head"], facts["current"]) == (None, schema.head_revision(), False)
    assert [step["revision"] for step in facts["pending"]] == [schema.head_revision()]


def test_status_of_a_newer_database_says_what_to_do(run: Run, database: Database) -> None:
    with database.transaction() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9000'"))
    result = run(_url(database), "status")
    assert result.exit_code == 1
    assert "9000" in result.output and "upgrade hostler here" in result.output
    assert json.loads(run(_url(database), "status", "--json").output)["revision"] == "9000"


def test_upgrade_of_a_newer_database_is_refused(run: Run, database: Database) -> None:
    with database.transaction() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9000'"))
    result = run(_url(database), "upgrade")
    assert (result.exit_code, "newer hostler" in result.output) == (1, True)


def test_upgrade_can_print_its_statements_and_changes_nothing(run: Run, empty_database: Database) -> None:
    result = run(_url(empty_database), "upgrade", "--sql")
    assert result.exit_code == 0
    assert "CREATE TABLE instances" in result.output
    assert schema.current_revision(empty_database) is None


def test_there_is_nothing_to_print_for_a_current_database(run: Run, database: Database) -> None:
    assert run(_url(database), "upgrade", "--sql").output.startswith("-- ")


def test_downgrade_wants_to_be_confirmed(run: Run, database: Database) -> None:
    refused = run(_url(database), "downgrade", "base")
    assert (refused.exit_code, "--yes" in refused.output) == (2, True)
    assert schema.current_revision(database) == schema.head_revision()
    done = run(_url(database), "downgrade", "base", "--yes")
    assert done.exit_code == 0, done.output
    assert schema.current_revision(database) is None


def test_downgrade_to_no_revision_of_ours_is_refused(run: Run, database: Database) -> None:
    result = run(_url(database), "downgrade", "tomorrow", "--yes")
    assert (result.exit_code, "'tomorrow' is none of the revisions" in result.output) == (2, True)
    assert schema.current_revision(database) == schema.head_revision()


@pytest.mark.parametrize("words", [["status"], ["upgrade"], ["upgrade", "--sql"], ["downgrade", "base", "--yes"]])
@pytest.mark.parametrize(
    "url", ["postgresql+psycopg://u:hunter2@127.0.0.1:1/d", "mysql+pymysql://u:hunter2@127.0.0.1:1/d"]
)
def test_an_unreachable_database_is_told_apart_and_no_password_shown(run: Run, url: str, words: list[str]) -> None:
    result = run(url, *words)
    assert result.exit_code == 3
    assert "cannot reach the database" in result.output
    assert "hunter2" not in result.output


@pytest.mark.parametrize(
    "url", ["rubbish", "foo://u:hunter2@h/d", "postgresql+psycopg://u:p@h:hunter2/d", "mysql+nodriver://h/d"]
)
def test_a_url_that_is_none_names_its_setting_and_shows_no_password(run: Run, url: str) -> None:
    result = run(url, "status")
    assert result.exit_code == 2
    assert "HOSTLER_DATABASE_URL" in result.output
    assert "hunter2" not in result.output


def test_a_misspelt_setting_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch, empty_database_url: str) -> None:
    monkeypatch.setenv("HOSTLER_DATABSE_URL", "x")
    result = run(empty_database_url, "upgrade")
    assert (result.exit_code, "HOSTLER_DATABSE_URL" in result.output) == (2, True)


def _url(database: Database) -> str:
    return database.url.render_as_string(hide_password=False)
