"""How the public names are used, for the type checker: checked, never run."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from werkzeug.wrappers import Response

from wsgi_idempotency import (
    FORGET,
    HOLD,
    RELEASE,
    STORE,
    Action,
    Completed,
    Event,
    IdempotencyError,
    IdempotencyMiddleware,
    MemoryStore,
    NotExecuted,
    Operation,
    Outcome,
    Policy,
    Problem,
    Reconciler,
    Route,
    SQLStore,
    StillUnknown,
    by_authorization,
    by_cookie,
    by_header,
    by_remote_user,
    canonical,
    current_operation,
    everyone,
    exact,
    first_of,
    form_field,
    header,
    hold_unknown,
    json_field,
    new_key,
    problems,
    store_everything,
    store_success,
)
from wsgi_idempotency.observers import opentelemetry, prometheus
from wsgi_idempotency.observers.logging import LogObserver
from wsgi_idempotency.purging import purge
from wsgi_idempotency.records import StoredResponse
from wsgi_idempotency.stores.base import Store
from wsgi_idempotency.stores.resolving import Details

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    operation: Operation = environ["wsgi_idempotency.operation"]
    if current_operation and operation.attempt > 1:
        current_operation.hold()
    downstream: str = operation.derive_key("charge")
    charged: int = operation.step("charge", lambda: 900)
    operation.guard(Session(create_engine("sqlite:///keys.db")))
    operation.store()
    operation.forget()
    operation.release()
    start_response("201 Created", [("X-Key", operation.key), ("X-Scope", operation.scope)])
    return [downstream.encode(), str(operation.lost).encode(), b"%d" % charged]


def by_tenant(environ: WSGIEnvironment) -> str | None:
    tenant = environ.get("shop.tenant")
    return tenant if isinstance(tenant, str) else None


def delivery(environ: WSGIEnvironment, body: bytes) -> str | None:
    return body[:36].decode() or None


def first_kilobyte(environ: WSGIEnvironment, body: bytes) -> bytes:
    return body[:1024]


def careful(outcome: Outcome) -> Action:
    if outcome.lapsed or outcome.exception is not None:
        return RELEASE
    if outcome.status == 502:
        return HOLD
    return STORE if outcome.status is not None and outcome.status < 400 else FORGET


def count(event: Event) -> None:
    name: str = event.name
    attempt: int | None = event.attempt
    print(name, attempt, event.seconds)


def plain(problem: Problem, environ: WSGIEnvironment) -> WSGIApplication:
    return problems.rfc9457(problem, environ)


policies = [
    Policy(),
    Policy(methods=["post"], retention=3600, lease=1.5, wait=timedelta(seconds=2)),
    Policy(key=header("Idempotency-Key"), required=True, fingerprint=exact),
    Policy(key=first_of(form_field("key"), json_field("data.id"), delivery)),
    Policy(fingerprint=canonical, namespace="scope", outcomes=store_everything),
    Policy(rebuild=lambda operation: Response(operation.key, 201), max_step_bytes=1024),
    Policy(fingerprint=None, outcomes=hold_unknown, on_store_failure="bypass"),
    Policy(fingerprint=first_kilobyte, outcomes=careful, replay_headers=["Set-Cookie"]),
]

wrapped: WSGIApplication = IdempotencyMiddleware(
    app,
    "postgresql+psycopg://localhost/shop",
    scope=by_authorization,
    policy=None,
    routes=[Route("/payments/<int:id>", policies[1], methods={"POST"}), Route("/health", None)],
    on_event=[count],
    render_problem=problems.stripe,
    max_waiting=4,
    secret=b"sixteen bytes or more",
)
IdempotencyMiddleware(app, create_engine("sqlite://"), scope=by_remote_user, on_event=count)
IdempotencyMiddleware(
    app,
    "memory:",
    scope=everyone,
    on_event=[LogObserver(levels={"waited": 20}), prometheus.observe, opentelemetry.observe],
)
metrics: WSGIApplication = prometheus.metrics_app()
deleted: int = sum(purge(SQLStore("sqlite:///keys.db"), older_than=3600, on_event=count))
IdempotencyMiddleware(app, MemoryStore(), scope=by_cookie("session"), render_problem=plain)
IdempotencyMiddleware(app, SQLStore("sqlite:///keys.db"), scope=by_header("X-Api-Key"))
IdempotencyMiddleware(app, "memory:", scope=everyone, policy=Policy(outcomes=store_success))
IdempotencyMiddleware(app, "memory:", scope=by_tenant)


def verdict(record: Details) -> Completed | type[NotExecuted] | StillUnknown:
    if record.attempt > 1 and record.age < 60:
        return StillUnknown("too early")
    if record.key.startswith("done"):
        return Completed(StoredResponse("201 Created", (), b""), reason="receipt 7")
    return NotExecuted


reconciler = Reconciler("sqlite:///keys.db", verdict, patience=timedelta(minutes=1))
counts: int = reconciler.walk()["completed"] + reconciler.counts.total()
Reconciler(SQLStore("sqlite:///keys.db", timeout=60), lambda record: StillUnknown).run(interval=5)

key: str = new_key()
stores: list[Store] = [MemoryStore(), SQLStore("sqlite:///keys.db", create=True, timeout=2.5)]
errors: type[Exception] = IdempotencyError

# What a checker must refuse; warn_unused_ignores makes each line an assertion.
IdempotencyMiddleware(app, "memory:")  # type: ignore[call-arg]
IdempotencyMiddleware(app, "memory:", scope="alice")  # type: ignore[arg-type]
Policy("POST")  # type: ignore[call-arg]
Policy(lease="a minute")  # type: ignore[arg-type]
Policy(namespace="everything")  # type: ignore[arg-type]
