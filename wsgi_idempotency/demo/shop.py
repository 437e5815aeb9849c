"""The demo's shop: one handler behind two doors, and a page that shows what they charged."""

from __future__ import annotations

import os
import secrets
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from flask import Flask, Response, redirect, render_template, request
from sqlalchemy import (
    Boolean,
    Column,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    func,
    insert,
    select,
)
from werkzeug.exceptions import BadRequest
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from wsgi_idempotency.demo.double_tap import times
from wsgi_idempotency.demo.server import DATABASE_VARIABLE
from wsgi_idempotency.key import form_field, new_key
from wsgi_idempotency.middleware import IdempotencyMiddleware
from wsgi_idempotency.policy import Policy, Route
from wsgi_idempotency.scope import everyone

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication
    from sqlalchemy import Engine
    from werkzeug.wrappers import Response as WerkzeugResponse

#: Seconds a charge takes: long enough for a second tap to find the first under way.
SECONDS = 1

#: Rows the ledger page shows.
SHOWN = 20

#: What the classic form charges, in cents.
AMOUNT = 4200

#: A form can't be told to come back later, as a program can: its second click waits.
FORMS = Route(
    "/orders",
    Policy(key=form_field("idempotency_key"), required=True, wait=SECONDS + 10),
)

metadata = MetaData()

ledger = Table(
    "wsgi_idempotency_demo_ledger",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("order", String(40), nullable=False),
    Column("amount", Integer, nullable=False),
    Column("protected", Boolean, nullable=False),
)


def create_app(database: str | None = None, *, seconds: float = SECONDS) -> WSGIApplication:
    """Make the shop: a page at ``/``, and the same handler under two mount points.

    :param database: the URL of a database that has the ledger table; by default the
        one named by the environment variable the demo sets for its workers.
    :param seconds: how long a charge takes.
    """
    database = database or os.environ[DATABASE_VARIABLE]
    engine = create_engine(database)
    charges = create_charges(engine, seconds)
    return DispatcherMiddleware(
        create_pages(engine),
        {
            "/unprotected": charges,
            # One shop for whoever started it: there is no log-in here to tell people apart by.
            "/protected": IdempotencyMiddleware(charges, database, scope=everyone, routes=[FORMS]),
        },
    )


def create_charges(engine: Engine, seconds: float) -> Flask:
    """Make the application that charges. It knows nothing of idempotency keys."""
    app = Flask("wsgi_idempotency.demo.charges", static_folder=None)

    def charge() -> dict[str, Any]:
        order = request.form.get("order", "")
        amount = request.form.get("amount", type=int)
        if not 0 < len(order) <= 40:
            raise BadRequest("order must have from 1 to 40 characters")
        if amount is None or not 0 < amount < 100_000_000:
            raise BadRequest("amount must be a number of cents from 1 to 99999999")
        time.sleep(seconds)  # the payment provider takes its time
        row = {"order": order, "amount": amount, "protected": request.script_root == "/protected"}
        with engine.begin() as connection:
            made = connection.execute(insert(ledger).values(row)).inserted_primary_key
        assert made is not None  # SQLAlchemy has none for an INSERT of several rows only
        return {"id": f"ch_{made.id}", "order": order, "amount": amount}

    @app.post("/charges")
    def for_programs() -> tuple[dict[str, Any], int]:
        return charge(), 201

    @app.post("/orders")
    def for_browsers() -> WerkzeugResponse:
        # Seen from the mount point, where the page of the order is not.
        return redirect("../orders/" + quote(charge()["order"], safe=""), 303)

    @app.errorhandler(BadRequest)
    def refuse(error: BadRequest) -> tuple[dict[str, str | None], int]:
        return {"error": error.description}, 400

    return app


def create_pages(engine: Engine) -> Flask:
    """Make the application that shows the page and the ledger."""
    app = Flask("wsgi_idempotency.demo", static_folder="page/static", template_folder="page")

    @app.get("/")
    def page() -> str:
        # One purchase for each form, made when the page is. Back shows the page again as it
        # was, with the same keys; a reload makes new ones.
        forms = [
            {"door": door, "order": secrets.token_hex(4), "key": new_key()}
            for door in ("unprotected", "protected")
        ]
        return render_template("index.html", seconds=SECONDS, amount=AMOUNT, forms=forms)

    @app.get("/orders/<order>")
    def show_order(order: str) -> tuple[str, int]:
        """Where a form leads to when it has been sent."""
        with engine.connect() as connection:
            rows = connection.execute(
                select(ledger).where(ledger.c.order == order).order_by(ledger.c.id)
            ).all()
        page = render_template("order.html", order=order, charges=rows, count=times(len(rows)))
        return page, 200 if rows else 404

    @app.get("/ledger")
    def show_ledger() -> dict[str, Any]:
        """The latest charges; with ``?order=`` those of one order. ``rows`` counts them all."""
        order = request.args.get("order")
        wanted = ledger.c.order == order if order is not None else ledger.c.id.is_not(None)
        with engine.connect() as connection:
            rows = connection.scalar(select(func.count()).select_from(ledger).where(wanted))
            latest = connection.execute(
                select(ledger).where(wanted).order_by(ledger.c.id.desc()).limit(SHOWN)
            )
            charges = [{**row._mapping, "id": f"ch_{row.id}"} for row in latest]
        return {"rows": rows, "charges": charges}

    @app.after_request
    def harden(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = (
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
            " img-src data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
        )
        response.headers["X-Content-Type-Options"] = "nosniff"
        # Kept for Back and Forward, which don't ask again (RFC 9111 section 6): a page that
        # isn't stored would come back with another key.
        response.headers["Cache-Control"] = "no-cache" if request.path == "/" else "no-store"
        return response

    return app
