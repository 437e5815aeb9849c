"""The schema as SQLAlchemy sees it: names, types, constraints.

Alembic's revisions in ``migrations/`` create it; a test keeps the two equal.
"""

from __future__ import annotations

from sqlalchemy import (
    DDL,
    TIMESTAMP,
    CheckConstraint,
    Column,
    Float,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    String,
    Table,
    Text,
    event,
)

#: The Alembic revision this release needs. Revisions are numbered, so that a newer
#: schema, seen while hosts are upgraded one by one, can be told from an older one.
SCHEMA_REVISION = "0003"

#: Our own version table: an application's Alembic has its own, and neither sees the other's.
VERSION_TABLE = "wsgi_idempotency_version"

metadata = MetaData()

#: The database's own clock: ``timestamptz`` on PostgreSQL; on SQLite, which has no such
#: type, seconds since 1970-01-01 UTC.
Timestamp = TIMESTAMP(timezone=True).with_variant(Float(), "sqlite")

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    # Fixed-width columns first: PostgreSQL aligns each on its own size, and text
    # between them would cost padding in every row.
    Column("created_at", Timestamp, nullable=False),
    Column("lease_until", Timestamp, nullable=False),
    Column("expires_at", Timestamp, nullable=False),
    Column("completed_at", Timestamp),
    Column("attempt", Integer, nullable=False),
    Column("fingerprint_version", SmallInteger, nullable=False),
    Column("key_digest", LargeBinary(32), nullable=False),
    Column("claim_token", LargeBinary(16), nullable=False),
    Column("fingerprint", LargeBinary, nullable=False),
    Column("state", Text, nullable=False),
    Column("lapse", Text, nullable=False),
    Column("scope", Text, nullable=False),
    Column("idempotency_key", Text, nullable=False),
    Column("method", Text, nullable=False),
    Column("path", Text, nullable=False),
    Column("response_status", Text),
    Column("response_headers", Text),
    Column("not_replayable", Text),
    Column("response_body", LargeBinary),
    # Null but for a few, and null costs nothing.
    Column("effects_at", Timestamp),
    PrimaryKeyConstraint("key_digest", name="pk_idempotency_keys"),
    CheckConstraint("length(key_digest) = 32", name="ck_idempotency_keys_key_digest"),
    CheckConstraint("length(claim_token) = 16", name="ck_idempotency_keys_claim_token"),
    CheckConstraint("attempt >= 1", name="ck_idempotency_keys_attempt"),
    CheckConstraint(
        "state IN ('claimed', 'released', 'held', 'completed')",
        name="ck_idempotency_keys_state",
    ),
    CheckConstraint("lapse IN ('release', 'hold')", name="ck_idempotency_keys_lapse"),
    CheckConstraint(
        "state <> 'completed' OR (response_status IS NOT NULL AND completed_at IS NOT NULL"
        " AND (response_body IS NULL) <> (not_replayable IS NULL))",
        name="ck_idempotency_keys_completed",
    ),
)

Index("ix_idempotency_keys_expires_at", idempotency_keys.c.expires_at)

# Room on a claim's page for its completion, which then touches no index; revision 0001 has
# the measurement. A statement, since SQLAlchemy 2.0 has no option for it on a table.
_leave_room = DDL("ALTER TABLE idempotency_keys SET (fillfactor = 50)")  # type: ignore[no-untyped-call]
event.listen(idempotency_keys, "after_create", _leave_room.execute_if(dialect="postgresql"))

#: What an operation has done so far of what it does in steps. ``operation_at`` is the
#: ``created_at`` of the operation's row: an expired row that is claimed anew is another
#: operation's, which has none of them.
idempotency_steps = Table(
    "idempotency_steps",
    metadata,
    Column("created_at", Timestamp, nullable=False),
    Column("operation_at", Timestamp, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("key_digest", LargeBinary(32), nullable=False),
    Column("name", Text, nullable=False),
    Column("result", Text, nullable=False),
    PrimaryKeyConstraint("key_digest", "name", name="pk_idempotency_steps"),
    ForeignKeyConstraint(
        ["key_digest"],
        ["idempotency_keys.key_digest"],
        name="fk_idempotency_steps_key_digest",
        ondelete="CASCADE",
    ),
)

#: Who decided what about an operation whose outcome was unknown. ``id`` is also the token
#: that the operation's row was given, so that whoever held its claim is fenced off.
idempotency_resolutions = Table(
    "idempotency_resolutions",
    metadata,
    Column("id", LargeBinary(16), nullable=False),
    Column("resolved_at", Timestamp, nullable=False),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("key_digest", LargeBinary(32), nullable=False),
    Column("scope", Text, nullable=False),
    Column("idempotency_key", Text, nullable=False),
    Column("method", Text, nullable=False),
    Column("path", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("response_status", Text),
    PrimaryKeyConstraint("id", name="pk_idempotency_resolutions"),
    CheckConstraint("length(id) = 16", name="ck_idempotency_resolutions_id"),
    CheckConstraint(
        "action IN ('forget', 'release', 'complete')",
        name="ck_idempotency_resolutions_action",
    ),
    CheckConstraint(
        "(action = 'complete') = (response_status IS NOT NULL)",
        name="ck_idempotency_resolutions_completed",
    ),
)

Index("ix_idempotency_resolutions_key_digest", idempotency_resolutions.c.key_digest)

version_table = Table(
    VERSION_TABLE,
    MetaData(),
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name=f"{VERSION_TABLE}_pkc"),
)


def include_name(name: str | None, type_: str, parent_names: object = None) -> bool:
    """Keep our tables out of an application's own Alembic autogeneration.

    Pass it as ``include_name`` to ``context.configure`` in the application's ``env.py``,
    so that autogenerate doesn't see our tables as ones to drop.

    :param name: the name of the object Alembic has reflected.
    :param type_: ``"table"``, ``"schema"``, ``"index"`` and so on.
    :param parent_names: unused; Alembic passes it.
    :returns: False for a table of ours, True for everything else.
    """
    return not (type_ == "table" and name in OUR_TABLES)


OUR_TABLES = frozenset({*metadata.tables, VERSION_TABLE})
