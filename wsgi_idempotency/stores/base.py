"""The contract of a store: every promise, in writing.

:class:`wsgi_idempotency.testing.StoreConformance` tests each of them; a store that
passes it may be handed to :class:`~wsgi_idempotency.IdempotencyMiddleware`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from wsgi_idempotency.records import Claim, Claimed, Completion, Record


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
      :class:`~wsgi_idempotency.errors.AnswerLost`.
    - It may be constructed before a fork and used after it, in parent and child.
    """

    def claim(self, claim: Claim) -> Claimed | Record:
        """Claim a key that has no row, or fetch the row that stands in the way.

        Of all calls for one digest with no row, exactly one returns
        :class:`~wsgi_idempotency.records.Claimed`; the others return its row. A row that
        has expired or lapsed is returned as it is, for :meth:`take_over`. A row that
        carries the caller's own token is the caller's claim, and is granted again.

        :raises StoreUnavailable: the store can't be reached; the claim may have been made.
        :raises SchemaError: the schema is missing or old.
        """

    def take_over(self, claim: Claim, seen: Record) -> Claimed | None:
        """Claim a key whose row is released, has lapsed with RELEASE, or has expired.

        A compare-and-swap: granted only while the row still carries ``seen.token`` and
        still is what makes it free, on the store's clock now. The row gets
        ``claim.token``, a new lease and a new retention. ``attempt`` is one more than
        before; for an expired row, which counts as absent, it is 1.

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
        """Let the same request run again; False (and no change) when the claim was lost."""

    def forget(self, digest: bytes, token: bytes) -> bool:
        """Drop the row of a claim; False (and no change) when the claim was lost."""

    def hold(self, digest: bytes, token: bytes) -> bool:
        """Keep everybody out until it is resolved; False (and no change) when it was lost."""

    def renew(self, claims: Iterable[tuple[bytes, bytes, float]]) -> set[bytes]:
        """Extend leases: one statement for many (digest, token, lease in seconds).

        :returns: the tokens that still hold their claim; the others have lost it.
        :raises StoreUnavailable: the store can't be reached; leases run on as they were.
        """

    def purge(self, limit: int) -> int:
        """Delete at most ``limit`` expired rows, oldest first, without blocking requests.

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
