"""How Alembic reaches our database, on its own command line and from ours.

The connection is, in this order:

- ``config.attributes["connection"]``, as the Alembic cookbook hands one over. It stays the
  caller's: on PostgreSQL in a READ COMMITTED transaction, so that a second upgrade, having
  waited for the first, sees what that one did;
- ``alembic -x database=URL``;
- the environment variable ``WSGI_IDEMPOTENCY_DATABASE``;
- ``sqlalchemy.url`` in the ini file, where a ``%`` is written ``%%``.
"""

from __future__ import annotations

import os
from logging.config import fileConfig

from alembic import context
from alembic.util import CommandError
from sqlalchemy import Connection

from wsgi_idempotency.errors import ConfigurationError
from wsgi_idempotency.schema import DATABASE_VARIABLE, POSTGRESQL_LOCK, connect, lock
from wsgi_idempotency.stores import tables
from wsgi_idempotency.stores.sql import database_url

config = context.config


def main() -> None:
    # Only Alembic's own command line has cmd_opts. Called from anywhere else, the logging
    # is the application's, and stays as it is.
    ini = config.config_file_name
    if (
        ini is not None
        and config.cmd_opts is not None
        and config.file_config.has_section("loggers")
    ):
        fileConfig(ini, disable_existing_loggers=False)
    connection = config.attributes.get("connection")
    if context.is_offline_mode():
        write_sql()
    elif connection is not None:
        migrate(connection)
    else:
        with connect(url()) as own:
            migrate(own)


def url() -> str:
    """The URL that was asked for, in the form and with the driver that we use."""
    found = (
        context.get_x_argument(as_dictionary=True).get("database")
        or os.environ.get(DATABASE_VARIABLE)
        or config.get_main_option("sqlalchemy.url")
    )
    if not found:
        raise CommandError(
            f"Which database? Give alembic -x database=URL, or set {DATABASE_VARIABLE}"
            " or sqlalchemy.url in alembic.ini."
        )
    try:
        return database_url(found).render_as_string(hide_password=False)
    except ConfigurationError as exc:
        raise CommandError(str(exc)) from exc


def migrate(connection: Connection) -> None:
    """Run the revisions that were asked for, all of them in one transaction."""
    context.configure(
        connection=connection,
        target_metadata=tables.metadata,
        version_table=tables.VERSION_TABLE,
        include_name=ours,
        # SQLite can; Alembic leaves it off because sqlite3 alone doesn't begin in time.
        transactional_ddl=True,
    )
    with context.begin_transaction():
        lock(connection)
        context.run_migrations()


def write_sql() -> None:
    """Print the statements for somebody else to run: ``alembic upgrade head --sql``."""
    context.configure(
        url=url(),
        target_metadata=tables.metadata,
        version_table=tables.VERSION_TABLE,
        literal_binds=True,
        transactional_ddl=True,
    )
    with context.begin_transaction():
        if context.get_context().dialect.name == "postgresql":
            context.execute(POSTGRESQL_LOCK)
        context.run_migrations()


def ours(name: str | None, type_: str, parent_names: object) -> bool:
    """The other side of :func:`~wsgi_idempotency.stores.tables.include_name`: in a database
    shared with an application, its tables are not ours to drop."""
    return type_ != "table" or name in tables.OUR_TABLES


main()
