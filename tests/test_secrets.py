"""Promise P12: no credential and no request body is stored or logged."""

from __future__ import annotations

import base64
import hashlib
import logging
from pathlib import Path

import psycopg
import pytest
from werkzeug.test import Client

from wsgi_idempotency import (
    Event,
    IdempotencyMiddleware,
    Policy,
    SQLStore,
    by_authorization,
    by_cookie,
    by_header,
)
from wsgi_idempotency.observers import logging as log

PASSWORD = "correct-horse-battery"
BASIC = "Basic " + base64.b64encode(f"alice:{PASSWORD}".encode()).decode()
CARD = b"4242424242424242"
HEADERS = {
    "Authorization": BASIC,
    "Cookie": f"session={PASSWORD}-cookie",
    "X-Api-Key": f"{PASSWORD}-api-key",
    "Idempotency-Key": "k1",
}
SECRETS = [PASSWORD.encode(), BASIC.encode(), BASIC[6:].encode(), CARD]
KEY = "a secret of thirty-two characters"


def application(environ, start_response):
    received = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
    if b"fail" in received:
        raise RuntimeError("the handler failed")
    start_response("201 Made It", [("Set-Cookie", f"session={PASSWORD}"), ("X-Kept", "1")])
    return [b"made"]


def failing(event: Event) -> None:
    raise LookupError("an observer")


def exercise(store: SQLStore, caplog: pytest.LogCaptureFixture, secret: str | None) -> str:
    """Every kind of request, with all that may be logged about it."""
    caplog.set_level(logging.DEBUG)
    told: list[Event] = []
    for scope in (by_authorization, by_cookie("session"), by_header("X-Api-Key")):
        for fingerprint in (Policy().fingerprint, lambda environ, body: 1 / 0):
            middleware = IdempotencyMiddleware(
                application,
                store,
                scope=scope,
                secret=secret,
                policy=Policy(fingerprint=fingerprint),
                on_event=[told.append, failing, log.observe],
            )
            client = Client(middleware, use_cookies=False)
            for body in (b"card=" + CARD, b"card=" + CARD, b"other=" + CARD):
                client.post("/pay", data=body, headers=HEADERS, buffered=True)
            if fingerprint is Policy().fingerprint:
                with pytest.raises(RuntimeError):
                    client.post(
                        "/pay",
                        data=b"fail=" + CARD,
                        headers={**HEADERS, "Idempotency-Key": "k2"},
                        buffered=True,
                    )
    assert {"executed", "replayed", "mismatch", "refused"} <= {event.name for event in told}
    return caplog.text + repr(told)


@pytest.mark.parametrize("secret", [None, KEY], ids=["without a secret", "with a secret"])
def test_nothing_secret_is_in_sqlite_s_files_or_the_log(tmp_path: Path, caplog, secret) -> None:
    store = SQLStore(f"sqlite:///{tmp_path}/keys.db")
    logged = exercise(store, caplog, secret).encode()
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    store.close()
    assert b"k1" in stored
    for text in SECRETS:
        assert text not in stored
        assert text not in logged
    if secret is not None:
        # What could be found by trying every password is not there either.
        assert hashlib.sha256(BASIC.encode()).hexdigest().encode() not in stored


def test_nothing_secret_is_in_postgresql_s_table_or_the_log(pg_database: str, caplog) -> None:
    store = SQLStore(pg_database)
    logged = exercise(store, caplog, None)
    url = pg_database.replace("postgresql+psycopg://", "postgresql://")
    with psycopg.connect(url) as connection:
        rows = connection.execute("SELECT idempotency_keys::text FROM idempotency_keys").fetchall()
    store.close()
    assert len(rows) == 6
    for text in SECRETS:
        for form in (text.decode(), text.hex()):
            assert form not in repr(rows)
            assert form not in logged


def test_nothing_secret_is_logged_of_a_request_whose_store_is_away(tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    store = SQLStore(f"sqlite:///{tmp_path}/no/such/folder/keys.db")
    middleware = IdempotencyMiddleware(application, store, scope=by_authorization)
    client = Client(middleware, use_cookies=False)
    refused = client.post("/pay", query_string={"token": PASSWORD}, data=CARD, headers=HEADERS)
    store.close()
    assert refused.status_code == 503
    assert "no claim could be made for POST /pay" in caplog.text
    for text in SECRETS:
        assert text.decode() not in caplog.text
