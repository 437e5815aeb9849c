"""How a shop whose URL map is linted is protected: a policy for some URLs, none for the rest."""

from __future__ import annotations

from typing import Any

from wsgi_idempotency import IdempotencyMiddleware, Policy, Route, everyone

STRICT = Policy(required=True)

ROUTES = [
    Route("/charges", STRICT),
    Route("/orders/<int:number>", STRICT),
    Route("/texts/<int:number>", STRICT),
    Route("/free", None),
    Route("/files/<path:rest>", Policy()),
    Route("/hooks/known", STRICT),
]


def protect(app: Any, **options: Any) -> IdempotencyMiddleware:
    options = {"policy": None, "routes": ROUTES, **options}
    return IdempotencyMiddleware(app, "memory:", scope=everyone, **options)


def never(*arguments: object, **named: object) -> Any:
    """A view that is only looked at."""
    raise AssertionError("whoever reads a URL map calls no view")
