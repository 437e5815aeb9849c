"""What is SQLStore's alone: engines it is given, URLs it shows, statements that take too long."""

from __future__ import annotations

import dataclasses
import enum
import os
import re
import signal
import sqlite3
import sys
import threading
import time
import uuid
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
import sqlalchemy
from sqlalchemy.pool import StaticPool
from werkzeug.test import Client

from wsgi_idempotency import IdempotencyMiddleware, Policy, SQLStore, current_operation
from wsgi_idempotency.errors import (
    AnswerLost,
    ConfigurationError,
    NotStorable,
    SchemaError,
    StoreError,
    StoreUnavailable,
)
from wsgi_idempotency.records import Claim, Claimed, Completion, Record, Step
from wsgi_idempotency.stores import psycopg3
from wsgi_idempotency.stores.psycopg3 import execute as execute_straight
from wsgi_idempotency.stores.sql import database_url, shown
from wsgi_idempotency.testing import make_claim

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment


def new_claim() -> Claim:
    return make_claim(str(uuid.uuid4()))


def libpq(url: str) -> str:
    return url.replace("postgresql+psycopg://", "postgresql://")


def test_a_statement_that_times_out_leaves_no_backend_waiting(pg_database: str) -> None:
    """Others need the server's connections, and the statement must not run later."""
    store = SQLStore(pg_database, timeout=1.0, pool_size=2)
    store.check()
    claim = new_claim()
    lost: list[AnswerLost] = []

    def claim_in_vain() -> None:
        try:
            store.claim(claim)
        except AnswerLost as exc:
            lost.append(exc)

    with psycopg.connect(libpq(pg_database)) as lock, lock.transaction():
        lock.execute("LOCK TABLE idempotency_keys IN ACCESS EXCLUSIVE MODE")
        threads = [threading.Thread(target=claim_in_vain) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with psycopg.connect(libpq(pg_database), autocommit=True) as other:
            # A backend that was told to give up needs a moment; one that was not has none here.
            deadline = time.monotonic() + 10
            while waiting := other.execute(
                "SELECT pid FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event_type = 'Lock'"
            ).fetchall():
                assert time.monotonic() < deadline, waiting
    assert len(lost) == 2
    assert store.lookup(claim.digest) is None
    store.close()


def test_a_given_engine_s_connections_stay_the_application_s(pg_database: str) -> None:
    """A handler that holds them all must not keep the heartbeat from renewing its claim."""
    engine = sqlalchemy.create_engine(pg_database, pool_size=1, max_overflow=0, pool_timeout=1)
    store = SQLStore(engine)
    claim = new_claim()
    with engine.begin() as held:
        assert held.exec_driver_sql("SELECT 1").scalar() == 1
        assert store.claim(claim) == Claimed(attempt=1)
        assert store.renew([(claim.digest, claim.token, 60.0)]) == {claim.token}
        assert engine.pool.checkedout() == 1
    store.close()
    engine.dispose()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sqlite3 has autocommit since Python 3.12")
@pytest.mark.parametrize("autocommit", [True, False])
def test_a_given_engine_may_use_sqlite3_s_autocommit(sqlite_url: str, autocommit: bool) -> None:
    """Whatever commit() then does on its own connections, ours commit what we tell them to."""
    engine = sqlalchemy.create_engine(sqlite_url, connect_args={"autocommit": autocommit})
    store, other = SQLStore(engine), SQLStore(sqlite_url)
    claim = new_claim()
    assert store.claim(claim) == Claimed(attempt=1)
    assert isinstance(other.claim(dataclasses.replace(claim, token=bytes(16))), Record)

    for keeps in (False, True):
        claim = new_claim()
        transaction = store.begin(claim)
        assert transaction is not None
        transaction.connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS kept (id int)")
        if keeps:
            transaction.complete(Completion("200 OK", (), b"", None))
        else:
            transaction.rollback()
        assert (other.lookup(claim.digest) is not None) is keeps
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT * FROM kept").all() == []
        driver = connection.connection.driver_connection
        assert driver is not None
        assert driver.autocommit is autocommit
    store.close()
    other.close()
    engine.dispose()


def test_an_engine_of_another_driver_is_refused() -> None:
    engine = sqlalchemy.create_engine("postgresql+psycopg_async://host/name")
    with pytest.raises(ConfigurationError, match="psycopg_async; use one for"):
        SQLStore(engine)


def test_an_engine_with_one_connection_for_all_is_refused(tmp_path) -> None:
    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path}/a.db", poolclass=StaticPool)
    with pytest.raises(ConfigurationError, match="one connection for all"):
        SQLStore(engine)


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file::memory:?uri=true",
        "sqlite:///file:x?mode=memory&uri=true",
    ],
)
def test_a_database_in_memory_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="memory:"):
        database_url(url)


def test_no_password_is_shown_wherever_the_url_has_it() -> None:
    url = "postgresql://u:s3cret@h/db?password=s3cret&sslpassword=s3cret&application_name=x"
    store = SQLStore(url)
    assert "s3cret" not in repr(store)
    assert "application_name=x" in shown(store.url)


def raise_on(
    url: str,
    event: str,
    sqlstate: str | None,
    message: str = "refused",
    table: str = "idempotency_keys",
    times: int | None = None,
) -> None:
    """Let the database refuse an event with a SQLSTATE, or ignore it silently.

    :param times: how often, before it lets the event pass; None for always.
    """
    what = "RETURN NULL" if sqlstate is None else f"RAISE '{message}' USING ERRCODE = '{sqlstate}'"
    if times is not None:
        # A sequence isn't rolled back.
        what = f"IF nextval('refusals') <= {times} THEN {what}; END IF; RETURN NEW"
    with psycopg.connect(libpq(url), autocommit=True) as connection:
        connection.execute("CREATE SEQUENCE IF NOT EXISTS refusals")
        connection.execute(
            "CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
            f" $$ BEGIN {what}; END $$"
        )
        connection.execute(
            f"DROP TRIGGER IF EXISTS refuse ON {table};"
            f" CREATE TRIGGER refuse BEFORE {event} ON {table}"
            " FOR EACH ROW EXECUTE FUNCTION refuse()"
        )


def execute(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(statement)
    connection.close()


@pytest.mark.parametrize("sqlstate", ["40001", "40P01", None])
def test_a_claim_that_never_gets_a_stable_answer_is_not_granted(pg_database, sqlstate):
    store = SQLStore(pg_database)
    raise_on(pg_database, "INSERT", sqlstate)
    with pytest.raises(StoreError, match="no stable answer") as failed:
        store.claim(new_claim())
    assert not isinstance(failed.value, StoreUnavailable), "nobody is let pass unprotected"
    store.close()


def test_a_claim_that_sqlite_ignores_is_not_granted(tmp_path):
    store = SQLStore(f"sqlite:///{tmp_path}/keys.db")
    store.check()
    execute(
        tmp_path / "keys.db",
        "CREATE TRIGGER refuse BEFORE INSERT ON idempotency_keys BEGIN SELECT RAISE(IGNORE); END",
    )
    with pytest.raises(StoreError, match="no stable answer"):
        store.claim(new_claim())
    store.close()


def released(store: SQLStore) -> tuple[Claim, Record]:
    claim = new_claim()
    store.claim(claim)
    store.release(claim.digest, claim.token)
    seen = store.lookup(claim.digest)
    assert seen is not None
    return dataclasses.replace(claim, token=os.urandom(16)), seen


def test_a_take_over_that_can_not_be_serialized_is_somebody_else_s(pg_database):
    store = SQLStore(pg_database)
    claim, seen = released(store)
    raise_on(pg_database, "UPDATE", "40001")
    assert store.take_over(claim, seen) is None
    raise_on(pg_database, "UPDATE", "P0001")
    with pytest.raises(StoreUnavailable, match="refused"):
        store.take_over(claim, seen)
    store.close()


@pytest.mark.parametrize("sqlstate", ["40001", "40P01"])
def test_a_step_that_can_not_be_serialized_is_recorded_at_the_next_try(pg_database, sqlstate):
    """It has run, and must not run again for that."""
    store, claim = SQLStore(pg_database), new_claim()
    store.claim(claim)
    raise_on(pg_database, "INSERT", sqlstate, table="idempotency_steps", times=1)
    assert store.record_step(claim.digest, claim.token, "charge", '"ch_1"') is True
    assert store.step(claim.digest, claim.token, "charge") == Step('"ch_1"')
    store.close()


@pytest.mark.parametrize(
    ("sqlstate", "said"), [("40001", "no stable answer"), ("P0001", "refused")]
)
def test_a_step_that_is_refused_is_not_said_to_be_recorded(pg_database, sqlstate, said):
    """What can't be serialized ever is given up; what is refused otherwise isn't tried again."""
    store, claim = SQLStore(pg_database), new_claim()
    store.claim(claim)
    raise_on(pg_database, "INSERT", sqlstate, table="idempotency_steps")
    with pytest.raises(StoreUnavailable, match=said):
        store.record_step(claim.digest, claim.token, "charge", '"ch_1"')
    assert store.step(claim.digest, claim.token, "charge") == Step(None)
    store.close()


def test_what_goes_the_short_way_comes_back_as_a_cursor_of_psycopg_s_has_it(pg_database):
    """Every type of value that a statement of a request takes or answers, and NULL."""
    statement = (
        "SELECT n, n::smallint, n::bigint, %(flag)s::bool, %(raw)s::bytea, %(text)s::text,"
        " %(number)s::bigint, %(real)s::float8, %(nothing)s::text FROM generate_series(1, 3) AS n"
    )
    values = {"flag": True, "raw": b"\0\xff", "text": "Zürich", "number": -(2**62), "real": 0.1}
    values["nothing"] = None
    with psycopg.connect(libpq(pg_database)) as connection:
        usual = connection.execute(statement, values, binary=True)
        short = execute_straight(connection, statement, values, prepare=False)
        assert short.rowcount == usual.rowcount == 3
        assert short.fetchone() == usual.fetchone()
        assert short.fetchall()[1:] == usual.fetchall()
        assert (
            execute_straight(connection, "SELECT 1 WHERE false", {}, prepare=False).fetchall() == []
        )


def test_a_renewal_that_sqlite_refuses_changes_nothing_and_locks_nobody_out(tmp_path):
    store = SQLStore(f"sqlite:///{tmp_path}/keys.db", timeout=0.5, pool_size=1)
    claim = new_claim()
    store.claim(claim)
    execute(
        tmp_path / "keys.db",
        "CREATE TRIGGER refuse BEFORE UPDATE ON idempotency_keys"
        " BEGIN SELECT RAISE(ABORT, 'refused'); END",
    )
    with pytest.raises(StoreUnavailable, match="refused"):
        store.renew([(claim.digest, claim.token, 60.0)])
    execute(tmp_path / "keys.db", "DROP TRIGGER refuse")
    assert store.renew([(claim.digest, claim.token, 60.0)]) == {claim.token}
    store.close()


@pytest.mark.parametrize(
    ("options", "use"),
    [
        ({"timeout": 0}, "seconds"),
        ({"timeout": float("nan")}, "seconds"),
        ({"timeout": "5"}, "seconds"),
        ({"pool_size": 0}, "at least"),
        ({"pool_size": "5"}, "at least"),
        ({"max_transactions": "5"}, "at least"),
        ({"prepare": "no"}, "True or False"),  # which would prepare
    ],
    ids=str,
)
def test_an_option_that_makes_no_sense_is_refused(options, use):
    with pytest.raises(ConfigurationError, match=f"use {use}"):
        SQLStore("sqlite:///keys.db", **options)


def test_a_number_that_the_database_can_not_hold_is_not_storable(tmp_path):
    store = SQLStore(f"sqlite:///{tmp_path}/keys.db")
    with pytest.raises(NotStorable):
        store.purge(2**70)
    store.close()


def test_a_connection_interrupted_in_a_statement_is_not_used_again(pg_database):
    """What it would answer next is not known."""
    store = SQLStore(pg_database, pool_size=1)
    claim = new_claim()
    store.check()

    def interrupt(number, frame):
        raise InterruptedError("as a greenlet's kill would")

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with psycopg.connect(libpq(pg_database)) as lock, lock.transaction():
            lock.execute("LOCK TABLE idempotency_keys IN ACCESS EXCLUSIVE MODE")
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(InterruptedError):
                store.claim(claim)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert isinstance(store.claim(claim), Claimed)
    store.close()


def test_without_prepared_statements_everything_works_and_none_is_left(pg_database):
    store = SQLStore(pg_database, prepare=False, pool_size=1)
    for _ in range(7):
        assert store.claim(new_claim()) == Claimed(attempt=1)
    with store.engine.connect() as connection:
        prepared = connection.exec_driver_sql("SELECT count(*) FROM pg_prepared_statements")
        assert prepared.scalar() == 0
    store.close()


@pytest.mark.parametrize(
    ("version", "message"),
    [("'0000'", "at 0000, this release needs"), ("'abc'", "not a revision of ours")],
)
def test_a_schema_that_is_old_or_not_ours_is_refused(pg_database, version, message):
    with psycopg.connect(libpq(pg_database), autocommit=True) as connection:
        connection.execute(f"UPDATE wsgi_idempotency_version SET version_num = {version}")
    store = SQLStore(pg_database)
    with pytest.raises(SchemaError, match=message):
        store.check()
    store.close()


def test_a_newer_schema_serves_while_hosts_are_upgraded_one_by_one(pg_database):
    with psycopg.connect(libpq(pg_database), autocommit=True) as connection:
        connection.execute("UPDATE wsgi_idempotency_version SET version_num = '9999'")
    store = SQLStore(pg_database)
    assert store.claim(new_claim()) == Claimed(attempt=1)
    store.close()


def test_tables_are_made_on_postgresql_too_where_that_is_asked_for(pg_url):
    store = SQLStore(pg_url, create=True)
    assert store.claim(new_claim()) == Claimed(attempt=1)
    store.close()


def test_what_is_not_a_database_is_said_at_once(tmp_path):
    (tmp_path / "keys.db").write_bytes(b"this is a text" * 100)
    store = SQLStore(f"sqlite:///{tmp_path}/keys.db")
    with pytest.raises(StoreUnavailable, match="not a database"):
        store.check()
    store.close()


def test_tables_that_can_not_be_made_are_said_and_nothing_is_left(pg_url):
    with psycopg.connect(libpq(pg_url), autocommit=True) as connection:
        name = connection.info.dbname
        connection.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    store = SQLStore(pg_url, create=True)
    with pytest.raises(StoreUnavailable, match="the tables can't be created"):
        store.check()
    store.close()


def test_a_number_out_of_postgresql_s_range_is_not_storable(pg_database):
    store = SQLStore(pg_database)
    with pytest.raises(NotStorable):
        store.purge(2**70)
    store.close()


@pytest.mark.parametrize(
    ("message", "sqlstate", "error"),
    [
        ("invalid memory alloc request size 1073741824", "XX000", NotStorable),
        ("string buffer exceeds maximum allowed length", "54000", NotStorable),
        ("value too long for type character varying(5)", "22001", NotStorable),
        ("cache lookup failed for relation 1", "XX000", StoreUnavailable),
        (
            "could not read block 1 in file: invalid memory alloc request size",
            "XX000",
            StoreUnavailable,
        ),
        ("index contains unexpected zero page", "XX002", StoreUnavailable),
    ],
)
def test_what_is_too_large_is_not_storable_and_what_is_broken_is_unavailable(
    pg_database, message, sqlstate, error
):
    """An internal error says nothing of what was to be stored: it may be stored later."""
    store = SQLStore(pg_database)
    claim = new_claim()
    store.claim(claim)
    raise_on(pg_database, "UPDATE", sqlstate, message)
    with pytest.raises(error, match=sqlstate) as failed:
        store.complete(claim.digest, claim.token, Completion("201 Made", (), b"made"))
    assert type(failed.value) is error
    store.close()


def test_postgresql_without_its_driver_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigurationError, match="pip install"):
        database_url("postgresql://host/name")


def test_with_an_old_libpq_a_statement_that_times_out_is_bounded_all_the_same(
    pg_database, monkeypatch
):
    """Its way to cancel blocks, so there is none."""
    monkeypatch.setattr(psycopg.capabilities, "has_cancel_safe", lambda: False)
    store = SQLStore(pg_database, timeout=0.5, pool_size=1)
    store.check()
    with psycopg.connect(libpq(pg_database)) as lock, lock.transaction():
        lock.execute("LOCK TABLE idempotency_keys IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(AnswerLost):
            store.lookup(b"d" * 32)
    store.close()


def test_a_file_that_somebody_reads_is_switched_to_wal_when_they_have_finished(tmp_path):
    reader = sqlite3.connect(tmp_path / "keys.db", isolation_level=None, check_same_thread=False)
    reader.execute("CREATE TABLE application (x)")
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM application").fetchall()
    store = SQLStore(f"sqlite:///{tmp_path}/keys.db", timeout=30.0)
    finished = threading.Timer(0.3, reader.execute, ["COMMIT"])
    finished.start()
    store.check()
    finished.join()
    with store.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    reader.close()
    store.close()


def test_a_file_that_somebody_is_about_to_write_to_is_switched_to_wal_when_they_have(
    tmp_path, monkeypatch
):
    """SQLite doesn't wait for the lock of a writer as it does for that of a reader."""
    writer = sqlite3.connect(tmp_path / "keys.db", isolation_level=None)
    writer.execute("CREATE TABLE application (x)")
    writer.execute("BEGIN IMMEDIATE")
    store = SQLStore(f"sqlite:///{tmp_path}/keys.db", timeout=30.0)
    rest = time.sleep

    def finish_meanwhile(seconds):
        rest(seconds)
        if writer.in_transaction:
            writer.execute("COMMIT")

    monkeypatch.setattr(time, "sleep", finish_meanwhile)
    store.check()
    assert not writer.in_transaction
    with store.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    writer.close()
    store.close()


def test_a_file_whose_writer_does_not_end_is_waited_for_no_longer_than_a_statement(tmp_path):
    writer = sqlite3.connect(tmp_path / "keys.db", isolation_level=None)
    writer.execute("CREATE TABLE application (x)")
    writer.execute("BEGIN IMMEDIATE")
    store = SQLStore(f"sqlite:///{tmp_path}/keys.db", timeout=0.2)
    with pytest.raises(StoreUnavailable, match="locked"):
        store.check()
    writer.close()
    store.close()


def test_two_processes_never_give_two_statements_one_name(pg_database):
    """A pooler may have both on one connection to the server."""
    claim = new_claim()
    prepared = []
    for calls in (("claim",), ("lookup", "claim")):
        psycopg3._statement.cache_clear()  # as in another process
        with closing(SQLStore(pg_database)) as store:
            for call in calls:
                getattr(store, call)(claim if call == "claim" else claim.digest)
            with store.engine.connect() as connection:
                driver = connection.connection.driver_connection
                found = driver.execute("SELECT name, statement FROM pg_prepared_statements")
                prepared.append(dict(found.fetchall()))
    one, other = prepared
    assert one.items() < other.items()


@pytest.mark.parametrize("given", [False, True], ids=["own engine", "given engine"])
def test_a_prepared_statement_is_named_after_its_text(pg_database, given):
    """By psycopg's numbers, a pooler would mix up those of two clients."""
    engine = sqlalchemy.create_engine(pg_database)
    store = SQLStore(engine if given else pg_database)
    claim = new_claim()
    store.claim(claim)
    assert store.hold(claim.digest, claim.token)
    with store.engine.connect() as connection:
        driver = connection.connection.driver_connection
        rows = driver.execute("SELECT name, statement FROM pg_prepared_statements").fetchall()
        assert len(rows) >= 3
        assert all(name.startswith("wsgi_idempotency_") for name, _ in rows)
        assert len({name for name, _ in rows}) == len(rows)
        driver.pgconn.exec_(b"DEALLOCATE ALL")
    with pytest.raises(StoreUnavailable, match="prepare=False"):
        store.hold(claim.digest, claim.token)
    store.close()
    engine.dispose()


def test_a_statement_that_failed_when_it_was_prepared_can_be_asked_again(pg_database):
    """psycopg doesn't remember it then, and the server does."""
    store = SQLStore(pg_database, pool_size=1)
    raise_on(pg_database, "INSERT", "22000")
    for _ in range(2):
        with pytest.raises(NotStorable, match="refused"):
            store.claim(new_claim())
    with psycopg.connect(libpq(pg_database), autocommit=True) as connection:
        connection.execute("DROP TRIGGER refuse ON idempotency_keys")
    assert isinstance(store.claim(new_claim()), Claimed)
    store.close()


def test_a_connection_whose_prepared_statements_somebody_discards_is_of_use_again(pg_database):
    """The request that finds them gone is refused, as behind a pooler; the next is not."""
    store = SQLStore(pg_database, pool_size=1)
    claim = new_claim()
    store.claim(claim)
    with store.engine.connect() as connection:
        connection.connection.driver_connection.pgconn.exec_(b"DISCARD ALL")
    with pytest.raises(StoreUnavailable, match="26000"):
        store.claim(claim)
    assert store.claim(claim) == Claimed(attempt=1)
    store.close()


def test_text_is_stored_as_it_is_whatever_the_connection_s_encoding(pg_database):
    """LATIN1 has both letters, in other bytes than UTF-8."""
    latin = SQLStore(f"{pg_database}?client_encoding=latin1")
    claim = dataclasses.replace(new_claim(), path="/café/ü")
    assert latin.claim(claim) == Claimed(attempt=1)
    with psycopg.connect(libpq(pg_database)) as connection:
        rows = connection.execute("SELECT path FROM idempotency_keys").fetchall()
    assert rows == [("/café/ü",)]
    store = SQLStore(pg_database)
    assert store.claim(claim) == Claimed(attempt=1)
    for each in (store, latin):
        each.close()


def test_text_that_a_connection_s_encoding_lacks_is_not_storable(pg_database: str) -> None:
    """LATIN1 has no euro sign. Asking again would not help."""
    latin = SQLStore(f"{pg_database}?client_encoding=latin1")
    with pytest.raises(NotStorable, match="can't encode character"):
        latin.claim(dataclasses.replace(new_claim(), path="/€"))
    claim = new_claim()
    latin.claim(claim)
    with pytest.raises(NotStorable, match="can't encode character"):
        latin.complete(claim.digest, claim.token, Completion("200 €", (), b""))
    latin.close()


class Texts(str, enum.Enum):
    """As an application may have them: each is a text, of a type of its own."""

    SCOPE = "tenant 1"
    KEY = "key 1"
    STEP = "reserve"
    STATUS = "201 Created"


@pytest.mark.parametrize("transaction", [False, True], ids=["claimed first", "in a transaction"])
def test_text_may_be_of_a_type_of_the_application_s(database: str, transaction: bool) -> None:
    """The driver isn't asked how to send each value; no member of an enumeration is to cost a
    request its claim, or a response that was sent its record."""
    runs = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        runs.append(1)
        if not transaction:
            current_operation.step(Texts.STEP, lambda: 1)
        start_response(Texts.STATUS, [("Content-Type", "text/plain")])
        return [b"done"]

    store = SQLStore(database)
    policy = Policy(key=lambda environ, body: Texts.KEY, transaction=transaction)
    shop = IdempotencyMiddleware(app, store, scope=lambda environ: Texts.SCOPE, policy=policy)
    answers = [Client(shop).post("/pay") for _ in range(2)]
    assert [(answer.status, answer.text) for answer in answers] == [("201 Created", "done")] * 2
    assert answers[1].headers["Idempotency-Replayed"] == "true"
    assert len(runs) == 1
    store.close()


def test_a_connection_that_still_waits_for_an_answer_is_not_used_again(pg_database: str) -> None:
    """libpq refuses whatever else is sent on it, and is not disconnected."""
    store = SQLStore(pg_database, pool_size=1)
    assert store.lookup(b"none") is None
    pooled = store.engine.raw_connection()
    before = pooled.driver_connection
    before.pgconn.send_query(b"SELECT 1")
    pooled.close()
    assert store.lookup(b"none") is None
    with closing(store.engine.raw_connection()) as pooled:
        assert pooled.driver_connection is not before
    store.close()


def test_a_value_of_a_type_that_no_statement_has_is_refused_before_it_is_sent(
    pg_database: str,
) -> None:
    store = SQLStore(pg_database)
    with pytest.raises(TypeError, match="a value is a complex, which no statement takes"):
        store.lookup(1j)  # type: ignore[arg-type]
    assert store.lookup(b"none") is None
    store.close()


@pytest.mark.parametrize("close", [True, False], ids=["libpq 17", "an older libpq"])
def test_statements_planned_for_an_empty_table_use_the_index_when_it_has_grown(
    pg_database, postgres, monkeypatch, close
):
    """A plan is kept from the sixth execution on, and one for a table without a page reads all
    pages there will be. Nothing but we ourselves plans anew here: there is no ANALYZE."""
    if not close:
        monkeypatch.setattr(psycopg.capabilities, "has_send_close_prepared", lambda: False)
    store = SQLStore(pg_database, pool_size=1)
    with psycopg.connect(libpq(pg_database), autocommit=True) as connection:
        connection.execute("ALTER TABLE idempotency_keys SET (autovacuum_enabled = false)")
        connection.execute("VACUUM ANALYZE idempotency_keys")
    done = Completion("201 Created", (), b"done")

    def operate():
        claim = new_claim()
        assert store.claim(claim) == Claimed(attempt=1)
        assert store.complete(claim.digest, claim.token, done)
        assert store.lookup(claim.digest) is not None

    for _ in range(8):
        operate()
    # Before PostgreSQL 14 a table without a page is planned for as one of ten.
    assert scans(store) == {"Index Scan" if postgres.version.startswith("13.") else "Seq Scan"}
    for _ in range(250):
        operate()
    assert "Index Scan" in scans(store)
    if close and psycopg.capabilities.has_send_close_prepared():
        assert "Seq Scan" not in scans(store)  # else what was prepared first is still there
    store.close()


@pytest.mark.parametrize("pipeline", [True, False], ids=["libpq 14", "an older libpq"])
def test_a_transaction_begins_and_claims_in_one_round_trip_where_libpq_can(
    pg_database, monkeypatch, tmp_path, pipeline
):
    monkeypatch.setattr(psycopg.capabilities, "has_pipeline", lambda: pipeline)
    store = SQLStore(pg_database)
    store.begin(new_claim()).rollback()
    store.begin(new_claim()).complete(Completion("201 Created", (), b""))
    with store.transactions.connect() as connection:
        server = connection.connection.driver_connection.pgconn
    with (tmp_path / "trace").open("w+") as trace:
        server.trace(trace.fileno())
        transaction = store.begin(new_claim())
        server.untrace()
        transaction.rollback()
        trace.seek(0)
        directions = [line.split("\t")[1] for line in trace]
    store.close()
    assert "".join(directions).count("FB") == (1 if pipeline else 2)


@pytest.mark.parametrize("pipeline", [True, False], ids=["libpq 14", "an older libpq"])
def test_a_transaction_that_can_not_begin_is_refused(pg_database, monkeypatch, pipeline):
    """As behind a pooler that has its own idea of BEGIN."""
    monkeypatch.setattr(psycopg.capabilities, "has_pipeline", lambda: pipeline)
    store = SQLStore(pg_database)
    store.transactions.connect().close()  # SQLAlchemy asks the first for its settings
    monkeypatch.setattr(psycopg.Connection, "_get_tx_start_command", lambda _: b"BEGIN NOTHING")
    with pytest.raises(StoreUnavailable, match="NOTHING"):
        store.begin(new_claim())
    monkeypatch.undo()
    store.begin(new_claim()).complete(Completion("201 Created", (), b""))
    store.close()


def scans(store):
    """How the prepared statements of the store's connection find their row."""
    found = set()
    with store.engine.connect() as connection:
        run = connection.connection.driver_connection.execute
        for name, statement in run("SELECT name, statement FROM pg_prepared_statements").fetchall():
            numbers = [int(number) for number in re.findall(r"\$(\d+)", statement)]
            if numbers:
                nulls = ", ".join(["NULL"] * max(numbers))
                plan = run(f"EXPLAIN EXECUTE {name}({nulls})", prepare=False).fetchall()
                found.update(
                    re.search(r"(\w+ \w*Scan)", line)[1]
                    for (line,) in plan
                    if "Scan" in line and "on idempotency_keys" in line
                )
    return found
