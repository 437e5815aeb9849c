"""What an operator asks of a database: operations of unknown outcome, found and resolved."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from apps.shop import at_once, query
from sqlalchemy.engine import make_url
from unresolved import OVER, age_rows, held, lapsed

from wsgi_idempotency import SQLStore
from wsgi_idempotency.errors import (
    CorruptRecord,
    NotResolvable,
    NotStorable,
    SchemaError,
    StoreUnavailable,
)
from wsgi_idempotency.records import (
    Claim,
    Claimed,
    Completion,
    Lapse,
    Record,
    State,
    StoredResponse,
)
from wsgi_idempotency.stores.resolving import Details, Resolution, Resolver, completion_of
from wsgi_idempotency.testing import make_claim, until

FORGET, RELEASE, COMPLETE = Resolution.FORGET, Resolution.RELEASE, Resolution.COMPLETE

HOUR = 3600.0

RESPONSE = StoredResponse("201 Made It", (("Location", "/1"), ("Link", "<2>")), b"\x00made")
DONE = Completion("200 OK", (), b"by its worker")


@pytest.fixture
def resolver(store: SQLStore) -> Resolver:
    return Resolver(store)


def released(store: SQLStore) -> Claim:
    claim = make_claim()
    store.claim(claim)
    assert store.release(claim.digest, claim.token) is True
    return claim


def in_flight(store: SQLStore) -> Claim:
    claim = make_claim()
    store.claim(claim)
    return claim


def completed(store: SQLStore) -> Claim:
    claim = make_claim()
    store.claim(claim)
    assert store.complete(claim.digest, claim.token, DONE) is True
    return claim


RESOLVABLE: dict[str, Callable[[SQLStore], Claim]] = {
    "held": held,
    "held past its retention": lambda store: held(store, retention=-HOUR, lease=OVER),
    "released": released,
    "lapsed and to be released": lapsed,
    "lapsed and to be held": lambda store: lapsed(store, lapse=Lapse.HOLD),
    "lapsed and to be held past its retention": lambda store: lapsed(
        store, lapse=Lapse.HOLD, retention=-HOUR
    ),
}
each_resolvable = pytest.mark.parametrize("arrange", RESOLVABLE.values(), ids=list(RESOLVABLE))
each_action = pytest.mark.parametrize("action", Resolution, ids=lambda action: action.value)


def resolve(
    resolver: Resolver, claim: Claim, action: Resolution, *, seen: bytes | None = None, **more: Any
) -> None:
    resolver.resolve(
        claim.digest,
        claim.token if seen is None else seen,
        action,
        actor="ann",
        reason="the bank says so",
        response=RESPONSE if action is COMPLETE else None,
        **more,
    )


def details(resolver: Resolver, claim: Claim) -> Details:
    found = resolver.details(claim.digest)
    assert found is not None
    return found


def row(store: SQLStore, claim: Claim) -> Record:
    found = store.lookup(claim.digest)
    assert found is not None
    return found


def audit(url: str) -> list[dict[str, Any]]:
    return query(url, "SELECT * FROM idempotency_resolutions ORDER BY resolved_at")


# ---------------------------------------------------------------------- resolving


@each_resolvable
def test_a_forgotten_operation_is_a_fresh_key(
    store: SQLStore, resolver: Resolver, arrange: Callable[[SQLStore], Claim]
) -> None:
    claim = arrange(store)
    resolve(resolver, claim, FORGET)
    assert store.lookup(claim.digest) is None
    assert store.claim(make_claim(fingerprint=b"corrected")) == Claimed(1)


@each_resolvable
def test_a_released_operation_may_be_run_again_by_the_same_request(
    store: SQLStore, resolver: Resolver, arrange: Callable[[SQLStore], Claim]
) -> None:
    """As attempt 2, with the fingerprint that tells another request apart; also when it was
    held for longer than it was to be remembered."""
    claim = arrange(store)
    resolve(resolver, claim, RELEASE)
    record = row(store, claim)
    assert (record.state, record.fingerprint) == (State.RELEASED, claim.fingerprint)
    expired = claim.retention < 0
    assert record.expired is expired
    assert store.take_over(make_claim(), record) == Claimed(1 if expired else 2)


@each_resolvable
def test_a_completed_operation_is_replayed_from_now_on(
    store: SQLStore, resolver: Resolver, arrange: Callable[[SQLStore], Claim]
) -> None:
    claim = arrange(store)
    resolve(resolver, claim, COMPLETE)
    record = store.claim(make_claim())
    assert isinstance(record, Record)
    assert record.state is State.COMPLETED
    assert (record.status, record.body) == (RESPONSE.status, RESPONSE.body)
    assert record.headers == RESPONSE.headers
    found = details(resolver, claim)
    assert found.completed_at is not None
    assert abs(found.completed_at - resolver.now()) < 60


@pytest.mark.parametrize("action", [RELEASE, COMPLETE], ids=["released", "completed"])
def test_what_was_held_for_longer_than_its_retention_is_remembered_anew(
    database: str, store: SQLStore, resolver: Resolver, action: Resolution
) -> None:
    """Otherwise it would be absent at once, and the next retry would run it again."""
    claim = held(store, lease=OVER, retention=HOUR)
    age_rows(database, 3 * HOUR)
    assert row(store, claim).past_retention is True
    resolve(resolver, claim, action)
    record = row(store, claim)
    assert (record.past_retention, record.expired) == (False, False)
    left = details(resolver, claim).expires_at - resolver.now()
    assert HOUR - 60 < left <= HOUR
    assert store.purge(10) == 0


@each_resolvable
@each_action
def test_a_slow_worker_changes_nothing_once_its_operation_is_resolved(
    store: SQLStore,
    resolver: Resolver,
    action: Resolution,
    arrange: Callable[[SQLStore], Claim],
) -> None:
    """It is fenced off by a new token, or by there being no row."""
    claim = arrange(store)
    resolve(resolver, claim, action)
    before = resolver.details(claim.digest)
    own = (claim.digest, claim.token)
    assert store.complete(*own, DONE) is False
    assert store.release(*own) is False
    assert store.hold(*own) is False
    assert store.forget(*own) is False
    assert store.renew([(*own, 60.0)]) == set()
    after = resolver.details(claim.digest)
    if before is None:
        assert after is None
    else:
        assert after is not None
        assert before.token != claim.token
        assert replace(after, age=0, lease_left=0) == replace(before, age=0, lease_left=0)


@each_action
def test_a_resolution_is_on_record_with_all_that_a_person_needs(
    database: str, store: SQLStore, resolver: Resolver, action: Resolution
) -> None:
    claim = held(store, scope="alice", key="k-1", method="PATCH", path="/pay")
    resolve(resolver, claim, action)
    [made] = resolver.resolutions(claim.digest)
    assert (made.actor, made.reason, made.action) == ("ann", "the bank says so", action)
    assert (made.scope, made.key, made.method, made.path) == ("alice", "k-1", "PATCH", "/pay")
    assert (made.digest, made.attempt) == (claim.digest, 1)
    assert made.status == (RESPONSE.status if action is COMPLETE else None)
    assert abs(made.resolved_at - resolver.now()) < 60
    [stored] = audit(database)
    if action is not FORGET:
        assert stored["id"] == details(resolver, claim).token


def test_resolutions_are_in_their_order_and_each_operation_has_its_own(
    store: SQLStore, resolver: Resolver
) -> None:
    other = held(store, "another")
    claim = held(store)
    resolve(resolver, claim, RELEASE)
    resolve(resolver, claim, COMPLETE, seen=details(resolver, claim).token)
    resolve(resolver, other, FORGET)
    made = resolver.resolutions(claim.digest)
    assert [one.action for one in made] == [RELEASE, COMPLETE]
    assert [one.action for one in resolver.resolutions(other.digest)] == [FORGET]


@pytest.mark.parametrize(
    ("arrange", "said"),
    [
        (in_flight, "is in flight: attempt 1 has a lease that runs for another"),
        (completed, r"is completed \(200 OK\): there is nothing to resolve"),
        (make_claim, "no such operation any more"),
    ],
    ids=["in flight", "completed", "gone"],
)
@each_action
def test_what_is_not_open_is_not_resolved(
    database: str,
    store: SQLStore,
    resolver: Resolver,
    action: Resolution,
    arrange: Callable[..., Claim],
    said: str,
) -> None:
    """It says why; nothing changes and nothing is on record."""
    claim = make_claim() if arrange is make_claim else arrange(store)
    before = query(database, "SELECT * FROM idempotency_keys")
    with pytest.raises(NotResolvable, match=said):
        resolve(resolver, claim, action)
    assert query(database, "SELECT * FROM idempotency_keys") == before
    assert audit(database) == []


@each_action
def test_what_has_changed_since_it_was_seen_is_not_resolved(
    database: str, store: SQLStore, resolver: Resolver, action: Resolution
) -> None:
    """Somebody has run it meanwhile, and it was held again."""
    claim = released(store)
    heir = make_claim()
    store.take_over(heir, row(store, claim))
    store.hold(heir.digest, heir.token)
    with pytest.raises(NotResolvable, match="not as it was seen: look at it again"):
        resolve(resolver, claim, action)
    assert (row(store, claim).state, row(store, claim).token) == (State.HELD, heir.token)
    assert audit(database) == []


def test_a_claim_in_flight_is_resolved_by_whom_it_belongs_to(
    store: SQLStore, resolver: Resolver
) -> None:
    claim = in_flight(store)
    resolve(resolver, claim, COMPLETE, mine=True)
    assert row(store, claim).body == RESPONSE.body


@pytest.mark.parametrize("token", [b"t" * 16, None], ids=["somebody else's", "its own"])
def test_a_completed_operation_is_not_anybody_s_claim(
    store: SQLStore, resolver: Resolver, token: bytes | None
) -> None:
    claim = completed(store)
    with pytest.raises(NotResolvable):
        resolve(resolver, claim, FORGET, seen=token, mine=True)
    assert row(store, claim).body == DONE.body


@pytest.mark.parametrize(
    "text", ["a\x00b", "a\ud800b", "Zürich \N{PILE OF POO}", "'; -- %s :x {0}", "x" * 100_000]
)
def test_no_actor_or_reason_is_beyond_the_record(
    store: SQLStore, resolver: Resolver, text: str
) -> None:
    claim = held(store)
    resolver.resolve(claim.digest, claim.token, FORGET, actor=text, reason=text)
    [made] = resolver.resolutions(claim.digest)
    shown = text.replace("\x00", "\\x00").replace("\ud800", "\\ud800")
    assert (made.actor, made.reason) == (shown, shown)


# ---------------------------------------------------------------------- responses


@pytest.mark.parametrize(
    ("response", "said"),
    [
        (replace(RESPONSE, status="Created"), "status line was not valid HTTP"),
        (replace(RESPONSE, status="201 Made\nIt"), "status line was not valid HTTP"),
        (replace(RESPONSE, status="600 Odd"), "status line was not valid HTTP"),
        (replace(RESPONSE, status=201), "use a text like"),
        (replace(RESPONSE, headers=(("X-A", "a\r\nSet-Cookie: b"),)), "a header field was not"),
        (replace(RESPONSE, headers=(("X A", "b"),)), "a header field was not"),
        (replace(RESPONSE, body="made"), "with a body of bytes"),
        (replace(RESPONSE, body=b"x" * 101), "101 bytes, more than the 100 allowed"),
        (replace(RESPONSE, status="429 Slow Down"), "never replayed"),
        (replace(RESPONSE, status="401 Who?"), "never replayed"),
        (replace(RESPONSE, status="206 Part"), "never replayed"),
        (("201 Created", (), b""), "is not a StoredResponse"),
    ],
    ids=["a status without a code", "a status of two lines", "a status no server sends",
         "a number", "a header that smuggles another", "a header whose name has a space", "text",
         "a large body", "too many requests", "no credentials", "a part", "another type"],
)  # fmt: skip
def test_a_response_is_judged_as_a_handler_s(
    store: SQLStore, resolver: Resolver, response: Any, said: str
) -> None:
    claim = held(store)
    with pytest.raises(NotStorable, match=said):
        resolver.resolve(
            claim.digest, claim.token, COMPLETE, actor="ann", reason="so", response=response,
            max_response_bytes=100,
        )  # fmt: skip
    assert row(store, claim).state is State.HELD
    assert resolver.resolutions(claim.digest) == []


def test_a_response_may_be_as_large_as_is_allowed() -> None:
    assert completion_of(replace(RESPONSE, body=b"x" * 100), 100).body == b"x" * 100


def test_what_a_handler_s_response_would_not_keep_is_left_out() -> None:
    headers = [("Date", "now"), ("ETag", "1"), ("Set-Cookie", "a=b"), ("etag", "2")]
    made = completion_of(replace(RESPONSE, headers=headers))
    assert made.headers == (("ETag", "1"), ("etag", "2"))


@pytest.mark.parametrize("action", [FORGET, RELEASE], ids=["forget", "release"])
def test_only_a_completion_has_a_response(
    store: SQLStore, resolver: Resolver, action: Resolution
) -> None:
    claim = held(store)
    own = (claim.digest, claim.token)
    with pytest.raises(ValueError, match="belongs to COMPLETE"):
        resolver.resolve(*own, action, actor="ann", reason="so", response=RESPONSE)
    with pytest.raises(ValueError, match="belongs to COMPLETE"):
        resolver.resolve(*own, COMPLETE, actor="ann", reason="so")
    assert row(store, claim).state is State.HELD


# ---------------------------------------------------------------------- at once


@each_action
def test_either_a_slow_worker_completes_or_a_person_resolves(
    database: str, store: SQLStore, resolver: Resolver, action: Resolution
) -> None:
    """Never both, and what is on record is what became of it."""
    claims = [held(store, f"key {number}", lease=OVER) for number in range(15)]
    other = SQLStore(database)
    won = []
    for claim in claims:

        def race(who: int, claim: Claim = claim) -> bool:
            if who == 0:
                return other.complete(claim.digest, claim.token, DONE)
            try:
                resolve(resolver, claim, action)
            except NotResolvable:
                return False
            return True

        by_worker, by_person = at_once(2, race)
        assert by_worker is not by_person
        won.append(by_worker)
        record = store.lookup(claim.digest)
        if by_worker:
            assert record is not None
            assert record.body == DONE.body
            assert resolver.resolutions(claim.digest) == []
        else:
            assert [one.action for one in resolver.resolutions(claim.digest)] == [action]
            if action is FORGET:
                assert record is None
            else:
                assert record is not None
                assert record.body == (RESPONSE.body if action is COMPLETE else None)
    other.close()


def test_one_of_many_persons_resolves(database: str, store: SQLStore, resolver: Resolver) -> None:
    for number in range(10):
        claim = held(store, f"key {number}")

        def race(who: int, claim: Claim = claim) -> bool:
            try:
                resolve(resolver, claim, (FORGET, RELEASE, COMPLETE)[who])
            except NotResolvable:
                return False
            return True

        won = at_once(3, race)
        assert sum(won) == 1
        [made] = resolver.resolutions(claim.digest)
        assert won[(FORGET, RELEASE, COMPLETE).index(made.action)]


def test_a_live_claim_is_not_resolved_while_its_heartbeat_renews_it(
    store: SQLStore, resolver: Resolver
) -> None:
    """However often somebody tries, on either side of its renewals."""
    claim = make_claim(lease=5)
    store.claim(claim)
    over = threading.Event()

    def beat() -> int:
        beats = 0
        while not over.is_set() or not beats:
            assert store.renew([(claim.digest, claim.token, 5.0)]) == {claim.token}
            beats += 1
        return beats

    def try_to() -> int:
        try:
            for _ in range(20):
                with pytest.raises(NotResolvable, match="in flight"):
                    resolve(resolver, claim, FORGET)
        finally:
            over.set()
        return 0

    beats, _ = at_once(2, lambda who: (beat, try_to)[who]())
    assert beats > 0
    assert store.complete(claim.digest, claim.token, DONE) is True


def test_a_lapsed_claim_is_either_renewed_or_resolved(
    database: str, store: SQLStore, resolver: Resolver
) -> None:
    other = SQLStore(database)
    for number in range(15):
        claim = lapsed(store, f"key {number}", lapse=Lapse.HOLD)

        def race(who: int, claim: Claim = claim) -> bool:
            if who == 0:
                return other.renew([(claim.digest, claim.token, 60.0)]) == {claim.token}
            try:
                resolve(resolver, claim, RELEASE)
            except NotResolvable:
                return False
            return True

        renewed, resolved = at_once(2, race)
        assert renewed is not resolved
        assert row(store, claim).state is (State.CLAIMED if renewed else State.RELEASED)
    other.close()


# ---------------------------------------------------------------------- answers that were lost


@each_action
def test_a_resolution_whose_answer_was_lost_is_not_made_twice(
    database: str,
    store: SQLStore,
    resolver: Resolver,
    action: Resolution,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The store asks again on a new connection, and it finds its own work done."""
    claim = held(store)
    call = store._call

    def twice(work: Callable[..., Any]) -> Any:
        call(work)
        return call(work)

    monkeypatch.setattr(store, "_call", twice)
    resolve(resolver, claim, action)
    monkeypatch.undo()
    assert [one.action for one in resolver.resolutions(claim.digest)] == [action]


@contextmanager
def refusing(url: str, event: str, table: str, sqlstate: str = "P0001") -> Iterator[None]:
    """Let the database refuse an event."""
    if url.startswith("sqlite"):
        query(
            url,
            f"CREATE TRIGGER refuse BEFORE {event} ON {table}"
            " BEGIN SELECT RAISE(ABORT, 'refused'); END",
        )
        yield
        query(url, "DROP TRIGGER refuse")
        return
    query(
        url,
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN RAISE 'refused' USING ERRCODE = '{sqlstate}'; END $$;"
        f"CREATE TRIGGER refuse BEFORE {event} ON {table} FOR EACH ROW EXECUTE FUNCTION refuse()",
    )
    yield
    query(url, "DROP FUNCTION refuse() CASCADE")


@pytest.mark.parametrize("refused", ["the record", "the change"])
@each_action
def test_a_row_and_its_record_change_together_or_not_at_all(
    database: str, store: SQLStore, resolver: Resolver, action: Resolution, refused: str
) -> None:
    claim = held(store)
    event, table = "INSERT", "idempotency_resolutions"
    if refused == "the change":
        event, table = "DELETE" if action is FORGET else "UPDATE", "idempotency_keys"
    with (
        refusing(database, event, table),
        pytest.raises(StoreUnavailable, match="refused"),
    ):
        resolve(resolver, claim, action)
    assert (row(store, claim).state, row(store, claim).token) == (State.HELD, claim.token)
    assert audit(database) == []
    store.renew([(claim.digest, claim.token, 1.0)])  # nobody is locked out


@pytest.mark.parametrize("sqlstate", ["40001", "P0001"])
def test_what_can_not_be_serialized_was_somebody_else_s(pg_database: str, sqlstate: str) -> None:
    store = SQLStore(pg_database)
    resolver = Resolver(store)
    claim = held(store, lease=OVER)
    with refusing(pg_database, "UPDATE", "idempotency_keys", sqlstate):
        if sqlstate == "40001":
            with pytest.raises(NotResolvable, match="not as it was seen"):
                resolve(resolver, claim, RELEASE)
            assert take_up(resolver, claim) is None
        else:
            with pytest.raises(StoreUnavailable, match="refused"):
                resolve(resolver, claim, RELEASE)
            with pytest.raises(StoreUnavailable, match="refused"):
                take_up(resolver, claim)
    assert take_up(resolver, claim) is not None
    store.close()


# ---------------------------------------------------------------------- looking


def test_details_are_those_of_the_row(store: SQLStore, resolver: Resolver) -> None:
    claim = make_claim(lease=60, retention=HOUR, scope="bob", method="PATCH", path="/b")
    store.claim(claim)
    until(lambda: details(resolver, claim).age > 0.05)
    found = details(resolver, claim)
    assert (found.digest, found.token, found.attempt) == (claim.digest, claim.token, 1)
    assert (found.scope, found.key, found.method, found.path) == ("bob", "a key", "PATCH", "/b")
    assert (found.state, found.lapse) == (State.CLAIMED, Lapse.RELEASE)
    assert (found.lapsed, found.past_retention, found.held) == (False, False, False)
    assert 0.05 < found.age < 20
    assert 30 < found.lease_left < 60
    assert abs(found.created_at + found.age - resolver.now()) < 20
    assert abs(found.lease_until - found.created_at - 60) < 0.01
    assert abs(found.expires_at - found.created_at - HOUR) < 0.01
    assert (found.completed_at, found.status, found.body_bytes) == (None, None, None)
    store.complete(claim.digest, claim.token, replace(DONE, headers=(("A", "b"),)))
    found = details(resolver, claim)
    assert found.completed_at is not None
    assert found.created_at < found.completed_at < found.created_at + 20
    assert (found.status, found.body_bytes, found.not_replayable) == ("200 OK", 13, None)
    assert claim.token.hex() not in repr(found)
    assert repr(claim.token) not in repr(found)


def test_there_are_no_details_of_what_is_not_there(resolver: Resolver) -> None:
    assert resolver.details(b"d" * 32) is None
    assert resolver.resolutions(b"d" * 32) == []


@pytest.mark.parametrize(
    ("arrange", "is_held"),
    [
        (held, True),
        (lambda store: lapsed(store, lapse=Lapse.HOLD), True),
        (lapsed, False),
        (released, False),
        (lambda store: in_flight(store), False),
        (completed, False),
    ],
    ids=["held", "lapsed where a lapse holds", "lapsed where a lapse releases", "released",
         "in flight", "completed"],
)  # fmt: skip
def test_what_is_held_is_what_retries_are_told(
    store: SQLStore, resolver: Resolver, arrange: Callable[[SQLStore], Claim], is_held: bool
) -> None:
    claim = arrange(store)
    assert details(resolver, claim).held is is_held
    assert bool(resolver.unresolved(held=True, lapsed=False)) is is_held


def test_a_key_is_found_in_its_scope_or_in_all(store: SQLStore, resolver: Resolver) -> None:
    for scope in ("alice", "bob"):
        for key in ("k", "K"):
            claim = held(store, f"{scope} {key}", scope=scope, key=key)
            until(lambda claim=claim: details(resolver, claim).age > 0)
    assert [found.scope for found in resolver.find("k")] == ["alice", "bob"]
    assert [found.key for found in resolver.find("K", "bob")] == ["K"]
    assert resolver.find("k", "eve") == []
    assert resolver.find("x") == []
    assert [found.scope for found in resolver.find("k", limit=1)] == ["alice"]


@pytest.mark.parametrize("text", ["a\x00b", "a\udcffb", "Zürich", "%s :x"])
def test_a_key_is_found_by_what_was_stored_of_it(
    store: SQLStore, resolver: Resolver, text: str
) -> None:
    claim = held(store, key=text, scope=text)
    assert [found.digest for found in resolver.find(text, text)] == [claim.digest]


def some_of_each(store: SQLStore) -> None:
    held(store, "held")
    held(store, "long held", lease=OVER, retention=OVER)
    lapsed(store, "to be released")
    lapsed(store, "to be held", lapse=Lapse.HOLD)
    lapsed(store, "to be held for long", lapse=Lapse.HOLD, retention=OVER)
    lapsed(store, "absent", retention=OVER)
    for name, ending in (("in flight", None), ("released", store.release)):
        claim = make_claim(name)
        store.claim(claim)
        if ending:
            ending(claim.digest, claim.token)
    done = make_claim("completed", lease=OVER)
    store.claim(done)
    store.complete(done.digest, done.token, DONE)


HELD = ["held", "long held", "to be held", "to be held for long"]
LAPSED = ["to be released", "to be held", "to be held for long"]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"held": True, "lapsed": False}, HELD),
        ({"held": False, "lapsed": True}, LAPSED),
        ({}, [*HELD[:2], *LAPSED]),
        ({"held": False, "lapsed": False}, []),
    ],
    ids=["held", "lapsed", "both", "neither"],
)
def test_what_is_unresolved_is_found_and_nothing_else(
    store: SQLStore, resolver: Resolver, wanted: dict[str, bool], expected: list[str]
) -> None:
    some_of_each(store)
    assert sorted(found.key for found in resolver.unresolved(**wanted)) == sorted(expected)


def test_the_oldest_comes_first(database: str, store: SQLStore, resolver: Resolver) -> None:
    for name in "cab":
        held(store, name)
    age_rows(database, 0, each=1)
    assert [found.key for found in resolver.unresolved()] == ["a", "b", "c"]


@pytest.mark.parametrize("gone", [False, True], ids=["is there", "has gone meanwhile"])
def test_pages_go_on_where_the_last_one_ended(
    database: str, store: SQLStore, resolver: Resolver, gone: bool
) -> None:
    """Whether its last row is there still or not, and where several are of one age."""
    claims = [held(store, f"key {number}") for number in range(7)]
    same = "(SELECT min(created_at) FROM idempotency_keys)"
    query(database, f"UPDATE idempotency_keys SET created_at = {same}")
    seen: list[Details] = []
    while page := resolver.unresolved(limit=2, after=seen[-1] if seen else None):
        assert len(page) <= 2
        seen += page
        if gone:
            resolve(resolver, next(c for c in claims if c.digest == page[-1].digest), FORGET)
        assert len(seen) <= len(claims)
    assert sorted(found.digest for found in seen) == sorted(claim.digest for claim in claims)


def test_a_row_that_makes_no_sense_is_said(sqlite_url: str) -> None:
    store = SQLStore(sqlite_url)
    claim = held(store)
    with sqlite3.connect(make_url(sqlite_url).database or "") as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute("UPDATE idempotency_keys SET state = 'lost'")
    connection.close()
    with pytest.raises(CorruptRecord, match=claim.digest.hex()[:2]):
        Resolver(store).details(claim.digest)
    store.close()


def test_a_schema_without_the_record_is_said(pg_database: str) -> None:
    store = SQLStore(pg_database)
    claim = held(store)
    query(pg_database, "ALTER TABLE idempotency_resolutions RENAME TO elsewhere")
    try:
        with pytest.raises(SchemaError, match="wsgi-idempotency upgrade"):
            resolve(Resolver(store), claim, FORGET)
    finally:
        query(pg_database, "ALTER TABLE elsewhere RENAME TO idempotency_resolutions")
    assert store.lookup(claim.digest) is not None
    store.close()


# ---------------------------------------------------------------------- taking up


def take_up(resolver: Resolver, claim: Claim, seconds: float = 60) -> Details | None:
    return resolver.take_up(claim.digest, cutoff=resolver.now(), seconds=seconds)


def test_what_is_due_is_what_is_held_or_has_lapsed(store: SQLStore, resolver: Resolver) -> None:
    some_of_each(store)
    due = {resolver_key(resolver, digest) for digest in resolver.due(resolver.now(), limit=100)}
    assert due == {"long held", *LAPSED}
    assert len(resolver.due(resolver.now(), limit=2)) == 2
    assert resolver.due(resolver.now() - HOUR, limit=100) == []


def resolver_key(resolver: Resolver, digest: bytes) -> str:
    found = resolver.details(digest)
    assert found is not None
    return found.key


def test_what_is_longest_due_comes_first(
    database: str, store: SQLStore, resolver: Resolver
) -> None:
    first = held(store, "first", lease=-5)
    last = held(store, "last", lease=-1)
    middle = lapsed(store, "middle", lapse=Lapse.HOLD)
    query(
        database,
        "UPDATE idempotency_keys SET lease_until = lease_until"
        + (" - interval '3 seconds'" if database.startswith("postgresql") else " - 3")
        + " WHERE idempotency_key = 'middle'",
    )
    expected = [first.digest, middle.digest, last.digest]
    assert resolver.due(resolver.now(), limit=9) == expected


@pytest.mark.parametrize(
    "arrange",
    [lambda store: held(store, lease=OVER), lambda store: lapsed(store, lapse=Lapse.HOLD)],
    ids=["held", "lapsed where a lapse holds"],
)
def test_what_is_held_keeps_its_worker_s_token_while_somebody_looks(
    store: SQLStore, resolver: Resolver, arrange: Callable[[SQLStore], Claim]
) -> None:
    """A worker that was only slow may complete it."""
    claim = arrange(store)
    found = take_up(resolver, claim)
    assert found is not None
    assert (found.state, found.token, found.attempt) == (State.HELD, claim.token, 1)
    assert 30 < found.lease_left <= 60
    assert take_up(resolver, claim) is None, "the look is taken"
    assert store.complete(claim.digest, claim.token, DONE) is True
    with pytest.raises(NotResolvable, match="is completed"):
        resolve(resolver, claim, FORGET)


def test_what_a_lapse_releases_is_the_looker_s_claim_and_no_attempt(
    store: SQLStore, resolver: Resolver
) -> None:
    """No retry runs beside the verdict; afterwards the next is attempt 2."""
    claim = lapsed(store)
    found = take_up(resolver, claim)
    assert found is not None
    assert (found.state, found.attempt, found.lapsed) == (State.CLAIMED, 1, False)
    assert found.token != claim.token
    assert store.take_over(make_claim(), row(store, claim)) is None
    assert store.complete(claim.digest, claim.token, DONE) is False
    assert store.release(claim.digest, found.token) is True
    assert store.take_over(make_claim(), row(store, claim)) == Claimed(2)


def test_a_looker_that_dies_leaves_everything_as_it_found_it(
    store: SQLStore, resolver: Resolver
) -> None:
    """What a lapse releases lapses again, what it holds comes due again."""
    claims = [lapsed(store, "released"), lapsed(store, "held", lapse=Lapse.HOLD)]
    for claim in claims:
        assert take_up(resolver, claim, seconds=OVER) is not None
    assert len(resolver.due(resolver.now(), limit=9)) == 2
    assert store.take_over(make_claim("released"), row(store, claims[0])) == Claimed(2)
    assert row(store, claims[1]).state is State.HELD


def test_what_counts_as_absent_is_not_looked_at(store: SQLStore, resolver: Resolver) -> None:
    claim = lapsed(store, retention=OVER)
    assert take_up(resolver, claim) is None


def test_what_is_locked_is_left_to_whoever_has_it(pg_database: str) -> None:
    """Nobody waits: whatever it is, it changes the row."""
    store = SQLStore(pg_database)
    resolver = Resolver(store)
    claim = held(store, lease=OVER)
    with psycopg.connect(pg_database.replace("+psycopg", "")) as other:
        other.execute("SELECT FROM idempotency_keys FOR UPDATE")
        started = time.monotonic()
        assert take_up(resolver, claim) is None
        assert time.monotonic() - started < 2.5, "it waited for the lock"
        other.rollback()
    assert take_up(resolver, claim) is not None
    store.close()


def test_a_look_may_be_put_off_by_whom_it_belongs_to(store: SQLStore, resolver: Resolver) -> None:
    claim = held(store, lease=OVER)
    assert resolver.back_off(claim.digest, claim.token, seconds=HOUR) is True
    assert details(resolver, claim).lease_left > HOUR - 60
    assert take_up(resolver, claim) is None
    assert resolver.back_off(claim.digest, os.urandom(16), seconds=OVER) is False
    resolve(resolver, claim, RELEASE)
    now = details(resolver, claim).token
    assert resolver.back_off(claim.digest, now, seconds=OVER) is False


def test_the_look_at_each_operation_is_one_looker_s(
    database: str, store: SQLStore, resolver: Resolver
) -> None:
    claims = [held(store, f"key {number}", lease=OVER) for number in range(20)]
    cutoff = resolver.now()
    lookers = [Resolver(SQLStore(database)) for _ in range(3)]

    def look(who: int) -> list[bytes]:
        return [
            claim.digest
            for claim in claims
            if lookers[who].take_up(claim.digest, cutoff=cutoff, seconds=60) is not None
        ]

    taken = [digest for looks in at_once(3, look) for digest in looks]
    assert sorted(taken) == sorted(claim.digest for claim in claims)
    for looker in lookers:
        looker.store.close()
