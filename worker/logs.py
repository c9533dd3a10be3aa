"""Logging: one line an event, for people on a terminal, as JSON elsewhere."""

from __future__ import annotations

import logging
import sys
from typing import Any, NoReturn

import structlog

_CHATTY = ("celery.worker.strategy", "celery.app.trace", "kombu", "alembic")


REFUSED, MISUSED, UNREACHABLE = 1, 2, 3
"""Exit codes of a worker that does not begin: what it found, what it was told, a service that does not answer."""


def refuse(reason: object, status: int) -> NoReturn:
    """End the process with one line for a person; a traceback would only hide it."""
    print(f"hostler worker: {reason}", file=sys.stderr)
    sys.exit(status)


def configure(log_format: str, level: int | str) -> None:
    """Send structlog's and the standard library's records to stderr in one format."""
    as_json = log_format == "json" or (not log_format and not sys.stderr.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[Any] = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            *(last if as_json else [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]),
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
