"""Django: the application of ``wsgi.py``, wrapped as the settings say::

    from django.core.wsgi import get_wsgi_application
    from wsgi_idempotency.contrib.django import protect

    application = protect(get_wsgi_application())

Django's own test client calls the handler without ``wsgi.py``, and so without protection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from django.conf import settings as django_settings

from wsgi_idempotency import settings
from wsgi_idempotency.middleware import IdempotencyMiddleware

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

PREFIX = "IDEMPOTENCY_"

_NEEDED = {
    "store": "IDEMPOTENCY_STORE is not in the settings; set it to a database URL such as"
    " postgresql+psycopg://localhost/shop",
    "scope": "IDEMPOTENCY_SCOPE is not in the settings; say whose key it is, such as"
    ' "by_authorization" or "cookie:sessionid"',
}


def protect(application: WSGIApplication) -> WSGIApplication:
    """Wrap a Django application, with the options in ``IDEMPOTENCY_STORE``,
    ``IDEMPOTENCY_SCOPE`` and so on.

    :param application: what ``get_wsgi_application()`` returns.
    :raises ConfigurationError: a setting is missing, unknown or makes no sense.
    """
    names = [name for name in dir(django_settings) if name.startswith(PREFIX)]
    ours = {name: getattr(django_settings, name) for name in names}
    found = settings.read(ours, prefix=PREFIX, upper=True)
    settings.need(found, _NEEDED)
    return IdempotencyMiddleware(application, **found)
