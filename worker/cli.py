"""``hostler worker``: this node's worker in the foreground."""

from __future__ import annotations

import os
import sys

import click

from hostler import settings
from worker import logs


@click.command()
@click.option("--node", "-n", metavar="NAME", help="This node's name (default: HOSTLER_NODE, else the host name).")
@click.option("--concurrency", "-c", type=click.IntRange(1, 1024), help="Jobs that may run at once (default 64).")
@click.option("--loglevel", "-l", default="INFO", show_default=True, help="DEBUG, INFO, WARNING or ERROR.")
def worker(node: str | None, concurrency: int | None, loglevel: str) -> None:
    """Run this node's worker in the foreground.

    It consumes the queue node.NAME, adopts the guests that already run, and continues the jobs that a worker before it
    left unfinished. Stopping it (Ctrl-C, SIGTERM) waits for the jobs at work and leaves every guest running.

    With no settings at all it uses an embedded broker and an SQLite database below the state folder. The same worker
    is started by `celery -A worker worker`.

    \b
    Examples:
      hostler worker
      hostler worker --node n1
      HOSTLER_BROKER_URL=redis://db/0 HOSTLER_DATABASE_URL=postgresql+psycopg://hostler@db/hostler hostler worker
    """
    if node:
        os.environ["HOSTLER_NODE"] = node
    if concurrency:
        os.environ["HOSTLER_CONCURRENCY"] = str(concurrency)
    try:
        settings.load()
    except settings.SettingsError as exc:
        logs.refuse(exc, logs.MISUSED)
    from worker.celery import app

    # Celery's own command line would load every plug-in it finds (Flower, a shell): 20 MB that a node never uses.
    process = app.Worker(loglevel=loglevel, quiet=True)
    process.start()
    sys.exit(process.exitcode)
