"""Nodes, instances, their runtimes and disks, the job ledger, live migrations, uid pools.

After this file is in a release it is never changed, and it imports nothing of ``models``: it must mean the same for
ever.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.types import TypeEngine

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TABLES = (
    "nodes",
    "incarnations",
    "instances",
    "runtimes",
    "disk_leases",
    "snapshots",
    "jobs",
    "job_parents",
    "instance_locks",
    "live_migrations",
    "migration_samples",
    "uid_ranges",
    "uid_leases",
)


def upgrade() -> None:
    """Create all tables."""
    _nodes()
    _instances()
    _runtimes()
    _disk_leases()
    _snapshots()
    _jobs()
    _instance_locks()
    _live_migrations()
    _uid_pool()


def downgrade() -> None:
    """Drop all tables, and with them everything the node remembers."""
    for table in reversed(TABLES):
        op.drop_table(table)


def _nodes() -> None:
    _table(
        "nodes",
        _column("name", _key(63)),
        _column("created_at", _time()),
        _column("drained_at", _time(), nullable=True),
        _column("drained_by", _key(), nullable=True),
        _column("held_at", _time(), nullable=True),
        _column("held_by", _key(), nullable=True),
        _column("held_reason", sa.String(200), nullable=True),
        _column("fenced_at", _time(), nullable=True),
        _column("fenced_by", _key(), nullable=True),
        _column("fenced_boot_id", _key(36), nullable=True),
        sa.PrimaryKeyConstraint("name", name="pk_nodes"),
    )
    _table(
        "incarnations",
        _column("id", _key(36)),
        _column("node", _key(63)),
        _column("pid", sa.BigInteger()),
        _column("start_ticks", sa.BigInteger()),
        _column("boot_id", _key(36)),
        _column("version", sa.String(64)),
        _column("started_at", _time()),
        _column("heartbeat_at", _time()),
        _column("ended_at", _time(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_incarnations"),
        _refers("incarnations", "node", "nodes.name"),
    )
    op.create_index("ix_incarnations_node_ended_at", "incarnations", ["node", "ended_at"])


def _instances() -> None:
    _table(
        "instances",
        _column("name", _key()),
        _column("node", _key(63)),
        _column("state", _key(16)),
        _column("reason", _long_text(), nullable=True),
        _column("spec", _document()),
        _column("wanted", _key(16)),
        _column("restarts", sa.Integer()),
        _column("restart_at", _time(), nullable=True),
        _column("boot_id", _key(36), nullable=True),
        _column("created_at", _time()),
        _column("changed_at", _time()),
        _column("ended_at", _time(), nullable=True),
        sa.PrimaryKeyConstraint("name", name="pk_instances"),
        _refers("instances", "node", "nodes.name"),
    )
    op.create_index("ix_instances_node_state", "instances", ["node", "state"])
    op.create_index("ix_instances_node_restart_at", "instances", ["node", "restart_at"])


def _runtimes() -> None:
    _table(
        "runtimes",
        _column("instance_name", _key()),
        _column("node", _key(63)),
        _column("uuid", _key(36)),
        _column("format", sa.Integer()),
        _column("boot_id", _key(36)),
        _column("pid", sa.BigInteger(), nullable=True),
        _column("start_ticks", sa.BigInteger(), nullable=True),
        _column("executable", sa.String(4096)),
        _column("qemu_version", sa.String(64), nullable=True),
        _column("machine", sa.String(128), nullable=True),
        _column("accelerator", sa.String(16)),
        _column("uid", sa.BigInteger(), nullable=True),
        _column("run_dir", sa.String(255)),
        _column("hardware", _document()),
        _column("taps", _document()),
        _column("ending", _document(), nullable=True),
        _column("started_at", _time(), nullable=True),
        _column("started_by", _key(), nullable=True),
        sa.PrimaryKeyConstraint("instance_name", "node", name="pk_runtimes"),
        sa.UniqueConstraint("uuid", name="uq_runtimes_uuid"),
        _refers("runtimes", "instance_name", "instances.name", ondelete="CASCADE"),
        _refers("runtimes", "node", "nodes.name"),
    )
    op.create_index("ix_runtimes_node", "runtimes", ["node"])


def _disk_leases() -> None:
    _table(
        "disk_leases",
        _column("id", sa.Integer()),
        _column("node", _key(63)),
        _column("file_id", _key(64)),
        _column("path", sa.String(4096)),
        _column("instance_name", _key()),
        _column("shared", sa.Boolean()),
        _column("read_only", sa.Boolean()),
        sa.PrimaryKeyConstraint("id", name="pk_disk_leases"),
        sa.UniqueConstraint("node", "file_id", "instance_name", name="uq_disk_leases_node_file_id_instance_name"),
        _refers("disk_leases", "node", "nodes.name"),
        sa.ForeignKeyConstraint(
            ["instance_name", "node"],
            ["runtimes.instance_name", "runtimes.node"],
            name="fk_disk_leases_instance_name_runtimes",
            ondelete="CASCADE",
        ),
    )
    op.create_index("ix_disk_leases_instance_name_node", "disk_leases", ["instance_name", "node"])


def _snapshots() -> None:
    _table(
        "snapshots",
        _column("id", sa.Integer()),
        _column("instance_name", _key()),
        _column("name", _key(64)),
        _column("state", _key(16)),
        _column("job_id", _key()),
        _column("layers", _document()),
        _column("created_at", _time()),
        sa.PrimaryKeyConstraint("id", name="pk_snapshots"),
        sa.UniqueConstraint("instance_name", "name", name="uq_snapshots_instance_name_name"),
        _refers("snapshots", "instance_name", "instances.name", ondelete="CASCADE"),
    )


def _jobs() -> None:
    _table(
        "jobs",
        _column("sequence", _serial(), autoincrement=True),
        _column("id", _key()),
        _column("node", _key(63)),
        _column("task", _key(128)),
        _column("instance_name", _key(), nullable=True),
        _column("arguments", _document()),
        _column("state", _key(16)),
        _column("phase", sa.String(64)),
        _column("percent", sa.SmallInteger()),
        _column("message", _long_text()),
        _column("phases", _document()),
        _column("priority", sa.SmallInteger()),
        _column("waits_on", _key(16), nullable=True),
        _column("waiting_for", _document()),
        _column("live_migration", _document(), nullable=True),
        _column("attempts", sa.Integer()),
        _column("claimed_by", _key(36), nullable=True),
        _column("slot", _key(16), nullable=True),
        _column("slot_taken", sa.Boolean()),
        _column("after_failure", _key(16)),
        _column("cancel_requested_at", _time(), nullable=True),
        _column("retries", sa.Integer()),
        _column("retry_at", _time(), nullable=True),
        _column("retry_of", _key(), nullable=True),
        _column("step_of", _key(), nullable=True),
        _column("resumes", sa.Integer()),
        _column("result", _document(), nullable=True),
        _column("error", _document(), nullable=True),
        _column("received_at", _time()),
        _column("started_at", _time(), nullable=True),
        _column("updated_at", _time()),
        _column("finished_at", _time(), nullable=True),
        sa.PrimaryKeyConstraint("sequence", name="pk_jobs"),
        sa.UniqueConstraint("id", name="uq_jobs_id"),
        _refers("jobs", "node", "nodes.name"),
        _refers("jobs", "claimed_by", "incarnations.id"),
    )
    op.create_index("ix_jobs_node_received_at", "jobs", ["node", "received_at"])
    op.create_index("ix_jobs_node_state_received_at", "jobs", ["node", "state", "received_at"])
    op.create_index("ix_jobs_node_state_finished_at", "jobs", ["node", "state", "finished_at"])
    op.create_index("ix_jobs_instance_name_state_sequence", "jobs", ["instance_name", "state", "sequence"])
    op.create_index("ix_jobs_claimed_by_finished_at", "jobs", ["claimed_by", "finished_at"])
    op.create_index("ix_jobs_retry_of", "jobs", ["retry_of"])
    op.create_index("ix_jobs_step_of", "jobs", ["step_of"])
    _table(
        "job_parents",
        _column("job_id", _key()),
        _column("parent_id", _key()),
        sa.PrimaryKeyConstraint("job_id", "parent_id", name="pk_job_parents"),
        _refers("job_parents", "job_id", "jobs.id", ondelete="CASCADE"),
    )
    op.create_index("ix_job_parents_parent_id", "job_parents", ["parent_id"])


def _instance_locks() -> None:
    _table(
        "instance_locks",
        _column("instance_name", _key()),
        _column("job_id", _key()),
        _column("node", _key(63)),
        _column("taken_at", _time()),
        sa.PrimaryKeyConstraint("instance_name", name="pk_instance_locks"),
        _refers("instance_locks", "node", "nodes.name"),
    )


def _live_migrations() -> None:
    _table(
        "live_migrations",
        _column("job_id", _key()),
        _column("instance_name", _key()),
        _column("source", _key(63)),
        _column("target", _key(63)),
        _column("stage", _key(16)),
        _column("source_uuid", _key(36), nullable=True),
        _column("target_uuid", _key(36), nullable=True),
        _column("host", sa.String(255), nullable=True),
        _column("port", sa.Integer(), nullable=True),
        _column("options", _document()),
        _column("was_paused", sa.Boolean()),
        _column("info", _document()),
        _column("prediction", _document(), nullable=True),
        _column("report", _document()),
        _column("started_at", _time()),
        _column("stopped_at", _time(), nullable=True),
        _column("resumed_at", _time(), nullable=True),
        _column("switched_at", _time(), nullable=True),
        _column("ended_at", _time(), nullable=True),
        sa.PrimaryKeyConstraint("job_id", name="pk_live_migrations"),
        _refers("live_migrations", "job_id", "jobs.id", ondelete="CASCADE"),
    )
    op.create_index("ix_live_migrations_instance_name", "live_migrations", ["instance_name"])
    op.create_index("ix_live_migrations_source_stage", "live_migrations", ["source", "stage"])
    op.create_index("ix_live_migrations_target_stage", "live_migrations", ["target", "stage"])
    _table(
        "migration_samples",
        _column("id", _serial(), autoincrement=True),
        _column("job_id", _key()),
        _column("at", _time()),
        _column("data", _document()),
        sa.PrimaryKeyConstraint("id", name="pk_migration_samples"),
        _refers("migration_samples", "job_id", "jobs.id", ondelete="CASCADE"),
    )
    op.create_index("ix_migration_samples_job_id", "migration_samples", ["job_id"])


def _uid_pool() -> None:
    _table(
        "uid_ranges",
        _column("id", sa.Integer()),
        _column("node", _key(63)),
        _column("first_uid", sa.BigInteger()),
        _column("last_uid", sa.BigInteger()),
        sa.PrimaryKeyConstraint("id", name="pk_uid_ranges"),
        sa.UniqueConstraint("node", "first_uid", "last_uid", name="uq_uid_ranges_node_first_uid_last_uid"),
        _refers("uid_ranges", "node", "nodes.name"),
    )
    _table(
        "uid_leases",
        _column("node", _key(63)),
        _column("uid", sa.BigInteger(), autoincrement=False),
        _column("instance_name", _key(), nullable=True),
        _column("runtime_uuid", _key(36), nullable=True),
        _column("last_instance", _key(), nullable=True),
        _column("leased_at", _time()),
        _column("released_at", _time(), nullable=True),
        sa.PrimaryKeyConstraint("node", "uid", name="pk_uid_leases"),
        _refers("uid_leases", "node", "nodes.name"),
    )
    op.create_index("ix_uid_leases_node_instance_name", "uid_leases", ["node", "instance_name"])


def _table(name: str, *parts: sa.schema.SchemaItem) -> None:
    # A MariaDB made for latin1, its own default before 11.6, would otherwise lose what an error's text says.
    options: dict[str, Any] = {
        f"{dialect}_{option}": value
        for dialect in ("mysql", "mariadb")
        for option, value in {"engine": "InnoDB", "charset": "utf8mb4"}.items()
    }
    op.create_table(name, *parts, **options)


def _column(name: str, type_: TypeEngine[Any], *, nullable: bool = False, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, type_, nullable=nullable, **options)


def _refers(table: str, column: str, target: str, ondelete: str | None = None) -> sa.ForeignKeyConstraint:
    name = f"fk_{table}_{column}_{target.partition('.')[0]}"
    return sa.ForeignKeyConstraint([column], [target], name=name, ondelete=ondelete)


def _key(length: int = 255) -> TypeEngine[str]:
    exact = mysql.VARCHAR(length, charset="ascii", collation="ascii_bin")
    return sa.String(length).with_variant(exact, "mysql", "mariadb")


def _serial() -> TypeEngine[int]:
    # SQLite counts by itself only in a column typed INTEGER.
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _long_text() -> TypeEngine[str]:
    return sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")


def _document() -> TypeEngine[Any]:
    return sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def _time() -> TypeEngine[Any]:
    return sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
