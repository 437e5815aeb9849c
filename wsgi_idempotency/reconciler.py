"""Finds out what became of operations whose worker never said, by asking a function of yours.

A worker that dies in the middle of an operation leaves a row that nobody can judge from
inside: the charge may have been made or not. Whoever has the other side's books can. A
:class:`Reconciler` walks these rows and asks a *verdict* about each::

    def verdict(record):
        charge = bank.find(reference=record.digest.hex())
        if charge is None:
            return NotExecuted if record.age > 3600 else StillUnknown
        return Completed(StoredResponse("201 Created", (), charge.json().encode()))

No lock and no transaction is held while the verdict thinks: a row is marked with the moment
before which nobody else is to look. So it may run on many hosts, and be killed.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wsgi_idempotency.errors import (
    ConfigurationError,
    CorruptRecord,
    NotResolvable,
    NotStorable,
    StoreError,
)
from wsgi_idempotency.policy import Seconds, in_seconds
from wsgi_idempotency.records import State, StoredResponse
from wsgi_idempotency.stores import open_store
from wsgi_idempotency.stores.resolving import (
    MAX_RESPONSE_BYTES,
    Details,
    Resolution,
    Resolver,
    completion_of,
)
from wsgi_idempotency.stores.sql import SQLStore

if TYPE_CHECKING:
    from sqlalchemy import Engine

logger = logging.getLogger("wsgi_idempotency")

_PAGE = 1000  # rows found by one reading of the table


@dataclass(frozen=True, slots=True)
class Completed:
    """The verdict that the operation was done: its response is replayed from now on.

    :param response: what its handler would have answered.
    :param reason: how that is known, for the record.
    """

    response: StoredResponse
    reason: str = "it was found to be done"


@dataclass(frozen=True, slots=True)
class NotExecuted:
    """The verdict that the operation was not done, and that no worker will still do it: its
    key is fresh. The class itself may be returned for one.

    :param reason: how that is known, for the record.
    """

    reason: str = "it was found not to have been done"


@dataclass(frozen=True, slots=True)
class StillUnknown:
    """The verdict that nobody can tell yet: to be asked again later. The class itself may be
    returned for one.

    :param reason: why, for the log.
    """

    reason: str = "nobody can tell yet"


Answer = Completed | NotExecuted | StillUnknown
Verdict = Callable[[Details], "Answer | type[NotExecuted] | type[StillUnknown]"]

#: What may have become of a look, as :meth:`Reconciler.walk` counts it.
COMPLETED = "completed"
NOT_EXECUTED = "not executed"
STILL_UNKNOWN = "still unknown"
FAILED = "failed"  # to give a verdict that can be used; counts as unknown
OVERTAKEN = "overtaken"  # by a worker, a retry or a person, while the verdict thought
OUTCOMES = (COMPLETED, NOT_EXECUTED, STILL_UNKNOWN, FAILED, OVERTAKEN)


class Reconciler:
    """Walks lapsed and held operations and asks a verdict about each.

    What a lapse holds is held while it is judged; the worker, if it was only slow, may
    still complete it. What a lapse releases is claimed by the reconciler, so that no retry
    runs beside the verdict: a retry is told CONFLICT meanwhile. That claim is no attempt.

    A verdict is asked again after half the operation's age, at least 10 s and at most an
    hour later; what a lapse releases is released instead, for the next retry to run. One
    that raises is logged and counts as :class:`StillUnknown`. Every resolution is on
    record in ``idempotency_resolutions``.

    To find the rows is to read the table of keys once a walk: they have no index, since
    one would cost every operation its heap-only update.

    :param store: a database URL, a :class:`sqlalchemy.Engine` or an
        :class:`~wsgi_idempotency.SQLStore`, whose ``timeout`` bounds each reading.
    :param verdict: called with a :class:`~wsgi_idempotency.stores.resolving.Details`;
        returns :class:`Completed`, :class:`NotExecuted` or :class:`StillUnknown`.
    :param patience: seconds a verdict may take until somebody else may look, and until a
        retry may run what a lapse releases.
    :param max_response_bytes: a larger response is refused and counts as a failure.
    :param actor: who is on record as having decided.
    :raises ConfigurationError: an option makes no sense; the message says what would.
    """

    def __init__(
        self,
        store: str | Engine | SQLStore,
        verdict: Verdict,
        *,
        patience: Seconds = 60.0,  # seconds; longer than other systems take to answer
        max_response_bytes: int = MAX_RESPONSE_BYTES,  # as a Policy's
        actor: str | None = None,
    ) -> None:
        opened = open_store(store)
        if not isinstance(opened, SQLStore):
            raise ConfigurationError(
                f"a reconciler can't see into {type(opened).__name__}; use a database"
            )
        if not callable(verdict):
            raise ConfigurationError(f"verdict is {verdict!r}, which can't be called")
        self.store = opened
        self.verdict = verdict
        self.actor = f"reconciler@{socket.gethostname()}" if actor is None else actor
        self.counts: Counter[str] = Counter()  # since it was made
        self._patience = in_seconds("patience", patience, 1.0)
        self._max_response_bytes = max_response_bytes
        self._resolver = Resolver(opened)

    def run(self, *, interval: Seconds = 60.0, stop: threading.Event | None = None) -> None:
        """Walk again and again, until it is told to stop.

        A store that can't be reached is logged, and tried again after the interval.

        :param interval: seconds between the end of a walk and the next.
        :param stop: set it to end after the operation that is being judged.
        """
        interval = in_seconds("interval", interval, 0.0)
        stop = stop or threading.Event()
        while not stop.is_set():
            try:
                counts = self.walk(stop=stop)
                if counts:
                    logger.info("%s", summary(counts))
            except StoreError as exc:
                logger.error("the reconciler's walk broke off: %s", exc)
            stop.wait(interval)

    def walk(self, *, stop: threading.Event | None = None) -> Counter[str]:
        """Look once at each operation that is due as the walk begins.

        :param stop: set it to end after the operation that is being judged.
        :returns: how often each of :data:`OUTCOMES` came about.
        :raises StoreError: the store can't be reached; what isn't resolved comes due again.
        """
        before = self.counts.copy()
        cutoff = self._resolver.now()
        last: list[bytes] = []
        while True:
            due = self._resolver.due(cutoff, limit=_PAGE)
            for digest in due:
                if stop is not None and stop.is_set():
                    return self.counts - before
                outcome = self._look_at(digest, cutoff)
                if outcome is not None:
                    self.counts[outcome] += 1
            # What stands still is locked by somebody, and left for the next walk.
            if len(due) < _PAGE or due == last:
                return self.counts - before
            last = due

    def _look_at(self, digest: bytes, cutoff: float) -> str | None:
        """What came of it; None when it is no longer ours to look at."""
        try:
            row = self._resolver.take_up(digest, cutoff=cutoff, seconds=self._patience)
        except CorruptRecord as exc:
            logger.error("an operation can't be judged: %s", exc)
            return FAILED
        if row is None:
            return None
        try:
            answer = self._checked(self.verdict(row))
        except Exception:
            logger.exception("the verdict failed on %s: it is unknown still", _shown(row))
            return self._put_off(row, FAILED)
        logger.info("%s: %s (%s)", _shown(row), type(answer).__name__, answer.reason)
        try:
            return self._act(row, answer)
        except NotResolvable as exc:
            logger.info("%s was not resolved: %s", _shown(row), exc)
            return OVERTAKEN

    def _checked(self, answer: object) -> Answer:
        """:raises TypeError: it is no verdict.
        :raises NotStorable: its response can't be recorded.
        """
        if answer is NotExecuted or answer is StillUnknown:
            answer = answer()
        if not isinstance(answer, (Completed, NotExecuted, StillUnknown)):
            raise TypeError(
                f"the verdict returned {answer!r}; return Completed(response), NotExecuted or"
                " StillUnknown"
            )
        if not isinstance(answer.reason, str):
            raise TypeError(f"the verdict's reason is {answer.reason!r}; use a text")
        if isinstance(answer, Completed):
            completion_of(answer.response, self._max_response_bytes)
        return answer

    def _act(self, row: Details, answer: Answer) -> str:
        if isinstance(answer, StillUnknown):
            return self._put_off(row, STILL_UNKNOWN)
        done = isinstance(answer, Completed)
        if row.effects and not done:
            logger.error(
                "the verdict on %s can't be right: what it did is committed in the database",
                _shown(row),
            )
            return self._put_off(row, FAILED)
        try:
            self._resolver.resolve(
                row.digest,
                row.token,
                Resolution.COMPLETE if done else Resolution.FORGET,
                actor=self.actor,
                reason=answer.reason,
                response=answer.response if isinstance(answer, Completed) else None,
                max_response_bytes=self._max_response_bytes,
                mine=row.state is State.CLAIMED,
            )
        except NotStorable as exc:
            logger.error("the verdict on %s can't be recorded: %s", _shown(row), exc)
            return self._put_off(row, FAILED)
        return COMPLETED if done else NOT_EXECUTED

    def _put_off(self, row: Details, outcome: str) -> str:
        if row.state is State.CLAIMED:
            kept = self.store.release(row.digest, row.token)
        else:
            seconds = backoff(row.age)
            kept = self._resolver.back_off(row.digest, row.token, seconds=seconds)
        return outcome if kept else OVERTAKEN


def backoff(age: float) -> float:
    """Seconds until a held operation is looked at again: half its age, at least 10 s, so that
    a verdict isn't asked over and over, and at most an hour."""
    return min(max(age / 2, 10.0), 3600.0)


def summary(counts: Counter[str]) -> str:
    """What a walk or several came to, in one line."""
    parts = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome])
    return f"{counts.total()} looked at" + (f": {parts}" if parts else "")


def _shown(row: Details) -> str:
    return f"{row.method} {row.path} of digest {row.digest.hex()}"
