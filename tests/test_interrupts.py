"""A thread that is interrupted between any two lines: a signal's handler raises, a greenlet is
killed, a server's time-out strikes; and the process lives on."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from sqlalchemy import text
from werkzeug.test import create_environ
from werkzeug.wrappers import Response

import wsgi_idempotency
from wsgi_idempotency import (
    IdempotencyMiddleware,
    MemoryStore,
    Policy,
    SQLStore,
    current_operation,
    everyone,
)

PACKAGE = Path(wsgi_idempotency.__file__).parent
FILES = ("middleware.py", "capture.py", "operation.py", "stores/transactions.py")

#: By file, the lines at which nobody is interrupted: at the end of a block the line of its "with"
#: comes again, and who is stopped there never leaves what it has entered.
NOT_AT = {
    str(PACKAGE / file): {
        number
        for number, line in enumerate((PACKAGE / file).read_text().splitlines(), 1)
        if line.lstrip().startswith("with ")
    }
    for file in FILES
}


class Interrupt(BaseException):
    """Raised where a line was to be run."""


class Interrupting:
    """Raises instead of running the n-th line, if there are so many."""

    def __init__(self, number: int) -> None:
        self._left = number
        self.struck: str | None = None

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        not_at = NOT_AT.get(frame.f_code.co_filename)
        if not_at is None or frame.f_code.co_name == "__del__":
            return None
        if event == "line" and frame.f_lineno not in not_at:
            self._left -= 1
            if not self._left:
                self.struck = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise Interrupt
        return self


def interrupted(call: Callable[[], object], number: int) -> str | None:
    """Run ``call`` in a thread, interrupted before its n-th line; which one that was."""
    interrupting = Interrupting(number)

    def run() -> None:
        sys.settrace(interrupting)
        try:
            call()
        except Interrupt:
            pass
        finally:
            sys.settrace(None)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return interrupting.struck


def all_interrupts(post: Callable[[str], None]) -> Iterator[tuple[str, str]]:
    """Post once for each line that a request takes; the key, and the line it was stopped at."""
    post("what is done but once")
    number = 1
    while (line := interrupted(lambda: post(f"k{number}"), number)) is not None:  # noqa: B023
        yield f"k{number}", line
        number += 1
    assert number > 200


def poster(middleware: IdempotencyMiddleware) -> Callable[[str], None]:
    """A server, which closes what it got whatever happens, and is not interrupted in that."""

    def post(key: str) -> None:
        environ = create_environ("/", method="POST", headers={"Idempotency-Key": key}, data=b"x")
        answer: Any = middleware(environ, lambda *args: lambda data: None)
        try:
            list(answer)
        finally:
            if isinstance(sys.gettrace(), Interrupting):
                sys.settrace(None)
            getattr(answer, "close", lambda: None)()

    return post


@pytest.mark.parametrize(
    ("status", "body"),
    [(201, "done"), (422, "no"), (503, "not now"), (201, "larger than is stored"), (503, "x" * 20)],
    ids=["stored", "forgotten", "released", "passing, stored", "passing, released"],
)
def test_no_interrupt_has_a_claim_renewed_that_nobody_will_settle(status: int, body: str) -> None:
    """A process that lives on would keep it for its whole retention."""
    middleware = IdempotencyMiddleware(
        Response(body, status), MemoryStore(), scope=everyone, policy=Policy(max_response_bytes=10)
    )
    renewed = {}
    for _, line in all_interrupts(poster(middleware)):
        for kept in list(middleware.heartbeat._kept.values()):
            if kept.operation is not None and kept.finish is None:
                renewed[line] = middleware.heartbeat._kept.pop(kept.key)
    assert renewed == {}


@pytest.mark.parametrize("status", [201, 503], ids=["stored", "undone"])
def test_no_interrupt_leaves_a_transaction_behind(sqlite_url: str, status: int) -> None:
    """It would have the key's lock, and on SQLite everybody's; and what it wrote is committed if
    and only if its response is."""
    store = SQLStore(sqlite_url)

    def app(environ: Any, start_response: Any) -> Any:
        current_operation.connection.execute(
            text("INSERT INTO charges VALUES (:key)"), {"key": current_operation.key}
        )
        return Response("done", status)(environ, start_response)

    middleware = IdempotencyMiddleware(app, store, scope=everyone, policy=Policy(transaction=True))
    store.check()
    with store.engine.connect() as connection:
        connection.execute(text("CREATE TABLE charges (idempotency_key TEXT)"))
        for _, line in all_interrupts(poster(middleware)):
            if store.transactions.pool.checkedout():  # type: ignore[attr-defined]
                gc.collect()
            if store.transactions.pool.checkedout():  # type: ignore[attr-defined]
                pytest.fail(f"an interrupt at {line} left a transaction behind")
        charges = connection.scalars(text("SELECT idempotency_key FROM charges")).all()
        rows = connection.execute(text("SELECT idempotency_key, state FROM idempotency_keys")).all()
    assert sorted(rows) == [(key, "completed") for key in sorted(charges)]
    assert bool(charges) is (status == 201)
    store.close()
