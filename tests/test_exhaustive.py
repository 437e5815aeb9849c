"""The protocol keeps its promises in every state that a few clients can bring about.

What is searched is in :mod:`exhaustive`: the real middleware, on a model of PostgreSQL's
statements that is itself compared with the statements we send.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy
from exhaustive import clients as asked
from exhaustive.clients import (
    CREATED,
    FAILED,
    RAISES,
    REFUSED,
    STREAMS,
    STREAMS_FAILED,
    Client,
    Duty,
)
from exhaustive.database import (
    CLAIMED,
    COMPLETED,
    HELD,
    RELEASED,
    Database,
    Granted,
    Result,
    Row,
    Wanted,
    bytes_of,
    fresh,
    look,
    record,
)
from exhaustive.search import Found, Search, Situation
from exhaustive.transactions import TransactionSearch

from wsgi_idempotency import (
    Policy,
    SQLStore,
    hold_unknown,
    store_everything,
    store_success,
)
from wsgi_idempotency.middleware import _Request
from wsgi_idempotency.protocol import Outcomes
from wsgi_idempotency.records import Claim, Claimed, Completion, Lapse, Record


def policy(outcomes: Outcomes = store_success, **options: Any) -> Policy:
    return Policy(outcomes=outcomes, lease=1, **options)


def some(count: int, rules: Policy, **options: Any) -> list[Client]:
    return [Client(number, rules, **options) for number in range(count)]


def paying(*payloads: bytes) -> list[Client]:
    return [Client(n, policy(), payload=payload) for n, payload in enumerate(payloads)]


ALL = (CREATED, REFUSED, FAILED, RAISES, STREAMS, STREAMS_FAILED)

SEARCHES: dict[str, dict[str, Any]] = {
    "2 clients, every way to end": {
        "clients": some(2, policy()),
        "ends": ALL,
        "interrupts": True,
    },
    "2 clients that wait, 2 crashes": {
        "clients": some(2, policy(wait=1)),
        "ends": (CREATED, REFUSED, FAILED),
        "crashes": 2,
    },
    "2 clients, 2 answers lost": {
        "clients": some(2, policy()),
        "ends": (CREATED, FAILED),
        "crashes": 0,
        "losses": 2,
    },
    "2 clients, hold_unknown, 2 answers lost": {
        "clients": some(2, policy(hold_unknown)),
        "ends": (CREATED, REFUSED),
        "losses": 2,
    },
    "2 clients, store_everything": {
        "clients": some(2, policy(store_everything)),
        "ends": ALL,
        "interrupts": True,
    },
    "2 clients, hold_unknown": {
        "clients": some(2, policy(hold_unknown)),
        "ends": ALL,
        "interrupts": True,
    },
    "2 clients whose heartbeat may not start": {
        "clients": some(2, policy(hold_unknown), threads_fail=True),
        "ends": (CREATED, FAILED),
        "losses": 0,
    },
    "2 payloads under one key": {
        "clients": paying(b"1", b"2"),
        "ends": (CREATED, REFUSED, FAILED),
    },
    "3 clients, hold_unknown": {
        "clients": some(3, policy(hold_unknown)),
        "ends": (CREATED, REFUSED, FAILED),
    },
    "3 clients, store_everything": {
        "clients": some(3, policy(store_everything)),
        "ends": (CREATED, RAISES),
    },
    "3 clients, a crash": {
        "clients": some(3, policy()),
        "ends": (CREATED, FAILED),
        "losses": 0,
    },
    "3 clients, 2 payloads": {
        "clients": paying(b"1", b"1", b"2"),
        "ends": (CREATED, REFUSED, FAILED),
        "crashes": 0,
        "losses": 0,
    },
}


def told(found: Found) -> str:
    return "\n".join(found.trace)


@pytest.mark.parametrize("name", SEARCHES)
def test_every_promise_holds_in_every_state(
    name: str, capsys: pytest.CaptureFixture[str], record_property: Any
) -> None:
    began = time.monotonic()
    found = Search(**SEARCHES[name]).run()
    took = time.monotonic() - began
    with capsys.disabled():
        print(f"\n{name}: {found.states:,} states, {found.steps:,} steps in {took:.1f} s", end=" ")
    record_property("states", found.states)
    assert found.violation is None, told(found)
    assert found.states > 300


def mixed(*transactions: bool, **options: Any) -> list[Client]:
    """Clients in transaction mode, and clients with leases."""
    rules = {flag: policy(transaction=flag, **options) for flag in (False, True)}
    return [Client(number, rules[flag]) for number, flag in enumerate(transactions)]


TRANSACTIONS: dict[str, dict[str, Any]] = {
    "2 transactions, 2 crashes, 2 answers lost": {
        "clients": mixed(True, True),
        "ends": (CREATED, REFUSED, FAILED, RAISES),
        "crashes": 2,
        "losses": 2,
    },
    "2 transactions that wait": {
        "clients": mixed(True, True, wait=1),
        "ends": (CREATED, FAILED),
    },
    "3 transactions": {"clients": mixed(True, True, True), "ends": (CREATED, FAILED)},
    "a transaction and a lease": {"clients": mixed(True, False), "ends": (CREATED, FAILED)},
    "a transaction and 2 leases": {
        "clients": mixed(True, False, False),
        "ends": (CREATED, FAILED),
        "crashes": 0,
        "losses": 0,
    },
    "2 transactions and a lease": {
        "clients": mixed(True, True, False),
        "ends": (CREATED, FAILED),
        "losses": 0,
    },
}


@pytest.mark.parametrize("name", TRANSACTIONS)
def test_every_promise_holds_in_transaction_mode_too(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is written is recorded, and what is recorded is written, in every state."""
    began = time.monotonic()
    found = TransactionSearch(**TRANSACTIONS[name]).run()
    took = time.monotonic() - began
    with capsys.disabled():
        print(f"\n{name}: {found.states:,} states, {found.steps:,} steps in {took:.1f} s", end=" ")
    assert found.violation is None, told(found)
    assert found.states > 700


@pytest.mark.parametrize(
    ("without", "promise"),
    [
        (("locks",), "prompt"),
        (("locks", "inserts_first"), "P1"),
        (("writes_within",), "P10"),
        (("waits_for_the_lock",), "P10"),
    ],
    ids=[
        "the lock: duplicates wait in the primary key for a handler",
        "the lock and the row: two handlers run",
        "the connection: what is written is not what is recorded",
        "the wait for a lost COMMIT: who was told of nothing is charged",
    ],
)
def test_what_is_taken_out_of_a_transaction_is_missed(
    without: tuple[str, ...], promise: str, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = dict.fromkeys(without, False)
    found = TransactionSearch(mixed(True, True), (CREATED, FAILED), **taken).run()
    with capsys.disabled():
        print("", f"without {without}:", *found.trace, sep="\n    ", end=" ")
    assert found.violation is not None
    assert found.violation.promise == promise


# ---------------------------------------------------------------------- what it finds


class Unfenced(Database):
    """Statements that don't ask for the token."""

    def __init__(self, *statements: str) -> None:
        self._statements = statements

    def _own(self, statement: str, row: Row | None, token: int) -> int:
        return row.token if row is not None and statement in self._statements else token

    def take_over(
        self, row: Row | None, wanted: Wanted, seen: int
    ) -> tuple[Row | None, Granted | None]:
        return super().take_over(row, wanted, self._own("take_over", row, seen))

    def complete(self, row: Row | None, token: int, result: Result) -> tuple[Row | None, bool]:
        return super().complete(row, self._own("complete", row, token), result)

    def release(self, row: Row | None, token: int) -> tuple[Row | None, bool]:
        return super().release(row, self._own("release", row, token))

    def hold(self, row: Row | None, token: int) -> tuple[Row | None, bool]:
        return super().hold(row, self._own("hold", row, token))

    def forget(self, row: Row | None, token: int) -> tuple[Row | None, bool]:
        return super().forget(row, self._own("forget", row, token))

    def renew(self, row: Row | None, token: int) -> Row | None:
        return super().renew(row, self._own("renew", row, token))


class Trusting(Database):
    """Takes over what was free when it was seen."""

    def take_over(
        self, row: Row | None, wanted: Wanted, seen: int
    ) -> tuple[Row | None, Granted | None]:
        if row is None or row.token != seen:
            return row, None
        return fresh(wanted, row.attempt + 1), Granted(row.attempt + 1)


class Confident(Database):
    """Takes it for won when nobody is seen in the way."""

    def insert(self, row: Row | None, wanted: Wanted) -> tuple[Row | None, Granted | None]:
        after, answer = super().insert(row, wanted)
        return after, answer or Granted(1)


#: What is taken out, what it is searched with, and the promises that are then broken; the
#: second where nobody looks at the first.
MUTANTS: dict[str, tuple[Database, dict[str, Any], list[str]]] = {
    "no fence in complete": (Unfenced("complete"), {}, ["P3", "P2"]),
    "no fence in take_over": (
        Unfenced("take_over"),
        {"clients": paying(b"1", b"1", b"2"), "ends": (FAILED,)},
        ["P4"],
    ),
    "no fence in release": (Unfenced("release"), {"clients": some(3, policy())}, ["P3", "P1"]),
    "no fence in forget": (Unfenced("forget"), {"clients": some(3, policy())}, ["P3", "P1"]),
    "no fence in renew": (Unfenced("renew"), {}, ["P3"]),
    "a take-over of what was free when it was seen": (Trusting(), {}, ["P1", "P2"]),
    "no row taken for won": (Confident(), {}, ["P1"]),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_what_is_taken_out_of_a_statement_is_missed(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The search finds the shortest way to a broken promise, and prints it."""
    database, options, promises = MUTANTS[name]
    options = {"clients": some(2, policy()), "ends": (CREATED, REFUSED, FAILED)} | options
    blind: frozenset[str] = frozenset()
    for promise in promises:
        found = Search(**options, crashes=0, losses=0, database=database, blind_to=blind).run()
        with capsys.disabled():
            print("", f"{name}:", *found.trace, sep="\n    ", end=" ")
        assert found.violation is not None
        assert found.violation.promise == promise
        blind |= {promise}


def test_a_doubtful_claim_that_nobody_undoes_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Request, "undo_doubtful", lambda self, claim: None)
    found = Search(some(2, policy(hold_unknown)), (CREATED,)).run()
    assert found.violation is not None
    assert found.violation.promise == "crash-safe"


class Hasty(Search):
    """Has done with a doubtful claim once it has undone it."""

    def _undo(self, now: Situation, i: int, n: int, duty: Duty) -> Any:
        for step, after in super()._undo(now, i, n, duty):
            done = after.clients[i]._replace(duties=())
            yield step, after._replace(clients=(*after.clients[:i], done, *after.clients[i + 1 :]))


def test_a_doubtful_claim_that_is_undone_once_is_missed() -> None:
    """It was sent twice."""
    found = Hasty(some(2, policy(hold_unknown)), (CREATED,), losses=2).run()
    assert found.violation is not None, "the second is left behind"
    assert found.violation.promise == "crash-safe"


def test_an_answer_that_was_fenced_off_and_is_sent_all_the_same_is_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from wsgi_idempotency.middleware import _Execution

    settle = _Execution._settle
    monkeypatch.setattr(_Execution, "_settle", lambda self, whole: settle(self, whole) or True)
    found = Search(some(2, policy()), (CREATED,)).run()
    assert found.violation is not None
    assert found.violation.promise == "P3"


# ---------------------------------------------------------------------- the model is PostgreSQL

ME, OTHER = 1, 2
RESULT = Result("201 Created", b"mine", None)


def every_row() -> Iterator[Row | None]:
    yield None
    for token, lapse, past in itertools.product((ME, OTHER), ("release", "hold"), (False, True)):
        row = Row(token, CLAIMED, False, past, 2, b"f", lapse)
        yield row
        yield row._replace(lapsed=True)
        yield row._replace(state=RELEASED)
        yield row._replace(state=HELD)
        yield row._replace(state=COMPLETED, result=RESULT)
        yield row._replace(state=COMPLETED, result=Result("200 OK", None, "too large"))


def every_statement() -> Iterator[tuple[Any, ...]]:
    yield (asked.CLAIM,)
    for seen in (ME, OTHER):
        yield asked.TAKE_OVER, seen
    yield asked.COMPLETE, Result("202 Accepted", b"new", None)
    for kind in (asked.RELEASE, asked.HOLD, asked.FORGET, "renew"):
        yield (kind,)


class Statements:
    """The statements of the store, each on a row as it is put there."""

    def __init__(self, url: str) -> None:
        self.store = SQLStore(url)

    def execute(self, statement: str, params: dict[str, Any]) -> None:
        with self.store.engine.connect() as connection:
            connection.execute(sqlalchemy.text(statement), params)

    def put(self, row: Row | None) -> None:
        self.execute("DELETE FROM idempotency_keys", {})
        if row is None:
            return
        done = row.result
        self.execute(
            "INSERT INTO idempotency_keys VALUES (now(), now() + :lease * interval '1 h',"
            " now() + :retention * interval '1 h', :completed, :attempt, 1, :digest, :token,"
            " :fingerprint, :state, :lapse, 's', 'k', 'POST', '/', :status, '[]', :reason, :body)",
            {
                "lease": -1 if row.lapsed else 1,
                "retention": -1 if row.past_retention else 1,
                "completed": None if done is None else "2026-01-01",
                "attempt": row.attempt,
                "digest": bytes(32),
                "token": bytes_of(row.token),
                "fingerprint": row.fingerprint,
                "state": row.state,
                "lapse": row.lapse,
                "status": done and done.status,
                "reason": done and done.reason,
                "body": done and done.body,
            },
        )

    def run(self, kind: str, *details: Any) -> Any:
        store, digest, token = self.store, bytes(32), bytes_of(ME)
        claim = Claim(digest, token, b"g", 1, "s", "k", "POST", "/", 3600.0, 3600.0, Lapse.RELEASE)
        if kind == asked.CLAIM:
            return store.claim(claim)
        if kind == asked.TAKE_OVER:
            return store.take_over(claim, record(fresh(Wanted(details[0], b"f", "release"))))
        if kind == asked.COMPLETE:
            return store.complete(digest, token, Completion(details[0].status, (), b"new"))
        if kind == "renew":
            return token in store.renew([(digest, token, 3600.0)])
        return getattr(store, kind)(digest, token)

    def row(self) -> Record | None:
        found = self.store.lookup(bytes(32))
        return None if found is None else timeless(found)


def timeless(found: Record) -> Record:
    return dataclasses.replace(found, age=0.0, lease_left=-1.0 if found.lapsed else 1.0)


def modelled(row: Row | None, kind: str, *details: Any) -> tuple[Row | None, Any]:
    database, wanted = Database(), Wanted(ME, b"g", "release")
    if kind == asked.CLAIM:
        return database.insert(row, wanted) if row is None else (row, look(row, ME))
    if kind == asked.TAKE_OVER:
        return database.take_over(row, wanted, details[0])
    if kind == asked.COMPLETE:
        return database.complete(row, ME, details[0])
    if kind == "renew":
        ours = row is not None and row.token == ME and row.state in (CLAIMED, HELD)
        return database.renew(row, ME), ours
    return getattr(database, kind)(row, ME)  # type: ignore[no-any-return]


def as_the_store_says(answer: Any) -> Any:
    if isinstance(answer, Granted):
        return Claimed(answer.attempt)
    return record(answer) if isinstance(answer, Row) else answer


def test_every_statement_of_the_model_does_to_every_row_what_it_does_in_postgresql(
    pg_database: str,
) -> None:
    statements = Statements(pg_database)
    for row, statement in itertools.product(every_row(), every_statement()):
        statements.put(row)
        answer = statements.run(*statement)
        if isinstance(answer, Record):
            answer = timeless(answer)
        after, expected = modelled(row, *statement)
        assert answer == as_the_store_says(expected), (row, statement)
        assert statements.row() == (None if after is None else record(after)), (row, statement)
    statements.store.close()
