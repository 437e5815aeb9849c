"""A claim whose answer was lost may have been made, or be made yet: nobody is to run what it
stands for, and nobody is to be kept out by it."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from werkzeug.test import Client, TestResponse

from wsgi_idempotency import IdempotencyMiddleware, MemoryStore, Policy, SQLStore, everyone
from wsgi_idempotency import hold_unknown as holding
from wsgi_idempotency.errors import AnswerLost, Disconnected, StoreUnavailable
from wsgi_idempotency.records import Claim, Claimed, Lapse, Record, State
from wsgi_idempotency.testing import until

BROKEN = Disconnected("the connection broke")
LOST = AnswerLost("no answer in time")


class Breaking(MemoryStore):
    """A store whose next calls fail as they are told, before or after they took effect.

    :ivar before: for each method the errors of its next calls, which change nothing.
    :ivar after: the errors of calls that take effect first.
    :ivar claims: every claim that was asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[str, list[Exception]] = {}
        self.after: dict[str, list[Exception]] = {}
        self.claims: list[Claim] = []

    def _call(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
        if self.before.get(name):
            raise self.before[name].pop(0)
        answer = call(*args)
        if self.after.get(name):
            raise self.after[name].pop(0)
        return answer

    def claim(self, claim: Claim) -> Claimed | Record:
        self.claims.append(claim)
        answer: Claimed | Record = self._call("claim", super().claim, claim)
        return answer

    def take_over(self, claim: Claim, seen: Record) -> Claimed | None:
        answer: Claimed | None = self._call("take_over", super().take_over, claim, seen)
        return answer

    def forget(self, digest: bytes, token: bytes) -> bool:
        answer: bool = self._call("forget", super().forget, digest, token)
        return answer

    def comes_late(self, claim: Claim) -> None:
        """What was on its way arrives, and is as if it had never been."""
        assert super().claim(claim) == Claimed(1)
        until(lambda: self.lookup(claim.digest) is None)


class Shop:
    def __init__(self, store: Any, **options: Any) -> None:
        self.store, self.status, self.attempts = store, "201 Made It", list[int]()
        self.middleware = IdempotencyMiddleware(
            self.app, store, scope=everyone, policy=Policy(**options)
        )

    def app(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        self.attempts.append(environ["wsgi_idempotency.operation"].attempt)
        start_response(self.status, [])
        return [b"made"]

    def post(self, status: str = "201 Made It") -> TestResponse:
        self.status = status
        return Client(self.middleware).post("/pay", headers={"Idempotency-Key": "k"})


def overtaken(store: Breaking) -> Callable[..., bool]:
    """Finds out, once, that the claim is somebody else's, who has forgotten it since."""
    asked: list[Claim] = []

    def in_time(request: Any, claim: Claim) -> bool:
        asked.append(claim)
        if len(asked) == 1:
            store._rows.clear()
        return len(asked) > 1

    return in_time


@pytest.fixture
def store() -> Breaking:
    return Breaking()


@pytest.mark.parametrize("broke", ["before", "after"], ids=lambda broke: f"{broke} its effect")
def test_a_claim_on_a_broken_connection_is_asked_for_once_more(store: Breaking, broke: str) -> None:
    """A pooled connection may have died long ago, and nobody asks it beforehand."""
    getattr(store, broke)["claim"] = [BROKEN]
    shop = Shop(store)
    assert shop.post().status_code == 201
    assert shop.post().headers["Idempotency-Replayed"] == "true"
    assert shop.attempts == [1]


@pytest.mark.parametrize("broke", ["before", "after"], ids=lambda broke: f"{broke} its effect")
def test_so_is_a_take_over(store: Breaking, broke: str) -> None:
    shop = Shop(store)
    shop.post("500 Oh")
    getattr(store, broke)["take_over"] = [BROKEN]
    assert shop.post().status_code == 201
    assert shop.attempts == [1, 2]


@pytest.mark.parametrize("errors", [[BROKEN, BROKEN], [LOST]], ids=["broke twice", "timed out"])
def test_where_it_can_t_be_had_nothing_runs_and_it_is_undone_as_often_as_it_comes(
    store: Breaking, errors: list[Exception]
) -> None:
    store.before["claim"] = errors
    shop = Shop(store, outcomes=holding)
    assert shop.post().status_code == 503
    for claim in dict.fromkeys(store.claims):
        store.comes_late(claim)
        store.comes_late(claim)
    assert shop.post().status_code == 201
    assert shop.attempts == [1]


def test_the_first_of_two_statements_is_undone_that_comes_when_everything_is_over(
    store: Breaking,
) -> None:
    """The second was granted, and its operation didn't happen: the key is fresh."""
    store.before["claim"] = [BROKEN]
    shop = Shop(store, outcomes=holding)
    assert shop.post("400 Bad").status_code == 400
    store.comes_late(store.claims[0])
    assert shop.post().status_code == 201
    assert shop.attempts == [1, 1]


def test_it_is_undone_also_where_another_was_in_the_way_then(store: Breaking) -> None:
    shop = Shop(store, outcomes=holding)
    shop.post()
    first = store.claims[0]
    store.before["claim"] = [BROKEN]
    assert shop.post().headers["Idempotency-Replayed"] == "true"
    del store._rows[first.digest]  # as if its retention had passed
    store.comes_late(store.claims[-1])


def test_of_an_expired_key_that_nobody_has_run_anew_nothing_is_left(store: Breaking) -> None:
    """Not a released row, which would tell another request that it is not the same."""
    shop = Shop(store, retention=1, lease=1)
    shop.post()
    [digest] = store._rows
    store._rows[digest] = dataclasses.replace(store._rows[digest], expires_at=0.0)
    store.after["take_over"] = [LOST]
    assert shop.post().status_code == 503
    until(lambda: store.lookup(digest) is None)


def test_so_is_a_claim_that_its_own_request_has_given_up(
    store: Breaking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker was paused, its claim is somebody else's, and it asks with another token."""
    store.before["claim"] = [BROKEN]
    shop = Shop(store, outcomes=holding)
    with monkeypatch.context() as patched:
        patched.setattr("wsgi_idempotency.middleware._Request._in_time", overtaken(store))
        shop.post("400 Bad")
    store.comes_late(store.claims[0])


def test_it_is_undone_also_where_the_end_is_recorded_late(store: Breaking) -> None:
    store.before = {"claim": [BROKEN], "forget": [StoreUnavailable("down")]}
    shop = Shop(store, outcomes=holding)
    assert shop.post("400 Bad").status_code == 400
    first = store.claims[0]
    until(lambda: store.lookup(first.digest) is None)
    store.comes_late(first)


def test_what_is_held_is_not_taken_for_a_claim_that_came_late(store: Breaking) -> None:
    """They have the same token, and the same row."""
    store.before["claim"] = [BROKEN]
    shop = Shop(store, outcomes=holding)
    shop.post("500 Oh")
    heartbeat = shop.middleware.heartbeat
    assert heartbeat._kept == {}, "nothing is left to be done about it"
    (first, _) = store.claims
    record = store.lookup(first.digest)
    assert record is not None
    assert record.state is State.HELD


def test_an_interrupt_that_comes_with_the_answer_leaves_no_claim(store: Breaking) -> None:
    """A worker that is told to exit just then says nothing of it any more."""

    def interrupted(event: Any) -> None:
        if event.name == "taken_over":
            raise KeyboardInterrupt

    shop = Shop(store, outcomes=holding)
    shop.middleware.observers = type(shop.middleware.observers)(interrupted)
    shop.post("400 Bad")
    (first,) = store.claims
    assert MemoryStore.claim(store, first) == Claimed(1)
    assert store.release(first.digest, first.token)
    with pytest.raises(KeyboardInterrupt):
        shop.post()
    shop.middleware.heartbeat.flush()
    record = store.lookup(first.digest)
    assert record is not None
    assert (record.state, record.attempt) == (State.RELEASED, 2)
    assert shop.attempts == [1]


# ---------------------------------------------------------------------- contradictions


class Contradictory(MemoryStore):
    """Says that a key is free, and never grants it."""

    def take_over(self, claim: Claim, seen: Record) -> Claimed | None:
        return None


@pytest.mark.parametrize("on_store_failure", ["refuse", "bypass"])
def test_a_store_that_contradicts_itself_is_asked_no_further(
    caplog: pytest.LogCaptureFixture, on_store_failure: Any
) -> None:
    """Nor does the request run unprotected: the store can be reached."""
    store = Contradictory()
    shop = Shop(store, on_store_failure=on_store_failure)
    shop.post("500 Oh")
    refused = shop.post()
    assert (refused.status_code, refused.json["code"]) == (503, "STORE_UNAVAILABLE")
    assert shop.attempts == [1]
    (told,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "the key was free 50 times in a row, and could not be had" in told.getMessage()


class Reluctant(SQLStore):
    """Never waits, whatever it is told, or never lets anybody take over."""

    never = "waits"
    asked = 0

    def begin(self, *args: Any, **options: Any) -> Any:
        self.asked += 1
        if self.never == "waits":
            return None
        transaction = super().begin(*args, **options)
        assert transaction is not None
        transaction.take_over = lambda claim, seen: None  # type: ignore[method-assign]
        return transaction


@pytest.mark.parametrize("never", ["waits", "lets anybody take over"])
def test_nor_in_transaction_mode(
    sqlite_url: str, caplog: pytest.LogCaptureFixture, never: str
) -> None:
    store = Reluctant(sqlite_url)
    store.never = never
    shop = Shop(store, transaction=True, wait=3600)
    seen = Shop(SQLStore(sqlite_url))
    seen.post("500 Oh")
    began = time.monotonic()
    assert shop.post().status_code == 503
    assert time.monotonic() - began < 60
    assert shop.attempts == []
    assert store.asked <= 51
    assert "50 times in a row" in caplog.text


def test_to_lose_races_while_others_fail_is_no_contradiction() -> None:
    """Each was won by somebody, whose handler was waited for."""

    class Churning(MemoryStore):
        lost = 0

        def take_over(self, claim: Claim, seen: Record) -> Claimed | None:
            if self.lost == 60:
                return super().take_over(claim, seen)
            self.lost += 1
            assert super().take_over(winner(self.lost), seen) is not None
            return None

        def claim(self, claim: Claim) -> Claimed | Record:
            answer = super().claim(claim)
            if isinstance(answer, Record) and answer.state is State.CLAIMED:
                self.release(answer.digest, answer.token)  # by the next look
            return answer

        digest = b""

    def winner(number: int) -> Claim:
        return Claim(
            store.digest, number.to_bytes(16, "big"), fingerprint, 1, "", "", "", "", 60.0, 3600.0,
            Lapse.RELEASE,
        )  # fmt: skip

    store = Churning()
    shop = Shop(store, wait=3600)
    shop.post("500 Oh")
    (store.digest,) = store._rows
    fingerprint = store._rows[store.digest].claim.fingerprint
    assert shop.post().status_code == 201
    assert shop.attempts == [1, 62]
