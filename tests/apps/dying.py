"""The ledger in a process that dies once the middleware has returned, as ``X-Die`` says:
before the first byte is sent, or after half the response."""

from __future__ import annotations

import os
import signal

from apps.ledger import app as protected


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def app(environ, start_response):
    iterable = protected(environ, start_response)
    moment = environ.get("HTTP_X_DIE")
    if moment == "before the first byte":
        die()
    if moment == "after half the response":
        return half(b"".join(iterable))
    return iterable


def half(entity):
    yield entity[: len(entity) // 2]
    die()
