"""The application of the harness: a handler that keeps a ledger, wrapped in the middleware.

The ledger is a table in a second PostgreSQL server, which nothing befalls: it has to tell the
truth while the store's is down, and a handler that succeeds while the store is away is the
hardest case there is. In transaction mode the effect goes to a table beside the store's, through
``operation.connection``; what has begun is still written to the ledger. What else is worth
knowing goes to a journal, a file that each write appends one line to, and that survives the
process.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
import uuid

import psycopg
from sqlalchemy import text

import wsgi_idempotency
from chaos import broken
from chaos.schedule import LARGEST, LEASE, POLICIES, STORE_TIMEOUT
from wsgi_idempotency import IdempotencyMiddleware, Policy, Route

#: Seconds a thread may be late before it says that its process did not get to run.
LATE = 0.3

CHARGE = text(
    "INSERT INTO charges (execution, scope, policy, key, payload)"
    " VALUES (:execution, :scope, :policy, :key, :payload)"
)

logging.basicConfig(format="%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s")

here = threading.local()  # what is known of the request in this thread


def journal(what, **line):
    """Write down: one write to a file opened for appending is one line, whoever else writes."""
    file = os.open(os.environ["JOURNAL"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        said = {"what": what, "at": time.time(), "pid": os.getpid(), **line}
        os.write(file, json.dumps(said).encode() + b"\n")
    finally:
        os.close(file)


def enter(what, execution, operation, asked_by):
    """Add a row to the ledger, in autocommit, on this thread's own connection."""
    try:
        if getattr(here, "connection", None) is None:
            here.connection = psycopg.connect(os.environ["LEDGER"], autocommit=True)
        here.connection.execute(
            "INSERT INTO ledger (what, execution, scope, policy, key, payload, token, attempt, pid)"
            " VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)",
            (what, execution, *asked_by, *of(operation), os.getpid()),
        )
    except BaseException:
        # Also when gunicorn ends this worker: what the connection would say next is not known.
        here.connection = None
        raise


def charge(execution, operation, asked_by):
    """The effect of an operation in transaction mode, in its own transaction."""
    operation.connection.execute(
        CHARGE, dict(zip(["scope", "policy", "key", "payload"], asked_by), execution=execution)
    )


def begun_before(asked_by):
    """How often an operation has begun, this time included. In transaction mode each time is
    the first attempt, since nothing of the others is left."""
    ((count,),) = here.connection.execute(
        "SELECT count(*) FROM ledger"
        " WHERE what = 'begun' AND scope = %s AND policy = %s AND key = %s",
        asked_by[:3],
    )
    return count


def of(operation):
    # The token is nobody's business but ours: it ties a run to the row's history.
    return (None, None) if operation is None else (operation._claim.token.hex(), operation.attempt)


def handler(environ, start_response):
    """Do as the body says, and write it down at each step."""
    body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
    asked = json.loads(body)
    operation = environ.get("wsgi_idempotency.operation")
    execution = uuid.uuid4().hex
    here.token, here.takes = of(operation)[0], asked["takes"]
    payload = hashlib.sha256(body).hexdigest()
    asked_by = (
        environ["HTTP_X_SCOPE"],
        environ["PATH_INFO"].strip("/"),
        environ["HTTP_IDEMPOTENCY_KEY"],
        payload,
    )
    journal("begun", execution=execution)
    try:
        enter("begun", execution, operation, asked_by)
        status, chunks, kind = work(asked, execution, operation, asked_by)
        entity = b"".join(chunks)
        body = hashlib.sha256(entity).hexdigest()
        journal("decided", execution=execution, outcome=status[:3], body=body)
    except BaseException:
        journal("decided", execution=execution, outcome="raised")
        journal("over", execution=execution)
        raise
    headers = [
        ("Content-Type", kind),
        ("Location", f"/executions/{execution}"),
        ("X-Chaos", "first"),
        ("Set-Cookie", f"execution={execution}"),
        ("X-Chaos", "second"),
    ]
    if kind != "text/event-stream":
        headers.append(("Content-Length", str(len(entity))))
    start_response(status, headers)
    return sending(chunks, execution)


def sending(chunks, execution):
    try:
        yield from chunks
    finally:
        journal("over", execution=execution)


def work(asked, execution, operation, asked_by):
    said = dict(zip(["scope", "policy", "key", "payload"], asked_by), execution=execution)
    entity = json.dumps(said).encode()
    if asked["broken"]:
        return "400 Correct It", [entity], "application/json"
    time.sleep(asked["takes"] / 2)
    kind, attempt, streamed = asked["kind"], of(operation)[1], "text/event-stream"
    if operation is not None and operation.transactional:
        charge(execution, operation, asked_by)
        # An event stream is refused there: it would never end, and nothing be committed.
        attempt, streamed = begun_before(asked_by), "text/plain"
    else:
        enter("effect", execution, operation, asked_by)
    time.sleep(asked["takes"] / 2)
    if attempt == 1 and kind == "fails once":
        return "500 Out Of Luck", [entity], "application/json"
    if attempt == 1 and kind == "raises once":
        raise RuntimeError("the handler fails, as it was told to")
    if kind == "large":
        return "201 Created", [entity, *[b" " * LARGEST] * 3], "application/json"
    if kind == "streams":
        return "201 Created", [b"data: " + entity, b" ", b"\n\n"], streamed
    return "201 Created", [entity], "application/json"


def observe(event):
    """What the middleware says of itself: whose end it could not record at once."""
    journal("event", name=event.name, code=event.code, token=here.token)


def policy(options):
    options = dict(options, outcomes=getattr(wsgi_idempotency, options["outcomes"]))
    return Policy(
        lease=float(os.environ.get("LEASE", LEASE)), max_response_bytes=LARGEST, **options
    )


protected = IdempotencyMiddleware(
    handler,
    broken.store(
        os.environ.get("BROKEN"),
        os.environ["STORE"],
        timeout=STORE_TIMEOUT,
        prepare=os.environ["PREPARE"] == "yes",
    ),
    scope=lambda environ: environ.get("HTTP_X_SCOPE"),
    policy=None,
    routes=[Route(f"/{name}", policy(options)) for name, options in POLICIES.items()],
    on_event=observe,
)


def app(environ, start_response):
    """The middleware, and how long it took."""
    watch()
    here.token, here.takes = None, 0.0
    started = time.time()
    try:
        return protected(environ, start_response)
    finally:
        journal(
            "answered",
            scope=environ.get("HTTP_X_SCOPE"),
            policy=environ["PATH_INFO"].strip("/"),
            key=environ.get("HTTP_IDEMPOTENCY_KEY"),
            started=started,
            takes=here.takes,
        )


_watched = None


def watch():
    """Once a process, not before its first request: what runs before a fork does not after it."""
    global _watched
    if _watched != os.getpid():
        _watched = os.getpid()
        threading.Thread(target=_watching, daemon=True).start()


def _watching():
    while True:
        before = time.time()
        time.sleep(0.05)
        if time.time() - before > LATE:
            journal("stalled", started=before)
