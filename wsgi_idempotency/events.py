"""What happened to a request, told to whoever wants to count or log it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from wsgi_idempotency.errors import ConfigurationError

logger = logging.getLogger("wsgi_idempotency")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One decision of the middleware.

    :param name: one of ``executed``, ``replayed``, ``conflict``, ``mismatch``, ``waited``,
        ``taken_over``, ``lapsed``, ``held``, ``not_replayable``, ``fenced``, ``refused``,
        ``store_failure``, ``unprotected``.
    :param method: the request method.
    :param path: the full path.
    :param key_digest: hex of the key's digest; empty when the key was not known yet.
        Never the key itself: it may be logged.
    :param attempt: which attempt ran, or None when the handler did not run.
    :param code: the problem code, for an event that refused the request.
    :param action: what became of the claim (``store``, ``forget``, ``release``, ``hold``).
    :param seconds: how long it took: the handler for ``executed``, the wait for ``waited``.
    :param exception: what went wrong, or None.
    """

    name: str
    method: str
    path: str
    key_digest: str = ""
    attempt: int | None = None
    code: str | None = None
    action: str | None = None
    seconds: float | None = None
    exception: BaseException | None = None


Observer = Callable[[Event], object]


class Observers:
    """Tells every observer, and survives what they raise."""

    def __init__(self, observers: Observer | Iterable[Observer]) -> None:
        self._observers = (observers,) if callable(observers) else tuple(observers)
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
