"""The conformance suite finds the faults it is there for."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator

import pytest

from wsgi_idempotency.records import Claim, Claimed, Completion, Record, State
from wsgi_idempotency.stores.base import Store
from wsgi_idempotency.stores.memory import MemoryStore
from wsgi_idempotency.testing import (
    EXPIRED,
    RELEASED,
    SETTLEMENTS,
    TAKEN,
    WORKERS,
    Processes,
    ProcessesOn,
    StoreConformance,
    Threads,
    acquire,
    look_up,
    make_claim,
)


class TwoStatements(MemoryStore):
    """Looks, and then inserts."""

    def claim(self, claim: Claim) -> Claimed | Record:
        record = self.lookup(claim.digest)
        if record is not None:
            return record
        time.sleep(0.001)
        self._rows.pop(claim.digest, None)
        return super().claim(claim)


class Overwriting(MemoryStore):
    """Claims what has expired by itself, as ``DO UPDATE`` would."""

    def claim(self, claim: Claim) -> Claimed | Record:
        record = self.lookup(claim.digest)
        if record is not None and record.expired:
            del self._rows[claim.digest]
        return super().claim(claim)


class Regranting(MemoryStore):
    """Grants its own token again, whatever has become of the claim."""

    def claim(self, claim: Claim) -> Claimed | Record:
        record = self.lookup(claim.digest)
        if record is not None and record.token == claim.token:
            return Claimed(record.attempt)
        return super().claim(claim)


class NoSwap(MemoryStore):
    """Takes over a free row whoever has it."""

    def take_over(self, claim: Claim, seen: Record) -> Claimed | None:
        now = self.lookup(claim.digest)
        return None if now is None else super().take_over(claim, now)


class Trusting(MemoryStore):
    """Takes over what was free when it was seen."""

    def take_over(self, claim: Claim, seen: Record) -> Claimed | None:
        if seen.lapsed or seen.state is State.RELEASED:
            row = self._rows[claim.digest]
            self._rows[claim.digest] = dataclasses.replace(row, state=State.RELEASED)
        return super().take_over(claim, seen)


class Uncounting(MemoryStore):
    """Says that each attempt is the first."""

    def take_over(self, claim: Claim, seen: Record) -> Claimed | None:
        return super().take_over(claim, seen) and Claimed(1)


class Unfenced(MemoryStore):
    """Settles for whoever asks."""

    def complete(self, digest: bytes, token: bytes, completion: Completion) -> bool:
        record = self.lookup(digest)
        return record is not None and super().complete(digest, record.token, completion)


class Undoing(MemoryStore):
    """Releases what is finished."""

    def release(self, digest: bytes, token: bytes) -> bool:
        row = self._rows[digest]
        self._rows[digest] = dataclasses.replace(row, state=State.CLAIMED)
        return super().release(digest, token)


class Textual(MemoryStore):
    """Stores a body as text that ends with a NUL."""

    def complete(self, digest: bytes, token: bytes, completion: Completion) -> bool:
        body = (completion.body or b"").split(b"\0")[0]
        return super().complete(digest, token, dataclasses.replace(completion, body=body))


class Sorting(MemoryStore):
    """Keeps headers in an order of its own."""

    def complete(self, digest: bytes, token: bytes, completion: Completion) -> bool:
        headers = tuple(sorted(completion.headers))
        return super().complete(digest, token, dataclasses.replace(completion, headers=headers))


class Crossing(MemoryStore):
    """Renews where the digest is one of those given and the token is one of those given."""

    def renew(self, claims: Iterable[tuple[bytes, bytes, float]]) -> set[bytes]:
        pairs = itertools.product(*zip(*((d, (t, lease)) for d, t, lease in claims), strict=True))
        return super().renew((digest, token, lease) for digest, (token, lease) in pairs)


class Unlimited(MemoryStore):
    """Purges all there is."""

    def purge(self, limit: int) -> int:
        return super().purge(10**6)


class Newest(MemoryStore):
    """Purges by the end that is wrong."""

    def _expired(self, now: float) -> Iterator[object]:  # type: ignore[override]
        rows = sorted(super()._expired(now), key=lambda row: row.expires_at)
        return iter(rows[-2:])


class Volatile(MemoryStore):
    """Loses its records when it is closed."""

    def close(self) -> None:
        self._rows.clear()


class Unforkable(MemoryStore):
    """Works in the process that made it."""

    def __init__(self) -> None:
        super().__init__()
        self.home = os.getpid()

    def claim(self, claim: Claim) -> Claimed | Record:
        if os.getpid() != self.home:
            raise RuntimeError("not here")
        return super().claim(claim)


class ByTheCallersClock(MemoryStore):
    """Reads the wall clock of the process that asks."""

    def __init__(self) -> None:
        super().__init__(clock=lambda: time.time())


Check = Callable[[StoreConformance, MemoryStore], None]


def crowd(store: Store) -> Threads:
    return Threads(lambda: store)


def on_a_wrong_clock(suite: StoreConformance, store: Store) -> None:
    with pytest.MonkeyPatch.context() as patch:
        suite.test_a_caller_whose_clock_is_an_hour_wrong_changes_nothing(store, 1, patch)


FAULTS: dict[type[MemoryStore], Check] = {
    TwoStatements: lambda suite, store: suite.test_one_of_many_workers_wins_each_fresh_key(
        crowd(store)
    ),
    Overwriting: lambda suite, store: suite.test_a_claim_returns_a_row_as_it_is(
        store, EXPIRED["an expired completed row"]
    ),
    Regranting: lambda suite, store: suite.test_a_settled_claim_is_not_granted_again(
        store, State.COMPLETED
    ),
    NoSwap: lambda suite, store: (
        suite.test_a_row_that_came_free_again_under_another_token_is_refused(store, RELEASED)
    ),
    Trusting: lambda suite, store: suite.test_a_lease_renewed_since_it_was_seen_is_not_taken_over(
        store
    ),
    Uncounting: lambda suite, store: suite.test_attempts_count_up_until_the_row_expires(store),
    Unfenced: lambda suite, store: suite.test_somebody_elses_token_settles_nothing(
        store, TAKEN["a row in flight"], SETTLEMENTS["complete"]
    ),
    Undoing: lambda suite, store: (
        suite.test_a_claim_that_was_settled_one_way_is_not_settled_another(
            store, State.COMPLETED, "release"
        )
    ),
    Textual: lambda suite, store: suite.test_a_body_is_kept_byte_for_byte(store, b"a\x00b"),
    Sorting: lambda suite, store: suite.test_headers_are_kept_in_order_with_duplicates_and_case(
        store, (("B", "1"), ("A", "2"))
    ),
    Crossing: lambda suite, store: suite.test_a_token_renews_only_its_own_key(store),
    Unlimited: lambda suite, store: suite.test_a_purge_deletes_the_oldest_up_to_its_limit(store),
    Newest: lambda suite, store: suite.test_a_purge_deletes_the_oldest_up_to_its_limit(store),
    Volatile: lambda suite, store: suite.test_a_store_may_be_used_after_it_was_closed(store),
    Unforkable: lambda suite, store: suite.test_a_store_works_on_both_sides_of_a_fork(
        crowd(store), True
    ),
    ByTheCallersClock: on_a_wrong_clock,
}


@pytest.mark.parametrize(
    ("broken", "check"), FAULTS.items(), ids=[str(broken.__doc__) for broken in FAULTS]
)
def test_a_store_with_this_fault_fails(broken: type[MemoryStore], check: Check) -> None:
    """And one without it passes, so that it is the fault that was found."""
    suite = StoreConformance()
    check(suite, MemoryStore())
    with pytest.raises(AssertionError):
        check(suite, broken())


def test_a_key_that_is_never_granted_is_reported() -> None:
    """Rather than asked for until the end of time."""

    class Refusing(MemoryStore):
        def take_over(self, claim: Claim, seen: Record) -> None:
            return None

    store = Refusing()
    RELEASED.arrange(store)
    with pytest.raises(AssertionError, match="never granted"):
        acquire(store, make_claim())


def test_what_went_wrong_in_a_worker_process_is_reported(sqlite_url: str) -> None:
    """With its traceback; the next race is not spoilt by it."""
    processes = Processes()
    try:
        broken = ProcessesOn(processes, "wsgi_idempotency.stores.sql:SQLStore", "no URL at all")
        with pytest.raises(AssertionError, match="the database is not a URL"):
            broken.race(look_up, b"")
        sound = ProcessesOn(processes, "wsgi_idempotency.stores.sql:SQLStore", sqlite_url)
        assert sound.race(look_up, b"") == [None] * WORKERS
    finally:
        processes.stop()
