"""The pool of a store: one statement's connection is the next one's, and all are closed."""

from __future__ import annotations

import gc
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from types import FrameType
from typing import Any

import psycopg
import pytest
from servers.postgres import Postgres, database_of, terminate
from sqlalchemy import event
from sqlalchemy.exc import TimeoutError

from wsgi_idempotency import SQLStore
from wsgi_idempotency.errors import Disconnected
from wsgi_idempotency.stores import pools, sql
from wsgi_idempotency.stores.pools import StatementPool


def test_what_is_in_use_when_a_pool_is_disposed_of_is_closed_in_the_end(pg_database: str) -> None:
    """Nobody takes it from there any more, and the server keeps a process for it."""
    with closing(SQLStore(pg_database)) as store:
        first, second = store.engine.raw_connection(), store.engine.raw_connection()
        drivers = [first.driver_connection, second.driver_connection]
        first.close()
        store.engine.dispose()
        second.close()
        assert [driver.closed for driver in drivers if driver is not None] == [True, True]


def test_what_comes_back_to_a_pool_in_use_is_kept(pg_database: str) -> None:
    """So that the next request need not connect."""
    with closing(SQLStore(pg_database)) as store:
        drivers = []
        for _ in range(2):
            connection = store.engine.raw_connection()
            drivers.append(connection.driver_connection)
            connection.close()
        assert drivers[0] is drivers[1]


def one_connection(pg_database: str) -> SQLStore:
    return SQLStore(pg_database, pool_size=1, timeout=5.0)


def test_the_next_statement_has_the_connection_of_the_last(pg_database: str) -> None:
    with closing(one_connection(pg_database)) as store:
        pool = pool_of(store)
        first = pool.take()
        pool.give(first)
        assert pool.take() is first
        pool.give(first)


def test_whoever_waits_for_a_connection_gets_what_is_given_back(pg_database: str) -> None:
    """And not at the end of the time-out, nor what a statement that came later gives back."""
    with closing(one_connection(pg_database)) as store, ThreadPoolExecutor(1) as pool_of_threads:
        pool = pool_of(store)
        taken = pool.take()
        waiting = pool_of_threads.submit(pool.take)
        while not pool._waiting:
            assert not waiting.done()
        pool.give(taken)
        pool.give(waiting.result(timeout=4))


def test_whoever_wants_a_connection_again_at_once_waits_for_those_that_came_before(
    pg_database: str,
) -> None:
    """A handler that records one step after the other would keep all others waiting until they
    are refused: it runs on when it has given back, and they are still to wake."""
    with closing(one_connection(pg_database)) as store, ThreadPoolExecutor(2) as threads:
        pool = pool_of(store)
        taken = pool.take()
        served: list[str] = []

        def work(name: str) -> None:
            lent = pool.take()
            served.append(name)
            pool.give(lent)

        waiting = []
        for name in ("first", "second"):
            waiting.append(threads.submit(work, name))
            in_line(pool, len(waiting))
        pool.give(taken)
        work("again")
        assert served == ["first", "second", "again"]


def test_two_that_come_back_at_once_go_to_the_two_that_wait(pg_database: str) -> None:
    """Though the first in line is told of both before it wakes."""
    with (
        closing(SQLStore(pg_database, pool_size=2, timeout=20.0)) as store,
        ThreadPoolExecutor(2) as threads,
    ):
        pool = pool_of(store)
        taken = [pool.take(), pool.take()]
        waiting = [threads.submit(pool.take) for _ in range(2)]
        in_line(pool, 2)
        with pool._pool.mutex:
            for lent in taken:
                pool.give(lent)
        for lent in [waiter.result(timeout=15) for waiter in waiting]:
            pool.give(lent)


def test_whoever_has_waited_too_long_stands_in_nobody_s_way(pg_database: str) -> None:
    with closing(SQLStore(pg_database, pool_size=1, timeout=0.2)) as store:
        pool = pool_of(store)
        taken = pool.take()
        with pytest.raises(TimeoutError, match=r"timeout 0\.20"):
            pool.take()
        pool.give(taken)
        assert pool.take() is taken
        pool.give(taken)


def test_whoever_waits_for_a_place_gets_that_of_a_connection_that_could_not_be_opened(
    pg_database: str,
) -> None:
    """And not at the end of its time-out, to a server that has been back for seconds."""
    with (
        closing(SQLStore(pg_database, pool_size=1, timeout=20.0)) as store,
        ThreadPoolExecutor(2) as threads,
    ):
        pool = pool_of(store)
        connecting, fail = threading.Event(), threading.Event()

        def refuse(connection: object, record: object) -> None:
            if not fail.is_set():
                connecting.set()
                fail.wait(15)
                raise psycopg.OperationalError("the server is starting up")

        event.listen(store.engine, "connect", refuse)
        refused = threads.submit(pool.take)
        assert connecting.wait(15)
        waiting = threads.submit(pool.take)
        in_line(pool, 1)
        fail.set()
        pool.give(waiting.result(timeout=15))
        assert isinstance(refused.exception(), psycopg.OperationalError)


def in_line(pool: StatementPool, number: int) -> None:
    """Wait until so many wait for a connection."""
    line: Any = pool._pool
    deadline = time.monotonic() + 15
    while len(line._line) < number:
        assert time.monotonic() < deadline


def test_an_engine_s_own_user_gets_what_lies_on_the_shelf(pg_database: str) -> None:
    with closing(one_connection(pg_database)) as store:
        pool = pool_of(store)
        pool.give(pool.take())
        with store.engine.connect() as connection:
            assert connection.exec_driver_sql("SELECT 1").scalar() == 1


def test_no_thread_waits_in_vain_however_many_there_are(pg_database: str) -> None:
    """Each waits at most for those that have a connection now, and none for its time-out."""
    with closing(SQLStore(pg_database, pool_size=2, timeout=20.0)) as store:
        pool = pool_of(store)

        def work(_: int) -> None:
            for _ in range(200):
                connection = pool.take()
                time.sleep(0)
                pool.give(connection)

        with ThreadPoolExecutor(8) as threads:
            began = time.monotonic()
            list(threads.map(work, range(8)))
            assert time.monotonic() - began < 20
        assert pool.checkedout() <= 2


def test_what_lies_on_the_shelf_of_a_pool_that_is_disposed_of_is_closed(pg_database: str) -> None:
    store = SQLStore(pg_database)
    pool = pool_of(store)
    early, late = pool.take(), pool.take()
    drivers: list[Any] = [early.driver, late.driver]
    pool.give(early)
    store.close()
    pool.give(late)
    assert [driver.closed for driver in drivers] == [True, True]


def test_what_was_invalidated_is_not_handed_on(pg_database: str) -> None:
    with closing(one_connection(pg_database)) as store:
        pool = pool_of(store)
        broken = pool.take()
        broken.invalidate()
        pool.give(broken)
        whole = pool.take()
        assert not whole.driver.closed
        pool.give(whole)


def test_whoever_waits_for_a_connection_is_served_when_the_pool_is_disposed_of(
    pg_database: str, postgres: Postgres
) -> None:
    """A restart of the server must not make those wait for their time-out, and be refused, who
    wait when it is found out."""
    with (
        closing(SQLStore(pg_database, pool_size=1, timeout=20.0)) as store,
        ThreadPoolExecutor(4) as threads,
    ):
        pool = pool_of(store)
        sleeping = threads.submit(
            store._attempt, lambda run: run("SELECT pg_sleep(20)::text", {}), again=False
        )
        while not backends(postgres, pg_database, "AND wait_event = 'PgSleep'"):
            pass
        waiting = [threads.submit(store.lookup, b"a digest") for _ in range(3)]
        while len(pool._waiting) < 3:
            pass
        began = time.monotonic()
        (pid,) = backends(postgres, pg_database)
        with postgres.connect() as connection:
            connection.execute("SELECT pg_terminate_backend(%s)", (pid,))
        assert [waiter.result() for waiter in waiting] == [None] * 3
        assert time.monotonic() - began < 15
        assert isinstance(sleeping.exception(), Disconnected)


def test_connections_that_turn_out_to_be_dead_at_once_cost_the_pool_but_once(
    pg_database: str, postgres: Postgres
) -> None:
    """A pool put in place by one thread, disposed of by the next, would be left to the collector
    with what was taken from it in between."""
    with closing(SQLStore(pg_database)) as store, ThreadPoolExecutor(5) as threads:
        disposals: list[object] = []
        event.listen(store.engine, "engine_disposed", disposals.append)
        together = threading.Barrier(5)

        def work() -> None:
            def meet(run: Any) -> None:
                together.wait(20)
                run("SELECT 1", {})

            with suppress(Disconnected):
                store._attempt(meet, again=False)

        for attempt in [threads.submit(work) for _ in range(5)]:
            attempt.result()
        pids = backends(postgres, pg_database)
        assert len(pids) == 5
        with postgres.connect() as connection:
            for pid in pids:
                terminate(connection, pid)
        for attempt in [threads.submit(work) for _ in range(5)]:
            attempt.result()
        assert len(disposals) == 1


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # psycopg's, and right it is
def test_a_store_that_nobody_closed_leaves_no_connection(
    pg_database: str, postgres: Postgres
) -> None:
    """Neither when an application's tests make one for each application."""
    for _ in range(3):
        SQLStore(pg_database).check()
    gc.collect()
    assert gone(postgres, pg_database)


def test_what_a_request_takes_while_the_store_is_closed_is_closed(pg_database: str) -> None:
    store = SQLStore(pg_database)
    engine = store.engine
    store.close()
    assert isinstance(engine.pool, StatementPool)
    late = engine.pool.take()
    driver = late.driver
    late.give_back()
    assert driver.closed


def test_a_place_in_the_pool_outlives_a_server_that_refuses(
    pg_database: str, postgres: Postgres
) -> None:
    with closing(one_connection(pg_database)) as store:
        pool = pool_of(store)
        dead = pool.take()
        dead.invalidate()
        pool.give(dead)
        allow = f'ALTER DATABASE "{database_of(pg_database)}" ALLOW_CONNECTIONS '
        postgres.execute(allow + "false")
        with pytest.raises(psycopg.OperationalError):
            pool.take()
        postgres.execute(allow + "true")
        pool.give(pool.take())


class Interrupted(BaseException):
    """As KeyboardInterrupt is, or GreenletExit."""


@pytest.mark.parametrize("busy", [False, True], ids=["at rest", "while it waits for an answer"])
def test_an_interrupt_at_any_line_neither_costs_a_connection_nor_hands_on_a_busy_one(
    pg_database: str, busy: bool
) -> None:
    """Nor does a second, which comes while the first is being dealt with."""
    with closing(SQLStore(pg_database, pool_size=1, timeout=2.0)) as store:
        store.check()
        line = 0
        while interrupted(store, line, busy):
            line += 1
            # SQLAlchemy's own way finds what lies on the shelf, or a place that is free.
            with store.engine.connect() as connection:
                assert connection.exec_driver_sql("SELECT 2").scalar() == 2
            assert store._attempt(lambda run: run("SELECT 3", {}).fetchone()) == (3,)
        assert line > 5


def interrupted(store: SQLStore, line: int, busy: bool) -> bool:
    """Whether a statement that is interrupted at a line of ours, counted from its beginning, or
    from where it was interrupted for the first time, had as many lines."""
    left, waited = line, False

    def trace(frame: FrameType, what: str, _: object) -> Any:
        nonlocal left, waited
        if busy and not waited:
            if frame.f_code.co_name == "_wait":
                waited = True
                raise Interrupted
            return None
        # What is raised in __del__ comes to nothing; no interrupt comes between the body of a
        # "with" and its end (of a lock, in "engine"), where tracing sees a line; and from where a
        # connection goes "back" on, SQLAlchemy's own pool has to be interrupted.
        names = {"__del__", "back", "engine"} & callers(frame)
        if frame.f_code.co_filename not in OURS or names:
            return None
        if what == "line":
            left -= 1
            if left == -1:
                raise Interrupted
        return trace

    def work(run: Any) -> Any:
        try:
            return run(sql._PostgreSQL.LOOKUP, {"digest": b"a digest"}).fetchone()
        except Interrupted:
            # Which has ended the tracing.
            frame: FrameType | None = sys._getframe(1)
            while frame is not None and frame.f_code.co_filename in OURS:
                frame.f_trace = trace
                frame = frame.f_back
            sys.settrace(trace)
            raise

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        store._attempt(work)
    except Interrupted:
        pass
    finally:
        sys.settrace(before)
    return left < 0


def callers(frame: FrameType | None) -> set[str]:
    """The names of a function, and of those that have called it."""
    names = set()
    while frame is not None:
        names.add(frame.f_code.co_name)
        frame = frame.f_back
    return names


OURS = (pools.__file__, sql.__file__)


def backends(postgres: Postgres, url: str, condition: str = "") -> list[int]:
    with postgres.connect() as connection:
        rows = connection.execute(
            f"SELECT pid FROM pg_stat_activity WHERE datname = %s {condition}",
            (database_of(url),),
        )
        return [pid for (pid,) in rows]


def gone(postgres: Postgres, url: str) -> bool:
    """Whether no backend is left; the server takes a moment to notice."""
    deadline = time.monotonic() + 10
    while backends(postgres, url):
        if time.monotonic() > deadline:
            return False
    return True


def pool_of(store: SQLStore) -> StatementPool:
    pool = store.engine.pool
    assert isinstance(pool, StatementPool)
    return pool
