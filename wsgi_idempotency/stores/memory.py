"""A store for one process: development, tests, and programs that are one process."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from wsgi_idempotency import forks
from wsgi_idempotency.records import Claim, Claimed, Completion, Lapse, Record, State, Step

logger = logging.getLogger("wsgi_idempotency")

#: Below this many rows a sweep isn't worth its while, in rows.
SWEEP_FLOOR = 1024


@dataclass(frozen=True, slots=True)
class _Row:
    """Frozen, so that a change is one assignment to the dict: a fork in the middle of
    another thread's change leaves the child the row before it or the row after it."""

    claim: Claim
    attempt: int
    state: State
    created_at: float
    lease_until: float
    expires_at: float
    completion: Completion | None = None
    steps: Mapping[str, str] = field(default_factory=dict)


class MemoryStore:
    """Keep the records in this process: a dict under a lock, and the store's own clock.

    For one process. A second worker process, or a restart, knows nothing of them. A
    store constructed before a fork works on both sides of it, each with the rows there
    were at the fork, and a child logs a WARNING at its first use of one.

    Expired rows are dropped by :meth:`purge`, and by a claim that finds twice as many
    rows as the last sweep left (and at least 1024): the store never holds more than
    about twice the rows that are of use, and a claim pays for a constant number of
    rows on average.

    :param clock: returns seconds, as a float that never goes backwards.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rows: dict[bytes, _Row] = {}
        self._sweep_at = SWEEP_FLOOR
        self._lock = threading.Lock()
        self._forked = False
        _constructed.add(self)

    def claim(self, claim: Claim) -> Claimed | Record:
        with self._exclusively() as now:
            row = self._rows.get(claim.digest)
            if row is None:
                self._sweep_if_due(now)
                self._rows[claim.digest] = _claimed(claim, 1, created_at=now, now=now)
                return Claimed(1)
            if row.claim.token == claim.token and row.state is State.CLAIMED:
                return Claimed(row.attempt)
            return _read(row, now)

    def take_over(self, claim: Claim, seen: Record) -> Claimed | None:
        with self._exclusively() as now:
            row = self._rows.get(claim.digest)
            if row is None or row.claim.token != seen.token:
                return None
            record = _read(row, now)
            if record.expired:
                taken = _claimed(claim, 1, created_at=now, now=now)
            elif record.state is State.RELEASED or (
                record.lapsed and record.lapse is Lapse.RELEASE
            ):
                taken = dataclasses.replace(
                    _claimed(claim, row.attempt + 1, created_at=row.created_at, now=now),
                    steps=row.steps,
                )
            else:
                return None
            self._rows[claim.digest] = taken
            return Claimed(taken.attempt)

    def lookup(self, digest: bytes) -> Record | None:
        with self._exclusively() as now:
            row = self._rows.get(digest)
            return None if row is None else _read(row, now)

    def complete(self, digest: bytes, token: bytes, completion: Completion) -> bool:
        with self._exclusively():
            row = self._own(digest, token, State.HELD, State.COMPLETED)
            if row is None:
                return False
            self._rows[digest] = dataclasses.replace(
                row, state=State.COMPLETED, completion=completion
            )
            return True

    def release(self, digest: bytes, token: bytes) -> bool:
        return self._give_up(digest, token, State.RELEASED, State.HELD)

    def hold(self, digest: bytes, token: bytes) -> bool:
        return self._give_up(digest, token, State.HELD)

    def forget(self, digest: bytes, token: bytes) -> bool:
        with self._exclusively():
            row = self._own(digest, token, State.HELD)
            if row is None:
                return False
            del self._rows[digest]
            return True

    def renew(self, claims: Iterable[tuple[bytes, bytes, float]]) -> set[bytes]:
        wanted = list(claims)  # what makes them is not ours, and stays outside the lock
        kept = set()
        with self._exclusively() as now:
            for digest, token, lease in wanted:
                row = self._own(digest, token, State.HELD)
                if row is not None:
                    until = now + lease
                    if row.state is State.HELD:
                        until = max(until, row.lease_until)
                    self._rows[digest] = dataclasses.replace(row, lease_until=until)
                    kept.add(token)
        return kept

    def step(self, digest: bytes, token: bytes, name: str) -> Step | None:
        with self._exclusively():
            row = self._own(digest, token)
            return None if row is None else Step(row.steps.get(name))

    def record_step(self, digest: bytes, token: bytes, name: str, result: str) -> bool:
        with self._exclusively():
            row = self._own(digest, token, State.HELD)
            if row is None:
                return False
            steps = {**row.steps, name: result}
            self._rows[digest] = dataclasses.replace(row, steps=steps)
            return True

    def purge(self, limit: int) -> int:
        if limit < 1:
            raise ValueError(f"limit is {limit!r}; use at least 1 row")
        with self._exclusively() as now:
            expired = sorted(self._expired(now), key=lambda row: row.expires_at)[:limit]
            for row in expired:
                del self._rows[row.claim.digest]
            return len(expired)

    def check(self) -> None:
        """There is nothing to connect to and no schema to be old."""

    def close(self) -> None:
        """There is nothing to give back; the records stay."""

    @contextmanager
    def _exclusively(self) -> Iterator[float]:
        """Let nobody else in, and say what time it is."""
        forks.notice()
        with self._lock:
            if self._forked:
                self._forked = False
                logger.warning(
                    "MemoryStore was constructed before a fork: process %d shares no"
                    " idempotency keys with its parent or siblings, so a retry that reaches"
                    " another process runs again. Use SQLite or PostgreSQL with more than"
                    " one process.",
                    os.getpid(),
                )
            yield self._clock()

    def _own(self, digest: bytes, token: bytes, *others: State) -> _Row | None:
        """The row of a claim that is still the caller's, or is in one of the other states."""
        row = self._rows.get(digest)
        if row is None or row.claim.token != token:
            return None
        return row if row.state in (State.CLAIMED, *others) else None

    def _give_up(self, digest: bytes, token: bytes, state: State, *others: State) -> bool:
        with self._exclusively():
            row = self._own(digest, token, state, *others)
            if row is None:
                return False
            self._rows[digest] = dataclasses.replace(row, state=state)
            return True

    def _sweep_if_due(self, now: float) -> None:
        if len(self._rows) < self._sweep_at:
            return
        for row in list(self._expired(now)):
            del self._rows[row.claim.digest]
        self._sweep_at = max(SWEEP_FLOOR, 2 * len(self._rows))

    def _expired(self, now: float) -> Iterator[_Row]:
        return (row for row in self._rows.values() if _read(row, now).expired)

    def _after_fork_in_child(self) -> None:
        # The thread that may have held the lock doesn't exist in the child.
        self._lock = threading.Lock()
        self._forked = True


def _claimed(claim: Claim, attempt: int, *, created_at: float, now: float) -> _Row:
    return _Row(
        claim=claim,
        attempt=attempt,
        state=State.CLAIMED,
        created_at=created_at,
        lease_until=now + claim.lease,
        expires_at=now + claim.retention,
    )


def _read(row: _Row, now: float) -> Record:
    """What a row means at this moment; a lease or retention of 0 s has run out at once."""
    done = row.completion
    return Record(
        digest=row.claim.digest,
        token=row.claim.token,
        state=row.state,
        fingerprint=row.claim.fingerprint,
        fingerprint_version=row.claim.fingerprint_version,
        attempt=row.attempt,
        lapse=row.claim.lapse,
        lapsed=row.state is State.CLAIMED and row.lease_until <= now,
        past_retention=row.expires_at <= now,
        age=now - row.created_at,
        lease_left=row.lease_until - now,
        status=done.status if done else None,
        headers=done.headers if done else (),
        body=done.body if done else None,
        not_replayable=done.not_replayable if done else None,
    )


_constructed: weakref.WeakSet[MemoryStore] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for store in list(_constructed):
        store._after_fork_in_child()


forks.in_child(_after_fork_in_child)
