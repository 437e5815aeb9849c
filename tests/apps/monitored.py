"""A shop to which everything happens that a request can come to; its metrics are scraped.

``DATABASE`` is where its keys are, ``GATE`` where the handlers of ``/gate`` paths wait.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from werkzeug.middleware.dispatcher import DispatcherMiddleware

from apps.gate import wait_at
from wsgi_idempotency import IdempotencyMiddleware, Policy, Route, everyone, hold_unknown
from wsgi_idempotency.observers import prometheus

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment


def shop(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    path = environ["PATH_INFO"]
    status = "201"
    if path.startswith("/gate"):
        attempt = environ["wsgi_idempotency.operation"].attempt
        status = wait_at(os.environ["GATE"], {"pid": os.getpid(), "attempt": attempt}) or status
    elif path.startswith("/sales"):
        status = path.rpartition("/")[2]
    start_response(f"{status} As Asked", [("Content-Type", "text/plain")])
    return [b"done"]


protected = IdempotencyMiddleware(
    shop,
    os.environ["DATABASE"],
    scope=everyone,
    routes=[
        Route("/sales/<int:number>/<int:status>", Policy(outcomes=hold_unknown)),
        Route("/large", Policy(max_response_bytes=1)),
        Route("/gate/wait", Policy(wait=30)),
        Route("/gate/die", Policy(lease=1)),
    ],
    on_event=prometheus.observe,
)
unreachable = IdempotencyMiddleware(
    shop,
    "sqlite:////nowhere/keys.db",
    scope=everyone,
    routes=[Route("/bypassed", Policy(on_store_failure="bypass")), Route("/refused", Policy())],
    on_event=prometheus.observe,
)

#: As labels have them.
ROUTES = {route.rule for app in (protected, unreachable) for route in app.routes} | {"default"}

application = DispatcherMiddleware(
    protected, {"/metrics": prometheus.metrics_app(), "/away": unreachable}
)
