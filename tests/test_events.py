"""What observers are told of each request, and that they can't break one (promise P9)."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from werkzeug.test import Client

from wsgi_idempotency import (
    Event,
    IdempotencyMiddleware,
    MemoryStore,
    Policy,
    Route,
    everyone,
    hold_unknown,
    store_success,
)
from wsgi_idempotency.errors import ConfigurationError, StoreUnavailable
from wsgi_idempotency.events import Observers
from wsgi_idempotency.records import Claimed

EVENT = Event(name="executed", method="POST", path="/pay")


def test_one_observer_or_many_are_told_in_turn():
    told = []
    Observers(told.append).tell(EVENT)
    Observers([lambda event: told.append(1), lambda event: told.append(2)]).tell(EVENT)
    Observers(()).tell(EVENT)
    assert told == [EVENT, 1, 2]
    assert [bool(Observers(some)) for some in ((), told.append, [told.append])] == [
        False,
        True,
        True,
    ]


def test_an_observer_that_raises_is_logged_and_the_others_are_told(caplog):
    def failing(event):
        raise LookupError("oops")

    told = []
    Observers([failing, told.append]).tell(EVENT)
    assert told == [EVENT]
    assert "failed on executed" in caplog.text
    assert "LookupError: oops" in caplog.text


def test_an_interruption_is_not_swallowed():
    """A worker told to exit while it counts is told to exit."""

    def interrupted(event):
        raise SystemExit

    with pytest.raises(SystemExit):
        Observers(interrupted).tell(EVENT)


@pytest.mark.parametrize("observers", [["log"], [print, None]], ids=repr)
def test_what_can_not_be_called_is_refused(observers):
    with pytest.raises(ConfigurationError, match=r"use callables \(Event\) -> None"):
        Observers(observers)


class Shop:
    """An application behind the middleware, and the events of each of its requests."""

    def __init__(self, store=None, **options):
        self.status, self.told = "201 Made It", []
        options.setdefault("scope", everyone)
        self.middleware = IdempotencyMiddleware(
            self.app, store or MemoryStore(), on_event=self.told.append, **options
        )
        self.client = Client(self.middleware)

    def app(self, environ, start_response):
        if self.status is None:
            raise RuntimeError("handler")
        start_response(self.status, [])
        return [b"body"]

    def post(self, body=b"body", key="secret-key", path="/pay"):
        """Send a request; returns what was told of it, without what is None, and without how
        long the store took."""
        self.told.clear()
        with contextlib.suppress(RuntimeError):
            self.client.post(path, data=body, headers={"Idempotency-Key": key}, buffered=True)
        for event in self.told:
            assert (event.method, event.path) == ("POST", path)
            assert "secret-key" not in repr(event)
            # What is asked of the store needs the digest, and is timed.
            assert (event.store_seconds is None) is (event.key_digest == "")
        return [
            {
                name: value
                for name, value in dataclasses.asdict(event).items()
                if value is not None
                and name not in ("method", "path", "key_digest", "store_seconds")
            }
            for event in self.told
        ]


def executed(action, attempt=1):
    return {"name": "executed", "attempt": attempt, "action": action}


def without_seconds(events):
    for event in events:
        assert event.pop("seconds", 0.0) >= 0.0
    return events


def test_a_run_is_told_with_its_attempt_what_became_of_it_and_how_long_it_took():
    shop = Shop()
    assert shop.post()[0]["seconds"] > 0
    assert without_seconds(shop.post()) == [{"name": "replayed"}]
    assert without_seconds(shop.post(b"other")) == [
        {"name": "mismatch", "code": "FINGERPRINT_MISMATCH"}
    ]
    assert len(shop.told[0].key_digest) == 64


@pytest.mark.parametrize(
    ("status", "action"),
    [("201 Made It", "store"), ("400 Bad", "forget"), ("500 Oh", "release"), (None, "release")],
    ids=["success", "client's fault", "server's fault", "exception"],
)
def test_every_ending_is_told(status, action):
    shop = Shop()
    shop.status = status
    assert without_seconds(shop.post()) == [executed(action)]


def test_a_second_attempt_is_told_as_a_take_over():
    shop = Shop()
    shop.status = "500 Oh"
    shop.post()
    shop.status = "201 Made It"
    assert without_seconds(shop.post()) == [
        {"name": "taken_over", "attempt": 2},
        executed("store", attempt=2),
    ]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Remembering(MemoryStore):
    def claim(self, claim):
        self.last = claim
        return super().claim(claim)


def test_a_lapse_is_told_beside_what_comes_of_it():
    """A worker has died, or was paused for longer than its lease."""
    for outcomes, came in (
        (store_success, [{"name": "taken_over", "attempt": 2}, executed("store", attempt=2)]),
        (hold_unknown, [{"name": "held", "code": "OUTCOME_UNKNOWN"}]),
    ):
        clock = Clock()
        store = Remembering(clock=clock)
        shop = Shop(store, policy=Policy(outcomes=outcomes))
        shop.status = "400 Bad"
        shop.post()
        store.claim(store.last)  # by a worker that dies
        clock.now += 61
        shop.status = "201 Made It"
        assert without_seconds(shop.post()) == [{"name": "lapsed"}, *came]
        assert not shop.told[0].final


def test_what_is_held_and_what_can_not_be_replayed_is_told_apart():
    shop = Shop(policy=Policy(outcomes=hold_unknown, max_response_bytes=3))
    shop.status = None
    assert without_seconds(shop.post()) == [executed("hold")]
    assert shop.post() == [{"name": "held", "code": "OUTCOME_UNKNOWN"}]
    shop.status = "201 Made It"
    assert without_seconds(shop.post(path="/other")) == [executed("store")]
    assert shop.post(path="/other") == [
        {"name": "not_replayable", "code": "RESPONSE_NOT_REPLAYABLE"}
    ]


def test_a_refusal_is_told_with_its_code_and_its_cause():
    shop = Shop(scope=lambda environ: {}["user"])
    (event,) = shop.post()
    assert (event["name"], event["code"]) == ("refused", "EXTRACTOR_FAILED")
    assert isinstance(event["exception"], KeyError)
    assert shop.told[0].key_digest == ""
    (event,) = Shop().post(key="a,b")
    assert (event["name"], event["code"]) == ("refused", "INVALID_KEY")


class Unreachable(MemoryStore):
    def claim(self, claim):
        raise StoreUnavailable("down")


@pytest.mark.parametrize(
    ("choice", "then"),
    [
        ("refuse", {"name": "refused", "code": "STORE_UNAVAILABLE"}),
        ("bypass", {"name": "unprotected"}),
    ],
)
def test_a_store_that_can_not_be_reached_is_told_and_what_was_done_about_it(choice, then):
    shop = Shop(Unreachable(), policy=Policy(on_store_failure=choice))
    first, second = shop.post()
    assert first["name"] == "store_failure"
    assert isinstance(first["exception"], StoreUnavailable)
    assert second == then


def test_an_end_that_could_not_be_recorded_is_told_with_the_run():
    class Forgetful(MemoryStore):
        down = True

        def complete(self, digest, token, completion):
            if self.down:
                raise StoreUnavailable("down")
            return super().complete(digest, token, completion)

    store = Forgetful()
    shop = Shop(store)
    failure, run = without_seconds(shop.post())
    store.down = False
    shop.middleware.heartbeat.flush()
    assert (failure["name"], failure["attempt"]) == ("store_failure", 1)
    assert run == executed("store")


@pytest.mark.parametrize(
    ("path", "route"),
    [("/sales/7", "/sales/<int:number>"), ("/sales/8", "/sales/<int:number>"), ("/pay", None)],
    ids=["a route's", "another of the same route", "the default policy's"],
)
def test_a_request_is_told_with_the_rule_of_its_route(path, route):
    """Not with its path alone: of those there is no end."""
    shop = Shop(routes=[Route("/sales/<int:number>", Policy())])
    shop.post(path=path)
    assert [event.route for event in shop.told] == [route]


class Slow(MemoryStore):
    """Takes its time, and knows how much it took."""

    taken = 0.0

    def claim(self, claim):
        return self.slowly(super().claim, claim)

    def complete(self, digest, token, completion):
        return self.slowly(super().complete, digest, token, completion)

    def slowly(self, call, *args):
        started = time.monotonic()
        while time.monotonic() < started + 0.02:
            pass
        answer = call(*args)
        self.taken += time.monotonic() - started
        return answer


def test_the_time_that_the_store_took_is_told_apart_from_the_handler_s():
    store = Slow()
    shop = Shop(store)
    for handler in (True, False):
        store.taken = 0.0
        started = time.monotonic()
        shop.post()
        elapsed = time.monotonic() - started
        (event,) = shop.told
        assert store.taken <= event.store_seconds
        assert (event.seconds is not None) is handler
        assert (event.seconds or 0.0) + event.store_seconds <= elapsed


class Crowded(MemoryStore):
    """Says when a second request has asked for a key."""

    def __init__(self):
        super().__init__()
        self.asked_again = threading.Event()

    def claim(self, claim):
        answer = super().claim(claim)
        if not isinstance(answer, Claimed):
            self.asked_again.set()
        return answer


class Patient:
    """A handler that waits, and says that it does."""

    def __init__(self):
        self.entered, self.go_on = threading.Event(), threading.Event()

    def __call__(self, environ, start_response):
        self.entered.set()
        assert self.go_on.wait(30)
        start_response("201 Made It", [])
        return [b"body"]


def test_a_duplicate_that_waited_is_told_with_how_long():
    """Once as it stops waiting, and with the decision that it waited for."""
    told, store, handler = [], Crowded(), Patient()
    middleware = IdempotencyMiddleware(
        handler, store, scope=everyone, policy=Policy(wait=20), on_event=told.append
    )

    def post():
        Client(middleware).post("/pay", headers={"Idempotency-Key": "k"}, buffered=True)

    with ThreadPoolExecutor() as pool:
        first = pool.submit(post)
        assert handler.entered.wait(30)
        second = pool.submit(post)
        assert store.asked_again.wait(30)
        handler.go_on.set()
        first.result()
        second.result()
    by_name = {event.name: event for event in told}
    waited, replayed = by_name["waited"], by_name["replayed"]
    assert 0 < waited.seconds == waited.waited_seconds == replayed.waited_seconds
    assert replayed.store_seconds < 20
    assert by_name["executed"].waited_seconds is None


@pytest.mark.parametrize(
    ("name", "prevented", "final"),
    [
        ("executed", False, True),
        ("replayed", True, True),
        ("conflict", True, True),
        ("held", True, True),
        ("not_replayable", True, True),
        ("mismatch", False, True),
        ("refused", False, True),
        ("unprotected", False, True),
        ("waited", False, False),
        ("taken_over", False, False),
        ("lapsed", False, False),
        ("fenced", False, False),
        ("store_failure", False, False),
        ("purged", False, False),
    ],
)
def test_what_kept_a_handler_from_running_again_and_what_decided_a_request(name, prevented, final):
    event = Event(name=name)
    assert (event.prevented, event.final) == (prevented, final)
    assert f"- ``{name}``:" in Event.__doc__


def test_what_a_client_is_told_after_its_own_handler_ran_prevented_nothing():
    """It was overtaken, and is sent the response of the one that counts."""
    event = Event(name="replayed", attempt=1)
    assert (event.prevented, event.final) == (False, False)


def test_a_worker_that_was_overtaken_has_one_final_event():
    class Losing(MemoryStore):
        def complete(self, digest, token, completion):
            self.forget(digest, token)
            return super().complete(digest, token, completion)

    shop = Shop(Losing())
    assert [event["name"] for event in shop.post()] == ["fenced", "executed", "held"]
    assert [event.final for event in shop.told] == [False, True, False]
    assert [event.prevented for event in shop.told] == [False, False, False]


def test_nobody_is_told_of_a_request_that_passes():
    shop = Shop()
    shop.client.get("/pay", headers={"Idempotency-Key": "k"}, buffered=True)
    shop.client.post("/pay", buffered=True)
    assert shop.told == []
