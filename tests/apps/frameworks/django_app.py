"""examples/django_shop.py, with our views."""

from __future__ import annotations

import django_shop
from django.core.exceptions import BadRequest
from django.http import HttpResponse, HttpResponseRedirect, StreamingHttpResponse
from django.urls import path

from apps.frameworks import WAYS, digest, ran, streamed


def noting(view):
    def noted(request, *arguments, **named):
        ran(request.headers["Idempotency-Key"])
        return view(request, *arguments, **named)

    return noted


def read(request, way):
    return HttpResponse(digest(WAYS[way](request)))


def form(request):
    return HttpResponse("&".join(f"{name}={value}" for name, value in request.POST.items()))


def upload(request):
    return HttpResponse(digest(request.FILES["file"].chunks()) + request.POST["name"])


def status(request, status):
    return HttpResponse("as asked for", status=status)


def refuses(request):
    raise BadRequest


def raises(request):
    raise RuntimeError("as asked for")


def streams(request):
    return StreamingHttpResponse(streamed(), content_type="text/plain")


class SeeOther(HttpResponseRedirect):
    status_code = 303


def redirects(request):
    return SeeOther("/charges/1")


django_shop.urlpatterns[:] = [
    path("charges", noting(django_shop.charge)),
    path("read/<way>", noting(read)),
    path("form", noting(form)),
    path("upload", noting(upload)),
    path("status/<int:status>", noting(status)),
    path("refuses", noting(refuses)),
    path("raises", noting(raises)),
    path("streams", noting(streams)),
    path("redirects", noting(redirects)),
]

application = django_shop.application
