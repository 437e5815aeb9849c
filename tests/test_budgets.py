"""What a request costs, held to bench/budgets.ini: statements, commits, function calls.

None of it is a time, so that a busy machine changes nothing.
"""

from __future__ import annotations

import configparser
import re
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from null_requests import BODY, HEADERS, paying, request, serve
from null_store import NullStore
from psycopg import sql
from servers.postgres import Postgres, PostgresServer, database_of
from sqlalchemy import event
from sqlalchemy.engine import make_url

from wsgi_idempotency import IdempotencyMiddleware, Policy, SQLStore, by_authorization
from wsgi_idempotency.records import Completion
from wsgi_idempotency.schema import upgrade

if TYPE_CHECKING:
    from types import FrameType

    from _typeshed.wsgi import WSGIApplication, WSGIEnvironment

BUDGETS = configparser.ConfigParser()
BUDGETS.read_string((Path(__file__).parent.parent / "bench" / "budgets.ini").read_text())

#: Requests by the names of the table; each is made once with ``warm`` as key beforehand.
REQUESTS: dict[str, Callable[[str], WSGIEnvironment]] = {
    "passing through": lambda key: request("GET", key),
    "without a key": lambda key: request("POST"),
    "fresh": lambda key: request("POST", key),
    "replay": lambda key: request("POST", "warm"),
}


def wrapped(store: Any, *, transaction: bool = False) -> IdempotencyMiddleware:
    return IdempotencyMiddleware(
        paying, store, scope=by_authorization, policy=Policy(transaction=transaction)
    )


# ---------------------------------------------------------------------- statements and commits

#: %x is the id of a transaction that has written something, else 0 (PostgreSQL documentation,
#: 20.8.3). A statement's duration is logged once it has run, before its commit.
PREFIX = "%m [%p] <%d> %x "
EXECUTED = re.compile(
    r"^\S+ \S+ \S+ \[\d+\] <(?P<database>[^>]*)> (?P<xid>\d+) LOG: "
    r" duration: \S+ ms  (?:statement|execute [^:]*): ",
    re.MULTILINE,
)


@pytest.fixture
def logging_server(postgres_server: PostgresServer) -> Iterator[PostgresServer]:
    """A server that logs every statement with its transaction's id."""
    server = postgres_server
    before = shown(server)
    server.execute(sql.SQL("ALTER SYSTEM SET log_line_prefix = {}").format(PREFIX))
    server.execute("ALTER SYSTEM SET log_min_duration_statement = 0")
    reload(server, until=PREFIX)
    yield server
    server.execute("ALTER SYSTEM RESET log_line_prefix")
    server.execute("ALTER SYSTEM RESET log_min_duration_statement")
    reload(server, until=before)


def shown(server: Postgres) -> str:
    ((prefix,),) = server.execute("SHOW log_line_prefix")
    return str(prefix)


def reload(server: Postgres, *, until: str) -> None:
    """Let the server read its settings again, and connections made from now on have them."""
    server.execute("SELECT pg_reload_conf()")
    while shown(server) != until:
        pass


@pytest.mark.parametrize("transaction", [False, True], ids=["with a lease", "in a transaction"])
def test_postgresql_is_sent_no_more_statements_and_commits_than_budgeted(
    logging_server: PostgresServer, transaction: bool
) -> None:
    url = logging_server.create_database()
    upgrade(url)
    store = SQLStore(url)
    app = wrapped(store, transaction=transaction)
    serve(app, request("POST", "warm"))

    def cost(environ: WSGIEnvironment) -> tuple[int, int]:
        since = logging_server.log_mark()
        serve(app, environ)
        lines = [
            line
            for line in EXECUTED.finditer(logging_server.log_text(since))
            if line["database"] == database_of(url)
        ]
        return len(lines), len({line["xid"] for line in lines} - {"0"})

    found = costs(cost, transaction=transaction)
    store.close()
    logging_server.drop_database(url)
    assert found == budget("PostgreSQL", transaction=transaction)


@pytest.mark.parametrize("transaction", [False, True], ids=["with a lease", "in a transaction"])
def test_sqlite_is_sent_no_more_statements_and_commits_than_budgeted(
    sqlite_url: str, transaction: bool
) -> None:
    store = SQLStore(sqlite_url)
    app = wrapped(store, transaction=transaction)
    sent: list[str] = []

    def trace(connection: Any, record: object) -> None:
        connection.set_trace_callback(sent.append)

    for engine in (store.engine, store.transactions):
        event.listen(engine, "connect", trace)
    serve(app, request("POST", "warm"))
    log = Path(f"{make_url(sqlite_url).database}-wal")

    def cost(environ: WSGIEnvironment) -> tuple[int, int]:
        before, committed = len(sent), commits_in(log)
        serve(app, environ)
        pragmas = [statement for statement in sent[before:] if statement.startswith("PRAGMA")]
        return len(sent) - before - len(pragmas), commits_in(log) - committed

    found = costs(cost, transaction=transaction)
    store.close()
    assert found == budget("SQLite", transaction=transaction)


def commits_in(log: Path) -> int:
    """Commits in a write-ahead log: a frame that ends a transaction names the database's size
    after it, others 0 (SQLite, "Database File Format", 4.1)."""
    data = log.read_bytes()
    (page,) = struct.unpack_from(">I", data, 8)
    frames = range(32, len(data), 24 + page)
    return sum(struct.unpack_from(">I", data, frame + 4) != (0,) for frame in frames)


def costs(
    cost: Callable[[WSGIEnvironment], tuple[int, int]], *, transaction: bool
) -> dict[str, tuple[int, int]]:
    return {
        row: cost(REQUESTS[kind]("new")) for row, kind in rows_of(transaction=transaction).items()
    }


def budget(table: str, *, transaction: bool) -> dict[str, tuple[int, ...]]:
    return {
        row: tuple(map(int, BUDGETS[table][row].split()))
        for row in rows_of(transaction=transaction)
    }


def rows_of(*, transaction: bool) -> dict[str, str]:
    """The rows of the table that a mode has, and the requests they are about."""
    mode = " in a transaction" if transaction else ""
    return {
        f"fresh{mode}": "fresh",
        f"replay{mode}": "replay",
        "passing through": "passing through",
    }


# ---------------------------------------------------------------------- calls


@contextmanager
def counting_calls() -> Iterator[list[str]]:
    """The Python functions that this thread calls, in order."""
    called: list[str] = []

    def note(frame: FrameType, what: str, arg: object) -> None:
        if what == "call":
            called.append(f"{frame.f_code.co_filename}:{frame.f_code.co_name}")

    sys.setprofile(note)
    try:
        yield called
    finally:
        sys.setprofile(None)


def calls(app: WSGIApplication, environ: WSGIEnvironment) -> int:
    with counting_calls() as called:
        serve(app, environ)
    return len(called)


@pytest.mark.parametrize("row", BUDGETS["calls"])
def test_a_request_makes_no_more_function_calls_than_budgeted(row: str) -> None:
    done = Completion("201 Created", tuple(HEADERS), BODY)
    app = wrapped(NullStore(replay=done if row == "replay" else None))
    most = int(BUDGETS["calls"][row])
    for _ in range(3):  # the first of a process starts the heartbeat, compiles, fills caches
        serve(app, REQUESTS[row]("new"))
    needed = calls(app, REQUESTS[row]("new")) - calls(paying, REQUESTS[row]("new"))
    assert needed <= most
    # A budget that is far from what is needed guards nothing.
    assert needed >= most * 0.7 - 5


def test_a_request_that_comes_alone_does_not_wake_the_heartbeat() -> None:
    """One of a process does; a switch of threads for each would cost more than all the rest."""
    app = wrapped(NullStore())
    serve(app, REQUESTS["fresh"]("first"))
    with counting_calls() as called:
        for number in range(10):
            serve(app, REQUESTS["fresh"](f"key-{number}"))
    assert any("lease.py:_add" in name for name in called)
    assert [name for name in called if "threading.py:notify" in name] == []
