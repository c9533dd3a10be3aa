"""What a worker does at its start: use a schema that is its own, upgrade the embedded one, refuse all others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import event, make_url, text
from sqlalchemy.exc import OperationalError

from migrations import schema
from migrations.errors import shown
from models import Database
from tests.services import postgresql_database


def test_an_embedded_database_upgrades_by_itself(empty_database: Database) -> None:
    schema.ensure_current(empty_database, may_upgrade=True)
    assert schema.current_revision(empty_database) == schema.head_revision()


def test_an_empty_database_is_refused_with_advice_and_left_empty(empty_database: Database) -> None:
    with pytest.raises(schema.SchemaOutdated, match=r"has no schema yet.*`hostler db upgrade`") as refused:
        schema.ensure_current(empty_database, may_upgrade=False)
    assert (refused.value.found, refused.value.needed) == (None, schema.head_revision())
    assert schema.current_revision(empty_database) is None


def test_an_old_schema_is_refused_naming_both_revisions(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    old = schema.head_revision()
    monkeypatch.setattr(schema, "HEAD", "9999")
    with pytest.raises(schema.SchemaOutdated, match=f"revision {old}, this version of hostler needs 9999") as refused:
        schema.ensure_current(database, may_upgrade=False)
    assert "`hostler db upgrade`" in str(refused.value)
    assert shown(database.url) in str(refused.value)


@pytest.mark.parametrize("may_upgrade", [True, False])
def test_a_newer_schema_is_refused_with_its_own_advice(database: Database, may_upgrade: bool) -> None:
    _pretend_newer(database)
    with pytest.raises(schema.SchemaOutdated, match=r"made by a newer hostler.*upgrade hostler") as refused:
        schema.ensure_current(database, may_upgrade=may_upgrade)
    assert "hostler db upgrade" not in str(refused.value)
    assert schema.current_revision(database) == "9000"


def test_neither_upgrade_nor_downgrade_touches_a_newer_schema(database: Database) -> None:
    _pretend_newer(database)
    with pytest.raises(schema.SchemaOutdated):
        schema.upgrade(database)
    with pytest.raises(schema.SchemaOutdated):
        schema.downgrade(database, "base")
    assert schema.current_revision(database) == "9000"


@pytest.mark.postgresql
def test_a_refusal_has_no_password_in_it() -> None:
    with postgresql_database() as address:
        database = Database(make_url(address).set(password="hunter2"))
        try:
            with pytest.raises(schema.SchemaOutdated) as refused:
                schema.ensure_current(database, may_upgrade=False)
        finally:
            database.dispose()
    assert "hunter2" not in str(refused.value)
    assert make_url(address).database in str(refused.value)  # type: ignore[operator]


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://u:hunter2@h/d",
        "mysql+pymysql://h/d?password=hunter2&ssl_ca=/c",
        "mysql+pymysql://h/d?passwd=hunter2",
    ],
)
def test_a_url_is_shown_without_its_password(url: str) -> None:
    assert "hunter2" not in shown(make_url(url))
    assert "h/d" in shown(make_url(url))


def test_a_current_database_costs_one_select(database: Database) -> None:
    statements: list[str] = []
    event.listen(database.engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    schema.ensure_current(database, may_upgrade=False)
    assert [statement for statement in statements if statement.startswith("SELECT")] == statements[-1:]


def test_a_current_database_does_not_cost_the_import_of_alembic(database: Database) -> None:
    program = (
        "import sys; from migrations import schema; from models import Database;"
        "schema.ensure_current(Database(sys.argv[1]), may_upgrade=True); sys.exit('alembic' in sys.modules)"
    )
    url = database.url.render_as_string(hide_password=False)
    root = Path(schema.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program, url], cwd=root, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_server_that_does_not_answer_is_not_taken_for_an_empty_database() -> None:
    database = Database("postgresql+psycopg://postgres@127.0.0.1:1/nowhere")  # port 1: tcpmux, which nobody runs
    with pytest.raises(OperationalError, match="refused"):
        schema.ensure_current(database, may_upgrade=True)


def _pretend_newer(database: Database) -> None:
    with database.transaction() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9000'"))
