"""What clients are to know of an application's use of idempotency keys, from its own
configuration: as a page for people and as OpenAPI.

draft-ietf-httpapi-idempotency-key-header-07, "Responsibilities": a server MUST publish how it
uses idempotency keys, and when they expire.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from werkzeug.datastructures import Headers
from werkzeug.test import create_environ

from wsgi_idempotency import problems, protocol, scope
from wsgi_idempotency.fingerprint import canonical, exact
from wsgi_idempotency.key import places
from wsgi_idempotency.middleware import IdempotencyMiddleware
from wsgi_idempotency.policy import Policy
from wsgi_idempotency.protocol import Action, Outcome
from wsgi_idempotency.records import Lapse
from wsgi_idempotency.urls import PYRAMID_VARIABLE, endpoints, kind_of, middlewares, parts

#: Codes that a client gets with a Retry-After.
RETRY_AFTER = frozenset({"CONFLICT", "COMMIT_UNKNOWN", "STORE_UNAVAILABLE", "TRANSACTION_CONFLICT"})

_OF_TRANSACTIONS = frozenset({"COMMIT_UNKNOWN", "TRANSACTION_CONFLICT", "TRANSACTION_FAILED"})


@dataclass(frozen=True)
class Section:
    """One policy of an application.

    :param where: the rule of its route, behind where the middleware is mounted; None for
        what no route is for.
    :param methods: those it protects.
    :param policy: the policy; None exempts.
    :param middleware: the middleware it is the policy of.
    """

    where: str | None
    methods: tuple[str, ...]
    policy: Policy | None
    middleware: IdempotencyMiddleware


def sections(app: Any) -> list[Section]:
    """Every policy of an application, in the order in which they are looked at."""
    return [
        section
        for mount, middleware in middlewares(app)
        for section in _of_middleware(mount, middleware)
    ]


def _of_middleware(mount: str, middleware: IdempotencyMiddleware) -> Iterator[Section]:
    for route in middleware.routes:
        policy = route.policy
        methods = frozenset(route.methods or (policy.methods if policy is not None else ()))
        if policy is not None:
            methods &= frozenset(policy.methods)
        yield Section(mount + route.rule, tuple(sorted(methods)), policy, middleware)
    policy = middleware.policy
    if policy is not None:
        where = f"{mount}/" if mount else None
        yield Section(where, tuple(sorted(policy.methods)), policy, middleware)


@dataclass(frozen=True)
class Refusal:
    """A problem as this application renders it.

    :param code: its code.
    :param status: the status it is sent with.
    :param retryable: whether the same request may be sent again.
    :param retry_after: whether it comes with a Retry-After.
    :param title: in a few words.
    :param detail: what to do.
    :param content_type: without parameters.
    :param body: an example.
    """

    code: str
    status: int
    retryable: bool
    retry_after: bool
    title: str
    detail: str
    content_type: str
    body: str

    @cached_property
    def example(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError:
            return self.body


def refusals(section: Section) -> list[Refusal]:
    """What a client may be told under a policy, instead of a response of the application's."""
    policy = section.policy
    assert policy is not None
    left_out = set() if policy.transaction else set(_OF_TRANSACTIONS)
    if not policy.required:
        left_out.add("MISSING_KEY")
    if policy.rebuild is None:
        left_out.add("REBUILD_FAILED")
    if policy.fingerprint is None:
        left_out.add("FINGERPRINT_MISMATCH")
    environ = create_environ(method=section.methods[0])
    found = []
    for code in problems.CODES:
        if code in left_out:
            continue
        problem = problems.problem(code, retry_after=1 if code in RETRY_AFTER else None)
        if code == "RESPONSE_NOT_REPLAYABLE":
            problem = replace(problem, extensions={"original_status": 201})
        answer = problems.rendered(section.middleware.render_problem, problem, environ)
        content_type = Headers(answer.headers).get("Content-Type", "")
        found.append(
            Refusal(
                code,
                int(answer.status[:3]),
                problem.retryable,
                code in RETRY_AFTER,
                problem.title,
                problem.detail,
                content_type.partition(";")[0],
                answer.body.decode(errors="replace"),
            )
        )
    return found


# ------------------------------------------------------------------ in words


def markdown(app: Any, *, title: str = "Idempotency keys") -> str:
    """The policies of an application as a page for its clients.

    :param app: the application, as :func:`wsgi_idempotency.lint.lint` takes it.
    :param title: the page's heading.
    :returns: Markdown.
    """
    found = sections(app)
    lines = [
        f"# {title}",
        "",
        "Make a new key for each thing you want to happen once, such as a random UUID. Send the"
        " same key, with the same request, for each retry of it. A retry of what is done gets the"
        " first response again, with `Idempotency-Replayed: true`, and nothing happens twice.",
        "",
    ]
    for section in found:
        lines += _section(section, alone=len(found) == 1)
    return "\n".join(lines)


def _section(section: Section, *, alone: bool) -> list[str]:
    policy = section.policy
    methods = ", ".join(f"`{method}`" for method in section.methods)
    if policy is None:
        where = f"`{section.where}`"
        return [f"## {methods or 'Any method'} {where}", "", "A key has no effect here.", ""]
    if section.where is None:
        heading = f"{methods}{'' if alone else ' on all other paths'}"
    else:
        heading = f"{methods} `{section.where}`"
    if section.where is not None and section.where.endswith("/") and section.where != "/":
        heading += " and below"
    rows = [(name, words(section)) for name, words in _ROWS]
    if policy.on_store_failure == "bypass":
        words = "the request runs, and its response says `Idempotency-Status: unprotected`."
        rows.append(("When keys can't be remembered", words))
    return [
        f"## {heading}",
        "",
        *(f"- **{name}:** {words}" for name, words in rows),
        "",
        "After the request has ended with:",
        "",
        "| outcome | what becomes of the key |",
        "|---|---|",
        *(f"| {outcome} | {fate} |" for outcome, fate in outcomes(policy)),
        "",
        "Errors:",
        "",
        "| code | status | retry | what to do |",
        "|---|---|---|---|",
        *(
            f"| `{one.code}` | {one.status} | {_retry(one)} | {one.detail} |"
            for one in refusals(section)
        ),
        "",
    ]


def _retry(refusal: Refusal) -> str:
    if not refusal.retryable:
        return "no"
    return "yes, after `Retry-After`" if refusal.retry_after else "yes"


def _key(section: Section) -> str:
    found = " or else ".join(_PLACES[kind].format(name) for kind, name in places(_of(section).key))
    return f"{found}; at most {_of(section).max_key_length} bytes."


_PLACES = {
    "header": "the header field `{}`, bare or as a quoted string",
    "form": "the form field `{}`",
    "json": "the JSON member `{}`",
    "other": "what `{}` finds",
}


def _required(section: Section) -> str:
    if _of(section).required:
        return "yes; without a key the request is refused."
    return "no; without a key the request is not protected."


def _whose(section: Section) -> str:
    own = _of(section).scope
    found = section.middleware.scope if own is None else own
    if found is scope.everyone:
        return "of all clients together."
    said = (getattr(found, "__doc__", None) or "").strip().partition("\n\n")[0]
    return " ".join(said.split()) or f"of whom `{name_of(found)}` says."


def name_of(function: object) -> str:
    """What a user's callable is called, for people."""
    return str(getattr(function, "__name__", type(function).__name__))


def _unique(section: Section) -> str:
    if _of(section).namespace == "scope":
        return "one operation, on whatever path; on another one it is refused."
    return "one operation of one method and path; elsewhere it is another key."


def _same(section: Section) -> str:
    fingerprint = _of(section).fingerprint
    if fingerprint is None:
        return "whatever it contains: the key alone identifies it."
    if fingerprint is exact:
        return "method, path, query string, media type and body, byte for byte."
    if fingerprint is canonical:
        return "method, path, query string, media type, and the values of JSON or a form."
    return f"method, path, and what `{name_of(fingerprint)}` makes of it."


def _while_running(section: Section) -> str:
    wait = _of(section).wait_seconds
    first = f"it waits up to {duration(wait)}, then is told" if wait else "it is told at once"
    return f"{first} `CONFLICT`, to come back after `Retry-After`."


def _kept(section: Section) -> str:
    return f"{duration(_of(section).retention_seconds)} from its first use; then it is new again."


def _largest(section: Section) -> str:
    policy = _of(section)
    return (
        f"a request with a key may have a body of {size(policy.max_request_bytes)}. A response of"
        f" more than {size(policy.max_response_bytes)} is not sent again: a retry is told"
        " `RESPONSE_NOT_REPLAYABLE`."
    )


def _of(section: Section) -> Policy:
    assert section.policy is not None
    return section.policy


_ROWS: tuple[tuple[str, Callable[[Section], str]], ...] = (
    ("Where the key is", _key),
    ("Required", _required),
    ("Whose keys they are", _whose),
    ("What a key names", _unique),
    ("Remembered for", _kept),
    ("What makes a retry the same request", _same),
    ("A retry while the first is running", _while_running),
    ("Sizes", _largest),
)

_ACTIONS = {
    Action.STORE: "a retry gets the same response",
    Action.FORGET: "it is free: the request runs again, corrected or not",
    Action.RELEASE: "the same request runs again; another one is refused",
    Action.HOLD: "nothing runs until the service has found out; a retry is told `OUTCOME_UNKNOWN`",
}


def outcomes(policy: Policy) -> list[tuple[str, str]]:
    """What becomes of a key after each outcome: statuses of one fate are one range."""
    ranges: list[tuple[int, int, Action]] = []
    for status in range(200, 600):
        if status in protocol.NEVER_AN_OUTCOME or status in protocol.OF_ONE_RANGE:
            continue
        action = _settled(policy, Outcome(status=status))
        if ranges and ranges[-1][2] is action:
            ranges[-1] = (ranges[-1][0], status, action)
        else:
            ranges.append((status, status, action))
    grouped: dict[Action, list[str]] = {}
    for first, last, action in ranges:
        grouped.setdefault(action, []).append(_range(first, last))
    found = [(", ".join(words), _ACTIONS[action]) for action, words in grouped.items()]
    never = sorted(status for status in protocol.NEVER_AN_OUTCOME if status >= 200)
    found.append((", ".join(map(str, never)), _ACTIONS[Action.FORGET]))
    words = "it is done, and a retry is told `RESPONSE_NOT_REPLAYABLE`"
    found.append((", ".join(map(str, sorted(protocol.OF_ONE_RANGE))), words))
    failed = _settled(policy, Outcome(exception=Exception()))
    found.append(("an error of the service's", _ACTIONS[failed]))
    if not policy.transaction:  # there a worker that dies takes everything with it
        lapsed = Action.HOLD if policy.lapse is Lapse.HOLD else Action.RELEASE
        found.append(("no answer, because the service was interrupted", _ACTIONS[lapsed]))
    return found


def _settled(policy: Policy, outcome: Outcome) -> Action:
    action = protocol.settle(outcome, policy.outcomes)
    return Action.FORGET if policy.transaction and action is not Action.STORE else action


def _range(first: int, last: int) -> str:
    if first % 100 == 0 and last % 100 == 99:
        start, end = f"{first // 100}xx", f"{last // 100}xx"
    else:
        start, end = str(first), str(last)
    return start if start == end else f"{start} to {end}"


def duration(seconds: float) -> str:
    """``24 hours``, ``7 days``, ``1.5 seconds``."""
    for unit, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= 2 * unit and seconds % unit == 0:
            return f"{seconds / unit:g} {name}s"
    return f"{seconds:g} second{'' if seconds == 1 else 's'}"


def size(number: int) -> str:
    """``16 MiB``, ``512 KiB``, ``1000 bytes``."""
    for unit, name in ((1024**2, "MiB"), (1024, "KiB")):
        if number and number % unit == 0:
            return f"{number // unit} {name}"
    return f"{number} byte{'' if number == 1 else 's'}"


# ------------------------------------------------------------------ OpenAPI


def openapi(app: Any, *, title: str = "Idempotency keys") -> dict[str, Any]:
    """The same as a fragment of an OpenAPI 3.1 document, to be merged into your own.

    Each path of the application's URL map that a policy covers is in it, and of an
    application without one, each route's. Below ``components`` are a parameter for each
    header field that a key may be in, and the responses of each status.

    :param app: the application, as :func:`wsgi_idempotency.lint.lint` takes it.
    :param title: the document's.
    :returns: what ``json.dumps`` writes.
    """
    made = _Fragment()
    for path, methods, section in _operations(app):
        for method in methods:
            made.add(path, method, section)
    return made.document(title)


def _operations(app: Any) -> Iterator[tuple[str, Iterable[str], Section]]:
    """Paths in the syntax of OpenAPI, with the methods and the policy they have there."""
    of_policy = {id(section.policy): section for section in sections(app) if section.policy}
    mapped = set()
    for part in parts(app):
        kind = kind_of(part.app)
        if part.middleware is None or kind is None:
            continue
        mapped.add(id(part.middleware))
        for endpoint in endpoints(part):
            for path in endpoint.paths[:1]:
                every = endpoint.methods or part.middleware.protected_methods
                for method in sorted(every):
                    policy, _ = part.middleware.policy_for(method, path)
                    if policy is not None:
                        yield template(endpoint.rule, kind), (method,), of_policy[id(policy)]
    for section in of_policy.values():
        if id(section.middleware) not in mapped and section.where is not None:
            yield template(section.where), section.methods, section


#: ``<int:id>`` of werkzeug and Django, ``{id:\d+}`` and ``*rest`` of Pyramid,
#: ``{id:int}`` of Falcon, ``(?P<id>...)`` of Django.
_VARIABLE = re.compile(rf"\(\?P<(\w+)>[^()]*\)|<(?:[^<>]*:)?(\w+)>|{PYRAMID_VARIABLE}|\*(\w+)$")

#: Bottle has the name in front.
_OF_BOTTLE = re.compile(r"<(\w+):[^<>]*>")


def template(rule: str, kind: str | None = None) -> str:
    """A rule as OpenAPI writes the template of a path.

    :param rule: as the framework writes it.
    :param kind: the framework, as :func:`~wsgi_idempotency.urls.kind_of` names it.
    """
    if kind == "bottle":
        rule = _OF_BOTTLE.sub(r"<\1>", rule)
    rule = _VARIABLE.sub(lambda found: "{%s}" % next(filter(None, found.groups())), rule)  # noqa: UP031
    return re.sub(r"\\Z|[\^$]|\\(?=[/.-])", "", rule)


class _Fragment:
    def __init__(self) -> None:
        self._paths: dict[str, dict[str, Any]] = {}
        self._parameters: dict[str, Any] = {}
        self._responses: dict[str, Any] = {}

    def add(self, path: str, method: str, section: Section) -> None:
        policy = _of(section)
        found = places(policy.key)
        headers = [name for kind, name in found if kind == "header"]
        required = policy.required and len(found) == 1
        variables = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in dict.fromkeys(re.findall(r"{(\w+)}", path))
        ]
        keys = [self._parameter(name, policy, required=required) for name in headers]
        said = [f"{name}: {words(section)}" for name, words in _ROWS]
        self._paths.setdefault(path, {})[method.lower()] = {
            "description": "\n\n".join(["Idempotency:", *said]),
            "parameters": [*variables, *keys],
            "responses": self._responses_of(section),
        }

    def _parameter(self, name: str, policy: Policy, *, required: bool) -> dict[str, str]:
        parameter = {
            "name": name,
            "in": "header",
            "required": required,
            "description": "Names the operation: a new unique value for each, such as a UUID, and"
            " the same value for each retry. A structured-field String (RFC 9651), or bare. At"
            f" most {policy.max_key_length} bytes.",
            "schema": {"type": "string", "minLength": 1},
            "example": '"8e03978e-40d5-43dd-bc93-6894a57f9324"',
        }
        return {"$ref": f"#/components/parameters/{_kept_as(self._parameters, name, parameter)}"}

    def _responses_of(self, section: Section) -> dict[str, Any]:
        by_status: dict[int, list[Refusal]] = {}
        for refusal in refusals(section):
            by_status.setdefault(refusal.status, []).append(refusal)
        return {
            str(status): {"$ref": f"#/components/responses/{self._response(status, some)}"}
            for status, some in sorted(by_status.items())
        }

    def _response(self, status: int, some: list[Refusal]) -> str:
        headers = ["XShouldRetry", "StripeShouldRetry"]
        names = {"XShouldRetry": "X-Should-Retry", "StripeShouldRetry": "Stripe-Should-Retry"}
        if any(one.retry_after for one in some):
            headers.append("RetryAfter")
            names["RetryAfter"] = "Retry-After"
        content: dict[str, Any] = {}
        for one in some:
            schema = {"$ref": "#/components/schemas/Problem"} if _is_problem(one) else {}
            of_type = content.setdefault(one.content_type, {"schema": schema, "examples": {}})
            of_type["examples"][one.code] = {"summary": one.title, "value": one.example}
        response = {
            "description": " ".join(f"{one.code}: {one.detail}" for one in some),
            "headers": {names[name]: {"$ref": f"#/components/headers/{name}"} for name in headers},
            "content": content,
        }
        return _kept_as(self._responses, f"Idempotency{status}", response)

    def document(self, title: str) -> dict[str, Any]:
        return {
            "openapi": "3.1.0",
            "info": {"title": title, "version": "1"},
            "paths": self._paths,
            "components": {
                "parameters": self._parameters,
                "responses": self._responses,
                "headers": _HEADERS,
                "schemas": {"Problem": _PROBLEM},
            },
        }


def _kept_as(kept: dict[str, Any], name: str, value: Any) -> str:
    """The name of a component: a second of the name that is another gets a number."""
    name = re.sub(r"[^A-Za-z0-9._-]", "", name)
    number = 1
    while kept.setdefault(chosen := name if number == 1 else f"{name}-{number}", value) != value:
        number += 1
    return chosen


def _is_problem(refusal: Refusal) -> bool:
    return refusal.content_type == "application/problem+json"


_HEADERS = {
    "IdempotencyReplayed": {
        "description": "This is the response of the first request with the key, sent again.",
        "schema": {"const": "true"},
    },
    "XShouldRetry": {
        "description": "Whether the same request may be sent again.",
        "schema": {"enum": ["true", "false"]},
    },
    "StripeShouldRetry": {
        "description": "The same, for SDKs that look here.",
        "schema": {"enum": ["true", "false"]},
    },
    "RetryAfter": {
        "description": "Seconds after which to send the same request again.",
        "schema": {"type": "integer", "minimum": 1, "maximum": 5},
    },
}

_PROBLEM = {
    "description": "Problem details (RFC 9457).",
    "type": "object",
    "required": ["type", "title", "status", "detail", "code", "retryable"],
    "properties": {
        "type": {"type": "string", "format": "uri"},
        "title": {"type": "string"},
        "status": {"type": "integer", "minimum": 400, "maximum": 599},
        "detail": {"type": "string", "description": "What to do next."},
        "code": {"enum": list(problems.CODES)},
        "retryable": {"type": "boolean"},
        "original_status": {"type": "integer", "description": "Of RESPONSE_NOT_REPLAYABLE."},
    },
}
