"""Riding out a database that is away for a while."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import structlog
from sqlalchemy.exc import InterfaceError, OperationalError

log = structlog.get_logger(__name__)

PATIENCE_S = 60.0
"""A database that is restarted or fails over is back well within this; a job in progress waits that long for it."""
RETRY_S = 0.5

P = ParamSpec("P")
T = TypeVar("T")


def patient(transaction: Callable[P, T]) -> Callable[P, T]:
    """Repeat a function that is one transaction while the database cannot be reached, for PATIENCE_S.

    Only for functions that may be carried out twice: whether a commit that was cut off took effect is not known.
    """

    @functools.wraps(transaction)
    def repeated(*args: P.args, **kwargs: P.kwargs) -> T:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return transaction(*args, **kwargs)
            except (OperationalError, InterfaceError) as exc:
                if time.monotonic() > deadline:
                    raise
                log.warning("the database is away; trying again", reason=str(exc.orig))
                time.sleep(RETRY_S)

    return repeated
