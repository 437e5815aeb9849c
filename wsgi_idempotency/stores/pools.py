"""A pool for connections that are wanted for one statement at a time."""

from __future__ import annotations

from collections import deque

from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, QueuePool


class StatementPool(QueuePool):
    """Hands a connection from one statement to the next, and closes all of them in the end.

    SQLAlchemy does for each checkout and return what a statement of ours doesn't need: a proxy
    with a weak reference, events, a reset, a lock. That takes as long as half of what sending
    a statement does. So between :meth:`take` and :meth:`give` a connection lies on a shelf, and
    remains checked out to SQLAlchemy, whose pool bounds how many there are. Each step here is
    one operation of a deque, so that threads and greenlets need no lock.

    A plain pool that was disposed of while connections were in use puts them aside when they
    come back, where nobody takes them any more, and leaves it to the collector to close them:
    the server keeps a process for each until then, and psycopg warns of them. This one closes
    them.
    """

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._shelf: deque[PoolProxiedConnection] = deque()
        self._waiting: deque[None] = deque()  # one for each that waits for a connection
        self._disposed = False

    def take(self) -> PoolProxiedConnection:
        """A connection; waits as :meth:`connect` does where the pool has none left."""
        try:
            return self._shelf.pop()
        except IndexError:
            return self.connect()

    def give(self, connection: PoolProxiedConnection) -> None:
        """Give back what was taken, with nothing left open on it, or invalidated."""
        if not connection.is_valid:
            connection.close()
            return
        self._shelf.append(connection)
        # Asked afterwards: who began to wait before that is seen here, and who did so later
        # finds the connection on the shelf.
        if self._waiting or self._disposed:
            self._clear()

    def dispose(self) -> None:
        self._disposed = True
        self._clear()
        super().dispose()

    def _clear(self) -> None:
        """Return what is on the shelf to the pool."""
        while True:
            try:
                connection = self._shelf.pop()
            except IndexError:
                return
            connection.close()

    def _do_get(self) -> ConnectionPoolEntry:
        self._waiting.append(None)
        try:
            self._clear()
            return super()._do_get()
        finally:
            self._waiting.pop()

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        super()._do_return_conn(record)
        # Afterwards, since a thread that disposes may have seen the queue before this came.
        if self._disposed:
            super().dispose()
