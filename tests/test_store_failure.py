"""The database is away, restarts, has no schema, or has lost its mind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from apps.gate import Gate
from apps.shop import (
    GUNICORNS,
    Shop,
    at_gate,
    at_once,
    background,
    code,
    expect_one,
    open_shop,
    query,
    replayed,
    until,
)
from servers.http import Response
from servers.postgres import PostgresServer

from wsgi_idempotency.schema import upgrade
from wsgi_idempotency.stores.tables import OUR_TABLES, SCHEMA_REVISION


@pytest.fixture
def own_database(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of a database with our schema on a server that may be stopped."""
    url = postgres_server.create_database()
    upgrade(url)
    yield url
    if not postgres_server.running:
        postgres_server.start()
    postgres_server.drop_database(url)


def expect_refused(response: Response) -> None:
    assert (response.status, code(response)) == (503, "STORE_UNAVAILABLE")
    retry_after = response.header("Retry-After")
    assert retry_after is not None
    assert 1 <= int(retry_after) <= 5
    assert response.header("X-Should-Retry") == "true"


@pytest.mark.parametrize("known", [False, True], ids=["never seen", "seen before"])
def test_nothing_runs_while_the_database_is_away(
    postgres_server: PostgresServer, own_database: str, tmp_path: Path, known: bool
) -> None:
    with open_shop(own_database, tmp_path, workers=2) as shop:
        if known:
            first = expect_one(at_once(4, lambda _: shop.post("before")))
        postgres_server.stop()
        for response in at_once(4, lambda number: shop.post(f"key-{number}")):
            expect_refused(response)
        assert shop.get().body == b"ok"
        if known:
            expect_refused(shop.post("before"))
        assert len(shop.executions()) == known
        postgres_server.start()
        assert shop.post("key-0").status == 201
        assert shop.attempts("key-0") == [1]
        if known:
            assert shop.post("before").body == first.body


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_connection_that_died_in_the_pool_costs_nobody_an_error(
    postgres_server: PostgresServer, own_database: str, tmp_path: Path, mode: str
) -> None:
    """The database was restarted between two requests: the second is served."""
    with open_shop(own_database, tmp_path, workers=1) as shop:
        first = shop.post("k")
        postgres_server.restart(mode)
        assert shop.post("k").body == first.body
        postgres_server.restart(mode)
        assert shop.post("another").status == 201


@pytest.mark.parametrize(
    "gunicorn",
    [{"workers": 2}, GUNICORNS["2 gevent workers"]],
    ids=["sync", "gevent"],
)
def test_a_restart_mid_handler_is_not_noticed(
    postgres_server: PostgresServer,
    own_database: str,
    tmp_path: Path,
    gate: Gate,
    gunicorn: dict[str, Any],
) -> None:
    with open_shop(own_database, tmp_path, **gunicorn) as shop:
        with background(shop.post, "k", at_gate(gate)) as original:
            first = gate.arrival()
            postgres_server.restart("immediate")
            first.let_pass()
            response = original()
        assert (response.status, replayed(response)) == (201, False)
        assert shop.post("k").body == response.body
        assert shop.attempts("k") == [1]


def test_a_database_that_is_away_when_the_handler_ends_is_told_later(
    postgres_server: PostgresServer, own_database: str, tmp_path: Path, gate: Gate
) -> None:
    """The client gets its response, retries are refused, and once the database is back the
    response is recorded without anybody's help."""
    with open_shop(own_database, tmp_path, workers=2) as shop:
        with background(shop.post, "k", at_gate(gate)) as original:
            first = gate.arrival()
            postgres_server.stop()
            first.let_pass()
            response = original()
        assert (response.status, replayed(response)) == (201, False)
        expect_refused(shop.post("k"))
        postgres_server.start()

        def replay() -> Response | None:
            retry = shop.post("k")
            assert retry.status == 201 or code(retry) in ("CONFLICT", "STORE_UNAVAILABLE")
            return retry if retry.status == 201 else None

        assert until(replay).body == response.body
        assert shop.attempts("k") == [1]


def errors(log: str) -> list[str]:
    """The lines of a log in which we say that something is wrong."""
    return [line for line in log.splitlines() if line.startswith("ERROR wsgi_idempotency:")]


def run_upgrade(url: str) -> None:
    command = Path(sys.executable).with_name("wsgi-idempotency")
    subprocess.run([command, "upgrade", "--database", url], check=True, capture_output=True)


def expect_to_heal(shop: Shop, url: str) -> None:
    """Nothing runs, the log says which command to run, and once it was run the same
    processes serve."""
    for response in at_once(4, lambda number: shop.post(f"key-{number}")):
        expect_refused(response)
    assert shop.executions() == []
    assert any(
        f"Run: wsgi-idempotency upgrade --database {url}" in line
        for line in errors(shop.server.log_text())
    )
    pids = shop.server.worker_pids
    run_upgrade(url)
    assert [shop.post(f"key-{number}").status for number in range(4)] == [201] * 4
    assert shop.server.worker_pids == pids
    assert len(shop.executions()) == 4


def test_a_missing_schema_refuses_and_names_the_command(pg_url: str, tmp_path: Path) -> None:
    with open_shop(pg_url, tmp_path, workers=2) as shop:
        expect_to_heal(shop, pg_url)


def test_a_schema_that_went_missing_refuses_and_names_the_command(
    pg_database: str, tmp_path: Path
) -> None:
    """Also in processes that have seen it before."""
    with open_shop(pg_database, tmp_path, application="apps.warmed_up:app", workers=2) as shop:
        query(pg_database, f"DROP TABLE {', '.join(sorted(OUR_TABLES))}")
        expect_to_heal(shop, pg_database)


def test_an_old_schema_refuses_and_names_the_command(pg_database: str, tmp_path: Path) -> None:
    with open_shop(pg_database, tmp_path, workers=2) as shop:
        query(pg_database, "UPDATE wsgi_idempotency_version SET version_num = '0000'")
        for response in at_once(4, lambda number: shop.post(f"key-{number}")):
            expect_refused(response)
        assert shop.executions() == []
        told = "\n".join(errors(shop.server.log_text()))
        assert f"The schema is at 0000, this release needs {SCHEMA_REVISION}" in told
        assert "Run: wsgi-idempotency upgrade --database" in told
        query(pg_database, f"UPDATE wsgi_idempotency_version SET version_num = '{SCHEMA_REVISION}'")
        assert shop.post("key-0").status == 201


#: What may have become of the columns of a stored response.
CORRUPTIONS = {
    "headers that are not JSON": "response_headers = '{'",
    "headers that are NULL": "response_headers = NULL",
    "headers that are no list": "response_headers = '42'",
    "headers that are no pairs": """response_headers = '[["a"], ["b", "c", "d"]]'""",
    "headers that are not text": "response_headers = '[[1, 2]]'",
    "headers nested without end": "response_headers = repeat('[', 100000)",
    "a header that no server sends": r"""response_headers = '[["X-A", "b\nX-C: d"]]'""",
    "a header without a name": """response_headers = '[["", "b"]]'""",
    "a status that is no number": "response_status = 'Created'",
    "a status that is empty": "response_status = ''",
    "a status that HTTP doesn't have": "response_status = '999 What'",
    "a status line of two lines": "response_status = E'201 Made\\nIt'",
    "a row that says it has no body": "response_body = NULL, not_replayable = 'it was eaten'",
}


@pytest.fixture(scope="module")
def done(module_database: str, tmp_path_factory: Any) -> Iterator[Shop]:
    """A shop that serves all the tests of corrupt rows, each with a key of its own."""
    with open_shop(module_database, tmp_path_factory.mktemp("corrupt"), workers=2) as shop:
        yield shop


@pytest.mark.parametrize("what", CORRUPTIONS)
def test_an_operation_whose_stored_response_is_corrupt_never_runs_again(
    done: Shop, what: str
) -> None:
    """Its row says that it is done: its retries are refused, and the log says why."""
    key = what.replace(" ", "-")
    assert done.post(key).status == 201
    changed = CORRUPTIONS[what].replace("%", "%%")
    query(done.url, f"UPDATE idempotency_keys SET {changed} WHERE idempotency_key = $k${key}$k$")
    before = len(done.server.log_text())
    for refused in at_once(3, lambda _: done.post(key)):
        assert (refused.status, code(refused)) == (409, "RESPONSE_NOT_REPLAYABLE")
        assert refused.header("X-Should-Retry") == "false"
    assert done.attempts(key) == [1]
    if "not_replayable" not in changed:
        [digest] = [row["key_digest"] for row in done.rows() if row["idempotency_key"] == key]
        told = errors(done.server.log_text()[before:])
        assert sum(digest.hex() in line for line in told) == 3


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ("response_body = 'text'", 409),
        ("response_body = NULL", 409),
        ("response_status = NULL", 409),
        ("state = 'nonsense'", 503),
        ("lapse = 'nonsense'", 503),
        ("attempt = 'nonsense'", 503),
    ],
)
def test_a_row_that_no_check_has_kept_sane_never_runs_again(
    sqlite_url: str, tmp_path: Path, change: str, status: int
) -> None:
    """SQLite takes any type in any column, and checks can be switched off. Not even a policy
    that would rather run unprotected than refuse lets it run."""
    with open_shop(sqlite_url, tmp_path, policy={"on_store_failure": "bypass"}, workers=1) as shop:
        assert shop.post("k").status == 201
        corrupt(sqlite_url, change)
        assert shop.post("k").status == status
        assert shop.attempts("k") == [1]
        assert any("of digest" in line for line in errors(shop.server.log_text()))


def corrupt(url: str, change: str) -> None:
    import sqlite3
    from contextlib import closing

    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute(f"UPDATE idempotency_keys SET {change}")
        connection.commit()


@pytest.mark.parametrize(
    "options",
    [{}, {"engine_options": {"pool_size": 1}}],
    ids=["a URL", "an Engine of the application's"],
)
def test_a_claim_a_completion_and_a_replay_are_one_statement_each(
    postgres_server: PostgresServer, own_database: str, tmp_path: Path, options: dict[str, Any]
) -> None:
    """As the server's log of statements has it: no BEGIN, no COMMIT, no ROLLBACK, no ping, and
    nothing at all for a GET."""
    query(own_database, "CREATE TABLE ledger (pid int NOT NULL)")
    with (
        postgres_server.statements(own_database) as statements,
        open_shop(own_database, tmp_path, workers=1, **options) as shop,
    ):
        shop.post("first-of-its-process")
        shop.post("fresh")
        shop.post("fresh")
        shop.get()
        shop.post("fresh")
    seen = list(map(kind, statements))
    # Before that, SQLAlchemy has looked at the server, on the process's first connection.
    first = seen.index("version")
    assert seen[:first].count("BEGIN") == seen[:first].count("ROLLBACK")
    seen = seen[first:]
    ours = [what for what in seen if what in ("version", "claim", "complete")]
    assert ours == ["version", *["claim", "complete"] * 2, "claim", "claim"]
    # The handler's own transaction on its own Engine, in each of the two executions.
    joined = ["BEGIN", "INSERT INTO ledger", "COMMIT"] * 2 if options else []
    assert [what for what in seen if what not in ours] == joined


def kind(statement: str) -> str:
    """Which of the store's statements it is, or how it begins."""
    if "version_num" in statement:
        return "version"
    if "INSERT INTO idempotency_keys" in statement:
        return "claim"
    if "state = 'completed', completed_at" in statement:
        return "complete"
    for beginning in ("BEGIN", "INSERT INTO ledger"):
        if statement.startswith(beginning):
            return beginning
    return statement
