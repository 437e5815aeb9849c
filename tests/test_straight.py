"""The straight way to libpq: what a statement waits for, and how its wait can end."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import Any

import psycopg
import pytest
from servers.postgres import terminate
from servers.proxy import ThreadingProxy
from sqlalchemy.engine import URL, make_url

from wsgi_idempotency.stores import psycopg3
from wsgi_idempotency.stores.psycopg3 import (
    BoundedConnection,
    TimedOut,
    commit_and,
    execute,
    name_by_content,
)


def run(connection: psycopg.Connection[Any], statement: str, **params: Any) -> Any:
    return execute(connection, statement, params, prepare=False).fetchone()


@pytest.fixture(params=["by poll()", "by select()"])
def waiting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has no poll(), and eventlet takes it away."""
    if request.param == "by select()":
        monkeypatch.delattr(select, "poll")


@pytest.fixture
def connection(pg_database: str) -> Iterator[BoundedConnection]:
    url = libpq(pg_database)
    with closing(BoundedConnection.connect(url, autocommit=True)) as connection:
        name_by_content(connection)
        yield connection


class Interjecting(ThreadingProxy):
    """Carries one connection until the client has sent a megabyte, and then says something to it
    and reads no more for a moment."""

    def carrier(self, client: socket.socket) -> Callable[[], None]:
        return partial(self._carry, client)

    def _carry(self, client: socket.socket) -> None:
        seen, spoken = 0, False
        with client, socket.create_connection(self.upstream) as server:
            other = {client: server, server: client}
            while True:
                readable, _, _ = select.select([client, server, self._woken], [], [])
                for sock in readable:
                    data = b"" if sock is self._woken else sock.recv(65536)
                    if not data:
                        return
                    other[sock].sendall(data)
                    seen += len(data) if sock is client else 0
                if seen > 2**20 and not spoken:
                    spoken = True
                    time.sleep(0.5)  # until the client has nowhere left to put its bytes
                    client.sendall(NOTICE)
                    time.sleep(0.5)


_FIELDS = b"SNOTICE\0VNOTICE\0C00000\0Mnot so fast\0\0"
#: NoticeResponse (PostgreSQL documentation, 55.7).
NOTICE = b"N" + struct.pack(">i", 4 + len(_FIELDS)) + _FIELDS


def address_of(url: str) -> tuple[str, int]:
    host, port = make_url(url).host, make_url(url).port
    assert host is not None
    assert port is not None
    return host, port


def libpq(url: str | URL) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def backend(connection: psycopg.Connection[Any]) -> int:
    return connection.info.backend_pid


def test_an_answer_that_comes_in_time_is_read(waiting: None, connection: BoundedConnection) -> None:
    assert run(connection, "SELECT pg_sleep(0.05)::text, 1") == ("", 1)


def test_what_no_buffer_of_the_network_holds_is_sent_and_read(
    waiting: None, connection: BoundedConnection
) -> None:
    body = os.urandom(30 * 2**20)
    assert run(connection, "SELECT %(body)s::bytea", body=body) == (body,)


def test_what_the_server_says_while_a_large_statement_is_sent_is_read(
    waiting: None, pg_database: str
) -> None:
    """A server that is not listened to may stop listening."""
    with Interjecting(address_of(pg_database)) as proxy:
        url = make_url(pg_database).set(host=proxy.address[0], port=proxy.address[1])
        with closing(BoundedConnection.connect(libpq(url), autocommit=True)) as connection:
            said: list[str | None] = []
            connection.add_notice_handler(lambda notice: said.append(notice.message_primary))
            assert run(connection, "SELECT length(%(body)s::bytea)", body=bytes(30 * 2**20))
            assert said == ["not so fast"]


def test_an_answer_that_does_not_come_in_time_closes_the_connection(
    waiting: None, connection: BoundedConnection
) -> None:
    connection.seconds = 0.2
    began = time.monotonic()
    with pytest.raises(TimedOut, match=r"no answer within 0\.2 s"):
        run(connection, "SELECT pg_sleep(20)::text")
    assert time.monotonic() - began < 10
    assert connection.closed


def test_neither_does_what_goes_by_a_cursor_wait_for_ever(connection: BoundedConnection) -> None:
    connection.seconds = 0.2
    with pytest.raises(TimedOut, match=r"no answer within 0\.2 s"):
        connection.execute("SELECT pg_sleep(20)")
    assert connection.closed


def test_a_connection_of_the_application_s_waits_as_long_as_the_statement_takes(
    waiting: None, pg_database: str
) -> None:
    url = libpq(pg_database)
    with closing(psycopg.connect(url, autocommit=True)) as connection:
        assert run(connection, "SELECT pg_sleep(0.2)::text") == ("",)


def test_a_server_that_hangs_up_while_a_statement_runs_has_its_reason_told(
    waiting: None, connection: BoundedConnection, pg_database: str
) -> None:
    url = libpq(pg_database)
    with closing(psycopg.connect(url, autocommit=True)) as other:

        def hang_up() -> None:
            while not other.execute(
                "SELECT FROM pg_stat_activity WHERE pid = %s AND wait_event = 'PgSleep'",
                (backend(connection),),
            ).rowcount:
                pass
            other.execute("SELECT pg_terminate_backend(%s)", (backend(connection),))

        hanging_up = threading.Thread(target=hang_up)
        hanging_up.start()
        with pytest.raises(psycopg.errors.AdminShutdown):
            run(connection, "SELECT pg_sleep(20)::text")
        hanging_up.join()
    assert connection.broken


def test_a_server_that_has_hung_up_before_a_large_statement_is_noticed(
    waiting: None, connection: BoundedConnection, pg_database: str
) -> None:
    """While the statement is being sent there is something to be read."""
    url = libpq(pg_database)
    pid = backend(connection)
    with closing(psycopg.connect(url, autocommit=True)) as other:
        terminate(other, pid)
    with pytest.raises(psycopg.OperationalError):
        run(connection, "SELECT %(body)s::bytea", body=bytes(30 * 2**20))
    assert connection.broken


def test_a_signal_s_handler_interrupts_the_wait(
    waiting: None, connection: BoundedConnection
) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Interrupted):
            run(connection, "SELECT pg_sleep(20)::text")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_signal_whose_handler_returns_does_not_end_the_wait(
    waiting: None, connection: BoundedConnection
) -> None:
    called: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: called.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        assert run(connection, "SELECT pg_sleep(0.3)::text") == ("",)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert called == [1]


def test_a_transaction_that_has_failed_does_not_pass_for_committed(
    connection: BoundedConnection,
) -> None:
    """PostgreSQL answers COMMIT with ROLLBACK then, which is no error to libpq."""
    connection.autocommit = False
    with pytest.raises(psycopg.errors.DivisionByZero):
        connection.execute("SELECT 1/0")
    with pytest.raises(psycopg.errors.InFailedSqlTransaction):
        commit_and(connection, "SELECT 1")


def test_what_fails_after_it_has_given_its_rows_has_failed(connection: BoundedConnection) -> None:
    """In autocommit the server commits last, and a deferred constraint may be in its way."""
    connection.execute("CREATE TEMP TABLE once (a int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    with pytest.raises(psycopg.errors.UniqueViolation):
        run(connection, "INSERT INTO once VALUES (1), (1) RETURNING a")
    assert run(connection, "SELECT count(*) FROM once") == (0,)


@pytest.mark.parametrize("begin", [False, True], ids=["by itself", "with its transaction"])
def test_a_statement_is_prepared_anew_when_a_migration_has_changed_a_column_s_type(
    connection: BoundedConnection, begin: bool
) -> None:
    """A worker that runs on meanwhile refuses nobody for it, and nothing is done twice."""
    connection.execute("CREATE TEMP TABLE migrated (a int)")
    connection.autocommit = not begin
    for number in range(4):
        if number == 2:
            connection.execute("ALTER TABLE migrated ALTER a TYPE bigint")
            connection.commit()
        row = execute(
            connection, "INSERT INTO migrated VALUES (1) RETURNING a", {}, prepare=True, begin=begin
        )
        assert row.fetchone() == (1,)
        connection.commit()
    assert connection.execute("SELECT count(*) FROM migrated").fetchone() == (4,)


def test_within_a_transaction_what_a_migration_has_outdated_fails_but_once(
    connection: BoundedConnection,
) -> None:
    """What came before in the transaction is undone, which the application has to know of."""
    connection.execute("CREATE TEMP TABLE migrated AS SELECT 1 AS a")
    ask = partial(execute, connection, "SELECT a FROM migrated", {}, prepare=True)
    ask()
    ask()
    connection.execute("ALTER TABLE migrated ALTER a TYPE bigint")
    connection.autocommit = False
    connection.execute("SELECT 1")
    with pytest.raises(psycopg.errors.FeatureNotSupported):
        ask()
    connection.rollback()
    assert ask().fetchone() == (1,)


def test_what_is_refused_whatever_the_plan_is_not_tried_for_ever(
    connection: BoundedConnection,
) -> None:
    connection.execute(
        "CREATE FUNCTION pg_temp.refuse(yes boolean) RETURNS text LANGUAGE plpgsql AS $$ BEGIN"
        " IF yes THEN RAISE EXCEPTION 'no' USING ERRCODE = '0A000'; END IF; RETURN ''; END $$"
    )
    ask = partial(execute, connection, "SELECT pg_temp.refuse(%(yes)s)", prepare=True)
    ask({"yes": False})
    with pytest.raises(psycopg.errors.FeatureNotSupported):
        ask({"yes": True})
    assert ask({"yes": False}).fetchone() == ("",)


def test_what_psycopg_deallocates_later_is_prepared_anew(connection: BoundedConnection) -> None:
    """In a pipeline, a DROP has it forget all it has prepared, and tell the server afterwards."""
    connection.execute("CREATE TEMP TABLE dropped (a int)")
    connection.execute("SELECT 1", prepare=True)
    execute(connection, "SELECT 2", {}, prepare=True)
    with connection.pipeline():
        connection.execute("DROP TABLE dropped")
    assert execute(connection, "SELECT 2", {}, prepare=True).fetchone() == (2,)


@pytest.mark.parametrize("late", [psycopg3._LATE, 0], ids=["as it is", "none read late"])
def test_notices_without_end_do_not_keep_a_statement_from_timing_out(
    connection: BoundedConnection, monkeypatch: pytest.MonkeyPatch, late: int
) -> None:
    monkeypatch.setattr(psycopg3, "_LATE", late)
    connection.execute(
        "CREATE FUNCTION pg_temp.tell() RETURNS text LANGUAGE plpgsql AS $$ BEGIN"
        " WHILE clock_timestamp() < now() + interval '5 s' LOOP"
        " RAISE NOTICE 'x'; END LOOP; RETURN ''; END $$"
    )
    connection.seconds = 0.2
    with pytest.raises(TimedOut):
        run(connection, "SELECT pg_temp.tell()")
