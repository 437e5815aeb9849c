"""Transaction mode: what the application writes and the response, both or neither."""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import logging
import os
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import psycopg
import pytest
from apps.charges import Charge, OpenShop, Shop, charge, charging, opener, session
from servers.commit_proxy import CommitProxy
from servers.postgres import Postgres, PostgresServer, database_of
from sqlalchemy import Connection, create_engine, make_url, text
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError
from sqlalchemy.orm import Session
from werkzeug.test import Client, TestResponse, create_environ
from werkzeug.wrappers import Response

from wsgi_idempotency import (
    HOLD,
    IdempotencyMiddleware,
    MemoryStore,
    Policy,
    Route,
    SQLStore,
    current_operation,
    everyone,
    hold_unknown,
    store_everything,
)
from wsgi_idempotency.errors import ConfigurationError, NoTransaction, TransactionFailed
from wsgi_idempotency.records import Claim, Claimed, Completion
from wsgi_idempotency.testing import make_claim


@pytest.fixture
def open_shop(database: str) -> Iterator[OpenShop]:
    """Opens shops on one database, PostgreSQL or SQLite."""
    yield from opener(database)


@pytest.fixture
def pg_shop(pg_database: str) -> Iterator[OpenShop]:
    """Opens shops on PostgreSQL, for what only a server does."""
    yield from opener(pg_database)


def code(response: TestResponse) -> str:
    found: str = json.loads(response.data)["code"]
    return found


# ---------------------------------------------------------------------- both or neither


def test_the_write_and_the_response_are_there_once(open_shop: OpenShop) -> None:
    shop = open_shop(charging)
    first, second = shop.post(), shop.post()
    assert (first.status, first.data) == ("201 Made It", b"charged")
    assert "Idempotency-Replayed" not in first.headers
    assert (second.status, second.data) == ("201 Made It", b"charged")
    assert second.headers["Idempotency-Replayed"] == "true"
    assert shop.amounts() == [1]
    [row] = shop.rows()
    assert (row["state"], row["attempt"]) == ("completed", 1)


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [(None, "400"), (None, "503"), (hold_unknown, "500"), (lambda outcome: HOLD, "201")],
    ids=["forgotten", "released", "held", "held though it succeeded"],
)
def test_any_outcome_but_store_undoes_everything(
    open_shop: OpenShop, outcomes: Any, status: str
) -> None:
    """And the key is fresh: another payload may use it."""
    shop = open_shop(charging, **({"outcomes": outcomes} if outcomes else {}))
    failed = shop.post(headers={"X-Status": status}, data=b"one")
    assert (failed.status_code, failed.data) == (int(status), b"charged")
    assert (shop.amounts(), shop.rows()) == ([], [])
    again = shop.post(headers={"X-Status": status}, data=b"another")
    assert (again.status_code, again.headers["X-Attempt"]) == (int(status), "1")
    assert [event.action for event in shop.told("executed")] == ["forget", "forget"]


def test_an_error_is_stored_with_what_it_wrote_where_the_policy_says_so(
    open_shop: OpenShop,
) -> None:
    shop = open_shop(charging, outcomes=store_everything)
    assert shop.post(headers={"X-Status": "500"}).status_code == 500
    replay = shop.post(headers={"X-Status": "500"})
    assert (replay.status_code, replay.headers["Idempotency-Replayed"]) == (500, "true")
    assert shop.amounts() == [1]


def test_an_exception_undoes_everything(open_shop: OpenShop) -> None:
    def failing(environ: Any, start_response: Any) -> Any:
        charge(1)
        raise LookupError("no such account")

    shop = open_shop(failing)
    for _ in range(2):
        with pytest.raises(LookupError, match="no such account"):
            shop.post()
    assert (shop.amounts(), shop.rows()) == ([], [])


def test_an_interrupted_handler_undoes_everything(open_shop: OpenShop) -> None:
    def interrupted(environ: Any, start_response: Any) -> Any:
        charge(1)
        raise KeyboardInterrupt

    shop = open_shop(interrupted)
    with pytest.raises(KeyboardInterrupt):
        shop.post()
    assert (shop.amounts(), shop.rows()) == ([], [])


def test_the_handler_may_overrule_the_policy(open_shop: OpenShop) -> None:
    def regretting(environ: Any, start_response: Any) -> Any:
        charge(1)
        current_operation.forget()
        return Response("sorry", 200)(environ, start_response)

    shop = open_shop(regretting)
    assert shop.post().status_code == 200
    assert (shop.amounts(), shop.rows()) == ([], [])


def test_another_payload_is_refused_once_the_first_is_committed(open_shop: OpenShop) -> None:
    shop = open_shop(charging)
    shop.post(data=b"one")
    refused = shop.post(data=b"another")
    assert (refused.status_code, code(refused)) == (422, "FINGERPRINT_MISMATCH")
    assert shop.amounts() == [1]


# ---------------------------------------------------------------------- the application's own


def test_the_session_s_own_rollback_undoes_what_it_always_did(open_shop: OpenShop) -> None:
    """A failed part is undone, and the rest committed."""

    def trying(environ: Any, start_response: Any) -> Any:
        charge(1)
        with session() as joined:
            joined.add(Charge(amount=1))
            with pytest.raises(IntegrityError):
                joined.commit()
            joined.rollback()
            joined.add(Charge(amount=2))
            joined.commit()
            joined.add(Charge(amount=3))
            joined.flush()
        return Response(status=201)(environ, start_response)

    shop = open_shop(trying)
    assert shop.post().status_code == 201
    assert shop.amounts() == [1, 2]


def test_what_a_forgotten_session_has_only_flushed_is_undone(open_shop: OpenShop) -> None:
    forgotten = []

    def forgetful(environ: Any, start_response: Any) -> Any:
        charge(1)
        forgotten.append(session())
        forgotten[-1].add(Charge(amount=2))
        forgotten[-1].flush()
        return Response(status=201)(environ, start_response)

    shop = open_shop(forgetful)
    assert shop.post().status_code == 201
    assert shop.amounts() == [1]


def commit_by_force(connection: Connection) -> None:
    connection.execute(text("INSERT INTO charges (amount) VALUES (5)"))
    connection.commit()


def roll_back(connection: Connection) -> None:
    charge(5)
    connection.rollback()


def roll_back_and_go_on(connection: Connection) -> None:
    roll_back(connection)
    connection.execute(text("INSERT INTO charges (amount) VALUES (5)"))


def roll_the_driver_back(connection: Connection) -> None:
    charge(5)
    connection.connection.driver_connection.rollback()


def roll_the_driver_back_and_go_on(connection: Connection) -> None:
    """What SQLAlchemy doesn't know of, it begins no transaction after."""
    roll_the_driver_back(connection)
    connection.execute(text("INSERT INTO charges (amount) VALUES (5)"))


def close(connection: Connection) -> None:
    charge(5)
    connection.close()


@pytest.mark.parametrize(
    ("do", "says"),
    [
        (roll_back, "the application rolled it back"),
        (roll_back_and_go_on, "the application rolled it back"),
        (roll_the_driver_back, "the application rolled it back"),
        (roll_the_driver_back_and_go_on, "the application rolled it back"),
        (close, "the application closed its connection"),
    ],
    ids=[
        "rolled back",
        "rolled back and gone on",
        "rolled back by the driver",
        "rolled back by the driver and gone on",
        "closed",
    ],
)
def test_a_success_whose_writes_are_gone_is_no_success(
    open_shop: OpenShop,
    caplog: pytest.LogCaptureFixture,
    do: Callable[[Connection], None],
    says: str,
) -> None:
    """Also on the connection that another request has left."""

    def pretending(environ: Any, start_response: Any) -> Any:
        do(current_operation.connection)
        return Response("done", 201)(environ, start_response)

    shop = open_shop(pretending)
    for key in ("one", "two"):
        caplog.clear()
        failed = shop.post(key)
        assert (failed.status_code, code(failed)) == (500, "TRANSACTION_FAILED")
        assert failed.headers["X-Should-Retry"] == "false"
        assert says in caplog.text
        assert (shop.amounts(), shop.rows()) == ([], [])


def test_the_application_can_t_commit_what_has_no_response_yet(
    open_shop: OpenShop, caplog: pytest.LogCaptureFixture
) -> None:
    def impatient(environ: Any, start_response: Any) -> Any:
        commit_by_force(current_operation.connection)
        return Response("done", 201)(environ, start_response)

    shop = open_shop(impatient)
    failed = shop.post()
    assert (failed.status_code, code(failed)) == (500, "TRANSACTION_FAILED")
    assert "begin_nested()" in caplog.text
    assert (shop.amounts(), shop.rows()) == ([], [])


def test_a_forbidden_commit_that_is_shrugged_off_commits_nothing_by_itself(
    open_shop: OpenShop,
) -> None:
    seen = []

    def shrugging(environ: Any, start_response: Any) -> Any:
        with pytest.raises(TransactionFailed):
            commit_by_force(current_operation.connection)
        seen.append(shop.amounts())
        return Response("done", 201)(environ, start_response)

    shop = open_shop(shrugging)
    assert shop.post().status_code == 201
    assert (seen, shop.amounts()) == ([[]], [5])


def test_an_operation_without_a_transaction_has_no_connection(database: str) -> None:
    def asking(environ: Any, start_response: Any) -> Any:
        with pytest.raises(NoTransaction, match="give its policy transaction=True"):
            _ = current_operation.connection
        return Response(status=201)(environ, start_response)

    middleware = IdempotencyMiddleware(asking, MemoryStore(), scope=everyone)
    answer = Client(middleware).post("/", headers={"Idempotency-Key": "k"})
    assert answer.status_code == 201


def test_a_store_without_transactions_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="MemoryStore is none, use PostgreSQL or SQLite"):
        IdempotencyMiddleware(
            charging,
            "memory:",
            scope=everyone,
            policy=None,
            routes=[Route("/charges", Policy(transaction=True))],
        )


def test_an_application_that_never_joins_is_told_once(
    open_shop: OpenShop, caplog: pytest.LogCaptureFixture
) -> None:
    shop = open_shop(Response("done", 201))
    for number in range(3):
        assert shop.post(f"key-{number}").status_code == 201
    told = [r for r in caplog.records if "never asked for current_operation" in r.message]
    assert [(record.levelno, record.name) for record in told] == [
        (logging.WARNING, "wsgi_idempotency")
    ]


# ---------------------------------------------------------------------- answers


def test_a_large_answer_is_sent_whole_and_remembered_without_its_body(
    open_shop: OpenShop,
) -> None:
    def large(environ: Any, start_response: Any) -> Any:
        write = start_response("500 No", [])
        write(b"x" * 100_000)
        try:
            raise ValueError
        except ValueError as exc:
            start_response("201 Yes", [("Location", "/1")], (type(exc), exc, None))
        charge(1)
        for number in range(5):
            yield bytes([number]) * 50_000

    shop = open_shop(large, max_response_bytes=80_000)
    assert shop.post(buffered=True).data == b"".join(bytes([n]) * 50_000 for n in range(5))
    retry = shop.post()
    assert (retry.status_code, code(retry)) == (409, "RESPONSE_NOT_REPLAYABLE")
    assert (json.loads(retry.data)["original_status"], retry.location) == (201, "/1")
    assert shop.amounts() == [1]


def test_an_answer_that_says_it_is_large_is_held_back_all_the_same(open_shop: OpenShop) -> None:
    seen = []

    def large(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("Content-Length", "100")])
        yield b"x" * 50
        charge(1)
        seen.append(shop.amounts())
        yield b"y" * 50

    shop = open_shop(large, max_response_bytes=80)
    assert shop.post(buffered=True).data == b"x" * 50 + b"y" * 50
    assert (seen, shop.amounts()) == ([[]], [1])


def test_an_event_stream_is_refused(open_shop: OpenShop, caplog: pytest.LogCaptureFixture) -> None:
    """It would have to be held back until it ends."""
    closed = []

    def streaming(environ: Any, start_response: Any) -> Any:
        charge(1)
        start_response("200 OK", [("Content-Type", "text/event-stream; charset=utf-8")])
        try:
            yield b"data: 1\n\n"
            yield b"data: 2\n\n"
        finally:
            closed.append(True)

    shop = open_shop(streaming)
    refused = shop.post()
    assert (refused.status_code, code(refused)) == (500, "TRANSACTION_FAILED")
    assert "event stream" in caplog.text
    assert (shop.amounts(), shop.rows(), closed) == ([], [], [True])


def test_an_answer_to_a_range_request_is_done_and_not_replayed(open_shop: OpenShop) -> None:
    shop = open_shop(charging)
    assert shop.post(headers={"X-Status": "206 Partial Content"}).status_code == 206
    assert code(shop.post(headers={"X-Status": "206 Partial Content"})) == "RESPONSE_NOT_REPLAYABLE"
    assert shop.amounts() == [1]


# ---------------------------------------------------------------------- one at a time


@dataclass
class Door:
    """Where a handler waits within its transaction."""

    reached: threading.Event = field(default_factory=threading.Event)
    open: threading.Event = field(default_factory=threading.Event)
    status: str = "201 Created"
    runs: int = 0

    def app(self, environ: Any, start_response: Any) -> Any:
        self.runs += 1
        first = self.runs == 1
        charge(self.runs)
        if first:
            self.reached.set()
            assert self.open.wait(30)
        status = self.status if first else "201 Created"
        body = io.BytesIO(b"%d" % self.runs)
        return Response(body, status)(environ, start_response)


@contextmanager
def inside(door: Door, shop: Shop, **options: Any) -> Iterator[Callable[[], TestResponse]]:
    """While a request waits at the door; what is yielded opens it and returns its answer."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(shop.post, **options)
        assert door.reached.wait(30)

        def finish() -> TestResponse:
            door.open.set()
            return future.result(30)

        try:
            yield finish
        finally:
            door.open.set()


@pytest.fixture
def door() -> Door:
    return Door()


def on_postgresql(shop: Shop) -> bool:
    return shop.engine.dialect.name == "postgresql"


def test_a_duplicate_in_flight_is_refused_and_others_are_not_kept(
    open_shop: OpenShop, door: Door
) -> None:
    """On SQLite there is one transaction at a time: it waits for the lock, then replays."""
    shop = open_shop(door.app, store_options={"timeout": 0.5})
    with inside(door, shop) as finish:
        refused = shop.post()
        other = shop.post("another")
        if on_postgresql(shop):
            assert (refused.status_code, code(refused)) == (409, "CONFLICT")
            assert refused.headers["Retry-After"] == "1"
            # Its fingerprint can't be seen before the commit.
            assert code(shop.post(data=b"another payload")) == "CONFLICT"
            assert other.status_code == 201
        else:
            for answer in (refused, other):
                assert (answer.status_code, code(answer)) == (503, "STORE_UNAVAILABLE")
        assert finish().status_code == 201
    assert shop.post().headers["Idempotency-Replayed"] == "true"
    assert code(shop.post(data=b"another payload")) == "FINGERPRINT_MISMATCH"


def test_a_duplicate_waits_for_the_commit_and_replays(open_shop: OpenShop, door: Door) -> None:
    shop = open_shop(door.app, wait=30, store_options={"timeout": 0.5})
    with inside(door, shop) as finish, ThreadPoolExecutor(1) as pool:
        waiter = pool.submit(shop.post)
        if on_postgresql(shop):
            wait_for_waiters(shop, 1)
        first = finish()
        replay = waiter.result(30)
    assert (first.data, replay.data) == (b"1", b"1")
    assert replay.headers["Idempotency-Replayed"] == "true"
    assert (door.runs, shop.amounts()) == (1, [1])


def test_a_duplicate_whose_wait_the_server_cancels_is_refused(
    pg_shop: OpenShop, door: Door
) -> None:
    """By a person or a statement_timeout: that says nothing of the key."""
    shop = pg_shop(door.app, wait=30)
    with inside(door, shop) as finish, ThreadPoolExecutor(1) as pool:
        waiter = pool.submit(shop.post)
        wait_for_waiters(shop, 1)
        waiting = (
            "SELECT pg_cancel_backend(pid) FROM pg_stat_activity"
            " WHERE wait_event = 'advisory' AND datname = current_database()"
        )
        with shop.engine.connect() as connection:
            assert connection.scalars(text(waiting)).all() == [True]
        refused = waiter.result(30)
        assert (refused.status_code, code(refused)) == (503, "STORE_UNAVAILABLE")
        assert finish().status_code == 201
    assert door.runs == 1


def test_a_transaction_that_is_over_leaves_its_connection_to_the_next(pg_shop: OpenShop) -> None:
    """Also where it is rolled back again."""
    shop = pg_shop(charging, store_options={"max_transactions": 1})
    claim = claim_of(shop)
    first = shop.store.begin(claim)
    assert first is not None
    first.rollback()
    second = shop.store.begin(claim)
    assert second is not None
    first.rollback()
    second.complete(Completion("201 Made", (), b"made"))
    assert [row["state"] for row in shop.rows()] == ["completed"]


def wait_for_waiters(shop: Shop, count: int) -> None:
    """Until so many sessions wait for an advisory lock."""
    waiting = text(
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    with shop.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        while connection.scalar(waiting) < count:
            assert connection.execute(text("SELECT pg_sleep(0.01)"))


@pytest.mark.parametrize("isolation_level", [None, "READ COMMITTED", "SERIALIZABLE"])
def test_when_the_first_fails_exactly_one_of_the_waiting_runs(
    open_shop: OpenShop, door: Door, isolation_level: str | None
) -> None:
    door.status = "503 Not Now"
    shop = open_shop(door.app, wait=30, isolation_level=isolation_level)
    with inside(door, shop) as finish, ThreadPoolExecutor(5) as pool:
        waiters = [pool.submit(shop.post) for _ in range(5)]
        if on_postgresql(shop):
            wait_for_waiters(shop, 5)
        assert finish().status_code == 503
        answers = [waiter.result(30) for waiter in waiters]
    assert [answer.data for answer in answers] == [b"2"] * 5
    assert sum("Idempotency-Replayed" in answer.headers for answer in answers) == 4
    assert (door.runs, shop.amounts()) == (2, [2])


def test_no_more_than_max_waiting_wait(pg_shop: OpenShop, door: Door) -> None:
    shop = pg_shop(door.app, wait=30)
    shop.middleware.waiting = threading.BoundedSemaphore(1)
    with inside(door, shop) as finish, ThreadPoolExecutor(1) as pool:
        waiter = pool.submit(shop.post)
        wait_for_waiters(shop, 1)
        assert code(shop.post()) == "CONFLICT"
        finish()
        assert waiter.result(30).data == b"1"
    [waited] = shop.told("waited")
    assert waited.seconds is not None


def test_a_wait_that_is_too_short_ends_in_a_conflict(pg_shop: OpenShop, door: Door) -> None:
    shop = pg_shop(door.app, wait=0.1)
    with inside(door, shop) as finish:
        assert code(shop.post()) == "CONFLICT"
        finish()
    assert door.runs == 1


def test_who_waited_has_the_lock_timeout_of_everybody(pg_shop: OpenShop, door: Door) -> None:
    """Else a statement of the application's might be cancelled that waits for a row."""
    door.status = "503 Not Now"

    def asking(environ: Any, start_response: Any) -> Any:
        answer = door.app(environ, start_response)
        seen.append(current_operation.connection.scalar(text("SHOW lock_timeout")))
        return answer

    seen: list[str] = []
    shop = pg_shop(asking, wait=30)
    with shop.engine.begin() as connection:
        name = connection.scalar(text("SELECT current_database()"))
        connection.execute(text(f"ALTER DATABASE {name} SET lock_timeout = '7s'"))
    with inside(door, shop) as finish, ThreadPoolExecutor(1) as pool:
        waiter = pool.submit(shop.post)
        wait_for_waiters(shop, 1)
        finish()
        assert waiter.result(30).data == b"2"
    assert seen == ["7s", "7s"]


@pytest.mark.parametrize("isolation_level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_of_many_at_once_one_runs_whatever_its_snapshot_shows(
    pg_shop: OpenShop, isolation_level: str
) -> None:
    """Most begin before another commits and get its lock after: the row is there, and their
    snapshot doesn't show it. Not even a run that is undone again may come of that."""
    runs: list[str] = []

    def counting(environ: Any, start_response: Any) -> Any:
        runs.append(current_operation.key)
        charge(int(current_operation.key))
        return Response("done", 201)(environ, start_response)

    shop = pg_shop(counting, isolation_level=isolation_level, wait=30)
    keys = [str(number) for number in range(1, 26) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(shop.post, keys))
    assert {answer.status_code for answer in answers} == {201}
    assert sorted(runs) == sorted(set(keys))
    assert sorted(shop.amounts()) == list(range(1, 26))


# ---------------------------------------------------------------------- rows with a lease


def claim_of(shop: Shop, **changes: Any) -> Claim:
    """The claim that a request would make, as another policy made it before."""
    claims: list[Claim] = []
    begin = shop.store.begin

    def noting(claim: Claim, **options: Any) -> Any:
        claims.append(claim)
        return begin(claim, **options)

    shop.store.begin = noting  # type: ignore[method-assign]
    shop.post(headers={"X-Status": "400"})
    shop.store.begin = begin  # type: ignore[method-assign]
    return dataclasses.replace(claims[0], token=b"-" * 16, **changes)


def test_what_is_in_flight_with_a_lease_is_refused(open_shop: OpenShop) -> None:
    shop = open_shop(charging)
    shop.store.claim(claim_of(shop))
    assert code(shop.post()) == "CONFLICT"
    assert code(shop.post(data=b"another payload")) == "FINGERPRINT_MISMATCH"


def test_what_is_in_flight_with_a_lease_is_waited_for(open_shop: OpenShop) -> None:
    shop = open_shop(charging, wait=0.1)
    claim = claim_of(shop)
    shop.store.claim(claim)
    assert code(shop.post()) == "CONFLICT"
    shop.store.complete(claim.digest, claim.token, Completion("202 Accepted", (), b"leased"))
    assert shop.post().data == b"leased"


@pytest.mark.parametrize("on_store_failure", ["refuse", "bypass"])
def test_a_policy_without_a_transaction_waits_for_one_and_takes_it_for_a_store_that_fails(
    open_shop: OpenShop, door: Door, on_store_failure: Literal["refuse", "bypass"]
) -> None:
    """As what is said of a deploy that turns ``transaction`` on warns of."""
    beside = Response(b"beside", 201)
    policy = Policy(on_store_failure=on_store_failure)
    shop = open_shop(door.app)
    with closing(SQLStore(shop.url, timeout=0.3)) as store, inside(door, shop) as finish:
        middleware = IdempotencyMiddleware(beside, store, scope=everyone, policy=policy)
        other = Client(middleware)
        answer = other.post("/charges", headers={"Idempotency-Key": "k"})
        if on_store_failure == "refuse":
            assert (answer.status_code, code(answer)) == (503, "STORE_UNAVAILABLE")
        else:
            assert (answer.data, answer.headers["Idempotency-Status"]) == (b"beside", "unprotected")
        assert finish().status_code == 201
        replay = other.post("/charges", headers={"Idempotency-Key": "k"})
        assert replay.headers["Idempotency-Replayed"] == "true"
        # To undo the claim that had no answer is tried for two minutes: longer than there is a
        # database.
        middleware.heartbeat._kept.clear()


def test_what_a_lease_held_is_held(open_shop: OpenShop) -> None:
    shop = open_shop(charging)
    claim = claim_of(shop)
    shop.store.claim(claim)
    shop.store.hold(claim.digest, claim.token)
    assert code(shop.post()) == "OUTCOME_UNKNOWN"


def test_what_a_lease_released_is_the_next_attempt(open_shop: OpenShop) -> None:
    """And stays released when that one fails."""
    shop = open_shop(charging)
    claim = claim_of(shop)
    shop.store.claim(claim)
    shop.store.release(claim.digest, claim.token)
    assert shop.post(headers={"X-Status": "500"}).headers["X-Attempt"] == "2"
    [row] = shop.rows()
    assert (row["state"], row["attempt"]) == ("released", 1)
    assert shop.post().headers["X-Attempt"] == "2"
    [row] = shop.rows()
    assert (row["state"], row["attempt"]) == ("completed", 2)
    assert [event.attempt for event in shop.told("taken_over")] == [2, 2]


def test_what_has_expired_is_fresh(open_shop: OpenShop) -> None:
    shop = open_shop(charging)
    claim = claim_of(shop, retention=-1.0, lease=-2.0)
    shop.store.claim(claim)
    shop.store.complete(claim.digest, claim.token, Completion("202 Accepted", (), b"old"))
    assert shop.post(data=b"another payload").headers["X-Attempt"] == "1"
    assert shop.amounts() == [1]


def test_what_is_taken_over_in_another_transaction_is_in_flight(
    pg_shop: OpenShop, door: Door
) -> None:
    """Everybody sees the row as it was before: released, and yet nobody may run it."""
    shop = pg_shop(door.app)
    claim = claim_of(pg_shop(charging))
    shop.store.claim(claim)
    shop.store.release(claim.digest, claim.token)
    with inside(door, shop) as finish:
        assert code(shop.post()) == "CONFLICT"
        assert finish().status_code == 201
    assert door.runs == 1


def test_a_row_that_changes_between_look_and_take_over_is_looked_at_again(
    open_shop: OpenShop,
) -> None:
    shop = open_shop(charging)
    claim = claim_of(shop)
    shop.store.claim(claim)
    shop.store.release(claim.digest, claim.token)
    other = dataclasses.replace(claim, token=b"+" * 16)
    begin = shop.store.begin

    def meddling(claim: Claim, **options: Any) -> Any:
        transaction = begin(claim, **options)
        assert transaction is not None
        if on_postgresql(shop) and len(seen) < 2:
            seen.append(transaction.seen)
            seen.append(shop.store.take_over(other, transaction.seen))
            shop.store.release(other.digest, other.token)
        return transaction

    seen: list[Any] = []
    shop.store.begin = meddling  # type: ignore[method-assign]
    attempt = "3" if on_postgresql(shop) else "2"
    assert shop.post().headers["X-Attempt"] == attempt
    assert shop.amounts() == [1]


# ---------------------------------------------------------------------- collisions


@pytest.mark.parametrize(
    ("raw", "converted"),
    [(False, False), (False, True), (True, False)],
    ids=["raised by SQLAlchemy", "made into a 500", "raised by psycopg"],
)
def test_a_serialization_failure_can_be_sent_again(
    pg_shop: OpenShop, raw: bool, converted: bool
) -> None:
    """Two that read each other's rows and write: one of them is undone."""
    door = Door()

    def skewed(environ: Any, start_response: Any) -> Any:
        connection = current_operation.connection
        run = connection.exec_driver_sql
        if raw:
            run = connection.connection.driver_connection.execute
        run("SELECT sum(amount) FROM charges")
        if current_operation.key == "first" and not door.reached.is_set():
            door.reached.set()
            assert door.open.wait(30)
        try:
            run(f"INSERT INTO charges (amount) VALUES ({len(current_operation.key)})")
        except Exception:
            if not converted:
                raise
            return Response("oops", 500)(environ, start_response)
        return Response("done", 201)(environ, start_response)

    shop = pg_shop(skewed, isolation_level="SERIALIZABLE")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(shop.post, "first")
        assert door.reached.wait(30)
        assert shop.post("another").status_code == 201
        door.open.set()
        refused = first.result(30)
    assert (refused.status_code, code(refused)) == (503, "TRANSACTION_CONFLICT")
    assert refused.headers["Retry-After"] == "1"
    assert refused.headers["X-Should-Retry"] == "true"
    assert shop.amounts() == [7]
    assert [row["idempotency_key"] for row in shop.rows()] == ["another"]
    assert shop.post("first").status_code == 201
    assert shop.amounts() == [7, 5]


def test_a_serialization_failure_at_the_commit_can_be_sent_again(pg_shop: OpenShop) -> None:
    shop = pg_shop(charging, isolation_level="SERIALIZABLE")
    with shop.engine.begin() as connection:
        raise_at_commit(connection, "40001")
    refused = shop.post()
    assert (refused.status_code, code(refused)) == (503, "TRANSACTION_CONFLICT")
    assert (shop.amounts(), shop.rows()) == ([], [])
    assert told(shop) == [("executed", "forget"), ("refused", None)]


def told(shop: Shop) -> list[tuple[str, str | None]]:
    """The events of its requests, and what became of their claims."""
    return [(event.name, event.action) for event in shop.events]


def raise_at_commit(connection: Connection, sqlstate: str) -> None:
    """Make every COMMIT that has charged something fail."""
    connection.execute(
        text(
            "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS"
            f" $$ BEGIN RAISE EXCEPTION 'at the commit' USING ERRCODE = '{sqlstate}'; END $$"
        )
    )
    connection.execute(
        text(
            "CREATE CONSTRAINT TRIGGER fails AFTER INSERT ON charges"
            " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fail()"
        )
    )


@pytest.mark.parametrize(
    ("sqlstate", "expected"),
    [("23514", (500, "TRANSACTION_FAILED")), ("53100", (503, "STORE_UNAVAILABLE"))],
    ids=["a constraint that is checked last", "a full disk"],
)
def test_a_commit_that_fails_has_done_nothing(
    pg_shop: OpenShop, sqlstate: str, expected: tuple[int, str]
) -> None:
    shop = pg_shop(charging)
    with shop.engine.begin() as connection:
        raise_at_commit(connection, sqlstate)
    failed = shop.post()
    assert (failed.status_code, code(failed)) == expected
    assert (shop.amounts(), shop.rows()) == ([], [])
    lost = [("store_failure", None)] if expected[0] == 503 else []
    assert told(shop) == [*lost, ("executed", "forget"), ("refused", None)]


def test_a_success_in_a_transaction_that_has_failed_is_none(pg_shop: OpenShop) -> None:
    """PostgreSQL answers its COMMIT with ROLLBACK, and no error."""

    def shrugging(environ: Any, start_response: Any) -> Any:
        charge(1)
        with pytest.raises(ProgrammingError):
            current_operation.connection.execute(text("SELECT nonsense"))
        return Response("done", 201)(environ, start_response)

    shop = pg_shop(shrugging)
    assert code(shop.post()) == "TRANSACTION_FAILED"
    assert (shop.amounts(), shop.rows()) == ([], [])


# ---------------------------------------------------------------------- the database goes


@pytest.mark.parametrize("cut", ["before", "after"])
def test_a_commit_whose_answer_is_lost_is_found_out(
    pg_shop: OpenShop, caplog: pytest.LogCaptureFixture, cut: Any
) -> None:
    """The client gets its response if it took effect, and may send it again if it didn't."""
    with through_proxy(pg_shop, cut) as shop:
        answer = shop.post()
        if cut == "after":
            assert (answer.status_code, answer.data) == (201, b"charged")
        else:
            assert (answer.status_code, code(answer)) == (503, "STORE_UNAVAILABLE")
            assert (shop.amounts(), shop.rows()) == ([], [])
        retry = shop.post()
        assert (retry.status_code, retry.data) == (201, b"charged")
        assert ("Idempotency-Replayed" in retry.headers) is (cut == "after")
        assert shop.amounts() == [1]


@pytest.mark.parametrize("commits", [True, False], ids=["and comes", "and never comes"])
def test_a_commit_that_is_on_its_way_is_waited_for(pg_shop: OpenShop, commits: bool) -> None:
    """The key's lock says that its transaction isn't over, and nobody may be told anything."""
    with through_proxy(pg_shop, "withheld") as shop:
        lookup, looks = shop.store.lookup, list[object]()

        def watched(digest: bytes) -> Any:
            looks.append(lookup(digest))
            if looks == [None]:
                assert shop.proxy is not None
                shop.proxy.let_go(commits=commits)
            return looks[-1]

        shop.store.lookup = watched  # type: ignore[method-assign]
        assert shop.post().status_code == (201 if commits else 503)
    assert looks[0] is None
    assert len(looks) > 1
    assert shop.amounts() == ([1] if commits else [])
    assert len(shop.rows()) == len(shop.amounts())


class Losing(sqlite3.Connection):
    """A file whose connection is gone at the first COMMIT: before it, or after."""

    after = False
    lost = False

    def commit(self) -> None:
        if self.in_transaction and not Losing.lost:
            Losing.lost = True
            if self.after:
                super().commit()
            self.close()
        super().commit()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_commit_in_sqlite_whose_connection_is_lost_is_found_out(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    """It has no server on which it could go on: whether it took effect, the row tells."""
    monkeypatch.setattr(Losing, "after", after)
    monkeypatch.setattr(Losing, "lost", False)
    given = create_engine(sqlite_url, connect_args={"factory": Losing})
    for open_shop in opener(sqlite_url):
        shop = open_shop(charging, given=given)
        assert shop.post().status_code == (201 if after else 503)
        assert Losing.lost
        assert shop.amounts() == ([1] if after else [])
        assert shop.post().status_code == 201
        assert shop.amounts() == [1]
    given.dispose()


def test_a_commit_that_nobody_can_tell_of_is_sent_again(pg_shop: OpenShop) -> None:
    with through_proxy(pg_shop, "after", then_deaf=True, timeout=0.5) as shop:
        unknown = shop.post()
    assert (unknown.status_code, code(unknown)) == (503, "COMMIT_UNKNOWN")
    assert unknown.headers["X-Should-Retry"] == "true"
    assert shop.amounts() == [1]
    assert told(shop) == [("store_failure", None), ("executed", None), ("refused", None)]
    assert pg_shop(charging).post().headers["Idempotency-Replayed"] == "true"


@contextmanager
def through_proxy(
    pg_shop: OpenShop, cut: Any, *, then_deaf: bool = False, timeout: float = 5.0
) -> Iterator[Shop]:
    """A shop whose first COMMIT loses its connection."""
    shop = pg_shop(charging)
    upstream = make_url(shop.url)
    assert upstream.host is not None
    assert upstream.port is not None
    address = (upstream.host, upstream.port)
    with CommitProxy(address, cut, then_deaf=then_deaf) as proxy:
        url = upstream.set(port=proxy.address[1]).render_as_string(hide_password=False)
        proxied = pg_shop(charging, store_options={"timeout": timeout}, url=url)
        proxied.engine = shop.engine
        proxied.proxy = proxy
        yield proxied
        proxied.store.close()


def terminate(shop: Shop, *, but: int = 0) -> None:
    """End every other session of the database."""
    with shop.engine.connect() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname ="
                " current_database() AND pid NOT IN (pg_backend_pid(), :but)"
            ),
            {"but": but},
        )


def test_a_connection_that_died_in_the_pool_costs_nobody_an_error(pg_shop: OpenShop) -> None:
    shop = pg_shop(charging)
    assert shop.post("one").status_code == 201
    terminate(shop)
    assert shop.post("two", query_string={"amount": "2"}).status_code == 201
    assert shop.amounts() == [1, 2]


def test_a_database_that_is_away_refuses_the_request(pg_shop: OpenShop) -> None:
    """Also when the second connection is dead like the first."""
    shop = pg_shop(charging)
    assert shop.post("one").status_code == 201
    with shop.engine.begin() as connection:
        name = connection.scalar(text("SELECT current_database()"))
        connection.execute(text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
    terminate(shop)
    refused = shop.post("two")
    assert (refused.status_code, code(refused)) == (503, "STORE_UNAVAILABLE")
    assert shop.amounts() == [1]


def test_a_database_that_takes_no_connection_refuses_the_request(
    pg_shop: OpenShop, postgres: Postgres
) -> None:
    shop = pg_shop(charging)
    assert shop.post("one").status_code == 201
    name = database_of(shop.url)
    postgres.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    terminate(shop)
    refused = shop.post("two", query_string={"amount": "2"})
    assert (refused.status_code, code(refused)) == (503, "STORE_UNAVAILABLE")
    postgres.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    assert shop.post("two", query_string={"amount": "2"}).status_code == 201
    assert shop.amounts() == [1, 2]


@pytest.mark.parametrize("converted", [False, True], ids=["raised", "made into a 500"])
def test_a_connection_lost_in_the_handler_undoes_everything(
    pg_shop: OpenShop, converted: bool
) -> None:
    def losing(environ: Any, start_response: Any) -> Any:
        charge(1)
        terminate(shop)
        try:
            charge(2)
        except OperationalError:
            if not converted:
                raise
        return Response("done", 201)(environ, start_response)

    shop = pg_shop(losing)
    if converted:
        assert code(shop.post()) == "STORE_UNAVAILABLE"
    else:
        with pytest.raises(OperationalError):
            shop.post()
    assert (shop.amounts(), shop.rows()) == ([], [])


def test_a_connection_lost_before_the_record_undoes_everything(pg_shop: OpenShop) -> None:
    def losing(environ: Any, start_response: Any) -> Any:
        charge(1)
        terminate(shop)
        return Response("done", 201)(environ, start_response)

    shop = pg_shop(losing)
    refused = shop.post()
    assert (refused.status_code, code(refused)) == (503, "STORE_UNAVAILABLE")
    assert (shop.amounts(), shop.rows()) == ([], [])


def test_a_connection_lost_before_a_rollback_costs_nobody_an_error(pg_shop: OpenShop) -> None:
    def losing(environ: Any, start_response: Any) -> Any:
        charge(1)
        terminate(shop)
        return Response("sorry", 400)(environ, start_response)

    shop = pg_shop(losing)
    assert shop.post().status_code == 400
    assert (shop.amounts(), shop.rows()) == ([], [])


def test_with_every_transaction_taken_the_next_is_refused_in_time(
    open_shop: OpenShop, door: Door
) -> None:
    shop = open_shop(door.app, store_options={"timeout": 0.3, "max_transactions": 1})
    with inside(door, shop) as finish:
        refused = shop.post("another")
        assert (refused.status_code, code(refused)) == (503, "STORE_UNAVAILABLE")
        assert finish().status_code == 201
    assert shop.post("another").status_code == 201


def test_the_application_s_statements_take_their_time(pg_shop: OpenShop) -> None:
    """The bound is for our own."""

    def slow(environ: Any, start_response: Any) -> Any:
        current_operation.connection.execute(text("SELECT pg_sleep(0.8)"))
        return Response("done", 201)(environ, start_response)

    assert pg_shop(slow, store_options={"timeout": 0.3}).post().status_code == 201


def test_a_statement_of_ours_that_never_ends_is_given_up(pg_shop: OpenShop) -> None:
    """Somebody has locked the table."""
    shop = pg_shop(charging, store_options={"timeout": 0.3})
    assert shop.post("one").status_code == 201
    with shop.engine.begin() as connection:
        connection.execute(text("LOCK TABLE idempotency_keys"))
        refused = shop.post("two")
    assert (refused.status_code, code(refused)) == (503, "STORE_UNAVAILABLE")
    assert shop.post("two", query_string={"amount": "2"}).status_code == 201


# ---------------------------------------------------------------------- what it costs, and on what


@pytest.mark.parametrize("isolation_level", [None, "REPEATABLE READ", "SERIALIZABLE"])
def test_the_transaction_has_the_isolation_that_was_asked_for(
    pg_shop: OpenShop, isolation_level: str | None
) -> None:
    def asking(environ: Any, start_response: Any) -> Any:
        level = current_operation.connection.scalar(text("SHOW transaction_isolation"))
        return Response(level, 201)(environ, start_response)

    shop = pg_shop(asking, isolation_level=isolation_level)
    for key in ("one", "two"):
        assert shop.post(key).text == (isolation_level or "READ COMMITTED").lower()


def test_it_adds_no_commit_to_an_application_that_commits_once(
    postgres_server: PostgresServer, pg_shop: OpenShop
) -> None:
    shop = pg_shop(charging)
    shop.post("warm", query_string={"amount": "9"})
    with postgres_server.statements(shop.url) as fresh:
        shop.store.transactions.dispose()
        shop.post("k")
    with postgres_server.statements(shop.url) as replay:
        shop.store.transactions.dispose()
        shop.post("k")
    kinds = [statement.split(None, 1)[0] for statement in fresh]
    # With the session's reset in the COMMIT's own round trip.
    assert kinds == ["BEGIN", "WITH", "SAVEPOINT", "INSERT", "RELEASE", "UPDATE", "COMMIT;"]
    assert fresh[-1].startswith("COMMIT; SELECT pg_catalog.pg_advisory_unlock_all();")
    assert [statement.split(None, 1)[0] for statement in replay] == ["BEGIN", "WITH", "COMMIT"]


@pytest.mark.parametrize("options", [{}, {"isolation_level": "AUTOCOMMIT"}])
def test_a_given_engine_s_transactions_are_joined(
    database: str, open_shop: OpenShop, options: dict[str, Any]
) -> None:
    shop = open_shop(charging)
    engine = create_engine(database, **options)
    middleware = IdempotencyMiddleware(
        charging, engine, scope=everyone, policy=Policy(transaction=True)
    )
    headers = {"Idempotency-Key": "k"}
    answer = Client(middleware).post("/charges", headers=headers)
    assert (answer.status_code, shop.amounts()) == (201, [1])
    failed = Client(middleware).post(
        "/charges?amount=2", headers={"Idempotency-Key": "l", "X-Status": "500"}
    )
    assert (failed.status_code, shop.amounts()) == (500, [1])
    middleware.store.close()
    engine.dispose()


def test_psycopg_itself_is_joined_below(pg_shop: OpenShop) -> None:
    def raw(environ: Any, start_response: Any) -> Any:
        driver = current_operation.connection.connection.driver_connection
        insert = "INSERT INTO charges (amount) VALUES (1)"
        with pytest.raises(psycopg.errors.UniqueViolation), driver.transaction():
            driver.execute(f"{insert}, (1)")
        with driver.transaction():
            driver.execute("INSERT INTO charges (amount) VALUES (2)")
        return Response("done", environ["HTTP_X_STATUS"])(environ, start_response)

    shop = pg_shop(raw)
    assert shop.post(headers={"X-Status": "500"}).status_code == 500
    assert shop.amounts() == []
    assert shop.post(headers={"X-Status": "201"}).status_code == 201
    assert shop.amounts() == [2]


def test_no_transactions_at_all_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="max_transactions is 0"):
        SQLStore("sqlite:///keys.db", max_transactions=0)


def test_without_prepared_statements_none_is_left(pg_shop: OpenShop) -> None:
    """As behind an older PgBouncer."""

    def counting(environ: Any, start_response: Any) -> Any:
        charge(1)
        with session() as joined:
            for _ in range(10):
                joined.execute(text("SELECT 1"))
        number = text("SELECT count(*) FROM pg_prepared_statements")
        return Response(str(current_operation.connection.scalar(number)), 201)(
            environ, start_response
        )

    assert pg_shop(counting, store_options={"prepare": False}).post().data == b"0"


def test_a_transaction_that_nobody_ends_ends_when_it_is_collected(database: str) -> None:
    """A thread may be interrupted between any two lines, and would leave the key locked. What its
    connection was in the middle of nobody knows: the next has another."""
    store = SQLStore(database, timeout=1.0)
    claim = make_claim()
    transaction = store.begin(claim)
    assert transaction is not None
    assert transaction.claimed is not None
    driver = transaction._driver
    del transaction
    gc.collect()
    again = store.begin(claim)
    assert again is not None
    assert again.claimed == Claimed(attempt=1)
    assert again._driver is not driver
    again.rollback()
    store.close()


def test_a_handler_that_forks_leaves_the_transaction_to_its_parent(pg_shop: OpenShop) -> None:
    def forking(environ: Any, start_response: Any) -> Any:
        charge(1)
        pid = os.fork()
        if pid == 0:
            return Response("child", 201)(environ, start_response)
        assert os.waitpid(pid, 0)[1] == 0
        return Response("parent", 201)(environ, start_response)

    shop = pg_shop(forking)
    parent = os.getpid()
    answer: Any = None
    try:
        answer = shop.post()
    finally:
        if os.getpid() != parent:
            del answer  # and with it all that the child has of the request
            gc.collect()
            os._exit(0)
    assert answer.data == b"parent"
    assert (shop.amounts(), len(shop.rows())) == ([1], 1)


def test_a_forked_child_whose_application_raises_undoes_nothing_of_its_parent_s(
    pg_shop: OpenShop,
) -> None:
    def forking(environ: Any, start_response: Any) -> Any:
        charge(1)
        pid = os.fork()
        if pid == 0:
            raise LookupError("in the child")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        return Response("parent", 201)(environ, start_response)

    shop = pg_shop(forking)
    parent = os.getpid()
    try:
        answer = shop.post()
    except LookupError:
        assert os.getpid() != parent
        os._exit(7)
    assert answer.data == b"parent"
    assert (shop.amounts(), len(shop.rows())) == ([1], 1)


def test_a_child_serves_transactions_of_its_own(pg_shop: OpenShop) -> None:
    shop = pg_shop(charging)
    assert shop.post("parent").status_code == 201
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = shop.post("child", query_string={"amount": "2"}).status_code != 201
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert shop.post("parent-again", query_string={"amount": "3"}).status_code == 201
    assert shop.amounts() == [1, 2, 3]


# ---------------------------------------------------------------------- corners


def test_the_application_may_commit_what_is_in_no_transaction_of_ours(pg_shop: OpenShop) -> None:
    """On another connection of the same engine."""

    def auditing(environ: Any, start_response: Any) -> Any:
        with current_operation.connection.engine.begin() as connection:
            connection.execute(text("INSERT INTO charges (amount) VALUES (7)"))
        return Response("sorry", 400)(environ, start_response)

    shop = pg_shop(auditing)
    assert shop.post().status_code == 400
    assert (shop.amounts(), shop.rows()) == ([7], [])


def test_savepoints_on_another_connection_are_none_of_the_transaction_s(pg_shop: OpenShop) -> None:
    """Of the same engine, whose savepoints are watched: those over there nest among
    themselves, while a session over here is open."""

    def auditing(environ: Any, start_response: Any) -> Any:
        with session() as joined:
            joined.add(Charge(amount=1))
            joined.flush()
            with current_operation.connection.engine.begin() as elsewhere:
                for amount in (7, 8):
                    savepoint = elsewhere.begin_nested()
                    elsewhere.execute(text(f"INSERT INTO charges (amount) VALUES ({amount})"))
                    if amount == 7:
                        savepoint.commit()
                    else:
                        savepoint.rollback()
        return Response("done", 201)(environ, start_response)

    shop = pg_shop(auditing)
    assert shop.post().status_code == 201
    assert shop.amounts() == [7], "ours was flushed and not committed"


def test_a_session_that_begins_no_savepoint_writes_into_the_transaction(
    open_shop: OpenShop,
) -> None:
    """SQLAlchemy's default on a connection with no savepoint. Its commit() leaves the rest to
    us, its rollback() is of the whole transaction."""

    def plain(environ: Any, start_response: Any) -> Any:
        charge(1)
        with Session(bind=current_operation.connection) as joined:
            joined.add(Charge(amount=2))
            joined.flush()
            end = environ["QUERY_STRING"]
            getattr(joined, end)()
        return Response("done", 201)(environ, start_response)

    shop = open_shop(plain)
    assert shop.post("undone", query_string="rollback").status_code == 500
    assert (shop.amounts(), shop.rows()) == ([], [])
    assert shop.post("done", query_string="commit").status_code == 201
    assert shop.amounts() == [1, 2]


def test_a_schema_that_has_gone_is_said_so(
    pg_shop: OpenShop, caplog: pytest.LogCaptureFixture
) -> None:
    shop = pg_shop(charging)
    assert shop.post("one").status_code == 201
    with shop.engine.begin() as connection:
        connection.execute(text("DROP TABLE idempotency_keys CASCADE"))
    refused = shop.post("two")
    assert (refused.status_code, code(refused)) == (503, "STORE_UNAVAILABLE")
    assert "wsgi-idempotency upgrade" in caplog.text
    assert shop.amounts() == [1]


@pytest.mark.parametrize("what", ["RETURN NULL", "RAISE 'no' USING ERRCODE = '40001'"])
def test_a_claim_that_never_gets_a_stable_answer_runs_nothing(pg_shop: OpenShop, what: str) -> None:
    shop = pg_shop(charging)
    with shop.engine.begin() as connection:
        connection.execute(
            text(
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
                f" $$ BEGIN {what}; END $$"
            )
        )
        connection.execute(
            text(
                "CREATE TRIGGER refuse BEFORE INSERT ON idempotency_keys"
                " FOR EACH ROW EXECUTE FUNCTION refuse()"
            )
        )
    refused = shop.post()
    assert (refused.status_code, code(refused)) == (503, "STORE_UNAVAILABLE")
    assert shop.amounts() == []


def test_an_interrupt_while_the_key_is_claimed_leaves_nothing(pg_shop: OpenShop) -> None:
    shop = pg_shop(charging)
    assert shop.post("one").status_code == 201

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with shop.engine.begin() as connection:
            connection.execute(text("LOCK TABLE idempotency_keys"))
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                shop.post("two")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert shop.post("two", query_string={"amount": "2"}).status_code == 201
    assert shop.amounts() == [1, 2]


def test_a_server_that_will_not_answer_changes_nothing_of_what_is_done(
    open_shop: OpenShop,
) -> None:
    """It is committed, and the retry gets it."""
    shop = open_shop(charging)
    environ = create_environ("/charges", method="POST", headers={"Idempotency-Key": "k"})

    def failing(status: str, headers: Any, exc_info: Any = None) -> Any:
        raise OSError("the client is gone")

    with pytest.raises(OSError, match="the client is gone"):
        shop.middleware(environ, failing)
    assert shop.post().headers["Idempotency-Replayed"] == "true"
    assert shop.amounts() == [1]
