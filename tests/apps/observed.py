"""A shop under gunicorn whose metrics are scraped; ``DATABASE`` is where its keys are.

``X-Worker`` is the process that answered, also for a replay.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from werkzeug.middleware.dispatcher import DispatcherMiddleware

from wsgi_idempotency import IdempotencyMiddleware, Policy, Route, everyone
from wsgi_idempotency.observers import prometheus

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment


def shop(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    status = environ["PATH_INFO"].rpartition("/")[2]
    start_response(f"{status} As Asked", [("Content-Type", "text/plain")])
    return [b"done"]


protected = IdempotencyMiddleware(
    shop,
    os.environ["DATABASE"],
    scope=everyone,
    routes=[Route("/sales/<int:number>/<int:status>", Policy())],
    on_event=prometheus.observe,
)


def signed(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    worker = ("X-Worker", str(os.getpid()))
    return protected(environ, lambda status, headers: start_response(status, [*headers, worker]))


application = DispatcherMiddleware(signed, {"/metrics": prometheus.metrics_app()})
