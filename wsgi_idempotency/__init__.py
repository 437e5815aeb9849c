"""Make a retried HTTP request safe: WSGI middleware for the Idempotency-Key header."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wsgi_idempotency import problems
from wsgi_idempotency.errors import IdempotencyError
from wsgi_idempotency.events import Event
from wsgi_idempotency.fingerprint import canonical, exact
from wsgi_idempotency.key import first_of, form_field, header, json_field, new_key
from wsgi_idempotency.middleware import IdempotencyMiddleware
from wsgi_idempotency.operation import Operation, current_operation
from wsgi_idempotency.policy import Policy, Route
from wsgi_idempotency.problems import Problem
from wsgi_idempotency.protocol import (
    FORGET,
    HOLD,
    RELEASE,
    STORE,
    Action,
    Outcome,
    hold_unknown,
    store_everything,
    store_success,
)
from wsgi_idempotency.scope import (
    by_authorization,
    by_cookie,
    by_header,
    by_remote_user,
    everyone,
)

if TYPE_CHECKING:
    from wsgi_idempotency.reconciler import Completed, NotExecuted, Reconciler, StillUnknown
    from wsgi_idempotency.stores.memory import MemoryStore
    from wsgi_idempotency.stores.sql import SQLStore

__all__ = [
    "FORGET",
    "HOLD",
    "RELEASE",
    "STORE",
    "Action",
    "Completed",
    "Event",
    "IdempotencyError",
    "IdempotencyMiddleware",
    "MemoryStore",
    "NotExecuted",
    "Operation",
    "Outcome",
    "Policy",
    "Problem",
    "Reconciler",
    "Route",
    "SQLStore",
    "StillUnknown",
    "by_authorization",
    "by_cookie",
    "by_header",
    "by_remote_user",
    "canonical",
    "current_operation",
    "everyone",
    "exact",
    "first_of",
    "form_field",
    "header",
    "hold_unknown",
    "json_field",
    "new_key",
    "problems",
    "store_everything",
    "store_success",
]

# SQLAlchemy takes longer to import than all the rest, and MemoryStore does without.
_LAZY = {
    "Completed": "wsgi_idempotency.reconciler",
    "MemoryStore": "wsgi_idempotency.stores.memory",
    "NotExecuted": "wsgi_idempotency.reconciler",
    "Reconciler": "wsgi_idempotency.reconciler",
    "SQLStore": "wsgi_idempotency.stores.sql",
    "StillUnknown": "wsgi_idempotency.reconciler",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
