"""Views that a setting includes into examples/pyramid_shop.ini."""

from __future__ import annotations

from pyramid.events import NewRequest
from pyramid.httpexceptions import HTTPSeeOther, HTTPUnprocessableEntity
from pyramid.response import Response

from apps.frameworks import WAYS, digest, in_pieces, ran, streamed


def read(request):
    return Response(digest(WAYS[request.matchdict["way"]](request.body_file)))


def form(request):
    return Response("&".join(f"{name}={value}" for name, value in request.POST.items()))


def upload(request):
    return Response(digest(in_pieces(request.POST["file"].file)) + request.POST["name"])


def status(request):
    return Response("as asked for", status=int(request.matchdict["status"]))


def refuses(request):
    raise HTTPUnprocessableEntity()


def raises(request):
    raise RuntimeError("as asked for")


def streams(request):
    return Response(app_iter=streamed(), content_type="text/plain")


def redirects(request):
    raise HTTPSeeOther("/charges/1")


def includeme(config):
    config.add_subscriber(lambda event: ran(event.request.headers["Idempotency-Key"]), NewRequest)
    for view, rule in {
        read: "/read/{way}",
        form: "/form",
        upload: "/upload",
        status: "/status/{status}",
        refuses: "/refuses",
        raises: "/raises",
        streams: "/streams",
        redirects: "/redirects",
    }.items():
        config.add_route(view.__name__, rule)
        config.add_view(view, route_name=view.__name__)
