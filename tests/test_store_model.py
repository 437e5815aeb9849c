"""Whatever is asked of a store, in whatever order, it answers as a simple model does.

Time is moved, not waited for: the memory store is given a clock, and in a database every
timestamp of every row is moved back, which is the same as moving the clock forward. Steps
of the clock are whole minutes, and leases and retentions end half-way between two, so that
the real time a test takes decides nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import hypothesis
import sqlalchemy
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from wsgi_idempotency.records import Claim, Claimed, Completion, Lapse, Record, State
from wsgi_idempotency.stores.base import Store
from wsgi_idempotency.stores.memory import MemoryStore
from wsgi_idempotency.stores.sql import SQLStore

DIGESTS = [hashlib.sha256(bytes([number])).digest() for number in range(2)]

#: How far the real clock may run on during one example, in seconds.
TOLERANCE = 25.0

digests = st.sampled_from(DIGESTS)
leases = st.sampled_from([-30.0, 30.0, 90.0, 630.0])
retentions = st.sampled_from([-30.0, 150.0, 3630.0, 86430.0])
lapses = st.sampled_from(Lapse)
minutes = st.sampled_from([1, 2, 5, 60])
ways = st.sampled_from(["complete", "release", "hold", "forget"])


@dataclass(frozen=True)
class Event:
    """One thing that happens to a key; a key without a row is claimed instead."""

    what: str
    digest: bytes
    lease: float
    retention: float
    lapse: Lapse
    minutes: int


whats = st.sampled_from(
    # Twice as often: what the others make possible.
    [*["take over", "time goes by"] * 2, "complete", "release", "hold", "forget", "renew"]
)
stories = st.lists(
    st.builds(Event, whats, digests, leases, retentions, lapses, minutes), min_size=6, max_size=15
)


class Bench(Protocol):
    """A store, and a way to let its time go by."""

    store: Store

    def empty(self) -> None: ...
    def advance(self, seconds: float) -> None: ...


class MemoryBench:
    def __init__(self) -> None:
        self.empty()

    def empty(self) -> None:
        self.now = 1000.0
        self.store: Store = MemoryStore(clock=lambda: self.now)

    def advance(self, seconds: float) -> None:
        self.now += seconds


class SQLBench:
    def __init__(self, url: str) -> None:
        self.sql = SQLStore(url)
        self.sql.check()
        self.store: Store = self.sql

    def empty(self) -> None:
        self.execute("DELETE FROM idempotency_keys", {})

    def advance(self, seconds: float) -> None:
        postgresql = self.sql.url.get_backend_name() == "postgresql"
        delta = "make_interval(secs => :seconds)" if postgresql else ":seconds"
        columns = ("created_at", "lease_until", "expires_at", "completed_at")
        moved = ", ".join(f"{column} = {column} - {delta}" for column in columns)
        self.execute(f"UPDATE idempotency_keys SET {moved}", {"seconds": seconds})

    def execute(self, statement: str, params: dict[str, Any]) -> None:
        with self.sql.engine.connect() as connection:
            connection.execute(sqlalchemy.text(statement), params)


@dataclass(frozen=True)
class Row:
    """What the model knows of a key: the diagram of its states, and three times."""

    claim: Claim
    attempt: int
    state: State
    created_at: float
    lease_until: float
    expires_at: float
    completion: Completion | None = None


class Machine(RuleBasedStateMachine):
    bench: Bench

    claims = Bundle("claims")
    seen = Bundle("seen")

    def __init__(self) -> None:
        super().__init__()
        self.bench.empty()
        self.store = self.bench.store
        self.now = 0.0
        self.rows: dict[bytes, Row] = {}
        self.tokens = count(1)

    # The model.

    def lapsed(self, row: Row) -> bool:
        return row.state is State.CLAIMED and self.now > row.lease_until

    def expired(self, row: Row) -> bool:
        in_flight = row.state is State.CLAIMED and not self.lapsed(row)
        kept_out = row.state is State.HELD or (self.lapsed(row) and row.claim.lapse is Lapse.HOLD)
        return self.now > row.expires_at and not in_flight and not kept_out

    def free(self, row: Row) -> bool:
        if self.expired(row) or row.state is State.RELEASED:
            return True
        return self.lapsed(row) and row.claim.lapse is Lapse.RELEASE

    def expected(self, digest: bytes) -> Record | None:
        row = self.rows.get(digest)
        if row is None:
            return None
        done = row.completion
        return Record(
            digest=digest,
            token=row.claim.token,
            state=row.state,
            fingerprint=row.claim.fingerprint,
            fingerprint_version=row.claim.fingerprint_version,
            attempt=row.attempt,
            lapse=row.claim.lapse,
            lapsed=self.lapsed(row),
            past_retention=self.now > row.expires_at,
            age=self.now - row.created_at,
            lease_left=row.lease_until - self.now,
            status=None if done is None else done.status,
            headers=() if done is None else done.headers,
            body=None if done is None else done.body,
            not_replayable=None if done is None else done.not_replayable,
        )

    def check(self, record: Record | None, expected: Record | None) -> None:
        if record is not None and expected is not None:
            assert abs(record.age - expected.age) < TOLERANCE
            assert abs(record.lease_left - expected.lease_left) < TOLERANCE
            record = dataclasses.replace(record, age=expected.age, lease_left=expected.lease_left)
        assert record == expected

    def granted(self, claim: Claim, attempt: int, created_at: float) -> None:
        self.rows[claim.digest] = Row(
            claim=claim,
            attempt=attempt,
            state=State.CLAIMED,
            created_at=created_at,
            lease_until=self.now + claim.lease,
            expires_at=self.now + claim.retention,
        )

    def new_claim(self, digest: bytes, lease: float, retention: float, lapse: Lapse) -> Claim:
        token = next(self.tokens).to_bytes(16, "big")
        return Claim(
            digest=digest,
            token=token,
            fingerprint=b"payload of " + token,
            fingerprint_version=token[-1] % 3,
            scope="alice",
            key="a key",
            method="POST",
            path="/charges",
            lease=lease,
            retention=retention,
            lapse=lapse,
        )

    def ours(self, claim: Claim, *states: State) -> Row | None:
        row = self.rows.get(claim.digest)
        if row is None or row.claim.token != claim.token or row.state not in states:
            return None
        return row

    # What can be asked.

    @rule(target=claims, digest=digests, lease=leases, retention=retentions, lapse=lapses)
    def claim(self, digest: bytes, lease: float, retention: float, lapse: Lapse) -> Claim:
        claim = self.new_claim(digest, lease, retention, lapse)
        self.claim_again(claim)
        return claim

    @rule(claim=claims)
    def claim_again(self, claim: Claim) -> None:
        answer = self.store.claim(claim)
        mine = self.ours(claim, State.CLAIMED)
        if claim.digest not in self.rows:
            assert answer == Claimed(1)
            self.granted(claim, 1, self.now)
        elif mine is not None:
            assert answer == Claimed(mine.attempt)
        else:
            assert isinstance(answer, Record)
            self.check(answer, self.expected(claim.digest))

    @rule(target=seen, digest=digests)
    def look(self, digest: bytes) -> Any:
        record = self.store.lookup(digest)
        return multiple() if record is None else record

    @rule(target=claims, record=seen, lease=leases, retention=retentions, lapse=lapses)
    def take_over(self, record: Record, lease: float, retention: float, lapse: Lapse) -> Claim:
        heir = self.new_claim(record.digest, lease, retention, lapse)
        answer = self.store.take_over(heir, record)
        row = self.rows.get(record.digest)
        if row is None or row.claim.token != record.token or not self.free(row):
            assert answer is None
        elif self.expired(row):
            assert answer == Claimed(1)
            self.granted(heir, 1, self.now)
        else:
            assert answer == Claimed(row.attempt + 1)
            self.granted(heir, row.attempt + 1, row.created_at)
        return heir

    @initialize(target=claims, story=stories)
    def begin(self, story: list[Event]) -> Any:
        return self.live(story)

    @rule(target=claims, story=stories)
    def live(self, story: list[Event]) -> Any:
        """What happens to a key when everybody knows its row as it is.

        The other rules ask with tokens and records of any age, most of them out of date.
        """
        made = []
        for event in story:
            record = self.store.lookup(event.digest)
            if event.what == "time goes by":
                self.let_time_go_by(event.minutes)
            elif record is None:
                made.append(self.claim(event.digest, event.lease, event.retention, event.lapse))
            elif event.what == "take over":
                made.append(self.take_over(record, event.lease, event.retention, event.lapse))
            elif event.what == "renew":
                self.renew([self.rows[event.digest].claim], [event.lease])
            else:
                self.settle(self.rows[event.digest].claim, event.what)
            self.every_row_is_as_the_model_has_it()
        return multiple(*made)

    @rule(claim=claims, way=ways)
    def settle(self, claim: Claim, way: str) -> None:
        {
            "complete": self.complete,
            "release": self.release,
            "hold": self.hold,
            "forget": self.forget,
        }[way](claim)

    def complete(self, claim: Claim) -> None:
        streamed = claim.token[-1] % 2 == 0
        completion = Completion(
            "201 Created",
            (("X-Token", claim.token.hex()), ("Set-Up", "1"), ("X-Token", "2")),
            None if streamed else claim.token,
            not_replayable="streamed" if streamed else None,
        )
        row = self.ours(claim, State.CLAIMED, State.HELD, State.COMPLETED)
        assert self.store.complete(claim.digest, claim.token, completion) is (row is not None)
        if row is not None:
            self.rows[claim.digest] = dataclasses.replace(
                row, state=State.COMPLETED, completion=completion
            )

    def release(self, claim: Claim) -> None:
        row = self.ours(claim, State.CLAIMED, State.HELD, State.RELEASED)
        assert self.store.release(claim.digest, claim.token) is (row is not None)
        if row is not None:
            self.rows[claim.digest] = dataclasses.replace(row, state=State.RELEASED)

    def hold(self, claim: Claim) -> None:
        row = self.ours(claim, State.CLAIMED, State.HELD)
        assert self.store.hold(claim.digest, claim.token) is (row is not None)
        if row is not None:
            self.rows[claim.digest] = dataclasses.replace(row, state=State.HELD)

    def forget(self, claim: Claim) -> None:
        row = self.ours(claim, State.CLAIMED, State.HELD)
        assert self.store.forget(claim.digest, claim.token) is (row is not None)
        if row is not None:
            del self.rows[claim.digest]

    @rule(
        some=st.lists(claims, max_size=4, unique_by=lambda claim: claim.token),
        many=st.lists(leases, min_size=4, max_size=4),
    )
    def renew(self, some: list[Claim], many: list[float]) -> None:
        kept = self.store.renew(
            [(claim.digest, claim.token, lease) for claim, lease in zip(some, many, strict=False)]
        )
        expected = set()
        for claim, lease in zip(some, many, strict=False):
            row = self.ours(claim, State.CLAIMED, State.HELD)
            if row is not None:
                expected.add(claim.token)
                until = self.now + lease
                if row.state is State.HELD:
                    until = max(until, row.lease_until)
                self.rows[claim.digest] = dataclasses.replace(row, lease_until=until)
        assert kept == expected

    @rule(limit=st.integers(1, 4))
    def purge(self, limit: int) -> None:
        due = {digest: row for digest, row in self.rows.items() if self.expired(row)}
        assert self.store.purge(limit) == min(limit, len(due))
        left = {digest for digest in due if self.store.lookup(digest) is not None}
        assert len(left) == max(0, len(due) - limit)
        gone = due.keys() - left
        for digest in gone:
            assert all(due[digest].expires_at <= due[other].expires_at for other in left)
            del self.rows[digest]

    @rule(minutes=minutes)
    def let_time_go_by(self, minutes: int) -> None:
        self.now += 60.0 * minutes
        self.bench.advance(60.0 * minutes)

    @rule()
    def close(self) -> None:
        self.store.close()

    @invariant()
    def every_row_is_as_the_model_has_it(self) -> None:
        for digest in DIGESTS:
            self.check(self.store.lookup(digest), self.expected(digest))


def run(bench: Bench, *, examples: int, steps: int) -> None:
    machine = type("StoreMachine", (Machine,), {"bench": bench})
    run_state_machine_as_test(
        machine,
        settings=hypothesis.settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,  # a database answers when it answers
            # To say which choices matter to a failure takes minutes on a database.
            phases=[Phase.reuse, Phase.generate, Phase.shrink],
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


def test_memory_answers_as_the_model_does() -> None:
    """Claims, take-overs, settlements, renewals and purges, in any order, at any time."""
    run(MemoryBench(), examples=200, steps=30)


def test_sqlite_answers_as_the_model_does(sqlite_url: str) -> None:
    """Claims, take-overs, settlements, renewals and purges, in any order, at any time."""
    run(SQLBench(sqlite_url), examples=50, steps=20)


def test_postgresql_answers_as_the_model_does(pg_database: str) -> None:
    """Claims, take-overs, settlements, renewals and purges, in any order, at any time."""
    run(SQLBench(pg_database), examples=50, steps=20)
