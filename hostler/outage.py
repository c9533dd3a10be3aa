"""A broker or a result backend that does not answer, told apart from everything else that can go wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from hostler.errors import ServiceUnreachable


@contextmanager
def reaching(what: str) -> Iterator[None]:
    """Turn a lost connection inside the block into ServiceUnreachable saying that ``what`` does not answer."""
    try:
        yield
    except Exception as exc:
        if not is_outage(exc):
            raise
        raise ServiceUnreachable(complaint(what, exc)) from exc


def is_outage(exc: Exception) -> bool:
    """Whether ``exc`` is a broker's or backend's way of saying that it cannot be reached or refuses to serve us."""
    # A backend in SQL brings SQLAlchemy, which the client does not depend on: nobody raises what is not imported.
    sql: Any = sys.modules.get("sqlalchemy.exc")
    return isinstance(exc, (OSError, OperationalError, RedisError, *([sql.DBAPIError] if sql else [])))


def complaint(what: str, exc: Exception) -> str:
    """One line: ``what`` does not answer, and why."""
    return f"{what} does not answer: {str(exc).splitlines()[0] if str(exc) else type(exc).__name__}"


def safe_url(url: str) -> str:
    """``url`` without what must not be shown: user, password and query."""
    scheme, _, rest = url.partition("://")
    place, _, query = rest.partition("?")
    # Where a password was not quoted as it must be, a part of it may stand anywhere.
    return f"{scheme}://{'...' if '@' in query else place.rpartition('@')[2]}"
