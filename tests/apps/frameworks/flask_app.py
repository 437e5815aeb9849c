"""The extension, on an application of its own: examples/flask_shop.py is for PostgreSQL."""

from __future__ import annotations

import os

from flask import Flask, Response, abort, redirect, request

from apps.frameworks import WAYS, digest, in_pieces, ran, streamed
from wsgi_idempotency.contrib.flask import Idempotency

app = Flask("frameworks")
app.config["IDEMPOTENCY_STORE"] = os.environ["KEYS_DATABASE"]
Idempotency(app, scope=lambda: request.headers["Authorization"])
app.charges = []


@app.before_request
def note():
    ran(request.headers["Idempotency-Key"])


@app.post("/charges")
def charge():
    amount = request.form.get("amount", type=int)
    if amount is None:
        abort(400)
    app.charges.append(amount)
    return {"id": f"ch_{len(app.charges)}", "amount": amount}, 201


@app.post("/read/<way>")
def read(way):
    return digest(WAYS[way](request.stream))


@app.post("/form")
def form():
    return "&".join(f"{name}={value}" for name, value in request.form.items())


@app.post("/upload")
def upload():
    return digest(in_pieces(request.files["file"])) + request.form["name"]


@app.post("/status/<int:status>")
def status(status):
    return "as asked for", status


@app.post("/refuses")
def refuses():
    abort(422)


@app.post("/raises")
def raises():
    raise RuntimeError("as asked for")


@app.post("/streams")
def streams():
    return Response(streamed(), mimetype="text/plain")


@app.post("/redirects")
def redirects():
    return redirect("/charges/1", 303)
