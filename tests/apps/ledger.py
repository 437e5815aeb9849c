"""The handler of :mod:`apps.handler`, protected as its process's environment says; see
:func:`apps.shop.open_shop`."""

from __future__ import annotations

import json
import logging
import os

from sqlalchemy import create_engine

import wsgi_idempotency
from apps.handler import handler
from wsgi_idempotency import IdempotencyMiddleware, Policy, SQLStore, everyone

logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")


def make_store():
    """A store of its own, or one on an Engine of the application's."""
    if os.environ.get("ENGINE_OPTIONS"):
        engine = create_engine(os.environ["STORE"], **json.loads(os.environ["ENGINE_OPTIONS"]))
        return engine, engine
    return None, SQLStore(os.environ["STORE"], **json.loads(os.environ.get("STORE_OPTIONS", "{}")))


def make_policy():
    options = json.loads(os.environ.get("POLICY", "{}"))
    if "outcomes" in options:
        options["outcomes"] = getattr(wsgi_idempotency, options["outcomes"])
    return Policy(**options)


def joins(engine):
    """The handler, writing to the database on the application's own Engine as well."""

    def joined(environ, start_response):
        if environ["REQUEST_METHOD"] != "GET":
            with engine.begin() as connection:
                connection.exec_driver_sql("INSERT INTO ledger (pid) VALUES (%s)", (os.getpid(),))
        return handler(environ, start_response)

    return joined


engine, store = make_store()
app = IdempotencyMiddleware(
    handler if engine is None else joins(engine),
    store,
    scope=everyone,
    policy=make_policy(),
    max_waiting=int(os.environ.get("MAX_WAITING", "8")),
)
