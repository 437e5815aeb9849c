"""Operations on a store as the middleware makes them, in threads, counted."""

from __future__ import annotations

import hashlib
import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable

from wsgi_idempotency import SQLStore
from wsgi_idempotency.records import Claim, Claimed, Completion, Lapse, Record

HEADERS = (("Content-Type", "application/json"), ("Location", "/payments/1"))


def digest_of(number: int) -> bytes:
    """As bench/rows.py makes the digests of what it loads."""
    return hashlib.sha256(number.to_bytes(8, "big", signed=True)).digest()


def claim_of(digest: bytes, *, asynchronous: bool = False) -> Claim:
    return Claim(
        digest=digest,
        token=os.urandom(16),
        fingerprint=digest,
        fingerprint_version=1,
        scope="everyone",
        key="k",
        method="POST",
        path="/payments",
        lease=60.0,
        retention=86400.0,
        lapse=Lapse.RELEASE,
        asynchronous=asynchronous,
    )


def fresh(store: SQLStore, *, body: int = 100, asynchronous: bool = False) -> Callable[[], None]:
    """Claim a key nobody has had, and complete it."""
    completion = Completion("201 Created", HEADERS, b"x" * body)

    def operate() -> None:
        claim = claim_of(os.urandom(32), asynchronous=asynchronous)
        assert isinstance(store.claim(claim), Claimed)
        assert store.complete(claim.digest, claim.token, completion)

    return operate


def replay(store: SQLStore, rows: int) -> Callable[[], None]:
    """Claim keys that are done, one after the other, all over the table."""
    numbers = itertools.count(1)

    def operate() -> None:
        number = next(numbers) * 7919 % rows + 1
        found = store.claim(claim_of(digest_of(number)))
        assert isinstance(found, Record)
        assert found.body is not None

    return operate


def per_second(operate: Callable[[], None], *, threads: int, seconds: float) -> float:
    """How often so many threads can do it in a second."""
    counts = [0] * threads
    ready = threading.Barrier(threads + 1)
    over = threading.Event()

    def run(which: int) -> None:
        operate()  # connects, prepares
        ready.wait()
        while not over.is_set():
            operate()
            counts[which] += 1

    running = [threading.Thread(target=run, args=(which,)) for which in range(threads)]
    for thread in running:
        thread.start()
    ready.wait()
    started = time.perf_counter()
    over.wait(seconds)
    over.set()
    for thread in running:
        thread.join()
    return sum(counts) / (time.perf_counter() - started)


def milliseconds(operate: Callable[[], None], times: int) -> float:
    """What one takes at the median, alone."""
    operate()
    took = []
    for _ in range(times):
        started = time.perf_counter()
        operate()
        took.append(time.perf_counter() - started)
    return statistics.median(took) * 1e3
