"""A store that knows the answer, for what the middleware itself costs."""

from __future__ import annotations

from collections.abc import Iterable

from wsgi_idempotency.records import Claim, Claimed, Completion, Lapse, Record, State


class NullStore:
    """Answers at once, and keeps nothing.

    :param replay: what every key has been answered with; None for keys that are all fresh.
    """

    def __init__(self, replay: Completion | None = None) -> None:
        self._replay = replay

    def claim(self, claim: Claim) -> Claimed | Record:
        if self._replay is None:
            return Claimed(attempt=1)
        return Record(
            digest=claim.digest,
            token=b"t" * 16,
            state=State.COMPLETED,
            fingerprint=claim.fingerprint,
            fingerprint_version=claim.fingerprint_version,
            attempt=1,
            lapse=Lapse.RELEASE,
            lapsed=False,
            past_retention=False,
            age=1.0,
            lease_left=59.0,
            status=self._replay.status,
            headers=self._replay.headers,
            body=self._replay.body,
        )

    def take_over(self, claim: Claim, seen: Record) -> Claimed | None:
        return None

    def lookup(self, digest: bytes) -> Record | None:
        return None

    def complete(self, digest: bytes, token: bytes, completion: Completion) -> bool:
        return True

    def release(self, digest: bytes, token: bytes) -> bool:
        return True

    def forget(self, digest: bytes, token: bytes) -> bool:
        return True

    def hold(self, digest: bytes, token: bytes) -> bool:
        return True

    def renew(self, claims: Iterable[tuple[bytes, bytes, float]]) -> set[bytes]:
        return {token for _, token, _ in claims}

    def purge(self, limit: int) -> int:
        return 0

    def check(self) -> None:
        """There is nothing to check."""

    def close(self) -> None:
        """There is nothing to close."""
