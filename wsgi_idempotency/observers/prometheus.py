"""Events as metrics of Prometheus, in one process or in the many of gunicorn."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from wsgi_idempotency.events import NAMES, Event
from wsgi_idempotency.protocol import Action

try:
    from prometheus_client import (
        REGISTRY,
        CollectorRegistry,
        Counter,
        Histogram,
        make_wsgi_app,
        multiprocess,
    )
except ImportError as exc:
    raise ImportError(
        "metrics of Prometheus need: pip install 'wsgi-idempotency[prometheus]'"
    ) from exc

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

#: The label of requests that the default policy covers; a rule begins with a slash.
DEFAULT_ROUTE = "default"

#: Upper bounds in seconds. A store answers in milliseconds, unless something is wrong.
STORE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

#: Upper bounds in seconds, up to the default lease, and for waits.
HANDLER_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

_PREFIX = "wsgi_idempotency"


class PrometheusObserver:
    """Counts events, and how long they took.

    Labels are the rule of the route (``default`` for the default policy), the event, what
    became of a claim, and the problem code: as many as are configured, however many paths,
    keys and clients there are. All series of a route begin with its first event, so that the
    first time something rare happens is seen as an increase from 0.

    :param registry: where the metrics are registered; each registry takes one observer.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, says: str, *labels: str) -> Counter:
            return Counter(f"{_PREFIX}_{name}", says, labels, registry=registry)

        def histogram(name: str, says: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(
                f"{_PREFIX}_{name}", says, ("route",), registry=registry, buckets=buckets
            )

        self._prevented = counter(
            "duplicates_prevented",
            "Requests kept from running their handler again: replayed, in conflict with the one"
            " in flight, held, or not replayable.",
            "route",
        )
        self._events = counter("events", "Decisions, by the event's name.", "event", "route")
        self._executions = counter(
            "executions", "Runs of a handler, by what became of the claim.", "action", "route"
        )
        self._refusals = counter(
            "refusals", "Requests answered with a problem, by its code.", "code", "route"
        )
        self._purged = counter("purged_rows", "Expired rows that this process has deleted.")
        self._handler = histogram("handler_seconds", "How long handlers took.", HANDLER_BUCKETS)
        self._store = histogram(
            "store_seconds",
            "How long the store took for a request, over all calls.",
            STORE_BUCKETS,
        )
        self._wait = histogram(
            "wait_seconds", "How long duplicates waited for the one in flight.", HANDLER_BUCKETS
        )
        self._routes: set[str] = set()

    def __call__(self, event: Event) -> None:
        if event.name == "purged":
            self._purged.inc(event.count or 0)
            return
        route = DEFAULT_ROUTE if event.route is None else event.route
        if route not in self._routes:
            self._begin(route)
        self._events.labels(event.name, route).inc()
        if event.prevented:
            self._prevented.labels(route).inc()
        if event.code is not None:
            self._refusals.labels(event.code, route).inc()
        if event.name == "executed":
            self._executions.labels(event.action or "unknown", route).inc()
            self._handler.labels(route).observe(event.seconds or 0.0)
        if event.name == "waited":
            self._wait.labels(route).observe(event.seconds or 0.0)
        if event.final and event.store_seconds is not None:
            self._store.labels(route).observe(event.store_seconds)

    def _begin(self, route: str) -> None:
        for name in NAMES:
            self._events.labels(name, route)
        for action in Action:
            self._executions.labels(action.value, route)
        for metric in (self._prevented, self._handler, self._store, self._wait):
            metric.labels(route)
        self._routes.add(route)


#: A :class:`PrometheusObserver` on prometheus_client's own registry.
observe = PrometheusObserver(REGISTRY)


def metrics_app() -> WSGIApplication:
    """A WSGI application for Prometheus to scrape.

    It answers for all processes that share the folder ``PROMETHEUS_MULTIPROC_DIR`` if that is
    set (prometheus_client, "Multiprocess Mode"), else for this one.

    :raises ValueError: the folder is not there.
    """
    registry = REGISTRY
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    app: WSGIApplication = make_wsgi_app(registry)
    return app
