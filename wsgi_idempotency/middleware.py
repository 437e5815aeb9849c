"""The way of one request, top to bottom.

``__call__`` lets pass what no policy covers. ``_Request.answer`` finds the key, whose it
is, the body and the claim; ``_Execution.run`` runs the handler under the claim, and
``_Transacted.run`` in a transaction. Every rule they apply is a function of another file.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

from werkzeug.exceptions import HTTPException
from werkzeug.routing import Map, RequestRedirect, Rule

from wsgi_idempotency import fingerprint, forks, key, problems, protocol, scope
from wsgi_idempotency.body import Body
from wsgi_idempotency.capture import (
    TOO_LARGE,
    Capture,
    EventStream,
    Headers,
    Passing,
    Whole,
    play,
)
from wsgi_idempotency.errors import (
    AnswerLost,
    BodyError,
    BodyTooLarge,
    CommitUnknown,
    ConfigurationError,
    Disconnected,
    IncompleteBody,
    InvalidKey,
    LengthRequired,
    NotStorable,
    StoreError,
    StoreUnavailable,
    TransactionConflict,
    TransactionFailed,
)
from wsgi_idempotency.events import Event, Observer, Observers
from wsgi_idempotency.headers import replayable, sendable, unsendable
from wsgi_idempotency.lease import Heartbeat
from wsgi_idempotency.operation import ENVIRON_KEY, Operation, running
from wsgi_idempotency.policy import Policy, Route
from wsgi_idempotency.problems import Problem, Renderer, problem
from wsgi_idempotency.protocol import Action, Outcome
from wsgi_idempotency.records import Claim, Claimed, Completion, Record, StoredResponse
from wsgi_idempotency.stores import open_store
from wsgi_idempotency.stores.base import AsynchronousStore, TransactionalStore

if TYPE_CHECKING:
    from _typeshed import OptExcInfo
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy import Engine

    from wsgi_idempotency.stores.base import Store, Transaction

logger = logging.getLogger("wsgi_idempotency")

_T = TypeVar("_T")

#: Seconds between two looks of a waiting duplicate: well under the 100 ms within which
#: it is to replay, and with ``max_waiting`` of 8 about 200 index look-ups a second.
_LOOK_EVERY = 0.04

#: How often a request may be told that a key is free and then find it taken, with no time
#: between: against others that are as fast once or twice is much, and a store that keeps
#: saying so contradicts itself.
_RACES = 50

#: Statuses a client must not retry although SDKs would: on a replay the same comes again.
_RETRIED_BY_SDKS = frozenset({408, 409, 429})


class IdempotencyMiddleware:
    """Runs each operation named by an idempotency key once, and replays its response.

    :param app: the WSGI application.
    :param store: where records live: ``"postgresql+psycopg://..."``, ``"sqlite:///..."``,
        ``"memory:"``, an :class:`sqlalchemy.Engine`, or a
        :class:`~wsgi_idempotency.stores.base.Store`.
    :param scope: whose key it is, ``(environ) -> str``. None or an exception refuses the
        request. ``everyone`` is for applications whose clients are one party. A policy may
        have a scope of its own.
    :param policy: how operations are protected; None protects only the routes.
    :param routes: policies of single routes; the first that matches counts.
    :param on_event: observers, ``(Event) -> None``; what they raise is logged.
    :param render_problem: how refusals look, ``(Problem, environ) -> WSGI application``.
    :param max_waiting: duplicates that wait at once in a process; more get 409 at once.
    :param secret: keys the digests with HMAC, so that who reads the table can't guess
        what they were made of; at least 16 bytes, the same on every host, kept for as
        long as the retention.
    :raises ConfigurationError: an option makes no sense; the message says what would.

    Nothing is connected at construction. The way of a request is in
    draft-ietf-httpapi-idempotency-key-header-07, section 2.
    """

    def __init__(
        self,
        app: WSGIApplication,
        store: str | Engine | Store,
        *,
        scope: Callable[[WSGIEnvironment], str | None],
        policy: Policy | None = Policy(),  # noqa: B008  frozen
        routes: Sequence[Route] = (),
        on_event: Observer | Iterable[Observer] = (),
        render_problem: Renderer = problems.rfc9457,
        max_waiting: int = 8,  # a waiting duplicate occupies a worker thread
        secret: bytes | str | None = None,
    ) -> None:
        for name, value in (("app", app), ("scope", scope), ("render_problem", render_problem)):
            if not callable(value):
                raise ConfigurationError(f"{name} is {value!r}, which can't be called")
        if policy is not None and not isinstance(policy, Policy):
            raise ConfigurationError(
                f"policy is {policy!r}; use a Policy, or None for routes alone"
            )
        if isinstance(max_waiting, bool) or not isinstance(max_waiting, int) or max_waiting < 0:
            raise ConfigurationError(f"max_waiting is {max_waiting!r}; use a whole number from 0")
        self.app = app
        self.store = open_store(store)
        self.scope = scope
        self.policy = policy
        self.observers = Observers(on_event)
        self.render_problem = render_problem
        self.secret = _secret(secret)
        self.heartbeat = Heartbeat(self.store, self._lost)
        self._max_waiting = max_waiting
        self.forget_parent()
        _middlewares.add(self)
        if not isinstance(routes, Iterable):
            raise ConfigurationError(f"routes is {routes!r}; use a list of Route(rule, policy)")
        routes = tuple(routes)
        for route in routes:
            if not isinstance(route, Route):
                raise ConfigurationError(f"routes has {route!r}; use Route(rule, policy)")
        self.routes = routes
        self._routes = [(_matcher(route), route.policy, route.rule) for route in routes]
        policies = [policy, *(route.policy for route in routes)]
        self._methods = frozenset().union(*(p.methods for p in policies if p is not None))
        self._unjoined: set[int] = set()
        transactional = any(p.transaction for p in policies if p is not None)
        if transactional and not isinstance(self.store, TransactionalStore):
            raise ConfigurationError(
                f"transaction=True needs a store whose transactions an application can join;"
                f" {type(self.store).__name__} is none, use PostgreSQL or SQLite"
            )
        if any(p.claim_durability == "asynchronous" for p in policies if p is not None) and not (
            isinstance(self.store, AsynchronousStore) and self.store.claims_asynchronously
        ):
            raise ConfigurationError(
                'claim_durability="asynchronous" needs PostgreSQL, where one commit can do without'
                f" the disk and the next can't; {self.store!r} has one durability for all it"
                ' commits, use "synchronous"'
            )
        if transactional and sys.flags.dev_mode:
            from wsgi_idempotency import foreign_writes

            foreign_writes.watch()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        policy, rule = self._policy_of(environ)
        if policy is None:
            return self.app(environ, start_response)
        return _Request(self, policy, rule, environ, start_response).answer()

    def _policy_of(self, environ: WSGIEnvironment) -> tuple[Policy | None, str | None]:
        """The policy of a request, and the rule of the route it is from, if it is from one."""
        method = environ["REQUEST_METHOD"].upper()
        if method not in self._methods:
            return None, None
        # Wrapped twice, the outer one protects. An operation that has ended protects nothing:
        # something outside sends the same environ again.
        around = environ.get(ENVIRON_KEY)
        if around is not None and not around.ended:
            return None, None
        matching = ((policy, rule) for matches, policy, rule in self._routes if matches(environ))
        policy, rule = next(matching, (self.policy, None))
        return (policy, rule) if policy is not None and method in policy.methods else (None, None)

    @property
    def protected_methods(self) -> frozenset[str]:
        """The methods that any policy is for."""
        return self._methods

    def policy_for(self, method: str, path: str) -> tuple[Policy | None, bool]:
        """What a request of a method to a path would be under, for tools that look.

        :param path: PATH_INFO.
        :returns: the policy, and whether there is none because a route exempts the path.
        """
        environ = {"REQUEST_METHOD": method, "PATH_INFO": path.encode().decode("latin-1")}
        policy, _ = self._policy_of(environ)
        matching = [route for matches, route, _ in self._routes if matches(environ)]
        return policy, matching[:1] == [None]

    def forget_parent(self) -> None:
        """In a forked child: who waited in the parent doesn't wait here."""
        places = self._max_waiting
        self.waiting = threading.BoundedSemaphore(places) if places else None

    def warn_unjoined(self, policy: Policy, operation: Operation) -> None:
        """Once for each policy: an application that never asks for the connection can't have
        written in the transaction."""
        if id(policy) not in self._unjoined:
            self._unjoined.add(id(policy))
            logger.warning(
                "%r was committed, and its handler never asked for current_operation.connection:"
                " what it wrote elsewhere is not in the transaction. Join it, or leave"
                " transaction=True out of its policy",
                operation,
            )

    def _lost(self, operation: Operation) -> None:
        logger.warning(
            "%r has lost its claim to another worker: its response won't be recorded", operation
        )


_middlewares: weakref.WeakSet[IdempotencyMiddleware] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for middleware in list(_middlewares):
        middleware.forget_parent()


forks.in_child(_after_fork_in_child)


class _Refused(Exception):
    """Raised when the handler must not run; carries what the client is told."""

    def __init__(self, problem: Problem, event: str = "refused") -> None:
        super().__init__(problem.code)
        self.problem = problem
        self.event = event


class _Request:
    """One request that a policy covers."""

    def __init__(
        self,
        middleware: IdempotencyMiddleware,
        policy: Policy,
        rule: str | None,
        environ: WSGIEnvironment,
        start_response: StartResponse,
    ) -> None:
        self.middleware = middleware
        self.policy = policy
        self._rule = rule
        self.environ = environ
        self.start_response = start_response
        self.body = Body(environ, policy.max_request_bytes)
        self._method = environ["REQUEST_METHOD"].upper()
        self._path = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
        self._digest = ""
        self._races = 0
        # Whether a statement for the claim may be on its way still, and what undoes it.
        self._doubtful = False
        self.asked = 0.0  # when a claim was asked for, on time.monotonic()
        self._undo = middleware.store.forget
        self.rebuilds = False  # the operation is done, and its response is to be made
        # For observers alone.
        self._attempt: int | None = None
        self._store_seconds: float | None = None
        self._waited_seconds: float | None = None

    def answer(self) -> Iterable[bytes]:
        forks.notice()
        transaction: Transaction | None = None
        try:
            found = self._find_key()
            if found is not None:
                whose = self._find_scope()
                self._extract("body", self.body.read)
                claim = self._make_claim(found, whose)
                if self.policy.transaction:
                    claim, standing, transaction = self._enter(claim)
                else:
                    claim, standing = self._obtain(claim)
        except _Refused as refused:
            return self._refuse(refused)
        except Exception as exc:
            return self._without_store(exc)
        if found is None:
            return self._pass_through()
        if isinstance(standing, protocol.Replay):
            return self._replay(standing)
        operation = Operation(
            claim,
            key=found,
            scope=whose,
            attempt=standing.attempt,
            secret=self.middleware.secret,
            transaction=transaction,
            store=self.middleware.store,
            max_step_bytes=self.policy.max_step_bytes,
        )
        if transaction is not None:
            return _Transacted(self, operation, transaction).run()
        execution = _Rebuild if self.rebuilds else _Execution
        return execution(self, claim, operation).run()

    # ------------------------------------------------------------ what the request says

    def _find_key(self) -> str | None:
        """:raises _Refused: there is one that can't be used, or none where one is required."""
        try:
            found = self._extract("key", key.extract, self.policy.key, self.environ, self.body)
        except InvalidKey as exc:
            raise _Refused(problem("INVALID_KEY", detail=str(exc))) from exc
        if found is None:
            if self.policy.required:
                raise _Refused(problem("MISSING_KEY"))
            return None
        longest = self.policy.max_key_length
        if len(found.encode()) > longest:
            detail = f"The idempotency key is longer than {longest} bytes. Use a shorter one."
            raise _Refused(problem("KEY_TOO_LONG", detail=detail))
        return found

    def _find_scope(self) -> str:
        whose = self.middleware.scope if self.policy.scope is None else self.policy.scope
        found = self._extract("scope", scope.find, whose, self.environ)
        if found is None:
            raise _Refused(problem("MISSING_SCOPE"))
        return found

    def _make_claim(self, idempotency_key: str, whose: str) -> Claim:
        policy, secret = self.policy, self.middleware.secret
        digest = fingerprint.key_digest(
            secret=secret,
            namespace=policy.namespace,
            scope=whose,
            method=self._method,
            path=self._path,
            key=idempotency_key,
        )
        self._digest = digest.hex()
        version = fingerprint.version_of(policy.fingerprint)
        return Claim(
            digest=digest,
            token=os.urandom(16),
            fingerprint=self._fingerprint(version),
            fingerprint_version=version,
            scope=scope.for_people(whose, secret),
            key=scope.printable(idempotency_key),
            method=scope.printable(self._method),
            path=scope.printable(self._path),
            lease=policy.lease_seconds,
            retention=policy.retention_seconds,
            lapse=policy.lapse,
            asynchronous=policy.claim_durability == "asynchronous",
        )

    def _fingerprint(self, version: int) -> bytes:
        return self._extract(
            "fingerprint",
            fingerprint.compute,
            version,
            self.policy.fingerprint,
            self.environ,
            self.body,
            self.middleware.secret,
        )

    def _extract(self, what: str, extractor: Callable[..., _T], *args: object) -> _T:
        """Call what the operator gave us, and fail closed."""
        try:
            return extractor(*args)
        except InvalidKey:
            raise
        except BodyError as exc:
            raise _Refused(problem(_BODY_CODES[type(exc)])) from exc
        except Exception as exc:
            logger.exception("the %s of a request could not be found; it was not run", what)
            raise _Refused(problem("EXTRACTOR_FAILED")) from exc

    # ------------------------------------------------------------ the claim

    def _obtain(self, claim: Claim) -> tuple[Claim, Claimed | protocol.Replay]:
        """The claim, or the response of the operation that is done.

        :raises _Refused: neither is to be had.
        :raises StoreError: the store could not say.
        """
        standing: Claimed | protocol.Replay | None = None
        try:
            while True:
                claim, found = self._look(claim)
                if not isinstance(found, Claimed) or self._in_time(claim):
                    standing = found
                    return claim, standing
                self.undo_doubtful(claim)
                claim = replace(claim, token=os.urandom(16))
        except BaseException as exc:
            if not isinstance(exc, Exception):
                self._doubtful = True
            raise
        finally:
            if not isinstance(standing, Claimed):
                self.undo_doubtful(claim)

    def _in_time(self, claim: Claim) -> bool:
        """Whether the claim stands now that its handler is about to begin. A process that was
        paused since it asked for it finds out here that somebody else has taken it over."""
        if time.monotonic() - self.asked <= claim.lease / 3:  # renewals begin after that
            return True
        store = self.middleware.store
        self.asked = time.monotonic()
        try:
            renewed = self.ask(store.renew, [(claim.digest, claim.token, claim.lease)])
            # A row that is locked counts as renewed: one that has lapsed may be a take-over's.
            record = self.ask(store.lookup, claim.digest)
        except StoreError:
            self._doubtful = True
            raise
        mine = record is not None and record.token == claim.token and not record.lapsed
        return claim.token in renewed and mine

    def _look(self, claim: Claim) -> tuple[Claim, Claimed | protocol.Replay]:
        """Look again until there is something, for as long as the policy lets it wait."""
        store = self.middleware.store
        with _Wait(self.middleware.waiting, self.policy.wait_seconds, self._waited) as wait:
            while True:
                answer = self._claim(store.claim, claim)
                if isinstance(answer, Claimed):
                    # With effects it is a take-over of its own, whose answer was lost.
                    self.rebuilds = answer.effects
                    return claim, answer
                decision = protocol.decide(answer, self._fingerprint_like(answer, claim))
                if isinstance(decision, protocol.Replay):
                    return claim, decision
                rebuilds = isinstance(decision, protocol.ResponseLost) and self.policy.rebuild
                if isinstance(decision, protocol.TakeOver) or rebuilds:
                    claim = _succeeding(claim, answer)
                    self._undo = store.forget if answer.expired else store.release
                    taken = self._claim(store.take_over, claim, answer)
                    if taken is not None:
                        self.rebuilds = taken.effects
                        if not taken.effects:
                            self._tell_taken_over(answer, taken)
                        return claim, taken
                    self._lose_a_race()
                elif isinstance(decision, protocol.InFlight) and wait.a_little():
                    self._races = 0
                else:
                    raise self._refusal(decision, answer)

    def _claim(self, call: Callable[..., _T], *args: object) -> _T:
        """Ask for a claim, and again where the connection broke: it may have been dead in the
        pool, since a restart of the server. What was asked first may be on its way still."""
        self.asked = time.monotonic()
        try:
            try:
                return self.ask(call, *args)
            except Disconnected as exc:
                logger.info("%s; it is asked again", exc)
                self._doubtful = True
                return self.ask(call, *args)
        except AnswerLost:
            self._doubtful = True
            raise

    def undo_doubtful(self, claim: Claim) -> None:
        """A claim whose answer was lost may have been made, or be made yet, and nobody runs it:
        a policy that holds a lapse would hold an operation that never began."""
        if self._doubtful:
            undo = partial(self._undo, claim.digest, claim.token)
            self.middleware.heartbeat.undo_later(claim, undo)

    def _lose_a_race(self) -> None:
        """:raises StoreError: too many in a row. Not one that lets a request pass unprotected."""
        self._races += 1
        if self._races == _RACES:
            raise StoreError(f"the key was free {_RACES} times in a row, and could not be had")

    def _tell_taken_over(self, seen: Record, taken: Claimed) -> None:
        if seen.lapsed:
            self.tell("lapsed")
        self.tell("taken_over", attempt=taken.attempt)

    def _enter(self, claim: Claim) -> tuple[Claim, Claimed | protocol.Replay, Transaction | None]:
        """As :meth:`_obtain`, with the transaction in which the operation is to run."""
        store = cast("TransactionalStore", self.middleware.store)
        patience = 0.0
        with _Wait(self.middleware.waiting, self.policy.wait_seconds, self._waited) as wait:
            while True:
                begin = partial(
                    store.begin, claim, isolation_level=self.policy.isolation_level, wait=patience
                )
                transaction = begin() if patience else self.ask(begin)
                if transaction is None:
                    patience = wait.left()
                    if not patience:
                        raise self._refusal(protocol.InFlight(age=0.0, lease_left=0.0))
                    self._lose_a_race()
                    continue
                standing: Claimed | protocol.Replay | None = None
                try:
                    claim, standing = self._stand(transaction, claim, wait)
                finally:
                    if not isinstance(standing, Claimed):
                        transaction.rollback()
                if isinstance(standing, Claimed):
                    return claim, standing, transaction
                if standing is not None:
                    return claim, standing, None

    def _stand(
        self, transaction: Transaction, claim: Claim, wait: _Wait
    ) -> tuple[Claim, Claimed | protocol.Replay | None]:
        """What there is for the request in a transaction that has begun; None to begin again.

        :raises _Refused: nothing.
        """
        if transaction.claimed is not None:
            return claim, transaction.claimed
        seen = cast("Record", transaction.seen)
        decision = protocol.decide(seen, self._fingerprint_like(seen, claim))
        if isinstance(decision, protocol.Replay):
            return claim, decision
        if isinstance(decision, protocol.TakeOver):
            claim = _succeeding(claim, seen)
            taken = self.ask(transaction.take_over, claim, seen)
            if taken is None:
                self._lose_a_race()
            else:
                self._tell_taken_over(seen, taken)
            return claim, taken
        # In flight is what another policy claimed, with a lease.
        if isinstance(decision, protocol.InFlight) and wait.a_little():
            self._races = 0
            return claim, None
        raise self._refusal(decision, seen)

    def ask(self, call: Callable[..., _T], *args: object) -> _T:
        """Ask the store, and take the time."""
        started = time.monotonic()
        try:
            return call(*args)
        finally:
            self._store_seconds = (self._store_seconds or 0.0) + time.monotonic() - started

    def _waited(self, seconds: float) -> None:
        self._waited_seconds = seconds
        self.tell("waited", seconds=seconds)

    def _fingerprint_like(self, record: Record, claim: Claim) -> bytes:
        """The request's fingerprint as the algorithm of the record's time makes it."""
        if record.fingerprint_version == claim.fingerprint_version:
            return claim.fingerprint
        return self._fingerprint(record.fingerprint_version)

    def _refusal(self, decision: protocol.Decision, seen: Record | None = None) -> _Refused:
        if isinstance(decision, protocol.InFlight):
            seconds = protocol.retry_after(decision)
            return _Refused(problem("CONFLICT", retry_after=seconds), "conflict")
        if isinstance(decision, protocol.Mismatch):
            return _Refused(problem("FINGERPRINT_MISMATCH"), "mismatch")
        if isinstance(decision, protocol.ResponseLost):
            decision = protocol.NotReplayable(None, None, "the response was not recorded")
        if isinstance(decision, protocol.NotReplayable):
            location = decision.location or ""
            kept = bool(location) and sendable(("Location", location))
            told = problem(
                "RESPONSE_NOT_REPLAYABLE",
                headers=(("Location", location),) if kept else (),
                extensions={"original_status": decision.status},
            )
            return _Refused(told, "not_replayable")
        if seen is not None and seen.lapsed:
            self.tell("lapsed")
        return _Refused(problem("OUTCOME_UNKNOWN"), "held")

    # ------------------------------------------------------------ answers

    def _pass_through(self) -> Iterable[bytes]:
        self.body.hand_on()
        return self.middleware.app(self.environ, self.start_response)

    def _without_store(self, exc: Exception) -> Iterable[bytes]:
        logger.error(
            "no claim could be made for %s: %s",
            self._shown(),
            exc,
            exc_info=None if isinstance(exc, StoreError) else exc,
        )
        self.tell("store_failure", exception=exc)
        if self.policy.on_store_failure == "refuse" or not isinstance(exc, StoreUnavailable):
            # Spread, so that clients don't come back all at once.
            seconds = random.randint(1, 5)
            return self._refuse(_Refused(problem("STORE_UNAVAILABLE", retry_after=seconds)))
        self.tell("unprotected")
        self.body.hand_on()
        marked = _adding(self.start_response, [("Idempotency-Status", "unprotected")])
        return self.middleware.app(self.environ, marked)

    def refuse(
        self, code: str, *, retry_after: int | None = None, event: str = "refused"
    ) -> Iterable[bytes]:
        return self._refuse(_Refused(problem(code, retry_after=retry_after), event))

    def _refuse(self, refused: _Refused) -> Iterable[bytes]:
        told = refused.problem
        self.tell(refused.event, code=told.code, exception=refused.__cause__)
        try:
            answer = problems.rendered(self.middleware.render_problem, told, self.environ)
        except Exception:
            logger.exception("render_problem failed on %s; sent as RFC 9457 has it", told.code)
            answer = problems.rendered(problems.rfc9457, told, self.environ)
        added = [*told.headers, ("Cache-Control", "no-store"), *_should_retry(told.retryable)]
        if told.retry_after is not None:
            added.append(("Retry-After", str(told.retry_after)))
        _adding(self.start_response, added)(answer.status, list(answer.headers))
        return [answer.body]

    def _replay(self, replay: protocol.Replay) -> Iterable[bytes]:
        reason = unsendable(replay.response.status, replay.response.headers)
        if reason is not None:
            # Nothing of the kind is recorded: the row was changed since.
            logger.error(
                "the stored response of digest %s can't be sent (%s): the operation counts as"
                " done, and its retries are refused",
                self._digest, reason,
            )  # fmt: skip
            return self._refuse(self._refusal(protocol.NotReplayable(None, None, reason)))
        self.tell("replayed")
        extra = [("Idempotency-Replayed", "true")]
        status = int(replay.response.status[:3])
        if status >= 500 or status in _RETRIED_BY_SDKS:
            extra += _should_retry(False)
        return play(replay.response, extra, self.environ, self.start_response)

    def replay_recorded(self, whole: Whole) -> Iterable[bytes]:
        """A response that was recorded this moment, as every later retry gets it."""
        recorded = self.completion(whole.status, whole.headers, whole.body, None)
        response = StoredResponse(recorded.status, recorded.headers, whole.body)
        return self._replay(protocol.Replay(response))

    def respond(self, whole: Whole) -> Iterable[bytes]:
        self.start_response(whole.status, whole.headers)
        return whole.pieces()

    # ------------------------------------------------------------ what becomes of it

    def capture(self, operation: Operation, **passing: Any) -> Capture:
        """Make everything ready for the handler, and for its answer.

        :param passing: what to do about an answer that is not held back.
        """
        self.environ[ENVIRON_KEY] = operation
        self.body.hand_on()
        return Capture(
            limit=self.policy.max_response_bytes,
            start_response=self.start_response,
            operation=operation,
            running=running,
            **passing,
        )

    def action(self, outcome: Outcome, operation: Operation) -> Action:
        try:
            return protocol.settle(outcome, self.policy.outcomes, operation.overrule)
        except Exception:
            logger.exception("outcomes failed on %r: it is stored, or held", outcome)
            return protocol.settle(outcome, protocol.store_everything, operation.overrule)

    def completion(
        self, status: str, headers: Headers, body: bytes, reason: str | None
    ) -> Completion:
        """What is kept of an answer; its body only if no reason speaks against it."""
        if reason is None:  # then all of it was found to be sendable
            return Completion(status, replayable(headers, self.policy.replay_headers), body)
        kept = replayable(filter(sendable, headers), self.policy.replay_headers)
        if unsendable(status, ()):
            status = status[:3]
        return Completion(status, kept, None, reason)

    def _shown(self) -> str:
        """What was asked for, as it may stand in a log."""
        return scope.printable(f"{self._method} {self._path}")

    def winner(self, claim: Claim) -> Iterable[bytes]:
        """For a client whose own handler was overtaken: the response of the one that counts."""
        decision: protocol.Decision = protocol.OutcomeUnknown()
        try:
            record = self.ask(self.middleware.store.lookup, claim.digest)
            if record is not None:
                decision = protocol.decide(record, self._fingerprint_like(record, claim))
        except Exception:
            logger.exception("who overtook %s can't be told", self._shown())
        if isinstance(decision, protocol.Replay):
            return self._replay(decision)
        return self._refuse(self._refusal(decision))

    def tell(
        self,
        name: str,
        *,
        attempt: int | None = None,
        code: str | None = None,
        action: str | None = None,
        seconds: float | None = None,
        exception: BaseException | None = None,
    ) -> None:
        if attempt is not None:
            self._attempt = attempt
        if self.middleware.observers:
            event = Event(
                name=name,
                method=self._method,
                path=self._path,
                route=self._rule,
                key_digest=self._digest,
                attempt=self._attempt,
                code=code,
                action=action,
                seconds=seconds,
                store_seconds=self._store_seconds,
                waited_seconds=self._waited_seconds,
                exception=exception,
            )
            self.middleware.observers.tell(event)


class _Execution:
    """One run of the handler under a claim, and what becomes of the claim."""

    def __init__(self, request: _Request, claim: Claim, operation: Operation) -> None:
        self._request = request
        self._claim = claim
        self._operation = operation
        self._store = request.middleware.store
        self._heartbeat = request.middleware.heartbeat
        self._started = time.monotonic()
        self._pid = os.getpid()
        self._at_the_end: Action | None = None

    def run(self) -> Iterable[bytes]:
        request = self._request
        capture = request.capture(
            self._operation,
            before_first_byte=self._before_first_byte,
            after_last_byte=self._after_last_byte,
        )
        try:
            self._begin()
            answer = capture.run(request.middleware.app, request.environ)
            if isinstance(answer, Passing):
                return answer.body
            if isinstance(answer, Whole) and self._settle(answer):
                return request.respond(answer)
            return request.winner(self._claim)
        except BaseException as exc:
            # Also GreenletExit, SystemExit and KeyboardInterrupt: the handler is over.
            if capture.passing:
                capture.close()  # the server never gets it
            elif not self._operation.ended:
                if capture.whole is None:
                    self._end(self._action(Outcome(exception=exc)))
                else:  # what was interrupted is close(), or the decision on the answer
                    self._settle(capture.whole)
            raise

    def _begin(self) -> None:
        """Keep the claim from now on. Where that can't be (no thread can be started), the
        handler doesn't run, and its operation is not one that may have happened."""
        try:
            self._heartbeat.start(self._claim, self._operation, self._request.asked)
        except BaseException:
            first = self._operation.attempt == 1 and not self._request.rebuilds
            undo = self._store.forget if first else self._store.release
            self._operation.end()
            self._heartbeat.stop(self._claim)
            with suppress(Exception):
                undo(self._claim.digest, self._claim.token)
            raise

    # ------------------------------------------------------------ settling

    def _settle(self, whole: Whole) -> bool:
        """False when somebody has overtaken this handler, whose answer doesn't count then."""
        status = int(whole.status[:3])
        action = self._action(Outcome(status=status))
        if action is not Action.STORE:
            self._end(action)
            return True
        return self._record(whole.status, whole.headers, whole.body, _not_replayable(whole))

    def _before_first_byte(self, status: str, headers: Headers, reason: str) -> bool:
        """An answer that can't be held back: done is done, before its first byte is out.

        What is not to be stored keeps its claim until the last byte, so that no retry
        runs beside the handler.
        """
        action = self._action(Outcome(status=int(status[:3])))
        if action is Action.STORE:
            return self._record(status, headers, b"", reason)
        self._at_the_end = action
        return True

    def _after_last_byte(self) -> None:
        if self._at_the_end is not None:
            self._end(self._at_the_end)

    def _action(self, outcome: Outcome) -> Action:
        action = self._request.action(outcome, self._operation)
        if action is Action.STORE or not (self._operation.marked and self._effects()):
            return action
        return protocol.settle_done(action, self._operation.overrule)

    def _effects(self) -> bool:
        """Whether what was marked has been committed. Where it can't be told it may have been:
        the mark itself then keeps the row from being run again, if it is there."""
        try:
            record = self._request.ask(self._store.lookup, self._claim.digest)
        except Exception as exc:
            logger.warning("whether %r has effects can't be told: %s", self._operation, exc)
            return False
        return record is not None and record.token == self._claim.token and record.effects

    def _record(self, status: str, headers: Headers, body: bytes, reason: str | None) -> bool:
        completion = self._request.completion(status, headers, body, reason)
        digest, token = self._claim.digest, self._claim.token

        def complete() -> bool:
            try:
                return self._store.complete(digest, token, completion)
            except NotStorable as exc:
                logger.exception("the response of %r can't be stored", self._operation)
                refused = Completion(status, (), None, f"the store refused it: {exc}")
                return self._store.complete(digest, token, refused)

        return self._finish(Action.STORE, complete)

    def _end(self, action: Action) -> None:
        ends = {
            Action.FORGET: self._store.forget,
            Action.RELEASE: self._store.release,
            Action.HOLD: self._store.hold,
        }
        digest, token = self._claim.digest, self._claim.token

        def end() -> bool:
            # One that may have effects is forgotten only if it has none.
            left = self._operation.marked and action is Action.FORGET
            return ends[action](digest, token) or (left and self._store.release(digest, token))

        self._finish(action, end)

    def _finish(self, action: Action, tell_store: Callable[[], bool]) -> bool:
        """Tell the store, now or later; False when the claim was lost.

        The handler has run: a store that can't be reached must not turn its answer into
        an error, nor lose the claim. The heartbeat keeps it and tries again.
        """
        if os.getpid() != self._pid:
            return True  # the handler has forked, and the claim is the parent's to settle

        def finish() -> bool:
            kept = tell_store()
            if action is not Action.HOLD or not kept:  # its row would be taken for a late claim
                self._request.undo_doubtful(self._claim)
            return kept

        seconds = time.monotonic() - self._started
        try:
            self._operation.end()
            self._heartbeat.finishing(self._claim)
            kept = self._request.ask(finish)
            self._heartbeat.stop(self._claim)
        except BaseException as exc:
            self._heartbeat.finish_later(self._claim, self._operation, finish)
            self._operation.end()
            logger.error("%r was run, and will be recorded later: %s", self._operation, exc)
            self._request.tell("store_failure", exception=exc, attempt=self._operation.attempt)
            if not isinstance(exc, Exception):
                raise
            kept = True
        if not kept:
            self._operation.lost = True
            self._request.tell("fenced", attempt=self._operation.attempt)
        self._tell(action, seconds)
        return kept

    def _tell(self, action: Action, seconds: float) -> None:
        self._request.tell(
            "executed", attempt=self._operation.attempt, action=action.value, seconds=seconds
        )


class _Rebuild(_Execution):
    """Makes the response of an operation that is done, and records it. The handler doesn't
    run."""

    def run(self) -> Iterable[bytes]:
        request = self._request
        capture = request.capture(self._operation)
        try:
            self._begin()
            answer = capture.run(self._app, request.environ)
            assert isinstance(answer, Whole)
            status = int(answer.status[:3])
            if status >= 500 or status in protocol.NEVER_AN_OUTCOME:
                raise RuntimeError(f"rebuild answered {answer.status}")
        except BaseException as exc:
            if self._operation.ended:
                raise
            self._end(Action.RELEASE)
            if not isinstance(exc, Exception):
                raise
            logger.exception(
                "the response of %r can't be rebuilt; the next retry tries again", self._operation
            )
            return request.refuse("REBUILD_FAILED", event="not_replayable")
        reason = _not_replayable(answer)
        if not self._record(answer.status, answer.headers, answer.body, reason):
            return request.winner(self._claim)
        return request.respond(answer) if reason else request.replay_recorded(answer)

    def _app(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        rebuild = cast("Callable[[Operation], WSGIApplication]", self._request.policy.rebuild)
        return rebuild(self._operation)(environ, start_response)

    def _tell(self, action: Action, seconds: float) -> None:
        """No handler has run."""


class _Transacted:
    """One run of the handler in a transaction: what it wrote and its answer are committed
    together, or neither, and only then is it answered."""

    def __init__(self, request: _Request, operation: Operation, transaction: Transaction) -> None:
        self._request = request
        self._operation = operation
        self._transaction = transaction
        self._started = time.monotonic()
        self._pid = os.getpid()

    def run(self) -> Iterable[bytes]:
        request = self._request
        capture = request.capture(self._operation)
        try:
            answer = capture.run(request.middleware.app, request.environ)
            assert isinstance(answer, Whole)
            return self._settle(answer)
        except BaseException as exc:
            if self._operation.ended:
                raise
            conflict = isinstance(exc, Exception) and self._transaction.conflicted(exc)
            self._undo()
            if conflict:
                return self._conflict()
            if isinstance(exc, (EventStream, TransactionFailed)):
                return self._failed(exc)
            raise

    def _settle(self, whole: Whole) -> Iterable[bytes]:
        if os.getpid() != self._pid:
            return self._request.respond(whole)  # forked; the transaction is the parent's
        status = int(whole.status[:3])
        if self._request.action(Outcome(status=status), self._operation) is not Action.STORE:
            conflict = status >= 500 and self._transaction.conflicted(None)
            self._undo()
            return self._conflict() if conflict else self._request.respond(whole)
        completion = self._request.completion(
            whole.status, whole.headers, whole.body, _not_replayable(whole)
        )
        self._operation.end()
        seconds = self._seconds()
        try:
            self._request.ask(self._transaction.complete, completion)
        except TransactionConflict:
            self._tell(Action.FORGET, seconds)
            return self._conflict()
        except TransactionFailed as exc:
            self._tell(Action.FORGET, seconds)
            return self._failed(exc)
        except StoreError as exc:
            return self._lost(exc, seconds)
        self._tell(Action.STORE, seconds)
        if not self._operation.joined:
            self._request.middleware.warn_unjoined(self._request.policy, self._operation)
        return self._request.respond(whole)

    def _undo(self) -> None:
        """Whatever the policy says of it, nothing happened: the key is fresh."""
        if os.getpid() != self._pid:
            return
        self._operation.end()
        seconds = self._seconds()
        self._request.ask(self._transaction.rollback)
        self._tell(Action.FORGET, seconds)

    def _seconds(self) -> float:
        """How long the handler has taken."""
        return time.monotonic() - self._started

    def _tell(self, action: Action | None, seconds: float) -> None:
        became = None if action is None else action.value
        attempt = self._operation.attempt
        self._request.tell("executed", attempt=attempt, action=became, seconds=seconds)

    # ------------------------------------------------------------ answers of our own

    def _conflict(self) -> Iterable[bytes]:
        logger.warning("%r collided with another transaction and was undone", self._operation)
        return self._request.refuse("TRANSACTION_CONFLICT", retry_after=1)

    def _failed(self, exc: Exception) -> Iterable[bytes]:
        logger.error("the transaction of %r was undone: %s", self._operation, exc)
        return self._request.refuse("TRANSACTION_FAILED")

    def _lost(self, exc: StoreError, seconds: float) -> Iterable[bytes]:
        logger.error("the transaction of %r was lost: %s", self._operation, exc)
        self._request.tell("store_failure", exception=exc, attempt=self._operation.attempt)
        unknown = isinstance(exc, CommitUnknown)
        self._tell(None if unknown else Action.FORGET, seconds)
        return self._request.refuse(
            "COMMIT_UNKNOWN" if unknown else "STORE_UNAVAILABLE", retry_after=1
        )


class _Wait:
    """A duplicate's patience: bounded in time, and in how many have any at once.

    :param tell: told afterwards how many seconds it has waited, if it has.
    """

    def __init__(
        self,
        places: threading.BoundedSemaphore | None,
        seconds: float,
        tell: Callable[[float], None],
    ) -> None:
        self._places = places
        self._patience = seconds
        self._tell = tell
        self._started: float | None = None

    def left(self) -> float:
        """Take a place, and say how many seconds are left; 0 when there is none to be had."""
        if self._started is None:
            if not self._patience or self._places is None or not self._places.acquire(False):
                return 0.0
            self._started = time.monotonic()
        return max(0.0, self._started + self._patience - time.monotonic())

    def a_little(self) -> bool:
        """Sleep until the next look; False when there is nothing to wait for any more."""
        left = self.left()
        if left:
            time.sleep(min(_LOOK_EVERY, left))
        return left > 0

    def __enter__(self) -> _Wait:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._started is not None and self._places is not None:
            self._places.release()
            self._tell(time.monotonic() - self._started)


_BODY_CODES = {
    LengthRequired: "LENGTH_REQUIRED",
    BodyTooLarge: "BODY_TOO_LARGE",
    IncompleteBody: "INCOMPLETE_BODY",
}


def _succeeding(claim: Claim, seen: Record) -> Claim:
    """The claim of a take-over. One operation keeps one fingerprint, and with it the keys it
    derives, also when the policy's algorithm has changed since."""
    if seen.expired:
        return claim
    return replace(
        claim, fingerprint=seen.fingerprint, fingerprint_version=seen.fingerprint_version
    )


def _not_replayable(whole: Whole) -> str | None:
    """Why an answer that was held back can't be replayed, or None."""
    reason = unsendable(whole.status, whole.headers)
    if reason is None and int(whole.status[:3]) in protocol.OF_ONE_RANGE:
        reason = protocol.ONE_RANGE
    if reason is None and whole.spool is not None:
        reason = TOO_LARGE
    return reason


def _should_retry(retry: bool) -> list[tuple[str, str]]:
    value = "true" if retry else "false"
    return [("X-Should-Retry", value), ("Stripe-Should-Retry", value)]


def _adding(start_response: StartResponse, added: Headers) -> StartResponse:
    """A start_response that adds header fields, in place of those of the same name."""
    names = {name.lower() for name, _ in added}

    def adding(
        status: str, headers: Headers, exc_info: OptExcInfo | None = None, /
    ) -> Callable[[bytes], object]:
        others = [pair for pair in headers if pair[0].lower() not in names]
        if exc_info is None:
            return start_response(status, [*others, *added])
        return start_response(status, [*others, *added], exc_info)

    return adding


def _matcher(route: Route) -> Callable[[WSGIEnvironment], bool]:
    """A map of its own for each route: a shared one would order the rules by weight, and
    here the first that was listed counts."""
    try:
        adapter = Map([Rule(route.rule, endpoint="")], strict_slashes=False).bind("localhost")
    except (TypeError, ValueError, LookupError) as exc:
        raise ConfigurationError(f"the rule {route.rule!r} can't be used: {exc}") from exc

    def matches(environ: WSGIEnvironment) -> bool:
        if route.methods is not None and environ["REQUEST_METHOD"].upper() not in route.methods:
            return False
        path = environ.get("PATH_INFO", "").encode("latin-1", "replace").decode(errors="replace")
        try:
            adapter.match(path or "/")
        except RequestRedirect:
            return True  # a doubled slash: the application may take it all the same
        except HTTPException:
            return False
        return True

    return matches


def _secret(secret: bytes | str | None) -> bytes | None:
    if isinstance(secret, str):
        secret = secret.encode()
    if secret is None:
        return None
    if not isinstance(secret, bytes) or len(secret) < 16:
        raise ConfigurationError("secret is too short; use at least 16 random bytes")
    return secret
