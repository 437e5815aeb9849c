"""The contract of a store: every promise, in writing.

:class:`wsgi_idempotency.testing.StoreConformance` tests each of them; a store that
passes it may be handed to :class:`~wsgi_idempotency.IdempotencyMiddleware`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from wsgi_idempotency.records import Claim, Claimed, Completion, Record, Step


class Store(Protocol):
    """Records of idempotency keys, shared by every process that serves the application.

    Held by all methods:

    - The store's own clock decides what has lapsed or expired; the caller's never does.
    - A method is atomic against every other call on any thread, process or host.
    - A method may be called again with the same arguments after it raised
      :class:`~wsgi_idempotency.errors.StoreUnavailable`, whether or not the first
      call took effect.
    - A store that can't be reached raises
      :class:`~wsgi_idempotency.errors.StoreUnavailable` within a bounded time; where it
      broke off in the middle, so that the call may have taken effect,
      :class:`~wsgi_idempotency.errors.AnswerLost`, or its
      :class:`~wsgi_idempotency.errors.Disconnected` where it may be asked again at once.
    - It may be constructed before a fork and used after it, in parent and child.
    """

    def claim(self, claim: Claim) -> Claimed | Record:
        """Claim a key that has no row, or fetch the row that stands in the way.

        Of all calls for one digest with no row, exactly one returns
        :class:`~wsgi_idempotency.records.Claimed`; the others return its row. A row that
        has expired or lapsed is returned as it is, for :meth:`take_over`. A row that
        carries the caller's own token is the caller's claim, and is granted again.

        Not repeated by the store itself when its answer is lost: whoever repeats it has to
        know that the first may be made late, after everything that came of the second.

        :raises StoreUnavailable: the store can't be reached; the claim may have been made.
        :raises SchemaError: the schema is missing or old.
        :raises StoreError: it contradicts itself; nothing was claimed.
        """

    def take_over(self, claim: Claim, seen: Record) -> Claimed | None:
        """Claim a key whose row is released, has lapsed with RELEASE, or has expired.

        A compare-and-swap: granted only while the row still carries ``seen.token`` and
        still is what makes it free, on the store's clock now. The row gets
        ``claim.token``, a new lease and a new retention. ``attempt`` is one more than
        before; for an expired row, which counts as absent, it is 1.

        In a store whose rows have ``effects``, it is granted only while ``seen.effects`` is
        still true of the row; and of a lapsed one with effects also where a lapse is to hold,
        since the operation is done and only its response is wanted: ``attempt`` stays.

        Not repeated by the store itself, as :meth:`claim`.

        :returns: None when somebody else was first or the row has changed or gone:
            claim again.
        :raises StoreUnavailable: the store can't be reached; it may have been granted.
        """

    def lookup(self, digest: bytes) -> Record | None:
        """Fetch a row without claiming it; None when there is none.

        :raises StoreUnavailable: the store can't be reached.
        """

    def complete(self, digest: bytes, token: bytes, completion: Completion) -> bool:
        """Record a finished operation, if the caller's token is still on the row.

        Also of a claim whose lease has run out but which nobody took over, and of one that
        is held: a worker that was only slow may complete it until somebody resolves it.
        ``expires_at`` stays what it was. Called again with the same token it stays
        recorded, and the answer is True.

        :returns: False when the claim was lost; nothing has changed then.
        :raises NotStorable: the store can't take this response, because of its size or
            content; the claim stands.
        :raises StoreUnavailable: the store can't be reached; it may have been recorded.
        """

    def release(self, digest: bytes, token: bytes) -> bool:
        """Let the same request run again; False (and no change) when the claim was lost.

        Also of a row that is held, as :meth:`complete`.
        """

    def forget(self, digest: bytes, token: bytes) -> bool:
        """Drop the row of a claim; False (and no change) when the claim was lost.

        Also of a row that is held, as :meth:`complete`.
        """

    def hold(self, digest: bytes, token: bytes) -> bool:
        """Keep everybody out until it is resolved; False (and no change) when it was lost."""

    def renew(self, claims: Iterable[tuple[bytes, bytes, float]]) -> set[bytes]:
        """Extend leases: one statement for many (digest, token, lease in seconds).

        A row that is held stays held, and its worker still has it: ``lease_until``, before
        which no reconciler looks at it, becomes no earlier.

        :returns: the tokens that still hold their claim; the others have lost it. One whose row
            a transaction of the application's has locked counts as held.
        :raises StoreUnavailable: the store can't be reached; leases run on as they were.
        """

    def purge(self, limit: int) -> int:
        """Delete at most ``limit`` expired rows, oldest first, in one short transaction.

        Never one before its ``expires_at``, in flight, or held. Rows that another purge
        is deleting are skipped, so that no row is counted twice.

        :returns: how many rows were deleted; less than ``limit`` when no more are free.
        :raises StoreUnavailable: the store can't be reached.
        """

    def check(self) -> None:
        """Connect and verify the schema, for use at deploy time.

        :raises SchemaError: the schema is missing or old; the message names the command.
        :raises StoreUnavailable: the store can't be reached.
        """

    def close(self) -> None:
        """Give back connections and threads. The store may be used again afterwards."""


@runtime_checkable
class StepStore(Store, Protocol):
    """The optional ability to remember the steps of an operation.

    Needed for :meth:`Operation.step <wsgi_idempotency.Operation.step>`. Steps are the
    operation's: whoever takes a released or lapsed row over finds them, and who claims an
    expired or forgotten key does not. They go with the row.
    """

    def step(self, digest: bytes, token: bytes, name: str) -> Step | None:
        """What is known of a step, if the claim is still the caller's and neither held nor
        settled; None when it isn't.

        :raises StoreUnavailable: the store can't be reached.
        """

    def record_step(self, digest: bytes, token: bytes, name: str, result: str) -> bool:
        """Record a finished step, if the caller's token is still on the row, in flight or held.

        Called again with the same arguments it stays recorded, and the answer is True.

        :param result: JSON text, of ASCII characters.
        :returns: False when the claim was lost; nothing is recorded then.
        :raises NotStorable: the store can't take this result because of its size.
        :raises StoreUnavailable: the store can't be reached; it may have been recorded.
        """


class Guard(Protocol):
    """What watches an application's own transactions for one operation."""

    #: A transaction has been marked; whether it was committed, the row says.
    marked: bool

    @property
    def unheard(self) -> bool:
        """A transaction's COMMIT may have taken effect, and its application doesn't know: its
        connection broke."""

    def remove(self) -> None:
        """Watch no longer."""


@runtime_checkable
class GuardingStore(Store, Protocol):
    """The optional ability to fence and to mark the transactions that an application commits
    by itself on the store's database.

    Needed for :meth:`Operation.guard <wsgi_idempotency.Operation.guard>`. A row whose effects
    are marked is done: :meth:`Store.forget` leaves it, and whoever takes it over only makes its
    response.
    """

    def guard(self, target: Any, claim: Claim, siblings: Sequence[Guard] = ()) -> Guard:
        """Watch what the application hands over, until it is told not to.

        :param target: a session or a connection, as the store's own documentation says.
        :param claim: the one its transactions are fenced with.
        :param siblings: the guards of the same operation, also those to come. While the COMMIT
            of one is unheard, no other commits what might be the same, done twice.
        :returns: what watches it.
        :raises GuardRefused: it can't be guarded.
        """


class Transaction(Protocol):
    """A transaction of the store's database, in which the application writes too.

    While it is open nobody else claims its key: the key's lock is the transaction's, and
    ends with it, however it ends. It belongs to one request, and to the thread that runs it.
    """

    #: Granted if the key was free; None where ``seen`` stands in the way.
    claimed: Claimed | None

    #: The row that stands under the key, or None.
    seen: Record | None

    @property
    def connection(self) -> Any:
        """What the application joins with: of :class:`~wsgi_idempotency.SQLStore` a
        :class:`sqlalchemy.Connection`."""

    def take_over(self, claim: Claim, seen: Record) -> Claimed | None:
        """Claim, within the transaction, a key whose row is free; as
        :meth:`Store.take_over`. None when the row has changed: roll back and begin again.

        :raises TransactionConflict: another transaction changed it; nothing happened.
        :raises StoreUnavailable: the store can't be reached; nothing happened.
        """

    def complete(self, completion: Completion) -> None:
        """Record the response and commit it together with what the application wrote.

        The transaction is over afterwards, whatever this raises.

        :raises TransactionConflict: a serialization failure or deadlock; nothing happened.
        :raises TransactionFailed: it can't be committed, because of what the application
            did with it (an error it ignored, its own rollback, a deferred constraint) or
            because the response can't be stored; nothing happened.
        :raises CommitUnknown: the answer to COMMIT was lost, and whether it took effect
            could not be found out in time.
        :raises StoreUnavailable: the store can't be reached; nothing happened.
        """

    def rollback(self) -> None:
        """Undo everything, and free the key. Raises nothing: a transaction whose connection
        is lost is rolled back by the store itself."""

    def conflicted(self, exc: BaseException | None) -> bool:
        """Whether a serialization failure or a deadlock has spoilt the transaction.

        :param exc: what the application raised, or None.
        """


@runtime_checkable
class TransactionalStore(Store, Protocol):
    """The optional ability to record a response in the application's own transaction.

    Needed for ``Policy(transaction=True)``: exactly once, for what the application writes
    through the transaction's connection.
    """

    def begin(
        self, claim: Claim, *, isolation_level: str | None = None, wait: float = 0.0
    ) -> Transaction | None:
        """Begin a transaction, lock the key, and claim it or fetch its row.

        Of all calls for one digest at most one at a time has a transaction in which it
        may claim. A row that another transaction committed before this one got the lock
        is seen, whatever the isolation level.

        :param isolation_level: ``"READ COMMITTED"``, ``"REPEATABLE READ"`` or
            ``"SERIALIZABLE"``; None for the database's default.
        :param wait: seconds to wait at most for the transaction that has the key.
        :returns: None when another transaction still has the key after the wait.
        :raises StoreUnavailable: the store can't be reached, or has no connection free;
            nothing was claimed.
        """


@runtime_checkable
class AsynchronousStore(Store, Protocol):
    """The optional ability to grant a claim before it is on the disk.

    Needed for ``Policy(claim_durability="asynchronous")``. A claim that has ``asynchronous``
    set may be forgotten when the store crashes, and not otherwise; and not any more once
    anything that was done under it has become durable in the same store.
    """

    @property
    def claims_asynchronously(self) -> bool:
        """Whether this one has it."""
