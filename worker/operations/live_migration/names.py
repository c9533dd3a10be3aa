"""Names that the job, its steps and the task boundary share."""

from __future__ import annotations

from typing import Any

from hostler.contract import TaskName

ACCEPT, FINALIZE, DISCARD = "accept", "finalize", "discard"
"""Steps that the target carries out."""

STEP_TASKS = frozenset({TaskName.MIGRATION_ACCEPT, TaskName.MIGRATION_FINALIZE, TaskName.MIGRATION_RECOVER})

SHOWN_AS = {ACCEPT: (5, 20), FINALIZE: (92, 96), DISCARD: (0, 99)}
"""The steps as phases of the job they belong to: from percent to percent."""


def migration_id_of(arguments: dict[str, Any]) -> str | None:
    """The migration that a step belongs to, by its arguments."""
    info = arguments.get("info")
    found = arguments.get("migration_id") or (info.get("migration_id") if isinstance(info, dict) else None)
    return found if isinstance(found, str) else None
