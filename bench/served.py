"""What gunicorn serves for a measurement, chosen by the environment.

``BENCH_WRAP`` says what is around the application, ``BENCH_STORE`` where its records are,
``BENCH_POLICY`` a Policy's options as JSON. With ``BENCH_SHOP`` the application writes a row
there for each payment and commits, joining the transaction where there is one: with a savepoint
of the session's own, or without, as ``BENCH_JOIN`` says.
"""

from __future__ import annotations

import json
import os
from typing import Any

import flask
import sqlalchemy
from sqlalchemy.orm import Session

from wsgi_idempotency import (
    IdempotencyMiddleware,
    Policy,
    SQLStore,
    by_authorization,
    current_operation,
)

THREADS = int(os.environ.get("BENCH_THREADS", "1"))
POLICY: dict[str, Any] = json.loads(os.environ.get("BENCH_POLICY", "{}"))
SHOP = os.environ.get("BENCH_SHOP")
JOIN: Any = os.environ.get("BENCH_JOIN")

shop = flask.Flask(__name__)
engine = None if SHOP is None else sqlalchemy.create_engine(SHOP, pool_size=THREADS)
charges = sqlalchemy.table("charges", sqlalchemy.column("amount"))


@shop.post("/payments")
def pay() -> tuple[flask.Response, int, dict[str, str]]:
    amount = flask.request.get_json()["amount"]
    if engine is not None:
        with session() as writing:
            writing.execute(charges.insert().values(amount=amount))
            writing.commit()
    return flask.jsonify(id=1, amount=amount), 201, {"Location": "/payments/1"}


@shop.get("/payments/<int:number>")
def show(number: int) -> flask.Response:
    return flask.jsonify(id=number)


def session() -> Session:
    if POLICY.get("transaction"):
        return Session(bind=current_operation.connection, join_transaction_mode=JOIN)
    return Session(engine)


def wrap(kind: str, app: Any) -> Any:
    if kind == "bare":
        return app
    url = os.environ["BENCH_STORE"]
    if kind == "wrapped":
        store = url if url == "memory:" else SQLStore(url, pool_size=max(THREADS, 2))
        return IdempotencyMiddleware(app, store, scope=by_authorization, policy=Policy(**POLICY))
    import references

    return getattr(references, kind)(app, url, workers_threads=THREADS)


app = wrap(os.environ["BENCH_WRAP"], shop)
