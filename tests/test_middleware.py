"""A request's way through the middleware: the replies of http-contract.md, in process.

The linter of PEP 3333 stands on both sides of the middleware.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import json
import logging
import os
import sqlite3
import subprocess
import sys
import threading
import time
from datetime import timedelta
from wsgiref.validate import validator

import pytest
import sqlalchemy
from werkzeug.test import Client as WerkzeugClient
from werkzeug.test import EnvironBuilder, run_wsgi_app

from wsgi_idempotency import (
    IdempotencyMiddleware,
    MemoryStore,
    Policy,
    Route,
    SQLStore,
    by_authorization,
    by_cookie,
    by_header,
    canonical,
    current_operation,
    everyone,
    form_field,
    header,
    hold_unknown,
    json_field,
    store_everything,
    store_success,
)
from wsgi_idempotency.capture import InvalidApplication
from wsgi_idempotency.errors import AnswerLost, ConfigurationError, NotStorable, StoreUnavailable
from wsgi_idempotency.operation import ENVIRON_KEY
from wsgi_idempotency.problems import rfc9457, stripe
from wsgi_idempotency.records import Completion, State


@pytest.fixture(params=["memory", "SQLite"])
def store(request, sqlite_url):
    """A store that a test may look into."""
    store = MemoryStore() if request.param == "memory" else SQLStore(sqlite_url, timeout=0.2)
    yield store
    store.close()


class Client(WerkzeugClient):
    """A client that reads a response to its end and closes it, as a server does."""

    def open(self, *args, **kwargs):
        return super().open(*args, buffered=True, **kwargs)


class App:
    """An application that counts its executions and answers as it is told."""

    def __init__(self, status="201 Made It", headers=(), body=b"made"):
        self.executions = 0
        self.status, self.headers, self.body = status, list(headers), body
        self.closed = 0

    def __call__(self, environ, start_response):
        self.executions += 1
        self.environ = environ
        self.received = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        return self.answer(environ, start_response)

    def answer(self, environ, start_response):
        start_response(self.status, [("Content-Type", "text/plain"), *self.headers])
        return [self.body]


class Closing:
    """An iterable that tells when it is closed."""

    def __init__(self, app, chunks, error=None):
        self.app, self.chunks, self.error = app, iter(chunks), error

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.chunks)

    def close(self):
        self.app.closed += 1
        if self.error is not None:
            raise self.error


class FaultyStore:
    """A third party's store: memory, with faults on command."""

    def __init__(self):
        self.memory = MemoryStore()
        self.faults = {}
        self.calls = []

    def __getattr__(self, name):
        def call(*args):
            self.calls.append(name)
            fault = self.faults.get(name)
            if fault is not None:
                raise fault
            return getattr(self.memory, name)(*args)

        return call

    def claim(self, claim):
        return self.__getattr__("claim")(claim)


def wrap(app, *, store=None, lint=True, **options):
    options.setdefault("scope", everyone)
    inner = validator(app) if lint else app
    middleware = IdempotencyMiddleware(inner, store or "memory:", **options)
    return middleware, Client(validator(middleware) if lint else middleware, use_cookies=False)


def post(client, key="k1", body=b"body", path="/pay", **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if key is not None:
        named["Idempotency-Key"] = key
    return client.post(path, data=body, content_type="text/plain", headers=named)


def environ_of(body=b"body", **more):
    environ = EnvironBuilder(
        method="POST",
        path="/pay",
        data=body,
        content_type="text/plain",
        headers={"Idempotency-Key": "k1"},
    ).get_environ()
    return {**environ, **more}


def served(app, headers=None):
    """What a server sends that honours write() and a restart with exc_info, both of which
    werkzeug's test client does not."""
    sent, heads = [], []

    def start_response(status, pairs, exc_info=None):
        if exc_info is not None and sent:
            raise exc_info[1]
        heads.append((status, pairs))
        return sent.append

    body = app(environ_of(), start_response)
    sent.extend(body)
    close = getattr(body, "close", None)
    if close is not None:
        close()
    status, pairs = heads[-1]
    if headers is not None:
        headers.extend(pairs)
    return status, b"".join(sent)


def refused(answer, status, code, retry):
    """All that http-contract.md says of a refusal; returns its members."""
    document = json.loads(answer.get_data())
    assert (answer.status_code, document["code"]) == (status, code)
    headers = answer.headers
    assert headers.getlist("X-Should-Retry") == headers.getlist("Stripe-Should-Retry") == [retry]
    assert headers.getlist("Cache-Control") == ["no-store"]
    assert headers.getlist("Content-Type") == ["application/problem+json"]
    assert headers.getlist("Content-Language") == ["en"]
    assert headers.getlist("Content-Length") == [str(len(answer.get_data()))]
    assert ("Retry-After" in headers) is (code in {"CONFLICT", "STORE_UNAVAILABLE"})
    assert "Idempotency-Replayed" not in headers
    assert (document["status"], document["retryable"]) == (status, retry == "true")
    assert document["type"].endswith(":" + code.lower().replace("_", "-"))
    assert document["title"]
    assert document["detail"].endswith(".")
    members = {"type", "title", "status", "detail", "code", "retryable"}
    if code == "RESPONSE_NOT_REPLAYABLE":
        members.add("original_status")
    assert set(document) == members
    return document


# ------------------------------------------------------------------ replay


def test_a_retry_gets_what_was_sent_and_the_handler_runs_once():
    app = App(
        headers=[
            ("Link", "</a>"),
            ("LINK", "</b>"),
            ("ETag", '"1"'),
            ("Set-Cookie", "a=b"),
            ("Date", "now"),
        ],
        body=b"\n\0\xff " * 500,
    )
    _, client = wrap(app)
    first, second = post(client), post(client, '"k1";v=1')
    assert app.executions == 1
    assert first.status == second.status == "201 Made It"
    assert first.get_data() == second.get_data() == app.body
    assert "Idempotency-Replayed" not in first.headers
    assert first.headers["Set-Cookie"] == "a=b"
    assert list(second.headers) == [
        ("Content-Type", "text/plain"),
        ("Link", "</a>"),
        ("LINK", "</b>"),
        ("ETag", '"1"'),
        ("Idempotency-Replayed", "true"),
        ("Content-Length", "2000"),
    ]


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
def test_a_status_without_content_is_replayed_without_a_length(status):
    class Empty(App):
        def answer(self, environ, start_response):
            start_response(status, [("X-Kept", "1")])
            return []

    _, client = wrap(Empty())
    post(client)
    replay = post(client)
    assert replay.status == status
    assert list(replay.headers) == [("X-Kept", "1"), ("Idempotency-Replayed", "true")]


def test_a_replay_to_head_has_no_body_and_no_length():
    app = App(body=b"")
    middleware, _ = wrap(app, lint=False, policy=Policy(methods=["HEAD"]))
    environ = EnvironBuilder(method="HEAD", headers={"Idempotency-Key": "k"}).get_environ()
    run_wsgi_app(middleware, dict(environ))
    body, _, headers = run_wsgi_app(middleware, dict(environ))
    assert headers["Idempotency-Replayed"] == "true"
    assert "Content-Length" not in headers
    assert b"".join(body) == b""


@pytest.mark.parametrize(
    ("status", "retry"), [("500 Oh", "false"), ("429 Slow", None), ("409 No", "false")]
)
def test_a_replayed_failure_tells_sdks_not_to_go_on(status, retry):
    app = App(status)
    _, client = wrap(app, policy=Policy(outcomes=store_everything))
    post(client)
    replay = post(client)
    if retry is None:  # 429 is never an outcome
        assert app.executions == 2
    else:
        assert replay.headers["X-Should-Retry"] == replay.headers["Stripe-Should-Retry"] == retry


def test_a_replay_says_for_itself_whether_it_is_one_and_to_be_retried():
    """Whatever the application, or a service behind it, had put there."""
    headers = [
        ("X-Should-Retry", "true"),
        ("stripe-should-retry", "true"),
        ("Idempotency-Replayed", "false"),
    ]
    _, client = wrap(App("500 Oh", headers), policy=Policy(outcomes=store_everything))
    assert post(client).headers["X-Should-Retry"] == "true"
    replay = post(client).headers
    assert replay.getlist("X-Should-Retry") == replay.getlist("Stripe-Should-Retry") == ["false"]
    assert replay.getlist("Idempotency-Replayed") == ["true"]


def test_after_a_4xx_the_key_is_fresh_and_after_a_5xx_the_same_request_runs_again():
    app = App("400 Bad")
    _, client = wrap(app)
    assert post(client).status_code == 400
    app.status = "500 Oh"
    assert post(client, body=b"corrected").status_code == 500
    refused(post(client, body=b"another"), 422, "FINGERPRINT_MISMATCH", "false")
    app.status = "201 Made It"
    assert post(client, body=b"corrected").status_code == 201
    assert app.environ[ENVIRON_KEY].attempt == 2
    assert app.executions == 3


@pytest.mark.parametrize(
    "changed",
    [{"body": b"other"}, {"path": "/pay?x=1"}],
    ids=["another body", "another query string"],
)
def test_the_same_key_with_another_request_is_refused(changed):
    app = App()
    _, client = wrap(app)
    post(client)
    refused(post(client, **changed), 422, "FINGERPRINT_MISMATCH", "false")
    assert post(client).headers["Idempotency-Replayed"] == "true"
    assert app.executions == 1


def test_scopes_endpoints_and_methods_have_key_spaces_of_their_own():
    app = App()
    _, client = wrap(app, scope=by_header("X-Tenant"), secret="0123456789abcdef")
    post(client, X_Tenant="a")
    post(client, X_Tenant="b")
    post(client, X_Tenant="a", path="/other")
    client.patch("/pay", data=b"body", headers={"Idempotency-Key": "k1", "X-Tenant": "a"})
    assert app.executions == 4


def test_another_secret_makes_another_key_space():
    """Who reads the table can't tell by trying which keys it has."""
    store, app = MemoryStore(), App()
    digests = set()
    for secret in (None, "0123456789abcdef", b"fedcba9876543210"):
        post(wrap(app, store=store, secret=secret)[1])
        digests.add(app.environ[ENVIRON_KEY]._claim.digest)
    assert len(digests) == app.executions == 3


def test_in_the_scope_s_namespace_another_endpoint_is_a_mismatch():
    app = App()
    _, client = wrap(app, policy=Policy(namespace="scope"))
    post(client)
    refused(post(client, path="/other"), 422, "FINGERPRINT_MISMATCH", "false")


def test_a_policy_changed_between_two_tries_still_compares():
    store, app = MemoryStore(), App()
    post(wrap(app, store=store)[1])
    retry = post(wrap(app, store=store, policy=Policy(fingerprint=canonical))[1])
    assert retry.headers["Idempotency-Replayed"] == "true"


def test_with_no_fingerprint_the_key_alone_identifies():
    app = App()
    _, client = wrap(app, policy=Policy(fingerprint=None))
    post(client)
    assert post(client, body=b"other").headers["Idempotency-Replayed"] == "true"


def test_ten_megabytes_of_any_bytes_are_replayed_on_every_store(store):
    body = bytes(range(256)) * (40 * 1024)
    app = App(headers=[("Location", "https://shop.example/charges/1")], body=body)
    _, client = wrap(app, store=store, policy=Policy(max_response_bytes=len(body)))
    first, second = post(client), post(client)
    assert first.get_data() == second.get_data() == body
    assert second.headers["Location"] == "https://shop.example/charges/1"
    assert second.headers.getlist("Content-Length") == [str(len(body))]
    assert app.executions == 1


@pytest.mark.parametrize("status", ["201 Made It", "500 Oh"], ids=["completed", "released"])
@pytest.mark.parametrize("body", [b"body", b"another"], ids=["the same", "another payload"])
def test_after_its_retention_a_key_is_fresh(status, body):
    now = 1000.0
    app = App(status)
    _, client = wrap(app, store=MemoryStore(clock=lambda: now), policy=Policy(retention=3600))
    post(client)
    now += 3599
    if status == "201 Made It":
        assert post(client).headers["Idempotency-Replayed"] == "true"
    else:
        refused(post(client, body=b"a third"), 422, "FINGERPRINT_MISMATCH", "false")
    now += 1
    app.status = "201 Made It"
    assert post(client, body=body).status_code == 201
    assert app.environ[ENVIRON_KEY].attempt == 1
    assert post(client, body=body).headers["Idempotency-Replayed"] == "true"
    assert app.executions == 2


def test_an_attempt_under_another_policy_goes_by_the_fingerprint_of_the_first():
    """So do the keys it derives for its own calls."""
    store, app = MemoryStore(), App("500 Oh")
    derived = []

    def answer(environ, start_response):
        derived.append(environ[ENVIRON_KEY].derive_key("charge"))
        return App.answer(app, environ, start_response)

    app.answer = answer
    for fingerprint in (Policy().fingerprint, canonical, None):
        _, client = wrap(app, store=store, policy=Policy(fingerprint=fingerprint))
        assert post(client).status_code == 500
    assert len(derived) == 3
    assert len(set(derived)) == 1


@pytest.mark.parametrize("status", ["201 Made It", "400 Bad", "500 Oh", "raise"])
def test_an_operation_that_is_over_is_kept_no_longer(store, status):
    app = App(status)
    if status == "raise":
        app.answer = failing
    middleware, client = wrap(app, store=store, lint=False)
    with contextlib.suppress(LookupError):
        post(client)
    assert app.executions == 1
    assert middleware.heartbeat._kept == {}


@pytest.mark.parametrize(
    ("status", "body", "again"),
    [
        ("200 OK", b"", "replayed"),
        ("201 Created", b"", "replayed"),
        ("205 Reset Content", b"", "replayed"),
        ("299 Odd But Fine", b"x", "replayed"),
        ("303 See Other", b"", "replayed"),
        ("400 Bad Request", b"x", "fresh"),
        ("404 Not Found", b"x", "fresh"),
        ("422 No", b"x", "fresh"),
        ("429 Slow Down", b"x", "fresh"),
        ("500 Oh", b"x", "attempt 2"),
        ("503 Later", b"x", "attempt 2"),
    ],
)
def test_a_status_decides_what_a_retry_gets(store, status, body, again):
    app = App(status, body=body)
    _, client = wrap(app, store=store)
    first, second = post(client), post(client)
    assert first.status == second.status == status
    assert first.get_data() == second.get_data() == body
    assert (second.headers.get("Idempotency-Replayed") == "true") is (again == "replayed")
    assert app.executions == (1 if again == "replayed" else 2)
    assert app.environ[ENVIRON_KEY].attempt == (2 if again == "attempt 2" else 1)


#: http-contract.md, "What is never stored or replayed".
OF_ONE_REQUEST = [
    ("Clear-Site-Data", '"cache"'),
    ("WWW-Authenticate", "Basic"),
    ("Authentication-Info", "x"),
    ("Server-Timing", "db;dur=1"),
    ("traceparent", "00-1-1-00"),
    ("tracestate", "a=b"),
    ("X-Request-Id", "1"),
    ("X-Correlation-Id", "1"),
    ("Retry-After", "1"),
    ("RateLimit-Policy", "x"),
    ("X-RateLimit-Remaining", "1"),
    ("Access-Control-Allow-Origin", "*"),
    ("Signature", "x"),
    ("Signature-Input", "x"),
    ("Set-Cookie", "session=secret"),
    ("Set-Cookie", "other=secret"),
    ("Server", "shop"),
    ("Via", "1.1 x"),
    ("Age", "1"),
    ("Alt-Svc", "x"),
    ("Date", "Mon, 01 Jan 2024 00:00:00 GMT"),
]


def test_what_is_of_one_request_is_sent_once_and_not_replayed():
    kept = [("Content-Language", "de"), ("Vary", "Accept"), ("VARY", "Cookie"), ("X-Empty", "")]
    app = App(headers=[*OF_ONE_REQUEST, *kept])
    _, client = wrap(app)
    first, second = post(client), post(client)
    assert list(first.headers) == [("Content-Type", "text/plain"), *OF_ONE_REQUEST, *kept]
    assert list(second.headers) == [
        ("Content-Type", "text/plain"),
        *kept,
        ("Idempotency-Replayed", "true"),
        ("Content-Length", "4"),
    ]


def test_a_header_that_the_policy_names_is_replayed_although_it_is_of_one_request():
    app = App(headers=OF_ONE_REQUEST)
    _, client = wrap(app, policy=Policy(replay_headers=["Set-Cookie", "x-request-id"]))
    post(client)
    replay = post(client).headers
    assert replay.getlist("Set-Cookie") == ["session=secret", "other=secret"]
    assert replay["X-Request-Id"] == "1"
    assert "Date" not in replay


def test_what_changes_from_try_to_try_is_not_part_of_the_payload():
    app = App()
    _, client = wrap(app)
    post(client, User_Agent="shop/1", X_Stainless_Retry_Count="0", traceparent="00-1-1-00")
    retry = post(client, User_Agent="shop/2", X_Stainless_Retry_Count="1", traceparent="00-2-2-00")
    assert retry.headers["Idempotency-Replayed"] == "true"
    assert app.executions == 1


def test_another_media_type_is_another_payload():
    app = App()
    _, client = wrap(app)
    post(client)
    answer = client.post(
        "/pay", data=b"body", content_type="text/html", headers={"Idempotency-Key": "k1"}
    )
    refused(answer, 422, "FINGERPRINT_MISMATCH", "false")
    assert app.executions == 1


@pytest.mark.parametrize(
    "fingerprint", [Policy().fingerprint, canonical], ids=["exact", "by value"]
)
def test_a_form_with_another_boundary_is_the_same_payload(fingerprint):
    app = App()
    _, client = wrap(app, policy=Policy(fingerprint=fingerprint))
    for boundary in ("one", "two"):
        part = 'Content-Disposition: form-data; name="a"\r\n\r\n1\r\n'
        answer = client.post(
            "/pay",
            data=f"--{boundary}\r\n{part}--{boundary}--\r\n".encode(),
            content_type=f"multipart/form-data; boundary={boundary}",
            headers={"Idempotency-Key": "k"},
        )
    assert answer.headers["Idempotency-Replayed"] == "true"
    assert app.executions == 1


@pytest.mark.parametrize(
    ("fingerprint", "executions"), [(Policy().fingerprint, 422), (canonical, 201)]
)
def test_json_in_another_order_is_the_same_by_value_alone(fingerprint, executions):
    _, client = wrap(App(), policy=Policy(fingerprint=fingerprint))
    for body in (b'{"a": 1, "b": 2}', b'{"b":2,"a":1}'):
        answer = client.post(
            "/pay", data=body, content_type="application/json", headers={"Idempotency-Key": "k"}
        )
    assert answer.status_code == executions


@pytest.mark.parametrize("size", [0, 10_000_000], ids=["an empty body", "ten megabytes"])
def test_a_body_is_the_same_however_its_end_was_told(size):
    app = App()
    middleware, client = wrap(app, lint=False)
    body = bytes(size)
    post(client, body=body)
    chunked = environ_of(body, HTTP_TRANSFER_ENCODING="chunked")
    chunked["wsgi.input_terminated"] = True
    chunked.pop("CONTENT_LENGTH", None)
    answer = Client(lambda _, start_response: middleware(chunked, start_response)).get("/")
    assert answer.headers["Idempotency-Replayed"] == "true"
    if not size:
        absent = environ_of(body, CONTENT_LENGTH="", CONTENT_TYPE="")
        answer = Client(lambda _, start_response: middleware(absent, start_response)).get("/")
        assert answer.headers["Idempotency-Replayed"] == "true"
    assert app.executions == 1


def test_applications_mounted_apart_have_key_spaces_of_their_own(store):
    """And no cut of a path and a key makes another's."""
    app = App()
    middleware, _ = wrap(app, store=store, lint=False)
    requests = [
        {"SCRIPT_NAME": "/a", "PATH_INFO": "/pay"},
        {"SCRIPT_NAME": "/b", "PATH_INFO": "/pay"},
        {"PATH_INFO": "/a", "HTTP_IDEMPOTENCY_KEY": "b:c"},
        {"PATH_INFO": "/a:b", "HTTP_IDEMPOTENCY_KEY": "c"},
    ]
    for again in ("", "true"):
        for request in requests:
            environ = environ_of(**request)
            answer = Client(lambda _, start, e=environ: middleware(e, start)).get("/")
            assert answer.headers.get("Idempotency-Replayed", "") == again
    assert app.executions == 4


@pytest.mark.parametrize("scopes", [("alice", "alice"), ("shop:alice", "bank:alice")])
def test_two_applications_on_one_store_are_told_apart_by_what_their_scopes_say(store, scopes):
    """They are one where both serve a path, as the documentation of scopes warns."""
    app = App()
    for whose in scopes:
        _, client = wrap(app, store=store, scope=lambda _, whose=whose: whose)
        post(client)
    assert app.executions == len(set(scopes))


def test_no_cut_of_a_scope_and_a_key_makes_another_s():
    app = App()
    _, client = wrap(app, scope=lambda environ: environ["HTTP_X_TENANT"])
    post(client, "bc", X_Tenant="a")
    post(client, "c", X_Tenant="ab")
    assert app.executions == 2


# ------------------------------------------------------------------ secrets (P12)


@pytest.mark.parametrize("secret", [None, "0123456789abcdef"], ids=["no secret", "a secret"])
def test_nothing_secret_is_stored_logged_or_told(tmp_path, caplog, secret):
    """Not the credentials, not the cookies, not the body that was sent."""
    caplog.set_level("DEBUG")
    app, told = App(headers=[("Set-Cookie", "session=fresh-5ecret")]), []
    for scope in (by_authorization, by_cookie("session")):
        store = SQLStore(f"sqlite:///{tmp_path}/keys.db")
        _, client = wrap(app, store=store, scope=scope, secret=secret, on_event=told.append)
        for status in ("201 Made It", "500 Oh"):
            app.status = status
            for body in (b"card=4242-5ecret", b"card=other-5ecret"):
                post(
                    client,
                    status[:3],
                    body,
                    Authorization="Bearer token-5ecret",
                    Cookie="session=cookie-5ecret",
                )
        store.close()
    assert {event.name for event in told} == {"executed", "mismatch"}
    kept = b"".join(file.read_bytes() for file in tmp_path.glob("keys.db*"))
    assert b"idempotency_keys" in kept
    assert b"5ecret" not in kept
    assert "5ecret" not in caplog.text
    assert "5ecret" not in repr(told)
    if secret is not None:
        assert secret.encode() not in kept


# ------------------------------------------------------------------ pass-through (P5)


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE"])
def test_other_methods_pass_untouched(method):
    store = FaultyStore()
    seen = []
    marker = [b"x"]

    def app(environ, start_response):
        seen.extend([environ, start_response])
        return marker

    middleware, _ = wrap(app, store=store, lint=False)
    environ = {"REQUEST_METHOD": method, "HTTP_IDEMPOTENCY_KEY": "k"}

    def start_response(status, headers, exc_info=None): ...

    assert middleware(environ, start_response) is marker
    assert seen[0] is environ
    assert seen[1] is start_response
    assert store.calls == []


class Unreadable:
    """A body that must be left alone."""

    def __getattr__(self, name):
        raise AssertionError(f"{name} of the body was used")


@pytest.mark.parametrize(
    ("options", "environ"),
    [
        ({}, {"HTTP_IDEMPOTENCY_KEY": None}),
        ({}, {"REQUEST_METHOD": "PUT"}),
        ({"routes": [Route("/pay", None)]}, {}),
        ({"policy": None}, {}),
        ({"policy": Policy(methods=["put"])}, {}),
    ],
    ids=["no key", "another method", "an exempt route", "no policy", "another policy's method"],
)
def test_what_is_not_protected_reaches_the_application_as_the_server_sent_it(options, environ):
    """Its own environ and start_response, its own iterable back, and nothing of it touched."""
    store, seen, iterable = FaultyStore(), [], Closing(App(), [])

    def app(environ, start_response):
        seen.extend([environ, start_response])
        return iterable

    def start_response(status, headers): ...

    middleware, _ = wrap(app, store=store, lint=False, **options)
    sent = {k: v for k, v in environ_of(**environ).items() if v is not None}
    sent["wsgi.input"] = Unreadable()
    before = dict(sent)
    assert middleware(sent, start_response) is iterable
    assert seen[0] is sent
    assert seen[1] is start_response
    assert sent == before
    assert store.calls == []


def test_methods_are_protected_in_any_case():
    app = App()
    _, client = wrap(app, policy=Policy(methods=["post"]))
    post(client)
    assert post(client).headers["Idempotency-Replayed"] == "true"


def test_a_request_without_a_key_passes_with_its_body_unread():
    store, app = FaultyStore(), App()
    _, client = wrap(app, store=store)
    assert post(client, key=None).status_code == 201
    assert post(client, key=None).status_code == 201
    assert app.executions == 2
    assert app.received == b"body"
    assert store.calls == []
    with pytest.raises(RuntimeError, match="no idempotent operation is running"):
        current_operation.key  # noqa: B018


def test_one_application_wrapped_twice_runs_and_claims_once():
    store, app = FaultyStore(), App()
    inner = IdempotencyMiddleware(app, store, scope=everyone)
    _, client = wrap(inner, store=store, lint=False)
    post(client)
    assert post(client).headers["Idempotency-Replayed"] == "true"
    assert app.executions == 1
    assert store.calls.count("claim") == 2


@pytest.mark.parametrize("rewound", [True, False], ids=["rewound", "read to its end"])
def test_an_environ_that_is_sent_again_is_another_request(rewound):
    """Something outside tries again what failed: the operation that ended doesn't protect
    it, and without its body it isn't the same request."""
    app = App()

    def fails(environ, start_response):
        raise RuntimeError("handler")

    app.answer = fails
    middleware, client = wrap(app, lint=False)
    environ = environ_of()
    with pytest.raises(RuntimeError):
        middleware(environ, lambda status, headers: None)
    del app.answer
    if not rewound:
        answer = Client(lambda _, start_response: middleware(environ, start_response)).get("/")
        refused(answer, 400, "INCOMPLETE_BODY", "true")
        assert app.executions == 1
        return
    environ["wsgi.input"].seek(0)
    middleware(environ, lambda status, headers: None)
    assert environ[ENVIRON_KEY].attempt == 2
    assert post(client).headers["Idempotency-Replayed"] == "true"
    assert app.executions == 2


# ------------------------------------------------------------------ keys and extractors


def test_a_quoted_key_is_unescaped(store):
    app = App()
    _, client = wrap(app, store=store)
    post(client, r'"a\"b\\c"')
    assert app.environ[ENVIRON_KEY].key == r'a"b\c'
    assert post(client, r'"a\"b\\c";v=1').headers["Idempotency-Replayed"] == "true"


def test_keys_that_differ_in_case_are_two():
    app = App()
    _, client = wrap(app)
    post(client, "key")
    post(client, "KEY")
    assert app.executions == 2


@pytest.mark.parametrize(
    "key", ["a\x00", "a\x01b", "a\x7f", '"a\x00"', "a\n b", "a, b", "\xe9", "k" * 20_000]
)
def test_a_key_that_no_column_could_take_never_reaches_the_store(store, caplog, key):
    app = App()
    middleware, _ = wrap(app, store=store, lint=False)
    environ = environ_of(HTTP_IDEMPOTENCY_KEY=key)
    answer = Client(lambda _, start_response: middleware(environ, start_response)).get("/")
    refused(answer, 400, "KEY_TOO_LONG" if len(key) > 256 else "INVALID_KEY", "false")
    assert app.executions == 0
    assert caplog.records == []


@pytest.mark.parametrize("key", ["", '""', "  ", '"a', "a,b", "a b", '"\\n"', "\xe9"])
def test_a_malformed_key_is_refused(key):
    app = App()
    _, client = wrap(app, lint=False)
    refused(post(client, key), 400, "INVALID_KEY", "false")
    assert app.executions == 0


def test_the_longest_key_is_accepted_and_a_longer_one_refused():
    app = App()
    _, client = wrap(app)
    assert post(client, "k" * 256).status_code == 201
    refused(post(client, "k" * 257), 400, "KEY_TOO_LONG", "false")


def test_a_required_key_that_is_missing_is_refused():
    app = App()
    _, client = wrap(app, policy=Policy(required=True))
    refused(post(client, None), 400, "MISSING_KEY", "false")
    assert app.executions == 0


def test_a_request_of_nobody_is_refused():
    _, client = wrap(App(), scope=by_header("X-Tenant"))
    refused(post(client), 400, "MISSING_SCOPE", "false")


def failing(*args):
    raise LookupError("oops")


@pytest.mark.parametrize(
    "options",
    [
        {"scope": failing},
        {"scope": lambda environ: 7},
        {"policy": Policy(key=failing)},
        {"policy": Policy(key=lambda environ, body: 7)},
        {"policy": Policy(fingerprint=failing)},
        {"policy": Policy(fingerprint=lambda environ, body: "text")},
    ],
)
def test_an_extractor_that_fails_refuses_the_request(options, caplog):
    app = App()
    _, client = wrap(app, **options)
    refused(post(client), 500, "EXTRACTOR_FAILED", "false")
    assert app.executions == 0
    assert "was not run" in caplog.text


def test_keys_in_forms_and_json_leave_the_body_to_the_application():
    app = App()
    _, client = wrap(app, policy=Policy(key=form_field("key")))
    for _ in range(2):
        answer = client.post("/pay", data={"key": "k", "x": "1"})
    assert answer.headers["Idempotency-Replayed"] == "true"
    assert app.received == b"key=k&x=1"
    client.post("/pay", data={"x": "1"})
    assert app.received == b"x=1"
    _, client = wrap(app, policy=Policy(key=json_field("event.id")))
    for _ in range(2):
        answer = client.post("/pay", json={"event": {"id": "e1"}})
    assert answer.headers["Idempotency-Replayed"] == "true"


@pytest.mark.parametrize("fingerprint", [Policy().fingerprint, None], ids=["exact", "none"])
@pytest.mark.parametrize(
    ("environ", "status", "code", "retry"),
    [
        ({"HTTP_TRANSFER_ENCODING": "chunked"}, 411, "LENGTH_REQUIRED", "false"),
        ({"CONTENT_LENGTH": "11"}, 413, "BODY_TOO_LARGE", "false"),
        ({"CONTENT_LENGTH": "9"}, 400, "INCOMPLETE_BODY", "true"),
    ],
)
def test_a_body_that_can_not_be_taken_is_refused_and_nothing_claimed(
    environ, status, code, retry, fingerprint
):
    store, app = FaultyStore(), App()
    policy = Policy(max_request_bytes=10, fingerprint=fingerprint)
    middleware, _ = wrap(app, store=store, lint=False, policy=policy)
    base = EnvironBuilder(
        method="POST", path="/pay", data=b"12345", headers={"Idempotency-Key": "k"}
    ).get_environ()
    answer = Client(lambda e, s: middleware({**base, **environ}, s)).get("/")
    refused(answer, status, code, retry)
    assert app.executions == 0
    assert store.calls == []


def flask_form(flask):
    return flask.request.form["a"]


def flask_data(flask):
    return flask.request.get_data().decode().partition("=")[2]


def flask_stream(flask):
    return flask.request.stream.read().decode().partition("=")[2]


@pytest.mark.parametrize(
    "read",
    [
        lambda stream, size: stream.read(),
        lambda stream, size: stream.read(size),
        lambda stream, size: b"".join(iter(lambda: stream.read(7), b"")),
        lambda stream, size: b"".join(iter(stream.readline, b"")),
        lambda stream, size: b"".join(stream.readlines()),
        lambda stream, size: b"".join(stream),
    ],
    ids=["read()", "read(n)", "many reads", "readline()", "readlines()", "iteration"],
)
@pytest.mark.parametrize("size", [1000, 2_000_000], ids=["in memory", "in a file"])
def test_the_application_may_read_the_body_in_any_way(read, size):
    body = (b"x" * 98 + b"\r\n") * (size // 100)
    read_by = []

    def app(environ, start_response):
        read_by.append(read(environ["wsgi.input"], int(environ["CONTENT_LENGTH"])))
        start_response("201 Made It", [("Content-Type", "text/plain")])
        return []

    _, client = wrap(app, lint=False)
    assert post(client, body=body).status_code == 201
    assert read_by == [body]


@pytest.mark.parametrize("read", [flask_form, flask_data, flask_stream])
def test_a_framework_finds_the_body_where_it_looks_for_it(read):
    import flask

    shop = flask.Flask("shop")
    shop.add_url_rule("/pay", view_func=lambda: read(flask), methods=["POST"])
    shop.wsgi_app = IdempotencyMiddleware(shop.wsgi_app, "memory:", scope=everyone)
    client = shop.test_client()
    for replayed in (None, "true"):
        answer = client.post("/pay", data={"a": "1"}, headers={"Idempotency-Key": "k"})
        assert answer.text == "1"
        assert answer.headers.get("Idempotency-Replayed") == replayed


# ------------------------------------------------------------------ routes and construction


@pytest.mark.parametrize(
    ("path", "protected"),
    [
        ("/pay", True),
        ("/pay/", True),
        ("//pay", True),
        ("/pay/1", False),
        ("/PAY", False),
        ("/pa", False),
        ("/caf\u00e9", True),
        ("", False),
    ],
)
def test_a_route_covers_what_an_application_would_take_for_it(path, protected):
    """A slash at the end or doubled may be dropped on the way to the handler."""
    app = App()
    routes = [Route("/pay", Policy()), Route("/caf\u00e9", Policy())]
    middleware, _ = wrap(app, lint=False, policy=None, routes=routes)
    for _ in range(2):
        environ = environ_of(PATH_INFO=path.encode().decode("latin-1"))
        middleware(environ, lambda status, headers: None)
    assert app.executions == (1 if protected else 2)


def test_a_route_of_other_methods_is_passed_over_for_the_next():
    app = App()
    routes = [Route("/pay", None, methods=["PATCH"]), Route("/pay", Policy())]
    _, client = wrap(app, policy=None, routes=routes)
    for _ in range(2):
        client.patch("/pay", headers={"Idempotency-Key": "k"})
    assert app.executions == 2
    for _ in range(2):
        post(client)
    assert app.executions == 3


def test_a_route_counts_also_for_methods_its_policy_lets_pass():
    """As a person reads the list: the default policy is for what no route is for."""
    app = App()
    _, client = wrap(app, routes=[Route("/pay", Policy(methods=["PATCH"]))])
    for _ in range(2):
        assert post(client).status_code == 201
    assert app.executions == 2
    for _ in range(2):
        assert post(client, path="/other").status_code == 201
    assert app.executions == 3


def test_a_forked_child_has_places_to_wait_of_its_own():
    middleware, _ = wrap(App(), max_waiting=1)
    assert middleware.waiting.acquire(False)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if middleware.waiting.acquire(False) else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert not middleware.waiting.acquire(False), "the parent's are as they were"


def test_the_first_route_that_matches_counts():
    app = App()
    routes = [
        Route("/free", None),
        Route("/strict/<int:number>", Policy(required=True)),
        Route("/put", Policy(methods=["PUT"]), methods=["PUT"]),
        Route("/<path:rest>", Policy(max_key_length=3)),
    ]
    _, client = wrap(app, policy=None, routes=routes)
    for _ in range(2):
        assert post(client, path="/free").status_code == 201
    assert app.executions == 2
    refused(post(client, None, path="/strict/1"), 400, "MISSING_KEY", "false")
    refused(post(client, "long", path="/strict/x"), 400, "KEY_TOO_LONG", "false")
    refused(post(client, None, path="/strict//1"), 400, "MISSING_KEY", "false")
    client.put("/put", data=b"", headers={"Idempotency-Key": "k"})
    answer = client.put("/put", data=b"", headers={"Idempotency-Key": "k"})
    assert answer.headers["Idempotency-Replayed"] == "true"


def test_a_route_may_say_otherwise_whose_key_it_is():
    """Browsers by their session and programs by their credentials, for one."""
    app = App()
    routes = [Route("/form", Policy(scope=by_cookie("session")))]
    _, client = wrap(app, scope=by_header("X-Tenant"), routes=routes)
    alice = {"Cookie": "session=alice", "X_Tenant": "t"}
    bob = {"Cookie": "session=bob", "X_Tenant": "t"}
    for path, executions in (("/form", 2), ("/pay", 1)):
        app.executions = 0
        for person in (alice, bob, alice, bob):
            assert post(client, path=path, **person).status_code == 201
        assert app.executions == executions
    refused(post(client, path="/form", X_Tenant="t"), 400, "MISSING_SCOPE", "false")
    refused(post(client, path="/pay", Cookie="session=alice"), 400, "MISSING_SCOPE", "false")


@pytest.mark.parametrize("namespace", ["endpoint", "scope"])
def test_scopes_of_two_routes_that_say_the_same_never_share_a_response(namespace):
    """User 7 is not tenant 7; where the namespace is the scope's, their requests are two
    payloads under one key."""
    app = App()
    routes = [
        Route("/users", Policy(namespace=namespace, scope=lambda environ: "7")),
        Route("/tenants", Policy(namespace=namespace, scope=lambda environ: "7")),
    ]
    _, client = wrap(app, routes=routes)
    assert post(client, path="/users").status_code == 201
    answer = post(client, path="/tenants")
    if namespace == "scope":
        refused(answer, 422, "FINGERPRINT_MISMATCH", "false")
    assert (app.executions, "Idempotency-Replayed" in answer.headers) == (
        1 if namespace == "scope" else 2,
        False,
    )


def test_two_scopes_share_no_row_where_the_namespace_is_the_scope_s():
    app = App()
    routes = [Route("/form", Policy(namespace="scope", scope=by_cookie("session")))]
    _, client = wrap(
        app, scope=by_header("session"), policy=Policy(namespace="scope"), routes=routes
    )
    for _ in range(2):
        assert post(client, path="/form", Cookie="session=alice").status_code == 201
        assert post(client, path="/pay", session="alice").status_code == 201
    assert app.executions == 2


def test_a_route_s_scope_that_fails_refuses_the_request(caplog):
    app = App()
    routes = [Route("/pay", Policy(scope=lambda environ: environ["nobody"]))]
    _, client = wrap(app, routes=routes)
    refused(post(client), 500, "EXTRACTOR_FAILED", "false")
    assert "the scope of a request could not be found" in caplog.text
    assert app.executions == 0


def test_a_route_decides_everything_of_its_own_requests():
    """What the key is, how long it is remembered, what another payload and a failure are."""
    app = App(status="500 Internal Server Error")
    routes = [
        Route(
            "/hooks",
            Policy(
                methods=["PUT"],
                key=header("webhook-id"),
                fingerprint=None,
                required=True,
                retention=timedelta(days=30),
                outcomes=store_everything,
            ),
            methods=["PUT"],
        )
    ]
    _, client = wrap(app, routes=routes)
    answers = [
        client.put("/hooks", data=data, headers={"webhook-id": "m1"}) for data in (b"1", b"2")
    ]
    assert [answer.status_code for answer in answers] == [500, 500]
    assert answers[1].headers["Idempotency-Replayed"] == "true"
    assert app.executions == 1
    claim = app.environ[ENVIRON_KEY]._claim
    assert (claim.retention, claim.key) == (30 * 86400.0, "m1")
    refused(client.put("/hooks", data=b""), 400, "MISSING_KEY", "false")
    post(client, path="/hooks")  # of another method, and so the middleware's own policy
    post(client, path="/hooks")
    assert app.executions == 3
    assert app.environ[ENVIRON_KEY]._claim.retention == 86400.0


def test_without_a_policy_only_the_routes_are_protected():
    app = App()
    _, client = wrap(app, policy=None, routes=iter([Route("/pay", Policy())]))
    post(client, path="/other")
    post(client, path="/other")
    assert app.executions == 2
    post(client)
    assert post(client).headers["Idempotency-Replayed"] == "true"


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        pytest.param({"app": None}, "can't be called", id="an app that is None"),
        pytest.param({"scope": "alice"}, "can't be called", id="a scope that is a string"),
        pytest.param({"render_problem": 1}, "can't be called", id="a renderer that is a number"),
        pytest.param({"policy": "strict"}, "use a Policy", id="a policy by name"),
        pytest.param({"max_waiting": -1}, "whole number", id="a negative number of waiters"),
        pytest.param({"max_waiting": True}, "whole number", id="a number of waiters that is True"),
        pytest.param({"secret": "short"}, "at least 16", id="a short secret"),
        pytest.param({"secret": 7}, "at least 16", id="a secret that is a number"),
        pytest.param(
            {"routes": [Route("/<nothing:x>", Policy())]},
            "can't be used",
            id="a route with an unknown converter",
        ),
        pytest.param(
            {"routes": [Route("/<int(wide=1):x>", Policy())]},
            "can't be used",
            id="a route whose converter takes no such argument",
        ),
        pytest.param({"routes": [("/pay", Policy())]}, "use Route", id="a route that is a tuple"),
        pytest.param({"routes": Route("/pay", None)}, "use a list", id="a route for the routes"),
        pytest.param({"on_event": ["log"]}, "use callables", id="an observer that is a string"),
        pytest.param({"on_event": 7}, "use callables", id="an observer that is a number"),
        pytest.param({"store": 7}, "use a database URL", id="a store that is a number"),
        pytest.param(
            {"store": "mysql://localhost/x"}, "not supported", id="a database of another kind"
        ),
        pytest.param({"store": "sqlite://"}, "memory:", id="SQLite in memory"),
        pytest.param({"store": "what is this"}, "not a URL", id="a store that is no URL"),
    ],
)
def test_nonsense_is_refused_at_construction(options, advice):
    given = {"app": App(), "store": "memory:", "scope": everyone, **options}
    with pytest.raises(ConfigurationError, match=advice):
        IdempotencyMiddleware(given.pop("app"), given.pop("store"), **given)


def test_an_engine_serves_as_a_store(tmp_path):
    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path}/app.db", pool_size=1, max_overflow=0)
    app = App()
    _, client = wrap(app, store=engine)
    post(client)
    assert post(client).headers["Idempotency-Replayed"] == "true"
    engine.dispose()


# ------------------------------------------------------------------ WSGI (cases 30-34)


def listed(app, environ, start_response):
    start_response("201 Made It", [("Content-Type", "text/plain")])
    return [b"ma", b"", b"de"]


def tupled(app, environ, start_response):
    return tuple(listed(app, environ, start_response))


def generated(app, environ, start_response):
    yield from listed(app, environ, start_response)


def iterated(app, environ, start_response):
    return Closing(app, listed(app, environ, start_response))


def wrapped_file(app, environ, start_response):
    listed(app, environ, start_response)
    return environ["wsgi.file_wrapper"](io.BytesIO(b"made"))


def written(app, environ, start_response):
    start_response("201 Made It", [("Content-Type", "text/plain")])(b"made")
    return []


def written_then_iterated(app, environ, start_response):
    start_response("201 Made It", [("Content-Type", "text/plain")])(b"ma")
    return [b"de"]


def restarted(app, environ, start_response):
    start_response("200 OK", [("Content-Type", "text/html")])(b"begun")
    try:
        raise ValueError("changed my mind")
    except ValueError:
        start_response("201 Made It", [("Content-Type", "text/plain")], sys.exc_info())
    return [b"made"]


@pytest.mark.parametrize(
    "kind",
    [
        listed,
        tupled,
        generated,
        iterated,
        wrapped_file,
        written,
        written_then_iterated,
        restarted,
    ],
    ids=lambda kind: kind.__name__,
)
def test_every_way_to_answer_is_captured_and_replayed(kind):
    app = App()
    app.answer = lambda environ, start_response: kind(app, environ, start_response)
    middleware, _ = wrap(app, lint=False)
    client = Client(validator(middleware))
    first, second = post(client), post(client)
    for answer in (first, second):
        assert (answer.status, answer.get_data()) == ("201 Made It", b"made")
        assert answer.content_type == "text/plain"
    assert second.headers["Idempotency-Replayed"] == "true"
    assert app.executions == 1
    assert app.closed == (1 if kind is iterated else 0)


def raising(app, environ, start_response):
    raise RuntimeError("handler")


def raising_late(app, environ, start_response):
    listed(app, environ, start_response)

    def chunks():
        yield from (b"1", b"2", b"3")
        raise RuntimeError("handler")

    return Closing(app, chunks())


def exiting(app, environ, start_response):
    raise SystemExit(1)


@pytest.mark.parametrize("kind", [raising, raising_late, exiting], ids=lambda kind: kind.__name__)
def test_an_exception_goes_on_to_the_server_and_the_same_request_may_run_again(kind):
    app = App()
    app.answer = lambda environ, start_response: kind(app, environ, start_response)
    _, client = wrap(app, lint=False)
    with pytest.raises((RuntimeError, SystemExit)):
        post(client)
    del app.answer
    refused(post(client, body=b"another"), 422, "FINGERPRINT_MISMATCH", "false")
    assert post(client).status_code == 201
    assert app.environ[ENVIRON_KEY].attempt == 2
    assert app.closed == (1 if kind is raising_late else 0)


def test_an_exception_is_held_where_the_policy_says_so():
    app = App()
    app.answer = lambda environ, start_response: raising(app, environ, start_response)
    _, client = wrap(app, lint=False, policy=Policy(outcomes=hold_unknown))
    with pytest.raises(RuntimeError):
        post(client)
    refused(post(client), 409, "OUTCOME_UNKNOWN", "false")
    assert app.executions == 1


def never_started(environ, start_response):
    return []


def started_twice(environ, start_response):
    start_response("200 OK", [])
    start_response("200 OK", [])
    return []


def text_body(environ, start_response):
    start_response("200 OK", [])
    return ["text"]


def bad_status(environ, start_response):
    start_response("fine", [])
    return []


def chunk_before_start(environ, start_response):
    return [b"x"]


@pytest.mark.parametrize(
    "app",
    [never_started, started_twice, text_body, bad_status, chunk_before_start],
    ids=lambda app: app.__name__,
)
def test_an_application_that_breaks_the_rules_is_told(app):
    _, client = wrap(app, lint=False)
    with pytest.raises(InvalidApplication):
        post(client)


def test_a_close_that_fails_does_not_cost_the_client_its_response(caplog):
    app = App()

    def answer(environ, start_response):
        return Closing(app, listed(app, environ, start_response), RuntimeError("close"))

    app.answer = answer
    _, client = wrap(app, lint=False)
    assert post(client).get_data() == b"made"
    assert app.closed == 1
    assert "close() of the application's iterable failed" in caplog.text
    assert post(client).headers["Idempotency-Replayed"] == "true"


class Ended(BaseException):
    """As GreenletExit."""


@pytest.mark.parametrize("kind", [SystemExit, Ended])
def test_a_close_that_a_signal_ends_does_not_cost_the_operation_its_outcome(kind):
    """gunicorn ends a worker that takes too long by SystemExit, wherever it is. The answer was
    whole, and a retry must not run what it says was done."""
    app = App()

    def answer(environ, start_response):
        return Closing(app, listed(app, environ, start_response), kind())

    app.answer = answer
    _, client = wrap(app, lint=False)
    with pytest.raises(kind):
        post(client)
    replay = post(client)
    assert (replay.get_data(), replay.headers["Idempotency-Replayed"]) == (b"made", "true")
    assert (app.executions, app.closed) == (1, 1)


def test_what_the_application_puts_into_the_environ_is_visible_outside():
    app = App()
    middleware, _ = wrap(app, lint=False)
    environ = environ_of()
    app.answer = lambda env, start: env.update(seen=True) or listed(app, env, start)
    middleware(environ, lambda status, headers: None)
    assert environ["seen"] is True
    assert environ[ENVIRON_KEY].key == "k1"


# ------------------------------------------------------------------ what can't be held back


def test_a_response_over_the_limit_arrives_whole_and_never_runs_again():
    app = App(body=b"x" * 5000, headers=[("Location", "/order/1")])
    _, client = wrap(app, policy=Policy(max_response_bytes=4999))
    first = post(client)
    assert first.get_data() == app.body
    retry = post(client)
    document = refused(retry, 409, "RESPONSE_NOT_REPLAYABLE", "false")
    assert document["original_status"] == 201
    assert retry.headers["Location"] == "/order/1"
    assert app.executions == 1


@pytest.mark.parametrize(
    "headers", [[("Content-Length", "5000")], [("Content-Type", "text/event-stream; charset=x")]]
)
def test_the_first_byte_of_what_is_not_held_back_goes_out_at_once(headers):
    store, seen = MemoryStore(), []

    def app(environ, start_response):
        start_response("200 OK", headers)
        yield b"first"
        seen.append(current_operation.key)
        yield b"second"

    middleware, client = wrap(app, store=store, lint=False, policy=Policy(max_response_bytes=100))
    environ = EnvironBuilder(
        method="POST", path="/pay", data=b"body", content_type="text/plain",
        headers={"Idempotency-Key": "k1"},
    ).get_environ()  # fmt: skip
    started = []
    body = middleware(environ, lambda *args: started.append(args))
    chunks = iter(body)
    assert next(chunks) == b"first"
    assert seen == []
    refused(post(client), 409, "RESPONSE_NOT_REPLAYABLE", "false")
    assert list(chunks) == [b"second"]
    body.close()
    assert seen == ["k1"]
    assert started[0][0] == "200 OK"


def test_writes_over_the_limit_go_straight_to_the_server():
    app = App()

    def answer(environ, start_response):
        write = start_response("201 Made It", [("Content-Type", "text/plain")])
        for _ in range(3):
            write(b"x" * 60)
        with pytest.raises(InvalidApplication):
            start_response("200 OK", [])
        try:
            raise ValueError("too late")
        except ValueError:
            with pytest.raises(ValueError, match="too late"):
                start_response("500 Oh", [], sys.exc_info())
        return Closing(app, [b"end"])

    app.answer = answer
    _, client = wrap(app, lint=False, policy=Policy(max_response_bytes=100))
    assert served(client.application) == ("201 Made It", b"x" * 180 + b"end")
    assert app.closed == 1
    refused(post(client), 409, "RESPONSE_NOT_REPLAYABLE", "false")


def test_a_failure_too_large_to_hold_keeps_its_claim_until_the_last_byte():
    app = App("500 Oh", body=b"x" * 200)
    middleware, client = wrap(app, lint=False, policy=Policy(max_response_bytes=100))
    environ = EnvironBuilder(
        method="POST", path="/pay", data=b"body", content_type="text/plain",
        headers={"Idempotency-Key": "k1"},
    ).get_environ()  # fmt: skip
    body = middleware(environ, lambda *args: None)
    refused(post(client), 409, "CONFLICT", "true")
    assert b"".join(body) == app.body
    body.close()
    body.close()
    assert post(client).status_code == 500
    assert app.executions == 2


def test_a_response_the_server_can_not_send_counts_as_done():
    app = App(headers=[("X-Bad", "a\nb"), ("Location", "/x")])
    _, client = wrap(app, lint=False)
    with contextlib.suppress(ValueError):
        post(client)
    retry = post(client)
    refused(retry, 409, "RESPONSE_NOT_REPLAYABLE", "false")
    assert retry.headers["Location"] == "/x"
    app.status = "299 O\nK"
    with contextlib.suppress(ValueError):
        post(client, "k2")
    assert (
        refused(post(client, "k2"), 409, "RESPONSE_NOT_REPLAYABLE", "false")["original_status"]
        == 299
    )
    assert app.executions == 2


@pytest.mark.parametrize("header", [("X-Bad", None), ("X-Bad", "1", "2")], ids=repr)
def test_an_answer_with_something_else_for_a_header_counts_as_done(header):
    app = App(headers=[header, ("Location", "/x")])
    middleware, client = wrap(app, lint=False)
    middleware(environ_of(), lambda status, headers: None)
    retry = post(client)
    refused(retry, 409, "RESPONSE_NOT_REPLAYABLE", "false")
    assert retry.headers["Location"] == "/x"
    assert app.executions == 1


@pytest.mark.parametrize("reachable", [True, False], ids=["recorded", "to be recorded"])
def test_an_answer_is_settled_once_when_the_server_refuses_its_head(reachable):
    """It was recorded, or is going to be, before the server saw its head."""

    def refuse_head(status, headers):
        raise ValueError("a newline in a header field")

    store, app, told = FaultyStore(), App(body=b"x" * 200), []
    policy = Policy(max_response_bytes=100)
    middleware, client = wrap(app, store=store, lint=False, policy=policy, on_event=told.append)
    if not reachable:
        store.faults["complete"] = StoreUnavailable("down")
    with pytest.raises(ValueError, match="newline"):
        middleware(environ_of(), refuse_head)
    if not reachable:
        del store.faults["complete"]
        middleware.heartbeat.flush()
    refused(post(client), 409, "RESPONSE_NOT_REPLAYABLE", "false")
    assert app.executions == 1
    assert [event.name for event in told].count("executed") == 1
    assert "fenced" not in [event.name for event in told]


@pytest.mark.parametrize(
    "location",
    [
        "order/1",
        "//other/x",
        "/caf\xc3\xa9?q=a b|\xe9",
        "HTTP://Shop.example:80/%7ea/../b",
        "http://[",
    ],
)
@pytest.mark.parametrize("renderer", [rfc9457, stripe], ids=["rfc9457", "stripe"])
def test_a_location_reaches_the_retry_as_the_application_gave_it(location, renderer):
    """Byte for byte, though it may be no URI."""
    app = App(headers=[("Location", location)], body=b"x" * 200)
    policy = Policy(max_response_bytes=100)
    middleware, _ = wrap(app, lint=False, policy=policy, render_problem=renderer)
    served(middleware)
    headers = []
    assert served(middleware, headers)[0].startswith("409")
    assert [value for name, value in headers if name.lower() == "location"] == [location]


def test_a_client_that_goes_away_in_the_middle_of_a_stream_has_its_operation_done():
    app = App(body=b"x" * 200)
    middleware, client = wrap(app, lint=False, policy=Policy(max_response_bytes=100))
    app.answer = lambda environ, start_response: Closing(
        app, App.answer(app, environ, start_response) * 1000
    )
    body = middleware(environ_of(), lambda status, headers: None)
    next(iter(body))
    body.close()
    assert app.closed == 1
    refused(post(client), 409, "RESPONSE_NOT_REPLAYABLE", "false")
    assert app.executions == 1


@pytest.mark.parametrize("location", ["/a\nSet-Cookie: a=b", "\u20ac", ""])
def test_a_location_that_somebody_else_has_stored_and_can_not_be_sent_is_left_out(location):
    store, app = MemoryStore(), App()
    _, client = wrap(app, store=store)
    post(client)
    claim = app.environ[ENVIRON_KEY]._claim
    headers = (("Location", location),)
    store.complete(claim.digest, claim.token, Completion("201 Made It", headers, None, "why"))
    retry = post(client)
    refused(retry, 409, "RESPONSE_NOT_REPLAYABLE", "false")
    assert "Location" not in retry.headers


def test_the_answer_to_one_range_counts_as_done():
    app = App("206 Partial")
    _, client = wrap(app)
    assert post(client).status_code == 206
    refused(post(client), 409, "RESPONSE_NOT_REPLAYABLE", "false")


# ------------------------------------------------------------------ duplicates in flight


class Gate(App):
    """Stays in the handler until it is let go."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.entered, self.go = threading.Event(), threading.Event()
        self.statuses = []  # of the runs after the first
        self.inside = self.most = 0

    def answer(self, environ, start_response):
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.entered.set()
        assert self.go.wait(30)
        self.inside -= 1
        if self.executions > 1:
            self.status = self.statuses.pop(0) if self.statuses else self.status
        return super().answer(environ, start_response)


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def in_threads(count, work):
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(work())) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, answers


def test_a_duplicate_in_flight_is_told_to_come_back():
    app = Gate()
    _, client = wrap(app)
    threads, answers = in_threads(1, lambda: post(client))
    assert app.entered.wait(30)
    again = post(client)
    refused(again, 409, "CONFLICT", "true")
    assert again.headers["Retry-After"] == "1"
    refused(post(client, body=b"other"), 422, "FINGERPRINT_MISMATCH", "false")
    app.go.set()
    threads[0].join()
    assert answers[0].status_code == 201
    assert post(client).headers["Idempotency-Replayed"] == "true"


def test_a_duplicate_that_need_not_wait_is_refused_at_once(store):
    app = Gate()
    _, client = wrap(app, store=store)
    threads, _ = in_threads(1, lambda: post(client))
    assert app.entered.wait(30)
    started = time.monotonic()
    refused(post(client), 409, "CONFLICT", "true")
    assert time.monotonic() - started < 1
    app.go.set()
    threads[0].join()


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [(store_success, "FINGERPRINT_MISMATCH"), (hold_unknown, "OUTCOME_UNKNOWN")],
    ids=["another payload", "held"],
)
def test_nobody_waits_for_what_waiting_can_not_change(store, outcomes, code):
    app = Gate("500 Oh")
    app.go.set()
    _, client = wrap(app, store=store, policy=Policy(wait=60, outcomes=outcomes))
    post(client)
    started = time.monotonic()
    if code == "OUTCOME_UNKNOWN":
        refused(post(client), 409, code, "false")
    else:
        app.go.clear()
        threads, _ = in_threads(1, lambda: post(client))
        until(lambda: app.executions == 2)
        refused(post(client, body=b"other"), 422, code, "false")
        app.go.set()
        threads[0].join()
    assert time.monotonic() - started < 30


def test_a_waiting_duplicate_replays_soon_after_the_first_is_done(store):
    app = Gate()
    replays = []
    _, client = wrap(app, store=store, policy=Policy(wait=30))
    first, _ = in_threads(1, lambda: post(client))
    assert app.entered.wait(30)
    other, answers = in_threads(1, lambda: (post(client), replays.append(time.monotonic())))
    other[0].join(0.2)
    assert answers == []
    done = time.monotonic()
    app.go.set()
    for thread in [*first, *other]:
        thread.join()
    assert answers[0][0].headers["Idempotency-Replayed"] == "true"
    assert replays[0] - done < 1
    assert app.executions == 1


def test_exactly_one_waiter_runs_what_the_first_has_failed_at(store):
    """The others get its response."""
    app = Gate("500 Oh")
    _, client = wrap(app, store=store, policy=Policy(wait=30))
    first, failure = in_threads(1, lambda: post(client))
    assert app.entered.wait(30)
    others, answers = in_threads(4, lambda: post(client))
    for thread in others:
        thread.join(0.1)
    app.statuses = ["201 Made It"]
    app.go.set()
    for thread in [*first, *others]:
        thread.join()
    assert [answer.status_code for answer in failure] == [500]
    assert [answer.status_code for answer in answers] == [201] * 4
    replayed = [answer.headers.get("Idempotency-Replayed") for answer in answers]
    assert replayed.count("true") == 3
    assert app.executions == 2
    assert app.most == 1


def test_waiting_duplicates_replay_and_those_over_the_cap_are_sent_away():
    app = Gate()
    told = []
    _, client = wrap(app, policy=Policy(wait=20), max_waiting=2, on_event=told.append)
    first, _ = in_threads(1, lambda: post(client))
    assert app.entered.wait(30)
    others, answers = in_threads(4, lambda: post(client))
    until(lambda: len(answers) == 2)
    assert [answer.status_code for answer in answers] == [409, 409]
    app.go.set()
    for thread in [*first, *others]:
        thread.join()
    assert [answer.headers.get("Idempotency-Replayed") for answer in answers[2:]] == ["true"] * 2
    assert app.executions == 1
    assert [event.name for event in told].count("waited") == 2
    assert all(event.seconds > 0 for event in told if event.name == "waited")


def test_a_wait_that_is_over_is_a_conflict_and_nobody_may_wait_where_none_are_allowed():
    app = Gate()
    store = MemoryStore()
    _, client = wrap(app, store=store, policy=Policy(wait=0.1))
    _, impatient = wrap(app, store=store, policy=Policy(wait=20), max_waiting=0)
    threads, _ = in_threads(1, lambda: post(client))
    assert app.entered.wait(30)
    refused(post(client), 409, "CONFLICT", "true")
    refused(post(impatient), 409, "CONFLICT", "true")
    app.go.set()
    threads[0].join()


def test_when_the_first_fails_one_waiter_at_a_time_runs():
    app = Gate("500 Oh")
    _, client = wrap(app, policy=Policy(wait=20))
    threads, answers = in_threads(4, lambda: post(client))
    assert app.entered.wait(30)
    app.go.set()
    for thread in threads:
        thread.join()
    assert app.most == 1
    assert [answer.status_code for answer in answers] == [500] * 4


def test_a_handler_that_calls_itself_with_its_own_key_is_told_of_the_conflict():
    app = App()
    _, client = wrap(app)
    inner = []

    def answer(environ, start_response):
        inner.append(post(client))
        return listed(app, environ, start_response)

    app.answer = answer
    assert post(client).status_code == 201
    refused(inner[0], 409, "CONFLICT", "true")


def test_churn_on_one_key_never_runs_two_at_once():
    class Churn(Gate):
        def answer(self, environ, start_response):
            self.go.set()
            return super().answer(environ, start_response)

    app = Churn("500 Oh")
    _, client = wrap(app, lint=False)
    threads, _ = in_threads(12, lambda: [post(client) for _ in range(30)])
    for thread in threads:
        thread.join()
    assert app.most == 1


# ------------------------------------------------------------------ the store fails (P8)


@pytest.mark.parametrize("fault", [StoreUnavailable("down"), ZeroDivisionError("bug")], ids=repr)
def test_a_store_that_fails_before_the_handler_refuses(fault):
    store, app, told = FaultyStore(), App(), []
    store.faults["claim"] = fault
    _, client = wrap(app, store=store, on_event=[told.append])
    answer = post(client)
    refused(answer, 503, "STORE_UNAVAILABLE", "true")
    assert 1 <= int(answer.headers["Retry-After"]) <= 5
    assert app.executions == 0
    assert [event.name for event in told] == ["store_failure", "refused"]
    assert told[0].exception is fault


def test_bypass_runs_unprotected_and_says_so():
    store, app, told = FaultyStore(), App(), []
    store.faults["claim"] = StoreUnavailable("down")
    policy = Policy(on_store_failure="bypass")
    _, client = wrap(app, store=store, policy=policy, on_event=told.append)
    answer = post(client)
    assert answer.status_code == 201
    assert answer.headers["Idempotency-Status"] == "unprotected"
    assert app.received == b"body"
    assert "unprotected" in [event.name for event in told]
    store.faults["claim"] = ZeroDivisionError("a bug is not an outage")
    refused(post(client), 503, "STORE_UNAVAILABLE", "true")


def test_an_error_page_of_an_unprotected_application_is_marked_too():
    def app(environ, start_response):
        try:
            raise ValueError
        except ValueError:
            start_response("500 Oh", [], sys.exc_info())
        return [b"oh"]

    store = FaultyStore()
    store.faults["claim"] = StoreUnavailable("down")
    policy = Policy(on_store_failure="bypass")
    middleware, _ = wrap(app, store=store, lint=False, policy=policy)
    seen = []
    assert served(middleware, seen) == ("500 Oh", b"oh")
    assert seen == [("Idempotency-Status", "unprotected")]


@pytest.mark.parametrize(
    ("status", "call"), [("201 Made It", "complete"), ("400 Bad", "forget"), ("500 Oh", "release")]
)
def test_a_store_that_fails_after_the_handler_does_not_cost_the_client_its_response(status, call):
    store, app = FaultyStore(), App(status)
    store.faults[call] = StoreUnavailable("down")
    middleware, client = wrap(app, store=store)
    assert post(client).status == status
    refused(post(client), 409, "CONFLICT", "true")
    del store.faults[call]
    middleware.heartbeat.flush()
    retry = post(client)
    assert retry.headers.get("Idempotency-Replayed") == ("true" if call == "complete" else None)


def test_an_interruption_while_the_end_is_recorded_is_recorded_later():
    store, app = FaultyStore(), App()
    store.faults["complete"] = KeyboardInterrupt()
    middleware, client = wrap(app, store=store, lint=False)
    with pytest.raises(KeyboardInterrupt):
        post(client)
    del store.faults["complete"]
    middleware.heartbeat.flush()
    assert post(client).headers["Idempotency-Replayed"] == "true"


def test_a_response_that_the_store_refuses_counts_as_done():
    class Picky(FaultyStore):
        def complete(self, digest, token, completion):
            if completion.body is not None:
                raise NotStorable("too much")
            return self.memory.complete(digest, token, completion)

    app = App()
    _, client = wrap(app, store=Picky())
    assert post(client).get_data() == b"made"
    refused(post(client), 409, "RESPONSE_NOT_REPLAYABLE", "false")
    assert app.executions == 1


def test_a_response_that_the_store_refuses_in_every_form_is_recorded_later():
    """The client gets it, and nobody runs it again meanwhile."""
    store, app = FaultyStore(), App()
    store.faults["complete"] = NotStorable("not even its head")
    middleware, client = wrap(app, store=store)
    assert post(client).get_data() == b"made"
    refused(post(client), 409, "CONFLICT", "true")
    del store.faults["complete"]
    middleware.heartbeat.flush()
    assert post(client).headers["Idempotency-Replayed"] == "true"
    assert app.executions == 1


def test_a_response_that_is_recorded_late_may_still_turn_out_too_much():
    class Picky(FaultyStore):
        def complete(self, digest, token, completion):
            if "complete" in self.faults:
                raise self.faults["complete"]
            if completion.body is not None:
                raise NotStorable("too much")
            return self.memory.complete(digest, token, completion)

    store, app = Picky(), App()
    store.faults["complete"] = StoreUnavailable("down")
    middleware, client = wrap(app, store=store)
    assert post(client).get_data() == b"made"
    del store.faults["complete"]
    middleware.heartbeat.flush()
    refused(post(client), 409, "RESPONSE_NOT_REPLAYABLE", "false")
    assert app.executions == 1


@pytest.mark.parametrize("call", ["forget", "release"])
def test_no_error_of_a_store_costs_the_client_its_response(call):
    store, app = FaultyStore(), App("400 Bad" if call == "forget" else "500 Oh")
    store.faults[call] = NotStorable("a bug of a third party's")
    middleware, client = wrap(app, store=store)
    assert post(client).status == app.status
    del store.faults[call]
    middleware.heartbeat.flush()
    assert post(client).status == app.status
    assert app.executions == 2


def test_the_lease_is_kept_while_a_slow_store_records_the_end():
    class Slow(FaultyStore):
        def complete(self, digest, token, completion):
            deadline = time.monotonic() + 20
            while self.calls.count("renew") < 5 and time.monotonic() < deadline:
                time.sleep(0.01)
            self.lapsed = self.memory.lookup(digest).lapsed
            return self.memory.complete(digest, token, completion)

    store = Slow()
    _, client = wrap(App(), store=store, policy=Policy(lease=1))
    assert post(client).status_code == 201
    assert store.lapsed is False
    assert post(client).headers["Idempotency-Replayed"] == "true"


def test_a_completion_whose_answer_was_lost_is_not_taken_for_a_lost_claim(caplog):
    class Broken(FaultyStore):
        def complete(self, digest, token, completion):
            self.calls.append("complete")
            self.memory.complete(digest, token, completion)
            if self.calls.count("complete") == 1:
                raise AnswerLost("the connection broke")
            self.again.set()
            return self.memory.complete(digest, token, completion)

    store, app, told = Broken(), App(), []
    store.again = threading.Event()
    _, client = wrap(app, store=store, on_event=told.append)
    assert post(client).status_code == 201
    assert post(client).headers["Idempotency-Replayed"] == "true"
    assert store.again.wait(20)
    assert not app.environ[ENVIRON_KEY].lost
    assert "lost its claim" not in caplog.text
    assert "fenced" not in [event.name for event in told]


def test_where_no_claim_can_be_kept_no_handler_runs():
    """Its operation didn't happen, whatever the policy holds of those that may have."""
    app = App()
    _, client = wrap(app, lint=False, policy=Policy(outcomes=hold_unknown))
    size = threading.stack_size(1 << 50)  # more than there is: no thread can be started
    try:
        with pytest.raises(RuntimeError):
            post(client)
    finally:
        threading.stack_size(size)
    assert app.executions == 0
    assert post(client, body=b"corrected").status_code == 201
    assert app.environ[ENVIRON_KEY].attempt == 1


def test_a_newline_in_a_path_forges_no_line_in_the_log(caplog):
    store = FaultyStore()
    store.faults["claim"] = StoreUnavailable("down")
    middleware, _ = wrap(App(), store=store, lint=False)
    environ = environ_of(PATH_INFO="/pay\nCRITICAL all is well")
    middleware(environ, lambda status, headers, exc_info=None: None)
    assert caplog.messages == [
        "no claim could be made for POST /pay\\x0aCRITICAL all is well: down"
    ]


def test_an_interruption_while_it_claims_is_undone():
    store, app = FaultyStore(), App()
    store.faults["claim"] = KeyboardInterrupt()
    middleware, client = wrap(app, store=store, lint=False)
    with pytest.raises(KeyboardInterrupt):
        post(client)
    del store.faults["claim"]
    middleware.heartbeat.flush()
    assert store.calls == ["claim", "forget"]


def away(path):
    """No directory to keep the file in."""
    return f"sqlite:///{path}/nowhere/keys.db"


def read_only(path):
    store = SQLStore(f"sqlite:///{path}/keys.db")
    store.check()
    store.close()
    return f"sqlite:///file:{path}/keys.db?mode=ro&uri=true"


def no_database(path):
    (path / "keys.db").write_bytes(b"something else" * 1000)
    return f"sqlite:///{path}/keys.db"


@pytest.mark.parametrize("broken", [away, read_only, no_database], ids=lambda kind: kind.__name__)
def test_nothing_runs_while_the_file_can_not_be_used(tmp_path, broken):
    store, app = SQLStore(broken(tmp_path), timeout=0.2), App()
    _, client = wrap(app, store=store)
    answer = post(client)
    refused(answer, 503, "STORE_UNAVAILABLE", "true")
    assert str(tmp_path) not in answer.text
    assert app.executions == 0
    store.close()


@contextlib.contextmanager
def locked(path):
    """Somebody else writes to the file, and takes their time."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    yield
    connection.execute("ROLLBACK")
    connection.close()


def test_nothing_runs_while_the_file_is_locked(tmp_path):
    store, app = SQLStore(f"sqlite:///{tmp_path}/keys.db", timeout=0.2), App()
    _, client = wrap(app, store=store)
    post(client, "done")
    with locked(tmp_path / "keys.db"):
        started = time.monotonic()
        refused(post(client), 503, "STORE_UNAVAILABLE", "true")
        assert time.monotonic() - started < 5
        assert post(client, "done").headers["Idempotency-Replayed"] == "true"
    assert app.executions == 1
    assert post(client).status_code == 201
    store.close()


@pytest.mark.parametrize(
    ("status", "then"),
    [("201 Made It", "replayed"), ("400 Bad", "fresh"), ("500 Oh", "attempt 2")],
)
def test_an_end_that_a_locked_file_could_not_take_is_recorded_by_the_heartbeat(
    tmp_path, status, then
):
    store, app = SQLStore(f"sqlite:///{tmp_path}/keys.db", timeout=0.2), App(status)
    middleware, client = wrap(app, store=store)
    with contextlib.ExitStack() as lock:

        def answer(environ, start_response):
            lock.enter_context(locked(tmp_path / "keys.db"))
            return App.answer(app, environ, start_response)

        app.answer = answer
        assert post(client).status == status
        refused(post(client), 409, "CONFLICT", "true")
    del app.answer
    until(lambda: middleware.heartbeat._kept == {})
    again = post(client)
    assert (again.headers.get("Idempotency-Replayed") == "true") is (then == "replayed")
    assert app.executions == (1 if then == "replayed" else 2)
    assert app.environ[ENVIRON_KEY].attempt == (2 if then == "attempt 2" else 1)
    store.close()


def test_what_was_made_of_a_stored_head_is_not_sent(caplog):
    store, app = MemoryStore(), App()
    _, client = wrap(app, store=store)
    post(client)
    claim = app.environ[ENVIRON_KEY]._claim
    tampered = Completion("201 Made\nSet-Cookie: a=b", (), b"made")
    assert store.complete(claim.digest, claim.token, tampered)
    document = refused(post(client), 409, "RESPONSE_NOT_REPLAYABLE", "false")
    assert document["original_status"] is None
    assert f"digest {claim.digest.hex()} can't be sent" in caplog.text
    assert app.executions == 1


# ------------------------------------------------------------------ overtaken (P3)


def overtaking(store, then):
    """An application during whose run somebody else takes its claim over."""

    def answer(environ, start_response):
        operation = environ[ENVIRON_KEY]
        claim = operation._claim
        seen = store.lookup(claim.digest)
        store.release(claim.digest, claim.token)
        other = dataclasses.replace(claim, token=b"o" * 16)
        assert store.take_over(other, seen) is not None
        then(other)
        start_response("201 Made It", [("Content-Type", "text/plain")])
        return [b"late" * 100]

    return answer


def completes(store):
    return lambda claim: store.complete(
        claim.digest,
        claim.token,
        Completion("200 Winner", (("Content-Type", "text/plain"),), b"won"),
    )


@pytest.mark.parametrize("limit", [10_000, 100], ids=["held back", "passed on"])
def test_a_handler_that_was_overtaken_answers_with_the_winner_s_response(store, limit):
    app, told = App(), []
    app.answer = overtaking(store, completes(store))
    policy = Policy(max_response_bytes=limit)
    _, client = wrap(app, store=store, policy=policy, on_event=told.append)
    answer = post(client)
    assert (answer.status, answer.get_data()) == ("200 Winner", b"won")
    assert "fenced" in [event.name for event in told]
    assert post(client).get_data() == b"won"


def test_writes_of_a_handler_that_was_overtaken_are_dropped():
    store, app = MemoryStore(), App()
    overtaken = overtaking(store, completes(store))

    def answer(environ, start_response):
        overtaken(environ, lambda status, headers: None)
        write = start_response("201 Made It", [])
        write(b"x" * 200)
        write(b"y" * 200)
        return [b"z"]

    app.answer = answer
    _, client = wrap(app, store=store, lint=False, policy=Policy(max_response_bytes=100))
    assert post(client).get_data() == b"won"


@pytest.mark.parametrize(
    ("then", "code", "retry"),
    [
        (lambda store: lambda claim: None, "CONFLICT", "true"),
        (
            lambda store: lambda claim: store.forget(claim.digest, claim.token),
            "OUTCOME_UNKNOWN",
            "false",
        ),
        (
            lambda store: lambda claim: store.release(claim.digest, claim.token),
            "OUTCOME_UNKNOWN",
            "false",
        ),
    ],
    ids=["still running", "forgotten", "released"],
)
def test_without_a_winner_s_response_an_overtaken_handler_answers_409(then, code, retry):
    store, app = MemoryStore(), App()
    app.answer = overtaking(store, then(store))
    _, client = wrap(app, store=store)
    refused(post(client), 409, code, retry)


@pytest.mark.parametrize("status", ["400 Bad", "500 Oh"], ids=["forgotten", "released"])
def test_a_late_failure_changes_nothing_of_what_the_winner_has_recorded(store, status):
    app = App()
    overtaken = overtaking(store, completes(store))

    def answer(environ, start_response):
        overtaken(environ, lambda status, headers: None)
        start_response(status, [("Content-Type", "text/plain")])
        return [b"late"]

    app.answer = answer
    _, client = wrap(app, store=store)
    post(client)
    assert post(client).get_data() == b"won"
    assert app.executions == 1
    assert app.environ[ENVIRON_KEY].lost


@pytest.mark.parametrize(
    ("status", "outcomes"),
    [("400 Bad", store_success), ("500 Oh", store_success), ("500 Oh", hold_unknown)],
    ids=["forgotten", "released", "held"],
)
def test_a_late_failure_takes_nothing_from_the_one_that_runs(store, status, outcomes):
    app, heirs = App(), []
    overtaken = overtaking(store, heirs.append)

    def answer(environ, start_response):
        overtaken(environ, lambda status, headers: None)
        start_response(status, [("Content-Type", "text/plain")])
        return [b"late"]

    app.answer = answer
    _, client = wrap(app, store=store, policy=Policy(outcomes=outcomes))
    post(client)
    (heir,) = heirs
    record = store.lookup(heir.digest)
    assert (record.state, record.token) == (State.CLAIMED, heir.token)
    assert app.environ[ENVIRON_KEY].lost


def test_a_handler_learns_that_it_was_overtaken_while_it_runs(store, caplog):
    app = App()
    overtaken = overtaking(store, completes(store))

    def answer(environ, start_response):
        answered = overtaken(environ, start_response)
        until(lambda: environ[ENVIRON_KEY].lost)
        return answered

    app.answer = answer
    _, client = wrap(app, store=store, policy=Policy(lease=1))
    assert post(client).get_data() == b"won"
    assert "has lost its claim to another worker" in caplog.text


@pytest.mark.parametrize("fault", [StoreUnavailable("down"), ZeroDivisionError("bug")], ids=repr)
def test_an_overtaken_handler_whose_store_fails_answers_409(fault):
    store, app = FaultyStore(), App()
    app.answer = overtaking(store.memory, completes(store.memory))
    store.faults["lookup"] = fault
    _, client = wrap(app, store=store)
    refused(post(client), 409, "OUTCOME_UNKNOWN", "false")


def test_a_take_over_that_somebody_else_won_is_looked_at_again():
    store, app = FaultyStore(), App("500 Oh")
    _, client = wrap(app, store=store)
    post(client)
    lost = []
    take_over = store.memory.take_over
    store.take_over = lambda claim, seen: lost.append(1) if not lost else take_over(claim, seen)
    assert post(client).status_code == 500
    assert store.calls.count("claim") == 3


# ------------------------------------------------------------------ observers and renderers (P9)


def test_what_observers_raise_is_logged(caplog):
    _, client = wrap(App(), on_event=[failing])
    assert post(client).status_code == 201
    assert "the observer" in caplog.text


def breaking_off(problem, environ):
    def app(environ, start_response):
        start_response("422 Oh", [])
        yield b"{"
        raise LookupError

    return app


def silent(problem, environ):
    return lambda environ, start_response: []


def forging(problem, environ):
    def app(environ, start_response):
        start_response("422 Oh", [("X-Code", "a\nSet-Cookie: a=b")])
        return []

    return app


@pytest.mark.parametrize(
    "renderer",
    [
        failing,
        pytest.param(lambda problem, environ: None, id="None"),
        pytest.param(lambda problem, environ: failing, id="an application that raises"),
        pytest.param(breaking_off, id="an application that raises after its first chunk"),
        pytest.param(silent, id="an application that starts no response"),
        pytest.param(forging, id="an application whose header would forge another"),
    ],
)
def test_a_renderer_that_fails_is_replaced(caplog, renderer):
    """The client gets the problem all the same, and the operator is told."""
    _, client = wrap(App(), render_problem=renderer)
    post(client)
    document = refused(post(client, body=b"other"), 422, "FINGERPRINT_MISMATCH", "false")
    assert document["type"].startswith("urn:")
    (told,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert told.getMessage().startswith("render_problem failed on FINGERPRINT_MISMATCH")


def test_a_renderer_may_write_and_start_again():
    class Body(list):
        closed = 0

        def close(self):
            type(self).closed += 1

    def renderer(problem, environ):
        def app(environ, start_response):
            start_response("200 OK", [])
            write = start_response("418 Oh", [("X-Code", problem.code)], (None, None, None))
            write(b"a")
            return Body([b"b", b"c"])

        return app

    _, client = wrap(App(), lint=False, render_problem=renderer)
    post(client)
    answer = post(client, body=b"other")
    assert (answer.status, answer.get_data()) == ("418 Oh", b"abc")
    assert answer.headers["X-Code"] == "FINGERPRINT_MISMATCH"
    assert answer.headers["X-Should-Retry"] == "false"
    assert Body.closed == 1


def test_another_renderer_still_gets_the_hints():
    _, client = wrap(App(), render_problem=stripe)
    post(client)
    answer = post(client, body=b"other")
    assert answer.status_code == 400
    assert answer.headers["Stripe-Should-Retry"] == "false"


def test_an_outcomes_function_that_fails_stores_or_holds(caplog):
    def outcomes(outcome):
        if outcome.lapsed:
            return hold_unknown(outcome)
        raise LookupError("oops")

    app = App("500 Oh")
    _, client = wrap(app, policy=Policy(outcomes=outcomes))
    post(client)
    assert post(client).headers["Idempotency-Replayed"] == "true"
    assert "outcomes failed" in caplog.text


def test_an_interruption_of_the_policy_s_decision_does_not_keep_the_claim():
    interruptions = [KeyboardInterrupt()]

    def outcomes(outcome):
        if not outcome.lapsed and interruptions:
            raise interruptions.pop()
        return store_success(outcome)

    app = App()
    _, client = wrap(app, lint=False, policy=Policy(outcomes=outcomes))
    with pytest.raises(KeyboardInterrupt):
        post(client)
    replay = post(client)
    assert (replay.status_code, replay.headers["Idempotency-Replayed"]) == (201, "true")
    assert app.executions == 1


def test_an_interruption_of_an_observer_does_not_keep_a_place_to_wait():
    app = Gate()

    def observer(event):
        if event.name == "waited":
            raise KeyboardInterrupt

    _, client = wrap(app, lint=False, policy=Policy(wait=0.05), max_waiting=1, on_event=observer)
    threads, _ = in_threads(1, lambda: post(client))
    assert app.entered.wait(30)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            post(client)
    app.go.set()
    threads[0].join()


# ------------------------------------------------------------------ the operation


def test_a_handler_sees_its_operation_and_may_overrule_the_policy():
    app = App("500 Oh")
    seen = []

    def answer(environ, start_response):
        operation = environ[ENVIRON_KEY]
        assert current_operation == operation
        seen.append((operation.key, operation.scope, operation.attempt, operation.lost))
        seen.append(operation.derive_key("charge"))
        assert operation.derive_key("charge") != operation.derive_key("refund")
        with pytest.raises(ValueError, match="needs a name"):
            operation.derive_key("")
        assert "attempt" in repr(operation)
        getattr(operation, choices.pop(0))()
        return App.answer(app, environ, start_response)

    app.answer = answer
    choices = ["release", "forget", "release", "store"]
    _, client = wrap(app)
    for _ in range(5):
        answer = post(client)
    assert answer.headers["Idempotency-Replayed"] == "true"
    assert seen[::2] == [
        ("k1", "everyone", 1, False),
        ("k1", "everyone", 2, False),
        ("k1", "everyone", 1, False),
        ("k1", "everyone", 2, False),
    ]
    assert len(set(seen[1::2])) == 1
    choices = ["hold"]
    post(client, "k2")
    refused(post(client, "k2"), 409, "OUTCOME_UNKNOWN", "false")


@pytest.mark.parametrize("path", ["/kept", "/other"])
def test_a_handler_overrules_the_policy_of_its_route_too(path):
    app = App("500 Oh")

    def answer(environ, start_response):
        if environ["HTTP_X_CHOICE"]:
            getattr(environ[ENVIRON_KEY], environ["HTTP_X_CHOICE"])()
        return App.answer(app, environ, start_response)

    app.answer = answer
    routes = [Route("/kept", Policy(outcomes=store_everything))]
    _, client = wrap(app, routes=routes, policy=Policy(outcomes=hold_unknown))
    for choice in ("release", "forget", ""):
        assert "Idempotency-Replayed" not in post(client, path=path, X_Choice=choice).headers
    assert app.executions == 3
    answer = post(client, path=path, X_Choice="")
    if path == "/kept":
        assert answer.headers["Idempotency-Replayed"] == "true"
    else:
        refused(answer, 409, "OUTCOME_UNKNOWN", "false")
    assert app.executions == 3


FORKING = """
import os, sys
sys.path[:0] = {path!r}
import test_middleware as t

def answer(environ, start_response):
    child = os.fork()
    if not child:
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0
    return t.App.answer(app, environ, start_response)

app = t.App()
app.answer = answer
_, client = t.wrap(app, store=t.SQLStore({url!r}), lint=False)
assert t.post(client).status_code == 201
assert t.post(client).headers["Idempotency-Replayed"] == "true"
assert app.executions == 1
"""


def test_a_child_that_a_handler_forks_leaves_the_claim_to_its_parent(sqlite_url):
    """Its exit passes through the middleware as an exception of the handler's would."""
    code = FORKING.format(path=[os.path.dirname(__file__)], url=sqlite_url)
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.timeout(900)  # seconds; branch coverage slows each of the many requests
def test_ten_thousand_errors_leak_nothing(caplog):
    # What threads that other tests have left log meanwhile is kept until the end of this one.
    caplog.set_level(logging.CRITICAL + 1, logger="wsgi_idempotency")

    def app(environ, start_response):
        raise RuntimeError("handler")

    _middleware, client = wrap(app, lint=False)

    def burst(count):
        for number in range(count):
            with contextlib.suppress(RuntimeError):
                post(client, str(number % 50))
        gc.collect()
        return len(gc.get_objects()), len(os.listdir("/proc/self/fd"))

    burst(1000)
    objects, files = burst(500)
    later, files_later = burst(8500)
    assert later - objects < 500
    assert files_later == files


def test_an_observer_that_is_interrupted_at_a_take_over_leaves_no_claim_behind():
    def interrupted(event):
        if event.name == "taken_over" and not told:
            told.append(event)
            raise KeyboardInterrupt

    told = []
    app = App("500 Oh")
    middleware, client = wrap(app, lint=False, on_event=interrupted)
    post(client)
    with pytest.raises(KeyboardInterrupt):
        post(client)
    middleware.heartbeat.flush()
    assert post(client).status_code == 500
    assert app.executions == 2


def test_keys_derived_for_other_systems_outlive_a_change_of_the_fingerprint_policy():
    from wsgi_idempotency import canonical

    store, app, derived = MemoryStore(), App("500 Oh"), []

    def answer(environ, start_response):
        derived.append(environ[ENVIRON_KEY].derive_key("charge"))
        return App.answer(app, environ, start_response)

    app.answer = answer
    post(wrap(app, store=store)[1])
    post(wrap(app, store=store, policy=Policy(fingerprint=canonical))[1])
    assert app.environ[ENVIRON_KEY].attempt == 2
    assert derived[0] == derived[1]


def test_a_path_that_no_server_should_give_is_still_matched_against_the_routes():
    app = App()
    middleware, _ = wrap(app, lint=False, policy=None, routes=[Route("/<rest>", Policy())])
    environ = EnvironBuilder(
        method="POST", data=b"", headers={"Idempotency-Key": "k"}
    ).get_environ()
    environ["PATH_INFO"] = "/\u20ac"
    body = middleware(environ, lambda status, headers, exc_info=None: None)
    assert b"".join(body) == b"made"


def test_the_body_of_a_request_without_a_key_is_left_to_the_application():
    """P5: neither read nor replaced, nor is the environ otherwise touched."""

    class Unread(io.BytesIO):
        def read(self, size=-1):
            raise AssertionError("the body was read")

    seen = []

    def app(environ, start_response):
        seen.append(dict(environ))
        return []

    middleware, _ = wrap(app, store=FaultyStore(), lint=False)
    environ = {
        "REQUEST_METHOD": "POST",
        "PATH_INFO": "/pay",
        "CONTENT_LENGTH": "4",
        "wsgi.input": Unread(b"body"),
    }
    before = dict(environ)
    middleware(environ, lambda *args: None)
    assert seen == [before]
    assert environ == before


def test_a_handler_that_fails_when_half_of_its_answer_is_out_does_not_run_again():
    """By write() the answer goes out while the handler still runs; it is recorded before that."""
    ran = []

    def failing(environ, start_response):
        ran.append(1)
        start_response("201 Created", [])(b"x" * 20)
        raise RuntimeError("after its first byte")

    _, client = wrap(failing, lint=False, policy=Policy(max_response_bytes=10))
    with pytest.raises(RuntimeError, match="after its first byte"):
        post(client)
    assert post(client).get_json()["code"] == "RESPONSE_NOT_REPLAYABLE"
    assert ran == [1]
