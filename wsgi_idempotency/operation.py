"""What a handler sees of the operation it runs for."""

from __future__ import annotations

import hashlib
import hmac
import threading
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar, cast

from werkzeug.local import LocalProxy

from wsgi_idempotency.errors import (
    ClaimLost,
    GuardRefused,
    NoTransaction,
    StepRefused,
    TransactionFailed,
)
from wsgi_idempotency.protocol import Action
from wsgi_idempotency.records import Claim
from wsgi_idempotency.steps import Steps
from wsgi_idempotency.stores.base import Guard, GuardingStore, Store, Transaction

_T = TypeVar("_T")

ENVIRON_KEY = "wsgi_idempotency.operation"


class Operation:
    """The operation that a request runs, in ``environ["wsgi_idempotency.operation"]``.

    Also :data:`current_operation`, while the application runs.
    """

    def __init__(
        self,
        claim: Claim,
        *,
        key: str,
        scope: str,
        attempt: int,
        secret: bytes | None,
        transaction: Transaction | None = None,
        store: Store | None = None,
        max_step_bytes: int = 0,
    ) -> None:
        self._claim = claim
        self._store = store
        self._guards: list[Guard] = []
        self._steps = Steps(claim, store, max_step_bytes)
        self._secret = secret
        self._transaction = transaction
        self._thread = threading.get_ident()
        #: The application has asked for the transaction's connection.
        self.joined = False
        #: The idempotency key, unescaped.
        self.key = key
        #: Whose key it is, as the scope callable said.
        self.scope = scope
        #: 1 for the first attempt, one more each time the operation was taken over.
        self.attempt = attempt
        #: Somebody took the claim over: what this handler answers won't be recorded.
        #: True some time after it happened (a third of the lease at most).
        self.lost = False
        #: Its outcome has been settled.
        self.ended = False
        #: What the handler asked for, or None for what the policy says.
        self.overrule: Action | None = None

    def __repr__(self) -> str:
        return f"<Operation {self._claim.digest.hex()} attempt {self.attempt}>"

    @property
    def transactional(self) -> bool:
        """Whether it has a transaction to join: ``Policy(transaction=True)``."""
        return self._transaction is not None

    @property
    def connection(self) -> Any:
        """The connection whose transaction commits what is written on it together with the
        response: a :class:`sqlalchemy.Connection`, for ``Policy(transaction=True)``.

        Join it with ``Session(bind=operation.connection,
        join_transaction_mode="create_savepoint")``, whose commit() and rollback() then work
        as ever; the driver's own is ``connection.connection.driver_connection``.

        :raises NoTransaction: the policy has no transaction.
        :raises TransactionFailed: the operation is over, or this is another thread than its own.
        """
        if self._transaction is None:
            raise NoTransaction(
                "this operation has no transaction: give its policy transaction=True, or write"
                " on a connection of your own"
            )
        if self.ended:
            raise TransactionFailed("this operation is over, and its connection is somebody else's")
        if threading.get_ident() != self._thread:
            raise TransactionFailed(
                "this is another thread than the one that runs the operation, and one connection"
                " is not for two threads: write on a connection of your own"
            )
        self.joined = True
        return self._transaction.connection

    def step(self, name: str, function: Callable[[], _T]) -> _T:
        """Run a part of the operation once, and remember its result.

        The first attempt that comes here runs ``function`` and records what it returned, in a
        short transaction of its own, before this returns. A later attempt at the same
        operation gets that result, and ``function`` is not called. So an attempt that follows
        a crash goes on after the last step that was finished, where the policy lets one follow
        (RELEASE).

        A worker may die when ``function`` has run and its result is not recorded. The next
        attempt runs it again: let it carry a :meth:`derive_key` to a system that knows it.

        :param name: names the step within the operation: 1 to 200 printable characters. Each
            name is for one step of an attempt; a step whose function has raised may be tried
            again.
        :param function: called without arguments. What it returns must be JSON (``dict``,
            ``list``, ``str``, ``int``, ``float``, ``bool`` or None), of ``max_step_bytes`` of the
            policy at most. It must not run another step.
        :returns: the result as JSON has it, also from the attempt that ran the function: a
            tuple is a list, and the keys of a dict are texts.
        :raises StepRefused: the step was not run: it is inside another, its name was used in
            this attempt, the policy has ``transaction=True``, whose rollback would forget it,
            the operation has ended, or the store has no steps.
        :raises ClaimLost: somebody else has taken the operation over. As a rule found out
            before the function is called; where it happened meanwhile, nothing is recorded.
        :raises StepNotStorable: the function has run, and what it returned can't be recorded.
        :raises StoreUnavailable: the store can't be reached. Where the function has run already,
            its result was tried to record for 10 s, and is not known to be recorded.
        """
        if self._transaction is not None:
            raise StepRefused(
                f"step {name!r} was not run: in transaction mode a rollback would forget what has"
                " happened. Use a policy without transaction=True"
            )
        if self.ended:
            raise StepRefused(f"step {name!r} was not run: its operation has ended")
        if self.lost:
            raise ClaimLost(f"step {name!r} was not run: its claim is lost, somebody else has it")
        result: _T = self._steps.run(name, function)
        return result

    def guard(self, session: Any) -> None:
        """Fence off what a session commits, and mark the operation as done with it.

        For an application that commits by itself on the database where the keys are. Each
        transaction that the session commits from now on, until the operation ends, also marks
        the operation's row, or is rolled back if somebody else has taken the operation over.
        From its first commit on the operation is done: whatever becomes of the response, no
        retry runs the handler again. One that finds no response gets what the policy's
        ``rebuild`` makes, or 409 ``RESPONSE_NOT_REPLAYABLE``. A transaction that has written
        nothing is left alone.

        :param session: a :class:`sqlalchemy.orm.Session` or ``scoped_session``, or a
            :class:`sqlalchemy.Connection`; also in the middle of a transaction.
        :raises GuardRefused: it is something else, the policy has ``transaction=True``, which
            commits by itself, the store is not PostgreSQL or SQLite, or the operation has ended.
            From the session's ``commit()``: its database is not the store's, it is in
            autocommit, or an earlier transaction of the operation may be committed, whose
            connection broke in its COMMIT.
        :raises ClaimLost: from the session's ``commit()``: somebody else has taken the operation
            over, and everything that this transaction wrote is rolled back.
        """
        if self._transaction is not None:
            raise GuardRefused(
                "the policy has transaction=True, which fences and commits by itself; write on"
                " operation.connection, or use a policy without it"
            )
        if not callable(getattr(self._store, "guard", None)):
            raise GuardRefused(
                "the store has no database that a session could commit in; use PostgreSQL or SQLite"
            )
        if self.ended:
            raise GuardRefused("the operation has ended: there is nothing to guard any more")
        store = cast("GuardingStore", self._store)
        self._guards.append(store.guard(session, self._claim, self._guards))

    @property
    def marked(self) -> bool:
        """A guarded transaction has been marked: the operation's effects may be committed."""
        return any(guard.marked for guard in self._guards)

    def end(self) -> None:
        """Its outcome is about to be settled: sessions are guarded no longer."""
        self.ended = True
        for guard in self._guards:
            guard.remove()

    def derive_key(self, name: str) -> str:
        """A key for a call to another system: the same on every attempt at this operation,
        another one for each name, each payload and each operation.

        :param name: what the call is for, for example ``"charge"``.
        :returns: a UUID (RFC 9562 section 5.8, version 8) in its usual text form.
        :raises ValueError: the name is empty.
        """
        if not name:
            raise ValueError("derive_key needs a name that says what the call is for")
        parts = (self._claim.digest, self._claim.fingerprint, name.encode())
        message = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
        key = b"wsgi-idempotency derived key 1" + (self._secret or b"")
        digest = bytearray(hmac.digest(hashlib.sha256(key).digest(), message, "sha256")[:16])
        digest[6] = digest[6] & 0x0F | 0x80
        digest[8] = digest[8] & 0x3F | 0x80
        return str(uuid.UUID(bytes=bytes(digest)))

    def store(self) -> None:
        """Record this response and replay it, whatever the policy says of its status."""
        self.overrule = Action.STORE

    def forget(self) -> None:
        """Nothing happened: the key is fresh after this response."""
        self.overrule = Action.FORGET

    def release(self) -> None:
        """The same request may run again after this response."""
        self.overrule = Action.RELEASE

    def hold(self) -> None:
        """Nobody runs it again until it has been resolved."""
        self.overrule = Action.HOLD


running: ContextVar[Operation] = ContextVar("wsgi_idempotency.operation")

#: The operation of the request that is running in this thread or greenlet. False in a
#: boolean context, and RuntimeError on any other use, where there is none.
current_operation: Operation = LocalProxy(  # type: ignore[assignment]
    running,
    unbound_message=(
        "no idempotent operation is running here: the request carries no key, its route"
        " has no policy, or the application is not wrapped in IdempotencyMiddleware"
    ),
)
