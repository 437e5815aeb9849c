"""Operations whose outcome nobody knows, for tests of what becomes of them."""

from __future__ import annotations

from typing import Any

from apps.shop import query

from wsgi_idempotency import SQLStore
from wsgi_idempotency.records import Claim, Claimed
from wsgi_idempotency.testing import make_claim

OVER = 0.0  # a lease that has run out at once


def held(store: SQLStore, name: str = "a key", **changes: Any) -> Claim:
    """A claim whose handler ended with HOLD."""
    claim = make_claim(name, **changes)
    assert store.claim(claim) == Claimed(1)
    assert store.hold(claim.digest, claim.token) is True
    return claim


def lapsed(store: SQLStore, name: str = "a key", **changes: Any) -> Claim:
    """A claim whose worker is gone."""
    claim = make_claim(name, lease=OVER, **changes)
    assert store.claim(claim) == Claimed(1)
    return claim


def age_rows(url: str, seconds: float, *, each: float = 0) -> None:
    """Let all rows be older: by so much, and each by so much more than the one after it."""
    ago = "- interval '{} seconds'" if url.startswith("postgresql") else "- {}"
    keys = query(url, "SELECT idempotency_key FROM idempotency_keys ORDER BY idempotency_key DESC")
    for number, row in enumerate(keys):
        changes = ", ".join(
            f"{column} = {column} {ago.format(seconds + number * each)}"
            for column in ("created_at", "lease_until", "expires_at")
        )
        key = row["idempotency_key"]
        query(url, f"UPDATE idempotency_keys SET {changes} WHERE idempotency_key = '{key}'")
