"""A shop that charges once, however often the client sends the request.

SHOP_DATABASE names a PostgreSQL database. Its tables are made once, at deploy time::

    wsgi-idempotency upgrade --database "$SHOP_DATABASE"
    flask --app flask_shop create-ledger

and the shop is served with::

    gunicorn --workers 2 flask_shop:app
"""

import os

from flask import Flask, request
from sqlalchemy import create_engine, text

from wsgi_idempotency import IdempotencyMiddleware, by_authorization

database = os.environ["SHOP_DATABASE"]  # postgresql+psycopg://localhost/shop
engine = create_engine(database)
app = Flask(__name__)
app.wsgi_app = IdempotencyMiddleware(
    app.wsgi_app,
    database,
    scope=by_authorization,  # whose key is it? required
)


@app.post("/charges")
@app.post("/v1/charges")  # where SDKs of payment providers look for it
def charge():
    amount = request.form.get("amount", type=int)
    currency = request.form.get("currency", "eur")
    if amount is None or not 0 < amount < 100_000_000:
        return {"error": {"message": "amount must be a number of cents from 1 to 99999999"}}, 400
    with engine.begin() as transaction:
        number = transaction.scalar(
            text("INSERT INTO ledger (amount, currency) VALUES (:amount, :currency) RETURNING id"),
            {"amount": amount, "currency": currency},
        )
    return {"id": f"ch_{number}", "object": "charge", "amount": amount, "currency": currency}, 201


@app.get("/charges")
def charges():
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT id, amount, currency FROM ledger ORDER BY id"))
        return [{**row, "id": f"ch_{row['id']}"} for row in rows.mappings()]


@app.cli.command("create-ledger")
def create_ledger():
    with engine.begin() as transaction:
        transaction.execute(
            text(
                "CREATE TABLE IF NOT EXISTS ledger (id integer GENERATED ALWAYS AS IDENTITY,"
                " amount integer NOT NULL, currency text NOT NULL)"
            )
        )
