"""What makes two requests the same, and what names a key."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qsl, quote_plus, urlencode

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from werkzeug.datastructures import FileStorage
from werkzeug.test import Client, encode_multipart

from wsgi_idempotency import IdempotencyMiddleware, Policy, SQLStore, everyone
from wsgi_idempotency.body import Body
from wsgi_idempotency.errors import IncompleteBody
from wsgi_idempotency.fingerprint import (
    CANONICAL,
    EXACT,
    MAX_BY_VALUE,
    MAX_DEPTH,
    OWN,
    Fingerprint,
    canonical,
    compute,
    digest_parts,
    exact,
    key_digest,
    version_of,
)

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

SECRET = b"0123456789abcdef"
JSON = "application/json"
FORM = "application/x-www-form-urlencoded"

both = pytest.mark.parametrize("fingerprint", [exact, canonical], ids=["exact", "canonical"])


def request(content_type: str | None = None, **environ: str) -> WSGIEnvironment:
    made = {"REQUEST_METHOD": "POST", "SCRIPT_NAME": "", "PATH_INFO": "/orders", **environ}
    if content_type is not None:
        made["CONTENT_TYPE"] = content_type
    return made


# ------------------------------------------------------------------ parts

parts = st.lists(st.binary(max_size=12), max_size=5)


@given(parts, parts)
@example([], [b""])
@example([b""], [b"", b""])
@example([b"a", b"bc"], [b"ab", b"c"])
@example([b"a" + bytes(7) + b"\x01b"], [b"a", b"b"])
def test_different_sequences_of_parts_have_different_digests(
    one: list[bytes], other: list[bytes]
) -> None:
    assert (digest_parts(*one) == digest_parts(*other)) is (one == other)


@given(parts, st.data())
def test_where_parts_are_divided_makes_a_difference(one: list[bytes], data: st.DataObject) -> None:
    """The same bytes, divided at other places."""
    whole = b"".join(one)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=4)))
    ends = [*cuts, len(whole)]
    other = [whole[start:end] for start, end in zip([0, *cuts], ends, strict=True)]
    assert (digest_parts(*one) == digest_parts(*other)) is (one == other)


def test_a_digest_has_32_bytes_and_depends_on_the_secret() -> None:
    made = {digest_parts(b"a", secret=secret) for secret in (None, b"", SECRET, SECRET + b"x")}
    assert [len(digest) for digest in made] == [32] * 4


# ------------------------------------------------------------------ the name of a key


def named(**changes: Any) -> bytes:
    given: dict[str, Any] = {
        "secret": None,
        "namespace": "endpoint",
        "scope": "user:bob",
        "method": "POST",
        "path": "/orders",
        "key": "k",
    }
    return key_digest(**{**given, **changes})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param({"path": "/a", "key": "b:c"}, {"path": "/a:b", "key": "c"}, id="path and key"),
        pytest.param({"scope": "a", "key": "bc"}, {"scope": "ab", "key": "c"}, id="scope and key"),
        pytest.param(
            {"method": "P", "path": "O/"}, {"method": "PO", "path": "/"}, id="method, path"
        ),
        pytest.param({"key": "K"}, {"key": "k"}, id="keys that differ in case"),
        pytest.param({"path": "/A"}, {"path": "/a"}, id="paths that differ in case"),
        pytest.param({"path": "/a"}, {"path": "/shop/a"}, id="one app mounted twice"),
        pytest.param({"scope": "user:a"}, {"scope": "user:b"}, id="scopes"),
        pytest.param({"method": "PATCH"}, {"method": "POST"}, id="methods"),
        pytest.param({"namespace": "scope"}, {"namespace": "endpoint"}, id="namespaces"),
        pytest.param({"secret": SECRET}, {"secret": None}, id="with and without a secret"),
        pytest.param({"scope": "\ud800"}, {"scope": "\udc00"}, id="surrogates"),
    ],
)
def test_two_names_are_different(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert named(**one) != named(**other)


texts = st.text(st.characters(), max_size=4)
names = st.fixed_dictionaries(
    {
        "namespace": st.sampled_from(["endpoint", "scope"]),
        "scope": texts,
        "path": texts,
        "key": texts,
    }
)


@given(names, names)
def test_names_are_the_same_only_if_all_that_counts_is(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    def counts(name: dict[str, Any]) -> dict[str, Any]:
        return {**name, "path": None} if name["namespace"] == "scope" else name

    assert (named(**one) == named(**other)) is (counts(one) == counts(other))


@pytest.mark.parametrize("secret", [None, SECRET])
@pytest.mark.parametrize("namespace", ["endpoint", "scope"])
def test_a_name_has_32_bytes_and_a_methods_case_is_nothing(
    secret: bytes | None, namespace: Literal["endpoint", "scope"]
) -> None:
    name = named(secret=secret, namespace=namespace, method="post")
    assert len(name) == 32
    assert name == named(secret=secret, namespace=namespace)


def test_in_the_scopes_namespace_a_key_has_one_name_on_all_endpoints() -> None:
    assert named(namespace="scope") == named(namespace="scope", path="/refunds", method="PATCH")


def test_the_name_of_a_key_never_changes_between_releases() -> None:
    """Or every key would be fresh after an upgrade."""
    assert named().hex() == "8a7feeea8b3dfb0512bb35c3fdbeacb21855c6b8085d80ca61007f8869bee299"
    assert (
        named(secret=SECRET).hex()
        == "6d13acd1f9f2c489979301c3570453f0f7aca65b3049bbdbf26fc43b9108cfa4"
    )
    assert (
        named(namespace="scope").hex()
        == "64f9cf1343678c273d5d80b3bcb8a41e2fc4faf0978df5b1e185d6cb502132d8"
    )


# ------------------------------------------------------------------ what both compare


@both
@pytest.mark.parametrize(
    ("change", "body"),
    [
        pytest.param({}, b'{"a": 2}', id="body"),
        pytest.param({"REQUEST_METHOD": "PATCH"}, b'{"a": 1}', id="method"),
        pytest.param({"PATH_INFO": "/order"}, b'{"a": 1}', id="path"),
        pytest.param({"SCRIPT_NAME": "/shop"}, b'{"a": 1}', id="mount point"),
        pytest.param({"QUERY_STRING": "a=1"}, b'{"a": 1}', id="query string"),
        pytest.param({"CONTENT_TYPE": "text/json"}, b'{"a": 1}', id="media type"),
        pytest.param({"CONTENT_TYPE": JSON + "; charset=utf-8"}, b'{"a": 1}', id="parameter"),
        pytest.param({"CONTENT_TYPE": ""}, b'{"a": 1}', id="no media type"),
        pytest.param({}, b"", id="no body"),
    ],
)
def test_a_request_that_differs_is_another(
    fingerprint: Fingerprint, change: dict[str, str], body: bytes
) -> None:
    first = fingerprint(request(JSON), b'{"a": 1}')
    assert fingerprint(request(**{"CONTENT_TYPE": JSON, **change}), body) != first
    assert fingerprint(request(JSON), b'{"a": 1}') == first


@both
def test_query_strings_are_compared_as_they_are(fingerprint: Fingerprint) -> None:
    queries = ["", "a=1&b=2", "b=2&a=1", "a=1&b=2&", "a=%31&b=2"]
    made = {fingerprint(request(QUERY_STRING=query), b"") for query in queries}
    assert len(made) == len(queries)


@both
def test_what_names_the_target_is_never_mistaken_for_another_part(fingerprint: Fingerprint) -> None:
    one = request("text/plain", PATH_INFO="/a", QUERY_STRING="b")
    other = request("text/plain", PATH_INFO="/ab", QUERY_STRING="")
    assert fingerprint(one, b"c") != fingerprint(other, b"c")
    assert fingerprint(one, b"c") != fingerprint({**one, "CONTENT_TYPE": "text/plainc"}, b"")


@both
def test_the_full_path_counts_wherever_it_is_divided(fingerprint: Fingerprint) -> None:
    mounted = request(SCRIPT_NAME="/shop", PATH_INFO="/orders")
    whole = request(PATH_INFO="/shop/orders")
    del whole["SCRIPT_NAME"]
    assert fingerprint(mounted, b"x") == fingerprint(whole, b"x")


@both
def test_headers_that_change_on_a_retry_change_nothing(fingerprint: Fingerprint) -> None:
    retried = request(
        JSON,
        HTTP_USER_AGENT="b/2",
        HTTP_X_STAINLESS_RETRY_COUNT="1",
        HTTP_TRACEPARENT="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        HTTP_AUTHORIZATION="Bearer new",
        REMOTE_ADDR="192.0.2.1",
        REQUEST_METHOD="post",
    )
    assert fingerprint(retried, b"{}") == fingerprint(request(JSON), b"{}")


@both
@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain; charset=utf-8; format=flowed",
        "Text/PLAIN;charset=utf-8;format=flowed",
        " text/plain ;\tFormat=flowed ; ; CHARSET=utf-8;",
        'text/plain; format="flowed"; charset="utf\\-8"',
    ],
)
def test_one_media_type_may_be_written_in_many_ways(
    fingerprint: Fingerprint, content_type: str
) -> None:
    plain = request("text/plain; charset=utf-8; format=flowed")
    assert fingerprint(request(content_type), b"x") == fingerprint(plain, b"x")


MEDIA_TYPES = [
    "",
    "text/plain",
    "text/plain2",
    "text/plain; a=b",
    "text/plain; a=B",
    "text/plain; a=b; a=c",
    "text/plain; a=c; a=b",
    'text/plain; a="b; a=c"',
    'text/plain; a=""',
    "text/plain; a",
    "text/plain; a=",
    'text/plain; a="b',
    "text/plain, text/plain",
    "text",
    "plain",
    "text/plain; boundary=x",
    "multipart/mixed",
    "multipart/mixed; boundary=x; boundary=y",
    "multipart/mixed; boundary=y; boundary=x",
    "multipart/mixed; boundary",
    "té/xt",
    "\ud800",
]


@both
def test_media_types_that_are_different_or_malformed_stay_different(
    fingerprint: Fingerprint,
) -> None:
    made = {fingerprint(request(content_type), b"x") for content_type in MEDIA_TYPES}
    assert len(made) == len(MEDIA_TYPES)


@pytest.mark.parametrize(
    "content_type",
    [
        pytest.param("text/plain" + ";" * 500_000, id="semicolons"),
        pytest.param("text/plain" + " " * 500_000 + "x", id="spaces"),
        pytest.param("text/plain" + "; " * 250_000 + "x", id="semicolons and spaces"),
        pytest.param("text/plain; " + "a" * 500_000, id="a long name"),
        pytest.param('text/plain; a="' + "\\a" * 250_000, id="an unterminated string"),
        pytest.param("text/plain" + ";a=b" * 125_000, id="many parameters"),
    ],
)
def test_a_long_media_type_takes_no_longer_than_its_length_warrants(content_type: str) -> None:
    started = time.process_time()
    exact(request(content_type), b"x")
    assert time.process_time() - started < 20


@both
@pytest.mark.parametrize("content_type", [None, "", JSON, FORM, "multipart/form-data; boundary=x"])
def test_an_empty_body_is_the_same_as_none_and_has_no_media_type(
    fingerprint: Fingerprint, content_type: str | None
) -> None:
    """Clients add a Content-Type to an empty body, servers to a missing one."""
    assert fingerprint(request(content_type), b"") == fingerprint(request(), b"")
    assert fingerprint(request(content_type), b"\n") != fingerprint(request(), b"")


@both
def test_an_environ_of_no_more_than_wsgi_asks_for_will_do(fingerprint: Fingerprint) -> None:
    assert len(fingerprint({"REQUEST_METHOD": "POST"}, b"x")) == 32


@both
def test_no_text_in_the_environ_breaks_it(fingerprint: Fingerprint) -> None:
    paths = ["/\xff", "/ключ", "/\ud800", "/\udc00"]
    made = {fingerprint(request(PATH_INFO=path), b"x") for path in paths}
    assert len(made) == len(paths)


def test_the_built_in_fingerprints_never_change_between_releases() -> None:
    """Or a retry across an upgrade would be refused. A change needs a new number."""
    bodies = [
        (None, b""),
        ("text/plain; charset=utf-8", b"x"),
        (JSON, b'{"b": [1, 1.0, "\\u00e9"], "a": null}'),
        (FORM, b"a=1&b=%20"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\n1\r\n--x--\r\n"),
    ]
    made = [
        digest_parts(*(fingerprint(request(media), body) for media, body in bodies)).hex()
        for fingerprint in (exact, canonical)
    ]
    assert made == [
        "7d2f70aef33e4d784293f74126f0cc11216fe846ce3366809c8a85ccca67a08b",
        "350eee3f2832230dcb0e762039471189318a9450a14d12ef3ef544579b65c33d",
    ]


# ------------------------------------------------------------------ multipart


def multipart(boundary: str, *, amount: str = "1", subtype: str = "form-data") -> tuple[str, bytes]:
    file = FileStorage(io.BytesIO(bytes(range(256))), "a.bin", content_type="image/png")
    _, body = encode_multipart({"amount": amount, "file": file}, boundary)
    return f"multipart/{subtype}; boundary={boundary}", body


def seen(fingerprint: Fingerprint, content_type: str, body: bytes) -> bytes:
    return fingerprint(request(content_type), body)


@both
@pytest.mark.parametrize("subtype", ["form-data", "mixed", "related"])
def test_a_new_boundary_around_the_same_parts_is_the_same_request(
    fingerprint: Fingerprint, subtype: str
) -> None:
    first = seen(fingerprint, *multipart("x", subtype=subtype))
    assert seen(fingerprint, *multipart("A-much.longer_one--", subtype=subtype)) == first
    assert seen(fingerprint, *multipart("x", subtype=subtype, amount="2")) != first
    assert seen(fingerprint, *multipart("x", subtype="other")) != first


@both
def test_a_boundary_may_be_quoted(fingerprint: Fingerprint) -> None:
    media_type, body = multipart("(x):'y'=?")
    quoted = media_type.replace("boundary=", 'boundary="') + '"'
    assert seen(fingerprint, quoted, body) == seen(fingerprint, *multipart("x"))


def parts_of(boundary: str, *parts: str) -> tuple[str, bytes]:
    body = "".join(f"--{boundary}\r\n{part}\r\n" for part in parts) + f"--{boundary}--\r\n"
    return f"multipart/form-data; boundary={boundary}", body.encode()


@both
@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(
            ["A: 1\r\n\r\na", "B: 1\r\n\r\nb"], ["B: 1\r\n\r\nb", "A: 1\r\n\r\na"], id="order"
        ),
        pytest.param(["A: 1\r\n\r\na"], ["A: 2\r\n\r\na"], id="a part's header"),
        pytest.param(["A: 1\r\nB: 1\r\n\r\na"], ["B: 1\r\nA: 1\r\n\r\na"], id="headers' order"),
        pytest.param(["A: 1\r\n\r\na", ""], ["A: 1\r\n\r\na"], id="an empty part more"),
        pytest.param(["\r\na", "\r\nb"], ["\r\na\r\n\r\nb"], id="parts run together"),
        pytest.param(["\r\na\r\n"], ["\r\na"], id="a line end at the end of a part"),
        pytest.param(["\r\na--"], ["\r\na"], id="hyphens at the end of a part"),
    ],
)
def test_other_parts_are_another_request_whatever_the_boundary(
    fingerprint: Fingerprint, one: list[str], other: list[str]
) -> None:
    first = seen(fingerprint, *parts_of("x", *one))
    assert seen(fingerprint, *parts_of("yy", *one)) == first
    assert seen(fingerprint, *parts_of("x", *other)) != first
    assert seen(fingerprint, *parts_of("yy", *other)) != first


@both
def test_what_is_before_and_behind_the_parts_counts(fingerprint: Fingerprint) -> None:
    media_type, body = parts_of("x", "\r\na")
    made = {
        seen(fingerprint, media_type, changed)
        for changed in (body, b"preamble\r\n" + body, body + b"epilogue", body.rstrip())
    }
    assert len(made) == 4


@both
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"--{}\r\n\r\na\r\n", id="cut off"),
        pytest.param(b"--{}\r\n\r\na\r\n--{}", id="cut off within the last separator"),
        pytest.param(b"--{}\r\n\r\na\r\n--{}-", id="cut off before the last hyphen"),
        pytest.param(b"not a multipart body", id="no separator"),
        pytest.param(b"x", id="shorter than a separator"),
        pytest.param(b"--{}\n\na\n--{}--\n", id="lines that end in LF alone"),
        pytest.param(b"--{}\r\n\r\na\n--{}\n\nb\r\n--{}--", id="a separator only to some parsers"),
        pytest.param(b"--{} \r\n\r\na\r\n--{}--", id="a separator with padding"),
        pytest.param(b"--{}\r\n\r\na\r\n--{}b\r\n--{}--", id="a line that begins like a separator"),
        pytest.param(b"--{}\r\n\r\na --{}\r\n\r\n--{}--", id="a separator within a line"),
        pytest.param(b"--{}\r\n\r\na\r\n--{}--\r\n--{}", id="a separator behind the last one"),
    ],
)
def test_where_parsers_may_disagree_the_boundary_counts_too(
    fingerprint: Fingerprint, body: bytes
) -> None:
    """An identical retry is still the same; only a new boundary is not forgiven."""
    made = [
        seen(
            fingerprint, f"multipart/form-data; boundary={name}", body.replace(b"{}", name.encode())
        )
        for name in ("one", "two", "one")
    ]
    assert made[0] == made[2] != made[1]


@both
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"--{}\r\n\r\na\n--one\n\nb\r\n--{}--", id="on a line that ends in LF"),
        pytest.param(b"--{}\r\n\r\na\r\n--one \r\n\r\n--{}--", id="with padding"),
        pytest.param(b"--{}\r\n\r\na --one\r\n\r\n--{}--", id="within a line"),
        pytest.param(b"--{}\r\n\r\na\r\n--{}--\r\n--one", id="at the very end"),
    ],
)
def test_a_boundary_left_in_the_content_is_not_forgiven(
    fingerprint: Fingerprint, body: bytes
) -> None:
    """Some parsers find one part more in the first body, and none finds it in the second."""
    one, two = (
        seen(fingerprint, f"multipart/mixed; boundary={name}", body.replace(b"{}", name.encode()))
        for name in ("one", "two")
    )
    assert one != two


@both
def test_a_second_boundary_is_not_forgiven(fingerprint: Fingerprint) -> None:
    """Parsers disagree on which of them counts."""
    media_type, body = parts_of("x", "\r\na")
    made = {
        seen(fingerprint, media_type + more, body) for more in ("", ";boundary=y", ";boundary=z")
    }
    assert len(made) == 3


SEPARATED = st.lists(
    st.sampled_from(["--B", "\r\n", "\r", "\n", "-", "--", "B", "a", " "]), max_size=14
)


@given(SEPARATED, st.data())
def test_where_the_body_is_divided_into_chunks_makes_no_difference(
    pieces: list[str], data: st.DataObject
) -> None:
    body = "".join(pieces).encode()
    environ = request("multipart/form-data; boundary=B")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=6)))
    chunks = [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    whole = compute(EXACT, exact, environ, Body.of_bytes(body))
    assert compute(EXACT, exact, environ, Chunked(chunks)) == whole


class Chunked(Body):
    """A body that comes in the chunks that a test wants, as sockets do."""

    def __init__(self, chunks: list[bytes]) -> None:
        super().__init__({}, limit=0)
        self._chunks = chunks

    def chunks(self) -> Iterator[bytes]:
        return iter(self._chunks)


@given(SEPARATED, SEPARATED)
@example(["\r\n", "--B"], ["--B"])
def test_two_multipart_bodies_with_one_boundary_are_the_same_only_if_all_bytes_are(
    one: list[str], other: list[str]
) -> None:
    first, second = "".join(one).encode(), "".join(other).encode()
    media_type = "multipart/form-data; boundary=B"
    assert (seen(exact, media_type, first) == seen(exact, media_type, second)) is (first == second)


CONTENT = st.text("ab\r\n -", max_size=6)


@given(st.lists(CONTENT, max_size=3), st.lists(CONTENT, max_size=3))
def test_two_multipart_bodies_with_two_boundaries_are_the_same_only_if_their_parts_are(
    one: list[str], other: list[str]
) -> None:
    """``B`` and ``CC`` are in no content, as a client sees to."""
    same = seen(exact, *parts_of("B", *one)) == seen(exact, *parts_of("CC", *other))
    assert same is (one == other)


# ------------------------------------------------------------------ JSON by value


def value_of(text: str | bytes, content_type: str = JSON) -> bytes:
    return canonical(request(content_type), text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(
            '{"a":1,"b":{"c":2,"d":3}}', '{"b":{"d":3,"c":2},"a":1}', id="members reordered"
        ),
        pytest.param('{"a":[1,2]}', ' { "a" :\t[ 1 ,\r\n2 ] }\n', id="whitespace"),
        pytest.param('{"é":"€😀"}', r'{"\u00e9":"\u20ac\ud83d\ude00"}', id="escaped characters"),
        pytest.param(r'"\/\u000a"', r'"/\n"', id="escapes of one character"),
        pytest.param(r'"\u00E9"', r'"\u00e9"', id="escapes in upper case"),
    ],
)
def test_json_of_one_value_is_the_same_when_canonical_and_only_then(one: str, other: str) -> None:
    assert value_of(one) == value_of(other)
    assert exact(request(JSON), one.encode()) != exact(request(JSON), other.encode())


DIFFERENT = [
    "1",
    "1.0",
    "1.00",
    "1e0",
    "1E0",
    "10e-1",
    '"1"',
    '"1.0"',
    "-0",
    "0",
    "0.0",
    "10000000000000000.1",
    "10000000000000000.0",
    "10000000000000000",
    "10000000000000001",
    "9" * 5000,
    "9" * 4999 + "8",
    "1e400",
    "1e401",
    "[1]",
    "[[1]]",
    "[1,1]",
    "[]",
    "{}",
    "[{}]",
    '{"":1}',
    '{"1":1}',
    '{"a":1}',
    '{"a":[1]}',
    '{"a":{"b":1}}',
    '{"a":1,"b":1}',
    '[{"a":1},{"b":1}]',
    '["a",1]',
    "null",
    '"null"',
    '{"a":null}',
    "true",
    '"true"',
    "false",
    '""',
    '"a"',
    '"A"',
    '"[1]"',
    '"é"',
    r'"e\u0301"',
    r'"\ud800"',
    r'"\udc00"',
    r'"\udc00\ud800"',
    r'"\ud800\udc00"',
    r'"\ud800\udc001"',
    r'"\ud800\\udc001"',
    r'{"\ud800\udc001":1}',
    r'["\ud800","\udc001"]',
    "NaN",
    "Infinity",
    "-Infinity",
    '{"a":1,"a":1}',
    '{"a":1,"a":2}',
    '{"a":2,"a":1}',
    "{",
    "1 1",
    "01",
    "'a'",
    "\ufeff1",
]


def test_json_of_different_values_stays_different() -> None:
    """No number loses a digit, and none is ever made an int or a float."""
    made = [value_of(text) for text in DIFFERENT]
    assert len(set(made)) == len(DIFFERENT)
    texts = {*DIFFERENT, *(f"[{text}]" for text in DIFFERENT)}
    assert len({value_of(text) for text in texts}) == len(texts)


def test_the_interpreters_limit_on_integers_is_on_in_these_tests() -> None:
    """Otherwise the number of 5,000 digits would show nothing."""
    assert 0 < sys.get_int_max_str_digits() < 5000


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(), max_size=4),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.text(st.characters(), max_size=3), children, max_size=3)
    ),
    max_leaves=8,
)


def shuffled(value: Any) -> Any:
    """The same value, its objects in reverse."""
    if isinstance(value, dict):
        return {name: shuffled(value[name]) for name in reversed(value)}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


@given(json_values, json_values, st.booleans())
def test_json_is_the_same_if_and_only_if_its_value_is(one: Any, other: Any, escaped: bool) -> None:
    first = value_of(json.dumps(one))
    rewritten = json.dumps(shuffled(one), indent=1, ensure_ascii=escaped)
    try:
        assert value_of(rewritten) == first
    except UnicodeEncodeError:
        assert not escaped  # surrogates can only be escaped
    # By their texts: Python takes 1, 1.0 and True for equal.
    written = [json.dumps(value, sort_keys=True) for value in (one, other)]
    assert (value_of(json.dumps(other)) == first) is (written[0] == written[1])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(b'{"a":1,"b":2,"a":1}', b'{"a":1, "b":2,"a":1}', id="a name twice"),
        pytest.param(b'[{"a":1,"a":1}]', b'[{"a":1, "a":1}]', id="a name twice further down"),
        pytest.param(b"[NaN]", b"[NaN ]", id="NaN"),
        pytest.param(b"[-Infinity]", b"[-Infinity ]", id="Infinity"),
        pytest.param(b"[1,]", b"[1 ,]", id="malformed"),
        pytest.param(b'["\xe9"]', b'["\xe9" ]', id="Latin-1"),
        pytest.param('["é"]'.encode("utf-16"), '["é" ]'.encode("utf-16"), id="UTF-16"),
        pytest.param(
            '["\ud800"]'.encode("utf-8", "surrogatepass"), b'["\xed\xa0\x80" ]', id="CESU"
        ),
        pytest.param(b"[" * 5000 + b"]" * 5000, b"[" * 5000 + b" " + b"]" * 5000, id="depth bomb"),
        pytest.param(b"[" * 900_000, b" " + b"[" * 900_000, id="unclosed depth bomb"),
        pytest.param(
            b'{"a":' * 900 + b"1" + b"}" * 900, b'{"a":' * 900 + b" 1" + b"}" * 900, id="dicts"
        ),
    ],
)
def test_json_without_one_value_is_compared_byte_for_byte(one: bytes, other: bytes) -> None:
    assert value_of(one) == value_of(one) != value_of(other)


def nested(depth: int, inner: str = "1") -> str:
    return "[" * depth + inner + "]" * depth


def test_json_is_taken_by_value_to_a_depth_that_does_not_depend_on_the_caller() -> None:
    """Or an identical retry might be refused, because it came in on a deeper stack."""
    by_value = value_of(nested(MAX_DEPTH)), value_of(nested(MAX_DEPTH, " 1"))
    assert by_value[0] == by_value[1]
    and_more = f"[{nested(MAX_DEPTH - 1)},[]]"
    assert value_of(and_more) == value_of(and_more + " ")
    too_deep = value_of(nested(MAX_DEPTH + 1)), value_of(nested(MAX_DEPTH + 1, " 1"))
    assert too_deep[0] != too_deep[1]

    def deeper(frames: int) -> tuple[bytes, bytes]:
        if frames:
            return deeper(frames - 1)
        return value_of(nested(MAX_DEPTH)), value_of(nested(MAX_DEPTH + 1))

    assert deeper(500) == (by_value[0], too_deep[0])


def test_brackets_in_strings_and_side_by_side_are_no_depth() -> None:
    in_strings = '["' + "[" * 500 + r'", "\"{[\\", "' + r"\\\"[" * 200 + '"]'
    assert json.loads(in_strings)
    assert value_of(in_strings) == value_of(in_strings.replace(", ", ","))
    side_by_side = "[" + "[{}]," * 500 + "1]"
    assert value_of(side_by_side) == value_of(side_by_side + " ")


def test_deeply_nested_json_of_much_text_between_is_compared_byte_for_byte() -> None:
    deep = '{"é[\\"]": ["x", ' * 60 + "1" + "]}" * 60
    assert json.loads(deep)
    assert value_of(deep) != value_of(deep + " ")


def test_a_body_over_the_limit_is_compared_byte_for_byte() -> None:
    text = '["' + "a" * (MAX_BY_VALUE - 5) + '"]'
    assert len(text) == MAX_BY_VALUE - 1
    assert value_of(text) == value_of(" " + text)
    assert value_of(" " + text) != value_of("  " + text)


@pytest.mark.parametrize(
    ("content_type", "piece"),
    [
        pytest.param(JSON, b"[],", id="empty arrays"),
        pytest.param(JSON, b"{},", id="empty objects"),
        pytest.param(JSON, b'{"a":1},', id="objects"),
        pytest.param(JSON, b"1.5,", id="numbers"),
        pytest.param(FORM, b"a&", id="a form of names"),
        pytest.param(FORM, b"%41=%41&", id="a form of escapes"),
        pytest.param(FORM, b"+", id="a form of spaces"),
    ],
)
def test_no_body_takes_long_to_be_taken_by_value(content_type: str, piece: bytes) -> None:
    inner = piece * ((MAX_BY_VALUE - 3) // len(piece))
    started = time.process_time()
    value_of(b"[" + inner + b"1]" if content_type == JSON else inner, content_type)
    assert time.process_time() - started < 20


@pytest.mark.parametrize(
    ("content_type", "by_value"),
    [
        (JSON, True),
        ("Application/JSON; charset=utf-8", True),
        ("application/merge-patch+json", True),
        ("application/vnd.api+JSON", True),
        ("application/json5", False),
        ("application/jsonl", False),
        ("text/plain", False),
        ("application/json; charset", False),
        ("", False),
    ],
)
def test_a_media_type_decides_whether_a_body_is_json(content_type: str, by_value: bool) -> None:
    assert (value_of("[1]", content_type) == value_of("[ 1]", content_type)) is by_value


def test_the_media_type_counts_although_the_value_is_the_same() -> None:
    types = [JSON, "application/merge-patch+json", "application/json; v=1", "text/plain", FORM]
    assert len({value_of("1", content_type) for content_type in types}) == len(types)


def test_the_target_counts_although_the_value_is_the_same() -> None:
    changes: list[dict[str, str]] = [
        {},
        {"REQUEST_METHOD": "PATCH"},
        {"PATH_INFO": "/a"},
        {"SCRIPT_NAME": "/a"},
        {"QUERY_STRING": "a"},
    ]
    for content_type in (JSON, FORM):
        made = {canonical(request(content_type, **change), b"{}") for change in changes}
        assert len(made) == len(changes)


# ------------------------------------------------------------------ forms by value


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param("a=b c&d=é", "a=b+c&d=%C3%A9", id="spaces and characters, escaped or not"),
        pytest.param("a=%7E", "%61=~", id="needless escapes"),
        pytest.param("a=%c3%a9", "a=%C3%A9", id="escapes in lower case"),
        pytest.param("a=1&&b=2&", "a=1&b=2", id="empty pairs"),
        pytest.param("a&b=", "a=&b", id="a name alone"),
        pytest.param("a=b=c", "a=b%3Dc", id="equals signs in a value"),
    ],
)
def test_forms_of_the_same_pairs_are_the_same_when_canonical_and_only_then(
    one: str, other: str
) -> None:
    assert value_of(one, FORM) == value_of(other, FORM)
    assert exact(request(FORM), one.encode()) != exact(request(FORM), other.encode())


def test_forms_of_other_pairs_stay_different() -> None:
    forms = [
        "a=1&b=2",
        "b=2&a=1",
        "a=1&b=2&b=2",
        "a=1%26b=2",
        "a=1",
        "a=",
        "=a",
        "a=b&c",
        "a=&b=c",
        "ab=c",
        "a=%2B",
        "a=+",
        "a=%00",
        "a=%FF",
        "a=%C3%BF",
        "a=%ZZ",
        "a=1;b=2",
        "a%3D=1",
        "&",
    ]
    assert len({value_of(form, FORM) for form in forms}) == len(forms)


pairs = st.lists(
    st.tuples(st.text("a=&+% é", min_size=1, max_size=3), st.text(max_size=3)), max_size=4
)


@given(pairs, pairs)
def test_a_form_is_the_sequence_of_its_pairs(one: list[Any], other: list[Any]) -> None:
    first = value_of(urlencode(one), FORM)
    assert (value_of(urlencode(other), FORM) == first) is (one == other)
    escaped = "&".join("=".join(everything_escaped(text) for text in pair) for pair in one)
    assert value_of(escaped, FORM) == first


def everything_escaped(text: str) -> str:
    return "".join(f"%{byte:02x}" for byte in text.encode()) or quote_plus(text)


# ------------------------------------------------------------------ as it is stored


def stored(
    fingerprint: Fingerprint | None,
    environ: WSGIEnvironment,
    body: bytes = b"x",
    secret: bytes | None = None,
) -> bytes:
    return compute(version_of(fingerprint), fingerprint, environ, Body.of_bytes(body), secret)


def test_each_algorithm_has_its_number() -> None:
    assert [version_of(exact), version_of(canonical), version_of(None)] == [1, 2, 0]
    assert version_of(lambda environ, body: body) == OWN
    assert (OWN, EXACT, CANONICAL) == (0, 1, 2)


BODIES = [
    pytest.param("text/plain", b"a" * 200_000, id="text of several chunks"),
    pytest.param(JSON, b'{"b": 1, "a": 2}', id="JSON"),
    pytest.param(FORM, b"a=1&b", id="a form"),
    pytest.param(*parts_of("x", "A: 1\r\n\r\n" + "\r\n--y" * 50_000), id="multipart"),
    pytest.param(None, b"", id="nothing"),
]


@both
@pytest.mark.parametrize(("content_type", "body"), BODIES)
def test_a_body_that_is_streamed_has_the_fingerprint_of_one_in_memory(
    fingerprint: Fingerprint, content_type: str | None, body: bytes
) -> None:
    environ, version = request(content_type), version_of(fingerprint)
    whole = compute(version, fingerprint, environ, Chunked([body]))
    assert compute(version, fingerprint, environ, Body.of_bytes(body)) == whole
    in_sevens = Chunked([body[start : start + 7] for start in range(0, len(body), 7)])
    assert compute(version, fingerprint, environ, in_sevens) == whole


@both
def test_a_large_body_is_not_held_in_memory(fingerprint: Fingerprint) -> None:
    class Streamed(Body):
        def bytes(self) -> Any:
            raise AssertionError("the whole body was asked for")

    for content_type, body in (("text/plain", b"x" * 10), parts_of("x", "\r\na")):
        chunks = Streamed({"CONTENT_LENGTH": str(len(body)), "wsgi.input": io.BytesIO(body)}, 1000)
        made = compute(version_of(fingerprint), fingerprint, request(content_type), chunks)
        assert made == stored(fingerprint, request(content_type), body)


def test_without_a_fingerprint_the_key_alone_identifies() -> None:
    """With None nothing else counts, and the body is not even read."""

    class Unread(Body):
        def read(self) -> None:
            raise AssertionError("the body was read")

    unread = Unread({}, limit=0)
    made = compute(OWN, None, request(JSON), unread)
    assert made == compute(OWN, None, request(FORM, PATH_INFO="/other"), unread)
    assert len(made) == 32


@pytest.mark.parametrize("change", [{"REQUEST_METHOD": "PATCH"}, {"SCRIPT_NAME": "/shop"}])
@pytest.mark.parametrize(
    "fingerprint",
    [exact, canonical, lambda environ, body: b"constant"],
    ids=["exact", "canonical", "a constant"],
)
def test_what_is_stored_covers_the_endpoint_even_if_a_callable_does_not(
    fingerprint: Fingerprint, change: dict[str, str]
) -> None:
    """In the scope's namespace one endpoint's response must not be replayed on another."""
    first = stored(fingerprint, request())
    assert stored(fingerprint, request(**change)) != first
    assert stored(fingerprint, request(REQUEST_METHOD="post")) == first


@pytest.mark.parametrize(
    "fingerprint",
    [exact, canonical, None, lambda environ, body: body],
    ids=["exact", "canonical", "none", "the body"],
)
def test_what_is_stored_is_keyed_with_the_secret(fingerprint: Fingerprint | None) -> None:
    """A body such as ``yes`` could be guessed from its digest."""
    made = {
        stored(fingerprint, request(), secret=secret) for secret in (None, SECRET, SECRET + b"x")
    }
    assert len(made) == 3


def test_each_algorithm_stores_something_else() -> None:
    """So that one is never taken for another, whatever a callable returns."""

    def own(environ: WSGIEnvironment, body: bytes) -> bytes:
        return exact(environ, body)

    made = {
        stored(fingerprint, request(JSON), b"{}") for fingerprint in (exact, canonical, own, None)
    }
    assert len(made) == 4


def test_a_callable_gets_the_environ_and_the_body_and_decides() -> None:
    def amount(environ: WSGIEnvironment, body: bytes) -> bytes:
        return digest_parts(environ["HTTP_X_CURRENCY"].encode(), body.split(b"&")[0])

    first = stored(amount, request(HTTP_X_CURRENCY="EUR"), b"1&nonce=1")
    assert stored(amount, request(HTTP_X_CURRENCY="EUR"), b"1&nonce=2") == first
    assert stored(amount, request(HTTP_X_CURRENCY="USD"), b"1&nonce=1") != first
    assert stored(amount, request(HTTP_X_CURRENCY="EUR"), b"2&nonce=1") != first


@pytest.mark.parametrize("returned", ["text", None, 7, bytearray(b"x")])
def test_a_callable_that_does_not_return_bytes_is_a_programming_error(returned: Any) -> None:
    with pytest.raises(TypeError, match="return bytes"):
        stored(lambda environ, body: returned, request())


def test_what_a_callable_raises_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        stored(lambda environ, body: bytes(1 // 0), request())


@both
def test_a_body_that_ends_too_early_has_no_fingerprint(fingerprint: Fingerprint) -> None:
    body = Body({"CONTENT_LENGTH": "5", "wsgi.input": io.BytesIO(b"half")}, limit=10)
    with pytest.raises(IncompleteBody):
        compute(version_of(fingerprint), fingerprint, request(), body)


# ------------------------------------------------------------------ records of another policy


def compared(recorded: Fingerprint | None, configured: Fingerprint | None) -> bool:
    """Whether an identical retry is recognised although the policy has changed."""
    environ, body, version = request(JSON), Body.of_bytes(b"{}"), version_of(recorded)
    return compute(version, recorded, environ, body) == compute(version, configured, environ, body)


def own(environ: WSGIEnvironment, body: bytes) -> bytes:
    return body


@pytest.mark.parametrize("recorded", [exact, canonical])
@pytest.mark.parametrize("configured", [exact, canonical, own, None])
def test_a_record_of_a_built_in_fingerprint_is_compared_by_it_under_any_policy(
    recorded: Fingerprint, configured: Fingerprint | None
) -> None:
    assert compared(recorded, configured)


@pytest.mark.parametrize("recorded", [own, None])
@pytest.mark.parametrize("configured", [exact, canonical, own, None])
def test_a_record_of_anything_else_is_equal_to_its_own_kind_only(
    recorded: Fingerprint | None, configured: Fingerprint | None
) -> None:
    """It can't be made again, and what can't be compared is refused, not replayed."""
    assert compared(recorded, configured) is (recorded is configured)


@pytest.mark.parametrize("configured", [exact, canonical, own])
def test_a_record_of_a_later_release_equals_nothing(configured: Fingerprint) -> None:
    environ, body = request(JSON), Body.of_bytes(b"{}")
    made = {compute(version, configured, environ, body) for version in (OWN, EXACT, CANONICAL, 3)}
    assert len(made) == 4


@pytest.mark.parametrize("configured", [exact, None], ids=["exact", "none"])
def test_a_retry_of_what_a_later_release_recorded_is_refused(
    sqlite_url: str, configured: Fingerprint | None
) -> None:
    """After a downgrade: it can't be told whether it is the same, and it must not run again."""
    ran = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        ran.append(environ["wsgi.input"].read())
        start_response("201 Created", [])
        return [b"done"]

    store = SQLStore(sqlite_url)
    policy = Policy(fingerprint=configured)
    client = Client(IdempotencyMiddleware(app, store, scope=everyone, policy=policy))
    headers = {"Idempotency-Key": "k"}
    assert client.post("/", data=b"pay", headers=headers).status_code == 201
    with store.engine.connect() as connection:
        connection.exec_driver_sql(
            "UPDATE idempotency_keys SET fingerprint_version = 99, fingerprint = ?", (b"f" * 32,)
        )
    assert client.post("/", data=b"pay", headers=headers).status_code == 422
    assert ran == [b"pay"]
    store.close()


# ------------------------------------------------------------------ whole requests

MULTIPART = "multipart/form-data; boundary="

#: Media types, and pieces whose bodies under them are nearly the same.
SIMILAR = [
    ([FORM, "text/plain"], ["a", "=", "&", "+"]),
    ([JSON, "text/json"], ["1", ".0", "0", " "]),
    ([JSON], ['{"a":1', ',"b":2', ',"a":3', "}"]),
    ([f"{MULTIPART}A", f"{MULTIPART}AB"], ["--A", "--AB", "--", "\r\n"]),
    ([JSON, FORM, f"{MULTIPART}A", ""], ["--A", "\r\n", "1", "="]),
]


TARGETS = list(itertools.product(["POST", "PATCH"], ["/", "/a", "/a?"], ["", "a", "?a"]))


def meaning(fingerprint: Fingerprint, sent: tuple[str, str, str, str, bytes]) -> object:
    """What was sent, less what may differ between two tries; found in a way of its own."""
    *target, media_type, body = sent
    content: object = body
    if media_type.startswith(MULTIPART):
        # Of what is before, between and behind the lines that separate, nothing may be lost.
        line = rb"\r\n--" + media_type.removeprefix(MULTIPART).encode() + rb"(?=--|\r\n)"
        media_type, content = MULTIPART, tuple(re.split(line, b"\r\n" + body))
    elif fingerprint is canonical and media_type == FORM:
        content = tuple(parse_qsl(body.decode(), keep_blank_values=True))
    elif fingerprint is canonical and media_type == JSON:
        with contextlib.suppress(ValueError):
            content = repr(json.loads(body, parse_int=Decimal, parse_float=Decimal,
                                      object_pairs_hook=unambiguous))  # fmt: skip
    return (*target, media_type, content) if body else tuple(target)


def unambiguous(pairs: list[tuple[str, object]]) -> list[tuple[str, object]]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name is twice")
    return sorted(pairs)


@both
@pytest.mark.parametrize(
    ("media_types", "pieces"), SIMILAR, ids=["forms", "numbers", "objects", "multipart", "kinds"]
)
def test_of_all_requests_made_of_a_few_pieces_those_that_are_the_same_mean_the_same(
    fingerprint: Fingerprint, media_types: list[str], pieces: list[str]
) -> None:
    """Whatever their kinds of body, and whatever looks like a part of another."""
    bodies = {
        "".join(some).encode()
        for length in range(6)
        for some in itertools.product(pieces, repeat=length)
    }
    everything = [
        *itertools.product(TARGETS[:1], media_types, bodies),
        *itertools.product(TARGETS, media_types, [b"", b"a", b"1"]),
    ]
    version = version_of(fingerprint)
    meanings: dict[bytes, object] = {}
    for (method, path, query), media_type, body in everything:
        environ = request(media_type, REQUEST_METHOD=method, PATH_INFO=path, QUERY_STRING=query)
        made = compute(version, fingerprint, environ, Body.of_bytes(body))
        meant = meaning(fingerprint, (method, path, query, media_type, body))
        assert meanings.setdefault(made, meant) == meant
    # And the other way round, but for bodies that parsers may divide in two ways.
    if not any(media_type.startswith(MULTIPART) for media_type in media_types):
        assert len(meanings) == len({repr(meant) for meant in meanings.values()})


def test_nothing_is_kept_between_calls_on_many_threads() -> None:
    """Pure: the same answer whoever else is asking."""
    bodies = [json.dumps({"a": number, "b": [number] * 50}).encode() for number in range(8)]
    expected = [canonical(request(JSON), body) for body in bodies]
    together = threading.Barrier(len(bodies))
    made: dict[int, set[bytes]] = {}

    def ask(number: int) -> None:
        together.wait(timeout=30)
        made[number] = {canonical(request(JSON), bodies[number]) for _ in range(50)}

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [made[number] for number in range(len(bodies))] == [{digest} for digest in expected]
