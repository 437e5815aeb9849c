"""Create the table of resolutions: who decided what about an operation, when, and why.

``idempotency_keys`` stays as it is, so that processes of the previous release, which know
nothing of this table, go on serving while hosts are upgraded one by one.

There is one row for each decision of a person or a reconciler, so its index costs nothing that
matters; ``show`` asks by the digest.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

Timestamp = sa.TIMESTAMP(timezone=True).with_variant(sa.Float(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "idempotency_resolutions",
        sa.Column("id", sa.LargeBinary(16), nullable=False),
        sa.Column("resolved_at", Timestamp, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("key_digest", sa.LargeBinary(32), nullable=False),
        sa.Column("scope", sa.Text, nullable=False),
        sa.Column("idempotency_key", sa.Text, nullable=False),
        sa.Column("method", sa.Text, nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("response_status", sa.Text),
        sa.PrimaryKeyConstraint("id", name="pk_idempotency_resolutions"),
        sa.CheckConstraint("length(id) = 16", name="ck_idempotency_resolutions_id"),
        sa.CheckConstraint(
            "action IN ('forget', 'release', 'complete')",
            name="ck_idempotency_resolutions_action",
        ),
        sa.CheckConstraint(
            "(action = 'complete') = (response_status IS NOT NULL)",
            name="ck_idempotency_resolutions_completed",
        ),
    )
    op.create_index(
        "ix_idempotency_resolutions_key_digest", "idempotency_resolutions", ["key_digest"]
    )


def downgrade() -> None:
    op.drop_index("ix_idempotency_resolutions_key_digest", table_name="idempotency_resolutions")
    op.drop_table("idempotency_resolutions")
