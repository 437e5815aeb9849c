"""(b) What a request costs its own process, with PostgreSQL beside it and no server of HTTP."""

from __future__ import annotations

import secrets
import time
from functools import partial
from typing import TYPE_CHECKING

from null_requests import paying, request, serve
from servers.postgres import PostgresServer

from bench.measure import Figure, interleaved
from bench.references import ExecPreparedInsertFirst, ExecuteBinaryOne
from bench.rows import database_with
from wsgi_idempotency import IdempotencyMiddleware, SQLStore, by_authorization

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

_REQUESTS = 300  # of one value
_REPLAYED = 16  # keys


def measure(server: PostgresServer, *, rounds: int) -> list[Figure]:
    # Each has a table of its own: the references keep what the product would not find its own.
    urls = [database_with(server, 10_000) for _ in range(3)]
    store = SQLStore(urls[0])
    apps: dict[str, WSGIApplication] = {
        "reference: exec_prepared, INSERT-first": ExecPreparedInsertFirst(
            paying, urls[1], workers_threads=1
        ),
        "reference: execute, look first": ExecuteBinaryOne(paying, urls[2], workers_threads=1),
        "wrapped": IdempotencyMiddleware(paying, store, scope=by_authorization),
    }
    figures: list[Figure] = []
    for kind in ("fresh", "replay"):
        variants = {name: partial(_microseconds, app, kind) for name, app in apps.items()}
        for run in variants.values():
            run()  # connects, prepares, and leaves what is replayed
        figures += interleaved(
            "b", f"{kind}, in process", variants, rounds=rounds * 3, unit="us CPU"
        )
    store.close()
    return figures


def _microseconds(app: WSGIApplication, kind: str) -> float:
    keys = [
        secrets.token_hex(8) if kind == "fresh" else f"replayed-{number % _REPLAYED}"
        for number in range(_REQUESTS)
    ]
    environs = [request("POST", key) for key in keys]
    started = time.thread_time()
    for environ in environs:
        serve(app, environ)
    return (time.thread_time() - started) / _REQUESTS * 1e6
