"""The pool of a store on PostgreSQL, when its connections turn out to be dead."""

from __future__ import annotations

from contextlib import closing

from wsgi_idempotency import SQLStore


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
