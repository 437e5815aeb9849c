"""Bring the tables of a database up to this release: what ``wsgi-idempotency upgrade`` does.

SQLAlchemy and Alembic are imported when a function needs them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wsgi_idempotency.errors import SchemaError

if TYPE_CHECKING:
    from sqlalchemy import URL, Connection

#: The environment variable that names the database to every command.
DATABASE_VARIABLE = "WSGI_IDEMPOTENCY_DATABASE"

#: One upgrade at a time in a database. The lock is the transaction's, not the session's, so
#: that it works behind PgBouncer in transaction mode and goes with a connection that dies
#: (PostgreSQL documentation, 13.3.5).
POSTGRESQL_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('wsgi_idempotency.migrations', 0))"

# Alembic keeps its context in globals: upgrades of two databases on two threads would each
# send statements to the other's.
_one_at_a_time = threading.Lock()


@dataclass(frozen=True, slots=True)
class Upgrade:
    """What an upgrade found and left.

    :param before: the schema's revision, ``"0001"``; None when there was no schema.
    :param after: the revision afterwards.
    """

    before: str | None
    after: str | None


def upgrade(database: str | URL, revision: str = "head") -> Upgrade:
    """Create the tables of a database, or bring them up to this release.

    Doing it twice, or on several machines at once, is fine: one waits for the other and
    finds nothing left to do. It is one transaction: it happens as a whole or not at all.

    :param database: ``postgresql+psycopg://...`` or ``sqlite:///file``, which is made.
    :param revision: how far; ``"head"`` is what this release needs.
    :raises ConfigurationError: the URL is not one of PostgreSQL or SQLite.
    :raises SchemaError: the table is there, but nothing says at which revision.
    :raises sqlalchemy.exc.SQLAlchemyError: the database refused.
    :raises alembic.util.CommandError: there is no such revision.
    """
    with connect(database) as connection, connection.begin():
        return upgrade_connection(connection, revision)


def upgrade_connection(connection: Connection, revision: str = "head") -> Upgrade:
    """As :func:`upgrade`, in the transaction that a connection is in.

    It neither commits nor rolls back. On PostgreSQL the transaction must be READ
    COMMITTED: one that waited for another upgrade has to see what that one did.

    :param connection: an :class:`sqlalchemy.engine.Connection` with ``begin()`` called.
    :param revision: how far; ``"head"`` is what this release needs.
    :raises SchemaError: the table is there, but nothing says at which revision.
    """
    from alembic import command
    from alembic.config import Config
    from sqlalchemy import inspect

    from wsgi_idempotency.stores.tables import VERSION_TABLE, idempotency_keys

    lock(connection)
    before = current_revision(connection)
    if newer_than_this_release(before):
        # Hosts are upgraded one by one: this one runs the older release, which works on
        # the newer schema and knows nothing to add to it.
        return Upgrade(before, before)
    if before is None and inspect(connection).has_table(idempotency_keys.name):
        raise SchemaError(
            f"{idempotency_keys.name} is there, but its revision is not in {VERSION_TABLE}."
            " If an application's own migrations make it, let them write it there"
        )
    config = Config()
    config.set_main_option("script_location", "wsgi_idempotency.migrations:")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    with _one_at_a_time:
        command.upgrade(config, revision)
    return Upgrade(before, current_revision(connection))


def current_revision(connection: Connection) -> str | None:
    """Read the revision a schema is at; None when there is no schema of ours."""
    from sqlalchemy import inspect, select

    from wsgi_idempotency.stores.tables import VERSION_TABLE, version_table

    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    found: str | None = connection.scalar(select(version_table.c.version_num))
    return found


def newer_than_this_release(revision: str | None) -> bool:
    """Whether a revision was made by a later release than this one."""
    from wsgi_idempotency.stores.tables import SCHEMA_REVISION

    return revision is not None and revision.isdigit() and int(revision) > int(SCHEMA_REVISION)


def lock(connection: Connection) -> None:
    """Wait until no other upgrade of the database is under way, and keep others out until
    the transaction ends."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(POSTGRESQL_LOCK)
    elif not connection.connection.driver_connection.in_transaction:  # type: ignore[union-attr]
        # The write lock before the first look: whoever has read first is refused it at once
        # when another has written since, however long it would wait (SQLite,
        # "Transactions", 2.1).
        connection.exec_driver_sql("BEGIN IMMEDIATE")


@contextmanager
def connect(database: str | URL) -> Iterator[Connection]:
    """Open one connection for a change of the schema, and close it.

    :param database: ``postgresql+psycopg://...`` or ``sqlite:///file``.
    :raises ConfigurationError: the URL is not one of PostgreSQL or SQLite.
    :raises sqlalchemy.exc.SQLAlchemyError: the database can't be reached.
    """
    from sqlalchemy import NullPool, create_engine

    from wsgi_idempotency.stores.sql import database_url

    url = database_url(database)
    if url.get_backend_name() == "postgresql":
        # Without an encoding SQLAlchemy can't so much as connect where it is SQL_ASCII.
        defaults = {"connect_timeout": 10, "client_encoding": "utf8"}  # seconds
        engine = create_engine(
            url,
            poolclass=NullPool,
            isolation_level="READ COMMITTED",
            use_native_hstore=False,
            connect_args={k: v for k, v in defaults.items() if k not in url.query},
        )
    else:
        engine = create_engine(url, poolclass=NullPool, connect_args={"timeout": 30.0})  # seconds
    with engine.connect() as connection:
        yield connection
