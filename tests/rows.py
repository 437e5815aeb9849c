"""A record for tests of what a row means."""

from __future__ import annotations

from wsgi_idempotency.records import Lapse, Record, State

IN_FLIGHT = Record(
    digest=b"d" * 32,
    token=b"t" * 16,
    state=State.CLAIMED,
    fingerprint=b"f",
    fingerprint_version=1,
    attempt=1,
    lapse=Lapse.RELEASE,
    lapsed=False,
    past_retention=False,
    age=0.0,
    lease_left=60.0,
)
