"""An application wrapped without touching its code, as the environment says::

    WSGI_IDEMPOTENCY_APP=shop:app \\
    WSGI_IDEMPOTENCY_DATABASE=postgresql+psycopg://localhost/shop \\
    WSGI_IDEMPOTENCY_SCOPE=by_authorization \\
    gunicorn wsgi_idempotency.auto:application
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from wsgi_idempotency import settings
from wsgi_idempotency.errors import ConfigurationError
from wsgi_idempotency.middleware import IdempotencyMiddleware

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

    application: WSGIApplication

PREFIX = "WSGI_IDEMPOTENCY_"

_APP = f"{PREFIX}APP"
_DATABASE = f"{PREFIX}DATABASE"  # the command's own variable

_NEEDED = {
    "app": f"{_APP} is not set; name the application to protect, such as shop:app",
    "store": f"{_DATABASE} is not set; name the database, such as"
    " postgresql+psycopg://localhost/shop",
    "scope": f"{PREFIX}SCOPE is not set; say whose key it is: by_authorization, by_remote_user,"
    " header:X-Tenant, cookie:session, module:name, or everyone if all clients are one party",
}


def from_environment(environ: Mapping[str, str] = os.environ) -> WSGIApplication:
    """Load the application that ``WSGI_IDEMPOTENCY_APP`` names and wrap it.

    :param environ: the environment variables.
    :raises ConfigurationError: one is missing, unknown or makes no sense.
    """
    found = settings.read(
        # The demo's and the tests' own have nothing to say here.
        {name: text for name, text in environ.items() if not name.startswith(_FOR_OTHERS)},
        prefix=PREFIX,
        upper=True,
        renamed={"store": _DATABASE},
        others=[_APP],
    )
    settings.need({**found, "app": environ.get(_APP)}, _NEEDED)
    return IdempotencyMiddleware(settings.load(_APP, environ[_APP]), **found)


_FOR_OTHERS = (f"{PREFIX}DEMO_", f"{PREFIX}TEST_")

# When the server imports this module, so that it refuses to start rather than to answer, and
# in the module's own namespace, since some servers look nowhere else. Tools that import every
# module have no application to name.
if _APP in os.environ:
    application = from_environment()


def __getattr__(name: str) -> object:
    if name == "application":
        raise ConfigurationError(_NEEDED["app"])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
