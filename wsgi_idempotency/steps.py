"""Steps: the parts of an operation that are done once, and remembered.

A step's function runs, and what it returned is recorded at once in a transaction of its
own; an attempt that comes later gets the result instead. Between the two nothing is sure: a
worker that dies when the function has run and nothing is recorded leaves a step that runs
again. So a call to another system carries a key of its own
(:meth:`~wsgi_idempotency.Operation.derive_key`).
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast

from wsgi_idempotency.errors import (
    ClaimLost,
    CorruptRecord,
    NotStorable,
    StepNotStorable,
    StepRefused,
    StoreUnavailable,
)
from wsgi_idempotency.records import Claim

if TYPE_CHECKING:
    from wsgi_idempotency.stores.base import StepStore, Store

logger = logging.getLogger("wsgi_idempotency")

#: The longest name of a step, in characters.
LONGEST_NAME = 200

#: How long a result is tried to record that the store doesn't take, in seconds. What it stands
#: for has happened, so it is worth some patience; a server's own time-out is about 30 s.
RECORD_FOR = 10.0

_FIRST_RETRY = 0.1  # seconds; doubled each time


class Steps:
    """The steps of one attempt at an operation.

    :param store: where they are recorded; None when there is none that can.
    :param max_bytes: the largest result, in bytes of JSON.
    """

    def __init__(self, claim: Claim, store: Store | None, max_bytes: int) -> None:
        self._claim = claim
        able = callable(getattr(store, "record_step", None))
        self._store = cast("StepStore", store) if able else None
        self._max_bytes = max_bytes
        self._lock = threading.Lock()  # a handler may run steps in several threads at once
        self._names: set[str] = set()

    def run(self, name: str, function: Callable[[], Any]) -> Any:
        """See :meth:`~wsgi_idempotency.Operation.step`."""
        if not isinstance(name, str):
            raise TypeError(f"the name of a step is {name!r}; use a text")
        if not (0 < len(name) <= LONGEST_NAME and name.isprintable()):
            raise ValueError(
                f"the name of a step is {name!r:.300}; use 1 to {LONGEST_NAME} printable characters"
            )
        if self._store is None:
            raise StepRefused(
                f"the store can't record steps, so {name!r} was not run; use PostgreSQL, SQLite or"
                " MemoryStore"
            )
        outer = _running.get()
        if outer is not None and outer[0] is self:
            raise StepRefused(
                f"step {name!r} is inside step {outer[1]!r}, and was not run: a later attempt would"
                " skip both or repeat both. Let one follow the other"
            )
        with self._lock:
            if name in self._names:
                raise StepRefused(
                    f"step {name!r} has run in this attempt already; give each step its own name"
                )
            self._names.add(name)
        return self._run(self._store, name, function)

    def _run(self, store: StepStore, name: str, function: Callable[[], Any]) -> Any:
        token = _running.set((self, name))
        try:
            known = store.step(self._claim.digest, self._claim.token, name)
            if known is None:
                raise ClaimLost(
                    f"step {name!r} was not run: its claim is lost. Somebody else has it, or it is"
                    " held"
                )
            if known.result is not None:
                return _read(name, known.result)
            result = function()
        except BaseException:
            # Nothing came of it, so that this attempt may try the same step again.
            with self._lock:
                self._names.discard(name)
            raise
        finally:
            _running.reset(token)
        text, as_later_attempts_see_it = self._json(name, result)
        self._record(store, name, text)
        return as_later_attempts_see_it

    def _json(self, name: str, result: Any) -> tuple[str, Any]:
        try:
            text = json.dumps(result, allow_nan=False, separators=(",", ":"))
            read_back = json.loads(text)
        except (TypeError, ValueError, RecursionError) as exc:
            raise StepNotStorable(
                f"step {name!r} has run, and is not recorded: what it returned is not JSON ({exc})."
                " Return what later steps need, as dict, list, str, int, float, bool or None"
            ) from exc
        if len(text) > self._max_bytes:
            raise StepNotStorable(
                f"step {name!r} has run, and is not recorded: its result has {len(text)} bytes as"
                f" JSON, and max_step_bytes is {self._max_bytes}"
            )
        return text, read_back

    def _record(self, store: StepStore, name: str, text: str) -> None:
        deadline = time.monotonic() + RECORD_FOR
        pause = _FIRST_RETRY
        while True:
            try:
                recorded = store.record_step(self._claim.digest, self._claim.token, name, text)
                break
            except NotStorable as exc:
                raise StepNotStorable(f"step {name!r} has run, and is not recorded: {exc}") from exc
            except StoreUnavailable as exc:
                if time.monotonic() + pause > deadline:
                    raise
                logger.warning("step %r has run, and can't be recorded yet: %s", name, exc)
            time.sleep(pause)
            pause *= 2
        if not recorded:
            raise ClaimLost(
                f"step {name!r} has run, and is not recorded: its claim is lost, somebody else"
                " has it"
            )


def _read(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise CorruptRecord(
            f"step {name!r} has run in an earlier attempt, and what was recorded of it can't be"
            f" read: {exc}"
        ) from exc


#: The step that is running in this thread or greenlet, and whose it is.
_running: ContextVar[tuple[Steps, str] | None] = ContextVar("wsgi_idempotency.step", default=None)
