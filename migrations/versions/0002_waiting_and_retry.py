"""What a job waits on, its priority and class, cancellation, retries, and the jobs it comes after."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns, with the values that older jobs mean, and the table of parents."""
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("priority", sa.SmallInteger(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("waits_on", _key(16), nullable=True))
        jobs.add_column(sa.Column("slot", _key(16), nullable=True))
        jobs.add_column(sa.Column("slot_taken", sa.Boolean(), nullable=False, server_default=sa.false()))
        jobs.add_column(sa.Column("after_failure", _key(16), nullable=False, server_default="cancel"))
        jobs.add_column(sa.Column("cancel_requested_at", _time(), nullable=True))
        jobs.add_column(sa.Column("retries", sa.Integer(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("retry_at", _time(), nullable=True))
        jobs.create_index("ix_jobs_state_retry_at", ["state", "retry_at"])
    op.execute("UPDATE jobs SET waits_on = 'instance' WHERE state = 'WAITING'")
    op.create_table(
        "job_parents",
        sa.Column("job_id", _key(), nullable=False),
        sa.Column("parent_id", _key(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "parent_id", name="pk_job_parents"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_parents_job_id_jobs", ondelete="CASCADE"),
    )
    op.create_index("ix_job_parents_parent_id", "job_parents", ["parent_id"])


def downgrade() -> None:
    """Drop them; jobs that wait on parents or on a limit are then jobs that were never woken."""
    op.drop_table("job_parents")
    op.execute("UPDATE jobs SET state = 'PENDING' WHERE state = 'WAITING' AND waits_on <> 'instance'")
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_index("ix_jobs_state_retry_at")
        for name in (
            "retry_at",
            "retries",
            "cancel_requested_at",
            "after_failure",
            "slot_taken",
            "slot",
            "waits_on",
            "priority",
        ):
            jobs.drop_column(name)


def _key(length: int = 255) -> sa.types.TypeEngine[Any]:
    exact = mysql.VARCHAR(length, charset="ascii", collation="ascii_bin")
    return sa.String(length).with_variant(exact, "mysql", "mariadb")


def _time() -> sa.types.TypeEngine[Any]:
    return sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
