"""Which header fields of a response may be stored and replayed, and which can be at all."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

Pairs = tuple[tuple[str, str], ...]

# RFC 9110 section 7.6.1: "Intermediaries MUST [...] remove or replace" the fields that a
# Connection field names, Connection itself, and those that were sent hop by hop before
# fields had to be named. A replay is sent over another connection.
HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
)  # and proxy-*

# Set by the server for each message, or true of the moment it was sent (RFC 9110 sections
# 6.6.1, 10.2.4 and 7.6.3, RFC 9111 section 5.1, RFC 7838); Content-Length is recomputed.
OF_THE_MESSAGE = frozenset({"date", "server", "via", "age", "alt-svc", "content-length"})

# For the one request that was answered: its session (RFC 6265 section 4.1), its
# credentials, its trace, its limits, its origin (Fetch, "CORS protocol"), its signature
# (RFC 9421).
OF_THE_REQUEST = frozenset(
    {
        "set-cookie",
        "clear-site-data",
        "www-authenticate",
        "authentication-info",
        "server-timing",
        "traceparent",
        "tracestate",
        "x-request-id",
        "x-correlation-id",
        "retry-after",
        "signature",
        "signature-input",
    }
)
OF_THE_REQUEST_BY_PREFIX = ("ratelimit", "x-ratelimit-", "access-control-")


def never_replayable(name: str) -> bool:
    """Whether no setting can make a field replayable: it belongs to a connection or message."""
    name = name.lower()
    return name in HOP_BY_HOP or name in OF_THE_MESSAGE or name.startswith("proxy-")


def replayable(headers: Iterable[tuple[str, str]], allowed: Collection[str] = ()) -> Pairs:
    """The fields that are safe to store and replay: in order, with duplicates and case.

    :param headers: name and value pairs as the application gave them.
    :param allowed: lower-case names to keep although they are of the one request.
    """
    headers = tuple(headers)
    named_by_connection = {
        option.strip().lower()
        for name, value in headers
        if name.lower() == "connection"
        for option in value.split(",")
    }
    kept = []
    for name, value in headers:
        lower = name.lower()
        if never_replayable(lower) or lower in named_by_connection:
            continue
        of_the_request = lower in OF_THE_REQUEST or lower.startswith(OF_THE_REQUEST_BY_PREFIX)
        if not of_the_request or lower in allowed:
            kept.append((name, value))
    return tuple(kept)


# RFC 9112 section 4: status-line = HTTP-version SP status-code SP [ reason-phrase ], with
# reason-phrase = 1*( HTAB / SP / VCHAR / obs-text ). PEP 3333 has the last two as one text.
_STATUS = re.compile(r"[1-5][0-9]{2}(?: [\t\x20-\x7e\x80-\xff]*)?")

# RFC 9110 section 5.1: field-name = token. Section 5.5: field-value of VCHAR, obs-text,
# SP and HTAB; PEP 3333 has them as text of code points up to U+00FF.
_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")


def sendable(pair: object) -> bool:
    """Whether a server can send this as a header field."""
    if not isinstance(pair, tuple):
        return False
    try:
        name, value = pair
        return _NAME.fullmatch(name) is not None and _VALUE.fullmatch(value) is not None
    except (TypeError, ValueError):  # not two, or not texts
        return False


def unsendable(status: str, headers: Iterable[tuple[str, str]]) -> str | None:
    """Why a response head can't be sent as it is, or None. A server would refuse it, too."""
    if not _STATUS.fullmatch(status):
        return "the status line was not valid HTTP"
    for pair in headers:
        if not sendable(pair):
            return "a header field was not valid HTTP"
    return None
