"""A shop that reserves, charges through Stripe and mails a receipt: each once, whatever dies.

SHOP_DATABASE names a PostgreSQL database. Its tables are made once, at deploy time::

    wsgi-idempotency upgrade --database "$SHOP_DATABASE"
    flask --app stripe_steps create-reservations

STRIPE_KEY is the secret key of your account, STRIPE_API where its API is, if not at Stripe's, and
MAIL_API where receipts are sent. The shop is served with::

    gunicorn --workers 2 stripe_steps:app
"""

import json
import os
import urllib.request

import stripe
from flask import Flask, request
from sqlalchemy import create_engine, text

from wsgi_idempotency import IdempotencyMiddleware, by_authorization, current_operation

database = os.environ["SHOP_DATABASE"]  # postgresql+psycopg://localhost/shop
engine = create_engine(database)
gateway = stripe.StripeClient(
    os.environ["STRIPE_KEY"],
    base_addresses={"api": os.environ["STRIPE_API"]} if "STRIPE_API" in os.environ else {},
)
app = Flask(__name__)
app.wsgi_app = IdempotencyMiddleware(app.wsgi_app, database, scope=by_authorization)


@app.post("/orders")
def order():
    item, amount = request.form["item"], request.form.get("amount", type=int)
    # The next attempt, after a crash or a 500, gets the results of what is done, and goes on
    # behind it.
    current_operation.step("reserve", lambda: reserve(item))
    charged = current_operation.step("charge", lambda: charge(amount))
    current_operation.step("receipt", lambda: send_receipt(request.form["email"], charged))
    return {"item": item, "charge": charged}, 201


# Each of these may run twice all the same: its worker may die when it has run and its step is not
# recorded. So each carries a key that is the same on every attempt at this operation.


def reserve(item):
    with engine.begin() as transaction:
        transaction.execute(
            text("INSERT INTO reservations VALUES (:operation, :item) ON CONFLICT DO NOTHING"),
            {"operation": current_operation.derive_key("reserve"), "item": item},
        )


def charge(amount):
    made = gateway.v1.charges.create(
        {"amount": amount, "currency": "eur", "source": "tok_visa"},
        {"idempotency_key": current_operation.derive_key("charge")},
    )
    return made.id


def send_receipt(email, charged):
    mail = urllib.request.Request(
        os.environ["MAIL_API"],
        json.dumps({"to": email, "text": f"Thank you. Your charge is {charged}."}).encode(),
        {
            "Content-Type": "application/json",
            "Idempotency-Key": current_operation.derive_key("receipt"),
        },
    )
    with urllib.request.urlopen(mail, timeout=10):
        pass


@app.cli.command("create-reservations")
def create_reservations():
    with engine.begin() as transaction:
        transaction.execute(
            text(
                "CREATE TABLE IF NOT EXISTS reservations"
                " (operation uuid PRIMARY KEY, item text NOT NULL)"
            )
        )
