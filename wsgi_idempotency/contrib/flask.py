"""Flask: an extension, configured in ``app.config``, with a scope that knows the user."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from flask import Flask

from wsgi_idempotency import settings
from wsgi_idempotency.contrib.head import head_of
from wsgi_idempotency.errors import ConfigurationError
from wsgi_idempotency.middleware import IdempotencyMiddleware
from wsgi_idempotency.policy import Policy, Route
from wsgi_idempotency.scope import Scope

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment
    from sqlalchemy import Engine

    from wsgi_idempotency.events import Observer
    from wsgi_idempotency.problems import Renderer
    from wsgi_idempotency.stores.base import Store

PREFIX = "IDEMPOTENCY_"

_NEEDED = {
    "store": "no store is given; pass one to Idempotency() or set IDEMPOTENCY_STORE, to one like"
    " postgresql+psycopg://localhost/shop",
    "scope": "no scope is given; pass one to Idempotency() or set IDEMPOTENCY_SCOPE, to say whose"
    " key it is: by_authorization, or lambda: current_user.get_id()",
}


class _Unset(Enum):
    UNSET = "what the configuration says"


UNSET = _Unset.UNSET


class Idempotency:
    """Wraps ``app.wsgi_app`` in :class:`~wsgi_idempotency.IdempotencyMiddleware`.

    What is not given here is looked up in ``app.config``, in ``IDEMPOTENCY_STORE``,
    ``IDEMPOTENCY_SCOPE`` and so on, when the application is initialised.

    :param app: the application, or None to call :meth:`init_app` later.
    :param store: as the middleware takes it.
    :param scope: whose key it is: ``(environ) -> str``, or a callable without parameters,
        which is called in a request context, so that ``current_user``, ``session``, ``g``
        and ``request`` can be used. It can't read the request's body.
        So may the scope of a policy, here and in ``routes``.
    :param policy: as the middleware takes it, and so are ``routes``, ``on_event``,
        ``render_problem``, ``max_waiting`` and ``secret``.
    :raises ConfigurationError: an option is missing or makes no sense.
    """

    def __init__(
        self,
        app: Flask | None = None,
        store: str | Engine | Store | None = None,
        *,
        scope: Scope | Callable[[], str | None] | None = None,
        policy: Policy | _Unset | None = UNSET,
        routes: Sequence[Route] | _Unset = UNSET,
        on_event: Observer | Iterable[Observer] | _Unset = UNSET,
        render_problem: Renderer | _Unset = UNSET,
        max_waiting: int | _Unset = UNSET,
        secret: bytes | str | None = None,
    ) -> None:
        options = {
            "policy": policy,
            "routes": routes,
            "on_event": on_event,
            "render_problem": render_problem,
            "max_waiting": max_waiting,
        }
        self._given: dict[str, Any] = {
            **{name: value for name, value in options.items() if value is not UNSET},
            **_given(store=store, scope=scope, secret=secret),
        }
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask, store: str | Engine | Store | None = None) -> None:
        """Protect an application.

        :param store: instead of the one that was given before.
        :raises ConfigurationError: an option is missing or makes no sense, or the
            application is protected already.
        """
        if "idempotency" in app.extensions:
            raise ConfigurationError(f"{app!r} is protected already; call init_app() once")
        found = settings.read(app.config, prefix=PREFIX, upper=True)
        options = {**found, **self._given, **_given(store=store)}
        settings.need(options, _NEEDED)
        scope, store = in_context(app, options.pop("scope")), options.pop("store")
        if "policy" in options:
            options["policy"] = _policy_in_context(app, options["policy"])
        if isinstance(options.get("routes"), Iterable):
            options["routes"] = [_route_in_context(app, route) for route in options["routes"]]
        middleware = IdempotencyMiddleware(app.wsgi_app, store, scope=scope, **options)
        app.wsgi_app = middleware  # type: ignore[method-assign]
        app.extensions["idempotency"] = middleware


def _given(**options: object) -> dict[str, object]:
    return {name: value for name, value in options.items() if value is not None}


def _policy_in_context(app: Flask, policy: Any) -> Any:
    if not isinstance(policy, Policy) or policy.scope is None:
        return policy
    return replace(policy, scope=in_context(app, policy.scope))


def _route_in_context(app: Flask, route: Any) -> Any:
    if not isinstance(route, Route):
        return route  # the middleware says what is wrong with it
    return replace(route, policy=_policy_in_context(app, route.policy))


def in_context(app: Flask, scope: Callable[..., str | None]) -> Scope:
    """A scope without parameters, as the middleware calls one: with the request's environ.

    The callable runs in a request context of its own, as a view would: with the session
    that the cookies name, and the URL matched. No ``before_request`` function is called,
    no session is saved, and teardown functions are.

    :param scope: returned as it is if it takes the environ.
    :raises ConfigurationError: it takes something else.
    """
    if not callable(scope) or _accepts(scope, 1):
        return scope
    if not _accepts(scope, 0):
        raise ConfigurationError(
            f"scope is {scope!r}; use a callable without parameters, or one that takes the environ"
        )

    def scope_in_context(environ: WSGIEnvironment) -> str | None:
        with app.request_context(head_of(environ)):
            return scope()

    scope_in_context.__doc__ = scope.__doc__
    scope_in_context.__name__ = getattr(scope, "__name__", type(scope).__name__)
    return scope_in_context


def _accepts(function: Callable[..., object], arguments: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * arguments)
    except TypeError:
        return False
    except ValueError:
        return arguments == 1  # it has no signature to look at, and is called as the core would
    return True
