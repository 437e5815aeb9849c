"""Tells of what a handler writes beside the transaction it is to join.

For development: a listener on every engine of the process, which costs each statement a look
at the context, and a handler that writes a look at its stack.
"""

from __future__ import annotations

import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import sqlalchemy
from sqlalchemy import Connection, Engine, event

from wsgi_idempotency.errors import ForeignWrite
from wsgi_idempotency.operation import running
from wsgi_idempotency.stores.transactions import _joined

_WRITES = re.compile(
    r"\s*(INSERT|UPDATE|DELETE|MERGE|REPLACE|COPY|CREATE|ALTER|DROP|TRUNCATE|CALL)\b"
    r"|\s*WITH\b.*\b(INSERT|UPDATE|DELETE|MERGE)\b",
    re.IGNORECASE | re.DOTALL,
)

_OURS = str(Path(__file__).parent)
_THEIRS = str(Path(sqlalchemy.__file__).parent)

_lock = threading.Lock()
_watchers = 0


def watch() -> None:
    """From now on, warn of what a handler writes on any other connection of SQLAlchemy's than
    ``current_operation.connection``: once for each place in the code, unless a filter of
    :mod:`warnings` says otherwise. May be called again."""
    global _watchers
    with _lock:
        _watchers += 1
        if _watchers == 1:
            event.listen(Engine, "before_cursor_execute", _look)


def stop() -> None:
    """Undo one :func:`watch`."""
    global _watchers
    with _lock:
        _watchers -= 1
        if _watchers == 0:
            event.remove(Engine, "before_cursor_execute", _look)


@contextmanager
def watched() -> Iterator[None]:
    """Warn within."""
    watch()
    try:
        yield
    finally:
        stop()


def _look(connection: Connection, cursor: object, statement: str, *_: object) -> None:
    operation = running.get(None)
    if operation is None or operation.ended or not operation.transactional:
        return
    if _joined(connection) is not None or not _WRITES.match(statement):
        return
    frame: FrameType = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_THEIRS, _OURS)):
        frame = frame.f_back
    verb = statement.split(None, 1)[0].upper()
    warnings.warn_explicit(
        f"this {verb} is not in the transaction that the handler runs in: it is committed by"
        " itself, and stays when the operation is undone. Write on current_operation.connection,"
        " or where that is meant (an audit trail), filter this warning",
        ForeignWrite,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )
