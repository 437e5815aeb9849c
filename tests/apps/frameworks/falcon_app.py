"""examples/falcon_shop.py, with our resources."""

from __future__ import annotations

import falcon
from falcon_shop import app, application

from apps.frameworks import WAYS, digest, in_pieces, ran, streamed

__all__ = ["application"]


class Notes:
    def process_request(self, request, response):
        ran(request.get_header("Idempotency-Key"))


class Read:
    def on_post(self, request, response, way):
        # bounded_stream.readline() loses bytes, with our middleware and without.
        response.text = digest(WAYS[way](request.stream))


class Form:
    def on_post(self, request, response):
        response.text = "&".join(f"{name}={value}" for name, value in request.get_media().items())


class Upload:
    def on_post(self, request, response):
        said = {}
        for part in request.get_media():
            said[part.name] = digest(in_pieces(part.stream)) if part.filename else part.text
        response.text = said["file"] + said["name"]


class Status:
    def on_post(self, request, response, status):
        response.status = status
        response.text = "as asked for"


class Refuses:
    def on_post(self, request, response):
        raise falcon.HTTPUnprocessableEntity


class Raises:
    def on_post(self, request, response):
        raise RuntimeError("as asked for")


class Streams:
    def on_post(self, request, response):
        response.content_type = "text/plain"
        response.stream = streamed()


class Redirects:
    def on_post(self, request, response):
        raise falcon.HTTPSeeOther("/charges/1")


app.add_middleware(Notes())
for rule, resource in {
    "/read/{way}": Read(),
    "/form": Form(),
    "/upload": Upload(),
    "/status/{status:int}": Status(),
    "/refuses": Refuses(),
    "/raises": Raises(),
    "/streams": Streams(),
    "/redirects": Redirects(),
}.items():
    app.add_route(rule, resource)
