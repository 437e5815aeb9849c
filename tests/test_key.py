"""The grammar of the key, and where it is found."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import http_sf
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from werkzeug.test import EnvironBuilder

from wsgi_idempotency.body import Body
from wsgi_idempotency.errors import BodyTooLarge, ConfigurationError, InvalidKey
from wsgi_idempotency.key import (
    KeySource,
    check,
    extract,
    first_of,
    form_field,
    header,
    json_field,
    new_key,
    parse,
)

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

UUID = "8e03978e-40d5-43dd-bc93-6894a57f9324"


class Unreadable:
    """An input stream of a server; whoever reads it was not meant to."""

    def read(self, size: int = -1) -> NoReturn:
        raise AssertionError("the body was read")


def unreadable() -> Body:
    return Body({"wsgi.input": Unreadable(), "CONTENT_LENGTH": "5"}, limit=10)


# ------------------------------------------------------------------ the grammar


@pytest.mark.parametrize(
    ("value", "key"),
    [
        pytest.param(UUID, UUID, id="a bare UUID that begins with a digit"),
        pytest.param("f" + UUID[1:], "f" + UUID[1:], id="a bare UUID that begins with a letter"),
        pytest.param(UUID.upper(), UUID.upper(), id="the case is kept"),
        pytest.param(f'"{UUID}"', UUID, id="a quoted UUID"),
        pytest.param("007", "007", id="digits are not a number"),
        pytest.param("?1", "?1", id="a bare boolean is not one"),
        pytest.param("k;v=1", "k;v=1", id="a bare key has no parameters"),
        pytest.param("a\\b", "a\\b", id="a bare key has no escapes"),
        pytest.param("".join(map(chr, range(0x23, 0x2C))), "#$%&'()*+", id="signs below the comma"),
        pytest.param("~}|{`_^]\\[@?>=<;:/.-!", "~}|{`_^]\\[@?>=<;:/.-!", id="all other signs"),
        pytest.param(" \t k\t ", "k", id="whitespace around a bare key"),
        pytest.param(' \t "k"\t ', "k", id="whitespace around a quoted key"),
        pytest.param(r'"a\"b\\c"', r'a"b\c', id="escapes of quote and backslash"),
        pytest.param('"a b,c"', "a b,c", id="space and comma in a quoted key"),
        pytest.param('" k "', " k ", id="spaces in the quotes are the key's"),
        pytest.param('"%41"', "%41", id="percent is nothing special"),
        pytest.param('"k";v=1', "k", id="an integer parameter"),
        pytest.param('"k"; v', "k", id="a parameter without value"),
        pytest.param('"k";a=-1.5;b="x\\"y";*c=t/o:k;d=:aGk=:', "k", id="several parameters"),
        pytest.param('"k";b=?0;d=@1659578233;s=%"f%c3%bc\\"', "k", id="parameters of RFC 9651"),
    ],
)
def test_a_value_stands_for_the_key(value: str, key: str) -> None:
    assert parse(value) == key


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(str(uuid.UUID(UUID)), id="uuid4"),
        pytest.param("8E03978E-40D5-43DD-BC93-6894A57F9324", id="upper-case uuid4"),
        pytest.param("0123abcd-ffff-0000-1111-0123456789ab", id="32 hex digits in UUID shape"),
        pytest.param(f"stripe-node-retry-{UUID}", id="stripe-node"),
        pytest.param(f"stainless-python-retry-{UUID}", id="stainless"),
        pytest.param(f"auto_{UUID}", id="auto underscore"),
    ],
)
def test_keys_as_sdks_send_them_are_the_same_bare_and_quoted(key: str) -> None:
    assert parse(key) == parse(f'"{key}"') == parse(f'"{key}";v=1') == key


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("", id="empty"),
        pytest.param('""', id="quoted empty"),
        pytest.param(" \t ", id="blank"),
        pytest.param('"  "', id="blank once unescaped"),
        pytest.param('"', id="a single quote"),
        pytest.param('"k', id="unterminated"),
        pytest.param('"k\\"', id="unterminated behind an escaped quote"),
        pytest.param('"k\\', id="ends in a backslash"),
        pytest.param('"\\n"', id="an escape there is not"),
        pytest.param('"k\n"', id="a line feed in quotes"),
        pytest.param('"\xe9"', id="Latin-1 in quotes"),
        pytest.param("\xc3\xa9", id="UTF-8 as Latin-1"),
        pytest.param("ключ", id="beyond Latin-1"),
        pytest.param("k\x00", id="NUL"),
        pytest.param('"k\x00"', id="NUL in quotes"),
        pytest.param("k\x01", id="control character"),
        pytest.param("k\x7f", id="delete"),
        pytest.param('"k\x7f"', id="delete in quotes"),
        pytest.param("k\r\n l", id="obs-fold"),
        pytest.param("k\n", id="a line feed at the end"),
        pytest.param("a,b", id="two fields joined"),
        pytest.param("a, b", id="two fields joined with a space"),
        pytest.param('"a","b"', id="two quoted fields joined"),
        pytest.param('"a", "a"', id="one quoted field twice"),
        pytest.param('a,"b"', id="a bare and a quoted field joined"),
        pytest.param("a b", id="space"),
        pytest.param("a\tb", id="tab"),
        pytest.param('a"b', id="quote inside"),
        pytest.param('k"', id="quote at the end"),
        pytest.param('"k"l', id="text behind the quote"),
        pytest.param('"k";', id="parameter without name"),
        pytest.param('"k";A=1', id="parameter with upper-case name"),
        pytest.param('"k";a=', id="parameter with nothing behind its equals sign"),
        pytest.param('"k";a=1234567890123456', id="integer of 16 digits"),
        pytest.param('"k";a=1.2345', id="decimal of four places"),
        pytest.param('"k";a=\xe9', id="parameter that is not ASCII"),
        pytest.param('"k";a=%"%c3"', id="display string that is not UTF-8"),
        pytest.param('"k";a=%"%C3%BC"', id="display string in upper case"),
        pytest.param('"k" ;a', id="space before a parameter"),
        pytest.param('"k";\ta', id="tab before a parameter's name"),
        pytest.param("\x0bk", id="vertical tab is not whitespace"),
        pytest.param("\xa0k", id="no-break space is not whitespace"),
    ],
)
def test_a_value_is_refused(value: str) -> None:
    with pytest.raises(InvalidKey, match="Send") as caught:
        parse(value)
    assert "ключ" not in str(caught.value)


structured = st.one_of(
    st.text(st.characters(max_codepoint=0xFF)).map(lambda text: f'"{text}"'),
    st.text('"\\;=ak1 .,-:?@%*', max_size=12).map(lambda text: f'"{text}'),
    st.from_regex(
        r'\A"k"(; *[a-z*][a-z0-9_.*-]{0,2}(=('
        r'-?[0-9]{1,17}(\.[0-9]{0,4})?|[a-zA-Z*][!-~]{0,3}|\?[012]|"[ -~]{0,3}"'
        r'|%"([ -~]|%[0-9a-fA-F]{2}){0,3}"))?)+\Z'
    ),
)


@given(structured)
@example('"k";a=1.')
@example('"k";a=1234567890123.1')
@example('"k";a=123456789012.123')
@example('"k";a=%"\\"')
@example('"k";*=*')
def test_a_quoted_value_is_what_the_structured_field_parser_says(value: str) -> None:
    """http-sf is the oracle for strings and parameters, but for blank keys."""
    value = value.rstrip("\t")
    try:
        expected: Any = http_sf.parse(value.encode("latin-1"), tltype="item")[0]  # type: ignore[index]
    except http_sf.StructuredFieldError:
        expected = None
    if expected is None or not expected.strip(" "):
        with pytest.raises(InvalidKey):
            parse(value)
    else:
        assert parse(value) == expected


@given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1))
def test_what_can_be_a_key_survives_being_quoted(key: str) -> None:
    quoted = http_sf.ser(key)
    if key.strip(" "):
        assert parse(quoted) == key
    else:
        with pytest.raises(InvalidKey):
            parse(quoted)


@given(st.text(st.characters(max_codepoint=0x17F), min_size=1))
def test_a_bare_value_is_a_key_only_if_all_of_it_is_visible_ascii(value: str) -> None:
    stripped = value.strip(" \t")
    if stripped.startswith('"'):
        return
    if stripped and all("!" <= char <= "~" and char not in ',"' for char in stripped):
        assert parse(value) == stripped
    else:
        with pytest.raises(InvalidKey):
            parse(value)


MEGABYTE = 1_000_000


@pytest.mark.parametrize(
    ("before", "repeated", "after"),
    [
        pytest.param("", "k", "", id="bare"),
        pytest.param("", "k", " k", id="bare, with a space near the end"),
        pytest.param("", " ", "k", id="whitespace before"),
        pytest.param("k", "\t", "\x0b", id="whitespace and a control character"),
        pytest.param('"', "k", "", id="unterminated"),
        pytest.param('"', '\\"', "", id="unterminated, of escapes"),
        pytest.param('"', "k\\\\", '"', id="of escapes"),
        pytest.param('"k"', ";a", "", id="many parameters"),
        pytest.param('"k";', " ", "", id="spaces and no parameter"),
        pytest.param('"k";', "a", "!", id="a long name and a fault"),
        pytest.param('"k";a=', "1", "", id="a long integer"),
        pytest.param('"k";a="', "\\\\", "", id="an unterminated string in a parameter"),
        pytest.param('"k";a=%"', "%c3%bc", "", id="an unterminated display string"),
        pytest.param('"k";a=:', "=", "", id="an unterminated byte sequence"),
        pytest.param('"k";a=', "t", ",", id="a long token and a fault"),
    ],
)
def test_a_value_of_a_megabyte_takes_no_longer_than_its_length_warrants(
    before: str, repeated: str, after: str
) -> None:
    value = before + repeated * (MEGABYTE // len(repeated)) + after
    started = time.process_time()
    with contextlib.suppress(InvalidKey):
        parse(value)
    # Linear: a second under coverage. Quadratic: 10**12 steps, minutes at the very least.
    assert time.process_time() - started < 20


# ------------------------------------------------------------------ other texts


@pytest.mark.parametrize("value", ["k", " k ", "ключ", "a,b", '"k"', "é\u200d", "\U0001f600"])
def test_any_text_that_is_not_blank_can_be_a_key(value: str) -> None:
    assert check(value) == value


@pytest.mark.parametrize(
    "value", ["", " ", "\u3000", "k\n", "k\x00", "\x7f", "\x85k", "k\x9f", "\ud800", "k\udcff"]
)
def test_blanks_control_characters_and_surrogates_are_no_key(value: str) -> None:
    with pytest.raises(InvalidKey, match="Send"):
        check(value)


@pytest.mark.parametrize("value", [None, 7, b"k", ["k"]])
def test_what_is_not_a_text_is_a_programming_error(value: object) -> None:
    with pytest.raises(TypeError, match="return a str"):
        check(value)


def test_a_new_key_is_a_random_uuid_each_time() -> None:
    first, second = new_key(), new_key()
    assert first != second
    assert uuid.UUID(first).version == 4
    assert parse(first) == first


# ------------------------------------------------------------------ in a header field


def test_the_header_is_found_without_reading_the_body() -> None:
    source = header("Idempotency-Key")
    environ = {"HTTP_IDEMPOTENCY_KEY": f'"{UUID}"'}
    assert extract(source, environ, unreadable()) == UUID
    assert extract(source, {}, unreadable()) is None


def test_an_empty_header_is_refused_where_an_absent_one_is_none() -> None:
    source = header("idempotency-key")
    assert source({}, b"") is None
    with pytest.raises(InvalidKey):
        source({"HTTP_IDEMPOTENCY_KEY": ""}, b"")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("X-Request-Id", "HTTP_X_REQUEST_ID"),
        ("Content-Type", "CONTENT_TYPE"),
        ("content-length", "CONTENT_LENGTH"),
    ],
)
def test_a_header_has_the_name_that_wsgi_gives_it(name: str, key: str) -> None:
    assert header(name)({key: "k"}, b"") == "k"


@pytest.mark.parametrize("name", ["", "Idempotency Key", "Key:", "Kéy", "Key\n", 7, None])
def test_what_can_not_be_a_field_is_refused_at_construction(name: Any) -> None:
    with pytest.raises(ConfigurationError, match="use one like"):
        header(name)


def test_sources_are_values_that_show_what_they_are() -> None:
    assert header("Idempotency-Key") == header("Idempotency-Key") != header("X-Key")
    assert repr(header("X-Key")) == "_Header(name='X-Key')"
    assert len({json_field("id"), json_field("id"), form_field("id")}) == 2


# ------------------------------------------------------------------ in a form


def urlencoded(body: bytes) -> tuple[WSGIEnvironment, bytes]:
    return {"CONTENT_TYPE": "application/x-www-form-urlencoded; charset=utf-8"}, body


def multipart(fields: Iterable[tuple[str, Any]]) -> tuple[WSGIEnvironment, bytes]:
    """A form as werkzeug's test client sends it; a value may be (stream, file name)."""
    builder = EnvironBuilder(method="POST", content_type="multipart/form-data")
    for name, value in fields:
        if isinstance(value, tuple):
            builder.files.add_file(name, *value)
        else:
            builder.form.add(name, value)
    environ = builder.get_environ()
    return environ, environ["wsgi.input"].read()


@pytest.mark.parametrize(
    ("body", "key"),
    [
        pytest.param(b"a=1&key=k&b=2", "k", id="among others"),
        pytest.param(b"key=a%2Cb+c", "a,b c", id="decoded"),
        pytest.param(b"key=%C3%A9", "é", id="in UTF-8"),
        pytest.param("key=é".encode(), "é", id="in UTF-8, not encoded"),
        pytest.param(b"%6Bey=k", "k", id="with an encoded name"),
        pytest.param(b"key=k&key=k", "k", id="twice the same"),
        pytest.param(b"key=k&a=%E9&b=\xe9", "k", id="beside fields that are not UTF-8"),
        pytest.param(b"a=1&b", None, id="absent"),
        pytest.param(b"KEY=k", None, id="absent: names have a case"),
        pytest.param(b"", None, id="absent: no body"),
    ],
)
def test_a_urlencoded_field_is_the_key(body: bytes, key: str | None) -> None:
    assert form_field("key")(*urlencoded(body)) == key


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"key=", id="empty, as a template's mistake makes it"),
        pytest.param(b"key", id="without a value"),
        pytest.param(b"key=+", id="blank"),
        pytest.param(b"key=a&key=b", id="two values"),
        pytest.param(b"key=a&key=", id="two values, one empty"),
        pytest.param(b"key=%00", id="NUL"),
        pytest.param(b"key=%E9", id="not UTF-8"),
        pytest.param(b"key=\xe9", id="not UTF-8 and not encoded"),
    ],
)
def test_a_urlencoded_field_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidKey, match="Send"):
        form_field("key")(*urlencoded(body))


def test_a_multipart_field_is_the_key() -> None:
    file = (io.BytesIO(b"key\r\n" * 100_000), "key.txt")
    environ, body = multipart([("a", "1"), ("file", file), ("key", "é,1"), ("b", "2")])
    assert form_field("key")(environ, body) == "é,1"
    assert form_field("other")(environ, body) is None


def test_a_multipart_field_is_put_together_from_the_chunks_it_comes_in() -> None:
    """64 KiB are read at once, and this field's value goes over such an edge."""
    key = "k" * 200_000
    assert form_field("key")(*multipart([("a", "1" * 65_300), ("key", key)])) == key


def test_a_file_is_not_a_field_even_under_its_name() -> None:
    file = (io.BytesIO(b"k"), "k.txt")
    assert form_field("key")(*multipart([("key", file)])) is None


def test_a_multipart_field_sent_twice_must_be_the_same() -> None:
    assert form_field("key")(*multipart([("key", "a"), ("key", "a")])) == "a"
    with pytest.raises(InvalidKey, match="Send it once"):
        form_field("key")(*multipart([("key", "a"), ("key", "b")]))


def test_an_empty_multipart_field_is_refused() -> None:
    with pytest.raises(InvalidKey, match="blank"):
        form_field("key")(*multipart([("key", "")]))


def test_a_multipart_field_that_is_not_utf_8_is_refused() -> None:
    environ, body = multipart([("key", "xyz")])
    with pytest.raises(InvalidKey, match="Unicode"):
        form_field("key")(environ, body.replace(b"xyz", b"\xe9"))


@pytest.mark.parametrize(
    "content_type",
    [
        pytest.param("multipart/form-data; boundary=other", id="another boundary"),
        pytest.param("multipart/form-data", id="no boundary"),
        pytest.param('multipart/form-data; boundary="é"', id="a boundary that is not ASCII"),
    ],
)
def test_a_malformed_multipart_form_is_refused(content_type: str) -> None:
    _, body = multipart([("key", "k")])
    with pytest.raises(InvalidKey, match="malformed"):
        form_field("key")({"CONTENT_TYPE": content_type}, body)


def test_a_multipart_form_cut_off_is_refused_even_behind_the_field() -> None:
    environ, body = multipart([("key", "k"), ("a", "1")])
    with pytest.raises(InvalidKey, match="malformed"):
        form_field("key")(environ, body[:-20])


def test_a_multipart_form_without_a_body_has_no_key() -> None:
    environ, _ = multipart([("key", "k")])
    assert form_field("key")(environ, b"") is None


@pytest.mark.parametrize("content_type", [None, "", "application/json", "multipart/mixed"])
def test_a_body_that_is_not_a_form_has_no_key_and_is_not_read(content_type: str | None) -> None:
    environ = {} if content_type is None else {"CONTENT_TYPE": content_type}
    assert extract(form_field("key"), environ, unreadable()) is None


@pytest.mark.parametrize("name", ["", None, 7])
def test_what_can_not_name_a_form_field_is_refused_at_construction(name: Any) -> None:
    with pytest.raises(ConfigurationError, match="form field"):
        form_field(name)


def test_a_body_that_is_too_large_is_not_taken_for_one_without_a_key() -> None:
    environ = {
        "CONTENT_LENGTH": "11",
        "wsgi.input": io.BytesIO(b"key=abcdefg"),
        **urlencoded(b"")[0],
    }
    with pytest.raises(BodyTooLarge):
        extract(form_field("key"), environ, Body(environ, limit=10))


# ------------------------------------------------------------------ in JSON

JSON = {"CONTENT_TYPE": "application/json"}


@pytest.mark.parametrize(
    ("path", "body", "key"),
    [
        pytest.param("id", '{"id": "evt_1", "a": [{}]}', "evt_1", id="a string"),
        pytest.param("data.id", '{"data": {"id": "evt_1"}}', "evt_1", id="a nested string"),
        pytest.param("id", '{"id": 42}', "42", id="an integer"),
        pytest.param("id", '{"id": -0}', "-0", id="an integer as it is spelled"),
        pytest.param("id", f'{{"id": {"9" * 5000}}}', "9" * 5000, id="an integer int() refuses"),
        pytest.param("id", r'{"id": "\u00e9"}', "é", id="an escaped string"),
        pytest.param("id", '{"id": "a", "id": "a"}', "a", id="twice the same"),
        pytest.param("id", '{"id": "a", "x": NaN}', "a", id="beside NaN, which apps accept"),
        pytest.param("id", '{"ID": "a"}', None, id="absent"),
        pytest.param("id", '{"id": null}', None, id="null"),
        pytest.param("data.id", '{"data": null}', None, id="absent below null"),
        pytest.param("data.id", '{"data": "id"}', None, id="absent below a string"),
        pytest.param("data.id", '{"data": [{"id": "a"}]}', None, id="absent below an array"),
        pytest.param("id", '[["id", "a"]]', None, id="absent in an array"),
        pytest.param("id", '"id"', None, id="absent in a string"),
        pytest.param("id", "", None, id="absent without a body"),
        pytest.param("id", " \n", None, id="absent in a blank body"),
    ],
)
def test_a_json_member_is_the_key(path: str, body: str, key: str | None) -> None:
    assert json_field(path)(JSON, body.encode()) == key


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-le"])
def test_a_json_member_is_found_in_any_encoding_that_applications_read(encoding: str) -> None:
    """An application that calls json.loads() on the bytes would run it unprotected."""
    assert json_field("id")(JSON, '{"id": "é"}'.encode(encoding)) == "é"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param('{"id": ""}', id="empty"),
        pytest.param('{"id": " "}', id="blank"),
        pytest.param('{"id": 1.0}', id="a float"),
        pytest.param('{"id": 1e3}', id="an exponent"),
        pytest.param('{"id": true}', id="a boolean"),
        pytest.param('{"id": {}}', id="an object"),
        pytest.param('{"id": ["a"]}', id="an array"),
        pytest.param('{"id": NaN}', id="NaN"),
        pytest.param('{"id": "a", "id": "b"}', id="two values"),
        pytest.param('{"id": "a", "id": null}', id="two values, one null"),
        pytest.param(r'{"id": "\ud800"}', id="a surrogate"),
        pytest.param(r'{"id": "a\u0000"}', id="NUL"),
        pytest.param('{"id": "a"', id="malformed"),
        pytest.param("{'id': 'a'}", id="not JSON though it says so"),
    ],
)
def test_a_json_member_is_refused(body: str) -> None:
    with pytest.raises(InvalidKey, match="Send"):
        json_field("id")(JSON, body.encode())


def test_two_objects_with_different_members_are_two_values() -> None:
    with pytest.raises(InvalidKey, match="Send it once"):
        json_field("a.id")(JSON, b'{"a": {"id": "1"}, "a": {"id": "2"}}')


@pytest.mark.parametrize("content_type", ["text/plain", "", "application/octet-stream"])
def test_json_is_found_whatever_the_content_type(content_type: str) -> None:
    """Amazon SNS delivers JSON as text/plain."""
    assert json_field("id")({"CONTENT_TYPE": content_type}, b'{"id": "a"}') == "a"


@pytest.mark.parametrize("body", [b"a=1", b"\xff\x00\xff", b"{'id': 1}"])
def test_a_body_that_is_not_json_has_no_key(body: bytes) -> None:
    assert json_field("id")({"CONTENT_TYPE": "text/plain"}, body) is None
    assert json_field("id")({}, body) is None


@pytest.mark.parametrize("content_type", ["Application/JSON", "application/cloudevents+json; a=b"])
def test_a_malformed_body_that_claims_to_be_json_is_refused(content_type: str) -> None:
    """Bytes that can't be decoded included: the application may know how to read them."""
    for body in (b"{", b'{"id": "\xff"}'):
        with pytest.raises(InvalidKey, match="malformed"):
            json_field("id")({"CONTENT_TYPE": content_type}, body)


@pytest.mark.parametrize("opening", ["[", '{"a":', '{"id": "k", "a": ['])
def test_json_nested_too_deeply_is_refused_and_breaks_nothing(opening: str) -> None:
    depth = 2_000_000 // len(opening)
    with pytest.raises(InvalidKey, match="nested too deeply"):
        json_field("id")({}, (opening * depth).encode())


@pytest.mark.parametrize("path", ["", ".", "a.", ".a", "a..b", None, 7])
def test_what_can_not_be_a_path_is_refused_at_construction(path: Any) -> None:
    with pytest.raises(ConfigurationError, match="use one like"):
        json_field(path)


@given(st.text(), st.text(min_size=1).filter(lambda name: "." not in name))
def test_a_json_member_is_the_text_it_was_made_of(key: str, name: str) -> None:
    body = json.dumps({name: {"x": key}}).encode()
    try:
        expected = check(key)
    except InvalidKey:
        with pytest.raises(InvalidKey):
            json_field(f"{name}.x")(JSON, body)
    else:
        assert json_field(f"{name}.x")(JSON, body) == expected


# ------------------------------------------------------------------ several sources


def test_the_first_source_that_finds_a_key_decides_and_the_others_are_not_asked() -> None:
    source = first_of(header("Idempotency-Key"), json_field("id"))
    assert extract(source, {"HTTP_IDEMPOTENCY_KEY": "h"}, unreadable()) == "h"
    assert extract(source, {}, Body.of_bytes(b'{"id": "j"}')) == "j"
    assert extract(source, {}, Body.of_bytes(b"{}")) is None


def test_a_source_that_refuses_refuses_for_all() -> None:
    source = first_of(header("Idempotency-Key"), json_field("id"))
    with pytest.raises(InvalidKey):
        source({"HTTP_IDEMPOTENCY_KEY": ""}, b'{"id": "j"}')


def test_a_callable_may_be_among_the_sources_and_gets_the_bytes() -> None:
    def last_word(environ: WSGIEnvironment, body: bytes) -> str | None:
        return body.split()[-1].decode() if body else None

    source = first_of(header("Idempotency-Key"), last_word)
    assert source({}, b"the key") == "key"
    assert source({}, b"") is None


@pytest.mark.parametrize("sources", [(), ("Idempotency-Key",), (header("A"), None)])
def test_sources_that_can_not_be_asked_are_refused_at_construction(sources: Any) -> None:
    with pytest.raises(ConfigurationError, match="header"):
        first_of(*sources)


# ------------------------------------------------------------------ a user's own


def test_a_callable_gets_the_body_and_its_answer_is_checked() -> None:
    assert extract(lambda environ, body: body.decode(), {}, Body.of_bytes("né".encode())) == "né"
    assert extract(lambda environ, body: None, {}, Body.of_bytes(b"")) is None
    with pytest.raises(InvalidKey):
        extract(lambda environ, body: "", {}, Body.of_bytes(b""))
    with pytest.raises(TypeError):
        extract(lambda environ, body: body, {}, Body.of_bytes(b"k"))  # type: ignore[arg-type,return-value]


def test_what_a_callable_raises_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        extract(lambda environ, body: str(1 // 0), {}, Body.of_bytes(b""))


def test_a_source_of_ones_own_is_lazy_and_its_answer_is_checked() -> None:
    class Blank(KeySource):
        def find(self, environ: WSGIEnvironment, body: Body) -> str | None:
            return " "

    with pytest.raises(InvalidKey):
        extract(Blank(), {}, unreadable())


def test_the_interpreters_limit_on_integers_is_on_in_these_tests() -> None:
    """Otherwise the test of a long integer would show nothing."""
    assert 0 < sys.get_int_max_str_digits() < 5000
