"""A worker that is paused past its lease between its claim and its handler."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from werkzeug.test import Client, TestResponse
from werkzeug.wrappers import Response

from wsgi_idempotency import (
    IdempotencyMiddleware,
    MemoryStore,
    Policy,
    SQLStore,
    current_operation,
    everyone,
    hold_unknown,
)
from wsgi_idempotency.errors import StoreUnavailable
from wsgi_idempotency.records import Claim, Claimed, Record

#: A moment longer than the shortest lease, which is 1 s.
LONGER_THAN_A_LEASE = 1.05


class Pausing(MemoryStore):
    """The first claim's answer comes to a process that stands still for longer than a lease."""

    def __init__(
        self,
        meanwhile: Callable[[], object] = lambda: None,
        seconds: float = LONGER_THAN_A_LEASE,
    ) -> None:
        super().__init__()
        self.meanwhile = meanwhile
        self._seconds = seconds
        self.paused = False
        self.away = False

    def claim(self, claim: Claim) -> Claimed | Record:
        answer = super().claim(claim)
        if not self.paused:
            self.paused = True
            time.sleep(self._seconds)
            self.meanwhile()
        return answer

    def renew(self, claims: Any) -> set[bytes]:
        if self.away:
            raise StoreUnavailable("it is away")
        return super().renew(claims)


class Shop:
    def __init__(self, policy: Policy) -> None:
        self.runs: list[int] = []
        self.status = 201
        self.store = Pausing()
        self.middleware = IdempotencyMiddleware(self, self.store, scope=everyone, policy=policy)

    def __call__(self, environ: Any, start_response: Any) -> Any:
        self.runs.append(current_operation.attempt)
        return Response(f"run {len(self.runs)}", self.status)(environ, start_response)

    def post(self) -> TestResponse:
        return Client(self.middleware).post("/", headers={"Idempotency-Key": "k"})


@pytest.mark.parametrize("status", [201, 500], ids=["succeeded", "failed"])
def test_a_worker_that_was_overtaken_before_its_handler_began_looks_again(status: int) -> None:
    """It replays what the other has answered, or runs as the attempt after it."""
    shop = Shop(Policy(lease=1))

    def overtake() -> None:
        shop.status = status
        others.append(shop.post())
        shop.status = 201

    others: list[TestResponse] = []
    shop.store.meanwhile = overtake
    answer = shop.post()
    assert [other.status_code for other in others] == [status]
    if status == 201:
        assert (answer.data, shop.runs) == (b"run 1", [2])
        assert answer.headers["Idempotency-Replayed"] == "true"
    else:
        assert (answer.data, shop.runs) == (b"run 2", [2, 3])


def test_a_worker_that_nobody_overtook_runs_its_handler() -> None:
    """Also where a lapse is held: it never began, and this worker knows."""
    shop = Shop(Policy(lease=1, outcomes=hold_unknown))
    assert shop.post().data == b"run 1"
    assert shop.runs == [1]


def test_a_claim_that_can_t_be_made_sure_of_runs_nothing() -> None:
    """And it is undone: a policy that holds a lapse would hold what never began."""
    shop = Shop(Policy(lease=1, outcomes=hold_unknown))

    def go_away() -> None:
        shop.store.away = True

    shop.store.meanwhile = go_away
    assert (shop.post().status_code, shop.runs) == (503, [])
    shop.store.away = False
    deadline = time.monotonic() + 20
    while (answer := shop.post()).status_code != 201:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (answer.data, shop.runs) == (b"run 1", [1])


def test_a_claim_whose_answer_was_long_on_its_way_does_not_lapse_under_its_handler() -> None:
    """Its lease runs from when it was asked for, and so do the renewals."""
    store = Pausing(seconds=0.75)
    lapsed: list[bool] = []

    def app(environ: Any, start_response: Any) -> Any:
        time.sleep(0.3)
        [digest] = store._rows
        record = store.lookup(digest)
        assert record is not None
        lapsed.append(record.lapsed)
        return Response("run")(environ, start_response)

    middleware = IdempotencyMiddleware(app, store, scope=everyone, policy=Policy(lease=1))
    assert Client(middleware).post("/", headers={"Idempotency-Key": "k"}).text == "run"
    assert lapsed == [False]


def test_a_row_that_a_take_over_has_locked_is_no_claim_to_begin_with(pg_database: str) -> None:
    """A renewal leaves out what is locked, and says that it is the caller's still; of one that
    has lapsed that means nothing."""
    runs: list[int] = []

    class PausingStore(SQLStore):
        paused = False

        def claim(self, claim: Claim) -> Claimed | Record:
            answer = super().claim(claim)
            if not self.paused:
                self.paused = True
                time.sleep(LONGER_THAN_A_LEASE)
                other.execute(
                    "UPDATE idempotency_keys SET claim_token = %s, lease_until = now() + '1 min',"
                    " attempt = 2",
                    [b"t" * 16],
                )
                commits.start()
            return answer

    def app(environ: Any, start_response: Any) -> Any:
        runs.append(current_operation.attempt)
        return Response("run")(environ, start_response)

    store = PausingStore(pg_database)
    with psycopg.connect(pg_database.replace("+psycopg", "")) as other:
        commits = threading.Timer(0.6, other.commit)
        middleware = IdempotencyMiddleware(app, store, scope=everyone, policy=Policy(lease=1))
        answer = Client(middleware).post("/", headers={"Idempotency-Key": "k"})
        commits.join()
    store.close()
    assert (answer.status_code, runs) == (409, [])
