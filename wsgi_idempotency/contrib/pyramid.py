"""Pyramid: ``config.include("wsgi_idempotency.contrib.pyramid")``, with the options in the
settings ``idempotency.store``, ``idempotency.scope`` and so on.

It wraps the application's execution policy, which is around everything: tweens, exception
views, response callbacks and ``NewResponse`` subscribers, and pyramid_retry. A tween would
record the response before the callbacks have changed it, and replay something else than
what was sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyramid.events import ApplicationCreated
from pyramid.interfaces import IExecutionPolicy
from pyramid.router import default_execution_policy

from wsgi_idempotency import settings
from wsgi_idempotency.contrib.head import head_of
from wsgi_idempotency.errors import ConfigurationError
from wsgi_idempotency.middleware import IdempotencyMiddleware

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

PREFIX = "idempotency."

#: What ``idempotency.scope`` says to have the user that the security policy finds.
AUTHENTICATED_USERID = "authenticated_userid"

_NEEDED = {
    "store": "idempotency.store is not in the settings; set it to a database URL such as"
    " postgresql+psycopg://localhost/shop",
    "scope": "idempotency.scope is not in the settings; say whose key it is, such as"
    f" by_authorization or {AUTHENTICATED_USERID}",
}


def includeme(config: Any) -> None:
    """Protect the application that ``config`` makes.

    :raises ConfigurationError: a setting is missing, unknown or makes no sense.
    """
    protected = _Protected(config.registry.settings)
    config.add_subscriber(protected.created, ApplicationCreated)

    def register() -> None:
        registry = config.registry
        protected.inner = registry.queryUtility(IExecutionPolicy, default=protected.inner)
        registry.registerUtility(protected, IExecutionPolicy)

    # After all others, so that a policy which is set later is wrapped as well.
    config.action("wsgi_idempotency", register, order=10_000)


class _Protected:
    """An execution policy whose response is the middleware, a WSGI application as any."""

    def __init__(self, of_application: dict[str, Any]) -> None:
        ours = {name: value for name, value in of_application.items() if name.startswith(PREFIX)}
        if ours.get(f"{PREFIX}scope") == AUTHENTICATED_USERID:
            ours[f"{PREFIX}scope"] = self._authenticated_userid
        found = settings.read(ours, prefix=PREFIX)
        settings.need(found, _NEEDED)
        self.inner: Any = default_execution_policy
        self.middleware = IdempotencyMiddleware(self._run, **found)
        self._router: Any = None

    def created(self, event: Any) -> None:
        """:raises ConfigurationError: the application would run without us."""
        self._router = event.app
        if event.app.execution_policy is not self:
            raise ConfigurationError(
                "another execution policy was set after wsgi_idempotency.contrib.pyramid was"
                " committed; include ours last"
            )

    def __call__(self, environ: WSGIEnvironment, router: object) -> WSGIApplication:
        return self.middleware

    def _run(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        response: WSGIApplication = self.inner(environ, self._router)
        return response(environ, start_response)

    def _authenticated_userid(self, environ: WSGIEnvironment) -> str | None:
        with self._router.request_context(head_of(environ)) as request:
            try:
                userid = request.authenticated_userid
            finally:
                self._router.finish_request(request)
        return None if userid is None else f"user:{userid}"
