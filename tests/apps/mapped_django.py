"""The shop of ``mapped.py`` made with Django, which is set up once in a process."""

from __future__ import annotations

from typing import ClassVar

from django.conf import settings
from django.conf.urls.i18n import i18n_patterns
from django.core.wsgi import get_wsgi_application
from django.urls import include, path, re_path
from django.views import View

from apps.mapped import never, protect

settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], LOGGING_CONFIG=None)


class Books(View):
    get = never


class LogIn(View):
    post = never


class ViewSet:
    """As REST framework marks a view."""

    __call__ = never
    __name__ = "ViewSet"
    actions: ClassVar = {"post": "create", "get": "list"}


urlpatterns = [
    path("charges", never),
    path("orders/", include([path("<int:number>", never, name="number")])),
    path("texts/<text>", never),
    path("free", never),
    re_path(r"^files/(?P<rest>.+)$", never),
    re_path(r"^hooks/(?P<sender>\w+)$", never),
    path("log-in", LogIn.as_view()),
    path("books", Books.as_view()),
    path("set", ViewSet()),
    re_path(r"^odd/(?=impossible)nothing$", never),
    *i18n_patterns(path("translated", never)),
]

application = protect(get_wsgi_application())
