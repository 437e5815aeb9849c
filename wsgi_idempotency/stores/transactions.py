"""A transaction of :class:`~wsgi_idempotency.SQLStore`, which the application joins.

The row is inserted as a claim when the transaction begins and updated when it ends, so
that the primary key finds out before the handler runs what the lock alone can't: a row
that this transaction's snapshot doesn't show. Nobody sees the claim; it is committed as a
completed operation, or never. The key's lock is the transaction's (PostgreSQL
documentation, 13.3.5; on SQLite the database's, by BEGIN IMMEDIATE), and dies with it.
"""

from __future__ import annotations

import logging
import math
import os
import re
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session

from wsgi_idempotency.errors import (
    CommitUnknown,
    SchemaError,
    StoreError,
    StoreUnavailable,
    TransactionConflict,
    TransactionFailed,
)
from wsgi_idempotency.records import Claim, Claimed, Completion, Record
from wsgi_idempotency.stores.sql import (
    SERIALIZATION,
    _first_line,
    completion_params,
    sqlstate_of,
)

if TYPE_CHECKING:
    from sqlalchemy.engine import ExceptionContext

    from wsgi_idempotency.stores.sql import SQLStore

logger = logging.getLogger("wsgi_idempotency")

#: Where a connection has the transaction that the application joins.
_JOINED = "wsgi_idempotency.transaction"

#: What commits in SQL (PostgreSQL documentation, COMMIT, END, PREPARE TRANSACTION).
_COMMITS = re.compile(r"\s*(COMMIT|END|PREPARE\s+TRANSACTION)\b", re.IGNORECASE)

#: What changes which tables are seen, and what may be done to them (PostgreSQL documentation,
#: SET, SET ROLE, SET SESSION AUTHORIZATION, 9.28.1). A column's name may look so: it costs a trip.
_HIDES = re.compile(
    r"\b(SET|RESET)\s+((LOCAL|SESSION)\s+)*(search_path|SCHEMA|ROLE|AUTHORIZATION)\b|\bset_config\b",
    re.IGNORECASE,
)

#: What writes nothing, a function that it calls left aside.
_READS = re.compile(
    r"\s*(SELECT|VALUES|TABLE|SHOW|EXPLAIN|FETCH|DECLARE|CLOSE|SET|RESET|PRAGMA"
    r"|SAVEPOINT|RELEASE|ROLLBACK)\b",
    re.IGNORECASE,
)

#: The module where SQLAlchemy's sessions execute their statements, whatever they are asked to do.
_SESSIONS = sys.modules[Session.__module__].__dict__

#: undefined_table, insufficient_privilege (PostgreSQL documentation, Appendix A).
_HIDDEN = ("42P01", "42501")

# Classes of SQLSTATE that tell of the server, not of what it was asked: connection
# exceptions, insufficient resources, object not in its state (a lock), operator
# intervention, system and internal errors.
_OF_THE_SERVER = ("08", "53", "55", "57", "58", "XX")

#: Seconds between two looks for the end of a transaction whose COMMIT had no answer.
_LOOK_EVERY = 0.05


#: What a forked child is not to let go of.
_of_parents: list[Connection] = []


class ConnectionLost(StoreUnavailable):
    """Raised when the transaction's connection turned out to be dead; so is the transaction."""


@dataclass
class _Savepoint:
    """:param by_session: whether a session began it, not the application itself.
    :param owner: that session.
    :param committed: whether another session has committed within it.
    :param written: whether something was written within it that no session wrote.
    """

    by_session: bool = True
    owner: Session | None = None
    committed: bool = False
    written: bool = False


class SQLTransaction:
    """See :class:`~wsgi_idempotency.stores.base.Transaction`."""

    _pid = 0  # until there is something to leave behind

    def __init__(self, store: SQLStore, connection: Connection, claim: Claim) -> None:
        self._store = store
        self._connection = connection
        self._driver: Any = connection.connection.driver_connection
        self._claim = claim
        self._conflict = False
        self._may_have_written = True
        self._to_reset = False
        self._hidden = False
        self._savepoints: list[_Savepoint] = []  # those that are open, from the outermost
        self._undone = False
        self.claimed: Claimed | None = None
        self.seen: Record | None = None
        self._pid = os.getpid()
        # Weak: the pool has the connection's info, and must not keep what nobody ends any more.
        connection.info[_JOINED] = weakref.ref(self)
        store._sql.refuse_commit(self._driver, _refuse)

    def __del__(self) -> None:
        """A thread interrupted between any two lines leaves a transaction that nobody ends, with
        the key's lock, or all of SQLite's."""
        if self._pid not in (0, os.getpid()):
            # SQLAlchemy's proxy would say ROLLBACK on the connection of the parent's, when it is
            # collected in a child that has forked within a handler.
            _of_parents.append(self._connection)
        elif self._pid and not self._connection.closed:
            self._connection.invalidate()
            self._connection.close()

    @property
    def connection(self) -> Connection:
        # A given engine's sessions are the application's to care for.
        self._to_reset = self._store._given is None
        return self._connection

    def enter(self, wait: float) -> bool:
        """Begin, and claim the key or fetch its row; False when another transaction has it.

        :raises TransactionConflict: the snapshot is too old to tell: begin again.
        """
        with self._speaking(wait):
            self._connection.begin()
            entered = self._store._sql.enter(self._driver, self._claim, wait)
        if isinstance(entered, Claimed):
            self.claimed = entered
        else:
            self._may_have_written = False
            self.seen = entered
        return entered is not None

    def take_over(self, claim: Claim, seen: Record) -> Claimed | None:
        self._claim = claim
        self._may_have_written = True
        with self._speaking():
            return self._store._sql.take_over(self._store._sql.straight(self._driver), claim, seen)

    def complete(self, completion: Completion) -> None:
        try:
            with self._speaking():
                self._leave_savepoints()
                if self._hidden and self._to_reset:
                    self._store._sql.see(self._driver)
                if not self._record(completion):
                    # The claim went with what was written before.
                    raise TransactionFailed(
                        "the application rolled it back. To undo a part of it use"
                        " connection.begin_nested(), or a Session with"
                        ' join_transaction_mode="create_savepoint"'
                    )
            self._commit()
        except (SchemaError, TransactionFailed) as exc:
            if exc.__cause__ is not None and sqlstate_of(exc.__cause__) in _HIDDEN:
                raise TransactionFailed(
                    f"{exc}. The response is recorded in the application's transaction, and it"
                    " can't be where search_path or the role have been changed in it: change them"
                    " back before the handler returns (SET LOCAL search_path, SET LOCAL ROLE)"
                ) from exc
            raise
        finally:
            self.rollback()

    def rollback(self) -> None:
        try:
            if not (self._connection.closed or self._connection.invalidated):
                self._connection.info.pop(_JOINED, None)
                self._store._sql.allow_commit(self._driver)
                self._require_rest()
                self._allow(self._store._timeout)
                if self._may_have_written:
                    self._driver.rollback()
                else:
                    # Nothing to undo; and at a rollback psycopg drops what it has prepared.
                    self._driver.commit()
                if self._to_reset:
                    self._store._sql.reset(self._driver)
        except Exception as exc:
            logger.info("a transaction was left to the server to roll back: %s", exc)
            self._connection.invalidate()
        finally:
            with suppress(SQLAlchemyError):
                self._connection.close()

    def conflicted(self, exc: BaseException | None) -> bool:
        return self._conflict or any(sqlstate_of(error) in SERIALIZATION for error in _chain(exc))

    # ------------------------------------------------------------------ the end

    def _leave_savepoints(self) -> None:
        """What a Session of the application's has flushed and not committed, it would have
        rolled back on its own connection."""
        if self._connection.closed:
            raise TransactionFailed("the application closed its connection")
        if self._connection.invalidated:
            raise ConnectionLost(f"the connection to {self._store!r} was lost")
        self._require_rest()
        if self._undone or any(open_.committed or open_.written for open_ in self._savepoints):
            raise TransactionFailed(
                "a session was open, and has not been committed since, when something else was"
                " written on the connection, or another session committed: savepoints nest, and so"
                " it is undone with that session. Commit or close that one first, or write with it"
                " (session.execute)"
            )
        while (savepoint := self._connection.get_nested_transaction()) is not None:
            savepoint.rollback()

    def savepoint_begun(self) -> None:
        self._savepoints.append(_Savepoint(_by_a_session()))

    def session_begun(self, session: Session) -> None:
        session.info[_JOINED] = weakref.ref(self)
        if self._savepoints and self._savepoints[-1].by_session:
            innermost = self._savepoints[-1]
            innermost.owner = innermost.owner or session

    def session_committed(self, session: Session) -> None:
        for savepoint in self._savepoints:
            savepoint.committed |= savepoint.owner is not session

    def executed(self, statement: str) -> None:
        if self._savepoints and not _READS.match(statement) and not _by_a_session():
            self._savepoints[-1].written = True

    def savepoint_over(self, *, released: bool) -> None:
        """What is released belongs to the one around it. What the application itself undoes, it
        knows of; a session is closed by a framework, and what others wrote is not on its mind."""
        over = self._savepoints.pop() if self._savepoints else _Savepoint()
        if not released:
            self._undone |= over.committed or (over.by_session and over.written)
        elif self._savepoints:
            self._savepoints[-1].committed |= over.committed
            self._savepoints[-1].written |= over.written

    def _require_rest(self) -> None:
        """:raises TransactionFailed: another statement would be part of what was left open, or
        would wait for its end, which never comes."""
        if not self._store._sql.at_rest(self._driver):
            self._connection.invalidate()
            raise TransactionFailed(
                "the application left a COPY, a stream or a pipeline open on the connection"
            )

    def _record(self, completion: Completion) -> bool:
        statements, claim = self._store._sql, self._claim
        params = completion_params(claim.digest, claim.token, completion)
        return statements.straight(self._driver)(statements.COMPLETE, params).rowcount == 1

    def _commit(self) -> None:
        try:
            with self._speaking():
                self._store._sql.allow_commit(self._driver)
                if self._to_reset:
                    self._to_reset = not self._store._sql.commit_and_reset(self._driver)
                else:
                    self._driver.commit()
        except ConnectionLost as exc:
            if not self._committed():
                raise StoreUnavailable(f"{self._store!r} was lost before the commit") from exc

    def _committed(self) -> bool:
        """Whether a COMMIT took effect that had no answer.

        The row tells, once the transaction's lock is free: until then it may be on its way.

        :raises CommitUnknown: it can't be told in time.
        """
        deadline = time.monotonic() + self._store._timeout
        while True:
            try:
                over = self._store._transaction_over(self._claim.digest)
                record = self._store.lookup(self._claim.digest)
            except StoreUnavailable as exc:
                logger.warning("whether a transaction was committed can't be told yet: %s", exc)
            else:
                mine = record is not None and record.token == self._claim.token
                if mine or over:
                    return mine
            if time.monotonic() > deadline:
                raise CommitUnknown(
                    f"the answer of {self._store!r} to a COMMIT was lost, and for"
                    f" {self._store._timeout:g} s nothing could say whether it took effect"
                )
            time.sleep(_LOOK_EVERY)

    # ------------------------------------------------------------------ the driver

    @contextmanager
    def _speaking(self, wait: float = 0.0) -> Iterator[None]:
        """While we speak, the bounds and the errors are ours; what the application asks
        takes its time."""
        self._allow(self._store._timeout + wait)
        try:
            yield
        except self._store._driver_error as exc:
            raise self._translated(exc) from exc
        except DBAPIError as exc:
            raise self._translated(exc.orig) from exc
        except StoreError:
            raise
        except BaseException:
            # A greenlet killed or a thread interrupted in the middle of a round trip.
            self._connection.invalidate()
            raise
        finally:
            self._allow(math.inf)

    def _allow(self, seconds: float) -> None:
        """The time for one round trip, on connections of ours (BoundedConnection)."""
        if hasattr(self._driver, "seconds"):
            self._driver.seconds = seconds

    def _translated(self, exc: Any) -> StoreError:
        store, said = self._store, _first_line(exc)
        sqlstate = sqlstate_of(exc) or ""
        if store._is_disconnect(exc, self._driver):
            self._connection.invalidate()
            return ConnectionLost(f"the connection to {store!r} was lost: {said}")
        if sqlstate in SERIALIZATION:
            return TransactionConflict(f"{store!r} said: {said}")
        error = store._translate(exc)
        if isinstance(error, SchemaError):
            return error
        if sqlstate.startswith(_OF_THE_SERVER) or "database is locked" in said:
            return StoreUnavailable(str(error))
        return TransactionFailed(str(error))


def watch(engine: Engine, *, begin_immediate: bool) -> None:
    """Tell the transactions on an engine's connections what the application does with them.

    :param begin_immediate: begin each with SQLite's write lock. sqlite3 would not begin one
        for a savepoint, whose release would then commit it.
    """
    if begin_immediate:
        event.listen(engine, "begin", _begin_immediate)
    event.listen(engine, "commit", _refuse_commit)
    event.listen(engine, "before_cursor_execute", _refuse_commit_as_text)
    event.listen(engine, "before_cursor_execute", _note_what_hides)
    event.listen(engine, "after_cursor_execute", _note_execution)
    if not event.contains(Session, "after_begin", _note_session):
        event.listen(Session, "after_begin", _note_session)
        event.listen(Session, "after_commit", _note_commit)
    event.listen(engine, "savepoint", _note_savepoint)
    event.listen(engine, "release_savepoint", _note_release)
    event.listen(engine, "rollback_savepoint", _note_rollback)
    event.listen(engine, "handle_error", _note_conflict)


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _nothing() -> None: ...


def _joined(connection: Connection | None) -> SQLTransaction | None:
    if connection is None or connection.closed or connection.invalidated:
        return None
    transaction: SQLTransaction | None = connection.info.get(_JOINED, _nothing)()
    return transaction


def _refuse_commit(connection: Connection) -> None:
    if _joined(connection) is not None:
        _refuse()


def _refuse_commit_as_text(
    connection: Connection, cursor: object, statement: str, *_: object
) -> None:
    if _COMMITS.match(statement) and _joined(connection) is not None:
        _refuse()


def _note_what_hides(connection: Connection, cursor: object, statement: str, *_: object) -> None:
    if _HIDES.search(statement) and (transaction := _joined(connection)) is not None:
        transaction._hidden = True


def _refuse() -> NoReturn:
    raise TransactionFailed(
        "this transaction is committed by IdempotencyMiddleware, together with the response."
        " To commit a part of it use connection.begin_nested(), or a Session with"
        ' join_transaction_mode="create_savepoint", or transaction() of psycopg\'s connection'
    )


def _note_savepoint(connection: Connection, name: str) -> None:
    if (transaction := _joined(connection)) is not None:
        transaction.savepoint_begun()


def _note_session(session: Session, transaction: object, connection: Connection) -> None:
    if (joined := _joined(connection)) is not None:
        joined.session_begun(session)


def _note_commit(session: Session) -> None:
    joined = session.info.get(_JOINED, _nothing)()
    if joined is not None:
        joined.session_committed(session)


def _note_execution(connection: Connection, cursor: object, statement: str, *_: object) -> None:
    if (transaction := _joined(connection)) is not None:
        transaction.executed(statement)


def _by_a_session() -> bool:
    """Whether what is executed now, a session executes: its flush, its query, its savepoint. A
    statement on the connection that a session has joined looks the same but for its caller."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals is not _SESSIONS:
        frame = frame.f_back
    return frame is not None


def _note_release(connection: Connection, name: str, context: object) -> None:
    if (transaction := _joined(connection)) is not None:
        transaction.savepoint_over(released=True)


def _note_rollback(connection: Connection, name: str, context: object) -> None:
    if (transaction := _joined(connection)) is not None:
        transaction.savepoint_over(released=False)


def _note_conflict(context: ExceptionContext) -> None:
    transaction = _joined(context.connection)
    if transaction is not None and sqlstate_of(context.original_exception) in SERIALIZATION:
        transaction._conflict = True


def _chain(exc: BaseException | None) -> Iterator[BaseException]:
    """An exception, what a driver raised beneath it, and what led to it."""
    seen: list[BaseException] = []
    while exc is not None and exc not in seen:
        seen.append(exc)
        yield exc
        exc = getattr(exc, "orig", None) or exc.__cause__ or exc.__context__
