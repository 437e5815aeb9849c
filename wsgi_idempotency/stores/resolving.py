"""What an operator's programs ask of PostgreSQL or SQLite: operations of unknown outcome
found, looked at, and resolved. A serving process sends none of these statements.

They come on top of :class:`~wsgi_idempotency.SQLStore` and run as its own do, one by one in
autocommit. Nothing is indexed for them, since every index on a column that a claim or a
completion changes would cost each operation its heap-only update: what isn't asked for by
the digest reads the table once.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wsgi_idempotency.errors import CorruptRecord, NotResolvable, NotStorable
from wsgi_idempotency.headers import replayable, unsendable
from wsgi_idempotency.protocol import NEVER_AN_OUTCOME, OF_ONE_RANGE
from wsgi_idempotency.records import Completion, Lapse, State, StoredResponse
from wsgi_idempotency.stores.sql import (
    _LITE_NOW,
    SERIALIZATION,
    SQLStore,
    _Run,
    _storable,
    immediately,
    response_params,
    sqlstate_of,
)

#: The largest body that a resolution records unless it is told otherwise, in bytes; as a
#: policy's ``max_response_bytes``.
MAX_RESPONSE_BYTES = 4 * 1024 * 1024


class Resolution(enum.Enum):
    """What becomes of an operation whose outcome somebody has found out."""

    FORGET = "forget"
    RELEASE = "release"
    COMPLETE = "complete"


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """An operation as a person or a verdict needs it, less its response's headers and body.

    Moments are seconds since 1970-01-01 UTC, and all times are the database's clock's.

    :param digest: 32 bytes that name the key in its namespace.
    :param token: the fencing token of whoever claimed last.
    :param state: as it is stored.
    :param lapse: what it means when a claim's lease runs out.
    :param lapsed: the lease of a claimed row has run out.
    :param past_retention: ``expires_at`` has passed.
    :param attempt: how many times the handler has been started.
    :param scope: whose key it is, as the table has it; of credentials only a digest.
    :param key: the idempotency key, as the table has it.
    :param method: the request method.
    :param path: the full path.
    :param age: seconds since the operation was first claimed.
    :param lease_left: seconds until the lease runs out, or until a held row is looked at
        again; negative once that is past.
    :param created_at: when it was first claimed.
    :param lease_until: when the lease runs out.
    :param expires_at: when a row that is neither in flight nor held counts as absent.
    :param completed_at: when it was completed, or None.
    :param status: the status line of a completed operation, or None.
    :param body_bytes: the size of its stored body, or None.
    :param not_replayable: why it has none, or None.
    :param effects: the application has committed what it wrote under a guard: the operation is
        done, whether or not its response is recorded.
    """

    digest: bytes
    token: bytes = field(repr=False)
    state: State
    lapse: Lapse
    lapsed: bool
    past_retention: bool
    attempt: int
    scope: str
    key: str
    method: str
    path: str
    age: float
    lease_left: float
    created_at: float
    lease_until: float
    expires_at: float
    completed_at: float | None
    status: str | None
    body_bytes: int | None
    not_replayable: str | None
    effects: bool = False

    @property
    def held(self) -> bool:
        """Whether retries are told OUTCOME_UNKNOWN: held, or lapsed where a lapse holds."""
        lapsed = self.lapsed and self.lapse is Lapse.HOLD and not self.effects
        return self.state is State.HELD or lapsed


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What was decided about an operation.

    :param resolved_at: when, in seconds since 1970-01-01 UTC on the database's clock.
    :param actor: who decided: a person, or a reconciler with its host.
    :param reason: why.
    :param action: what became of it.
    :param attempt: how many times the handler had been started.
    :param status: the status line of the response that is replayed since, or None.
    """

    resolved_at: float
    actor: str
    reason: str
    action: Resolution
    digest: bytes
    scope: str
    key: str
    method: str
    path: str
    attempt: int
    status: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedStep:
    """A step of an operation that has been recorded, less its result.

    :param name: as the handler has it.
    :param attempt: which attempt ran it.
    :param created_at: when it was recorded, in seconds since 1970-01-01 UTC on the database's
        clock.
    """

    name: str
    attempt: int
    created_at: float


# ---------------------------------------------------------------------- both

_STEPS = """
    SELECT step.name, step.attempt, {created_at}
    FROM idempotency_steps AS step JOIN idempotency_keys AS operation
      ON operation.key_digest = step.key_digest AND operation.created_at = step.operation_at
    WHERE step.key_digest = {digest} ORDER BY step.created_at, {then}"""

_COPIED = "key_digest, scope, idempotency_key, method, path, attempt"

# The row's new token is the resolution's id: whoever held the claim is fenced off, and
# asking again after a lost answer finds the resolution it has made itself.
_AUDIT = f"""
INSERT INTO idempotency_resolutions (
    {_COPIED}, id, resolved_at, actor, reason, action, response_status)
SELECT
    {_COPIED}, {{id}}, {{now}}, {{actor}}, {{reason}}, {{action}}, {{status}}
FROM {{source}}"""

# What it takes to be resolved: nobody runs it. A worker whose lease runs out at this moment
# and that renews it comes before or after this statement: the condition is looked at again
# once its row lock is there (READ COMMITTED, PostgreSQL documentation 13.2.1). 'mine' is
# true of the reconciler's own claim, whose lease runs.
_RESOLVABLE = """
    key_digest = {digest} AND claim_token = {seen}
    AND (state IN ('held', 'released')
         OR (state = 'claimed' AND ({mine} OR lease_until <= {now})))"""

# What is done is dropped only by somebody who says that it has been undone: its key would be
# fresh, and the next retry do it again.
_DELETE = """
DELETE FROM idempotency_keys WHERE {resolvable} AND ({undone} OR effects_at IS NULL)"""

# From now on it is remembered for as long as it was to be at first: what was held for longer
# than its retention would otherwise be absent at once, and the next retry would run it.
_RELEASE = """
UPDATE idempotency_keys SET
    state = 'released', claim_token = {id},
    expires_at = {greatest}(expires_at, {now} + (expires_at - created_at))
WHERE {resolvable}"""

_COMPLETE = """
UPDATE idempotency_keys SET
    state = 'completed', claim_token = {id}, completed_at = {now},
    expires_at = {greatest}(expires_at, {now} + (expires_at - created_at)),
    response_status = {status}, response_headers = {headers}, response_body = {body},
    not_replayable = NULL
WHERE {resolvable}"""

# Answered with OUTCOME_UNKNOWN.
_HELD = """(state = 'held'
    OR (state = 'claimed' AND lapse = 'hold' AND lease_until <= {now} AND effects_at IS NULL))"""

# Its worker is gone, or paused. One that counts as absent is nobody's business any more, nor is
# one whose effects are committed: what became of it is known.
_LAPSED = """
    (state = 'claimed' AND lease_until <= {now} AND (lapse = 'hold' OR expires_at > {now})
     AND effects_at IS NULL)"""

# What a reconciler looks at. lease_until of a held row is the moment not to look before.
_DUE = f"""
    lease_until <= {{cutoff}} AND (state = 'held' OR {_LAPSED})"""

# One look at an operation is one reconciler's. What a lapse holds becomes 'held' and keeps
# its worker's token, so that this worker may still complete it. What a lapse releases
# becomes the reconciler's claim, so that no retry runs beside the verdict, and its attempt
# stays what it was: nothing runs. When the reconciler dies, the row lapses or comes due again.
_TAKE_UP = """
UPDATE idempotency_keys SET
    state = CASE WHEN state = 'held' OR lapse = 'hold' THEN 'held' ELSE 'claimed' END,
    claim_token = CASE WHEN state = 'held' OR lapse = 'hold' THEN claim_token ELSE {token} END,
    lease_until = {until}"""

_BACK_OFF = """
UPDATE idempotency_keys SET lease_until = {until}
WHERE key_digest = {digest} AND claim_token = {token} AND state = 'held'"""


def _columns(epoch: str, now: str, size: str) -> str:
    """What :class:`Details` is made of.

    :param epoch: how a moment becomes seconds since 1970.
    :param now: the database's clock.
    :param size: how many bytes a value has.
    """
    moments = ("created_at", "lease_until", "expires_at", "completed_at")
    return f"""
        key_digest, claim_token, state, lapse,
        state = 'claimed' AND lease_until <= {now}, expires_at <= {now}, attempt,
        scope, idempotency_key, method, path, {epoch.format(now)},
        {", ".join(epoch.format(moment) for moment in moments)},
        response_status, {size}(response_body), not_replayable, effects_at IS NOT NULL"""


# ---------------------------------------------------------------------- PostgreSQL

_PG_EPOCH = "extract(epoch FROM {})::float8"
_PG_UNTIL = "now() + make_interval(secs => %(seconds)s)"
_PG_DETAILS = _columns(_PG_EPOCH, "now()", "octet_length")
_PG_CREATED = _PG_EPOCH.format("created_at")
_PG_RESOLVABLE = _RESOLVABLE.format(
    digest="%(digest)s", seen="%(seen)s", mine="%(mine)s", now="now()"
)
_PG_RESOLUTION = {
    action: f"WITH resolved AS (\n{change} RETURNING {_COPIED}\n)"
    + _AUDIT.format(
        id="%(id)s",
        now="now()",
        actor="%(actor)s",
        reason="%(reason)s",
        action="%(action)s",
        status="%(status)s::text",
        source="resolved",
    )
    for action, change in {
        Resolution.FORGET: _DELETE.format(resolvable=_PG_RESOLVABLE, undone="%(undone)s"),
        Resolution.RELEASE: _RELEASE.format(
            id="%(id)s", greatest="greatest", now="now()", resolvable=_PG_RESOLVABLE
        ),
        Resolution.COMPLETE: _COMPLETE.format(
            id="%(id)s",
            greatest="greatest",
            now="now()",
            status="%(status)s",
            headers="%(headers)s",
            body="%(body)s",
            resolvable=_PG_RESOLVABLE,
        ),
    }.items()
}


class _PostgreSQL:
    """The statements as PostgreSQL takes them."""

    # Index: pk_idempotency_keys.
    DETAILS = f"SELECT {_PG_DETAILS} FROM idempotency_keys WHERE key_digest = %(digest)s"

    # No index.
    FIND = f"""
        SELECT {_PG_DETAILS} FROM idempotency_keys
        WHERE idempotency_key = %(key)s AND (%(scope)s::text IS NULL OR scope = %(scope)s)
        ORDER BY {_PG_CREATED}, key_digest LIMIT %(limit)s"""

    # No index. The next page begins behind the last row of this one, wherever rows have gone
    # in between.
    UNRESOLVED = f"""
        SELECT {_PG_DETAILS} FROM idempotency_keys
        WHERE ((%(held)s AND {_HELD.format(now="now()")})
               OR (%(lapsed)s AND {_LAPSED.format(now="now()")}))
          AND ({_PG_CREATED}, key_digest) > (%(created)s, %(digest)s)
        ORDER BY {_PG_CREATED}, key_digest LIMIT %(limit)s"""

    # Index: ix_idempotency_resolutions_key_digest.
    RESOLUTIONS = f"""
        SELECT {_COPIED}, {_PG_EPOCH.format("resolved_at")}, actor, reason, action, response_status
        FROM idempotency_resolutions WHERE key_digest = %(digest)s ORDER BY resolved_at"""

    # Indexes: pk_idempotency_steps, pk_idempotency_keys.
    STEPS = _STEPS.format(
        created_at=_PG_EPOCH.format("step.created_at"), digest="%(digest)s", then="step.name"
    )

    # Index: pk_idempotency_resolutions.
    MINE = "SELECT 1 FROM idempotency_resolutions WHERE id = %(id)s"

    NOW = f"SELECT {_PG_EPOCH.format('now()')}"

    # No index, and no lock: whoever is first to take a row up has it.
    DUE = f"""
        SELECT key_digest FROM idempotency_keys
        WHERE {_DUE.format(cutoff="to_timestamp(%(cutoff)s)", now="now()")}
        ORDER BY lease_until LIMIT %(limit)s"""

    # A row that a worker, a retry or another reconciler has locked is in good hands, and is
    # left to them. Index: pk_idempotency_keys.
    TAKE_UP = f"""
        WITH due (found) AS (
            SELECT key_digest FROM idempotency_keys
            WHERE key_digest = %(digest)s
              AND {_DUE.format(cutoff="to_timestamp(%(cutoff)s)", now="now()")}
            FOR UPDATE SKIP LOCKED
        ) {_TAKE_UP.format(token="%(token)s", until=_PG_UNTIL)}
        FROM due WHERE key_digest = found
        RETURNING {_PG_DETAILS}"""

    BACK_OFF = _BACK_OFF.format(digest="%(digest)s", token="%(token)s", until=_PG_UNTIL)

    def resolve(self, run: _Run, action: Resolution, params: Mapping[str, Any]) -> bool:
        """One statement: the row and its resolution change together or not at all."""
        try:
            return run(_PG_RESOLUTION[action], params).rowcount == 1
        except Exception as exc:
            if sqlstate_of(exc) in SERIALIZATION:
                return False
            raise

    def take_up(self, run: _Run, params: Mapping[str, Any]) -> Any:
        try:
            return run(self.TAKE_UP, params).fetchone()
        except Exception as exc:
            if sqlstate_of(exc) in SERIALIZATION:
                return None
            raise


# ---------------------------------------------------------------------- SQLite

_LITE_DETAILS = _columns("{}", _LITE_NOW, "length")
_LITE_UNTIL = f"{_LITE_NOW} + :seconds"
_LITE_RESOLVABLE = _RESOLVABLE.format(digest=":digest", seen=":seen", mine=":mine", now=_LITE_NOW)
_LITE_AUDIT = _AUDIT.format(
    id=":id",
    now=_LITE_NOW,
    actor=":actor",
    reason=":reason",
    action=":action",
    status=":status",
    source=f"""idempotency_keys WHERE {_LITE_RESOLVABLE}
        AND (:undone OR :action <> 'forget' OR effects_at IS NULL)""",
)
_LITE_CHANGE = {
    Resolution.FORGET: _DELETE.format(resolvable=_LITE_RESOLVABLE, undone=":undone"),
    Resolution.RELEASE: _RELEASE.format(
        id=":id", greatest="max", now=_LITE_NOW, resolvable=_LITE_RESOLVABLE
    ),
    Resolution.COMPLETE: _COMPLETE.format(
        id=":id",
        greatest="max",
        now=_LITE_NOW,
        status=":status",
        headers=":headers",
        body=":body",
        resolvable=_LITE_RESOLVABLE,
    ),
}


class _SQLite:
    """The statements as SQLite takes them. Without RETURNING (SQLite 3.35) and data-changing
    CTEs, several are one transaction, which has the write lock from its beginning."""

    DETAILS = f"SELECT {_LITE_DETAILS} FROM idempotency_keys WHERE key_digest = :digest"

    FIND = f"""
        SELECT {_LITE_DETAILS} FROM idempotency_keys
        WHERE idempotency_key = :key AND (:scope IS NULL OR scope = :scope)
        ORDER BY created_at, key_digest LIMIT :limit"""

    UNRESOLVED = f"""
        SELECT {_LITE_DETAILS} FROM idempotency_keys
        WHERE ((:held AND {_HELD.format(now=_LITE_NOW)})
               OR (:lapsed AND {_LAPSED.format(now=_LITE_NOW)}))
          AND (created_at, key_digest) > (:created, :digest)
        ORDER BY created_at, key_digest LIMIT :limit"""

    RESOLUTIONS = f"""
        SELECT {_COPIED}, resolved_at, actor, reason, action, response_status
        FROM idempotency_resolutions WHERE key_digest = :digest ORDER BY resolved_at"""

    # Its clock has milliseconds, in which several steps may be done.
    STEPS = _STEPS.format(created_at="step.created_at", digest=":digest", then="step.rowid")

    MINE = "SELECT 1 FROM idempotency_resolutions WHERE id = :id"

    NOW = f"SELECT {_LITE_NOW}"

    DUE = f"""
        SELECT key_digest FROM idempotency_keys
        WHERE {_DUE.format(cutoff=":cutoff", now=_LITE_NOW)}
        ORDER BY lease_until LIMIT :limit"""

    TAKE_UP = f"""{_TAKE_UP.format(token=":token", until=_LITE_UNTIL)}
        WHERE key_digest = :digest AND {_DUE.format(cutoff=":cutoff", now=_LITE_NOW)}"""

    BACK_OFF = _BACK_OFF.format(digest=":digest", token=":token", until=_LITE_UNTIL)

    def resolve(self, run: _Run, action: Resolution, params: Mapping[str, Any]) -> bool:
        with immediately(run):
            if run(_LITE_AUDIT, params).rowcount != 1:
                return False
            run(_LITE_CHANGE[action], params)
            return True

    def take_up(self, run: _Run, params: Mapping[str, Any]) -> Any:
        with immediately(run):
            if run(self.TAKE_UP, params).rowcount != 1:
                return None
            return run(self.DETAILS, params).fetchone()


# ---------------------------------------------------------------------- the operator's side


class Resolver:
    """Finds operations of unknown outcome in a database, and resolves them.

    :param store: where they are. Its ``timeout`` bounds each call here too; a large table
        takes longer to read than the 5 s that are enough to serve.
    """

    def __init__(self, store: SQLStore) -> None:
        self.store = store
        self._sql: _PostgreSQL | _SQLite = _PostgreSQL() if store._postgresql else _SQLite()

    def details(self, digest: bytes) -> Details | None:
        """Fetch one operation; None when there is no row.

        :param digest: 32 bytes.
        :raises CorruptRecord: the row makes no sense.
        """
        rows = self._rows(self._sql.DETAILS, {"digest": digest})
        return rows[0] if rows else None

    def find(self, key: str, scope: str | None = None, *, limit: int = 100) -> list[Details]:
        """Find operations by their key, the oldest first. Reads the whole table.

        :param key: as the column ``idempotency_key`` has it.
        :param scope: as the column ``scope`` has it; None for every scope.
        :param limit: rows at most.
        """
        scope = None if scope is None else _storable(scope)
        return self._rows(self._sql.FIND, {"key": _storable(key), "scope": scope, "limit": limit})

    def unresolved(
        self,
        *,
        held: bool = True,
        lapsed: bool = True,
        limit: int = 100,
        after: Details | None = None,
    ) -> list[Details]:
        """Find operations whose outcome nobody knows, the oldest first. Reads the whole table.

        :param held: those whose retries are told OUTCOME_UNKNOWN: held, or lapsed where a
            lapse holds.
        :param lapsed: those whose lease has run out, whatever that means for their retries;
            not those that count as absent.
        :param limit: rows at most; fewer are the last page.
        :param after: the last row of the page before.
        """
        return self._rows(
            self._sql.UNRESOLVED,
            {
                "held": held,
                "lapsed": lapsed,
                "limit": limit,
                "created": float("-inf") if after is None else after.created_at,
                "digest": b"" if after is None else after.digest,
            },
        )

    def resolutions(self, digest: bytes) -> list[Resolved]:
        """What has been decided about an operation, in order; also when its row is gone."""
        rows = self._fetch(self._sql.RESOLUTIONS, {"digest": digest})
        return [_resolved(tuple(row)) for row in rows]

    def steps(self, digest: bytes) -> list[FinishedStep]:
        """The steps an operation has finished, in order."""
        return [
            FinishedStep(name=name, attempt=int(attempt), created_at=float(moment))
            for name, attempt, moment in self._fetch(self._sql.STEPS, {"digest": digest})
        ]

    def resolve(
        self,
        digest: bytes,
        seen: bytes,
        action: Resolution,
        *,
        actor: str,
        reason: str,
        response: StoredResponse | None = None,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
        mine: bool = False,
        undone: bool = False,
    ) -> None:
        """Decide what becomes of an operation that nobody runs, and put it on record.

        A compare-and-swap on the token that was seen. The row gets a new one, so that a
        worker that was only slow changes nothing any more. Row and record change together
        or not at all. A row that is released or completed is remembered from now on for as
        long as it was to be when it was claimed.

        :param digest: 32 bytes that name the operation's row.
        :param seen: the token the row had when it was looked at.
        :param action: FORGET drops the row, and the key is fresh; RELEASE lets the same
            request run again, or where the operation's effects are committed its response be
            rebuilt; COMPLETE replays ``response`` from now on.
        :param actor: who decides, for the record.
        :param reason: why, for the record.
        :param response: what is replayed. Fields that can't be replayed are left out, as
            from a handler's response.
        :param max_response_bytes: a larger body is refused.
        :param mine: the token is the caller's own, and its claim is in flight.
        :param undone: what the operation has committed under a guard has been undone by hand,
            so that FORGET may let it be done again.
        :raises NotResolvable: the operation is in flight, completed, gone, or not as it was
            seen, or its effects are committed and it was to be forgotten; nothing has changed.
        :raises NotStorable: the response can't be stored or replayed; nothing has changed.
        :raises ValueError: there is a response without COMPLETE, or COMPLETE without one.
        """
        if (response is not None) is not (action is Resolution.COMPLETE):
            raise ValueError("a response belongs to COMPLETE, and only there")
        params: dict[str, Any] = {
            "digest": digest,
            "seen": seen,
            "mine": mine,
            "undone": undone,
            "id": os.urandom(16),
            "actor": _storable(actor),
            "reason": _storable(reason),
            "action": action.value,
            "status": None,
        }
        if response is not None:
            params |= response_params(completion_of(response, max_response_bytes))

        def work(run: _Run) -> bool:
            # The second look is for a first one whose answer was lost.
            return (
                self._sql.resolve(run, action, params)
                or run(self._sql.MINE, {"id": params["id"]}).fetchone() is not None
            )

        if not self.store._call(work):
            raise NotResolvable(_why_not(self.details(digest), seen))

    # ------------------------------------------------------------------ the reconciler's

    def now(self) -> float:
        """The database's clock, in seconds since 1970-01-01 UTC."""
        return float(self._fetch(self._sql.NOW, {})[0][0])

    def due(self, cutoff: float, *, limit: int) -> list[bytes]:
        """Find what a reconciler may look at, the longest due first. Reads the whole table.

        :param cutoff: a moment of :meth:`now`; what came due after it is left out.
        :param limit: rows at most.
        :returns: digests.
        """
        rows = self._fetch(self._sql.DUE, {"cutoff": cutoff, "limit": limit})
        return [bytes(digest) for (digest,) in rows]

    def take_up(self, digest: bytes, *, cutoff: float, seconds: float) -> Details | None:
        """Make a look at an operation the caller's, for so many seconds.

        What a lapse holds is held afterwards, with the token it had. What a lapse releases
        is a claim afterwards, with a token of the caller's, and the same attempt.

        :param cutoff: as for :meth:`due`; who has looked since has it.
        :param seconds: until the row is due again, or the claim lapses, unless the caller
            has said something by then.
        :returns: the row as it is now; None when it isn't due any more, or locked.
        """
        params = {
            "digest": digest,
            "cutoff": cutoff,
            "seconds": float(seconds),
            "token": os.urandom(16),
        }
        row = self.store._call(lambda run: self._sql.take_up(run, params))
        return None if row is None else _details(tuple(row))

    def back_off(self, digest: bytes, token: bytes, *, seconds: float) -> bool:
        """Look at a held operation again after so many seconds, not before; False when it
        is not held with this token any more."""
        params = {"digest": digest, "token": token, "seconds": float(seconds)}
        return self.store._one(self._sql.BACK_OFF, params)

    # ------------------------------------------------------------------ rows

    def _fetch(self, statement: str, params: Mapping[str, Any]) -> list[Any]:
        return self.store._call(lambda run: run(statement, params).fetchall())

    def _rows(self, statement: str, params: Mapping[str, Any]) -> list[Details]:
        return [_details(tuple(row)) for row in self._fetch(statement, params)]


def completion_of(
    response: StoredResponse, max_response_bytes: int = MAX_RESPONSE_BYTES
) -> Completion:
    """What is recorded of a response that somebody has made by hand, judged as a handler's.

    :param response: what is to be replayed.
    :param max_response_bytes: a larger body is refused.
    :raises NotStorable: it can't be stored or replayed.
    """
    if not isinstance(response, StoredResponse) or not isinstance(response.body, bytes):
        raise NotStorable(f"{response!r:.80} is not a StoredResponse with a body of bytes")
    if not isinstance(response.status, str):
        raise NotStorable(f"the status is {response.status!r}; use a text like '201 Created'")
    reason = unsendable(response.status, response.headers)
    if reason is not None:
        raise NotStorable(f"the response can't be sent: {reason}")
    status = int(response.status[:3])
    if status in NEVER_AN_OUTCOME or status in OF_ONE_RANGE:
        raise NotStorable(
            f"{status} speaks of a request, not of an operation, and is never replayed"
        )
    if len(response.body) > max_response_bytes:
        raise NotStorable(
            f"the body has {len(response.body)} bytes, more than the {max_response_bytes} allowed"
        )
    return Completion(response.status, replayable(response.headers), response.body)


def _why_not(found: Details | None, seen: bytes) -> str:
    if found is None:
        return "there is no such operation any more: its key is fresh"
    if found.state is State.COMPLETED:
        return f"the operation is completed ({found.status}): there is nothing to resolve"
    if found.state is State.CLAIMED and not found.lapsed:
        return (
            f"the operation is in flight: attempt {found.attempt} has a lease that runs for"
            f" another {max(found.lease_left, 0):.0f} s, and may be renewed"
        )
    if found.effects and found.token == seen:
        return (
            "what the operation did is committed in the database: it was done, and its retry would"
            " do it again. Say what it answers (complete), or undo it first and say so (undone)"
        )
    return "the operation is not as it was seen: look at it again"


def _details(row: tuple[Any, ...]) -> Details:
    (
        digest, token, state, lapse, lapsed, past_retention, attempt, scope, key, method, path,
        now, created_at, lease_until, expires_at, completed_at, status, body_bytes,
        not_replayable, effects,
    ) = row  # fmt: skip
    try:
        return Details(
            digest=bytes(digest),
            token=bytes(token),
            state=State(state),
            lapse=Lapse(lapse),
            lapsed=bool(lapsed),
            past_retention=bool(past_retention),
            attempt=int(attempt),
            scope=scope,
            key=key,
            method=method,
            path=path,
            age=float(now) - float(created_at),
            lease_left=float(lease_until) - float(now),
            created_at=float(created_at),
            lease_until=float(lease_until),
            expires_at=float(expires_at),
            completed_at=None if completed_at is None else float(completed_at),
            status=status,
            body_bytes=body_bytes,
            not_replayable=not_replayable,
            effects=bool(effects),
        )
    except (TypeError, ValueError) as exc:
        raise CorruptRecord(f"the row of digest {digest!r} makes no sense: {exc}") from exc


def _resolved(row: tuple[Any, ...]) -> Resolved:
    digest, scope, key, method, path, attempt, moment, actor, reason, action, status = row
    return Resolved(
        resolved_at=float(moment),
        actor=actor,
        reason=reason,
        action=Resolution(action),
        digest=bytes(digest),
        scope=scope,
        key=key,
        method=method,
        path=path,
        attempt=int(attempt),
        status=status,
    )
