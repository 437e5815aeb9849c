"""The fence and the mark in a transaction that the application commits by itself.

At the moment of its COMMIT, and not earlier, the transaction updates the row of the key: it
marks the operation's effects as committed, if the claim is still the caller's. So the
mark is committed together with what the application wrote, or neither; and the row's lock
is the transaction's for as long as COMMIT takes.

- A take-over that comes meanwhile waits for this lock, looks at the row again, and finds the
  mark (READ COMMITTED, PostgreSQL documentation 13.2.1).
- A take-over that came before has changed the token: the update finds no row, or, in a
  REPEATABLE READ or SERIALIZABLE transaction whose snapshot is older, fails with 40001. The
  transaction is rolled back in both cases.
- On SQLite there is one writer at a time: the take-over comes before the application's
  transaction or after it.

The heartbeat changes the row too. READ COMMITTED doesn't mind. A REPEATABLE READ or SERIALIZABLE
transaction that is older than the last renewal fails with 40001, as any transaction at these
levels may.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, scoped_session

from wsgi_idempotency.errors import ClaimLost, GuardRefused
from wsgi_idempotency.records import Claim, State
from wsgi_idempotency.stores.sql import _LITE_NOW, _NO_SCHEMA, sqlstate_of

if TYPE_CHECKING:
    from wsgi_idempotency.stores.base import Guard as BaseGuard
    from wsgi_idempotency.stores.sql import SQLStore

logger = logging.getLogger("wsgi_idempotency")

# A transaction that has neither written nor locked anything has no effects: a handler that
# commits after it has read may still fail, and be run again. As a subquery it is asked once,
# before the update itself has a transaction id. Index: pk_idempotency_keys.
_PG_WRITTEN = "SELECT pg_current_xact_id_if_assigned() IS NOT NULL"
_PG_MARK = text(f"""
UPDATE idempotency_keys SET effects_at = clock_timestamp()
WHERE key_digest = :digest AND claim_token = :token AND state = 'claimed' AND ({_PG_WRITTEN})""")

# After a COMMIT that was not heard of. It has the row's lock until its transaction is over, so
# that this one waits for it, wherever it is on its way.
_PG_MARK_AT_FIRST = text(f"{_PG_MARK.text} AND effects_at IS NULL")

_LITE_MARK = text(f"""
UPDATE idempotency_keys SET effects_at = {_LITE_NOW}
WHERE key_digest = :digest AND claim_token = :token AND state = 'claimed'""")


class Guard:
    """Watches the transactions of one session or connection for one operation.

    :param store: where the claim is.
    :param target: a :class:`~sqlalchemy.orm.Session`, a
        :class:`~sqlalchemy.orm.scoped_session` or a :class:`~sqlalchemy.Connection`.
    :param siblings: the guards of the same operation, also those to come.
    :raises GuardRefused: it is something else.
    """

    def __init__(
        self, store: SQLStore, claim: Claim, target: Any, siblings: Sequence[BaseGuard] = ()
    ) -> None:
        self._store = store
        self._siblings = siblings
        self._committing: Any = None  # the driver's connection that was given a COMMIT last
        self._claim = claim
        self._session: Session | None = None
        self._connections: list[Connection] = []
        self._lock = threading.Lock()
        self._over = False
        #: A transaction has been marked; whether it was committed, the row says.
        self.marked = False
        if isinstance(target, scoped_session):
            target = target()
        if isinstance(target, Connection):
            self._watch(target)
        elif isinstance(target, Session):
            self._session = target
            event.listen(target, "after_begin", self._began)
            event.listen(target, "after_commit", self._committed)
            for connection in _connections_of(target):
                self._watch(connection)
        else:
            raise GuardRefused(
                f"{target!r:.200} can't be guarded; use a Session or a Connection of SQLAlchemy's"
            )

    def remove(self) -> None:
        """Watch no longer: a session may go on to serve another request."""
        with self._lock:
            if self._over:
                return
            self._over = True
        if self._session is not None:
            event.remove(self._session, "after_begin", self._began)
            event.remove(self._session, "after_commit", self._committed)
        for connection in self._connections:
            for name, listener in self._listeners():
                event.remove(connection, name, listener)

    @property
    def unheard(self) -> bool:
        """The connection broke that was given a COMMIT last; of a Session's, in that COMMIT."""
        return bool(getattr(self._committing, "broken", False))

    def _committed(self, session: Session) -> None:
        if not self.unheard:
            self._committing = None

    def _began(self, session: Session, transaction: object, connection: Connection) -> None:
        self._watch(connection)

    def _watch(self, connection: Connection) -> None:
        # A savepoint begins on the connection that is watched already.
        with self._lock:
            if self._over or connection in self._connections:
                return
            self._connections.append(connection)
        for name, listener in self._listeners():
            event.listen(connection, name, listener)

    def _listeners(self) -> list[tuple[str, Any]]:
        return [("commit", self._commits), ("prepare_twophase", self._prepares)]

    def _prepares(self, connection: Connection, xid: object) -> None:
        self._commits(connection)

    def _commits(self, connection: Connection) -> None:
        """Just before COMMIT, or PREPARE TRANSACTION, after everything was flushed."""
        if self._over:
            return
        try:
            self._mark(connection)
        except BaseException:
            # SQLAlchemy takes a COMMIT that failed for one that the database has refused, and
            # sends no ROLLBACK any more.
            try:
                connection.connection.driver_connection.rollback()  # type: ignore[union-attr]
            except Exception:
                connection.invalidate()
            raise

    def _mark(self, connection: Connection) -> None:
        postgresql = connection.dialect.name == "postgresql"
        driver: Any = connection.connection.driver_connection
        if not postgresql and not driver.in_transaction:
            if driver.isolation_level is None or getattr(driver, "autocommit", None) is True:
                raise GuardRefused(_AUTOCOMMIT)
            return  # sqlite3 begins when something is written
        if postgresql and driver.autocommit:
            raise GuardRefused(_AUTOCOMMIT)
        params = {"digest": self._claim.digest, "token": self._claim.token}
        doubtful = self.unheard or any(guard.unheard for guard in self._siblings)
        mark = _PG_MARK_AT_FIRST if doubtful else _PG_MARK if postgresql else _LITE_MARK
        try:
            found = connection.execute(mark, params).rowcount
            if not found and postgresql and not connection.scalar(text(_PG_WRITTEN)):
                return
        except DBAPIError as exc:
            if exc.orig is not None and (
                sqlstate_of(exc.orig) in _NO_SCHEMA
                or str(exc.orig).startswith(("no such table", "no such column"))
            ):
                raise GuardRefused(_NOT_HERE.format(self._store)) from exc
            raise
        if not found:
            raise self._why_not(doubtful)
        self.marked = True
        self._committing = driver

    def _why_not(self, doubtful: bool) -> Exception:
        record = self._store.lookup(self._claim.digest)
        mine = record is not None and record.token == self._claim.token
        if record is not None and mine and record.state is State.CLAIMED:
            if doubtful and record.effects:
                return GuardRefused(_DONE_ALREADY)
            return GuardRefused(_NOT_HERE.format(self._store))
        return ClaimLost(
            "what the session wrote was rolled back: its operation's claim is lost. Somebody else"
            " has it, or it is held"
        )


def _connections_of(session: Session) -> set[Connection]:
    """Those on which a session's transaction is open. SQLAlchemy's connection() would name one of
    them, for the mapper or bind that it is asked for."""
    transaction = session.get_transaction()
    used = {} if transaction is None else transaction._connections
    return {connection for connection, *_ in used.values()}


_AUTOCOMMIT = (
    "a connection in autocommit can't be guarded: what it writes is committed statement by"
    " statement. Give its engine or session a transaction"
)
_DONE_ALREADY = (
    "what the session wrote was rolled back: a transaction of the same operation, whose COMMIT"
    " was not heard of when its connection broke, may be committed, and would be done twice"
)
_NOT_HERE = (
    "what the session wrote was rolled back: the operation's row is not where it looks. Guard a"
    " session on the database and schema of {!r}, whose transaction began after the request"
)
