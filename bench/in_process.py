"""(a) The middleware alone: no server, and a store that answers at once."""

from __future__ import annotations

import statistics
import sys
import time
from typing import TYPE_CHECKING

from null_requests import BODY, HEADERS, paying, request, serve
from null_store import NullStore

from bench.measure import Figure
from wsgi_idempotency import IdempotencyMiddleware, by_authorization
from wsgi_idempotency.records import Completion

if TYPE_CHECKING:
    from types import FrameType

    from _typeshed.wsgi import WSGIApplication

_REQUESTS = 1000  # a round; below a tenth of a second


def measure(*, rounds: int) -> list[Figure]:
    done = Completion("201 Created", tuple(HEADERS), BODY)
    fresh, replaying = (
        IdempotencyMiddleware(paying, store, scope=by_authorization)
        for store in (NullStore(), NullStore(done))
    )
    figures: list[Figure] = []
    for case, app, method, key in (
        ("GET passing through", fresh, "GET", "k"),
        ("POST without a key", fresh, "POST", None),
        ("replay", replaying, "POST", "k"),
        ("fresh", fresh, "POST", "k"),
    ):
        _microseconds(app, method, key)  # fills caches
        bare = [_microseconds(paying, method, key) for _ in range(rounds * 3)]
        added = [_microseconds(app, method, key) - statistics.median(bare) for _ in bare]
        calls = _calls(app, method, key) - _calls(paying, method, key)
        figures += [
            Figure(section="a", case=case, variant="added", unit="calls", values=[float(calls)]),
            Figure(section="a", case=case, variant="added", unit="us CPU", values=added),
        ]
        for figure in figures[-2:]:
            print(figure, file=sys.stderr)
    return figures


def _microseconds(app: WSGIApplication, method: str, key: str | None) -> float:
    environs = [request(method, key) for _ in range(_REQUESTS)]
    started = time.thread_time()
    for environ in environs:
        serve(app, environ)
    return (time.thread_time() - started) / _REQUESTS * 1e6


def _calls(app: WSGIApplication, method: str, key: str | None) -> int:
    called = 0

    def note(frame: FrameType, what: str, arg: object) -> None:
        nonlocal called
        called += what == "call"

    environ = request(method, key)
    sys.setprofile(note)
    try:
        serve(app, environ)
    finally:
        sys.setprofile(None)
    return called
