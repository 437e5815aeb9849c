"""Which header fields are stored and replayed (http-contract.md, promise P7)."""

from __future__ import annotations

import pytest

from wsgi_idempotency.headers import never_replayable, replayable, sendable, unsendable

FILTERED = [
    "Connection",
    "Keep-Alive",
    "Proxy-Authenticate",
    "Proxy-Connection",
    "TE",
    "Trailer",
    "Transfer-Encoding",
    "Upgrade",
    "Date",
    "Server",
    "Via",
    "Age",
    "Alt-Svc",
    "Content-Length",
    "Set-Cookie",
    "Clear-Site-Data",
    "WWW-Authenticate",
    "Authentication-Info",
    "Server-Timing",
    "traceparent",
    "tracestate",
    "X-Request-Id",
    "X-Correlation-Id",
    "Retry-After",
    "RateLimit",
    "RateLimit-Policy",
    "X-RateLimit-Remaining",
    "Access-Control-Allow-Origin",
    "Signature",
    "Signature-Input",
]


@pytest.mark.parametrize("name", FILTERED)
@pytest.mark.parametrize("case", [str.lower, str.upper, str.title])
def test_a_field_of_the_message_or_the_one_request_is_left_out_in_any_case(name, case):
    kept = ("Content-Type", "text/plain")
    assert replayable([(case(name), "x"), kept]) == (kept,)


def test_a_field_that_connection_names_is_left_out():
    headers = [("Connection", "close, X-Hop"), ("x-hop", "1"), ("X-Other", "2")]
    assert replayable(headers) == (("X-Other", "2"),)


def test_all_else_is_kept_in_order_with_duplicates_and_case():
    headers = [("Link", "</a>"), ("ETag", '"1"'), ("LINK", "</b>"), ("Location", "/x")]
    assert replayable(headers) == tuple(headers)


def test_what_the_policy_allows_is_kept_unless_the_connection_names_it():
    allowed = {"set-cookie"}
    assert replayable([("Set-Cookie", "a=b")], allowed) == (("Set-Cookie", "a=b"),)
    assert replayable([("Connection", "set-cookie"), ("Set-Cookie", "a=b")], allowed) == ()


def test_no_setting_makes_a_connection_s_own_field_replayable():
    assert replayable([("Connection", "close"), ("Date", "now")], {"connection", "date"}) == ()
    assert never_replayable("Proxy-Authorization")
    assert not never_replayable("Set-Cookie")


@pytest.mark.parametrize(
    "pair",
    [
        ("X", "a\nb"),
        ("X", "a\r\nSet-Cookie: b=c"),
        ("X", "a\0"),
        ("X", "€"),
        ("X Y", "a"),
        ("", "a"),
        ("X\n", "a"),
        (b"X", "a"),
        ("X", b"a"),
        ("X", "a", "b"),
        ["X", "a"],
        "X",
    ],
    ids=repr,
)
def test_what_no_server_could_send_is_not_sendable(pair):
    assert not sendable(pair)
    assert unsendable("200 OK", [pair]) == "a header field was not valid HTTP"


def test_a_valid_head_is_sendable():
    assert unsendable("201 Made It", [("X-Tab", "a\tb \xe9"), ("ETag", '"1"')]) is None
    assert unsendable("200", []) is None


@pytest.mark.parametrize("status", ["200 O\nK", "20 OK", "600 Odd", "200OK", "200 €"])
def test_a_status_line_that_is_not_http_is_not_sendable(status):
    assert unsendable(status, []) == "the status line was not valid HTTP"
