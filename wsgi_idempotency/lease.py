"""Keeps the claims of this process alive, and finishes what could not be finished at once.

One daemon thread a process renews all claims in flight in one statement, each at the
latest a third of its lease after the last time, so that two renewals may fail before a
claim lapses. A completion that the store could not take is tried again by the same
thread, while the claim it belongs to is kept.
"""

from __future__ import annotations

import atexit
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from wsgi_idempotency import forks
from wsgi_idempotency.errors import StoreUnavailable
from wsgi_idempotency.operation import Operation
from wsgi_idempotency.records import Claim
from wsgi_idempotency.stores.base import Store

logger = logging.getLogger("wsgi_idempotency")

#: Records the end of an operation; False when the claim was lost.
Finish = Callable[[], bool]

_FIRST_RETRY = 0.5  # seconds until an unfinished completion is tried again; doubled each time

#: Seconds for which a doubtful claim is looked for, and a lease at least. A statement that
#: nobody waits for any more is still on its way while the kernel sends what a closed socket
#: has left to send (Linux, tcp_orphan_retries: 100 s or so).
_ON_ITS_WAY = 120.0

#: Seconds for which ends are caught up with before renewals have their turn again. After an
#: outage there may be thousands, and a third of the shortest lease is 0.3 s.
_TURN = 0.1


@dataclass(slots=True)
class _Kept:
    claim: Claim
    operation: Operation | None
    renew_at: float
    give_up_at: float
    finish: Finish | None = None
    finish_at: float = math.inf
    backoff: float = _FIRST_RETRY
    finishing: bool = False
    look_until: float | None = None

    @property
    def key(self) -> bytes:
        """A claim that somebody runs and one that is to be undone may have the same token."""
        return self.claim.token if self.operation is not None else b"undo" + self.claim.token

    def due(self) -> float:
        return min(self.renew_at, self.finish_at)


class Heartbeat:
    """Renews leases and finishes late, for one store.

    :param store: where the claims are.
    :param on_lost: called with an operation whose claim somebody else has taken over.

    The thread is started with the first claim and made anew in a forked child. A claim
    is renewed for its retention at the longest: a handler that hangs does not keep its
    key for ever.
    """

    def __init__(self, store: Store, on_lost: Callable[[Operation], None]) -> None:
        self._store = store
        self._on_lost = on_lost
        self.forget_parent()
        _heartbeats.add(self)

    def forget_parent(self) -> None:
        """In a forked child: the parent's thread, lock and claims are not ours."""
        self._kept: dict[bytes, _Kept] = {}
        self._changed: threading.Condition | None = None
        self._wake_at = math.inf

    def start(self, claim: Claim, operation: Operation, since: float | None = None) -> None:
        """Keep a claim alive from now on.

        :param since: when its lease began at the earliest, on :func:`time.monotonic`; None for
            now.
        """
        now = time.monotonic()
        renew_at = (now if since is None else since) + claim.lease / 3
        kept = _Kept(claim, operation, renew_at, now + claim.retention)
        self._add(kept)

    def finishing(self, claim: Claim) -> None:
        """Keep a claim while its operation is being finished; that it is gone means nothing."""
        kept = self._kept.get(claim.token)
        if kept is not None:
            kept.finishing = True

    def stop(self, claim: Claim) -> None:
        """Leave a claim to its lease: its operation is finished."""
        if self._changed is not None:
            with self._changed:
                self._kept.pop(claim.token, None)

    def finish_later(self, claim: Claim, operation: Operation, finish: Finish) -> None:
        """Keep a claim and call ``finish``, until it answers or the retention is over."""
        now = time.monotonic()
        self._add(_Kept(claim, operation, now, now + claim.retention, finish, now + _FIRST_RETRY))

    def undo_later(self, claim: Claim, undo: Finish) -> None:
        """Call ``undo`` again and again: whether the claim was made can't be told now, and
        nobody runs the operation it would stand for. That it has undone something says nothing
        of a second statement, sent when the first had no answer. So it is asked for two
        minutes, and a lease at least, from when the store first answers again."""
        now = time.monotonic()
        give_up_at = now + claim.retention
        self._add(_Kept(claim, None, math.inf, give_up_at, undo, now + _FIRST_RETRY))

    def flush(self) -> None:
        """At the end of the process: finish what is left, once, and say what could not be."""
        if self._changed is None:
            return
        with self._changed:
            left = [kept for kept in self._kept.values() if kept.finish is not None]
        # What was run comes before what was not: there may not be time for all.
        left.sort(key=lambda kept: kept.operation is None)
        reached = True
        for kept in left:
            # The process may be killed if it takes too long to end: one time-out, not many.
            reached = reached and self._finish(self._changed, kept)
            if kept.operation is not None and kept.key in self._kept:
                claim = kept.claim
                logger.critical(
                    "%s %s was run, and the store could not be told before this process ended:"
                    " digest %s, attempt %d. Its claim lapses (%s) within %g s of its last"
                    " heartbeat; resolve it by hand.",
                    claim.method, claim.path, claim.digest.hex(), kept.operation.attempt,
                    claim.lapse.value, claim.lease,
                )  # fmt: skip

    def _add(self, kept: _Kept) -> None:
        changed = self._changed or self._begin()
        with changed:
            self._kept[kept.key] = kept
            if (due := kept.due()) < self._wake_at:
                self._wake_at = due
                changed.notify()

    def _begin(self) -> threading.Condition:
        """Start the thread, with the first claim of this process.

        Not before: gunicorn's gevent worker patches ``threading`` after the fork, and a
        Condition made earlier would stop the whole worker instead of one greenlet. For
        the same reason nothing that may switch greenlets happens under ``_birth``.
        """
        with _birth:
            if self._changed is not None:
                return self._changed
            changed = self._changed = threading.Condition()
        try:
            threading.Thread(
                target=self._run, args=(changed,), name="idempotency-heartbeat", daemon=True
            ).start()
        except BaseException:
            self._changed = None  # the next claim tries again
            raise
        return changed

    def _run(self, changed: threading.Condition) -> None:
        while True:
            with changed:
                now = time.monotonic()
                # With nothing to keep it still wakes when it was to, once: woken by each claim
                # that comes alone and put to sleep by its end, it would take a switch of
                # threads from every request.
                planned = self._wake_at if self._wake_at > now else math.inf
                self._wake_at = min((kept.due() for kept in self._kept.values()), default=planned)
                if self._wake_at > now:
                    timeout = self._wake_at - now
                    changed.wait(None if timeout == math.inf else timeout)
                    continue
                due = [kept for kept in self._kept.values() if kept.due() <= now]
            try:
                self._beat(changed, due, now)
            except Exception:
                logger.exception("the heartbeat failed; it goes on")

    def _beat(self, changed: threading.Condition, due: list[_Kept], now: float) -> None:
        with changed:
            for kept in due:
                if kept.give_up_at <= now:
                    self._kept.pop(kept.key, None)
                    if kept.operation is not None:
                        logger.error("gave up keeping %r after its retention", kept.operation)
            # All of them, not only the due: it is one statement in either case.
            renew = [kept for kept in self._kept.values() if kept.operation is not None]
            finish = [kept for kept in self._kept.values() if kept.finish_at <= now]
        if any(kept.renew_at <= now for kept in renew):
            self._renew(changed, renew)
        reached = True
        turn_ends = time.monotonic() + _TURN
        for kept in sorted(finish, key=lambda kept: kept.finish_at):
            if time.monotonic() > turn_ends:
                break  # renewals come first, and what is left comes after them
            # Once the store can't be reached, each further try would cost its time-out,
            # and the leases of the others run meanwhile.
            reached = reached and self._finish(changed, kept)
            if kept.key in self._kept:
                kept.backoff = min(kept.backoff * 2, kept.claim.lease / 3)
                kept.finish_at = time.monotonic() + kept.backoff

    def _renew(self, changed: threading.Condition, renew: list[_Kept]) -> None:
        try:
            alive = self._store.renew(
                [(kept.claim.digest, kept.claim.token, kept.claim.lease) for kept in renew]
            )
        except Exception as exc:
            logger.warning("%d leases could not be renewed: %s", len(renew), exc)
            for kept in renew:
                kept.renew_at = time.monotonic() + kept.claim.lease / 9
            return
        for kept in renew:
            kept.renew_at = time.monotonic() + kept.claim.lease / 3
            if kept.claim.token in alive or kept.finishing or kept.finish is not None:
                continue  # or its row is no longer in flight because it was finished
            with changed:
                # One that was stopped meanwhile was finished, not lost.
                lost = self._kept.pop(kept.key, None) is not None
            if lost:
                self._tell_lost(kept)

    def _finish(self, changed: threading.Condition, kept: _Kept) -> bool:
        """False when the store can't be reached, so that others needn't be tried now."""
        assert kept.finish is not None
        asked_at = time.monotonic()
        try:
            done = kept.finish()
        except Exception as exc:
            logger.warning("the end of %s can't be recorded yet: %s", kept.claim.digest.hex(), exc)
            return not isinstance(exc, StoreUnavailable)
        if kept.look_until is None and kept.operation is None:
            kept.look_until = time.monotonic() + max(kept.claim.lease, _ON_ITS_WAY)
        if kept.look_until is not None and asked_at < kept.look_until:
            return True
        with changed:
            self._kept.pop(kept.key, None)
        if kept.operation is None:
            return True
        if done:
            logger.info("the end of %s was recorded late", kept.claim.digest.hex())
        else:
            self._tell_lost(kept)
        return True

    def _tell_lost(self, kept: _Kept) -> None:
        assert kept.operation is not None
        kept.operation.lost = True
        self._on_lost(kept.operation)


_heartbeats: weakref.WeakSet[Heartbeat] = weakref.WeakSet()
_birth = threading.Lock()


def _after_fork_in_child() -> None:
    global _birth
    _birth = threading.Lock()
    for heartbeat in list(_heartbeats):
        heartbeat.forget_parent()


forks.in_child(_after_fork_in_child)


@atexit.register
def _flush_all() -> None:
    forks.notice()
    for heartbeat in list(_heartbeats):
        heartbeat.flush()
