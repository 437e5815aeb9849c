"""examples/bottle_shop.py, with our views."""

from __future__ import annotations

import bottle
from bottle_shop import app, application

from apps.frameworks import WAYS, digest, in_pieces, ran, streamed

__all__ = ["application"]

request, response = bottle.request, bottle.response


@app.hook("before_request")
def note():
    ran(request.headers["Idempotency-Key"])


@app.post("/read/<way>")
def read(way):
    return digest(WAYS[way](request.body))


@app.post("/form")
def form():
    return "&".join(f"{name}={value}" for name, value in request.forms.decode().items())


@app.post("/upload")
def upload():
    return digest(in_pieces(request.files["file"].file)) + request.forms["name"]


@app.post("/status/<status:int>")
def status(status):
    response.status = status
    return "as asked for"


@app.post("/refuses")
def refuses():
    bottle.abort(422)


@app.post("/raises")
def raises():
    raise RuntimeError("as asked for")


@app.post("/streams")
def streams():
    response.content_type = "text/plain"
    yield from streamed()


@app.post("/redirects")
def redirects():
    bottle.redirect("/charges/1", 303)
