"""A pool whose connections are all closed in the end."""

from __future__ import annotations

from sqlalchemy.pool import ConnectionPoolEntry, QueuePool


class ClosingPool(QueuePool):
    """Closes what is returned after it was disposed of.

    An engine is disposed of when a connection was found dead, and others are in use at that
    moment. A plain pool puts them aside when they come back, where nobody takes them any more,
    and leaves it to the collector to close them: the server keeps a process for each until then,
    and psycopg warns of them.
    """

    _disposed = False

    def dispose(self) -> None:
        self._disposed = True
        super().dispose()

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        super()._do_return_conn(record)
        # Afterwards, since a thread that disposes may have seen the queue before this came.
        if self._disposed:
            super().dispose()
