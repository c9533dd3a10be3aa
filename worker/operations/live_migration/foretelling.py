"""A dry run: what a migration would be like, from how much memory the guest writes now."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import select

from hostler.migration import MigrateArguments
from models import LiveMigration, utc_now
from worker.kvm.live_migration.forecast import predict, sample_dirty_rate
from worker.operations.context import JobContext, NodeContext
from worker.operations.guests import Guests
from worker.operations.live_migration import checks
from worker.operations.live_migration.rows import Stage
from worker.operations.live_migration.tuning import MIB, bandwidth_mib_s, downtime_ms, options_of

REMEMBERED = timedelta(hours=1)
"""A report compares with a prediction that is no older."""


def foretell(node: NodeContext, guests: Guests, job: JobContext, arguments: MigrateArguments) -> dict[str, Any]:
    """Watch the guest's memory for a while and predict. Nothing moves, and the guest is hardly slowed down.

    The prediction is kept, for the report of the migration that may follow. Raises NotRunning, QemuFailed, TimedOut.
    """
    guest = guests.need(arguments.name)
    row = checks.describe(node, job, arguments, guest)
    job.phase("sample", 10, f"watching for {arguments.sample_s:g} s how much memory the guest writes")
    dirty = 0 if row.was_paused else sample_dirty_rate(guest.talk(), arguments.sample_s, job.check_cancelled)
    memory_bytes = row.info["instance"]["memory_mib"] * MIB
    row.prediction = predict(memory_bytes, dirty, int(bandwidth_mib_s(row) * MIB), downtime_ms(row))
    row.stage, row.ended_at = Stage.DONE, utc_now()
    prediction = row.prediction
    with node.database.transaction() as session:
        session.add(row)
    return {"name": arguments.name, "source": node.name, "target": arguments.target, "prediction": prediction}


def last_prediction(node: NodeContext, row: LiveMigration) -> dict[str, Any] | None:
    """What the last dry run of this move said that had the same limits: with others the two cannot be compared.

    A dry run is over, and has switched nothing.
    """
    query = (
        select(LiveMigration)
        .where(LiveMigration.instance_name == row.instance_name, LiveMigration.source == row.source)
        .where(LiveMigration.target == row.target, LiveMigration.started_at > utc_now() - REMEMBERED)
        .where(LiveMigration.stage == Stage.DONE, LiveMigration.switched_at.is_(None))
        .order_by(LiveMigration.started_at.desc())
    )
    with node.database.reading() as session:
        earlier = [each for each in session.scalars(query) if options_of(each).dry_run]
    return next((each.prediction for each in earlier if _limits(each) == _limits(row)), None)


def _limits(row: LiveMigration) -> tuple[float, int]:
    return bandwidth_mib_s(row), downtime_ms(row)
