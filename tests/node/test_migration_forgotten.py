"""A master that drives a migration itself, and is never heard of again, leaves nothing behind."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import update

from models import LiveMigration, utc_now
from tests.nodes import tiny_instance, until
from tests.pairs import pair, stage_of, ticks_on
from worker.operations.live_migration.leftovers import ACCEPTED_MAX

pytestmark = pytest.mark.node


def test_what_was_accepted_and_never_begun_is_removed_after_its_time(qemu: None) -> None:
    with pair("n1", "n2") as (a, b):
        a.start(tiny_instance(a.root, "web1"))
        begun = a.send("migration.info", name="web1", target="n2")
        b.do("migration.accept", info=begun.wait(60))
        assert len(b.qemu_pids()) == 1
        long_ago = utc_now() - ACCEPTED_MAX - timedelta(seconds=1)
        with a.database().transaction() as session:
            session.execute(update(LiveMigration).where(LiveMigration.job_id == begun.id).values(started_at=long_ago))
        until(lambda: stage_of(a, begun) == "done", what="it is given up")
        until(lambda: not b.qemu_pids(), what="the QEMU that waited is gone")
        ticks_on(a, "web1", 0)
        assert a.info("web1")["state"] == "running"
        b.do("migration.accept", info=a.do("migration.info", name="web1", target="n2"))
