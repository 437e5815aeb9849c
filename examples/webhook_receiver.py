"""Webhooks that are verified first, and then processed once, however often they are delivered.

Providers deliver again what wasn't answered with a 2xx in time, and sometimes what was. A
delivery has an id that stays the same, while its timestamp and signature are new each time.

Serve it, with the secrets that the providers show, behind TLS::

    export WEBHOOK_SECRET=whsec_... SVIX_SECRET=whsec_... STRIPE_SECRET=whsec_...
    gunicorn webhook_receiver:application

(It needs ``pip install flask standardwebhooks stripe``.)
"""

import io
import os
from datetime import timedelta

import stripe
from flask import Flask, request
from sqlalchemy import create_engine, text
from standardwebhooks.webhooks import Webhook, WebhookVerificationError
from werkzeug.exceptions import BadRequest, HTTPException, NotFound
from werkzeug.wrappers import Request

from wsgi_idempotency import (
    IdempotencyMiddleware,
    Policy,
    Route,
    current_operation,
    everyone,
    header,
    json_field,
)

database = os.environ.get("SHOP_DATABASE", "sqlite:///shop.db")
engine = create_engine(database)
with engine.begin() as transaction:
    transaction.execute(
        text("CREATE TABLE IF NOT EXISTS orders (name varchar(40) PRIMARY KEY, paid integer)")
    )


def standard(secret, prefix="webhook"):
    """Standard Webhooks; Svix signs in the same way, in fields of another prefix."""
    webhook = Webhook(secret)

    def verify(body, headers):
        signed = {
            f"webhook-{name}": headers.get(f"{prefix}-{name}", "")
            for name in ("id", "timestamp", "signature")
        }
        webhook.verify(body, signed, json_parse=False)

    return verify


def by_stripe(secret):
    def verify(body, headers):
        tolerance = stripe.Webhook.DEFAULT_TOLERANCE  # seconds
        signature = headers.get("Stripe-Signature")
        stripe.WebhookSignature.verify_header(body, signature, secret, tolerance)

    return verify


#: What the libraries raise; the latter two for signatures and bodies that are no text at all.
UNSIGNED = (
    WebhookVerificationError,
    stripe.SignatureVerificationError,
    ValueError,
    TypeError,
)


class Verified:
    """Lets deliveries through whose signature is right, and nothing else under ``/hooks``.

    A signature is over the bytes of the body. They are read here, once, and the application
    gets the very bytes that were verified.

    :param checks: for each path, a function of body and headers that raises.
    """

    MOST = 1024 * 1024  # bytes of a delivery; more is refused unread

    def __init__(self, app, checks):
        self.app = app
        self.checks = checks

    def __call__(self, environ, start_response):
        if not environ["PATH_INFO"].strip("/").startswith("hooks"):
            return self.app(environ, start_response)
        try:
            body = self.verified(environ)
        except HTTPException as refusal:
            return refusal(environ, start_response)
        environ["wsgi.input"] = io.BytesIO(body)
        environ["CONTENT_LENGTH"] = str(len(body))
        environ["wsgi.input_terminated"] = True
        environ.pop("HTTP_TRANSFER_ENCODING", None)  # it came chunked, and is whole now
        return self.app(environ, start_response)

    def verified(self, environ):
        check = self.checks.get(environ["PATH_INFO"])
        if check is None:
            raise NotFound
        delivery = Request(environ, populate_request=False)
        delivery.max_content_length = self.MOST
        body = delivery.get_data()
        try:
            check(body, delivery.headers)
        except UNSIGNED as exc:
            raise BadRequest("The delivery is not signed by who should have sent it.") from exc
        return body


def once(key):
    return Policy(
        key=key,
        required=True,
        fingerprint=None,  # the id says it all; Stripe counts pending deliveries in the body
        retention=timedelta(days=30),  # no provider goes on for longer by itself
        transaction=True,  # the order is paid and the delivery done in one commit, or neither
    )


app = Flask(__name__)
application = app.wsgi_app = Verified(
    IdempotencyMiddleware(
        app.wsgi_app,
        database,
        scope=everyone,  # a path has one sender, and it has been verified
        policy=None,
        routes=[
            Route("/hooks/standard", once(header("webhook-id"))),
            Route("/hooks/svix", once(header("svix-id"))),
            Route("/hooks/stripe", once(json_field("id"))),
        ],
    ),
    {
        "/hooks/standard": standard(os.environ["WEBHOOK_SECRET"]),
        "/hooks/svix": standard(os.environ["SVIX_SECRET"], prefix="svix"),
        "/hooks/stripe": by_stripe(os.environ["STRIPE_SECRET"]),
    },
)


@app.post("/hooks/standard")
@app.post("/hooks/svix")
@app.post("/hooks/stripe")
def receive():
    event = request.get_json(force=True)
    if event["type"] == "payment.succeeded":
        order = event["data"]["order"]
    elif event["type"] == "payment_intent.succeeded":
        order = event["data"]["object"]["metadata"]["order"]
    else:
        return "", 204  # others are none of ours
    paid = current_operation.connection.execute(
        text("UPDATE orders SET paid = paid + 1 WHERE name = :order"), {"order": order}
    )
    if paid.rowcount == 0:
        # The webhook has overtaken the request that makes the order. Nothing is recorded
        # after a 5xx, and the next delivery finds it.
        return "the order isn't there yet", 503
    return "", 204
