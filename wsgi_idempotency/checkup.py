"""What ``wsgi-idempotency check`` looks at, and what it makes of it.

``read_*`` ask the database; ``judge_*`` are pure functions of what it said, so that every
rule can be read and tested alone.
"""

from __future__ import annotations

import enum
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, inspect
from sqlalchemy.exc import SQLAlchemyError

from wsgi_idempotency.schema import current_revision, newer_than_this_release
from wsgi_idempotency.stores.sql import _LITE_EXPIRED, _LITE_NOW, _PG_EXPIRED, SQLStore, _first_line
from wsgi_idempotency.stores.tables import SCHEMA_REVISION, VERSION_TABLE, idempotency_keys

#: Seconds the two clocks may differ before it is worth a word. No promise hangs on it.
CLOCK_TOLERANCE = 60.0

#: Seconds the oldest expired row may lie about before a purge seems to be missing.
PURGE_TOLERANCE = 24 * 3600.0

#: What the table is made with; revision 0001 has the measurement.
FILLFACTOR = 50

#: Dead rows that are no lag, however small the table is: autovacuum looks once a minute.
DEAD_TOLERANCE = 20_000

#: Rows that are counted, for a bar. Reading so many takes a second at the most.
COUNTED = 100_000

KEYS_TABLE = idempotency_keys.name

UPGRADE = "wsgi-idempotency upgrade"


class Verdict(enum.Enum):
    """What a finding means for the promises."""

    OK = "ok"
    WARNING = "warning"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    :param check: what it is, in a word or two.
    :param verdict: FAIL when a promise would be broken.
    :param found: how it is.
    :param advice: what to do about it; None when all is well.
    """

    check: str
    verdict: Verdict
    found: str
    advice: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgreSQLServer:
    """What a PostgreSQL server says of itself to the role that asks.

    :param clock_ahead: seconds its clock is ahead of this machine's.
    """

    version: str
    version_number: int
    in_recovery: bool
    read_only: str
    isolation: str
    synchronous_commit: str
    fsync: str
    full_page_writes: str
    encoding: str
    autovacuum: str
    clock_ahead: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgreSQLTable:
    """What a PostgreSQL server says of the table of keys.

    :param autovacuum_off: for this table.
    :param dead: rows that were deleted or replaced and still take up space.
    :param due_at: how many of them begin an autovacuum (PostgreSQL documentation, 25.1.6).
    :param vacuumed: seconds since it was last vacuumed, or None.
    """

    unlogged: bool
    autovacuum_off: bool
    fillfactor: int
    dead: int
    due_at: float
    vacuumed: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SQLiteFile:
    """What SQLite says of a file, on a connection as the store opens it."""

    version: str
    journal_mode: str
    synchronous: int


def check_database(url: URL) -> Iterator[Finding]:
    """Connect as the store does, look, and judge.

    Nothing is changed, except that an SQLite file is switched to WAL, as the store's first
    use would.

    :param url: as :func:`~wsgi_idempotency.stores.sql.database_url` returns it.
    :returns: findings as they are made. An error of the database is one, and the last.
    """
    postgresql = url.get_backend_name() == "postgresql"
    if not postgresql and not sqlite_file_exists(url):
        folder = Path(str(url.database)).absolute().parent
        yield judge_missing_file(str(url.database), os.access(folder, os.W_OK | os.X_OK))
        return
    if postgresql and "client_encoding" not in url.query:
        # Without it SQLAlchemy can't so much as connect where the server has SQL_ASCII.
        url = url.update_query_dict({"client_encoding": "utf8"})
    store = SQLStore(url, create=False)
    try:
        with store.engine.connect() as connection:
            yield from (check_postgresql if postgresql else check_sqlite)(connection)
    except SQLAlchemyError as exc:
        yield Finding("connection", Verdict.FAIL, reason(exc), connection_advice(url))
    finally:
        store.close()


def reason(exc: Exception) -> str:
    """An error in one line, in the driver's words, without the statement."""
    return _first_line(getattr(exc, "orig", None) or exc)


def connection_advice(url: URL) -> str:
    """What to look at when a database can't be used."""
    if url.get_backend_name() == "postgresql":
        return "Check that the server runs, and the URL's host, port, user, password and database"
    return "Check that the file and its folder can be written, and that nobody keeps it locked"


def check_schema(connection: Connection, made_on_first_use: bool) -> Iterator[Finding]:
    has_table = inspect(connection).has_table(KEYS_TABLE)
    yield judge_schema(current_revision(connection), has_table, made_on_first_use)
    if has_table:
        yield judge_backlog(oldest_expired(connection))


def judge(check: str, good: bool, found: str, otherwise: Verdict, advice: str) -> Finding:
    """A finding of one rule: OK, or else a verdict with its advice."""
    if good:
        return Finding(check, Verdict.OK, found)
    return Finding(check, otherwise, found, advice)


def judge_schema(revision: str | None, has_table: bool, made_on_first_use: bool) -> Finding:
    """Judge the schema.

    :param revision: what the version table says; None when it is missing or empty.
    :param has_table: whether the table of keys is there.
    :param made_on_first_use: the store makes by itself what is missing.
    """
    verdict, found, advice = Verdict.FAIL, revision or "missing", f"Run: {UPGRADE}"
    if revision is None:
        if made_on_first_use:
            verdict, advice = Verdict.WARNING, f"It is made on first use, or now by: {UPGRADE}"
        elif has_table:
            found = f"{KEYS_TABLE} is there, but its revision is not in {VERSION_TABLE}"
            advice = "If an application's own migrations make it, let them write it there"
    elif not has_table:
        found = f"{VERSION_TABLE} says {revision}, but {KEYS_TABLE} is missing"
        advice = f"Restore it; or, to begin anew, empty {VERSION_TABLE} and run: {UPGRADE}"
    elif not revision.isdigit():
        found = f"{revision!r} is not a revision of ours"
        advice = f"Find out what else writes to {VERSION_TABLE}"
    elif newer_than_this_release(revision):
        verdict = Verdict.WARNING
        found = f"{revision}, newer than the {SCHEMA_REVISION} that this release knows"
        advice = "Fine while hosts are upgraded one by one; then upgrade this one"
    elif int(revision) < int(SCHEMA_REVISION):
        found = f"{revision}, older than the {SCHEMA_REVISION} that this release needs"
    else:
        return Finding("schema", Verdict.OK, found)
    return Finding("schema", verdict, found, advice)


def oldest_expired(connection: Connection) -> float | None:
    """Seconds since the oldest row that a purge would delete expired; None without one.
    Index: ix_idempotency_keys_expires_at."""
    age, expired = (
        ("extract(epoch FROM now() - min(expires_at))::float8", _PG_EXPIRED)
        if connection.dialect.name == "postgresql"
        else (f"{_LITE_NOW} - min(expires_at)", _LITE_EXPIRED)
    )
    oldest: float | None = connection.exec_driver_sql(
        f"SELECT {age} FROM {KEYS_TABLE} WHERE {expired}"
    ).scalar()
    return oldest


def about_expired(connection: Connection, older_than: float = 0.0) -> int:
    """About how many rows a purge would delete. Index: ix_idempotency_keys_expires_at.

    More than :data:`COUNTED` are not counted, since each is looked at: PostgreSQL's planner
    is asked for its guess.

    :param older_than: seconds since they expired.
    """
    postgresql = connection.dialect.name == "postgresql"
    due, param = (
        (f"{_PG_EXPIRED} AND expires_at <= now() - make_interval(secs => %s)", float(older_than))
        if postgresql
        else (f"{_LITE_EXPIRED} AND expires_at <= {_LITE_NOW} - ?", older_than)
    )
    some = f"SELECT 1 FROM {KEYS_TABLE} WHERE {due}"
    count: int = connection.exec_driver_sql(
        f"SELECT count(*) FROM ({some} LIMIT {COUNTED if postgresql else -1}) AS due", (param,)
    ).scalar_one()
    if not postgresql or count < COUNTED:
        return count
    plan = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {some}", (param,)).scalar_one()
    return max(count, int(plan[0]["Plan"]["Plan Rows"]))


def judge_backlog(oldest: float | None) -> Finding:
    return judge(
        "expired rows",
        oldest is None or oldest <= PURGE_TOLERANCE,
        "none" if oldest is None else f"the oldest expired {span(oldest)} ago",
        Verdict.WARNING,
        "They do no harm, but take up space. Run every hour or so: wsgi-idempotency purge",
    )


def span(seconds: float) -> str:
    """A duration for people."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} seconds"


# ---------------------------------------------------------------------- PostgreSQL


def check_postgresql(connection: Connection) -> Iterator[Finding]:
    yield from judge_postgresql_server(read_postgresql_server(connection))
    yield check_pooler(connection)
    missing = missing_privileges(connection)
    yield judge_privileges(missing)
    if not missing:
        yield from check_schema(connection, made_on_first_use=False)
        table = read_postgresql_table(connection)
        if table is not None:
            yield from judge_postgresql_table(table)


def read_postgresql_server(connection: Connection) -> PostgreSQLServer:
    asked = time.time()
    row = connection.exec_driver_sql("""
        SELECT current_setting('server_version') AS version,
               current_setting('server_version_num')::int AS version_number,
               pg_is_in_recovery() AS in_recovery,
               current_setting('default_transaction_read_only') AS read_only,
               current_setting('default_transaction_isolation') AS isolation,
               current_setting('synchronous_commit') AS synchronous_commit,
               current_setting('fsync') AS fsync,
               current_setting('full_page_writes') AS full_page_writes,
               current_setting('server_encoding') AS encoding,
               current_setting('autovacuum') AS autovacuum,
               extract(epoch FROM clock_timestamp())::float8 AS clock_ahead
    """).one()
    # It looked at its clock somewhere between the question and the answer.
    clock_ahead = row.clock_ahead - (asked + time.time()) / 2
    return PostgreSQLServer(**(row._asdict() | {"clock_ahead": clock_ahead}))


def judge_postgresql_server(server: PostgreSQLServer) -> Iterator[Finding]:
    yield judge(
        "server",
        server.version_number >= 130000,
        f"PostgreSQL {server.version}",
        Verdict.FAIL,
        "Use PostgreSQL 13 or later",
    )
    yield judge(
        "primary",
        not server.in_recovery,
        "no: a standby, which takes no writes" if server.in_recovery else "yes",
        Verdict.FAIL,
        "Use the primary's address, or add target_session_attrs=read-write to the URL",
    )
    yield judge(
        "default_transaction_read_only",
        server.read_only == "off",
        server.read_only,
        Verdict.FAIL,
        "Run: ALTER ROLE ... SET default_transaction_read_only = off",
    )
    yield judge(
        "default_transaction_isolation",
        server.isolation == "read committed",
        server.isolation,
        Verdict.WARNING,
        "Claims that meet fail and are tried again more often."
        " Run: ALTER ROLE ... SET default_transaction_isolation = 'read committed'",
    )
    yield judge(
        "synchronous_commit",
        server.synchronous_commit != "off",
        server.synchronous_commit,
        Verdict.FAIL,
        "A crash of the server would forget operations that were answered."
        " Run: ALTER ROLE ... SET synchronous_commit = on",
    )
    for name, value in (("fsync", server.fsync), ("full_page_writes", server.full_page_writes)):
        yield judge(
            name,
            value == "on",
            value,
            Verdict.FAIL,
            "A power cut can lose what was recorded. Switch it on in postgresql.conf",
        )
    yield judge(
        "encoding",
        server.encoding == "UTF8",
        server.encoding,
        Verdict.FAIL,
        "Requests whose path or scope it can't write are refused."
        " Use a database made with ENCODING 'UTF8'",
    )
    yield judge(
        "autovacuum",
        server.autovacuum == "on",
        server.autovacuum,
        Verdict.WARNING,
        "The table grows with every purged row. Switch it on in postgresql.conf",
    )
    yield judge(
        "clock",
        abs(server.clock_ahead) <= CLOCK_TOLERANCE,
        f"{span(abs(server.clock_ahead))} {'ahead of' if server.clock_ahead > 0 else 'behind'}"
        " this machine's",
        Verdict.WARNING,
        "No promise hangs on it, only the server's clock counts; but logs won't agree."
        " Set both by NTP",
    )


def missing_privileges(connection: Connection) -> list[str]:
    """What the role may not do, as ``"DELETE on idempotency_keys"``. Of a table that is not
    there, nothing."""
    return [
        f"{privilege} on {table}"
        for table, privileges in (
            (VERSION_TABLE, ("SELECT",)),
            (KEYS_TABLE, ("SELECT", "INSERT", "UPDATE", "DELETE")),
        )
        for privilege in privileges
        if connection.exec_driver_sql(
            "SELECT NOT has_table_privilege(to_regclass(%s), %s)", (table, privilege)
        ).scalar()
    ]


def judge_privileges(missing: list[str]) -> Finding:
    return judge(
        "privileges",
        not missing,
        f"missing: {', '.join(missing)}" if missing else "granted",
        Verdict.FAIL,
        "Let the tables' owner GRANT them to this role",
    )


def read_postgresql_table(connection: Connection) -> PostgreSQLTable | None:
    """What the server says of the table; None where there is none."""
    row = connection.exec_driver_sql(
        """
        WITH option AS (
            SELECT option_name AS name, option_value AS value
            FROM pg_class, pg_options_to_table(reloptions) WHERE oid = to_regclass(%(table)s)
        )
        SELECT relpersistence = 'u' AS unlogged,
               EXISTS (SELECT FROM option
                       WHERE name = 'autovacuum_enabled' AND NOT value::bool) AS autovacuum_off,
               coalesce((SELECT value::int FROM option WHERE name = 'fillfactor'), 100)
                   AS fillfactor,
               coalesce(n_dead_tup, 0) AS dead,
               coalesce((SELECT value FROM option WHERE name = 'autovacuum_vacuum_threshold'),
                        current_setting('autovacuum_vacuum_threshold'))::float8
                   + coalesce((SELECT value FROM option
                               WHERE name = 'autovacuum_vacuum_scale_factor'),
                              current_setting('autovacuum_vacuum_scale_factor'))::float8
                     * greatest(reltuples, 0) AS due_at,
               extract(epoch FROM now() - greatest(last_vacuum, last_autovacuum))::float8
                   AS vacuumed
        FROM pg_class LEFT JOIN pg_stat_user_tables ON relid = oid
        WHERE oid = to_regclass(%(table)s)
        """,
        {"table": KEYS_TABLE},
    ).one_or_none()
    return None if row is None else PostgreSQLTable(**row._asdict())


def judge_postgresql_table(table: PostgreSQLTable) -> Iterator[Finding]:
    yield judge(
        "table",
        not table.unlogged,
        "unlogged" if table.unlogged else "logged",
        Verdict.FAIL,
        f"A crash of the server would empty it. Run: ALTER TABLE {KEYS_TABLE} SET LOGGED",
    )
    yield judge(
        "table's autovacuum",
        not table.autovacuum_off,
        "off" if table.autovacuum_off else "as the server's",
        Verdict.WARNING,
        f"It grows with every purged row. Run: ALTER TABLE {KEYS_TABLE} RESET (autovacuum_enabled)",
    )
    yield judge(
        "fillfactor",
        table.fillfactor <= FILLFACTOR,
        str(table.fillfactor),
        Verdict.WARNING,
        "Completions leave the claim's page, and both indexes grow."
        f" Run: ALTER TABLE {KEYS_TABLE} SET (fillfactor = {FILLFACTOR})",
    )
    vacuumed = "never" if table.vacuumed is None else f"{span(table.vacuumed)} ago"
    yield judge(
        "autovacuum's lag",
        table.dead <= max(2 * table.due_at, DEAD_TOLERANCE),
        f"{table.dead} dead rows; vacuumed {vacuumed}",
        Verdict.WARNING,
        f"Autovacuum was due at {table.due_at:.0f} and doesn't keep up. Look for transactions that"
        " never end (pg_stat_activity), give autovacuum more workers or"
        f" autovacuum_vacuum_cost_limit, and run: VACUUM {KEYS_TABLE}",
    )


def check_pooler(connection: Connection) -> Finding:
    """See a pooler by its telling another backend's number than the backend does."""
    driver: Any = connection.connection.driver_connection
    # In one transaction, which a pooler gives one connection of the server's.
    with driver.transaction():
        (backend,) = driver.execute("SELECT pg_backend_pid()", prepare=False).fetchone()
        if backend == driver.info.backend_pid:
            return judge_pooler(False, carried=True)
        mark = f"/* {os.urandom(8).hex()} */"
        driver.execute(f"SELECT 1 {mark}", prepare=True)
        (name,) = driver.execute(
            "SELECT name FROM pg_prepared_statements WHERE statement LIKE %s",
            (f"%{mark}%",),
            prepare=False,
        ).fetchone()
        carried = name.startswith("PGBOUNCER_")
        # The name of one that it carries is its own, and not ours to drop.
        driver.execute("SELECT 1" if carried else f'DEALLOCATE "{name}"', prepare=False)
    return judge_pooler(True, carried=carried)


def judge_pooler(pooler: bool, carried: bool) -> Finding:
    """Judge what is between us and the server.

    :param carried: prepared statements have names of PgBouncer's, as those have that it
        carries from connection to connection.
    """
    if not pooler:
        return Finding("pooler", Verdict.OK, "none")
    return judge(
        "pooler",
        carried,
        "one that carries prepared statements over" if carried else "there is one",
        Verdict.WARNING,
        "Fine in session mode. In transaction mode use PgBouncer 1.21 or later and set its"
        " max_prepared_statements, or use SQLStore(url, prepare=False)",
    )


# ---------------------------------------------------------------------- SQLite


def check_sqlite(connection: Connection) -> Iterator[Finding]:
    yield from judge_sqlite_file(read_sqlite_file(connection))
    # Raises where the file is read-only, which BEGIN alone doesn't, or somebody keeps it locked.
    connection.exec_driver_sql("BEGIN IMMEDIATE")
    connection.exec_driver_sql("CREATE TABLE wsgi_idempotency_check (id INTEGER)")
    connection.exec_driver_sql("ROLLBACK")
    yield Finding("writable", Verdict.OK, "yes")
    yield from check_schema(connection, made_on_first_use=True)


def sqlite_file_exists(url: URL) -> bool:
    """Whether there is a file to connect to, which connecting would make. SQLite alone can
    tell for a ``file:`` URI."""
    name = str(url.database)
    return name.startswith("file:") or Path(name).exists()


def judge_missing_file(name: str, folder_writable: bool) -> Finding:
    if folder_writable:
        advice = f"It is made on first use, or now by: {UPGRADE}"
        return Finding("file", Verdict.WARNING, f"{name} doesn't exist yet", advice)
    advice = "Make its folder, and let this user write there"
    return Finding("file", Verdict.FAIL, f"{name} doesn't exist and can't be made", advice)


def read_sqlite_file(connection: Connection) -> SQLiteFile:
    return SQLiteFile(
        version=connection.exec_driver_sql("SELECT sqlite_version()").scalar_one(),
        journal_mode=connection.exec_driver_sql("PRAGMA journal_mode").scalar_one(),
        synchronous=connection.exec_driver_sql("PRAGMA synchronous").scalar_one(),
    )


def judge_sqlite_file(file: SQLiteFile) -> Iterator[Finding]:
    yield judge(
        "library",
        tuple(int(part) for part in file.version.split(".")) >= (3, 24),
        f"SQLite {file.version}",
        Verdict.FAIL,
        "Use a Python with SQLite 3.24 or later, which has ON CONFLICT",
    )
    yield judge(
        "journal_mode",
        file.journal_mode == "wal",
        file.journal_mode,
        Verdict.WARNING,
        "Without WAL, replays wait for claims."
        " Keep the file on a local disk, and vfs= out of the URL",
    )
    yield judge(
        "synchronous",
        file.synchronous >= 2,
        ("off", "normal", "full", "extra")[file.synchronous],
        Verdict.FAIL,
        "A power cut can lose what was recorded. Use FULL",
    )
