"""examples/stripe_steps.py in a process that dies as ``X-Die`` says: ``in NAME``, when the function
of a step has run and nothing is recorded, or ``after NAME``, when it is."""

from __future__ import annotations

import os
import signal

from stripe_steps import app as shop

from wsgi_idempotency import Operation

_step = Operation.step
_moment = None


def step(operation, name, function):
    def run():
        result = function()
        die_at(f"in {name}")
        return result

    result = _step(operation, name, run)
    die_at(f"after {name}")
    return result


def die_at(moment):
    if moment == _moment:
        os.kill(os.getpid(), signal.SIGKILL)


def app(environ, start_response):
    global _moment
    _moment = environ.get("HTTP_X_DIE")
    return shop(environ, start_response)


Operation.step = step
