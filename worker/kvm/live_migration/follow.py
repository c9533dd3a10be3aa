"""Watching a live migration: at once when QEMU says that something changed, else a few times a second."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from worker.errors import QmpLost
from worker.kvm.live_migration.sample import Sample

EVENTS = frozenset({"MIGRATION", "MIGRATION_PASS", "STOP", "RESUME"})
"""QEMU's events on which ``changed`` is to be set."""
PERIOD_S = 0.25
"""How long without an event until QEMU is asked by itself."""
SILENCES = 5
"""So many questions in a row may stay without an answer. During the switch-over QEMU can be silent for a while."""


class Migration(Protocol):
    """One side of a migration: ``Outgoing`` or ``Incoming``."""

    def query(self) -> Sample:
        """How it stands."""
        ...


def follow(
    migration: Migration,
    changed: threading.Event,
    on_sample: Callable[[Sample], None] = lambda _: None,
    check: Callable[[], None] = lambda: None,
    until: frozenset[str] = frozenset(),
) -> Sample:
    """Ask until the migration ends or has a status of ``until``, and return that answer.

    ``changed`` is set by who receives QEMU's events (see ``EVENTS``) and cleared here. ``on_sample`` gets every answer,
    the last one too, and must be quick. ``check`` is called before each question; what either raises ends the watching
    and leaves the migration as it is. A word that is not known is a migration on its way.

    Raises QmpLost after ``SILENCES`` questions in a row without an answer; the migration may go on meanwhile.
    """
    silences = 0
    while True:
        check()
        changed.clear()  # before the question: what happens during it is asked about again
        try:
            sample = migration.query()
        except QmpLost:
            silences += 1
            if silences == SILENCES:
                raise
            changed.wait(PERIOD_S)
            continue
        silences = 0
        on_sample(sample)
        if sample.ended or sample.status in until:
            return sample
        changed.wait(PERIOD_S)
