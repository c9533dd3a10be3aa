"""${message}

After this file is in a release it is never changed, and it imports nothing of ``models``: it must mean the same for
ever. Set HEAD in migrations/schema.py to this revision.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = None
depends_on = None


def upgrade() -> None:
    """From the revision before to this one."""
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    """Back to the revision before; what only this one can hold is lost."""
    ${downgrades if downgrades else "pass"}
