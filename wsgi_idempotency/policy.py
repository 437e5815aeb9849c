"""What the operator decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, cast, get_args

from wsgi_idempotency.errors import ConfigurationError
from wsgi_idempotency.fingerprint import Fingerprint, exact
from wsgi_idempotency.headers import never_replayable
from wsgi_idempotency.key import KeyCallable, header, is_token
from wsgi_idempotency.protocol import Action, Outcome, Outcomes, store_success
from wsgi_idempotency.records import Lapse

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

    from wsgi_idempotency.operation import Operation

Seconds = float | timedelta
ScopeCallable = Callable[..., "str | None"]  # Flask's extension takes some without parameters

IsolationLevel = Literal["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
ISOLATION_LEVELS = get_args(IsolationLevel)
Durability = Literal["synchronous", "asynchronous"]

_LONGEST = 100 * 365 * 86400.0  # seconds; a century


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How the operations of an application, or of one route, are protected.

    Durations are seconds (int or float) or :class:`datetime.timedelta`.

    :param methods: the request methods protected, in any case; others pass through.
    :param key: where the key is: :func:`header`, :func:`form_field`, :func:`json_field`,
        :func:`first_of`, or a callable ``(environ, body) -> str or None``.
    :param scope: whose key it is, where that is found otherwise than in the rest of the
        application, ``(environ) -> str or None``; None takes the middleware's. Requests
        that two scopes give one text are of one client: let each begin with a word of its
        own, as ours do.
    :param required: refuse a request without a key instead of passing it through.
    :param max_key_length: bytes.
    :param namespace: ``"endpoint"``: a key is unique per scope, method and full path;
        ``"scope"``: per scope, so that another endpoint is refused as a mismatch.
    :param fingerprint: what makes two requests the same: :func:`exact`,
        :func:`canonical`, a callable ``(environ, body) -> bytes``, or None when the key
        alone identifies the operation, as for webhooks.
    :param retention: how long an operation is remembered, from its claim, on the
        database's clock.
    :param lease: how long a claim outlives its last heartbeat.
    :param wait: how long a duplicate waits for the one in flight.
    :param outcomes: what becomes of an operation, ``(Outcome) -> Action``.
    :param transaction: exactly once, with the application's own writes: what it writes on
        ``current_operation.connection`` and the response are committed together. There is
        no lease and no lapse, and any outcome but STORE rolls everything back.
    :param isolation_level: of that transaction: ``"READ COMMITTED"``, ``"REPEATABLE READ"``
        or ``"SERIALIZABLE"`` (PostgreSQL documentation, 13.2); None for the database's
        default.
    :param claim_durability: ``"synchronous"``: the claim is on the disk before the handler
        runs. ``"asynchronous"``, on PostgreSQL: it need not be, which saves one of a fresh
        key's two waits for the disk. A crash of the database may then forget a claim in
        flight, though never one whose operation has committed anything in the same cluster
        since (PostgreSQL documentation, 30.4). For calls to other systems rely on
        ``derive_key``.
    :param max_request_bytes: a larger request body is refused with 413.
    :param max_response_bytes: a larger response is sent in full and remembered as done
        but not replayable.
    :param max_step_bytes: the largest result of a step, in bytes of JSON; a larger one is an
        error, raised once the step's function has run.
    :param rebuild: makes the response of an operation whose guarded effects are committed and
        whose response was lost: ``(operation) -> WSGI application``, such as a response of
        werkzeug's or Flask's. What it answers is recorded and replayed. None refuses such a retry
        with 409 ``RESPONSE_NOT_REPLAYABLE``.
    :param replay_headers: names of fields that are replayed although filtered by
        default, such as ``Set-Cookie``.
    :param on_store_failure: what happens when the store can't be reached before the
        handler ran: ``"refuse"`` answers 503, ``"bypass"`` runs it unprotected.
    :raises ConfigurationError: a value makes no sense; the message says what would.
    """

    methods: Collection[str] = ("POST", "PATCH")  # the rest is idempotent by RFC 9110, 9.2.2
    key: KeyCallable = field(default_factory=lambda: header("Idempotency-Key"))
    scope: ScopeCallable | None = None
    required: bool = False  # so that clients can be moved over one by one
    max_key_length: int = 256  # bytes; a UUID has 36
    namespace: Literal["endpoint", "scope"] = "endpoint"
    fingerprint: Fingerprint | None = exact
    retention: Seconds = timedelta(hours=24)  # longer than clients go on retrying
    lease: Seconds = 60.0  # seconds; twice gunicorn's time-out for a dead worker
    wait: Seconds = 0.0  # seconds; a waiting duplicate occupies a worker
    outcomes: Outcomes = store_success
    transaction: bool = False
    isolation_level: IsolationLevel | None = None
    claim_durability: Durability = "synchronous"
    max_request_bytes: int = 16 * 1024 * 1024
    max_response_bytes: int = 4 * 1024 * 1024
    max_step_bytes: int = 64 * 1024  # what a later step needs to know, not a document
    rebuild: Callable[[Operation], WSGIApplication] | None = None
    replay_headers: Collection[str] = ()
    on_store_failure: Literal["refuse", "bypass"] = "refuse"

    #: What ``outcomes`` says of a lapse, recorded with every claim. HOLD in a transaction:
    #: nobody sees such a claim, unless the application has committed it by itself.
    lapse: Lapse = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._set("methods", frozenset(_names("methods", self.methods, str.upper)))
        if not self.methods:
            raise ConfigurationError('methods is empty; name at least one, such as "POST"')
        self._set(
            "replay_headers", frozenset(_names("replay_headers", self.replay_headers, str.lower))
        )
        for name in self.replay_headers:
            if never_replayable(name):
                raise ConfigurationError(
                    f"replay_headers has {name!r}, which belongs to one message or connection"
                    " and can't be replayed; remove it"
                )
        for name in ("required", "transaction"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigurationError(f"{name} is {getattr(self, name)!r}; use True or False")
        if not callable(self.key):
            raise ConfigurationError(
                'key is not callable; use header("Idempotency-Key") or (environ, body) -> str'
            )
        if self.scope is not None and not callable(self.scope):
            raise ConfigurationError(
                f"scope is {self.scope!r}, which can't be called; use by_authorization or"
                " (environ) -> str"
            )
        if self.rebuild is not None and not callable(self.rebuild):
            raise ConfigurationError(
                "rebuild is not callable; use (operation) -> WSGI application, or None"
            )
        if self.rebuild is not None and self.transaction:
            raise ConfigurationError(
                "rebuild makes lost responses, and with transaction=True none is lost: use one or"
                " the other"
            )
        if self.fingerprint is not None and not callable(self.fingerprint):
            raise ConfigurationError("fingerprint is not callable; use exact, canonical or None")
        if self.namespace not in ("endpoint", "scope"):
            raise ConfigurationError(f'namespace is {self.namespace!r}; use "endpoint" or "scope"')
        if self.fingerprint is None and self.namespace == "scope":
            raise ConfigurationError(
                'fingerprint=None with namespace="scope" would replay one endpoint\'s response'
                ' on another; use namespace="endpoint" or a fingerprint'
            )
        if self.on_store_failure not in ("refuse", "bypass"):
            raise ConfigurationError(
                f'on_store_failure is {self.on_store_failure!r}; use "refuse" or "bypass"'
            )
        if self.isolation_level is not None and self.isolation_level not in ISOLATION_LEVELS:
            raise ConfigurationError(
                f"isolation_level is {self.isolation_level!r}; use one of"
                f" {', '.join(ISOLATION_LEVELS)}"
            )
        if self.isolation_level is not None and not self.transaction:
            raise ConfigurationError(
                "isolation_level is the transaction's; give transaction=True with it"
            )
        if self.claim_durability not in get_args(Durability):
            raise ConfigurationError(
                f'claim_durability is {self.claim_durability!r}; use "synchronous" or'
                ' "asynchronous"'
            )
        if self.transaction and self.claim_durability == "asynchronous":
            raise ConfigurationError(
                "transaction=True commits the claim with the response and what the application"
                ' wrote, in one commit; leave claim_durability="asynchronous" out of it'
            )
        if self.transaction and self.on_store_failure == "bypass":
            raise ConfigurationError(
                'on_store_failure="bypass" would run the application without the transaction it'
                ' writes in; use "refuse" with transaction=True'
            )
        for name, least in (
            ("max_key_length", 1),
            ("max_request_bytes", 0),
            ("max_response_bytes", 0),
            ("max_step_bytes", 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigurationError(
                    f"{name} is {value!r}; use a whole number of at least {least}"
                )
        self._set("lease", in_seconds("lease", self.lease, 1.0))
        self._set("retention", in_seconds("retention", self.retention, self.lease_seconds))
        self._set("wait", in_seconds("wait", self.wait, 0.0))
        lapse = self._lapse_of_outcomes()
        self._set("lapse", Lapse.HOLD if self.transaction else lapse)

    @property
    def lease_seconds(self) -> float:
        """The lease in seconds."""
        return cast(float, self.lease)

    @property
    def retention_seconds(self) -> float:
        """The retention in seconds."""
        return cast(float, self.retention)

    @property
    def wait_seconds(self) -> float:
        """The longest wait in seconds."""
        return cast(float, self.wait)

    def _lapse_of_outcomes(self) -> Lapse:
        if not callable(self.outcomes):
            raise ConfigurationError(
                "outcomes is not callable; use store_success or (Outcome) -> Action"
            )
        try:
            action = self.outcomes(Outcome(lapsed=True))
        except Exception as exc:
            raise ConfigurationError(
                "outcomes failed on a lapse, which has neither status nor exception"
                f" ({type(exc).__name__}: {exc}); return RELEASE or HOLD for it"
            ) from exc
        if action is Action.RELEASE:
            return Lapse.RELEASE
        if action is Action.HOLD:
            return Lapse.HOLD
        raise ConfigurationError(
            f"outcomes says {action!r} of a lapse, when nobody knows what happened;"
            " return RELEASE to let a retry run it again or HOLD to let nobody"
        )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Route:
    """The policy of some of an application's URLs.

    The first route that matches counts, with all its policy says: a request whose method that
    policy doesn't protect passes through, whatever the routes after it and the default
    policy say of it. ``methods`` lets a route pass over a request instead.

    :param rule: a :class:`werkzeug.routing.Rule` string, such as ``"/orders/<int:id>/pay"``,
        matched on PATH_INFO.
    :param policy: the policy there; None exempts them.
    :param methods: the methods the route is for; None means all.
    :raises ConfigurationError: the rule is not one, or among the methods is one that the
        policy doesn't protect.
    """

    rule: str
    policy: Policy | None
    methods: Collection[str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rule, str) or not self.rule.startswith("/"):
            raise ConfigurationError(f"the rule {self.rule!r} does not start with a slash")
        if self.policy is not None and not isinstance(self.policy, Policy):
            raise ConfigurationError(
                f"the policy of {self.rule} is {self.policy!r}; use a Policy, or None to exempt it"
            )
        if self.methods is None:
            return
        methods = frozenset(_names("methods", self.methods, str.upper))
        object.__setattr__(self, "methods", methods)
        if self.policy is not None and (passing := methods - frozenset(self.policy.methods)):
            raise ConfigurationError(
                f"the route {self.rule} is for {', '.join(sorted(methods))}, of which its policy"
                f" does not protect {', '.join(sorted(passing))}; give the policy the same methods"
            )


def _names(option: str, names: object, case: Callable[[str], str]) -> list[str]:
    if isinstance(names, str) or not isinstance(names, Collection):
        raise ConfigurationError(f"{option} is {names!r}; use a list or tuple of names")
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ConfigurationError(f"{option} has {name!r}; use names")
        # RFC 9110 sections 9.1 and 5.1: both methods and field names are tokens. One that no
        # message can have would protect less than its author believes.
        if not is_token(name.strip()):
            raise ConfigurationError(
                f"{option} has {name!r}, which can't be a name; use ones like "
                + ("POST" if option == "methods" else "Set-Cookie")
            )
    return [case(name.strip()) for name in names]


def in_seconds(option: str, value: object, least: float) -> float:
    """An option's duration in seconds.

    :param option: its name, for the error.
    :param value: seconds or a timedelta.
    :param least: seconds; a century is the most.
    :raises ConfigurationError: it is no duration, or out of these bounds.
    """
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigurationError(f"{option} is {value!r}; use seconds or a timedelta")
    if not least <= value <= _LONGEST:
        raise ConfigurationError(
            f"{option} is {value:g} s; use at least {least:g} s and at most a century"
        )
    return float(value)
