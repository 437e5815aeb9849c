"""What an application must not do with the transaction it joins, and what then happens."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from apps.charges import Charge, OpenShop, charge, charging, opener, session
from sqlalchemy import Connection, insert, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from werkzeug.test import Client, TestResponse
from werkzeug.wrappers import Response

from wsgi_idempotency import current_operation
from wsgi_idempotency.errors import TransactionFailed

INSERT = "INSERT INTO charges (amount) VALUES (5)"


@pytest.fixture
def open_shop(database: str) -> Iterator[OpenShop]:
    """Opens shops on one database, PostgreSQL or SQLite."""
    yield from opener(database)


@pytest.fixture
def pg_shop(pg_database: str) -> Iterator[OpenShop]:
    """Opens shops on PostgreSQL, for what only a server does."""
    yield from opener(pg_database)


def driver() -> Any:
    return current_operation.connection.connection.driver_connection


def doing(do: Callable[[], object], status: str = "201 Created") -> Any:
    """An application that does something, and answers as if nothing were the matter."""

    def app(environ: Any, start_response: Any) -> Any:
        do()
        return Response("done", status)(environ, start_response)

    return app


def problem(answer: TestResponse) -> tuple[int, str]:
    return answer.status_code, json.loads(answer.data)["code"]


# ---------------------------------------------------------------------- committing


def with_the_driver() -> None:
    driver().execute(INSERT)
    driver().commit()


def by_leaving_the_driver() -> None:
    """psycopg's ``with connection:`` commits."""
    with driver():
        driver().execute(INSERT)


def as_text() -> None:
    current_operation.connection.execute(text(INSERT))
    current_operation.connection.execute(text("  commit"))


@pytest.mark.parametrize(
    "commit",
    [with_the_driver, by_leaving_the_driver, as_text],
    ids=["commit() of the driver", "the driver's context manager", "COMMIT as text"],
)
def test_no_way_to_commit_early_commits(pg_shop: OpenShop, commit: Callable[[], None]) -> None:
    shop = pg_shop(doing(commit))
    assert problem(shop.post()) == (500, "TRANSACTION_FAILED")
    assert (shop.amounts(), shop.rows()) == ([], [])


def test_the_driver_may_commit_what_is_no_longer_ours(pg_shop: OpenShop) -> None:
    """A connection is what it was before, once its transaction is over."""
    shop = pg_shop(charging, store_options={"max_transactions": 1})
    for key, status in (("undone", "500"), ("stored", "201")):
        shop.post(key, headers={"X-Status": status})
        with shop.store.transactions.connect() as connection:
            connection.execute(text("SELECT 1"))
            connection.commit()
            raw: Any = connection.connection.driver_connection
            raw.commit()
    assert shop.amounts() == [1]


def commit_behind_our_back() -> None:
    driver().execute(INSERT)
    driver().execute("COMMIT")


@pytest.mark.parametrize("lapsed", [False, True], ids=["in flight", "lapsed"])
def test_what_was_committed_behind_our_back_is_never_run_again(
    open_shop: OpenShop, lapsed: bool
) -> None:
    """Nobody can keep a driver from sending COMMIT as a text. The claim is committed with
    what was written; the handler has failed since, and nobody knows what of it is done."""
    shop = open_shop(doing(commit_behind_our_back, "500 Oops"))
    assert shop.post().status_code == 500
    assert shop.amounts() == [5]
    if lapsed:
        hour = "3600" if shop.engine.name == "sqlite" else "interval '1 hour'"
        earlier = text(f"UPDATE idempotency_keys SET lease_until = lease_until - {hour}")
        with shop.engine.begin() as connection:
            connection.execute(earlier)
    expected = "OUTCOME_UNKNOWN" if lapsed else "CONFLICT"
    assert problem(shop.post()) == (409, expected)
    assert shop.amounts() == [5]


# ---------------------------------------------------------------------- left open


def copy_in() -> None:
    left.append(driver().cursor())
    left.append(left[-1].copy("COPY charges (amount) FROM STDIN"))
    left[-1].__enter__().write_row((5,))


def copy_out() -> None:
    left.append(driver().cursor())
    left.append(left[-1].copy("COPY (SELECT generate_series(1, 100000)) TO STDOUT"))
    left[-1].__enter__().read()


def stream() -> None:
    left.append(driver().cursor().stream("SELECT generate_series(1, 100000)"))
    next(left[-1])


def pipeline() -> None:
    left.append(driver().pipeline())
    left[-1].__enter__()
    driver().execute(INSERT)


left: list[Any] = []  # so that nothing is closed by being forgotten


@pytest.mark.parametrize(
    "open_", [copy_in, copy_out, stream, pipeline], ids=lambda open_: open_.__name__
)
@pytest.mark.parametrize("status", ["201 Created", "500 Oops"])
def test_what_is_left_open_undoes_everything(
    pg_shop: OpenShop, caplog: pytest.LogCaptureFixture, open_: Callable[[], None], status: str
) -> None:
    """And holds nobody up: not this request, and not the next one in its connection."""
    shop = pg_shop(doing(open_, status), store_options={"max_transactions": 1})
    answer = shop.post()
    if status == "201 Created":
        assert problem(answer) == (500, "TRANSACTION_FAILED")
        assert "left a COPY, a stream or a pipeline open" in caplog.text
    else:
        assert answer.status_code == 500
    assert (shop.amounts(), shop.rows()) == ([], [])
    left.clear()
    shop.middleware.app = charging
    assert shop.post().status_code == 201
    assert shop.amounts() == [1]


def test_cursors_left_open_are_no_harm(open_shop: OpenShop) -> None:
    def reading() -> None:
        charge(1)
        left.append(current_operation.connection.execute(text("SELECT * FROM charges")))
        left.append(driver().cursor())
        left[-1].execute("SELECT * FROM charges")

    shop = open_shop(doing(reading))
    assert shop.post().status_code == 201
    assert shop.amounts() == [1]
    left.clear()


# ---------------------------------------------------------------------- the session's state

CHANGES = (
    "SET app.tenant = 'alice'",
    "SET statement_timeout = '7s'",
    "SET ROLE pg_monitor",
    "RESET ROLE",
    "SELECT pg_advisory_lock(7)",
    "LISTEN news",
    "CREATE TEMP TABLE scratch (id int)",
    "DECLARE kept CURSOR WITH HOLD FOR SELECT 1",
)
STATE = (
    "SELECT coalesce(current_setting('app.tenant', true), ''),"
    " current_setting('statement_timeout'),"
    " (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 7 AND pid ="
    " pg_backend_pid()), (SELECT count(*) FROM pg_listening_channels()),"
    " (SELECT count(*) FROM pg_class WHERE relname = 'scratch'), (SELECT count(*) FROM pg_cursors)"
)
CLEAN = ("", "0", 0, 0, 0, 0)


@pytest.mark.parametrize("status", ["201 Created", "500 Oops"])
def test_one_request_s_session_is_not_the_next_one_s(pg_shop: OpenShop, status: str) -> None:
    """Somebody's tenant, role or lock in somebody else's request would be worse than a second
    charge. Nor does a session lock outlive its request, while the connection is in the pool."""
    states: list[tuple[Any, ...]] = []

    def changing() -> None:
        connection = current_operation.connection
        states.append(tuple(connection.execute(text(STATE)).one()))
        for change in CHANGES:
            connection.execute(text(change))

    shop = pg_shop(doing(changing, status), store_options={"max_transactions": 1})
    for key in ("one", "two"):
        assert shop.post(key).status_code == int(status[:3])
        with shop.engine.connect() as other:
            assert other.scalar(text("SELECT pg_try_advisory_xact_lock(7)"))
    assert states == [CLEAN, CLEAN]


@pytest.mark.parametrize("end", ["cancelled", "given up"])
def test_a_reset_that_fails_costs_nobody_the_answer(pg_shop: OpenShop, end: str) -> None:
    """What was charged is committed by then. The session has a temporary table, which somebody
    has locked, and so the reset has to wait."""
    options = {"max_transactions": 1, "timeout": 10 if end == "cancelled" else 0.5}
    shop = pg_shop(charging, store_options=options)
    with shop.store.transactions.connect() as left_behind:
        left_behind.execute(text("CREATE TEMP TABLE scratch (id int)"))
        left_behind.commit()
    with shop.engine.connect() as other, shop.engine.connect() as asking:
        name = other.scalar(
            text(
                "SELECT relnamespace::regnamespace || '.scratch' FROM pg_class"
                " WHERE relname = 'scratch'"
            )
        )
        other.execute(text(f"LOCK TABLE {name}"))
        waiting = (
            "FROM pg_stat_activity WHERE datname = current_database()"
            " AND query LIKE 'COMMIT; %' AND wait_event_type = 'Lock'"
        )

        def cancel() -> None:
            while asking.scalar(text(f"SELECT pg_cancel_backend(pid) {waiting}")) is None:
                asking.rollback()
            other.rollback()

        canceller = threading.Thread(target=cancel if end == "cancelled" else lambda: None)
        canceller.start()
        answer = shop.post()
        canceller.join()
    assert (answer.status_code, shop.amounts()) == (201, [1])
    assert shop.post().headers["Idempotency-Replayed"] == "true"
    with shop.store.transactions.connect() as next_one:
        assert next_one.scalar(text("SELECT to_regclass('scratch')")) is None


def test_a_transaction_of_the_driver_s_that_is_left_open_undoes_everything(
    pg_shop: OpenShop,
) -> None:
    def leaving() -> None:
        left.append(driver().transaction())
        left[-1].__enter__()
        driver().execute(INSERT)

    shop = pg_shop(doing(leaving), store_options={"max_transactions": 1})
    assert problem(shop.post()) == (500, "TRANSACTION_FAILED")
    assert (shop.amounts(), shop.rows()) == ([], [])
    left.clear()
    shop.middleware.app = charging
    assert shop.post().status_code == 201


HIDING = ["SET LOCAL search_path = pg_catalog", "SET LOCAL ROLE pg_monitor"]
ALSO_HIDING = [
    "SET SCHEMA 'pg_catalog'",
    "SET SESSION AUTHORIZATION pg_monitor",
    "SELECT set_config('search_path', 'pg_catalog', true)",
]


@pytest.mark.parametrize("change", [*HIDING, *ALSO_HIDING])
def test_what_hides_the_table_is_undone_before_the_response_is_recorded(
    pg_shop: OpenShop, change: str
) -> None:
    """A tenant's schema or role, for the rest of the handler's transaction."""

    def hiding() -> None:
        charge(1)
        current_operation.connection.execute(text(change))

    shop = pg_shop(doing(hiding), store_options={"max_transactions": 1})
    assert shop.post().status_code == 201
    assert shop.post().headers["Idempotency-Replayed"] == "true"
    assert shop.amounts() == [1]


def test_a_statement_that_only_looks_as_if_it_hid_the_table_is_no_harm(
    open_shop: OpenShop,
) -> None:
    def looking() -> None:
        charge(1)
        current_operation.connection.execute(text("SELECT 'to set role'"))

    shop = open_shop(doing(looking))
    assert shop.post().status_code == 201
    assert shop.amounts() == [1]


@pytest.mark.parametrize("change", HIDING)
@pytest.mark.parametrize("given", [False, True], ids=["by the driver", "on a given engine"])
def test_what_hides_the_table_unseen_or_is_not_ours_to_undo_undoes_everything(
    pg_shop: OpenShop, caplog: pytest.LogCaptureFixture, given: bool, change: str
) -> None:
    """And is named."""

    def hiding() -> None:
        charge(1)
        if given:
            current_operation.connection.execute(text(change))
        else:
            driver().execute(change)

    shop = pg_shop(doing(hiding))
    if given:
        shop = pg_shop(doing(hiding), given=shop.engine)
    assert problem(shop.post()) == (500, "TRANSACTION_FAILED")
    assert "search_path or the role have been changed" in caplog.text
    assert (shop.amounts(), shop.rows()) == ([], [])
    shop.middleware.app = charging
    assert shop.post().status_code == 201


# ---------------------------------------------------------------------- threads, and within


def test_another_thread_has_no_part_in_the_transaction(open_shop: OpenShop) -> None:
    """Two threads on one connection write between each other's savepoints."""
    refused: list[Exception] = []

    def spawning() -> None:
        operation = current_operation._get_current_object()  # type: ignore[attr-defined]

        def elsewhere() -> None:
            try:
                _ = operation.connection
            except Exception as exc:
                refused.append(exc)

        charge(1)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    shop = open_shop(doing(spawning))
    assert shop.post().status_code == 201
    assert shop.amounts() == [1]
    [said] = refused
    assert "another thread" in str(said)


def test_an_operation_that_is_over_has_no_connection(open_shop: OpenShop) -> None:
    """Its connection is somebody else's by then."""
    operations: list[Any] = []

    def keeping() -> None:
        charge(1)
        operations.append(current_operation._get_current_object())  # type: ignore[attr-defined]

    shop = open_shop(doing(keeping))
    assert shop.post().status_code == 201
    with pytest.raises(TransactionFailed, match="is over"):
        _ = operations[0].connection


def test_a_protected_request_within_another_has_its_own_transaction(pg_shop: OpenShop) -> None:
    """The inner one is committed, whatever becomes of the outer one; with the outer one's own
    key it is refused, and nobody waits for himself."""
    inner: list[TestResponse] = []

    def nesting(environ: Any, start_response: Any) -> Any:
        if current_operation.key == "outer":
            for key in ("inner", "outer"):
                inner.append(
                    Client(shop.middleware).post("/charges", headers={"Idempotency-Key": key})
                )
            charge(1)
            return Response("sorry", 500)(environ, start_response)
        charge(2)
        return Response("done", 201)(environ, start_response)

    shop = pg_shop(nesting, wait=0)
    assert shop.post("outer").status_code == 500
    assert [answer.status_code for answer in inner] == [201, 409]
    assert shop.amounts() == [2]


# ---------------------------------------------------------------------- when it is too late


def test_what_a_generator_writes_while_it_is_drained_is_in_the_transaction(
    open_shop: OpenShop,
) -> None:
    def streaming(environ: Any, start_response: Any) -> Any:
        start_response("201 Created", [])
        for number in (1, 2):
            charge(number)
            seen.append(shop.amounts())
            yield b"%d" % number

    seen: list[list[int]] = []
    shop = open_shop(streaming)
    assert shop.post().data == b"12"
    assert (seen, shop.amounts()) == ([[], []], [1, 2])


def test_a_flush_that_fails_at_the_session_s_commit_is_the_application_s_to_answer(
    open_shop: OpenShop,
) -> None:
    def clashing(environ: Any, start_response: Any) -> Any:
        charge(1)
        with session() as joined:
            joined.add(Charge(amount=1))
            try:
                joined.commit()
            except IntegrityError:
                return Response("twice", 409)(environ, start_response)
        return Response("done", 201)(environ, start_response)

    shop = open_shop(clashing)
    assert shop.post().data == b"twice"
    assert (shop.amounts(), shop.rows()) == ([], [])


def test_a_constraint_that_is_checked_last_undoes_everything(pg_shop: OpenShop) -> None:
    def twice() -> None:
        connection: Connection = current_operation.connection
        connection.execute(text(f"{INSERT}, (5)"))

    shop = pg_shop(doing(twice))
    with shop.engine.begin() as connection:
        connection.execute(text("ALTER TABLE charges DROP CONSTRAINT charges_amount_key"))
        connection.execute(
            text("ALTER TABLE charges ADD UNIQUE (amount) DEFERRABLE INITIALLY DEFERRED")
        )
    assert problem(shop.post()) == (500, "TRANSACTION_FAILED")
    assert (shop.amounts(), shop.rows()) == ([], [])


@pytest.mark.parametrize("end", ["commit", "rolled back before", "forget", "close", "read only"])
def test_a_success_is_not_told_of_a_commit_that_another_session_undoes(
    open_shop: OpenShop, end: str
) -> None:
    """Savepoints nest: what one session commits while another is open goes with the other."""
    others = []

    def nesting() -> None:
        charge(1)
        others.append(session())
        if end != "read only":
            others[0].add(Charge(amount=2))
        others[0].connection()
        others[0].flush()
        if end == "rolled back before":
            others[0].rollback()
        charge(3)
        if end == "commit":
            others[0].commit()
        if end in ("close", "read only"):
            others[0].close()

    shop = open_shop(doing(nesting))
    answer = shop.post()
    kept = {"commit": [1, 2, 3], "rolled back before": [1, 3]}
    if end in kept:
        assert (answer.status_code, shop.amounts()) == (201, kept[end])
    else:
        assert problem(answer) == (500, "TRANSACTION_FAILED")
        assert (shop.amounts(), shop.rows()) == ([], [])


def test_a_session_may_undo_what_it_has_itself_committed_within(open_shop: OpenShop) -> None:
    def nesting() -> None:
        with session() as joined:
            with joined.begin_nested():
                joined.add(Charge(amount=1))
            joined.rollback()
            with joined.begin_nested():
                joined.add(Charge(amount=2))
            joined.commit()
        with current_operation.connection.begin_nested() as outer:
            with current_operation.connection.begin_nested():
                current_operation.connection.execute(text(INSERT))
            outer.rollback()

    shop = open_shop(doing(nesting))
    assert shop.post().status_code == 201
    assert shop.amounts() == [2]


def plain() -> Session:
    """One that joins as SQLAlchemy has it by default."""
    return Session(bind=current_operation.connection)


def write() -> None:
    current_operation.connection.execute(text(INSERT))


def read() -> None:
    current_operation.connection.execute(text("SELECT amount FROM charges"))


def write_and_commit(joined: Session) -> None:
    joined.add(Charge(amount=5))
    joined.commit()


def on_the_connection(reading: Session) -> None:
    reading.scalars(text("SELECT amount FROM charges")).all()
    write()


def by_a_session_that_joined_before(reading: Session) -> None:
    earlier = plain()
    earlier.scalars(text("SELECT amount FROM charges")).all()
    reading.connection()
    write_and_commit(earlier)


def by_a_session_that_joins_within(reading: Session) -> None:
    reading.connection()
    write_and_commit(
        Session(bind=current_operation.connection, join_transaction_mode="rollback_only")
    )


def within_a_savepoint_of_the_session_s(reading: Session) -> None:
    reading.connection()
    reading.begin_nested()
    with current_operation.connection.begin_nested():
        write()


WRITES = pytest.mark.parametrize(
    "write_",
    [
        on_the_connection,
        by_a_session_that_joined_before,
        by_a_session_that_joins_within,
        within_a_savepoint_of_the_session_s,
    ],
    ids=lambda write_: write_.__name__.replace("_", " "),
)


@WRITES
@pytest.mark.parametrize("end", ["left open", "close"])
def test_what_others_wrote_while_a_session_was_open_is_not_undone_with_it_unseen(
    open_shop: OpenShop,
    caplog: pytest.LogCaptureFixture,
    write_: Callable[[Session], None],
    end: str,
) -> None:
    """The session has only read, and is closed, by its framework for one. What was written
    beside it was never its to undo."""

    def beside() -> None:
        left.append(session())
        write_(left[-1])
        if end == "close":
            left[-1].close()

    shop = open_shop(doing(beside))
    assert problem(shop.post()) == (500, "TRANSACTION_FAILED")
    assert "savepoints nest" in caplog.text
    assert (shop.amounts(), shop.rows()) == ([], [])
    left.clear()


@WRITES
def test_what_others_wrote_while_a_session_was_open_is_kept_with_its_commit(
    open_shop: OpenShop, write_: Callable[[Session], None]
) -> None:
    def beside() -> None:
        reading = session()
        write_(reading)
        while reading.in_nested_transaction():
            reading.commit()
        reading.commit()

    shop = open_shop(doing(beside))
    assert (shop.post().status_code, shop.amounts()) == (201, [5])


def a_savepoint_left_open() -> None:
    left.append(current_operation.connection.begin_nested())
    write()


def test_what_was_written_in_a_savepoint_that_nobody_ended_is_not_undone_unseen(
    open_shop: OpenShop,
) -> None:
    shop = open_shop(doing(a_savepoint_left_open))
    assert problem(shop.post()) == (500, "TRANSACTION_FAILED")
    assert (shop.amounts(), shop.rows()) == ([], [])
    left.clear()


def reads_of_others() -> None:
    charge(1)
    session().connection()
    read()


def a_write_that_failed() -> None:
    """What is there already is found by trying."""
    charge(5)
    with session() as joined:
        with pytest.raises(IntegrityError):
            joined.connection().execute(text(INSERT))
        joined.rollback()


def a_savepoint_of_the_application_s() -> None:
    """Which says itself what it undoes."""
    charge(1)
    with current_operation.connection.begin_nested() as savepoint:
        write()
        with plain() as joined:
            joined.scalars(text("SELECT amount FROM charges")).all()
        savepoint.rollback()


def all_that_a_session_can_write() -> None:
    charge(1)
    joined = session()
    joined.add(Charge(amount=2))
    joined.flush()
    joined.execute(text("INSERT INTO charges (amount) VALUES (3)"))
    joined.execute(insert(Charge), [{"amount": 4}, {"amount": 6}])
    joined.bulk_insert_mappings(Charge, [{"amount": 7}])
    joined.query(Charge).filter_by(amount=7).update({"amount": 8})
    with joined.begin_nested():
        joined.add(Charge(amount=9))
    left.append(joined)


@pytest.mark.parametrize(
    "do",
    [
        reads_of_others,
        a_write_that_failed,
        a_savepoint_of_the_application_s,
        all_that_a_session_can_write,
    ],
    ids=lambda do: do.__name__.replace("_", " "),
)
def test_what_a_session_is_alone_with_is_its_own_to_undo(
    open_shop: OpenShop, do: Callable[[], None]
) -> None:
    shop = open_shop(doing(do))
    assert shop.post().status_code == 201
    assert shop.amounts() == [5 if do is a_write_that_failed else 1]
    left.clear()
