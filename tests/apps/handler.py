"""A handler that writes a line into a ledger each time it runs.

The header fields of a request, which belong to no fingerprint, say what it does:

``X-Status``
    the status line of the answer; ``raise`` raises instead.
``X-Gate``
    wait at this gate; what it says, if anything, replaces the status line.
``X-Size``
    the answer's size in bytes.
``X-Takes``
    seconds of work.
``X-Call-Self``
    send the same request, with the same key, to this address first.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid

from servers.http import Connection

from apps.gate import wait_at


def write(**line):
    """Append to the ledger: one write to a file opened for appending is one line, whoever
    else writes, and survives the process."""
    file = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, json.dumps(line).encode() + b"\n")
    finally:
        os.close(file)


def handler(environ, start_response):
    if environ["REQUEST_METHOD"] == "GET":
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "2")])
        return [b"ok"]
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    operation = environ.get("wsgi_idempotency.operation")
    attempt = None if operation is None else operation.attempt
    execution = str(uuid.uuid4())
    write(
        what="begun",
        key=environ.get("HTTP_IDEMPOTENCY_KEY"),
        execution=execution,
        attempt=attempt,
        pid=os.getpid(),
        body=hashlib.sha256(body).hexdigest(),
    )
    try:
        return answer(environ, start_response, execution, attempt, body)
    finally:
        write(what="ended", execution=execution)


def answer(environ, start_response, execution, attempt, body):
    said = {"execution": execution, "attempt": attempt}
    status = environ.get("HTTP_X_STATUS", "201 Created")
    if "HTTP_X_CALL_SELF" in environ:
        said["inner"] = call_self(environ, body)
    if "HTTP_X_TAKES" in environ:
        time.sleep(float(environ["HTTP_X_TAKES"]))
    if "HTTP_X_GATE" in environ:
        status = wait_at(environ["HTTP_X_GATE"], {"pid": os.getpid(), "attempt": attempt}) or status
    if status == "raise":
        raise RuntimeError("the handler fails, as it was told to")
    if int(status[:3]) in (204, 304):
        start_response(status, [("ETag", '"1"')])
        return []
    entity = b""
    if environ.get("HTTP_X_SIZE") != "0":
        entity = json.dumps(said).encode().ljust(int(environ.get("HTTP_X_SIZE", 0)))
    start_response(
        status,
        [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(entity))),
            ("Location", f"/executions/{execution}"),
        ],
    )
    return [entity]


def call_self(environ, body):
    host, _, port = environ["HTTP_X_CALL_SELF"].rpartition(":")
    headers = [("Idempotency-Key", environ["HTTP_IDEMPOTENCY_KEY"]), ("Connection", "close")]
    with Connection((host, int(port))) as connection:
        response = connection.request("POST", environ["PATH_INFO"], headers, body)
    return [response.status, json.loads(response.body).get("code")]
