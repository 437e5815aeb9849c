"""The statements of a store as PostgreSQL runs them, on the row of one key.

Each is a function of the row and gives the row afterwards and the answer. A statement that
runs on its own (autocommit) is atomic, but for the claim: it looks with a snapshot, and what
it inserts then meets rows that were committed after that snapshot (PostgreSQL documentation,
13.2.1). Those are two steps here.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from wsgi_idempotency.records import Lapse, Record, State


class Result(NamedTuple):
    """A recorded response."""

    status: str
    body: bytes | None
    reason: str | None


class Row(NamedTuple):
    """The row of the key. What its two clocks say is part of it; texts hash fast."""

    token: int
    state: str
    lapsed: bool
    past_retention: bool
    attempt: int
    fingerprint: bytes
    lapse: str
    result: Result | None = None


class Granted(NamedTuple):
    """The claim was granted."""

    attempt: int


class Wanted(NamedTuple):
    """What a claim wants to put into the row."""

    token: int
    fingerprint: bytes
    lapse: str


CLAIMED, RELEASED, HELD, COMPLETED = (state.value for state in State)
assert (CLAIMED, RELEASED, HELD, COMPLETED) == ("claimed", "released", "held", "completed")

#: The answer of a claim that neither saw a row nor could insert one.
NO_ROW = None


def bytes_of(token: int) -> bytes:
    return bytes([token]) * 16


@cache
def record(row: Row) -> Record:
    """The row as a store returns it."""
    done = row.result
    return Record(
        digest=bytes(32),
        token=bytes_of(row.token),
        state=State(row.state),
        fingerprint=row.fingerprint,
        fingerprint_version=1,
        attempt=row.attempt,
        lapse=Lapse(row.lapse),
        lapsed=row.lapsed,
        past_retention=row.past_retention,
        age=0.0,
        lease_left=-1.0 if row.lapsed else 1.0,
        status=done.status if done else None,
        body=done.body if done else None,
        not_replayable=done.reason if done else None,
    )


@cache
def expired(row: Row) -> bool:
    """``_PG_EXPIRED``."""
    return row.past_retention and (
        row.state in (COMPLETED, RELEASED)
        or (row.state == CLAIMED and row.lapse == "release" and row.lapsed)
    )


def look(row: Row, token: int) -> Granted | Row:
    """What a claim finds: the row, or that it is its own."""
    if row.token == token and row.state == CLAIMED:
        return Granted(row.attempt)
    return row


def fresh(wanted: Wanted, attempt: int = 1) -> Row:
    return Row(wanted.token, CLAIMED, False, False, attempt, wanted.fingerprint, wanted.lapse)


class Database:
    """The statements as they are; a test takes a condition out of one of them."""

    def insert(self, row: Row | None, wanted: Wanted) -> tuple[Row | None, Granted | None]:
        """The second half of a claim whose snapshot had no row: ``ON CONFLICT DO NOTHING``."""
        if row is None:
            return fresh(wanted), Granted(1)
        return row, NO_ROW

    def take_over(
        self, row: Row | None, wanted: Wanted, seen: int
    ) -> tuple[Row | None, Granted | None]:
        if row is None or row.token != seen:
            return row, None
        if expired(row):
            return fresh(wanted), Granted(1)
        if row.state == RELEASED or (
            row.state == CLAIMED and row.lapse == "release" and row.lapsed
        ):
            return fresh(wanted, row.attempt + 1), Granted(row.attempt + 1)
        return row, None

    def complete(self, row: Row | None, token: int, result: Result) -> tuple[Row | None, bool]:
        if (
            row is None
            or row.token != token
            or row.state
            not in (
                CLAIMED,
                HELD,
                COMPLETED,
            )
        ):
            return row, False
        return row._replace(state=COMPLETED, lapsed=False, result=result), True

    def release(self, row: Row | None, token: int) -> tuple[Row | None, bool]:
        return self._give_up(row, token, RELEASED)

    def hold(self, row: Row | None, token: int) -> tuple[Row | None, bool]:
        return self._give_up(row, token, HELD)

    def _give_up(self, row: Row | None, token: int, state: str) -> tuple[Row | None, bool]:
        if row is None or row.token != token or row.state not in (CLAIMED, HELD, state):
            return row, False
        return row._replace(state=state, lapsed=False), True

    def forget(self, row: Row | None, token: int) -> tuple[Row | None, bool]:
        if row is None or row.token != token or row.state not in (CLAIMED, HELD):
            return row, False
        return None, True

    def renew(self, row: Row | None, token: int) -> Row | None:
        if row is None or row.token != token or row.state != CLAIMED:
            return row
        return row._replace(lapsed=False)
