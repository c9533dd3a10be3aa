"""Why the database's schema cannot be used or changed. Each text says what is so and what to do next."""

from __future__ import annotations

from sqlalchemy import URL


class SchemaError(Exception):
    """Base of this folder's errors. No text of theirs contains a password."""


class SchemaOutdated(SchemaError):
    """The database's schema is not this version's: either of the two is older. Nothing was changed.

    ``found`` is the database's revision (``None``: it has no tables of ours), ``needed`` this version's.
    """

    def __init__(self, url: URL, found: str | None, needed: str, *, advice: str) -> None:
        self.found = found
        self.needed = needed
        has = f"has schema revision {found}" if found else "has no schema yet"
        super().__init__(f"the database {shown(url)} {has}, this version of hostler needs {needed}: {advice}")


class SchemaLocked(SchemaError):
    """Somebody held a lock that the schema migration needs for longer than it waits.

    The revision being applied was taken back, except on MariaDB, which commits each statement by itself.
    """

    def __init__(self, url: URL) -> None:
        super().__init__(
            f"the database {shown(url)} is locked by somebody else, so its schema could not be changed: stop what uses"
            " it (workers, another upgrade, an open transaction; guests may go on), look with `hostler db status`"
            " at what it has, and run the command again"
        )


class UnknownRevision(SchemaError):
    """No schema migration of this version has that name, or it does not lie where it was looked for."""


def shown(url: URL) -> str:
    """The URL for people: the password is left out, in the query too."""
    return url.difference_update_query(["password", "passwd", "sslpassword"]).render_as_string(hide_password=True)
