"""What happened to a request, told to whoever wants to count or log it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from wsgi_idempotency.errors import ConfigurationError

logger = logging.getLogger("wsgi_idempotency")


#: The names of events. A metric may have a series for each.
NAMES = (
    "executed", "replayed", "conflict", "mismatch", "held", "not_replayable", "refused",
    "unprotected", "waited", "lapsed", "taken_over", "fenced", "store_failure", "purged",
)  # fmt: skip

#: Requests that would have run their handler again: it has run, is running, or may have run.
_OF_DUPLICATES = frozenset({"replayed", "conflict", "held", "not_replayable"})

#: What ends a request whose handler did not run under a claim.
_WITHOUT_A_RUN = _OF_DUPLICATES | {"mismatch", "refused", "unprotected"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One decision of the middleware, or one batch of a purge.

    :param name: one of

        - ``executed``: the handler ran; ``action`` says what became of its claim;
        - ``replayed``: the operation is done, and its response was sent again;
        - ``conflict``: another request is running it, and this one was told to come back;
        - ``mismatch``: the key was used for another request;
        - ``held``: nobody knows whether it happened, and nobody runs it until it is resolved;
        - ``not_replayable``: it is done, and its response can't be sent again;
        - ``refused``: for another reason, which ``code`` gives;
        - ``unprotected``: the handler ran without a claim, as ``on_store_failure="bypass"`` has
          it;
        - ``waited``: a duplicate has waited for the one in flight, before its own decision;
        - ``lapsed``: the worker that had the claim let its lease run out;
        - ``taken_over``: an operation that was released, had lapsed or had expired was claimed
          anew;
        - ``fenced``: the handler ran, and somebody had overtaken it: its response doesn't count;
        - ``store_failure``: the store could not be asked, or told;
        - ``purged``: a purge has deleted expired rows.

        Further names may be added.
    :param method: the request method; empty when no request is meant.
    :param path: the full path; empty when no request is meant.
    :param route: the rule of the :class:`Route` whose policy counts, or None for the default
        policy's. There are as many as are configured, so that it may label a metric.
    :param key_digest: hex of the key's digest; empty when the key was not known yet.
        Never the key itself: it may be logged.
    :param attempt: which attempt ran or runs, or None when the handler did not run.
    :param code: the problem code, for an event that refused the request.
    :param action: what became of the claim of ``executed``: ``store``, ``forget``, ``release``,
        ``hold``; None when the answer to a COMMIT was lost.
    :param seconds: how long it took: the handler for ``executed``, the wait for ``waited``,
        the batch for ``purged``.
    :param store_seconds: how long the store took so far, over all calls for the request; None
        when it was not asked. Heartbeats are not counted.
    :param waited_seconds: how long the request waited for the one in flight, or None.
    :param count: how many rows ``purged`` is about.
    :param exception: what went wrong, or None.

    Durations are by a monotonic clock.
    """

    name: str
    method: str = ""
    path: str = ""
    route: str | None = None
    key_digest: str = ""
    attempt: int | None = None
    code: str | None = None
    action: str | None = None
    seconds: float | None = None
    store_seconds: float | None = None
    waited_seconds: float | None = None
    count: int | None = None
    exception: BaseException | None = None

    @property
    def prevented(self) -> bool:
        """Whether a request that would have run its handler again was kept from it."""
        return self.name in _OF_DUPLICATES and self.attempt is None

    @property
    def final(self) -> bool:
        """Whether this is the one event that says how a request was decided. Each request with
        a key has one, and so has one that was refused for having none."""
        return self.name == "executed" or (self.name in _WITHOUT_A_RUN and self.attempt is None)


Observer = Callable[[Event], object]


class Observers:
    """Tells every observer, and survives what they raise."""

    def __init__(self, observers: Observer | Iterable[Observer]) -> None:
        if callable(observers) or not isinstance(observers, Iterable):
            observers = (observers,)
        self._observers: tuple[Observer, ...] = tuple(observers)
        for observer in self._observers:
            if not callable(observer):
                raise ConfigurationError(
                    f"on_event has {observer!r}; use callables (Event) -> None"
                )

    def __bool__(self) -> bool:
        return bool(self._observers)

    def tell(self, event: Event) -> None:
        for observer in self._observers:
            try:
                observer(event)
            except Exception:
                logger.exception("the observer %r failed on %s", observer, event.name)
