"""The ledger's handler, which also answers in every way that WSGI allows.

More header fields of a request say what it does, besides those of :mod:`apps.handler`:

``X-Shape``
    how the answer is given: a name in :data:`SHAPES`.
``X-Read``
    how the body is read: a name in :data:`apps.frameworks.WAYS`; the answer is its SHA-256.
``X-Scope``
    ``raises`` makes the scope raise.

A path of ``/twice`` leads through a second middleware. ``X-Seen-Outside`` of an answer is what
the application left in the environ, seen by what is around the middleware; ``X-Path`` is the
path that the application would be asked for.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile

from apps.frameworks import WAYS, digest
from apps.gate import wait_at
from apps.handler import handler, write
from wsgi_idempotency import IdempotencyMiddleware, SQLStore, everyone

#: Of an answer that must arrive whole: every byte there is, and more than a socket's buffer.
ARTIFACT = bytes(range(256)) * 12_000

#: The pieces of the other answers.
PIECES = [b"first,", b"\0second\xff,", b"third"]

#: Header fields that must come back on a replay, in this order.
KEPT = [
    ("Content-Type", "application/octet-stream"),
    ("Location", "/orders/1"),
    ("ETag", '"v1"'),
    ("Link", "</a>; rel=next"),
    ("link", "</b>; rel=prev"),
]

#: Header fields that are of one request.
OF_THE_REQUEST = [
    ("Set-Cookie", "session=secret"),
    ("Server-Timing", "db;dur=5"),
    ("Retry-After", "1"),
    ("Access-Control-Allow-Origin", "https://a.example"),
]

LARGE = 5_000_000  # bytes; over the 4 MiB that can be replayed


class Closing:
    """An iterator that notes in the ledger that it was closed."""

    def __init__(self, key, pieces):
        self._key = key
        self._pieces = iter(pieces)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._pieces)

    def close(self):
        write(what="closed", execution=None, key=self._key)


def an_artifact(environ, start_response):
    start_response("201 Made It", [*KEPT, ("Content-Length", str(len(ARTIFACT)))])
    return [ARTIFACT]


def of_one_request(environ, start_response):
    start_response("201 Created", [*KEPT, *OF_THE_REQUEST])
    return PIECES


def a_list(environ, start_response):
    start_response("201 Created", KEPT)
    return PIECES


def a_tuple(environ, start_response):
    start_response("201 Created", KEPT)
    return tuple(PIECES)


def a_generator(environ, start_response):
    start_response("201 Created", KEPT)
    yield from PIECES


def an_iterator_to_close(environ, start_response):
    start_response("201 Created", KEPT)
    return Closing(environ["HTTP_IDEMPOTENCY_KEY"], PIECES)


def a_file(environ, start_response):
    start_response("201 Created", KEPT)
    return environ["wsgi.file_wrapper"](io.BytesIO(b"".join(PIECES)), 4)


def write_alone(environ, start_response):
    write = start_response("201 Created", KEPT)
    for piece in PIECES:
        write(piece)
    return []


def write_and_a_list(environ, start_response):
    start_response("201 Created", KEPT)(PIECES[0])
    return PIECES[1:]


def a_late_start(environ, start_response):
    class Late:
        pieces = iter(PIECES)

        def __iter__(self):
            return self

        def __next__(self):
            if self.pieces is not None and not hasattr(self, "started"):
                self.started = True
                start_response("201 Created", KEPT)
            return next(self.pieces)

    return Late()


def a_restart(environ, start_response):
    start_response("200 OK", [("X-Not", "this")])
    try:
        raise ValueError("after the start")
    except ValueError:
        start_response("201 Created", KEPT, sys.exc_info())
    return PIECES


def no_start(environ, start_response):
    return Closing(environ["HTTP_IDEMPOTENCY_KEY"], PIECES)


def a_failure_after_three_pieces(environ, start_response):
    start_response("201 Created", KEPT)

    def pieces():
        yield from PIECES
        raise RuntimeError("as asked for")

    return Closing(environ["HTTP_IDEMPOTENCY_KEY"], pieces())


def a_newline_in_a_header(environ, start_response):
    start_response("201 Created", [("X-Split", "a\r\nSet-Cookie: b=c")])
    return PIECES


def a_large_generator(environ, start_response):
    start_response("201 Created", KEPT)

    def pieces():
        for start in range(0, LARGE, 50_000):
            yield bytes([start // 50_000 % 256]) * 50_000

    return Closing(environ["HTTP_IDEMPOTENCY_KEY"], pieces())


def a_large_file(environ, start_response):
    file = tempfile.TemporaryFile()  # noqa: SIM115  closed by the file_wrapper
    for start in range(0, LARGE, 50_000):
        file.write(bytes([start // 50_000 % 256]) * 50_000)
    file.seek(0)
    start_response("201 Created", [*KEPT, ("Content-Length", str(LARGE))])
    return environ["wsgi.file_wrapper"](file)


def events(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/event-stream")])
    yield b"data: first\n\n"
    wait_at(environ["HTTP_X_SECOND_EVENT"], {"pid": os.getpid(), "attempt": None})
    yield b"data: last\n\n"


SHAPES = {
    made.__name__.replace("_", " "): made
    for made in (
        an_artifact, of_one_request, a_list, a_tuple, a_generator, an_iterator_to_close, a_file,
        write_alone, write_and_a_list, a_late_start, a_restart, no_start,
        a_failure_after_three_pieces, a_newline_in_a_header, a_large_generator, a_large_file,
        events,
    )
}  # fmt: skip


def answers(environ, start_response):
    environ["answers.said"] = "what the application left"
    key = environ.get("HTTP_IDEMPOTENCY_KEY")
    attempt = getattr(environ.get("wsgi_idempotency.operation"), "attempt", None)
    if "HTTP_X_SHAPE" in environ:
        write(what="begun", key=key, execution=None, attempt=attempt, pid=os.getpid())
        return SHAPES[environ["HTTP_X_SHAPE"]](environ, start_response)
    if "HTTP_X_READ" in environ:
        write(what="begun", key=key, execution=None, attempt=attempt, pid=os.getpid())
        way = WAYS[environ["HTTP_X_READ"]]
        said = digest(way(environ["wsgi.input"])).encode()
        start_response("201 Created", [("Content-Length", str(len(said)))])
        return [said]
    return handler(environ, start_response)


def scope(environ):
    if environ.get("HTTP_X_SCOPE") == "raises":
        raise RuntimeError("as asked for")
    return everyone(environ)


def protected(store):
    """The application, protected, with something around it that looks into the environ."""
    again = IdempotencyMiddleware(answers, store, scope=scope)

    def inside(environ, start_response):
        app = again if environ["PATH_INFO"] == "/twice" else answers
        return app(environ, start_response)

    middleware = IdempotencyMiddleware(inside, store, scope=scope)

    def outside(environ, start_response):
        path = environ["PATH_INFO"].encode("latin-1").hex()

        def told(status, headers, *exc_info):
            seen = environ.get("answers.said", "nothing")
            headers = [*headers, ("X-Seen-Outside", seen), ("X-Path", path)]
            return start_response(status, headers, *exc_info)

        return middleware(environ, told)

    return outside


def served():
    """The application as a server of its own process loads it."""
    return protected(SQLStore(os.environ["STORE"]))
