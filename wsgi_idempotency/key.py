"""Where a request's idempotency key is, and which keys there are.

draft-ietf-httpapi-idempotency-key-header-07 section 2.1: ``Idempotency-Key`` is an Item
Structured Header whose value MUST be a String. Every SDK in use sends the key bare, so a
bare value is a key too. A generic structured-field parser is wrong here: it takes a bare
UUID for a Token or for an error, depending on its first character, and ``007`` for 7.
"""

from __future__ import annotations

import itertools
import json
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote_to_bytes

from werkzeug.http import parse_options_header
from werkzeug.sansio.multipart import Data, Epilogue, Field, File, MultipartDecoder, NeedData

from wsgi_idempotency.body import Body
from wsgi_idempotency.errors import ConfigurationError, InvalidKey

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

#: A :class:`KeySource`, or a user's own function of the environ and the body.
KeyCallable = Callable[["WSGIEnvironment", bytes], "str | None"]

# A key that is not quoted: visible ASCII without comma, quote or space. A comma is what
# two fields of one name are joined with (RFC 9110 section 5.3).
_BARE = re.compile(r"[!#-+\--~]+")

# RFC 9651 section 3.3.3 and appendix C:
#
#     sf-string   = DQUOTE *( unescaped / "%" / bs-escaped ) DQUOTE
#     unescaped   = %x20-21 / %x23-24 / %x26-5B / %x5D-7E
#     bs-escaped  = "\" ( DQUOTE / "\" )
#
# Written as runs of unescaped characters with escapes between them, so that a text
# matches in one way only and a long one that fails does so in linear time.
_SF_STRING = r'"([ !#-\[\]-~]*(?:\\["\\][ !#-\[\]-~]*)*)"'
_STRING = re.compile(_SF_STRING)
_ESCAPED = re.compile(r'\\(["\\])')

# RFC 9651 sections 3.1.2 and 3.3 and appendix C:
#
#     parameters  = *( ";" *SP parameter )
#     parameter   = param-key [ "=" param-value ]
#     param-key   = ( lcalpha / "*" ) *( lcalpha / DIGIT / "_" / "-" / "." / "*" )
#     param-value = bare-item
_PARAM_VALUE = "|".join(
    [
        r"-?[0-9]{1,12}\.[0-9]{1,3}",  # sf-decimal = ["-"] 1*12DIGIT "." 1*3DIGIT
        r"@?-?[0-9]{1,15}",  # sf-integer = ["-"] 1*15DIGIT; sf-date = "@" sf-integer
        _SF_STRING,
        # sf-token = ( ALPHA / "*" ) *( tchar / ":" / "/" )
        r"[A-Za-z*][A-Za-z0-9!#$%&'*+.^_`|~:/-]*",
        r":[A-Za-z0-9+/]*=*:",  # sf-binary = ":" base64 ":"
        r"\?[01]",  # sf-boolean = "?" ( "0" / "1" )
        # sf-displaystring = "%" DQUOTE *( unescaped / "\" / pct-encoded ) DQUOTE
        # pct-encoded      = "%" lc-hexdig lc-hexdig, and UTF-8 once decoded (section 4.2.10)
        r'%"(?P<display>[ !#$&-~]*(?:%[0-9a-f]{2}[ !#$&-~]*)*)"',
    ]
)
_PARAMETER = re.compile(rf"; *[a-z*][a-z0-9_.*-]*(?:=(?:{_PARAM_VALUE}))?")

# What no key may hold, wherever it comes from: control characters (Unicode category Cc)
# and surrogates, which are no characters and can't be stored.
_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

# RFC 9110 section 5.6.2: token = 1*tchar
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")

_BLANK = "The idempotency key is blank. Send one that identifies the operation, such as a UUID."


def parse(value: str) -> str:
    """The key that a field value stands for.

    Whitespace around it is ignored. If it begins with a quote, it is a strict structured
    field String (RFC 9651 section 3.3.3), whose parameters must be well formed and are
    ignored; otherwise it is the key itself, of visible ASCII characters without comma,
    quote or space. The quoted and the bare form of one key are the same key. The length
    is not limited here; the time taken is linear in it.

    :param value: the field value as the server gives it, decoded as Latin-1 (PEP 3333).
    :returns: the key, unescaped.
    :raises InvalidKey: it is anything else; the message says what to send.
    """
    text = value.strip(" \t")
    quoted = text.startswith('"')
    key = _unquoted(text) if quoted else text
    if not key.strip(" "):
        raise InvalidKey(_BLANK)
    if not quoted and not _BARE.fullmatch(text):
        raise InvalidKey(
            "The idempotency key may hold only visible ASCII characters, without comma, quote or"
            " space, and may be sent only once. Send one such as a UUID, or quote it as a"
            " structured field String."
        )
    return key


def _unquoted(text: str) -> str:
    string = _STRING.match(text)
    if string is None:
        raise InvalidKey(
            "The quoted idempotency key is not a structured field String. Send printable ASCII"
            ' characters between two quotes, with \\" for a quote and \\\\ for a backslash.'
        )
    position = string.end()
    while position < len(text):
        parameter = _PARAMETER.match(text, position)
        if parameter is None or not _is_utf_8(parameter["display"] or ""):
            raise InvalidKey(
                "The quoted idempotency key is followed by something that is not a structured"
                " field parameter. Send one key and nothing behind its closing quote."
            )
        position = parameter.end()
    return _ESCAPED.sub(r"\1", string[1])


def _is_utf_8(percent_encoded: str) -> bool:
    try:
        unquote_to_bytes(percent_encoded).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def check(value: object) -> str:
    """The value, if it is fit to be a key that didn't come in a header field.

    :param value: any text that is not blank and holds no control characters and no
        surrogates. Its length is not limited here.
    :raises InvalidKey: it is a text that can't be a key.
    :raises TypeError: it is not a text; a programming error, not the client's.
    """
    if not isinstance(value, str):
        raise TypeError(f"the key is a {type(value).__name__}; return a str, or None without a key")
    if not value.strip():
        raise InvalidKey(_BLANK)
    if _FORBIDDEN.search(value):
        raise InvalidKey(
            "The idempotency key holds control characters or is not valid Unicode. Send plain"
            " text, such as a UUID."
        )
    return value


def new_key() -> str:
    """A fresh key, for the hidden field of a form or for a client: a random UUID
    (RFC 9562 section 5.4). Make one each time the form is rendered."""
    return str(uuid.uuid4())


class KeySource(ABC):
    """A place in the request where the key is.

    Wherever one is asked for, any callable ``(environ, body) -> str or None`` serves too;
    a source is different in that it reads the request body only if it has to.
    """

    @abstractmethod
    def find(self, environ: WSGIEnvironment, body: Body) -> str | None:
        """The key, or None when the request has none.

        :raises InvalidKey: there is something in its place that can't be a key.
        :raises BodyError: the source needs the body, and it can't be taken in full.
        """

    def places(self) -> tuple[tuple[str, str], ...]:
        """Where it looks, in order, for documentation: a kind of place and a name in it. The
        kinds of ours are ``"header"``, ``"form"`` and ``"json"``."""
        return (("other", type(self).__name__),)

    def __call__(self, environ: WSGIEnvironment, body: bytes) -> str | None:
        """:meth:`find`, for a body that is in memory."""
        return self.find(environ, Body.of_bytes(body))


def extract(source: KeyCallable, environ: WSGIEnvironment, body: Body) -> str | None:
    """The key that a source or a user's callable finds, or None.

    :raises InvalidKey: there is something in its place that can't be a key.
    :raises TypeError: a callable returned something that is neither a str nor None.
    """
    if isinstance(source, KeySource):
        found = source.find(environ, body)
    else:
        found = source(environ, body.bytes())
    return None if found is None else check(found)


def places(source: KeyCallable) -> tuple[tuple[str, str], ...]:
    """Where a source or a user's callable looks; see :meth:`KeySource.places`."""
    if isinstance(source, KeySource):
        return source.places()
    return (("other", getattr(source, "__name__", type(source).__name__)),)


def is_token(name: object) -> bool:
    """Whether it can be the name of a field (RFC 9110 section 5.1) or a cookie (RFC 6265
    section 4.1.1)."""
    return isinstance(name, str) and _TOKEN.fullmatch(name) is not None


def environ_name(field_name: str) -> str:
    """The key under which WSGI has a request field (PEP 3333; RFC 3875 section 4.1.18).

    :raises ConfigurationError: it can't be the name of a field.
    """
    if not is_token(field_name):
        raise ConfigurationError(
            f'{field_name!r} can\'t be the name of a header field; use one like "Idempotency-Key"'
        )
    name = field_name.upper().replace("-", "_")
    return name if name in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{name}"


@dataclass(frozen=True)
class _Header(KeySource):
    name: str
    _environ_name: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_environ_name", environ_name(self.name))

    def places(self) -> tuple[tuple[str, str], ...]:
        return (("header", self.name),)

    def find(self, environ: WSGIEnvironment, body: Body) -> str | None:
        value = environ.get(self._environ_name)
        return None if value is None else parse(value)


def header(name: str) -> KeySource:
    """The key is in a header field; the body is not read.

    A request without the field has no key; one with an empty field is refused.

    :param name: the field's name, such as ``"Idempotency-Key"``.
    :raises ConfigurationError: it can't be the name of a field.
    """
    return _Header(name)


@dataclass(frozen=True)
class _FormField(KeySource):
    name: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigurationError(f"{self.name!r} can't be the name of a form field; use a text")

    def places(self) -> tuple[tuple[str, str], ...]:
        return (("form", self.name),)

    def find(self, environ: WSGIEnvironment, body: Body) -> str | None:
        media_type, options = parse_options_header(environ.get("CONTENT_TYPE"))
        if media_type.lower() == "application/x-www-form-urlencoded":
            values = self._in_urlencoded(body)
        elif media_type.lower() == "multipart/form-data":
            values = self._in_multipart(body, options.get("boundary", ""))
        else:
            return None
        if not values:
            return None
        if any(value != values[0] for value in values):
            raise InvalidKey(
                f"The form field {self.name!r}, which is the idempotency key, was sent with"
                " different values. Send it once."
            )
        return check(values[0])

    # Bytes that are not UTF-8 become surrogates: harmless in another field, and refused
    # by check() in this one.

    def _in_urlencoded(self, body: Body) -> list[str]:
        text = body.bytes().decode("utf-8", "surrogateescape")
        pairs = parse_qsl(text, keep_blank_values=True, errors="surrogateescape")
        return [value for name, value in pairs if name == self.name]

    def _in_multipart(self, body: Body, boundary: str) -> list[str]:
        try:
            return list(self._parts(body, boundary.encode("ascii")))
        except ValueError as exc:
            if not any(body.chunks()):
                return []
            # The application may be more lenient and find the field, so that to go on
            # without a key could be to run unprotected what should be protected.
            raise InvalidKey(
                f"The form is malformed, so that its field {self.name!r}, which is the"
                " idempotency key, can't be read. Send valid multipart/form-data."
            ) from exc

    def _parts(self, body: Body, boundary: bytes) -> Iterator[str]:
        """The values of the field. Other parts, such as files, are not kept in memory."""
        if not boundary:
            raise ValueError("the form has no boundary")
        decoder = MultipartDecoder(boundary)
        value: bytearray | None = None
        for chunk in itertools.chain(body.chunks(), [None]):
            decoder.receive_data(chunk)
            while not isinstance(event := decoder.next_event(), (NeedData, Epilogue)):
                if isinstance(event, Field) and event.name == self.name:
                    value = bytearray()
                elif isinstance(event, (Field, File)):
                    value = None
                elif isinstance(event, Data) and value is not None:
                    value += event.data
                    if not event.more_data:
                        yield value.decode("utf-8", "surrogateescape")


def form_field(name: str) -> KeySource:
    """The key is in a field of an HTML form, urlencoded or multipart; see :func:`new_key`.

    A body that is not a form, or has no such field, has no key. A field that is empty,
    as a template's mistake would make it, is refused, and so is a form with several
    different values for it or one that can't be parsed.

    :param name: the field's name.
    :raises ConfigurationError: it can't be the name of a field.
    """
    return _FormField(name)


class _Integer(str):
    """An integer as JSON spells it. int() would refuse a long one, and needn't be asked."""


@dataclass(frozen=True)
class _JsonField(KeySource):
    path: str

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not all(self.path.split(".")):
            raise ConfigurationError(
                f'{self.path!r} can\'t be the path of a JSON member; use one like "data.id"'
            )

    def places(self) -> tuple[tuple[str, str], ...]:
        return (("json", self.path),)

    def find(self, environ: WSGIEnvironment, body: Body) -> str | None:
        try:
            # As lenient as applications are: any encoding json.loads() detects, NaN, and
            # whatever the Content-Type says, since some webhooks come as text/plain.
            found = self._in(json.loads(body.bytes(), parse_int=_Integer, object_pairs_hook=tuple))
        except RecursionError as exc:
            raise self._unreadable("is nested too deeply") from exc
        except (json.JSONDecodeError, UnicodeDecodeError) as exc:
            if body.bytes().strip() and _claims_json(environ):
                raise self._unreadable("is malformed") from exc
            return None
        if found is None:
            return None
        if not isinstance(found, str):
            raise InvalidKey(
                f"The JSON member {self.path!r}, which is the idempotency key, is neither a"
                " string nor an integer. Send one of these."
            )
        return check(str(found))

    def _in(self, node: object) -> object:
        """The member at the path; null counts as absent, as serializers write it for that.

        Objects are tuples of pairs here, and arrays lists.
        """
        for name in self.path.split("."):
            if not isinstance(node, tuple):
                return None
            values = [value for member, value in node if member == name]
            if not values:
                return None
            if any(value != values[0] for value in values):
                raise InvalidKey(
                    f"The JSON member {self.path!r}, which is the idempotency key, was sent with"
                    " different values. Send it once."
                )
            node = values[0]
        return node

    def _unreadable(self, why: str) -> InvalidKey:
        # The application's parser may be more lenient and find the member, so that to go
        # on without a key could be to run unprotected what should be protected.
        return InvalidKey(
            f"The JSON {why}, so that its member {self.path!r}, which is the idempotency key,"
            " can't be read. Send valid JSON."
        )


def _claims_json(environ: WSGIEnvironment) -> bool:
    media_type = parse_options_header(environ.get("CONTENT_TYPE"))[0].lower()
    return media_type == "application/json" or media_type.endswith("+json")


def json_field(path: str) -> KeySource:
    """The key is in a member of a JSON object, as in the deliveries of webhooks.

    A string is the key as it is, an integer as it is spelled. A body that is not JSON, or
    has no such member, or null for it, has no key. Any other value is refused, and so is
    a body with several different values for it, or one that is malformed although its
    Content-Type says JSON.

    :param path: the names of nested members, joined by dots: ``"id"``, ``"data.id"``.
    :raises ConfigurationError: the path or one of its names is empty.
    """
    return _JsonField(path)


@dataclass(frozen=True)
class _FirstOf(KeySource):
    sources: tuple[KeyCallable, ...]

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigurationError('first_of() needs sources, such as header("Idempotency-Key")')
        for source in self.sources:
            if not callable(source):
                raise ConfigurationError(
                    f"{source!r} is no source of a key; use header(name), form_field(name),"
                    " json_field(path) or a callable (environ, body) -> str or None"
                )

    def places(self) -> tuple[tuple[str, str], ...]:
        return tuple(place for source in self.sources for place in places(source))

    def find(self, environ: WSGIEnvironment, body: Body) -> str | None:
        found = (extract(source, environ, body) for source in self.sources)
        return next((key for key in found if key is not None), None)


def first_of(*sources: KeyCallable) -> KeySource:
    """The key is what the first source finds that finds one; the others are not asked.

    A source that refuses what it finds refuses the request.

    :param sources: sources, or callables ``(environ, body) -> str or None``.
    :raises ConfigurationError: there are none, or one can't be called.
    """
    return _FirstOf(sources)
