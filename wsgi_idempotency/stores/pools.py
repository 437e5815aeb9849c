"""A pool for connections that are wanted for one statement at a time."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Any

from sqlalchemy.pool import ConnectionPoolEntry, QueuePool
from sqlalchemy.pool.base import _ConnectionRecord
from sqlalchemy.util.queue import Empty, Queue


class Lent:
    """A connection of a pool's for as long as a statement takes.

    One that is dropped, since a thread was interrupted before it could give it back, is closed,
    and its place in the pool is free. SQLAlchemy's proxies see to that by a finalizer, which
    keeps the pool and whatever that refers to for ever, and so the connections of a store that
    nobody closes.

    :param driver: the driver's connection.
    """

    _entry: Any = None

    def __init__(self, pool: StatementPool) -> None:
        self._pool = pool
        self._pid = os.getpid()
        self._entry = pool._do_get()
        try:
            self.driver = self._entry.get_connection()
        except BaseException:
            self.back()
            raise

    @property
    def valid(self) -> bool:
        return self._entry.dbapi_connection is not None

    def give_back(self) -> None:
        self._pool.give(self)

    def invalidate(self, reason: BaseException | None = None) -> None:
        """Close it now; its place in the pool remains."""
        self._entry.invalidate(reason)

    def back(self) -> None:
        """Return it to the pool, where it remains."""
        entry, self._entry = self._entry, None
        self._pool._do_return_conn(entry)

    def __del__(self) -> None:
        # Not in a child, where it is the parent's, nor when there is no module left to do it.
        if self._entry is not None and not sys.is_finalizing() and self._pid == os.getpid():
            self.invalidate()
            self.back()


class _Line(Queue[ConnectionPoolEntry]):
    """Serves those that wait in the order in which they came.

    SQLAlchemy's queue serves whoever asks first after something came back. That is the thread
    that gave it back, if it wants it again at once: it has the interpreter, and those that wait
    are still to wake. They go on waiting then, for their whole time-out.
    """

    def __init__(self, maxsize: int, use_lifo: bool) -> None:
        super().__init__(maxsize, use_lifo)
        self._line: deque[threading.Condition] = deque()

    def get(self, block: bool = True, timeout: float | None = None) -> ConnectionPoolEntry:
        if not block or timeout is None:
            return super().get(block, timeout)
        deadline = time.monotonic() + timeout
        turn = threading.Condition(self.mutex)
        with self.mutex:
            self._line.append(turn)
            try:
                while self._empty() or self._line[0] is not turn:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise Empty
                    turn.wait(left)
                return self._get()
            finally:
                self._line.remove(turn)
                self._call_next()

    def _put(self, item: ConnectionPoolEntry) -> None:
        super()._put(item)
        self._call_next()

    def _call_next(self) -> None:
        if self._line and not self._empty():
            self._line[0].notify()


class StatementPool(QueuePool):
    """Hands a connection from one statement to the next, and closes all of them in the end.

    SQLAlchemy does for each checkout and return what a statement of ours doesn't need: a proxy
    with a weak reference, events, a reset, a lock. That takes as long as half of what sending
    a statement does. So between :meth:`take` and :meth:`give` a connection lies on a shelf, and
    is in use as far as SQLAlchemy's pool knows, which bounds how many there are. Each step here
    is one operation of a deque, so that threads and greenlets need no lock.

    A plain pool that is disposed of forgets what is in use, and drops the places of what isn't:
    who waits for one waits in vain, and what comes back afterwards is left open until it is
    collected. This one keeps its places, closes what is in them, and goes on to.
    """

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._pool = _Line(self._pool.maxsize, self._pool.use_lifo)
        self._shelf: deque[Lent] = deque()
        self._waiting: deque[None] = deque()  # one for each that waits for a connection
        self._disposed = False

    def take(self) -> Lent:
        """A connection; waits as :meth:`connect` does where the pool has none left."""
        try:
            return self._shelf.pop()
        except IndexError:
            return Lent(self)

    def give(self, lent: Lent) -> None:
        """Give back what was taken, with nothing left open on it, or invalidated."""
        if not lent.valid:
            lent.back()
            return
        self._shelf.append(lent)
        # Asked afterwards: who began to wait before that is seen here, and who did so later
        # finds the connection on the shelf.
        if self._waiting or self._disposed:
            self._clear()

    def dispose(self) -> None:
        self._disposed = True
        self._clear()
        self._close_idle()

    def _clear(self) -> None:
        """Return what is on the shelf to the pool."""
        while True:
            try:
                lent = self._shelf.pop()
            except IndexError:
                return
            lent.back()

    def _close_idle(self) -> None:
        idle = []
        with suppress(Empty):
            while True:
                idle.append(self._pool.get(False))
        for entry in idle:
            try:
                entry.close()  # who gets it next connects
            finally:
                super()._do_return_conn(entry)

    def _create_connection(self) -> ConnectionPoolEntry:
        """A place, for whoever gets it to connect. Should that fail, it goes to who waits for it;
        a place that was given up again would call nobody."""
        return _ConnectionRecord(self, connect=False)

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
            self._close_idle()
