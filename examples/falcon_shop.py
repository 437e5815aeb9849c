"""A Falcon shop that charges once, however often the client sends the request.

Serve it with::

    gunicorn falcon_shop:application
"""

import os

import falcon
from sqlalchemy import create_engine, text

from wsgi_idempotency import IdempotencyMiddleware, by_authorization

engine = create_engine(os.environ.get("SHOP_DATABASE", "sqlite:///shop.db"))
with engine.begin() as transaction:
    transaction.execute(
        text("CREATE TABLE IF NOT EXISTS charges (id integer PRIMARY KEY, amount integer)")
    )


class Charges:
    def on_post(self, request, response):
        try:
            amount = int(request.get_media()["amount"])
        except (KeyError, ValueError):
            raise falcon.HTTPBadRequest(title="amount must be a number of cents") from None
        with engine.begin() as transaction:
            number = transaction.execute(
                text("INSERT INTO charges (amount) VALUES (:amount)"), {"amount": amount}
            ).lastrowid
        response.status = 201
        response.media = {"id": f"ch_{number}", "amount": amount}


app = falcon.App()
app.add_route("/charges", Charges())

application = IdempotencyMiddleware(
    app,
    os.environ.get("KEYS_DATABASE", "sqlite:///keys.db"),
    scope=by_authorization,
)
