"""Which URLs of an application no policy covers."""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from wsgi_idempotency.middleware import IdempotencyMiddleware
from wsgi_idempotency.urls import Endpoint, endpoints, kind_of, parts

#: Methods that are not idempotent by themselves (RFC 9110 section 9.2.2; RFC 5789).
UNSAFE = ("PATCH", "POST")


class Verdict(enum.Enum):
    """What was found of a URL."""

    PROTECTED = "protected"
    EXEMPT = "exempt"
    OPTIONAL = "optional"
    PARTLY = "partly"
    UNKNOWN = "unknown"
    UNCOVERED = "uncovered"


#: What an operator has not decided.
FINDINGS = frozenset({Verdict.PARTLY, Verdict.UNKNOWN, Verdict.UNCOVERED})


@dataclass(frozen=True)
class Finding:
    """One method at one rule of the URL map.

    :param rule: as the framework writes it.
    :param name: of what answers there.
    :param verdict: what was found.
    :param found: the same for people.
    """

    method: str
    rule: str
    name: str
    verdict: Verdict
    found: str


def knows(app: Any) -> bool:
    """Whether there is a URL map in the application that can be walked."""
    return any(kind_of(part.app) is not None for part in parts(app))


def lint(app: Any, methods: Collection[str] = UNSAFE) -> list[Finding]:
    """Walk the URL map of an application, and look which policy each URL has.

    The middleware itself is asked, for paths that match the rule.

    :param app: a Flask, Pyramid, Django, Bottle or Falcon application, or another whose
        ``url_map`` is werkzeug's, wrapped or not.
    :param methods: those that need protection, besides the ones that policies are for.
    :returns: what was found, in the order of the URL map.
    """
    return [
        finding
        for part in parts(app)
        if kind_of(part.app) is not None
        for endpoint in endpoints(part)
        for finding in _look(endpoint, part.middleware, methods)
    ]


def _look(
    endpoint: Endpoint, middleware: IdempotencyMiddleware | None, methods: Collection[str]
) -> Iterator[Finding]:
    wanted = frozenset(method.upper() for method in methods)
    if middleware is not None:
        wanted |= middleware.protected_methods
    for method in sorted(wanted if endpoint.methods is None else wanted & endpoint.methods):
        verdict, found = _verdict(endpoint, middleware, method)
        yield Finding(method, endpoint.rule, endpoint.name, verdict, found)


def _verdict(
    endpoint: Endpoint, middleware: IdempotencyMiddleware | None, method: str
) -> tuple[Verdict, str]:
    if middleware is None:
        return Verdict.UNCOVERED, "there is no IdempotencyMiddleware around it"
    decisions = {path: middleware.policy_for(method, path) for path in endpoint.paths}
    if not decisions:
        return Verdict.UNKNOWN, "no path was found that this rule matches; look for yourself"
    uncovered = [path for path, (policy, exempt) in decisions.items() if not (policy or exempt)]
    if len(uncovered) == len(decisions):
        return Verdict.UNCOVERED, "no policy covers it"
    if uncovered:
        return Verdict.PARTLY, f"covered only in part: not {uncovered[0]}"
    policies = [policy for policy, _ in decisions.values()]
    if any(policy is not None and not policy.required for policy in policies):
        return Verdict.OPTIONAL, "a request without a key runs unprotected (required=False)"
    if any(policies):
        return Verdict.PROTECTED, "protected; a request without a key is refused"
    return Verdict.EXEMPT, "exempt by a route"
