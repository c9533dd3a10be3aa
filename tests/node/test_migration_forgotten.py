"""A master that drives a migration itself, and is never heard of again, leaves nothing behind."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import update

from models import LiveMigration, utc_now
from tests.nodes import TestNode, tiny_instance, until
from tests.pairs import pair, ticks_on
from worker.operations.live_migration.leftovers import ACCEPTED_MAX

pytestmark = pytest.mark.node


def stage(node: TestNode, migration_id: str) -> str:
    with node.reading() as session:
        return session.get_one(LiveMigration, migration_id).stage


def test_what_was_accepted_and_never_begun_is_removed_after_its_time(qemu: None) -> None:
    with pair("n1", "n2") as (a, b):
        a.start(tiny_instance(a.root, "web1"))
        info = a.do("migration.info", name="web1", target="n2")
        b.do("migration.accept", info=info)
        assert len(b.qemu_pids()) == 1
        long_ago = utc_now() - ACCEPTED_MAX - timedelta(seconds=1)
        with a.database().transaction() as session:
            mine = LiveMigration.job_id == info["migration_id"]
            session.execute(update(LiveMigration).where(mine).values(started_at=long_ago))
        until(lambda: stage(a, info["migration_id"]) == "done", what="it is given up")
        until(lambda: not b.qemu_pids(), what="the QEMU that waited is gone")
        ticks_on(a, "web1", 0)
        assert a.info("web1")["state"] == "running"
        b.do("migration.accept", info=a.do("migration.info", name="web1", target="n2"))
