"""Whose key it is: two clients may use the same key and never meet.

A scope is a callable ``(environ) -> str``. None, a blank text or an exception refuses the
request; nothing ever falls into a space that others share.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from werkzeug.sansio.http import parse_cookie

from wsgi_idempotency.errors import ConfigurationError
from wsgi_idempotency.key import environ_name, is_token

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

Scope = Callable[["WSGIEnvironment"], "str | None"]

_DIGEST = re.compile(":sha256:[0-9a-f]{64}")

# Control characters (PostgreSQL's text refuses NUL, terminals obey the rest), line and
# paragraph separators, what turns the direction of writing, and surrogates, which no
# database can encode.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)

#: Schemes whose credentials are made anew for each request.
_PER_REQUEST = frozenset(
    {"aws4-hmac-sha256", "digest", "hawk", "hoba", "negotiate", "ntlm", "signature"}
)


def by_authorization(environ: WSGIEnvironment) -> str | None:
    """Each credential in an Authorization field (RFC 9110 section 11.6.2) has its own keys.

    Only a digest of it is kept. It must be the same on a retry. **A client whose token is
    renewed between a try and its retry is somebody else to this function, and the
    operation runs again.** If tokens are short-lived, use the account they stand for
    instead: :func:`by_remote_user`, or a function that returns what your authentication
    has put into the environ.

    Refused are ``Basic`` and ``Bearer`` with nothing behind them, and schemes whose
    credentials are made anew for each request, such as Digest and AWS4-HMAC-SHA256: no
    retry would ever be recognised.

    :returns: ``"authorization:sha256:<hex>"``, or None without a credential.
    """
    value = environ.get("HTTP_AUTHORIZATION", "").strip(" \t")
    scheme, _, credentials = value.partition(" ")
    scheme = scheme.lower()
    if scheme in _PER_REQUEST or (scheme in ("basic", "bearer") and not credentials.strip()):
        return None
    return _digested("authorization", value) if value else None


def by_remote_user(environ: WSGIEnvironment) -> str | None:
    """Each user that the server or an outer middleware has authenticated has their own keys.

    :returns: ``"user:<REMOTE_USER>"`` (RFC 3875 section 4.1.11), or None without a user.
    """
    user = environ.get("REMOTE_USER")
    return f"user:{user}" if user and user.strip() else None


def by_cookie(name: str) -> Scope:
    """Each value of a cookie, such as a session's id, has its own keys.

    Only a digest of it is kept. The cookie must be the same on a retry: the id of a
    session that is kept on the server is; a session that is itself in the cookie changes
    whenever something is put into it. A request that has the cookie twice with different
    values is refused: the second may have been set for a parent domain by somebody else
    (RFC 6265 section 8.6), who must not choose the space.

    :param name: the cookie's name.
    :returns: a scope, whose texts are ``"cookie:sha256:<hex>"``.
    :raises ConfigurationError: it can't be the name of a cookie.
    """
    if not is_token(name):
        raise ConfigurationError(f'{name!r} can\'t be the name of a cookie; use one like "session"')

    def scope(environ: WSGIEnvironment) -> str | None:
        # The sans-io parser works on the text as it is, where the other raises on bytes
        # that are not UTF-8.
        values = set(parse_cookie(environ.get("HTTP_COOKIE")).getlist(name))
        if len(values) != 1:
            return None
        value = values.pop()
        # The name is a token (RFC 6265 section 4.1.1), which has no "=".
        return _digested("cookie", f"{name}={value}") if value.strip() else None

    scope.__doc__ = f"Each value of the cookie {name!r} has its own keys."
    return scope


def by_header(name: str, *, digest: bool = True) -> Scope:
    """Each value of a header field, such as an API key or a tenant, has its own keys.

    A field that a proxy sets must be one that it removes from what clients send, also when
    it is spelled with underscores: some servers take ``X_Tenant`` for ``X-Tenant``. Several
    fields of the name reach the application joined by commas, and are one value; under
    cheroot it is the last of them.

    :param name: the field's name.
    :param digest: keep only a digest of the value; False for values that are no secret
        and good to read in the table.
    :returns: a scope, whose texts are ``"header:sha256:<hex>"`` or ``"header:<name>=<value>"``.
    :raises ConfigurationError: it can't be the name of a field.
    """
    field_name, key, name = name, environ_name(name), name.lower()

    def scope(environ: WSGIEnvironment) -> str | None:
        value = environ.get(key, "").strip(" \t")
        if not value.strip():
            return None
        # The name is a token (RFC 9110 section 5.1), which has neither "=" nor ":".
        text = f"{name}={value}"
        return _digested("header", text) if digest else f"header:{text}"

    scope.__doc__ = f"Each value of the header field {field_name!r} has its own keys."
    return scope


def everyone(environ: WSGIEnvironment) -> str:
    """All clients share one key space: right where they are one party, and nowhere else."""
    return "everyone"


def find(scope: Scope, environ: WSGIEnvironment) -> str | None:
    """What the scope says of the request; None when it has none.

    :raises TypeError: the scope returned something that is neither a str nor None.
    """
    found = scope(environ)
    if found is None:
        return None
    if not isinstance(found, str):
        raise TypeError(f"the scope is a {type(found).__name__}; return a str, or None to refuse")
    return found if found.strip() else None


def for_people(scope: str, secret: bytes | None) -> str:
    """A scope as it may stand in the table. What decides is the digest, never this text.

    :param secret: turns ``<kind>:sha256:<hex>``, also where it is a part of a scope, into
        ``<kind>:hmac-sha256:<hex>``, so that who reads the table can't find a password by
        trying them all.
    """
    if secret is not None and _DIGEST.search(scope):
        made = hmac.digest(secret, b"wsgi-idempotency scope 1\0" + _octets(scope), "sha256")
        scope = _DIGEST.sub(f":hmac-sha256:{made.hex()}", scope)
    return printable(scope)


def printable(text: str, limit: int = 1024) -> str:
    """A text as it may stand in a PostgreSQL text column, a log and a terminal.

    Control characters, surrogates and what disturbs the direction of writing become
    escapes such as ``\\x00``. Two texts may become one: this is for people.

    :param limit: characters; a longer text is cut, and ends in an ellipsis.
    """
    if len(text) <= limit and text.isascii() and text.isprintable():
        return text
    made = _UNPRINTABLE.sub(_escape, text[: limit + 1])
    return made if len(made) <= limit else made[: limit - 1] + "…"


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _digested(kind: str, text: str) -> str:
    return f"{kind}:sha256:{hashlib.sha256(_octets(text)).hexdigest()}"


def _octets(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
