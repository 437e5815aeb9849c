"""What makes two requests the same, and what names a key.

Pure functions. Whatever goes into a digest is prefixed with its length, so that no two
different sequences of parts are ever hashed as the same bytes: ``("/a", "b:c")`` and
``("/a:b", "c")`` differ. Algorithms are numbered; a number's meaning never changes, since
a retry is compared by the algorithm that its record was made with.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote_to_bytes

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from wsgi_idempotency.body import Body

Fingerprint = Callable[["WSGIEnvironment", bytes], bytes]

#: ``fingerprint_version`` of a user's callable, or of None.
OWN = 0
#: ``fingerprint_version`` of :func:`exact`.
EXACT = 1
#: ``fingerprint_version`` of :func:`canonical`.
CANONICAL = 2

#: Levels of nesting up to which :func:`canonical` takes JSON by value. Fixed, and far
#: below the interpreter's limit: what that allows depends on who is calling, and the same
#: body must have the same fingerprint on every try.
MAX_DEPTH = 100

#: Bytes up to which :func:`canonical` takes a body by value: a second of work at worst,
#: whatever somebody puts into it.
MAX_BY_VALUE = 1024 * 1024


def exact(environ: WSGIEnvironment, body: bytes) -> bytes:
    """Two requests are the same if method, full path, query string, media type and body
    are, byte for byte.

    A multipart body is compared by its parts' bytes, since clients make a new boundary
    for each try (RFC 2046 section 5.1.1). The media type's case, the spaces and the order
    of its parameters don't matter (RFC 9110 section 8.3.1). An empty body has no media
    type, and is the same as none.

    :returns: 32 bytes.
    """
    return _byte_for_byte(b"exact", environ, [body])


def canonical(environ: WSGIEnvironment, body: bytes) -> bytes:
    """As :func:`exact`, but JSON and urlencoded forms are the same if their values are.

    In JSON (``application/json`` and ``+json``) the order of members, whitespace and the
    way a character is escaped don't matter. Numbers are compared as they are spelled:
    ``1`` and ``1.0`` are different, and no digit is ever lost. A form is the sequence of
    its decoded pairs.

    What has no one value is compared byte for byte: JSON that is malformed, not in UTF-8,
    has NaN or Infinity or one name twice in an object. So are JSON nested more than
    :data:`MAX_DEPTH` deep and bodies of more than :data:`MAX_BY_VALUE` bytes.

    :returns: 32 bytes.
    """
    media_type = _media_type(environ)
    value = None
    if media_type.kind in _VALUES and 0 < len(body) <= MAX_BY_VALUE:
        value = _VALUES[media_type.kind](body)
    if value is None:
        return _byte_for_byte(b"canonical", environ, [body])
    parts = media_type.kind, media_type.digest, value
    return digest_parts(b"canonical", *_target(environ), *parts)


def version_of(fingerprint: Fingerprint | None) -> int:
    """The number to be recorded with what :func:`compute` makes: :data:`EXACT`,
    :data:`CANONICAL`, or :data:`OWN` for anything else."""
    if fingerprint is exact:
        return EXACT
    return CANONICAL if fingerprint is canonical else OWN


def compute(
    version: int,
    configured: Fingerprint | None,
    environ: WSGIEnvironment,
    body: Body,
    secret: bytes | None = None,
) -> bytes:
    """The fingerprint as it is stored, or one to compare with a stored one.

    It covers method and full path besides what the algorithm returns, so that a user's
    callable can't make one endpoint's response another's, and is keyed with the secret,
    so that who reads the table can't guess a short body. With None it is a constant: the
    key alone identifies the operation.

    :param version: :func:`version_of` the policy's fingerprint, or the number in a record
        made under another policy. A number that is neither built in nor the policy's
        gives a fingerprint that equals no other, so that such a retry is refused.
    :param configured: the policy's fingerprint.
    :param secret: the middleware's, or None.
    :returns: 32 bytes.
    :raises TypeError: a user's callable returned something other than bytes.
    :raises BodyError: the body is needed and can't be taken in full.
    """
    fingerprint = {EXACT: exact, CANONICAL: canonical}.get(version, configured)
    domain = b"wsgi-idempotency fingerprint 1"
    if fingerprint is None:
        return digest_parts(domain, b"none", secret=secret)
    if fingerprint is exact:
        made = _byte_for_byte(b"exact", environ, body.chunks())
    elif fingerprint is canonical and _media_type(environ).kind not in _VALUES:
        made = _byte_for_byte(b"canonical", environ, body.chunks())
    else:
        made = fingerprint(environ, body.bytes())
    if not isinstance(made, bytes):
        raise TypeError(f"the fingerprint is a {type(made).__name__}; return bytes")
    number = str(version).encode()
    return digest_parts(domain, number, *_target(environ)[:2], made, secret=secret)


def key_digest(
    *,
    secret: bytes | None,
    namespace: Literal["endpoint", "scope"],
    scope: str,
    method: str,
    path: str,
    key: str,
) -> bytes:
    """What a key is in the table: one digest for each operation that it can name.

    :param secret: keys the digest, so that who reads the table can't guess keys or scopes.
    :param namespace: ``"endpoint"``: method and path are part of the name; ``"scope"``:
        they are not.
    :param scope: whose key it is, as the scope callable said.
    :param method: in any case.
    :param path: the full path, SCRIPT_NAME and PATH_INFO.
    :param key: the idempotency key, unescaped.
    :returns: 32 bytes.
    """
    parts = [namespace, scope, key]
    if namespace == "endpoint":
        parts += [method.upper(), path]
    return digest_parts(b"wsgi-idempotency key 1", *map(_octets, parts), secret=secret)


def digest_parts(*parts: bytes, secret: bytes | None = None) -> bytes:
    """SHA-256 of the parts, each prefixed with its length in 8 bytes, or, with a secret,
    HMAC-SHA256 (RFC 2104).

    :returns: 32 bytes, different for different sequences of parts.
    """
    joined = b"".join([piece for part in parts for piece in (_length(len(part)), part)])
    if secret is not None:
        return hmac.digest(secret, joined, "sha256")
    return hashlib.sha256(joined).digest()


_length = struct.Struct(">Q").pack


def _prefixed(part: bytes) -> bytes:
    return _length(len(part)) + part


def _octets(text: str) -> bytes:
    """Bytes that only this text has, whatever a server or a test puts into it."""
    return text.encode("utf-8", "surrogatepass")


def _target(environ: WSGIEnvironment) -> tuple[bytes, bytes, bytes]:
    """Method, full path and query string."""
    return (
        _octets(environ["REQUEST_METHOD"].upper()),
        _octets(environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")),
        _octets(environ.get("QUERY_STRING", "")),
    )


def _byte_for_byte(tag: bytes, environ: WSGIEnvironment, chunks: Iterable[bytes]) -> bytes:
    """The digest of a request whose body is taken as it is, and only once."""
    media_type = _media_type(environ)
    chunks = filter(None, chunks)
    first = next(chunks, b"")
    chunks = itertools.chain([first], chunks)
    if not first:
        content = [b"empty"]
    elif media_type.boundary:
        content = _multipart(media_type, chunks)
    else:
        content = [b"bytes", media_type.digest, _digest(chunks)]
    return digest_parts(tag, *_target(environ), *content)


def _digest(chunks: Iterable[bytes]) -> bytes:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.digest()


# ------------------------------------------------------------------ media types

# RFC 9110 sections 8.3.1 and 5.6.6:
#
#     media-type      = type "/" subtype parameters
#     parameters      = *( OWS ";" OWS [ parameter ] )
#     parameter       = parameter-name "=" parameter-value
#     parameter-value = ( token / quoted-string )
_TOKEN = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"
_ESSENCE = re.compile(rf"[ \t]*({_TOKEN}/{_TOKEN})")
_PARAMETER = re.compile(
    rf'[ \t]*;[ \t]*(?:({_TOKEN})=(?:({_TOKEN})|"([^"\\]*(?:\\.[^"\\]*)*)"))?', re.DOTALL
)
_QUOTED_PAIR = re.compile(r"\\(.)", re.DOTALL)


@dataclass(frozen=True)
class _MediaType:
    """A Content-Type.

    :param kind: which of :data:`_VALUES` its bodies have; empty for none.
    :param boundary: the boundary of a multipart type; empty for none.
    :param parts: the rest of it, such that equal media types have equal ones.
    """

    kind: bytes
    boundary: bytes
    parts: tuple[bytes, ...]

    @cached_property  # the few there are stay in _parsed's cache
    def digest(self) -> bytes:
        return digest_parts(*self.parts)


def _media_type(environ: WSGIEnvironment) -> _MediaType:
    return _parsed(environ.get("CONTENT_TYPE", ""))


@lru_cache(maxsize=128)  # nearly all clients of an application send the same few
def _parsed(text: str) -> _MediaType:
    match = _ESSENCE.match(text)
    if match is None:
        return _malformed(text)
    essence = match[1].lower()
    parameters: list[tuple[str, str]] = []
    position = match.end()
    while match := _PARAMETER.match(text, position):
        position = match.end()
        if match[1]:
            value = match[2] or _QUOTED_PAIR.sub(r"\1", match[3])
            parameters.append((match[1].lower(), value))
    if text[position:].strip(" \t"):
        return _malformed(text)
    boundary = ""
    if essence.startswith("multipart/"):
        boundaries = [value for name, value in parameters if name == "boundary"]
        if len(boundaries) != 1:
            return _malformed(text)
        boundary = boundaries[0]
        parameters = [(name, value) for name, value in parameters if name != "boundary"]
    # Stable: of two parameters with one name, which is first may matter.
    parameters.sort(key=lambda parameter: parameter[0])
    kind = b""
    if essence == "application/json" or essence.endswith("+json"):
        kind = b"json"
    elif essence == "application/x-www-form-urlencoded":
        kind = b"form"
    parts = "parsed", essence, *itertools.chain.from_iterable(parameters)
    return _MediaType(kind, _octets(boundary), tuple(map(_octets, parts)))


def _malformed(text: str) -> _MediaType:
    return _MediaType(b"", b"", (b"text", _octets(text)))


# ------------------------------------------------------------------ multipart


def _multipart(media_type: _MediaType, chunks: Iterable[bytes]) -> list[bytes]:
    """A multipart body, whatever its boundary.

    RFC 2046 section 5.1.1: parts are separated by CRLF, two hyphens and the boundary,
    which must not be in a part. So the bytes between the separators are the body less the
    client's choice of a boundary; nothing in them is parsed, and nothing is lost.
    """
    boundary = media_type.boundary
    marker = re.compile(rb"(\r\n)?--" + re.escape(boundary) + rb"(?:(?=(--))|(?=(\r\n))|)")
    # The first separator stands at the beginning of the body, where no CRLF is.
    window = b"\r\n"
    # So many bytes may be the beginning of a separator whose end is in the next chunk.
    held = len(b"\r\n--" + boundary + b"--") - 1
    closed = ambiguous = False
    segments, segment = hashlib.sha256(), hashlib.sha256()
    for chunk in chunks:
        window += chunk
        start = 0
        for match in marker.finditer(window):
            if match.end() + 2 > len(window):
                break
            line_begins, closes, line_ends = match.groups()
            if not line_begins or not (closes or line_ends):
                ambiguous = True
                continue
            closed = closed or closes is not None
            segment.update(window[start : match.start()])
            segments.update(segment.digest())
            segment, start = hashlib.sha256(), match.end()
        end = max(start, len(window) - held)
        segment.update(window[start:end])
        window = window[end:]
    segment.update(window)
    segments.update(segment.digest())
    content = [media_type.digest, segments.digest()]
    if closed and not ambiguous and b"--" + boundary not in window:
        return [b"multipart", *content]
    # Cut off, or with the boundary where one parser would take it for a separator and
    # another for content: then the boundary itself is part of what was sent.
    return [b"ambiguous multipart", *content, boundary]


# ------------------------------------------------------------------ values

# In the decoded value a number is its text behind two surrogates. No string can begin
# like that: the decoder joins such a pair to one character, and UTF-8 has no surrogates.
_NUMBER = "\ud800\udc00"


def _json_value(body: bytes) -> bytes | None:
    """The digest of a JSON text's value; None when it has no one value."""
    try:
        text = body.decode("utf-8")
        if _nested_too_deeply(text):
            return None
        value = json.loads(
            text,
            # Never int() or float(): they would lose digits, or refuse a long number.
            parse_int=_NUMBER.__add__,
            parse_float=_NUMBER.__add__,
            parse_constant=_refuse,
            object_pairs_hook=_object,
        )
    except ValueError:
        return None
    made = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return _digest([_octets(made)])


def _refuse(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name is twice in an object")
    return members


def _nested_too_deeply(text: str) -> bool:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return False
    # In JSON a backslash is in a string only, and so is what it escapes.
    outside = "".join(text.replace("\\\\", "").replace('\\"', "").split('"')[::2])
    depth = 0
    for bracket in re.sub(r"[^][{}]+", "", outside):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            return True
    return False


def _form_value(body: bytes) -> bytes:
    """The digest of a form's pairs, as bytes: whatever a browser sends has a value.

    https://url.spec.whatwg.org/#application/x-www-form-urlencoded
    """
    pairs = (match[0].replace(b"+", b" ").partition(b"=") for match in _PAIR.finditer(body))
    parts = (unquote_to_bytes(part) for name, _, value in pairs for part in (name, value))
    return _digest(map(_prefixed, parts))


_PAIR = re.compile(rb"[^&]+")

#: How :func:`canonical` makes a value of a body, by the kind of its media type.
_VALUES: dict[bytes, Callable[[bytes], bytes | None]] = {
    b"json": _json_value,
    b"form": _form_value,
}
