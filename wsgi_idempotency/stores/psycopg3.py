"""A psycopg connection on which no statement waits for ever.

PostgreSQL has ``statement_timeout`` for statements that run too long, but it is a session
setting, which a pooler in transaction mode doesn't keep, and a server that has stopped
(a frozen host, a stopped process) doesn't enforce it. ``tcp_user_timeout`` does not help
either while the server's kernel still acknowledges. So the client watches its own clock.

Imported only with a PostgreSQL store, since psycopg is an extra.
"""

from __future__ import annotations

import hashlib
import math
import re
import select
import struct
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from psycopg._preparing import Prepare, PrepareManager
from psycopg.pq import ExecStatus, TransactionStatus

if TYPE_CHECKING:
    from psycopg._queries import PostgresQuery
    from psycopg.pq.abc import PGconn, PGresult

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
            self.give_up()
            raise

    def give_up(self) -> None:
        """Close it although an answer is still to come."""
        # Closing alone leaves a backend that waits for a lock where it is, with the
        # statement still to run, and one more of the server's connections in use.
        # PostgreSQL looks for a client that is gone only between statements, unless
        # client_connection_check_interval is set. Before libpq 17 to cancel is to block.
        if psycopg.capabilities.has_cancel_safe():
            with suppress(psycopg.Error):
                self.cancel_safe(timeout=min(1.0, self.seconds))
        self.close()


def _bounded(gen: Generator[Any, Any, _T], seconds: float) -> Generator[Any, Any, _T]:
    """``gen``, until it is through or time is up. psycopg asks it again with ``Ready.NONE``
    several times a second while nothing comes."""
    deadline = time.monotonic() + seconds
    try:
        state = next(gen)
        while True:
            ready = yield state
            if not ready and time.monotonic() > deadline:
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

    def __init__(self) -> None:
        super().__init__()
        #: By name, what :func:`execute` has prepared.
        self.plans: dict[bytes, _Plan] = {}

    def clear(self) -> bool:
        """psycopg has all of the connection's deallocated, at a rollback for one."""
        cleared = super().clear()
        if cleared:
            self.plans.clear()
        return cleared

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


# ---------------------------------------------------------------------- the straight way

# psycopg's cursors find out anew for every execution how to send each value and how to read
# each column, and drive a generator through several layers to wait for the answer. Both cost
# more than all the rest of a claim does on the client. The few statements of a request, whose
# values are of five types, go to libpq by psycopg's PGconn, in libpq's asynchronous way
# (PostgreSQL documentation, 34.4): what waits is Python's select, which a signal interrupts
# and gevent replaces.

_BINARY = 1


def _same(data: bytes) -> bytes:
    return data


_INT8, _FLOAT8, _INT4, _INT2 = (struct.Struct(f"!{code}") for code in "qdih")

#: By the type of a value: the type it is sent as (its OID in pg_type.dat), and how. A NULL
#: has the type of where it stands.
_SENT: dict[type, tuple[int, Callable[[Any], bytes | None]]] = {
    bool: (16, lambda value: b"\1" if value else b"\0"),
    bytes: (17, _same),
    str: (25, str.encode),
    int: (20, _INT8.pack),
    float: (701, _FLOAT8.pack),
    type(None): (0, lambda _: None),
}


def _how_sent(kind: type) -> tuple[int, Callable[[Any], bytes | None]]:
    """Those of an application's own types go as what they are kinds of: a scope, a status line
    or the name of a step may be a member of an enumeration, or a text marked as safe."""
    for base, how in _SENT.items():
        if issubclass(kind, base):
            return how
    raise TypeError(f"a value is a {kind.__name__}, which no statement takes")


#: By a column's type: how it is read.
_READ: dict[int, Callable[[bytes], Any]] = {
    16: lambda data: data == b"\1",
    17: _same,
    20: lambda data: _INT8.unpack(data)[0],
    21: lambda data: _INT2.unpack(data)[0],
    23: lambda data: _INT4.unpack(data)[0],
    25: bytes.decode,
    701: lambda data: _FLOAT8.unpack(data)[0],
}

_PLACEHOLDER = re.compile(r"%\((\w+)\)s")


@dataclass(frozen=True, slots=True)
class _Statement:
    """A statement as PostgreSQL takes it, for values of given types.

    :param name: what it is prepared as: its text's digest, for the reason above.
    :param command: with ``$1`` where ``%(name)s`` was.
    """

    name: bytes
    command: bytes
    types: list[int]
    formats: list[int]


@lru_cache(maxsize=256)
def _names(statement: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_PLACEHOLDER.findall(statement)))


@lru_cache(maxsize=256)
def _statement(statement: str, types: tuple[int, ...]) -> _Statement:
    numbers = {name: f"${number}" for number, name in enumerate(_names(statement), 1)}
    command = _PLACEHOLDER.sub(lambda found: numbers[found[1]], statement).encode()
    digest = hashlib.sha256(command + repr(types).encode()).hexdigest()[:32]
    name = b"wsgi_idempotency_%s" % digest.encode()
    return _Statement(name, command, list(types), [_BINARY] * len(types))


class Answer:
    """What a statement has answered, as far as a cursor of the DB-API would be asked."""

    __slots__ = ("_result",)

    def __init__(self, result: PGresult) -> None:
        self._result = result

    @property
    def rowcount(self) -> int:
        return self._result.command_tuples or 0

    def fetchone(self) -> tuple[Any, ...] | None:
        return self._row(0) if self._result.ntuples else None

    def fetchall(self) -> list[tuple[Any, ...]]:
        return [self._row(row) for row in range(self._result.ntuples)]

    def _row(self, row: int) -> tuple[Any, ...]:
        result = self._result
        value, kind = result.get_value, result.ftype
        return tuple(
            [
                None if (data := value(row, column)) is None else _READ[kind(column)](data)
                for column in range(result.nfields)
            ]
        )


_GOOD = (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK)


def goes_straight(connection: psycopg.Connection[Any]) -> bool:
    """Whether text can be sent on a connection as :func:`execute` does."""
    return connection.pgconn.parameter_status(b"client_encoding") == b"UTF8"


def execute(
    connection: psycopg.Connection[Any],
    statement: str,
    params: Mapping[str, Any],
    *,
    prepare: bool,
    begin: bool = False,
) -> Answer:
    """Run one statement on a connection that is the caller's alone.

    :param statement: as psycopg takes it, with ``%(name)s`` for a value of one of the types
        of ``_SENT``; its columns are of those of ``_READ``.
    :param prepare: prepare it on the server, the first time on this connection.
    :param begin: begin the connection's transaction before it, in the same round trip where
        libpq (14) can. psycopg's own pipeline waits for the answer to its BEGIN.
    :raises psycopg.Error: as a cursor would raise it.
    :raises TimedOut: a :class:`BoundedConnection` had no answer in time.
    """
    kinds, values = [], []
    for name in _names(statement):
        value = params[name]
        kind, send = _SENT.get(type(value)) or _how_sent(type(value))
        kinds.append(kind)
        values.append(send(value))
    made = _statement(statement, tuple(kinds))
    result = _execute(connection, made, values, prepare, begin)
    if prepare and _outlived(connection, made, result, begin):
        result = _execute(connection, made, values, prepare, begin)
    if result.status not in _GOOD:
        exc = psycopg.errors.error_from_result(result)
        if isinstance(exc, psycopg.errors.InvalidSqlStatementName):
            _plans(connection).clear()  # by a DISCARD ALL of somebody's
        raise exc
    return Answer(result)


def _execute(
    connection: psycopg.Connection[Any],
    statement: _Statement,
    values: Sequence[bytes | None],
    prepare: bool,
    begin: bool,
) -> PGresult:
    server: PGconn = connection.pgconn
    if prepare:
        if connection._prepared._to_flush:
            # What psycopg has forgotten (see clear()) within a pipeline, it has deallocated after
            # its next statement; the names would be taken until then.
            connection.wait(connection._prepared.maintain_gen(connection))
        name = _prepared(connection, statement) or _prepare(connection, statement)
        if not isinstance(name, bytes):
            return name
        send = partial(server.send_query_prepared, name, values, statement.formats, _BINARY)
    else:
        send = partial(
            server.send_query_params,
            statement.command, values, statement.types, statement.formats, _BINARY,
        )  # fmt: skip
    if not begin:
        return _answer(connection, send)
    command = connection._get_tx_start_command()
    if psycopg.capabilities.has_pipeline():
        return _together(connection, partial(server.send_query_params, command, None), send)
    begun = _answer(connection, partial(server.send_query, command))
    return _answer(connection, send) if begun.status in _GOOD else begun


def commit_and(connection: psycopg.Connection[Any], then: str) -> bool:
    """Commit, and run ``then`` in the same round trip, in a transaction of its own.

    :param then: statements without parameters, separated by semicolons.
    :returns: whether ``then`` went well; it is committed in either case.
    :raises psycopg.Error: as ``commit()`` would raise it, or the transaction had failed;
        nothing is committed, unless the connection was lost.
    """
    if connection._num_transactions:
        connection.commit()  # which says what is wrong with that
    # The simple query protocol takes several statements in one message.
    connection.pgconn.send_query(f"COMMIT; {then}".encode())
    ((committed, *others),) = _answers(connection)
    if committed.status not in _GOOD:
        raise psycopg.errors.error_from_result(committed)
    # PostgreSQL ends a transaction that has failed as it is told, and says but here how.
    if committed.command_status != b"COMMIT":
        raise psycopg.errors.InFailedSqlTransaction("the transaction had failed: nothing to commit")
    return all(other.status in _GOOD for other in others)


def _answer(connection: psycopg.Connection[Any], send: Callable[[], None]) -> PGresult:
    send()
    (results,) = _answers(connection)
    # In autocommit the server commits when it has given the rows, and then may say that it can't:
    # by a deferred constraint, or a serialization failure.
    return results[-1]


def _together(
    connection: psycopg.Connection[Any], first: Callable[[], None], second: Callable[[], None]
) -> PGresult:
    """Send two commands and then wait for both; the answer to the first that failed, or to the
    second."""
    server: PGconn = connection.pgconn
    server.enter_pipeline_mode()
    for send in (first, second, server.pipeline_sync):
        send()
    (begun,), (answer,), _ = _answers(connection, 3)
    server.exit_pipeline_mode()
    return answer if begun.status in _GOOD else begun


def _answers(connection: psycopg.Connection[Any], commands: int = 1) -> list[list[PGresult]]:
    """Wait for the results of so many commands that were given to libpq.

    :raises psycopg.OperationalError: the connection was lost.
    :raises TimedOut: not all came in time.
    """
    server: PGconn = connection.pgconn
    # One of an engine of the application's waits for as long as it takes.
    seconds = connection.seconds if isinstance(connection, BoundedConnection) else math.inf
    deadline = time.monotonic() + seconds
    try:
        # A server that sends meanwhile may take nothing more until that was read.
        while server.flush():
            if _wait(server, _IN | _OUT, deadline) & _IN:
                server.consume_input()
        return [_results(server, deadline) for _ in range(commands)]
    except TimedOut:
        assert isinstance(connection, BoundedConnection)
        connection.give_up()
        raise TimedOut(f"no answer within {seconds:g} s") from None


def _results(server: PGconn, deadline: float) -> list[PGresult]:
    """The results of one command."""
    results: list[PGresult] = []
    late = 0
    while True:
        try:
            while server.is_busy():
                _wait(server, _IN, deadline, late > _LATE)
                server.consume_input()
                late += time.monotonic() > deadline
        except psycopg.OperationalError as exc:
            # A server that says why it hangs up is worth hearing.
            fatal = any(result.status == ExecStatus.FATAL_ERROR for result in results)
            if fatal and not isinstance(exc, TimedOut):
                return results
            raise
        result = server.get_result()
        if result is None:
            return results
        results.append(result)
        if result.status == ExecStatus.PIPELINE_SYNC:
            return results  # nothing ends it


#: How often a connection is read after time was up. What had come by then, to a process that was
#: stopped for one, is read; a server that tells of notices without end is not listened to.
_LATE = 1000

#: Seconds after which the connection is read although its socket has nothing. What libpq (15
#: and 18.0; not 18.6) leaves in OpenSSL's buffer, of a record larger than it has room for, poll()
#: doesn't know of; behind a proxy that ends TLS it may be the end of an answer.
_LOOK_AGAIN = 0.1


def _wait(server: PGconn, events: int, deadline: float, heard_enough: bool = False) -> int:
    """Which of the events there are on the connection's socket; 0 when it is time to look."""
    left = deadline - time.monotonic()
    happened = _poll(server.socket, events, min(max(0.0, left), _LOOK_AGAIN))
    if heard_enough or (not happened and left <= 0):
        raise TimedOut
    return happened


_IN, _OUT = 1, 4  # of poll(2)


def _poll(socket: int, events: int, seconds: float) -> int:
    """poll(2) for one socket; 0 when time was up. Where there is none, on Windows and under
    eventlet, by select(): there it takes any socket."""
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(socket, events)
        # Rounded up: a wait for less than a millisecond is none.
        happened = poll.poll(math.ceil(seconds * 1000))
        # An error, or a connection that was closed, is found by reading.
        return happened[0][1] & (_IN | _OUT) or _IN if happened else 0
    wanted = [socket] if events & _OUT else []
    read, write, _ = select.select([socket], wanted, [], seconds)
    return (_IN if read else 0) | (_OUT if write else 0)


# ---------------------------------------------------------------------- plans


@dataclass(slots=True)
class _Plan:
    """Under which name a statement is prepared, and for how many executions.

    PostgreSQL plans a prepared statement for good at its sixth execution, and for the table as
    it is then. Of one with a few pages it reads every page rather than an index, and goes on to
    while thousands of rows come, until the next ANALYZE (autovacuum's comes within a minute).
    So a statement is prepared anew after ever more executions: the table has then hardly more
    than doubled, or grown by some thousand rows.
    """

    name: bytes
    lasts: int = 32
    left: int = 32


_LONGEST = 1024  # executions; what planning anew costs is then not to be seen


def _plans(connection: Any) -> dict[bytes, _Plan]:
    plans: dict[bytes, _Plan] = connection._prepared.plans
    return plans


def _prepared(connection: psycopg.Connection[Any], statement: _Statement) -> bytes | None:
    """Under which name a statement is prepared; None when it is to be prepared anew."""
    plan = _plans(connection).get(statement.name)
    if plan is None or not plan.left:
        return None
    plan.left -= 1
    return plan.name


def _outlived(
    connection: psycopg.Connection[Any], statement: _Statement, result: PGresult, begun: bool
) -> bool:
    """Whether a statement was refused since the type of a column is another than when it was
    prepared (a migration), and may be run again: it has done nothing, and will be prepared anew.

    :param begun: its transaction was begun with it, and is ended.
    """
    plan = _plans(connection).get(statement.name)
    if result.status in _GOOD or plan is None or plan.left == plan.lasts:
        return False
    exc = psycopg.errors.error_from_result(result)
    if not isinstance(exc, psycopg.errors.FeatureNotSupported):
        return False
    plan.left = 0
    server: PGconn = connection.pgconn
    if begun:
        _answer(connection, partial(server.send_query, b"ROLLBACK"))
    return server.transaction_status == TransactionStatus.IDLE


def _prepare(connection: psycopg.Connection[Any], statement: _Statement) -> bytes | PGresult:
    """Have a statement prepared; its name, or the answer if it can't be."""
    server: PGconn = connection.pgconn
    plans = _plans(connection)
    plan = plans.get(statement.name)
    lasts, name = 32, statement.name
    if plan is not None:
        lasts = 2 * plan.lasts
        if psycopg.capabilities.has_send_close_prepared():
            # A message of the protocol's (libpq 17), which poolers that carry prepared
            # statements over understand; DEALLOCATE they don't.
            del plans[statement.name]
            _answer(connection, partial(server.send_close_prepared, name))
            lasts = min(lasts, _LONGEST)
        else:
            # The old one stays, one of a dozen or two in a connection's life.
            name += b"_%d" % lasts
    made = _answer(
        connection, partial(server.send_prepare, name, statement.command, statement.types)
    )
    if made.status not in _GOOD:
        return made
    plans[statement.name] = _Plan(name, lasts, lasts)
    return name
