"""Die at a chosen edge of a request, so that a test can look at what a crash leaves behind.

.. code-block:: python

    from wsgi_idempotency.testing import CrashPoint, crash_at

    middleware = IdempotencyMiddleware(app, "sqlite:///shop.db", scope=everyone)
    doomed = crash_at(middleware, CrashPoint.BEFORE_SETTLE)

``doomed`` is an application that kills its process at that edge: serve it in a process of
its own, send a request, and send it again to another. Needs no pytest.
"""

from __future__ import annotations

import copy
import enum
import signal
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from wsgi_idempotency.records import Claimed

if TYPE_CHECKING:
    from _typeshed import OptExcInfo
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from wsgi_idempotency.middleware import IdempotencyMiddleware
    from wsgi_idempotency.records import Claim, Completion, Record
    from wsgi_idempotency.stores.base import Store, Transaction, TransactionalStore


class CrashPoint(enum.Enum):
    """An edge of the way of a protected request, in the order in which they are passed.

    BEFORE_CLAIM
        The request has been read, the store has not been asked. In transaction mode nothing
        has begun.
    AFTER_CLAIM
        The request has the claim, the handler has not been called. In transaction mode the
        transaction has begun and has the key's lock. Only a request that is to run the
        handler passes this edge.
    DURING_HANDLER
        The handler has called ``start_response``, and has not returned.
    BEFORE_SETTLE
        The handler has ended, its outcome is not recorded. In transaction mode this is
        before COMMIT or ROLLBACK.
    AFTER_SETTLE
        The outcome is recorded (stored, forgotten, released or held), or the transaction
        committed or rolled back. Nothing of the answer has been sent, unless it was one
        that can't be held back.
    BEFORE_FIRST_BYTE
        The server has the head of the answer, and asks for the body.
    AFTER_FIRST_BYTE
        The server has been handed the first byte of the body, alone. An answer without a
        body doesn't pass this edge.
    AFTER_ANSWER
        The server has been handed everything, and has closed the answer.
    """

    BEFORE_CLAIM = "before the claim"
    AFTER_CLAIM = "after the claim"
    DURING_HANDLER = "during the handler"
    BEFORE_SETTLE = "before the outcome is recorded"
    AFTER_SETTLE = "after the outcome is recorded"
    BEFORE_FIRST_BYTE = "before the first byte"
    AFTER_FIRST_BYTE = "after the first byte"
    AFTER_ANSWER = "after the answer"


#: Ends this process as ``kill -9`` does: nothing is cleaned up, no handler runs.
kill = cast("Callable[[], None]", partial(signal.raise_signal, signal.SIGKILL))


def _every(environ: WSGIEnvironment) -> bool:
    return True


def crash_at(
    middleware: IdempotencyMiddleware,
    point: CrashPoint,
    *,
    when: Callable[[WSGIEnvironment], bool] = _every,
    die: Callable[[], object] = kill,
) -> WSGIApplication:
    """Make an application that dies at an edge.

    :param middleware: the one to test; it is left as it is.
    :param point: the edge at which to die, once a request.
    :param when: which requests die, ``(environ) -> bool``; the default is every one. With a
        server that starts dead workers again, let a header field tell the first from its
        retry.
    :param die: ends the process; the default is SIGKILL. What it raises comes out of the
        middleware's call into its store, its application or its answer. If it returns, the
        request goes on, so a function that waits makes a worker that stands still.
    """

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if not when(environ):
            return middleware(environ, start_response)
        passed = _Edges(point, die).passed
        doomed = copy.copy(middleware)
        doomed.app = _handler(middleware.app, passed)
        doomed.store = cast("Store", _Store(middleware.store, passed))
        return _Answer(doomed(environ, start_response), passed)

    return application


_Passed = Callable[[CrashPoint], None]


class _Edges:
    """The edges of one request."""

    def __init__(self, point: CrashPoint, die: Callable[[], object]) -> None:
        self._point: CrashPoint | None = point
        self._die = die

    def passed(self, point: CrashPoint) -> None:
        if point is self._point:
            self._point = None
            self._die()


def _handler(app: WSGIApplication, passed: _Passed) -> WSGIApplication:
    def handler(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        def started(
            status: str, headers: list[tuple[str, str]], exc_info: OptExcInfo | None = None, /
        ) -> Callable[[bytes], object]:
            passed(CrashPoint.DURING_HANDLER)
            if exc_info is None:
                return start_response(status, headers)
            return start_response(status, headers, exc_info)

        return app(environ, started)

    return handler


class _Settling:
    """What ends an operation, for one that has begun."""

    def __init__(self, inner: Any, passed: _Passed) -> None:
        self._inner = inner
        self._passed = passed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _settle(self, settle: Callable[..., Any], *args: Any) -> Any:
        self._passed(CrashPoint.BEFORE_SETTLE)
        answer = settle(*args)
        self._passed(CrashPoint.AFTER_SETTLE)
        return answer


class _Store(_Settling):
    """A store whose callers die at its edges."""

    _inner: TransactionalStore

    def claim(self, claim: Claim) -> Claimed | Record:
        self._passed(CrashPoint.BEFORE_CLAIM)
        answer = self._inner.claim(claim)
        if isinstance(answer, Claimed):
            self._passed(CrashPoint.AFTER_CLAIM)
        return answer

    def take_over(self, claim: Claim, seen: Record) -> Claimed | None:
        taken = self._inner.take_over(claim, seen)
        if taken is not None:
            self._passed(CrashPoint.AFTER_CLAIM)
        return taken

    def complete(self, digest: bytes, token: bytes, completion: Completion) -> bool:
        return cast(bool, self._settle(self._inner.complete, digest, token, completion))

    def release(self, digest: bytes, token: bytes) -> bool:
        return cast(bool, self._settle(self._inner.release, digest, token))

    def forget(self, digest: bytes, token: bytes) -> bool:
        return cast(bool, self._settle(self._inner.forget, digest, token))

    def hold(self, digest: bytes, token: bytes) -> bool:
        return cast(bool, self._settle(self._inner.hold, digest, token))

    def begin(self, claim: Claim, **options: Any) -> Transaction | None:
        self._passed(CrashPoint.BEFORE_CLAIM)
        transaction = self._inner.begin(claim, **options)
        if transaction is None:
            return None
        return cast("Transaction", _Transaction(transaction, self._passed))


class _Transaction(_Settling):
    """A transaction whose owner dies at its edges."""

    _inner: Transaction

    def __init__(self, inner: Transaction, passed: _Passed) -> None:
        super().__init__(inner, self._passed_or_over)
        self._passed_if_alive = passed
        self._runs = inner.claimed is not None
        if self._runs:
            self._passed(CrashPoint.AFTER_CLAIM)

    def take_over(self, claim: Claim, seen: Record) -> Claimed | None:
        taken = self._inner.take_over(claim, seen)
        self._runs = taken is not None
        if self._runs:
            self._passed(CrashPoint.AFTER_CLAIM)
        return taken

    def complete(self, completion: Completion) -> None:
        self._settle(self._inner.complete, completion)

    def rollback(self) -> None:
        if self._runs:
            self._settle(self._inner.rollback)
        else:
            self._inner.rollback()

    def _passed_or_over(self, point: CrashPoint) -> None:
        """What raises instead of dying leaves no transaction behind: nobody else will end it."""
        try:
            self._passed_if_alive(point)
        except BaseException:
            self._inner.rollback()
            raise


class _Answer:
    """An answer whose server dies at its edges."""

    def __init__(self, iterable: Iterable[bytes], passed: _Passed) -> None:
        self._iterable = iterable
        self._passed = passed

    def __iter__(self) -> Iterator[bytes]:
        self._passed(CrashPoint.BEFORE_FIRST_BYTE)
        chunks = iter(self._iterable)
        for chunk in chunks:
            if chunk:
                yield chunk[:1]
                self._passed(CrashPoint.AFTER_FIRST_BYTE)
                yield chunk[1:]
                break
        yield from chunks

    def close(self) -> None:
        close = getattr(self._iterable, "close", None)
        if close is not None:
            close()
        self._passed(CrashPoint.AFTER_ANSWER)
