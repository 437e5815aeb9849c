"""Deletes expired rows, for a job of the application's own; ``wsgi-idempotency purge`` is one."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from wsgi_idempotency.errors import StoreError
from wsgi_idempotency.events import Event, Observer, Observers

if TYPE_CHECKING:
    from wsgi_idempotency.stores.sql import SQLStore

logger = logging.getLogger("wsgi_idempotency")


def purge(
    store: SQLStore,
    *,
    batch: int = 1000,  # rows; some tens of milliseconds
    sleep: float = 0.1,  # seconds; leaves the disk to requests
    older_than: float = 0.0,  # seconds
    max_batches: int | None = None,
    stop: threading.Event | None = None,
    on_event: Observer | Iterable[Observer] = (),
) -> Iterator[int]:
    """Delete expired rows, the oldest first, until there are none.

    Rows in flight, held, or within their retention stay. Each batch is a transaction of its
    own, which waits for nobody, and is all that a request ever waits for, so that any number of
    hosts may purge.

    :param store: where they are.
    :param batch: rows that a statement deletes at most.
    :param sleep: seconds to rest between batches.
    :param older_than: seconds that a row is kept after it has expired, for people to look at.
        It counts as absent all the same.
    :param max_batches: stop after so many.
    :param stop: set it to end after the batch at hand.
    :param on_event: observers, told ``purged`` of each batch that deleted something.
    :returns: an iterator that works as it is consumed: the rows each batch has deleted.
    :raises StoreError: the store can't be reached; what was deleted is deleted.
    """
    observers, stop = Observers(on_event), stop or threading.Event()
    batches = 0
    while not stop.is_set():
        started = time.monotonic()
        count = store.purge(batch, older_than=older_than)
        seconds = time.monotonic() - started
        if count:
            observers.tell(
                Event(name="purged", count=count, seconds=seconds, store_seconds=seconds)
            )
        yield count
        batches += 1
        if count < batch or batches == max_batches:
            return
        stop.wait(sleep)


def purge_forever(
    store: SQLStore,
    *,
    interval: float = 600.0,  # seconds
    batch: int = 1000,
    sleep: float = 0.1,
    older_than: float = 0.0,
    max_batches: int | None = None,
    stop: threading.Event | None = None,
    on_event: Observer | Iterable[Observer] = (),
) -> Iterator[int]:
    """Purge again and again; as :func:`purge`, but a store that can't be reached is logged and
    tried again.

    :param interval: seconds from the end of one purge to the next, on average: each pause is
        between a half and one and a half of it, so that hosts that were started together don't
        purge together.
    :param max_batches: of one purge. It, ``batch``, ``sleep``, ``older_than``, ``stop`` and
        ``on_event`` are as for :func:`purge`.
    :returns: an iterator that works as it is consumed, until ``stop`` is set: the rows each batch
        has deleted.
    """
    stop = stop or threading.Event()
    while not stop.is_set():
        try:
            yield from purge(
                store,
                batch=batch,
                sleep=sleep,
                older_than=older_than,
                max_batches=max_batches,
                stop=stop,
                on_event=on_event,
            )
        except StoreError as exc:
            logger.error("a purge broke off, and is tried again: %s", exc)
        stop.wait(interval * random.uniform(0.5, 1.5))
