"""The database's schema: which revision it has, which one this version needs, and the way from one to the other.

Alembic is imported only where something has to be changed or explained: every worker asks at its start, and importing
it costs more than the question.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from sqlalchemy import inspect, text
from sqlalchemy.exc import OperationalError, ProgrammingError

from migrations.errors import SchemaError, SchemaLocked, SchemaOutdated, UnknownRevision
from models import Database

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

__all__ = [
    "Revision",
    "SchemaError",
    "SchemaLocked",
    "SchemaOutdated",
    "UnknownRevision",
    "current_revision",
    "downgrade",
    "ensure_current",
    "head_revision",
    "pending",
    "sql",
    "upgrade",
]

HEAD = "0001"
"""The newest revision. A test compares it with the files in versions/."""

_one_at_a_time = Lock()  # Alembic keeps the running command in module globals


@dataclass(frozen=True)
class Revision:
    """A schema migration: its number and, in a few words, what it brings."""

    revision: str
    title: str


def head_revision() -> str:
    """The revision this version of hostler needs."""
    return HEAD


def current_revision(db: Database) -> str | None:
    """The revision the database has; ``None`` where no schema migration ever ran."""
    try:
        with db.reading() as session:
            return session.execute(text("SELECT version_num FROM alembic_version")).scalar()
    except (OperationalError, ProgrammingError):
        # Each driver reports a missing table in its own way; whatever else was wrong shows here again.
        with db.reading() as session:
            if inspect(session.connection()).has_table("alembic_version"):
                raise
        return None


def ensure_current(db: Database, *, may_upgrade: bool) -> None:
    """Return with the database at this version's revision; with ``may_upgrade`` bring it there.

    Raises SchemaOutdated when the database is older and may not be changed, or newer than this version, and
    SchemaLocked when somebody else keeps it from being upgraded. Both leave it as it was.
    """
    found = current_revision(db)
    if found == HEAD:
        return
    if may_upgrade:
        upgrade(db)
        return
    _refuse_newer(db, found)
    raise SchemaOutdated(db.url, found, HEAD, advice="run `hostler db upgrade`, which keeps all data, and start again")


def pending(db: Database) -> list[Revision]:
    """The schema migrations that ``upgrade`` would apply, in order. Raises SchemaOutdated if the database is newer."""
    found = current_revision(db)
    if found == HEAD:
        return []
    _refuse_newer(db, found)
    steps = _scripts(_config(db)).iterate_revisions("head", found or "base")
    return [Revision(step.revision, step.doc) for step in reversed(list(steps))]


def upgrade(db: Database, on_step: Callable[[Revision], None] | None = None) -> None:
    """Apply what is pending, each schema migration in a transaction of its own, and call ``on_step`` after each.

    If another upgrader is at work, wait for it and do what it left. Raises SchemaOutdated for a database that is newer
    than this version, SchemaLocked when its tables stay in use. What was applied before an error stays applied.
    """
    from alembic import command

    _refuse_newer(db, current_revision(db))
    with _one_at_a_time:
        command.upgrade(_config(db, on_step), "head")


def downgrade(db: Database, revision: str, on_step: Callable[[Revision], None] | None = None) -> None:
    """Take the schema back to ``revision``, or with ``base`` to nothing. What newer tables and columns held is lost.

    Raises UnknownRevision unless ``revision`` is one the database has passed, and SchemaOutdated and SchemaLocked as
    ``upgrade`` does.
    """
    from alembic import command

    found = current_revision(db)
    _refuse_newer(db, found)
    passed = [*_passed(db, found), "base"]
    if revision not in passed:
        raise UnknownRevision(f"{revision!r} is none of the revisions this database went through: {', '.join(passed)}")
    with _one_at_a_time:
        command.downgrade(_config(db, on_step), revision)


def sql(db: Database) -> str:
    """The statements that ``upgrade`` would run, for somebody else to run. Changes nothing."""
    from alembic import command

    if not pending(db):
        return ""
    found, output = current_revision(db), io.StringIO()
    config = _config(db)
    config.output_buffer = output
    with _one_at_a_time:
        command.upgrade(config, f"{found or 'base'}:head", sql=True)
    return output.getvalue()


def _refuse_newer(db: Database, found: str | None) -> None:
    if found is None or found in {step.revision for step in _scripts(_config(db)).walk_revisions()}:
        return
    raise SchemaOutdated(
        db.url,
        found,
        HEAD,
        advice=f"{found} was made by a newer hostler, or by another program; upgrade hostler here, or"
        " correct HOSTLER_DATABASE_URL",
    )


def _passed(db: Database, found: str | None) -> list[str]:
    return [step.revision for step in _scripts(_config(db)).iterate_revisions(found or "base", "base")]


def _scripts(config: Config) -> ScriptDirectory:
    from alembic.script import ScriptDirectory

    return ScriptDirectory.from_config(config)


def _config(db: Database, on_step: Callable[[Revision], None] | None = None) -> Config:
    from alembic.config import Config

    def applied(*, step: Any, **_other: Any) -> None:
        if on_step and step.up_revision:
            on_step(Revision(step.up_revision_id, step.up_revision.doc))

    config = Config(attributes={"database": db, "on_version_apply": applied})
    # From the installed folder, so that a wheel needs neither pyproject.toml nor the right working directory.
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config
