"""Create the table of idempotency keys.

Written out, not taken from ``stores/tables.py``: that file moves on, and what this revision
made stays what it is. A test keeps the last revision and that file equal.

Fixed-width columns stand first, so that no row is padded between them: 247 bytes for a claim
and 273 once completed with one byte of body, against 248 and 280 with the key first.

``fillfactor`` leaves room on a claim's page for its completion, which then stays a heap-only
update: no new entries in either index (PostgreSQL documentation, "Heap-Only Tuples"). Measured
on PostgreSQL 15: 8 connections with 4 claims in flight each, 6,000 to 8,000 operations, JSON
bodies of 1 KB; the bytes of a row are those of heap and indexes.

==========  ================  ==============  =============
fillfactor  heap-only         bytes a row     WAL bytes an
            completions                       operation
==========  ================  ==============  =============
100         58 %              1769            2284
90          66 %              1779            2220
80          73 %              1772            2206
70          86 %              1762            2164
60          92 %              1854            2157
50          99 %              2043            2127
30          99 %              2786            2186
==========  ================  ==============  =============

With 50, bodies of 200 bytes are completed heap-only in 99.9 % and of 4 KB (compressed by TOAST)
in 88 % of operations, against 83 % and 54 % with 100.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

Timestamp = sa.TIMESTAMP(timezone=True).with_variant(sa.Float(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "idempotency_keys",
        sa.Column("created_at", Timestamp, nullable=False),
        sa.Column("lease_until", Timestamp, nullable=False),
        sa.Column("expires_at", Timestamp, nullable=False),
        sa.Column("completed_at", Timestamp),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("fingerprint_version", sa.SmallInteger, nullable=False),
        sa.Column("key_digest", sa.LargeBinary(32), nullable=False),
        sa.Column("claim_token", sa.LargeBinary(16), nullable=False),
        sa.Column("fingerprint", sa.LargeBinary, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("lapse", sa.Text, nullable=False),
        sa.Column("scope", sa.Text, nullable=False),
        sa.Column("idempotency_key", sa.Text, nullable=False),
        sa.Column("method", sa.Text, nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("response_status", sa.Text),
        sa.Column("response_headers", sa.Text),
        sa.Column("not_replayable", sa.Text),
        sa.Column("response_body", sa.LargeBinary),
        sa.PrimaryKeyConstraint("key_digest", name="pk_idempotency_keys"),
        sa.CheckConstraint("length(key_digest) = 32", name="ck_idempotency_keys_key_digest"),
        sa.CheckConstraint("length(claim_token) = 16", name="ck_idempotency_keys_claim_token"),
        sa.CheckConstraint("attempt >= 1", name="ck_idempotency_keys_attempt"),
        sa.CheckConstraint(
            "state IN ('claimed', 'released', 'held', 'completed')",
            name="ck_idempotency_keys_state",
        ),
        sa.CheckConstraint("lapse IN ('release', 'hold')", name="ck_idempotency_keys_lapse"),
        sa.CheckConstraint(
            "state <> 'completed' OR (response_status IS NOT NULL AND completed_at IS NOT NULL"
            " AND (response_body IS NULL) <> (not_replayable IS NULL))",
            name="ck_idempotency_keys_completed",
        ),
    )
    op.create_index("ix_idempotency_keys_expires_at", "idempotency_keys", ["expires_at"])
    if op.get_context().dialect.name == "postgresql":
        op.execute("ALTER TABLE idempotency_keys SET (fillfactor = 50)")


def downgrade() -> None:
    op.drop_index("ix_idempotency_keys_expires_at", table_name="idempotency_keys")
    op.drop_table("idempotency_keys")
