"""A Django shop, all in one file, that charges once, however often the client sends the request.

Serve it with::

    gunicorn django_shop:application

A site of your own has the ``IDEMPOTENCY_`` settings in its settings.py, and the last line
in its wsgi.py.
"""

import os

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.db import connection
from django.http import HttpResponseBadRequest, JsonResponse
from django.urls import path

from wsgi_idempotency.contrib.django import protect

settings.configure(
    SECRET_KEY=os.environ.get("SECRET_KEY", "of this example"),
    ALLOWED_HOSTS=["127.0.0.1", "localhost"],
    ROOT_URLCONF=__name__,
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": os.environ.get("SHOP_FILE", "shop.db"),
        }
    },
    IDEMPOTENCY_STORE=os.environ.get("KEYS_DATABASE", "sqlite:///keys.db"),
    IDEMPOTENCY_SCOPE="by_authorization",
    IDEMPOTENCY_RETENTION="7 days",
)


def charge(request):
    amount = request.POST.get("amount", "")
    if not amount.isdecimal():
        return HttpResponseBadRequest("amount must be a number of cents")
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO charges (amount) VALUES (%s)", [amount])
        number = cursor.lastrowid
    return JsonResponse({"id": f"ch_{number}", "amount": int(amount)}, status=201)


urlpatterns = [path("charges", charge)]

application = get_wsgi_application()
with connection.cursor() as cursor:
    cursor.execute("CREATE TABLE IF NOT EXISTS charges (id integer PRIMARY KEY, amount integer)")
connection.close()  # each request opens its own

application = protect(application)
