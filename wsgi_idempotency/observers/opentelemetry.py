"""Events on the current span of OpenTelemetry, and as its metrics."""

from __future__ import annotations

from typing import Any

from wsgi_idempotency.events import Event

try:
    from opentelemetry import metrics, trace
except ImportError as exc:
    raise ImportError(
        "OpenTelemetry's spans and metrics need: pip install 'wsgi-idempotency[opentelemetry]'"
    ) from exc

_PREFIX = "wsgi_idempotency"

#: Of these a span may have as many as there are; a metric may not.
_OF_SPANS = ("key_digest", "attempt", "code", "action", "seconds", "store_seconds",
             "waited_seconds", "count")  # fmt: skip


class OpenTelemetryObserver:
    """Puts each event on the current span, and counts it.

    A span gets one span event for each of ours, and the decision as attributes:
    ``wsgi_idempotency.event`` is the name of the last one that was final. The span is the one
    of whatever instrumentation wraps the middleware; without one, nothing is recorded. There
    is no key but its digest, and of an exception only its type.

    :param meter_provider: where metrics go; None for the global one.
    """

    def __init__(self, meter_provider: metrics.MeterProvider | None = None) -> None:
        meter = metrics.get_meter(_PREFIX, meter_provider=meter_provider)
        self._events = meter.create_counter(
            f"{_PREFIX}.events", unit="{event}", description="Decisions, by the event's name."
        )
        self._prevented = meter.create_counter(
            f"{_PREFIX}.duplicates_prevented",
            unit="{request}",
            description="Requests kept from running their handler again.",
        )
        self._purged = meter.create_counter(
            f"{_PREFIX}.purged_rows", unit="{row}", description="Expired rows that were deleted."
        )
        self._handler = meter.create_histogram(
            f"{_PREFIX}.handler.duration", unit="s", description="How long handlers took."
        )
        self._store = meter.create_histogram(
            f"{_PREFIX}.store.duration",
            unit="s",
            description="How long the store took for a request, over all calls.",
        )
        self._wait = meter.create_histogram(
            f"{_PREFIX}.wait.duration",
            unit="s",
            description="How long duplicates waited for the one in flight.",
        )

    def __call__(self, event: Event) -> None:
        self._trace(event)
        self._measure(event)

    def _trace(self, event: Event) -> None:
        span = trace.get_current_span()
        if not span.is_recording():
            return
        found: dict[str, Any] = {name: getattr(event, name) for name in _OF_SPANS}
        found["route"] = event.route
        if event.exception is not None:
            found["exception"] = type(event.exception).__name__
        attributes = {
            f"{_PREFIX}.{name}": value for name, value in found.items() if value not in (None, "")
        }
        span.add_event(f"{_PREFIX}.{event.name}", attributes)
        if event.final:
            span.set_attributes({f"{_PREFIX}.event": event.name, **attributes})

    def _measure(self, event: Event) -> None:
        if event.name == "purged":
            self._purged.add(event.count or 0)
            return
        route = {f"{_PREFIX}.route": "default" if event.route is None else event.route}
        decision: dict[str, Any] = {**route, f"{_PREFIX}.event": event.name}
        for name in ("code", "action"):
            if getattr(event, name) is not None:
                decision[f"{_PREFIX}.{name}"] = getattr(event, name)
        self._events.add(1, decision)
        if event.prevented:
            self._prevented.add(1, route)
        if event.name == "executed":
            self._handler.record(event.seconds or 0.0, route)
        if event.name == "waited":
            self._wait.record(event.seconds or 0.0, route)
        if event.final and event.store_seconds is not None:
            self._store.record(event.store_seconds, route)


#: An :class:`OpenTelemetryObserver` on the global providers.
observe = OpenTelemetryObserver()
