"""PasteDeploy: a filter, for the ini files of Pyramid's ``pserve`` and others::

    [filter:idempotency]
    use = egg:wsgi-idempotency
    store = postgresql+psycopg://localhost/shop
    scope = by_authorization

The options are those of the middleware, written as :mod:`wsgi_idempotency.settings` reads them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsgi_idempotency import settings
from wsgi_idempotency.middleware import IdempotencyMiddleware

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

_NEEDED = {
    "store": "the filter has no store; add a line such as"
    " store = postgresql+psycopg://localhost/shop",
    "scope": "the filter has no scope; add a line that says whose key it is, such as"
    " scope = by_authorization",
}


def filter_app_factory(
    app: WSGIApplication, global_conf: dict[str, str], **local_conf: str
) -> WSGIApplication:
    """Wrap an application, as a ``paste.filter_app_factory``.

    :param app: the next application of the pipeline.
    :param global_conf: the section ``DEFAULT``; nothing of it is used.
    :param local_conf: the options in the filter's section.
    :raises ConfigurationError: one is missing, unknown or makes no sense.
    """
    found = settings.read(local_conf, prefix="")
    settings.need(found, _NEEDED)
    return IdempotencyMiddleware(app, **found)
