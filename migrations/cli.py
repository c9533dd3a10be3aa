"""``hostler db``: what schema the database has, and bringing it to this version's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import click
from sqlalchemy.exc import DBAPIError

from hostler import settings
from migrations import schema
from migrations.errors import SchemaError, SchemaOutdated, UnknownRevision, shown
from models import Database, DatabaseUnusable


class Refused(click.ClickException):
    """The database was reached and does not do what was asked: exit 1."""

    exit_code = 1


class Misuse(click.ClickException):
    """A setting or an argument is wrong: exit 2, before anything was done."""

    exit_code = 2


class Unreachable(click.ClickException):
    """The database does not answer: exit 3."""

    exit_code = 3


@click.group()
def db() -> None:
    """Look at the database's schema, and upgrade it.

    The database is the one of HOSTLER_DATABASE_URL; where that is not set, it is the embedded SQLite file below
    HOSTLER_STATE_DIR, which every worker upgrades by itself. Any other database is changed only by this command, and
    a worker refuses to start on a schema that is not its own.

    To move to a new version: install it on the nodes, stop their workers (the guests go on running), run
    `hostler db upgrade` once, start the workers.
    """


@db.command()
@click.option("--sql", is_flag=True, help="Print the statements instead, for somebody else to run. Changes nothing.")
def upgrade(sql: bool) -> None:
    """Bring the schema to the revision this version needs.

    An empty database gets all tables; an older one keeps its data. Each schema migration is one transaction (MariaDB
    knows none for tables: make a copy of the database first). Running it again, or on several nodes at once, is safe:
    whoever comes second waits and finds nothing to do.
    """
    with _database() as database:
        if sql:
            click.echo(schema.sql(database).rstrip() or f"-- {shown(database.url)} is up to date")
            return
        click.echo(f"database {shown(database.url)}")
        schema.upgrade(database, _say)
        click.echo(f"is at revision {schema.head_revision()}, which this version needs")


@db.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for programs.")
@click.pass_context
def status(context: click.Context, as_json: bool) -> None:
    """Show the schema's revision, the one this version needs, and what lies between.

    Ends with 0 when they are the same, 1 when they are not, 3 when the database cannot be reached.
    """
    with _database() as database:
        found, advice = schema.current_revision(database), ""
        try:
            pending = schema.pending(database)
        except SchemaOutdated as exc:
            pending, advice = [], str(exc)
        facts = {
            "database": shown(database.url),
            "revision": found,
            "head": schema.head_revision(),
            "current": found == schema.head_revision(),
            "pending": [{"revision": step.revision, "title": step.title} for step in pending],
        }
    if as_json:
        click.echo(json.dumps(facts))
    else:
        click.echo(f"database  {facts['database']}\nrevision  {found or 'none'}\nhead      {facts['head']}")
        for step in pending:
            click.echo(f"pending   {step.revision} {step.title}")
        click.echo(advice or ("run `hostler db upgrade`" if pending else "up to date"))
    context.exit(0 if facts["current"] else 1)


@db.command()
@click.argument("revision")
@click.option("--yes", is_flag=True, help="Say that losing what the later revisions hold is meant.")
def downgrade(revision: str, yes: bool) -> None:
    """Take the schema back to REVISION, or with `base` drop all tables.

    What only later revisions can hold is lost, so that it needs --yes. Stop all workers of the database first; their
    guests go on running. Then install the version of hostler that goes with REVISION: this one's workers would refuse
    the database or, where it is the embedded one, upgrade it again.
    """
    if not yes:
        raise Misuse(f"going back to {revision} deletes data; copy the database, then say so with --yes")
    with _database() as database:
        click.echo(f"database {shown(database.url)}")
        schema.downgrade(database, revision, _say)
        click.echo(f"is at revision {schema.current_revision(database) or 'base'}")


def _say(step: schema.Revision) -> None:
    click.echo(f"  {step.revision} {step.title}")


@contextmanager
def _database() -> Iterator[Database]:
    database = _open()
    try:
        _reach(database)
        yield database
    except UnknownRevision as exc:
        raise Misuse(str(exc)) from None
    except SchemaError as exc:
        raise Refused(str(exc)) from None
    except DBAPIError as exc:
        raise Refused(
            f"the database {shown(database.url)} refused: {_reason(exc)}; `hostler db status` shows what it has"
        ) from None
    finally:
        database.dispose()


def _open() -> Database:
    try:
        return Database(settings.load().effective_database_url)
    except settings.SettingsError as exc:
        raise Misuse(str(exc)) from None
    except DatabaseUnusable as exc:
        raise Misuse(str(exc)) from None


def _reach(database: Database) -> None:
    try:
        database.engine.connect().close()
    except DBAPIError as exc:
        raise Unreachable(
            f"cannot reach the database {shown(database.url)}: {_reason(exc)}; nothing was changed, check"
            " HOSTLER_DATABASE_URL and the server"
        ) from None


def _reason(error: DBAPIError) -> str:
    return " ".join(str(error.orig).split())
