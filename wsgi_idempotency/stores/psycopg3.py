"""A psycopg connection on which no statement waits for ever.

PostgreSQL has ``statement_timeout`` for statements that run too long, but it is a session
setting, which a pooler in transaction mode doesn't keep, and a server that has stopped
(a frozen host, a stopped process) doesn't enforce it. ``tcp_user_timeout`` does not help
either while the server's kernel still acknowledges. So the client watches its own clock.

Imported only with a PostgreSQL store, since psycopg is an extra.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Generator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from psycopg._preparing import Prepare, PrepareManager
from psycopg.waiting import Ready

if TYPE_CHECKING:
    from psycopg._queries import PostgresQuery

_T = TypeVar("_T")


class TimedOut(psycopg.OperationalError):
    """Raised when a statement had no answer in time; its connection is closed."""


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that gives a statement up after ``seconds`` and closes itself."""

    seconds = 5.0

    def wait(self, gen: Generator[Any, Any, _T], *args: Any, **kwargs: Any) -> _T:
        try:
            return super().wait(_bounded(gen, self.seconds), *args, **kwargs)
        except TimedOut:
            # Closing alone leaves a backend that waits for a lock where it is, with the
            # statement still to run, and one more of the server's connections in use.
            # PostgreSQL looks for a client that is gone only between statements, unless
            # client_connection_check_interval is set. Before libpq 17 to cancel is to block.
            if psycopg.capabilities.has_cancel_safe():
                with suppress(psycopg.Error):
                    self.cancel_safe(timeout=min(1.0, self.seconds))
            self.close()
            raise


def _bounded(gen: Generator[Any, Any, _T], seconds: float) -> Generator[Any, Any, _T]:
    """``gen``, until it is through or time is up. psycopg asks it again with ``Ready.NONE``
    several times a second while nothing comes."""
    deadline = time.monotonic() + seconds
    try:
        state = next(gen)
        while True:
            ready = yield state
            if ready == Ready.NONE and time.monotonic() > deadline:
                raise TimedOut(f"no answer within {seconds:g} s")
            state = gen.send(ready)
    except StopIteration as done:
        value: _T = done.value
        return value
    finally:
        gen.close()


class _NamedByContent(PrepareManager):
    """Names a prepared statement after its text.

    psycopg numbers them, connection by connection. A pooler in transaction mode that knows
    nothing of prepared statements binds one client's parameters to another client's
    statement of the same number: a HOLD becomes a FORGET, which takes the same parameters,
    and nobody is told. Under a name that is its text's, what runs is what was asked, or
    an error.
    """

    def get(self, query: PostgresQuery, prepare: bool | None = None) -> tuple[Prepare, bytes]:
        found, name = super().get(query, prepare)
        if found is Prepare.SHOULD:
            text = query.query + repr(query.types).encode()
            # psycopg's number stays: a statement that failed is prepared anew, and the server
            # still has the first.
            digest = hashlib.sha256(text).hexdigest()[:32]
            name = b"wsgi_idempotency_%s%s" % (digest.encode(), name.removeprefix(b"_pg3"))
        return found, name


def name_by_content(connection: Any) -> None:
    """Name what a new connection will prepare after its text."""
    manager = _NamedByContent()
    manager.prepare_threshold = connection.prepare_threshold
    manager.prepared_max = connection.prepared_max
    connection._prepared = manager
