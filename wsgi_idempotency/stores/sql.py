"""Records in PostgreSQL or SQLite: every SQL statement this package sends while it serves.

The statements run one by one, each its own transaction (autocommit), so that no lock
outlives a round trip. On PostgreSQL they expect READ COMMITTED: under REPEATABLE READ
``INSERT ... ON CONFLICT DO NOTHING`` fails with a serialization error when the
conflicting row is younger than the snapshot (PostgreSQL documentation, 13.2.2); that is
asked again like the missing row it stands for.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar, cast

import sqlalchemy
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.pool import Pool, StaticPool

from wsgi_idempotency import forks
from wsgi_idempotency.errors import (
    AnswerLost,
    ConfigurationError,
    CorruptRecord,
    Disconnected,
    NotStorable,
    SchemaError,
    StoreError,
    StoreUnavailable,
    TransactionConflict,
    TransactionFailed,
)
from wsgi_idempotency.records import Claim, Claimed, Completion, Lapse, Record, State, Step
from wsgi_idempotency.stores.pools import Lent, StatementPool
from wsgi_idempotency.stores.tables import (
    SCHEMA_REVISION,
    VERSION_TABLE,
    metadata,
    version_table,
)

if TYPE_CHECKING:
    from types import ModuleType

    from sqlalchemy.engine.interfaces import DBAPIConnection

    from wsgi_idempotency.stores.base import Guard as GuardProtocol
    from wsgi_idempotency.stores.guards import Guard
    from wsgi_idempotency.stores.transactions import SQLTransaction

logger = logging.getLogger("wsgi_idempotency")

_T = TypeVar("_T")

#: How often a claim looks again when the row it lost to is not visible to its snapshot.
#: Each look has a new snapshot, so one is the rule and a handful the exception.
_LOOKS = 50

#: How often a row that is locked is tried to renew, and how many seconds apart. A take-over, a
#: step or a completion has it for a round trip, and who has lost its claim by it must know.
_LOOKS_AT_LOCKED, _LOCKED_FOR = 10, 0.03

# ---------------------------------------------------------------------- PostgreSQL

# date_part() is a float8; extract() is made by way of numeric, which costs a sixth of a replay.
_PG_RECORD = """
    key_digest, claim_token, state, fingerprint, fingerprint_version, attempt, lapse,
    state = 'claimed' AND lease_until <= now() AS lapsed, expires_at <= now() AS past_retention,
    date_part('epoch', now() - created_at) AS age,
    date_part('epoch', lease_until - now()) AS lease_left,
    effects_at IS NOT NULL AS effects,
    response_status, response_headers, response_body, not_replayable"""

# A row that counts as absent. One in flight or held never does; one whose effects are
# committed is done once its lease has run out, whatever its lapse.
_PG_EXPIRED = """(
    expires_at <= now()
    AND (state IN ('completed', 'released')
         OR (state = 'claimed' AND (lapse = 'release' OR effects_at IS NOT NULL)
             AND lease_until <= now())))"""

# A claim of a fresh key; what it is selected from says whether there is one.
_PG_NEW_ROW = """INSERT INTO idempotency_keys (
        created_at, lease_until, expires_at, attempt, fingerprint_version, key_digest,
        claim_token, fingerprint, state, lapse, scope, idempotency_key, method, path)
    SELECT
        now(), now() + make_interval(secs => %(lease)s),
        now() + make_interval(secs => %(retention)s), 1, %(fingerprint_version)s::smallint,
        %(digest)s, %(token)s, %(fingerprint)s, 'claimed', %(lapse)s, %(scope)s, %(key)s,
        %(method)s, %(path)s"""

# One round trip for a fresh key and for a replay. It looks first, so that a replay
# writes nothing: no row lock, no WAL. Two that insert at once meet in the primary key:
# the second waits for the first's commit and then does nothing. If that row was
# committed after this statement's snapshot, neither CTE has a row, and the caller asks
# again. The joins to a constant make the answer one row in every case.
# Index: pk_idempotency_keys.
_PG_CLAIM = f"""
WITH seen AS (
    SELECT {_PG_RECORD} FROM idempotency_keys WHERE key_digest = %(digest)s
), won AS (
    {_PG_NEW_ROW}
    WHERE NOT EXISTS (SELECT FROM seen)
    ON CONFLICT (key_digest) DO NOTHING
    RETURNING attempt
)
SELECT won.attempt, seen.*
FROM (SELECT 1) AS one LEFT JOIN won ON true LEFT JOIN seen ON true"""

# The same, without waiting for the disk (Policy.claim_durability). set_config() with
# is_local is SET LOCAL within the statement: the setting is read when the statement's own
# transaction commits, and is gone with it, so that no pooler hands it on. WAL is one
# sequence: the next commit that does wait, by anybody in the cluster, makes this one durable
# before itself (PostgreSQL documentation, 30.4).
_PG_CLAIM_ASYNCHRONOUSLY = _PG_CLAIM.replace(
    "FROM (SELECT 1) AS one", "FROM (SELECT set_config('synchronous_commit', 'off', true)) AS one"
)

# The same within a transaction (transaction mode), and in the same round trip the key's
# lock, which is the transaction's: whoever finds it taken doesn't insert, so nobody waits
# in the primary key for a whole handler. This statement's snapshot is older than the lock.
# A row that was committed in between is not seen, and keeps ours from being inserted; the
# caller then asks again, holding the lock. Under REPEATABLE READ the insert fails with
# 40001 instead, since the transaction would never see that row. Index: pk_idempotency_keys.
_PG_ENTER = f"""
WITH lock AS MATERIALIZED (
    SELECT pg_try_advisory_xact_lock(%(lock)s) AS mine
), seen AS (
    SELECT {_PG_RECORD} FROM idempotency_keys WHERE key_digest = %(digest)s
), won AS (
    {_PG_NEW_ROW}
    FROM lock WHERE lock.mine AND NOT EXISTS (SELECT FROM seen)
    ON CONFLICT (key_digest) DO NOTHING
    RETURNING attempt
)
SELECT lock.mine, won.attempt, seen.*
FROM lock LEFT JOIN won ON true LEFT JOIN seen ON true"""

# To wait for whoever has the key is to wait for its lock: one wakes the moment the other
# transaction ends. lock_timeout counts for advisory locks too (PostgreSQL documentation,
# 20.11.1); it is set for the transaction alone, so that no pooler hands it on.
_PG_PATIENCE = "SELECT set_config('lock_timeout', %(setting)s, true)"
_PG_AWAIT = "SELECT pg_advisory_xact_lock(%(lock)s)"

# Whether the transaction that had the key's lock is over; given back at once. Asked in
# autocommit, when the answer to a COMMIT was lost.
_PG_OVER = "SELECT pg_try_advisory_xact_lock(%(lock)s)"

# A compare-and-swap. Two that take over at once: the second waits for the first's row
# lock, re-reads the row (READ COMMITTED, PostgreSQL documentation 13.2.1) and finds
# another token. So it does for an application's transaction that marks its effects (see
# _MARK), and then finds the mark, which nobody saw when the row was read. The conditions are
# repeated here because a heartbeat may have renewed the lease since. Steps of an expired
# operation stay behind: its successor's created_at is another. Index: pk_idempotency_keys.
_PG_TAKE_OVER = f"""
UPDATE idempotency_keys SET
    state = 'claimed', claim_token = %(token)s, lapse = %(lapse)s,
    attempt = CASE WHEN {_PG_EXPIRED} THEN 1
                   WHEN effects_at IS NOT NULL THEN attempt ELSE attempt + 1 END,
    effects_at = CASE WHEN {_PG_EXPIRED} THEN NULL ELSE effects_at END,
    created_at = CASE WHEN {_PG_EXPIRED} THEN now() ELSE created_at END,
    lease_until = now() + make_interval(secs => %(lease)s),
    expires_at = now() + make_interval(secs => %(retention)s),
    fingerprint = %(fingerprint)s, fingerprint_version = %(fingerprint_version)s::smallint,
    scope = %(scope)s, idempotency_key = %(key)s, method = %(method)s, path = %(path)s,
    completed_at = NULL, response_status = NULL, response_headers = NULL,
    response_body = NULL, not_replayable = NULL
WHERE key_digest = %(digest)s AND claim_token = %(seen)s
  AND ((effects_at IS NOT NULL) = %(effects)s
       AND (state = 'released'
            OR (state = 'claimed' AND (lapse = 'release' OR effects_at IS NOT NULL)
                AND lease_until <= now()))
       OR {_PG_EXPIRED})
RETURNING attempt, effects_at IS NOT NULL"""

_PG_LOOKUP = f"SELECT {_PG_RECORD} FROM idempotency_keys WHERE key_digest = %(digest)s"

# The token is the fence: whoever lost the claim finds no row. 'held' is there for a worker
# that was only slow: until somebody has resolved its row, it knows best. 'completed' is
# there so that asking again after a lost answer finds its own work done. No indexed column
# changes, so the update can stay heap-only. In transaction mode now() would be when the
# transaction began. Index: pk_idempotency_keys.
_PG_COMPLETE = """
UPDATE idempotency_keys SET
    state = 'completed', completed_at = clock_timestamp(), response_status = %(status)s,
    response_headers = %(headers)s, response_body = %(body)s, not_replayable = %(reason)s
WHERE key_digest = %(digest)s AND claim_token = %(token)s
  AND state IN ('claimed', 'held', 'completed')"""

# A row that was held in its worker's absence stays held, since a renewal may also come after
# the worker's own HOLD; its worker still has it, and a reconciler is to look no sooner.
# A row that is locked is skipped, so that one transaction of an application's that has its own
# claim's row locked (see guards.py), and waits in COMMIT, doesn't keep all others from being
# renewed. The answer says which were renewed, and which are the caller's by the snapshot alone.
# Index: pk_idempotency_keys.
_PG_RENEW = """
WITH mine AS (
    SELECT * FROM unnest(%(digests)s::bytea[], %(tokens)s::bytea[], %(leases)s::float8[])
        AS mine (digest, token, lease)
), free AS (
    SELECT row.key_digest, row.claim_token, mine.lease
    FROM idempotency_keys AS row
    JOIN mine ON row.key_digest = mine.digest AND row.claim_token = mine.token
    WHERE row.state IN ('claimed', 'held')
    FOR NO KEY UPDATE OF row SKIP LOCKED
), renewed AS (
    UPDATE idempotency_keys AS row SET lease_until = greatest(
        now() + make_interval(secs => free.lease),
        CASE row.state WHEN 'held' THEN row.lease_until END)
    FROM free
    WHERE row.key_digest = free.key_digest AND row.claim_token = free.claim_token
    RETURNING row.claim_token
)
SELECT row.claim_token, renewed.claim_token IS NOT NULL FROM idempotency_keys AS row
LEFT JOIN renewed ON row.claim_token = renewed.claim_token
JOIN mine ON row.key_digest = mine.digest AND row.claim_token = mine.token
WHERE row.state IN ('claimed', 'held')"""

# One batch, one transaction. Rows another purge or a take-over has locked are skipped,
# so nobody waits for anybody and no row is counted twice; the rows found are locked
# until the DELETE ends, so their ctid can't move. Index: ix_idempotency_keys_expires_at.
_PG_PURGE = f"""
DELETE FROM idempotency_keys WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM idempotency_keys
    WHERE {_PG_EXPIRED} AND expires_at <= now() - make_interval(secs => %(older_than)s)
    ORDER BY expires_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED))"""

# Fenced: a take-over updates the row, so it waits for this lock on it, or this waits for
# the take-over and then finds another token. 'held' is there for what was only slow: that
# it is done is worth knowing whatever is decided. A step that is already there was recorded by
# an earlier, unheard call of the same caller, or by an operation that has expired since.
# Indexes: pk_idempotency_keys, pk_idempotency_steps.
_PG_RECORD_STEP = """
INSERT INTO idempotency_steps (created_at, operation_at, attempt, key_digest, name, result)
SELECT now(), created_at, attempt, key_digest, %(name)s, %(result)s
FROM idempotency_keys
WHERE key_digest = %(digest)s AND claim_token = %(token)s AND state IN ('claimed', 'held')
FOR SHARE
ON CONFLICT (key_digest, name) DO UPDATE SET
    created_at = excluded.created_at, operation_at = excluded.operation_at,
    attempt = excluded.attempt, result = excluded.result"""

# ---------------------------------------------------------------------- both

# The step of the operation whose claim is still the caller's; no row when it isn't.
_STEP = """
SELECT step.result
FROM idempotency_keys AS operation
LEFT JOIN idempotency_steps AS step
  ON step.key_digest = operation.key_digest AND step.operation_at = operation.created_at
  AND step.name = {name}
WHERE operation.key_digest = {digest} AND operation.claim_token = {token}
  AND operation.state = 'claimed'"""

# Each of these asks for the token, and says the same twice when asked twice. 'held' as for
# a completion: a worker that was only slow knows best what came of it.
_RELEASE = """
UPDATE idempotency_keys SET state = 'released'
WHERE key_digest = {digest} AND claim_token = {token}
  AND state IN ('claimed', 'held', 'released')"""

_HOLD = """
UPDATE idempotency_keys SET state = 'held'
WHERE key_digest = {digest} AND claim_token = {token} AND state IN ('claimed', 'held')"""

# What has committed effects happened, whatever its caller believes. Its steps go with it.
_FORGET = """
DELETE FROM idempotency_keys
WHERE key_digest = {digest} AND claim_token = {token} AND state IN ('claimed', 'held')
  AND effects_at IS NULL"""

_VERSION = f"SELECT version_num FROM {VERSION_TABLE}"

# ---------------------------------------------------------------------- SQLite

# 'now' is one moment for a whole statement (SQLite, "Date And Time Functions").
_LITE_NOW = "((julianday('now') - 2440587.5) * 86400.0)"

_LITE_RECORD = f"""
    key_digest, claim_token, state, fingerprint, fingerprint_version, attempt, lapse,
    state = 'claimed' AND lease_until <= {_LITE_NOW} AS lapsed,
    expires_at <= {_LITE_NOW} AS past_retention,
    {_LITE_NOW} - created_at AS age, lease_until - {_LITE_NOW} AS lease_left,
    effects_at IS NOT NULL AS effects,
    response_status, response_headers, response_body, not_replayable"""

_LITE_EXPIRED = f"""(
    expires_at <= {_LITE_NOW}
    AND (state IN ('completed', 'released')
         OR (state = 'claimed' AND (lapse = 'release' OR effects_at IS NOT NULL)
             AND lease_until <= {_LITE_NOW})))"""

_LITE_LOOKUP = f"SELECT {_LITE_RECORD} FROM idempotency_keys WHERE key_digest = :digest"

# SQLite has one writer at a time; a replay stays with the SELECT and takes no write
# lock. Without RETURNING (SQLite 3.35): the row count says who won.
_LITE_INSERT = f"""
INSERT INTO idempotency_keys (
    created_at, lease_until, expires_at, attempt, fingerprint_version, key_digest,
    claim_token, fingerprint, state, lapse, scope, idempotency_key, method, path)
VALUES (
    {_LITE_NOW}, {_LITE_NOW} + :lease, {_LITE_NOW} + :retention, 1, :fingerprint_version,
    :digest, :token, :fingerprint, 'claimed', :lapse, :scope, :key, :method, :path)
ON CONFLICT (key_digest) DO NOTHING"""

_LITE_TAKE_OVER = f"""
UPDATE idempotency_keys SET
    state = 'claimed', claim_token = :token, lapse = :lapse,
    attempt = CASE WHEN {_LITE_EXPIRED} THEN 1
                   WHEN effects_at IS NOT NULL THEN attempt ELSE attempt + 1 END,
    effects_at = CASE WHEN {_LITE_EXPIRED} THEN NULL ELSE effects_at END,
    created_at = CASE WHEN {_LITE_EXPIRED} THEN {_LITE_NOW} ELSE created_at END,
    lease_until = {_LITE_NOW} + :lease, expires_at = {_LITE_NOW} + :retention,
    fingerprint = :fingerprint, fingerprint_version = :fingerprint_version,
    scope = :scope, idempotency_key = :key, method = :method, path = :path,
    completed_at = NULL, response_status = NULL, response_headers = NULL,
    response_body = NULL, not_replayable = NULL
WHERE key_digest = :digest AND claim_token = :seen
  AND ((effects_at IS NOT NULL) = :effects
       AND (state = 'released'
            OR (state = 'claimed' AND (lapse = 'release' OR effects_at IS NOT NULL)
                AND lease_until <= {_LITE_NOW}))
       OR {_LITE_EXPIRED})"""

_LITE_COMPLETE = f"""
UPDATE idempotency_keys SET
    state = 'completed', completed_at = {_LITE_NOW}, response_status = :status,
    response_headers = :headers, response_body = :body, not_replayable = :reason
WHERE key_digest = :digest AND claim_token = :token
  AND state IN ('claimed', 'held', 'completed')"""

_LITE_RECORD_STEP = f"""
INSERT INTO idempotency_steps (created_at, operation_at, attempt, key_digest, name, result)
SELECT {_LITE_NOW}, created_at, attempt, key_digest, :name, :result
FROM idempotency_keys
WHERE key_digest = :digest AND claim_token = :token AND state IN ('claimed', 'held')
ON CONFLICT (key_digest, name) DO UPDATE SET
    created_at = excluded.created_at, operation_at = excluded.operation_at,
    attempt = excluded.attempt, result = excluded.result"""

_LITE_RENEW = f"""
UPDATE idempotency_keys SET lease_until = max(
    {_LITE_NOW} + :lease, CASE state WHEN 'held' THEN lease_until ELSE 0 END)
WHERE key_digest = :digest AND claim_token = :token AND state IN ('claimed', 'held')"""

_LITE_PURGE = f"""
DELETE FROM idempotency_keys WHERE rowid IN (
    SELECT rowid FROM idempotency_keys
    WHERE {_LITE_EXPIRED} AND expires_at <= {_LITE_NOW} - :older_than
    ORDER BY expires_at LIMIT :limit)"""


class _Cursor(Protocol):
    """What of a DB-API cursor is used here."""

    @property
    def rowcount(self) -> int: ...
    def fetchone(self) -> Any: ...
    def fetchall(self) -> list[Any]: ...


_Run = Callable[[str, Mapping[str, Any]], _Cursor]


# In one string: the simple query protocol takes them in one trip.
_PG_RESET = (
    "SELECT pg_catalog.pg_advisory_unlock_all(); CLOSE ALL; UNLISTEN *; RESET ALL;"
    " RESET SESSION AUTHORIZATION; RESET ROLE; DISCARD TEMP"
)
# What our statements need to find the table and to be let at it.
_PG_SEE = "RESET search_path; RESET SESSION AUTHORIZATION; RESET ROLE"


class _PostgreSQL:
    """The statements as PostgreSQL takes them, on psycopg 3."""

    RELEASE = _RELEASE.format(digest="%(digest)s", token="%(token)s")
    HOLD = _HOLD.format(digest="%(digest)s", token="%(token)s")
    FORGET = _FORGET.format(digest="%(digest)s", token="%(token)s")
    STEP = _STEP.format(digest="%(digest)s", token="%(token)s", name="%(name)s")
    COMPLETE = _PG_COMPLETE
    PURGE = _PG_PURGE
    LOOKUP = _PG_LOOKUP

    _STRAIGHT = frozenset(
        {
            _PG_CLAIM,
            _PG_CLAIM_ASYNCHRONOUSLY,
            _PG_TAKE_OVER,
            _PG_LOOKUP,
            _PG_COMPLETE,
            _PG_ENTER,
            RELEASE,
            HOLD,
            FORGET,
            STEP,
            _PG_RECORD_STEP,
        }
    )

    def __init__(self, prepare: bool) -> None:
        self._prepare = prepare

    def runner(self, connection: Any) -> _Run:
        new_cursor = _cursors()

        def run(statement: str, params: Mapping[str, Any]) -> _Cursor:
            cursor: Any = new_cursor(connection)
            return cast(
                "_Cursor", cursor.execute(statement, params, prepare=self._prepare, binary=True)
            )

        return run

    def straight(self, connection: Any, *, begin: bool = False) -> _Run:
        """As :meth:`runner`, with the statements of a request the short way.

        :param begin: begin a transaction with the first; psycopg begins one by itself.
        """
        psycopg3 = _psycopg3()
        if not psycopg3.goes_straight(connection):
            return self.runner(connection)

        def run(statement: str, params: Mapping[str, Any]) -> _Cursor:
            if statement not in self._STRAIGHT:
                return self.runner(connection)(statement, params)
            answer: _Cursor = psycopg3.execute(
                connection, statement, params, prepare=self._prepare, begin=begin
            )
            return answer

        return run

    def claim(self, run: _Run, claim: Claim) -> Claimed | Record:
        statement = _PG_CLAIM_ASYNCHRONOUSLY if claim.asynchronous else _PG_CLAIM
        for _ in range(_LOOKS):
            try:
                row = run(statement, _claim_params(claim)).fetchone()
            except Exception as exc:
                if sqlstate_of(exc) in SERIALIZATION:
                    continue
                raise
            if row[0] is not None:
                return Claimed(attempt=row[0])
            if row[1] is not None:
                return _own_or_record(_record(row[1:]), claim)
        raise StoreError(f"no stable answer to a claim after {_LOOKS} looks")

    def ready(self, driver: Any, isolation_level: str | None, seconds: float) -> None:
        """Make a connection begin transactions by itself, at a level; attributes of
        psycopg's, no round trips."""
        from psycopg import IsolationLevel

        level = None
        if isolation_level is not None:
            level = IsolationLevel[isolation_level.replace(" ", "_")]
        if driver.isolation_level != level:
            driver.isolation_level = level
        if driver.autocommit:
            driver.autocommit = False

    def refuse_commit(self, driver: Any, refuse: Callable[[], NoReturn]) -> None:
        """Keep the application from committing the claim without a response."""
        driver.commit = refuse

    def allow_commit(self, driver: Any) -> None:
        vars(driver).pop("commit", None)

    def at_rest(self, driver: Any) -> bool:
        """Whether a statement could be sent now. In the middle of a COPY psycopg would ask
        libpq for its result again and again, for ever."""
        from psycopg.pq import PipelineStatus, TransactionStatus

        pgconn = driver.pgconn
        busy = pgconn.transaction_status == TransactionStatus.ACTIVE
        return not busy and bool(pgconn.pipeline_status == PipelineStatus.OFF)

    def reset(self, driver: Any) -> None:
        """Undo, in one trip, what the application has done to the session: settings, session
        locks, cursors WITH HOLD, temporary tables, LISTEN."""
        # Not DISCARD ALL: it would drop what psycopg has prepared.
        driver.autocommit = True
        driver.execute(_PG_RESET, prepare=False)

    def see(self, driver: Any) -> None:
        """Undo, within the transaction, what may hide the table from us."""
        driver.execute(_PG_SEE, prepare=False)

    def commit_and_reset(self, driver: Any) -> bool:
        """Commit, and :meth:`reset` in the same trip: with no other one for a request to wait
        for, and behind a pooler in the session that it is about. Whether that is clean."""
        from wsgi_idempotency.stores.psycopg3 import commit_and

        return commit_and(driver, _PG_RESET)

    def over(self, run: _Run, digest: bytes) -> bool:
        return bool(run(_PG_OVER, {"lock": _lock_of(digest)}).fetchone()[0])

    def enter(self, driver: Any, claim: Claim, wait: float) -> Claimed | Record | None:
        """Within a transaction: lock the key, and claim it or fetch its row; None when
        another transaction has it."""
        params = _claim_params(claim) | {"lock": _lock_of(claim.digest)}
        cursor = self.straight(driver, begin=True)(_PG_ENTER, params)
        run = self.straight(driver)
        for _ in range(_LOOKS):
            mine, attempt, *seen = cursor.fetchone()
            if attempt is not None:
                return Claimed(attempt=attempt)
            record = _record(tuple(seen)) if seen[0] is not None else None
            # One that is done is done whoever has the lock; others may be about to change.
            if record is not None and (mine or record.done):
                return record
            if not mine and not self._await(driver, run, params, wait):
                return None
            cursor = run(_PG_ENTER, params)
        raise StoreError(f"no stable answer to a claim after {_LOOKS} looks")

    def _await(self, driver: Any, run: _Run, params: dict[str, Any], wait: float) -> bool:
        if wait <= 0:
            return False
        try:
            with _one_trip(driver):
                before = run("SHOW lock_timeout", {})
                run(_PG_PATIENCE, {"setting": f"{max(1, round(wait * 1000))}ms"})
                run(_PG_AWAIT, params)
        except Exception as exc:
            if sqlstate_of(exc) == "55P03":  # lock_not_available
                return False
            raise
        run(_PG_PATIENCE, {"setting": before.fetchone()[0]})
        return True

    def take_over(self, run: _Run, claim: Claim, seen: Record) -> Claimed | None:
        try:
            row = run(_PG_TAKE_OVER, _claim_params(claim) | _seen_params(seen)).fetchone()
        except Exception as exc:
            if sqlstate_of(exc) in SERIALIZATION:
                return None
            raise
        return None if row is None else Claimed(attempt=row[0], effects=row[1])

    def step(self, run: _Run, params: Mapping[str, Any]) -> Any:
        return run(self.STEP, params).fetchone()

    def record_step(self, run: _Run, params: Mapping[str, Any]) -> bool:
        for _ in range(_LOOKS):
            try:
                return run(_PG_RECORD_STEP, params).rowcount == 1
            except Exception as exc:
                if sqlstate_of(exc) not in SERIALIZATION:
                    raise
        raise StoreUnavailable(f"no stable answer to a step after {_LOOKS} looks")

    def renew(self, run: _Run, claims: list[tuple[bytes, bytes, float]]) -> set[bytes]:
        kept: set[bytes] = set()
        for look in range(_LOOKS_AT_LOCKED):
            if look:
                time.sleep(_LOCKED_FOR)
            digests, tokens, leases = (list(column) for column in zip(*claims, strict=True))
            rows = run(_PG_RENEW, {"digests": digests, "tokens": tokens, "leases": leases})
            found = {bytes(token): renewed for token, renewed in rows.fetchall()}
            kept |= {token for token, renewed in found.items() if renewed}
            claims = [claim for claim in claims if found.get(claim[1]) is False]
            if not claims:
                return kept
        # Locked for long: by a COMMIT of the application's. Nobody takes over meanwhile.
        return kept | {token for _, token, _ in claims}


class _SQLite:
    """The statements as SQLite takes them, on the standard library's sqlite3."""

    RELEASE = _RELEASE.format(digest=":digest", token=":token")
    HOLD = _HOLD.format(digest=":digest", token=":token")
    FORGET = _FORGET.format(digest=":digest", token=":token")
    STEP = _STEP.format(digest=":digest", token=":token", name=":name")
    COMPLETE = _LITE_COMPLETE
    PURGE = _LITE_PURGE
    LOOKUP = _LITE_LOOKUP

    def runner(self, connection: Any) -> _Run:
        run: _Run = connection.execute
        return run

    straight = runner

    def claim(self, run: _Run, claim: Claim) -> Claimed | Record:
        for _ in range(_LOOKS):
            row = run(_LITE_LOOKUP, {"digest": claim.digest}).fetchone()
            if row is not None:
                return _own_or_record(_record(tuple(row)), claim)
            if run(_LITE_INSERT, _claim_params(claim)).rowcount == 1:
                return Claimed(attempt=1)
        raise StoreError(f"no stable answer to a claim after {_LOOKS} looks")

    def ready(self, driver: Any, isolation_level: str | None, seconds: float) -> None:
        """Wait so long for the lock. Every transaction of SQLite's is serializable, which is
        what any level asks for at the most."""
        # What an application writes after a rollback of its own must not commit itself.
        driver.isolation_level = "IMMEDIATE"
        driver.execute(f"PRAGMA busy_timeout = {round(seconds * 1000)}")

    def refuse_commit(self, driver: Any, refuse: Callable[[], NoReturn]) -> None:
        """sqlite3's own commit() can't be kept from; a claim that it commits is held."""

    def allow_commit(self, driver: Any) -> None:
        pass

    def at_rest(self, driver: Any) -> bool:
        return True

    def reset(self, driver: Any) -> None:
        """There is nothing that would undo PRAGMAs and ATTACH."""

    def see(self, driver: Any) -> None:
        """Nothing hides it."""

    def commit_and_reset(self, driver: Any) -> bool:
        driver.commit()
        return True

    def over(self, run: _Run, digest: bytes) -> bool:
        return True  # there is no server on which it could go on

    def enter(self, driver: Any, claim: Claim, wait: float) -> Claimed | Record | None:
        """Within a transaction: claim the key or fetch its row. SQLite has one writer at a
        time: the wait for it, when the transaction began, was the wait for the key."""
        run = self.runner(driver)
        row = run(_LITE_LOOKUP, {"digest": claim.digest}).fetchone()
        if row is not None:
            return _record(tuple(row))
        run(_LITE_INSERT, _claim_params(claim))
        return Claimed(attempt=1)

    def take_over(self, run: _Run, claim: Claim, seen: Record) -> Claimed | None:
        params = _claim_params(claim) | _seen_params(seen)
        if run(_LITE_TAKE_OVER, params).rowcount != 1:
            return None
        row = run(_LITE_LOOKUP, {"digest": claim.digest}).fetchone()
        mine = None if row is None else _own_or_record(_record(tuple(row)), claim)
        return mine if isinstance(mine, Claimed) else None

    def step(self, run: _Run, params: Mapping[str, Any]) -> Any:
        """What is to be run is to be recorded: a handler that has the write lock itself, with
        what it has not committed, must hear of it before it calls anybody."""
        row = run(self.STEP, params).fetchone()
        if row is not None and row[0] is None:
            with immediately(run):
                row = run(self.STEP, params).fetchone()
        return row

    def record_step(self, run: _Run, params: Mapping[str, Any]) -> bool:
        return run(_LITE_RECORD_STEP, params).rowcount == 1

    def renew(self, run: _Run, claims: list[tuple[bytes, bytes, float]]) -> set[bytes]:
        kept = set()
        with immediately(run):
            for digest, token, lease in claims:
                params = {"digest": digest, "token": token, "lease": lease}
                if run(_LITE_RENEW, params).rowcount == 1:
                    kept.add(token)
        return kept


@contextmanager
def immediately(run: _Run) -> Iterator[None]:
    """Several statements of SQLite's as one transaction, which has the write lock from its
    beginning."""
    run("BEGIN IMMEDIATE", {})
    try:
        yield
        run("COMMIT", {})
    except BaseException:
        run("ROLLBACK", {})
        raise


class SQLStore:
    """Records in PostgreSQL (psycopg 3) or SQLite (WAL).

    :param database: a URL (``"postgresql+psycopg://localhost/shop"``,
        ``"sqlite:///shop.db"``), or an :class:`sqlalchemy.Engine` of the application's.
    :param create: create the tables on first use when there are none. The default does
        so on SQLite, and leaves PostgreSQL to ``wsgi-idempotency upgrade``.
    :param timeout: seconds a call waits at most for a connection to open, for one to
        come free from the pool, for the answer to a statement, and on SQLite for a lock
        (``busy_timeout``). With an Engine the store has a pool of its own, with the
        settings of the Engine's: give it a
        ``pool_timeout`` and its connections a ``connect_timeout``, ``statement_timeout``
        and ``tcp_user_timeout``.
    :param pool_size: connections a process keeps at most. A connection is held for one
        statement, never while the application runs.
    :param prepare: use server-side prepared statements. Switch off behind a PgBouncer in
        transaction mode that is older than 1.21 or has no ``max_prepared_statements``: it
        doesn't carry them over, and requests are refused with 503.
    :param max_transactions: requests in transaction mode that a process serves at most at
        once; each has a connection of its own, besides ``pool_size``, while the application
        runs. One more waits for ``timeout`` and is then refused. With an Engine its own
        pool settings count.
    :raises ConfigurationError: the URL is not one of PostgreSQL or SQLite, or its driver
        is missing; the message says what would be right.

    Nothing is connected before the first call, and every process makes its own
    connections: those inherited over a fork are set aside, neither used nor closed.
    """

    def __init__(
        self,
        database: str | URL | Engine,
        *,
        create: bool | None = None,
        timeout: float = 5.0,  # seconds
        pool_size: int = 5,  # connections
        prepare: bool = True,
        max_transactions: int = 20,  # connections
    ) -> None:
        if isinstance(database, Engine):
            self.url = _usable(database)
            self._given: Engine | None = database
        else:
            self.url = database_url(database)
            self._given = None
        if not isinstance(timeout, (int, float)) or not timeout > 0:
            raise ConfigurationError(f"timeout is {timeout!r}; use seconds greater than 0")
        if not isinstance(pool_size, int) or pool_size < 1:
            raise ConfigurationError(f"pool_size is {pool_size!r}; use at least 1 connection")
        if not isinstance(max_transactions, int) or max_transactions < 1:
            raise ConfigurationError(f"max_transactions is {max_transactions!r}; use at least 1")
        if not isinstance(prepare, bool):  # a text would be True, whatever it says
            raise ConfigurationError(f"prepare is {prepare!r}; use True or False")
        self._postgresql = self.url.get_backend_name() == "postgresql"
        self._sql: _PostgreSQL | _SQLite = _PostgreSQL(prepare) if self._postgresql else _SQLite()
        self._create = not self._postgresql if create is None else create
        self._timeout = timeout
        self._pool_size = pool_size
        self._prepare = prepare
        self._max_transactions = max_transactions
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._transactions: Engine | None = None
        self._verified = False  # this process has seen a schema that will do
        _stores.add(self)

    @property
    def claims_asynchronously(self) -> bool:
        """See :class:`~wsgi_idempotency.stores.base.AsynchronousStore`."""
        return self._postgresql

    def __repr__(self) -> str:
        return f"SQLStore({shown(self.url)!r})"

    @property
    def engine(self) -> Engine:
        """The engine of this process, made when it is first needed."""
        forks.notice()
        with self._lock:
            if self._engine is None:
                if self._given is None:
                    engine = self._make_engine(
                        isolation_level="AUTOCOMMIT",
                        pool_size=self._pool_size,
                        max_overflow=0,
                        pool_reset_on_return=None,  # autocommit leaves nothing to roll back
                    )
                else:
                    engine = _with_own_pool(self._given)
                if not self._postgresql:
                    event.listen(engine, "connect", _cascade)
                if self._given is not None:
                    engine = engine.execution_options(isolation_level="AUTOCOMMIT")
                self._engine = engine
            return self._engine

    @property
    def transactions(self) -> Engine:
        """The engine of transaction mode, made when it is first needed: applications hold
        its connections for as long as they run, and :attr:`engine` must not run dry."""
        forks.notice()
        with self._lock:
            if self._transactions is None:
                self._transactions = self._make_transactions()
            return self._transactions

    # ------------------------------------------------------------------ the contract

    def claim(self, claim: Claim) -> Claimed | Record:
        return self._call(lambda run: self._sql.claim(run, claim), again=False)

    def take_over(self, claim: Claim, seen: Record) -> Claimed | None:
        return self._call(lambda run: self._sql.take_over(run, claim, seen), again=False)

    def lookup(self, digest: bytes) -> Record | None:
        row = self._call(lambda run: run(self._sql.LOOKUP, {"digest": digest}).fetchone())
        return None if row is None else _record(tuple(row))

    def complete(self, digest: bytes, token: bytes, completion: Completion) -> bool:
        return self._one(self._sql.COMPLETE, completion_params(digest, token, completion))

    def release(self, digest: bytes, token: bytes) -> bool:
        return self._one(self._sql.RELEASE, {"digest": digest, "token": token})

    def forget(self, digest: bytes, token: bytes) -> bool:
        return self._one(self._sql.FORGET, {"digest": digest, "token": token})

    def hold(self, digest: bytes, token: bytes) -> bool:
        return self._one(self._sql.HOLD, {"digest": digest, "token": token})

    def renew(self, claims: Iterable[tuple[bytes, bytes, float]]) -> set[bytes]:
        claims = list(claims)
        if not claims:
            return set()
        return self._call(lambda run: self._sql.renew(run, claims))

    def purge(self, limit: int, *, older_than: float = 0.0) -> int:
        """As :meth:`Store.purge <wsgi_idempotency.stores.base.Store.purge>`.

        :param older_than: seconds that a row is kept after it has expired.
        """
        if limit < 1:
            raise ValueError(f"limit is {limit!r}; use at least 1 row")
        if not older_than >= 0:
            raise ValueError(f"older_than is {older_than!r}; use seconds, from 0")
        params = {"limit": limit, "older_than": float(older_than)}
        return self._call(lambda run: run(self._sql.PURGE, params).rowcount)

    def check(self) -> None:
        self._verify_schema()

    def close(self) -> None:
        with self._lock:
            engines = self._engine, self._transactions
            self._engine = self._transactions = None
            for engine in engines:
                if engine is not None:
                    engine.dispose()
                    # A request that has the engine already may still take from its new pool,
                    # which is to close that when it comes back.
                    engine.pool.dispose()

    # ------------------------------------------------------------------ steps

    def step(self, digest: bytes, token: bytes, name: str) -> Step | None:
        params = {"digest": digest, "token": token, "name": name}
        row = self._call(lambda run: self._sql.step(run, params))
        return None if row is None else Step(result=row[0])

    def record_step(self, digest: bytes, token: bytes, name: str, result: str) -> bool:
        params = {"digest": digest, "token": token, "name": name, "result": result}
        return self._call(lambda run: self._sql.record_step(run, params))

    def guard(self, target: Any, claim: Claim, siblings: Sequence[GuardProtocol] = ()) -> Guard:
        from wsgi_idempotency.stores.guards import Guard

        return Guard(self, claim, target, siblings)

    # ------------------------------------------------------------------ transactions

    def begin(
        self, claim: Claim, *, isolation_level: str | None = None, wait: float = 0.0
    ) -> SQLTransaction | None:
        from wsgi_idempotency.stores.transactions import ConnectionLost, SQLTransaction

        if not self._verified:
            self._verify_schema()
        deadline = time.monotonic() + wait
        lost = False
        for _ in range(_LOOKS):
            engine = self.transactions
            pool = engine.pool
            connection = self._connect(engine, isolation_level, wait)
            transaction = SQLTransaction(self, connection, claim)
            try:
                entered = _entered(transaction, max(0.0, deadline - time.monotonic()))
                return transaction if entered else None
            except TransactionConflict:
                continue  # its snapshot was older than the row in its way
            except ConnectionLost as exc:
                # One that was pooled may have died since, as in _attempt.
                if lost or _timed_out(exc.__cause__):
                    raise
                lost = True
                self._replace(engine, pool)
            except TransactionFailed as exc:
                raise StoreUnavailable(str(exc)) from exc
        raise StoreError(f"no stable answer to a claim after {_LOOKS} looks")

    def _connect(self, engine: Engine, isolation_level: str | None, wait: float) -> Connection:
        try:
            connection = engine.connect()
        except (SQLAlchemyError, self._driver_error) as exc:
            raise self._unreachable(exc) from exc
        driver = connection.connection.driver_connection
        self._sql.ready(driver, isolation_level, max(wait, self._timeout))
        return connection

    def _transaction_over(self, digest: bytes) -> bool:
        """Whether no transaction has the key's lock any more."""
        return self._call(lambda run: self._sql.over(run, digest))

    # ------------------------------------------------------------------ connections

    def _one(self, statement: str, params: Mapping[str, Any]) -> bool:
        return self._call(lambda run: run(statement, params).rowcount == 1)

    def _call(self, work: Callable[[_Run], _T], *, again: bool = True) -> _T:
        if not self._verified:
            self._verify_schema()
        return self._attempt(work, again=again)

    def _attempt(self, work: Callable[[_Run], _T], *, again: bool = True) -> _T:
        """Run ``work`` on a connection of the pool, with the errors of the contract.

        A pooled connection may have died since it was last used (the server was
        restarted). Nobody asks it beforehand; the work, which every method of the
        contract may repeat, is done again on a new connection, once. Not after a
        time-out: the server is there and does not answer.

        :param again: False where the caller has to know of it.
        """
        try:
            return self._once(work)
        except _Disconnected as exc:
            if not again:
                raise Disconnected(f"the connection to {self!r} was lost: {exc}") from exc
            logger.info("a pooled connection to %r was dead; trying a new one", self)
        try:
            return self._once(work)
        except (_Disconnected, StoreUnavailable) as exc:
            raise AnswerLost(f"the connection to {self!r} was lost: {exc}") from exc

    def _once(self, work: Callable[[_Run], _T]) -> _T:
        engine = self.engine
        pool = engine.pool
        connection, driver, give_back = self._checkout(engine, pool)
        # Unless it is known to be: a greenlet may be killed or a thread interrupted in the middle
        # of a round trip, and then what the connection would answer next is not known.
        sound = False
        try:
            answer = work(self._sql.straight(driver))
            sound = True
            return answer
        except self._driver_error as exc:
            # One that is still waiting for an answer would refuse all that comes after.
            if self._is_disconnect(exc, driver) or not self._sql.at_rest(driver):
                connection.invalidate(exc)
                self._replace(engine, pool)
                if _timed_out(exc):
                    raise AnswerLost(f"{self!r} gave {_first_line(exc)}") from exc
                raise _Disconnected(_first_line(exc)) from exc
            sound = True
            raise self._translate(exc) from exc
        except StoreError:
            sound = True
            raise
        except (OverflowError, UnicodeEncodeError) as exc:
            sound = True
            raise NotStorable(f"{self!r} refused: {_first_line(exc)}") from exc
        finally:
            if not sound:
                connection.invalidate()
            give_back()

    def _checkout(
        self, engine: Engine, pool: Pool
    ) -> tuple[Connection | Lent, Any, Callable[[], None]]:
        """A connection, the driver's, and how to give it back."""
        try:
            if self._given is None:
                lent = cast("StatementPool", pool).take()
                return lent, lent.driver, lent.give_back
            # SQLAlchemy switches the connection to autocommit, and back again when it is
            # returned: attributes of the drivers, not round trips.
            connection = engine.connect()
            return connection, connection.connection.driver_connection, connection.close
        except (SQLAlchemyError, self._driver_error) as exc:
            raise self._unreachable(exc) from exc

    def _replace(self, engine: Engine, pool: Pool) -> None:
        """Close the other connections of a pool of which one has turned out to be dead: they
        were opened to the same server. Many find that out at once; the pool that the first of
        them puts in its place is not to be disposed of for it."""
        with self._lock:
            if engine.pool is pool:
                engine.dispose()

    def _unreachable(self, exc: Exception) -> StoreUnavailable:
        reason = exc.orig if isinstance(exc, DBAPIError) else exc
        return StoreUnavailable(f"{self!r} can't be reached: {_first_line(reason)}")

    @property
    def _driver_error(self) -> type[Exception]:
        error: type[Exception] = self.engine.dialect.loaded_dbapi.Error
        return error

    def _is_disconnect(self, exc: Exception, driver: Any) -> bool:
        return self.engine.dialect.is_disconnect(exc, driver, None)  # type: ignore[arg-type]

    def _translate(self, exc: Exception) -> StoreError:
        if sqlstate_of(exc) in _NO_SCHEMA or str(exc).startswith(
            ("no such table", "no such column")
        ):
            self._verified = False
            return SchemaError(self._upgrade_hint("The schema is missing or old"))
        sqlstate = sqlstate_of(exc) or "no SQLSTATE"
        said = f"{self!r} refused: {_first_line(exc)} ({sqlstate})"
        if sqlstate in _NOT_PREPARED:
            return StoreUnavailable(
                f"{said}. Is there a PgBouncer in transaction mode without"
                " max_prepared_statements? Then use SQLStore(url, prepare=False)"
            )
        if isinstance(exc, self.engine.dialect.loaded_dbapi.DataError) or _too_big(exc):
            return NotStorable(said)
        return StoreUnavailable(said)

    def _make_engine(self, **options: Any) -> Engine:
        if not self._postgresql:
            engine = self._engine_with(connect_args={"timeout": self._timeout}, **options)
            event.listen(engine, "connect", self._set_up_sqlite)
            return engine
        defaults: dict[str, Any] = {
            "connect_timeout": max(2, round(self._timeout)),  # seconds; 2 is libpq's least
            "tcp_user_timeout": round(self._timeout * 1000),  # milliseconds
        }
        if not self._prepare:
            defaults["prepare_threshold"] = None
        engine = self._engine_with(
            use_native_hstore=False,  # it would look the type up on every connection
            pool_use_lifo=True,  # lets idle connections beyond the need go quiet
            connect_args={k: v for k, v in defaults.items() if k not in self.url.query},
            **options,
        )
        event.listen(engine, "do_connect", self._connect_bounded)
        event.listen(engine, "connect", _name_by_content)
        return engine

    def _engine_with(self, **options: Any) -> Engine:
        return create_engine(
            self.url, poolclass=StatementPool, pool_timeout=self._timeout, **options
        )

    def _make_transactions(self) -> Engine:
        from wsgi_idempotency.stores.transactions import watch

        if self._given is None:
            kept = min(self._pool_size, self._max_transactions)
            engine = self._make_engine(pool_size=kept, max_overflow=self._max_transactions - kept)
        else:
            engine = _with_own_pool(self._given)
        watch(engine, begin_immediate=not self._postgresql)
        return engine

    def _connect_bounded(
        self, dialect: object, record: object, args: list[Any], params: dict[str, Any]
    ) -> DBAPIConnection:
        from wsgi_idempotency.stores.psycopg3 import BoundedConnection

        connection = BoundedConnection.connect(*args, **params)
        connection.seconds = self._timeout
        return cast("DBAPIConnection", connection)

    def _set_up_sqlite(self, connection: DBAPIConnection, record: object) -> None:
        """WAL lets replays read while a claim writes; FULL makes each commit survive a
        power cut (SQLite, "Write-Ahead Logging", section 2.2)."""
        deadline = time.monotonic() + self._timeout
        cursor = connection.cursor()
        while True:
            try:
                cursor.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError as exc:
                # Several processes that switch a new file to WAL at once are told
                # "database is locked" without the busy timeout being honoured.
                if "locked" not in str(exc) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.close()

    def _after_fork(self) -> None:
        for engine in (self._engine, self._transactions):
            if engine is not None:
                # Closing them would say goodbye on the parent's connection (PostgreSQL) or
                # run a checkpoint (SQLite, "How To Corrupt An SQLite Database File", 2.6).
                _inherited.append(engine.pool)
                engine.dispose(close=False)
        self._engine = self._transactions = None
        self._lock = threading.Lock()  # a thread of the parent's may have held the old one

    # ------------------------------------------------------------------ schema

    def _verify_schema(self) -> None:
        """Once a process: is the schema there, and new enough?

        :raises SchemaError: it is missing or old; the message names the command to run.
        """
        found = self._version()
        if found is None and self._create:
            self._create_schema()
            found = self._version()
        if found is None:
            raise SchemaError(self._upgrade_hint("The schema is missing"))
        if not found.isdigit():
            raise SchemaError(f"{VERSION_TABLE} of {self!r} has {found!r}, not a revision of ours")
        if int(found) < int(SCHEMA_REVISION):
            problem = f"The schema is at {found}, this release needs {SCHEMA_REVISION}"
            raise SchemaError(self._upgrade_hint(problem))
        self._verified = True

    def _version(self) -> str | None:
        try:
            row = self._attempt(lambda run: run(_VERSION, {}).fetchone())
        except SchemaError:
            return None
        return None if row is None else str(row[0])

    def _create_schema(self) -> None:
        try:
            with self.engine.connect() as connection:
                # Two processes at once: the second waits here and then finds them made.
                connection.exec_driver_sql("BEGIN IMMEDIATE" if not self._postgresql else "BEGIN")
                try:
                    metadata.create_all(connection)
                    version_table.create(connection, checkfirst=True)
                    if connection.execute(sqlalchemy.select(version_table)).first() is None:
                        connection.execute(
                            version_table.insert().values(version_num=SCHEMA_REVISION)
                        )
                except BaseException:
                    connection.exec_driver_sql("ROLLBACK")
                    raise
                connection.exec_driver_sql("COMMIT")
        except SQLAlchemyError as exc:
            problem = f"the tables can't be created in {self!r}: {_first_line(exc)}"
            raise StoreUnavailable(problem) from exc

    def _upgrade_hint(self, problem: str) -> str:
        url = shown(self.url)
        return f"{problem} in {url}. Run: wsgi-idempotency upgrade --database {url}"


def _entered(transaction: SQLTransaction, wait: float) -> bool:
    """Begin, or leave nothing behind."""
    entered = False
    try:
        entered = transaction.enter(wait)
    finally:
        if not entered:
            transaction.rollback()
    return entered


def _with_own_pool(engine: Engine) -> Engine:
    """An engine as the application's, with connections of its own.

    With the application's, handlers that hold them all would keep the heartbeat from
    renewing their own claims, and a broken one of ours would cost it its whole pool.
    """
    own = Engine(engine.pool.recreate(), engine.dialect, engine.url)
    postgresql = engine.dialect.name == "postgresql"
    event.listen(own, "connect", _name_by_content if postgresql else _commit_when_told)
    return own


def _name_by_content(connection: Any, record: object) -> None:
    from wsgi_idempotency.stores.psycopg3 import name_by_content

    name_by_content(connection)


def _commit_when_told(connection: Any, record: object) -> None:
    """With sqlite3's ``autocommit=True`` commit() and rollback() do nothing, and with False BEGIN
    fails and a single statement is not committed."""
    with suppress(AttributeError):  # before Python 3.12
        connection.autocommit = -1  # sqlite3.LEGACY_TRANSACTION_CONTROL
    connection.commit()  # and so end what False has begun


def _cascade(connection: Any, record: object) -> None:
    """Let the steps of a row go with it, which SQLite does on connections that ask for it
    (SQLite, "SQLite Foreign Key Support", section 2). The application's own, in transaction
    mode, may rely on its not doing so, and no row goes there."""
    connection.execute("PRAGMA foreign_keys = ON")


def _usable(engine: Engine) -> URL:
    """:raises ConfigurationError: the engine's driver or pool is not one that can serve."""
    driver = (engine.dialect.name, engine.driver)
    # The asynchronous dialect of psycopg 3 goes by the same name.
    if engine.dialect.is_async or driver not in (("postgresql", "psycopg"), ("sqlite", "pysqlite")):
        raise ConfigurationError(
            f"the engine is for {engine.url.drivername}; use one for postgresql+psycopg://"
            " (psycopg 3) or sqlite:///"
        )
    if isinstance(engine.pool, StaticPool):
        raise ConfigurationError(
            "the engine has one connection for all, whose transactions would be the"
            " application's and ours at once; use another pool"
        )
    return database_url(engine.url.set(drivername=f"{engine.dialect.name}+{engine.driver}"))


def shown(url: URL) -> str:
    """A URL as it may stand in a log: without a password, wherever it has one."""
    secrets = {name: "***" for name in url.query if "pass" in name.lower()}
    return url.update_query_dict(secrets).render_as_string(hide_password=True)


class _Disconnected(Exception):
    """Raised when the connection turned out to be dead; its cause is the driver's error."""


def database_url(database: str | URL) -> URL:
    """The URL of a database this package can use, with its driver named.

    :param database: ``postgresql://``, ``postgres://`` or ``postgresql+psycopg://``;
        ``sqlite:///file``.
    :raises ConfigurationError: it is something else, or its driver is not installed.
    """
    try:
        url = make_url(database)
    except (ArgumentError, ValueError) as exc:  # the latter for a port that is no number
        raise ConfigurationError(
            "the database is not a URL; use one like postgresql+psycopg://user@host/name"
            " or sqlite:///file.db"
        ) from exc
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername == "postgresql+psycopg":
        if importlib.util.find_spec("psycopg") is None:
            raise ConfigurationError(
                "PostgreSQL needs psycopg 3: pip install 'wsgi-idempotency[postgresql]'"
            )
        return url
    if url.drivername in ("sqlite", "sqlite+pysqlite"):
        name = url.database or ":memory:"
        in_memory = ":memory:" in name or "mode=memory" in name
        if in_memory or url.query.get("mode") == "memory":
            raise ConfigurationError(
                "an in-memory SQLite database is another one for each connection;"
                ' use "memory:" for one process, or sqlite:///file.db'
            )
        return url
    raise ConfigurationError(
        f"{url.drivername} is not supported; use postgresql+psycopg:// or sqlite:///"
    )


# SQLSTATEs (PostgreSQL documentation, appendix A): serialization_failure, deadlock_detected.
SERIALIZATION = frozenset({"40001", "40P01"})
# undefined_table, undefined_column, invalid_schema_name.
_NO_SCHEMA = frozenset({"42P01", "42703", "3F000"})

# invalid_sql_statement_name, duplicate_prepared_statement.
_NOT_PREPARED = frozenset({"26000", "42P05"})


def _too_big(exc: Exception) -> bool:
    """Whether PostgreSQL has no room for a value: program_limit_exceeded, or an internal error
    of its allocator's, whose text is never translated. Other internal errors say nothing of
    the value."""
    sqlstate = sqlstate_of(exc)
    alloc = sqlstate == "XX000" and str(exc).startswith("invalid memory alloc request size")
    return sqlstate == "54000" or alloc


def _timed_out(exc: BaseException | None) -> bool:
    # By name: the class is in a module that needs psycopg.
    return type(exc).__name__ == "TimedOut"


def sqlstate_of(exc: BaseException) -> str | None:
    return getattr(exc, "sqlstate", None)


def _first_line(exc: BaseException | None) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0]


def _claim_params(claim: Claim) -> dict[str, Any]:
    return {
        "digest": claim.digest,
        "token": claim.token,
        "fingerprint": claim.fingerprint,
        "fingerprint_version": claim.fingerprint_version,
        "lease": float(claim.lease),
        "retention": float(claim.retention),
        "lapse": claim.lapse.value,
        "scope": _storable(claim.scope),
        "key": _storable(claim.key),
        "method": _storable(claim.method),
        "path": _storable(claim.path),
    }


def _seen_params(seen: Record) -> dict[str, Any]:
    return {"seen": seen.token, "effects": seen.effects}


def completion_params(digest: bytes, token: bytes, completion: Completion) -> dict[str, Any]:
    return {
        "digest": digest,
        "token": token,
        "reason": completion.not_replayable,
        **response_params(completion),
    }


_as_json = json.JSONEncoder(separators=(",", ":")).encode


def response_params(completion: Completion) -> dict[str, Any]:
    return {
        "status": _storable(completion.status),
        "headers": _as_json(completion.headers),
        "body": completion.body,
    }


def _lock_of(digest: bytes) -> int:
    """The advisory lock of a key: 64 bits of its digest, as a bigint."""
    return int.from_bytes(digest[:8], "big", signed=True)


@cache
def _psycopg3() -> ModuleType:
    """Imported with the first statement, and not by a process that has SQLite."""
    from wsgi_idempotency.stores import psycopg3

    return psycopg3


@cache
def _cursors() -> Callable[[Any], Any]:
    """Makes psycopg's own cursors on any connection: an application's engine may have set
    other factories on its. Found once, and not before a PostgreSQL store is used."""
    from psycopg import Cursor
    from psycopg.rows import tuple_row

    return partial(Cursor, row_factory=tuple_row)


def _one_trip(driver: Any) -> AbstractContextManager[object]:
    """Send what is asked within in one round trip, where libpq (14) can."""
    from psycopg import Pipeline

    return driver.pipeline() if Pipeline.is_supported() else nullcontext()


def _storable(text: str) -> str:
    """Text a database takes: PostgreSQL has no NUL in text, and UTF-8 no lone surrogate."""
    if text.isascii() and "\0" not in text:
        return text
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def _own_or_record(record: Record, claim: Claim) -> Claimed | Record:
    """A row with the caller's own token is a claim whose answer was lost on the way."""
    if record.token == claim.token and record.state is State.CLAIMED:
        return Claimed(attempt=record.attempt, effects=record.effects)
    return record


_STATUS_LINE = re.compile(r"[0-9]{3}( |\Z)")


# By their texts: to call an enumeration costs ten times as much.
_STATES = {state.value: state for state in State}
_LAPSES = {lapse.value: lapse for lapse in Lapse}


def _record(row: tuple[Any, ...]) -> Record:
    (
        digest, token, state, fingerprint, version, attempt, lapse, lapsed, past_retention,
        age, lease_left, effects, status, headers, body, not_replayable,
    ) = row  # fmt: skip
    try:
        state = _STATES[state]
        response: _Response = None, (), None, None
        if state is State.COMPLETED:
            response = _response(bytes(digest), status, headers, body, not_replayable)
        return Record(
            bytes(digest), bytes(token), state, bytes(fingerprint), int(version), int(attempt),
            _LAPSES[lapse], bool(lapsed), bool(past_retention), float(age), float(lease_left),
            bool(effects), *response,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as exc:
        raise CorruptRecord(f"the row of digest {digest!r} makes no sense: {exc}") from exc


_Response = tuple[str | None, tuple[tuple[str, str], ...], bytes | None, str | None]


def _response(
    digest: bytes, status: Any, headers: Any, body: Any, not_replayable: Any
) -> _Response:
    """What was stored of the response. An operation whose response can't be read back is
    still done: it must not run again."""
    try:
        pairs = tuple([(name, value) for name, value in json.loads(headers)])
        for name, value in pairs:
            if not (isinstance(name, str) and isinstance(value, str)):
                raise ValueError("a header is not text")
        if not _STATUS_LINE.match(status):
            raise ValueError("the status line has no status")
        if body is None and not isinstance(not_replayable, str):
            raise ValueError("there is neither a body nor a reason for having none")
        if body is not None and not isinstance(body, (bytes, memoryview)):
            raise ValueError("the body is not bytes")
    except (TypeError, ValueError, RecursionError) as exc:
        logger.error(
            "the stored response of digest %s can't be read (%s): the operation counts as done,"
            " and its retries are refused",
            digest.hex(), exc,
        )  # fmt: skip
        return None, (), None, "the stored response is corrupt"
    return status, pairs, None if body is None else bytes(body), not_replayable


_stores: weakref.WeakSet[SQLStore] = weakref.WeakSet()
_inherited: list[object] = []


def _after_fork_in_child() -> None:
    for store in list(_stores):
        store._after_fork()


forks.in_child(_after_fork_in_child)
