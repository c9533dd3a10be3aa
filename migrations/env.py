"""Run by Alembic, from ``migrations.schema`` with the database in the attributes, or from its own command line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext
from alembic.operations.ops import MigrationScript
from alembic.runtime.migration import MigrationContext
from sqlalchemy import JSON, Column
from sqlalchemy.dialects.mysql import LONGTEXT
from sqlalchemy.types import TypeEngine

from hostler import settings
from migrations.locking import exclusive_connection
from models import Base, Database
from models.base import UtcDateTime


def same_type(
    _context: MigrationContext,
    _found: Column[Any],
    _column: Column[Any],
    found: TypeEngine[Any],
    meant: TypeEngine[Any],
) -> bool | None:
    """Whether Alembic should report a changed type; ``None`` leaves it to Alembic. MariaDB's JSON is LONGTEXT."""
    return False if isinstance(meant, JSON) and isinstance(found, LONGTEXT) else None


def frozen_type(kind: str, item: Any, autogen: AutogenContext) -> str | Literal[False]:
    """How a new revision's file spells a type: never by a name of ``models``, whose meaning may change later."""
    if kind == "type" and isinstance(item, UtcDateTime):
        autogen.imports.add("from sqlalchemy.dialects import mysql")
        return 'sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")'
    if kind == "type" and isinstance(item, JSON):
        autogen.imports.add("from sqlalchemy.dialects import postgresql")
        return 'sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")'
    return False


def number(_context: MigrationContext, _revision: Any, directives: Iterable[MigrationScript]) -> None:
    """Name a new revision by the number after the last one."""
    for directive in directives:
        directive.rev_id = f"{int(context.get_head_revision() or 0) + 1:04d}"  # type: ignore[arg-type]


def run() -> None:
    """Do what Alembic was asked, on a locked connection, or print it as SQL."""
    given = context.config.attributes.get("database")
    database = given or Database(settings.load().effective_database_url)
    options: dict[str, Any] = {
        "target_metadata": Base.metadata,
        "transaction_per_migration": True,
        "render_as_batch": True,  # SQLite changes a table only by copying it; elsewhere it changes nothing
        "compare_type": same_type,
        "render_item": frozen_type,
        "process_revision_directives": number,
        "on_version_apply": context.config.attributes.get("on_version_apply"),
    }
    if context.is_offline_mode():
        context.configure(url=database.url, literal_binds=True, dialect_opts={"paramstyle": "named"}, **options)
        with context.begin_transaction():
            context.run_migrations()
        return
    with exclusive_connection(database) as connection:
        context.configure(connection=connection, **options)
        with context.begin_transaction():
            context.run_migrations()
    if given is None:
        database.dispose()


run()
