"""Events in the log, with their fields as ``extra`` for whoever writes JSON."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from wsgi_idempotency.events import Event
from wsgi_idempotency.scope import printable

#: How loud an event is, unless it is here by its name and action.
LEVELS: Mapping[str, int] = {
    "executed": logging.INFO,
    "executed hold": logging.WARNING,  # somebody will have to find out
    "replayed": logging.INFO,
    "conflict": logging.INFO,
    "waited": logging.DEBUG,  # the decision it waited for has how long
    "taken_over": logging.INFO,
    "purged": logging.INFO,
    "refused": logging.INFO,  # what is our fault among them is logged as an error already
    "mismatch": logging.WARNING,  # a client uses a key twice, or a proxy changes requests
    "held": logging.WARNING,
    "not_replayable": logging.WARNING,
    "lapsed": logging.WARNING,
    "fenced": logging.ERROR,  # two handlers have run
    "store_failure": logging.ERROR,
    "unprotected": logging.ERROR,
}

_FIELDS = (
    "method", "route", "key_digest", "attempt", "code", "action", "seconds", "store_seconds",
    "waited_seconds", "count",
)  # fmt: skip


class LogObserver:
    """Logs each event, in one line and as fields.

    The fields are attributes of the record: ``idempotency_event`` is the name, and the others
    of :class:`~wsgi_idempotency.Event` have ``idempotency_`` before theirs. There is no key
    among them but its digest, and of an exception only its type: what it says may be of the
    request.

    :param logger: where to.
    :param levels: levels by an event's name, or by its name, a space and its action; those of
        :data:`LEVELS` count for what is not there.
    """

    def __init__(
        self, logger: logging.Logger | None = None, levels: Mapping[str, int] | None = None
    ) -> None:
        self.logger = logger or logging.getLogger("wsgi_idempotency.events")
        self.levels = {**LEVELS, **(levels or {})}

    def __call__(self, event: Event) -> None:
        level = self.levels.get(event.name, logging.INFO)
        level = self.levels.get(f"{event.name} {event.action}", level)
        if not self.logger.isEnabledFor(level):
            return
        fields = {name: getattr(event, name) for name in _FIELDS}
        fields["path"] = printable(event.path)
        fields["method"] = printable(event.method)
        fields["exception"] = None if event.exception is None else type(event.exception).__name__
        self.logger.log(
            level,
            "%s",
            _line(event.name, fields),
            extra={
                "idempotency_event": event.name,
                **{f"idempotency_{name}": value for name, value in fields.items()},
            },
        )


def _line(name: str, fields: Mapping[str, object]) -> str:
    """``replayed POST /pay digest=ab12... store=0.002s``"""
    words = [name, fields["method"], fields["path"]]
    shown = {
        "digest": fields["key_digest"],
        **{name: fields[name] for name in ("attempt", "code", "action", "count", "exception")},
    }
    words += [f"{name}={value}" for name, value in shown.items() if value not in (None, "")]
    for label, field in (
        ("took", "seconds"),
        ("store", "store_seconds"),
        ("waited", "waited_seconds"),
    ):
        seconds = fields[field]
        if isinstance(seconds, float):
            words.append(f"{label}={seconds:.3f}s")
    return " ".join(str(word) for word in words if word)


#: A :class:`LogObserver` with its defaults.
observe = LogObserver()
