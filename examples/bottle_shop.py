"""A Bottle shop that charges once, however often the client sends the request.

Serve it with::

    gunicorn bottle_shop:application
"""

import os

import bottle
from sqlalchemy import create_engine, text

from wsgi_idempotency import IdempotencyMiddleware, by_authorization

engine = create_engine(os.environ.get("SHOP_DATABASE", "sqlite:///shop.db"))
with engine.begin() as transaction:
    transaction.execute(
        text("CREATE TABLE IF NOT EXISTS charges (id integer PRIMARY KEY, amount integer)")
    )

app = bottle.Bottle()


@app.post("/charges")
def charge():
    try:
        amount = int(bottle.request.forms.amount)
    except ValueError:
        bottle.abort(400, "amount must be a number of cents")
    with engine.begin() as transaction:
        number = transaction.execute(
            text("INSERT INTO charges (amount) VALUES (:amount)"), {"amount": amount}
        ).lastrowid
    bottle.response.status = 201
    return {"id": f"ch_{number}", "amount": amount}


application = IdempotencyMiddleware(
    app,
    os.environ.get("KEYS_DATABASE", "sqlite:///keys.db"),
    scope=by_authorization,
)
