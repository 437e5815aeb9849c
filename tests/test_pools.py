"""The pool of a store: one statement's connection is the next one's, and all are closed."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from wsgi_idempotency import SQLStore
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
    drivers = [early.dbapi_connection, late.dbapi_connection]
    pool.give(early)
    store.close()
    pool.give(late)
    assert [driver.closed for driver in drivers if driver is not None] == [True, True]


def test_what_was_invalidated_is_not_handed_on(pg_database: str) -> None:
    with closing(one_connection(pg_database)) as store:
        pool = pool_of(store)
        broken = pool.take()
        broken.invalidate()
        pool.give(broken)
        whole = pool.take()
        assert whole.dbapi_connection is not None
        pool.give(whole)


def pool_of(store: SQLStore) -> StatementPool:
    pool = store.engine.pool
    assert isinstance(pool, StatementPool)
    return pool
