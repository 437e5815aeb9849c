"""Whose key it is."""

from __future__ import annotations

import hashlib
import unicodedata
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsgi_idempotency.errors import ConfigurationError
from wsgi_idempotency.scope import (
    Scope,
    by_authorization,
    by_cookie,
    by_header,
    by_remote_user,
    everyone,
    find,
    for_people,
    printable,
)

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

SECRET = b"0123456789abcdef"
TOKEN = "s3cr3t-t0k3n"


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("scope", "environ"),
    [
        pytest.param(
            by_authorization, {"HTTP_AUTHORIZATION": f"Bearer {TOKEN}"}, id="a credential"
        ),
        pytest.param(by_cookie("sid"), {"HTTP_COOKIE": f"a=b; sid={TOKEN}"}, id="a cookie"),
        pytest.param(by_header("X-Api-Key"), {"HTTP_X_API_KEY": TOKEN}, id="an API key"),
    ],
)
def test_no_secret_is_in_a_scope(scope: Scope, environ: WSGIEnvironment) -> None:
    found = find(scope, environ)
    assert found is not None
    kind, algorithm, digest = found.split(":")
    assert algorithm == "sha256"
    assert len(bytes.fromhex(digest)) == 32
    assert TOKEN not in found
    assert kind in ("authorization", "cookie", "header")


@pytest.mark.parametrize(
    "scope",
    [
        pytest.param(by_authorization, id="by_authorization"),
        pytest.param(by_remote_user, id="by_remote_user"),
        pytest.param(by_cookie("sid"), id="by_cookie"),
        pytest.param(by_header("X-Tenant"), id="by_header"),
        pytest.param(by_header("X-Tenant", digest=False), id="by_header without a digest"),
    ],
)
@pytest.mark.parametrize("value", [None, "", " ", "\t "])
def test_a_request_that_says_nothing_has_no_scope(scope: Scope, value: str | None) -> None:
    """It is refused; it never shares a space with others that say nothing."""
    names = ("HTTP_AUTHORIZATION", "REMOTE_USER", "HTTP_COOKIE", "HTTP_X_TENANT")
    environ = {} if value is None else dict.fromkeys(names, value)
    assert find(scope, environ) is None


# ------------------------------------------------------------------ by_authorization


def authorized(value: str) -> str | None:
    return by_authorization({"HTTP_AUTHORIZATION": value})


def test_each_credential_has_its_own_space() -> None:
    values = ["Bearer a", "Bearer b", "Basic a", "a", "bearer a", "Bearer A", "Token"]
    assert len({authorized(value) for value in values}) == len(values)
    assert (
        authorized("Bearer a")
        == authorized(" Bearer a\t")
        == f"authorization:sha256:{sha256('Bearer a')}"
    )


@pytest.mark.parametrize("value", ["Bearer", "bearer ", "BASIC", "Basic  "])
def test_a_scheme_with_nothing_behind_it_is_nobody(value: str) -> None:
    """A client whose template lost the token must not share a space with all like it."""
    assert authorized(value) is None


@pytest.mark.parametrize(
    "value",
    [
        'Digest username="bob", nc=00000001, response="6629fae49393a05397450978507c4ef1"',
        "AWS4-HMAC-SHA256 Credential=AKID/20130524/us-east-1/s3/aws4_request, Signature=fe5f",
        'Hawk id="dh37fgj492je", ts="1353832234", nonce="j4h3g2", mac="6R4rV5iE"',
        'Signature keyId="k", signature="c2ln"',
        "Negotiate YII=",
    ],
)
def test_a_credential_that_is_new_for_each_request_is_refused(value: str) -> None:
    """No retry would be recognised, and everything would run as if unprotected."""
    assert authorized(value) is None


def test_a_credential_may_be_any_bytes() -> None:
    assert authorized("Bearer \xff\xe9") is not None
    assert authorized("Bearer \ud800") is not None


# ------------------------------------------------------------------ by_remote_user


def test_each_user_has_their_own_space() -> None:
    assert by_remote_user({"REMOTE_USER": "bob"}) == "user:bob"
    assert by_remote_user({"REMOTE_USER": " bob"}) == "user: bob"


# ------------------------------------------------------------------ by_cookie


def with_cookies(cookies: str) -> str | None:
    return find(by_cookie("sid"), {"HTTP_COOKIE": cookies})


def test_each_value_of_the_cookie_has_its_own_space() -> None:
    assert with_cookies("sid=a; x=1") == with_cookies("x=2; sid=a") == with_cookies('sid="a"')
    assert with_cookies("sid=a") == f"cookie:sha256:{sha256('sid=a')}"
    assert with_cookies("sid=a") != with_cookies("sid=b")
    assert find(by_cookie("a"), {"HTTP_COOKIE": "a=x; b=x"}) != find(
        by_cookie("b"), {"HTTP_COOKIE": "a=x; b=x"}
    )


def test_a_cookie_that_somebody_else_may_have_tossed_in_chooses_nothing() -> None:
    assert with_cookies("sid=mine; sid=theirs") is None
    assert with_cookies("sid=theirs; sid=mine") is None
    assert with_cookies("sid=mine; sid=") is None
    assert with_cookies("sid=mine; x=1; sid=mine") == with_cookies("sid=mine")


@pytest.mark.parametrize("cookies", ["x=1", "SID=a", "sid=", "sid", 'sid=""', 'sid=" "', "; ="])
def test_a_request_without_the_cookie_has_no_scope(cookies: str) -> None:
    assert with_cookies(cookies) is None


def test_a_cookie_may_be_any_bytes() -> None:
    """What a client sends must not look like a mistake of the application's."""
    assert with_cookies("sid=\xff\xe9") is not None
    assert with_cookies("other=\xff; sid=a") == with_cookies("sid=a")


@pytest.mark.parametrize("name", ["", "a=b", "a;b", "a b", None])
def test_what_can_not_name_a_cookie_is_refused_at_construction(name: Any) -> None:
    with pytest.raises(ConfigurationError, match="name of a cookie"):
        by_cookie(name)


# ------------------------------------------------------------------ by_header


def test_each_value_of_the_header_has_its_own_space() -> None:
    digested, plain = by_header("X-Tenant"), by_header("X-Tenant", digest=False)
    assert find(digested, {"HTTP_X_TENANT": "acme "}) == f"header:sha256:{sha256('x-tenant=acme')}"
    assert find(plain, {"HTTP_X_TENANT": " acme"}) == "header:x-tenant=acme"
    assert find(plain, {"HTTP_X_TENANT": "acme,evil"}) == "header:x-tenant=acme,evil"


def test_two_headers_with_one_value_are_two_spaces() -> None:
    environ = {"HTTP_X_A": "1", "HTTP_X_B": "1"}
    scopes = [by_header(name, digest=digest) for name in ("X-A", "X-B") for digest in (True, False)]
    assert len({find(scope, environ) for scope in scopes}) == 4


def test_a_value_that_is_not_digested_can_not_pose_as_one_that_is() -> None:
    digested = find(by_header("X-Tenant"), {"HTTP_X_TENANT": "acme"})
    assert digested is not None
    posing = by_header("sha256", digest=False)
    assert find(posing, {"HTTP_SHA256": digested.split(":")[2]}) != digested


@pytest.mark.parametrize("name", ["", "X Tenant", "X:", None])
def test_what_can_not_be_a_field_is_refused_at_construction(name: Any) -> None:
    with pytest.raises(ConfigurationError, match="name of a header field"):
        by_header(name)


# ------------------------------------------------------------------ everyone, and one's own


def test_everyone_is_one_space() -> None:
    assert find(everyone, {"HTTP_AUTHORIZATION": "Bearer a"}) == find(everyone, {}) == "everyone"


def test_a_callable_of_ones_own_may_refuse() -> None:
    assert find(lambda environ: environ["tenant"], {"tenant": " acme"}) == " acme"
    assert find(lambda environ: None, {}) is None
    assert find(lambda environ: "", {}) is None
    assert find(lambda environ: " \t", {}) is None


@pytest.mark.parametrize("value", [7, b"acme", False, ["acme"]])
def test_a_scope_that_is_not_a_text_is_a_programming_error(value: Any) -> None:
    with pytest.raises(TypeError, match="return a str"):
        find(lambda environ: value, {})


def test_what_a_scope_raises_is_not_swallowed() -> None:
    with pytest.raises(KeyError):
        find(lambda environ: environ["tenant"], {})


# ------------------------------------------------------------------ for people


def test_with_a_secret_the_table_holds_nothing_to_guess_a_password_from() -> None:
    scope = authorized("Basic Ym9iOjEyMzQ=")
    assert scope is not None
    shown = for_people(scope, SECRET)
    assert shown.startswith("authorization:hmac-sha256:")
    assert scope.split(":")[2] not in shown
    assert shown != for_people(scope, b"another secret of ours")
    assert shown == for_people(scope, SECRET)
    assert for_people(scope, None) == scope


@pytest.mark.parametrize("compose", ["shop:{}", "{}:eu", "shop:{}:eu"])
def test_a_digest_inside_a_scope_of_the_user_s_own_is_keyed_too(compose):
    """Behind a tenant, say. The plain digest would let who reads the table try passwords."""
    scope = by_authorization({"HTTP_AUTHORIZATION": "Basic YWxpY2U6aHVzaA=="})
    shown = for_people(compose.format(scope), SECRET)
    assert "authorization:hmac-sha256:" in shown
    assert scope.rpartition(":")[2] not in shown
    assert len(shown) == len(compose.format(scope)) + len("hmac-")


def test_with_a_secret_different_kinds_of_scope_stay_different() -> None:
    digest = "ab" * 32
    shown = {
        for_people(f"{kind}:sha256:{digest}", SECRET) for kind in ("cookie", "header", "\ud800")
    }
    assert len({text.split(":")[2] for text in shown}) == 3


@pytest.mark.parametrize(
    "scope",
    ["everyone", "user:bob", "header:x-tenant=acme", "sha256:ab", "user:sha256:" + "AB" * 32],
)
def test_what_is_no_digest_is_shown_as_it_is(scope: str) -> None:
    assert for_people(scope, SECRET) == scope


def test_a_scope_for_people_is_printable_and_bounded() -> None:
    assert for_people("user:a\x00b", None) == r"user:a\x00b"
    assert len(for_people("user:" + "x" * 5000, SECRET)) == 1024


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        pytest.param("/ключ/é/\U0001f600", "/ключ/é/\U0001f600", id="Unicode"),
        pytest.param("a\\b", "a\\b", id="a backslash"),
        pytest.param("\x00\n\x1b[31m", r"\x00\x0a\x1b[31m", id="NUL, line feed, escape sequence"),
        pytest.param("\x7f\x85", r"\x7f\x85", id="delete and C1"),
        pytest.param("\ud800x\udfff", r"\ud800x\udfff", id="surrogates"),
        pytest.param("a\u202eb\u2028", r"a\u202eb\u2028", id="right-to-left and line separator"),
    ],
)
def test_what_disturbs_a_table_or_terminal_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_long_text_is_cut_and_says_so() -> None:
    assert printable("x" * 10, 10) == "x" * 10
    assert printable("x" * 11, 10) == "x" * 9 + "…"
    assert printable("\n" * 10, 10) == r"\x0a\x0a\…"
    assert printable("x" * 1024) == "x" * 1024
    assert len(printable("\x00" * 1_000_000)) == 1024


@given(st.text(st.characters()), st.integers(1, 30))
def test_every_text_for_people_can_be_stored_and_is_bounded(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert len(shown) <= limit
    assert not {unicodedata.category(char) for char in shown} & {"Cc", "Cs", "Zl", "Zp"}
    shown.encode("utf-8")
