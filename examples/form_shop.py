"""A shop of plain HTML forms, in which a double-click orders once.

Serve it with more than one thread, since a second click waits for the first::

    gunicorn --threads 4 form_shop:app
"""

import os
import secrets
from datetime import timedelta

from flask import Flask, abort, make_response, redirect, render_template_string, request, url_for
from sqlalchemy import Column, Integer, MetaData, String, Table, create_engine, insert, select
from werkzeug.wrappers import Response

from wsgi_idempotency import IdempotencyMiddleware, Policy, by_cookie, form_field, new_key

database = os.environ.get("SHOP_DATABASE", "sqlite:///shop.db")
engine = create_engine(database)
orders = Table(
    "orders",
    MetaData(),
    Column("number", Integer, primary_key=True),
    Column("visitor", String(40)),
    Column("pieces", Integer),
)
orders.create(engine, checkfirst=True)

FORM = """<!doctype html>
<title>Shop</title>
{% if error %}<p role="alert">{{ error }}</p>{% endif %}
<form method="post" action="{{ url_for('order') }}">
  <input type="hidden" name="idempotency_key" value="{{ key }}">
  <label>Pieces <input name="pieces" value="{{ pieces }}"></label>
  <button>Order</button>
</form>
"""

PLACED = """<!doctype html>
<title>Thank you</title>
<p id="placed">Order {{ number }}: {{ pieces }} pieces.</p>
<a href="{{ url_for('shop') }}">A new order</a>
"""

REFUSED = """<!doctype html>
<title>{{ problem.title }}</title>
<h1>{{ problem.title }}</h1>
<p>{{ detail }}</p>
<a href="{{ url_for('shop') }}">A new order</a>
"""

app = Flask(__name__)


def page_of(problem, environ):
    """What a person is shown whose form was refused."""
    detail = {
        "CONFLICT": "Your order is still being placed. Reload this page in a moment.",
        "FINGERPRINT_MISMATCH": "You have sent this form before, and the first order stands."
        " Start a new one for anything else.",
    }.get(problem.code, problem.detail)
    with app.test_request_context():
        page = render_template_string(REFUSED, problem=problem, detail=detail)
    return Response(page, problem.status, content_type="text/html; charset=utf-8")


app.wsgi_app = IdempotencyMiddleware(
    app.wsgi_app,
    database,
    scope=by_cookie("visitor"),
    policy=Policy(
        key=form_field("idempotency_key"),
        required=True,  # a form without its hidden field is a mistake in a template
        wait=10,  # a browser doesn't come back by itself: the second click gets the redirect
        retention=timedelta(days=30),  # a form sent again after this is a new order
    ),
    render_problem=page_of,
)


@app.get("/")
def shop():
    page = make_response(render_template_string(FORM, key=new_key(), pieces=1))
    page.cache_control.private = True  # it has a key in it, and maybe a cookie
    if "visitor" not in request.cookies:
        page.set_cookie(
            "visitor",
            secrets.token_urlsafe(16),
            secure=request.is_secure,  # behind a proxy that ends TLS, with werkzeug's ProxyFix
            httponly=True,
            samesite="Lax",
        )
    return page


@app.post("/orders")
def order():
    pieces = request.form.get("pieces", type=int)
    if pieces is None or not 0 < pieces < 1000:
        # Nothing was ordered, and after a 4xx the key is fresh: the corrected form keeps it.
        error, key = "Order from 1 to 999 pieces.", request.form["idempotency_key"]
        return render_template_string(FORM, error=error, key=key, pieces=pieces or 1), 400
    with engine.begin() as transaction:
        (number,) = transaction.execute(
            insert(orders).values(visitor=request.cookies["visitor"], pieces=pieces)
        ).inserted_primary_key
    return redirect(url_for("placed", number=number), 303)


@app.get("/orders/<int:number>")
def placed(number):
    with engine.connect() as connection:
        pieces = connection.scalar(
            select(orders.c.pieces).where(
                orders.c.number == number,
                orders.c.visitor == request.cookies.get("visitor", ""),
            )
        )
    if pieces is None:
        abort(404)
    return render_template_string(PLACED, number=number, pieces=pieces)
