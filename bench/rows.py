"""A PostgreSQL with as many rows of ours as a measurement wants.

Ten million rows, with their indexes, are loaded in a few minutes: into an emptied table and
in the transaction that emptied it, which under ``wal_level = minimal`` writes no WAL
(PostgreSQL documentation, 14.4.7), and without fsync, which is on again for what follows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg import sql
from servers.postgres import ORIGIN_VARIABLE, PostgresServer, database_of
from sqlalchemy.engine import make_url

from wsgi_idempotency.schema import upgrade

_SETTINGS = {
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "shared_buffers": "1GB",
    "max_wal_size": "4GB",
    "maintenance_work_mem": "512MB",
    "checkpoint_timeout": "15min",
    # A measurement is of what it runs, not of what autovacuum happens to do meanwhile.
    "autovacuum": "off",
}

# The foreign keys of other tables, which go with the primary key.
_REFERENCES = """
SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
WHERE confrelid = 'idempotency_keys'::regclass AND contype = 'f'"""

# Digests in no order, as real ones are: neighbours in the table are far apart in the index.
_INSERT = """
INSERT INTO idempotency_keys (
    created_at, lease_until, expires_at, completed_at, attempt, fingerprint_version, key_digest,
    claim_token, fingerprint, state, lapse, scope, idempotency_key, method, path,
    response_status, response_headers, response_body)
SELECT
    at - make_interval(secs => {retention}), at - make_interval(secs => {retention} - 60), at,
    at - make_interval(secs => {retention}), 1, 1, digest, substr(digest, 1, 16), digest,
    'completed', 'release', 'header:tenant=' || number % {scopes}, 'key-' || number, 'POST',
    '/payments', '201 Created', '[["Content-Type","application/json"]]', {body}
FROM (
    SELECT number, sha256(int8send(number)) AS digest,
        now() + make_interval(secs => {retention} * (number - {expired}) / {span}) AS at
    FROM generate_series(1, {count}) AS number
) AS numbered"""


def load(
    url: str,
    count: int,
    *,
    expired: int = 0,
    body: int = 50,  # bytes
    scopes: int = 1,
    retention: float = 86400.0,  # seconds
) -> None:
    """Replace what is in the table by completed rows.

    :param url: a database that has the schema.
    :param count: how many rows.
    :param expired: how many of them are past their retention, the longest expired first.
    :param body: bytes of a response; what compression makes of them is one byte's repetition.
    :param scopes: how many there are among which the rows are dealt out.
    :param retention: from a row's claim to its end; expiries are evenly spread, up to one
        retention ahead of now or behind it.
    """
    conninfo = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(conninfo, autocommit=True) as connection:
        with connection.transaction():
            connection.execute("TRUNCATE idempotency_keys CASCADE")
            # Built at the end, an index is sorted once instead of searched for each row.
            references = connection.execute(_REFERENCES).fetchall()
            connection.execute(
                "ALTER TABLE idempotency_keys DROP CONSTRAINT pk_idempotency_keys CASCADE"
            )
            connection.execute("DROP INDEX ix_idempotency_keys_expires_at")
            connection.execute(
                sql.SQL(_INSERT).format(
                    count=count,
                    expired=expired,
                    span=max(expired, count - expired, 1),
                    scopes=scopes,
                    retention=retention,
                    body=sql.SQL("convert_to(repeat('x', {}), 'UTF8')").format(body),
                )
            )
            connection.execute(
                "ALTER TABLE idempotency_keys"
                " ADD CONSTRAINT pk_idempotency_keys PRIMARY KEY (key_digest)"
            )
            connection.execute(
                "CREATE INDEX ix_idempotency_keys_expires_at ON idempotency_keys (expires_at)"
            )
            for table, name, definition in references:
                connection.execute(
                    sql.SQL("ALTER TABLE {} ADD CONSTRAINT {} {}").format(
                        sql.Identifier(table), sql.Identifier(name), sql.SQL(definition)
                    )
                )
        connection.execute("VACUUM ANALYZE idempotency_keys")


@contextmanager
def measured_server() -> Iterator[PostgresServer]:
    """A private server that commits durably, except within :func:`loading`."""
    server = PostgresServer(origin=os.environ.get(ORIGIN_VARIABLE) or None, durable=True)
    try:
        for name, value in _SETTINGS.items():
            server.execute(_set(name, value))
        server.restart()
        yield server
    finally:
        server.close()


@contextmanager
def loading(server: PostgresServer) -> Iterator[None]:
    """No fsync within; afterwards everything is on the disk and fsync is on again."""
    _fsync(server, "off")
    try:
        yield
    finally:
        server.execute("CHECKPOINT")
        os.sync()  # what the server wrote meanwhile, it will not ask for again
        _fsync(server, "on")


def database_with(server: PostgresServer, count: int, **how: int | float) -> str:
    """A new database with our schema and so many rows; :func:`load` says how."""
    url = server.create_database()
    upgrade(url)
    with loading(server):
        load(url, count, **how)  # type: ignore[arg-type]
    return url


def size(server: PostgresServer, url: str) -> dict[str, int]:
    """Bytes of the table and of its indexes."""
    ((table, indexes),) = server.execute(
        "SELECT pg_table_size('idempotency_keys'), pg_indexes_size('idempotency_keys')",
        database_of(url),
    )
    return {"table": table, "indexes": indexes}


def _fsync(server: PostgresServer, setting: str) -> None:
    for name in ("fsync", "full_page_writes"):
        server.execute(_set(name, setting))
    server.execute("SELECT pg_reload_conf()")
    with server.connect() as connection:
        while connection.execute("SELECT current_setting('fsync')").fetchone() != (setting,):
            pass  # the postmaster has been told, and tells each backend


def _set(name: str, value: str) -> sql.Composed:
    return sql.SQL("ALTER SYSTEM SET {} = {}").format(sql.Identifier(name), value)
