"""Run an application and hold its answer back until it is known what becomes of it; or
play an answer that was stored.

PEP 3333 lets an application call ``write()`` before it returns an iterable, call
``start_response`` as late as its first chunk, start again with ``exc_info`` while nothing
was sent, and count on ``close()`` exactly once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from werkzeug.wsgi import FileWrapper

from wsgi_idempotency.headers import sendable
from wsgi_idempotency.operation import Operation
from wsgi_idempotency.records import StoredResponse
from wsgi_idempotency.spool import Spool

if TYPE_CHECKING:
    from _typeshed import OptExcInfo
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

logger = logging.getLogger("wsgi_idempotency")

TOO_LARGE = "the response was larger than max_response_bytes"
STREAMED = "the response was an event stream"

_CHUNK = 64 * 1024  # bytes; one piece of an answer that was spooled

Headers = list[tuple[str, str]]


class InvalidApplication(AssertionError):
    """Raised when an application breaks PEP 3333 in a way that no server could send."""


class EventStream(Exception):
    """Raised when an answer that never ends was to be held back in full."""


@dataclass(frozen=True, slots=True)
class Whole:
    """An answer held back in full; nothing of it has been sent.

    :param body: its bytes; none where they were spooled.
    :param spool: the file that has them, because they are more than the limit.
    """

    status: str
    headers: Headers
    body: bytes
    spool: Spool | None = None

    def pieces(self) -> Iterable[bytes]:
        """What the server has to send."""
        return [self.body] if self.spool is None else FileWrapper(self.spool, _CHUNK)


@dataclass(frozen=True, slots=True)
class Passing:
    """An answer not held back; ``body`` is what of it the server has still to send."""

    body: Iterable[bytes]


class Dropped:
    """An answer that ``before_first_byte`` did not let out; nothing of it has been sent."""


class Capture:
    """One run of an application.

    :param limit: the largest body held back in memory, in bytes.
    :param start_response: the server's.
    :param operation: what ``running`` is set to while the application runs.
    :param before_first_byte: called with the status line, the headers and why it can't
        be replayed, before the first byte of an answer that is not held back goes out;
        False drops the answer. None holds every answer back, a larger one in a file.
    :param after_last_byte: called once when an answer that was not held back is over.
    """

    def __init__(
        self,
        *,
        limit: int,
        start_response: StartResponse,
        operation: Operation,
        running: ContextVar[Operation],
        before_first_byte: Callable[[str, Headers, str], bool] | None = None,
        after_last_byte: Callable[[], None] = lambda: None,
    ) -> None:
        self._limit = limit
        self._spool: Spool | None = None
        self._server_start_response = start_response
        self._operation = operation
        self._running = running
        self._before_first_byte = before_first_byte
        self._after_last_byte = after_last_byte
        self._status: str | None = None
        self._headers: Headers = []
        self._held: list[bytes] = []
        self._size = 0
        self._server_write: Callable[[bytes], object]  # once it is passing
        self.passing = False  # the answer's head is out
        self._dropped = False
        self._iterable: Iterable[bytes] = ()
        self._closed = False
        self.whole: Whole | None = None  # once there is nothing more to come

    def run(self, app: WSGIApplication, environ: WSGIEnvironment) -> Whole | Passing | Dropped:
        """Run the application until its answer is whole or its first byte has to go out.

        :raises BaseException: what the application raised; its iterable is closed.
        """
        # The server's own wrapper may be an object that only the server can send.
        environ["wsgi.file_wrapper"] = FileWrapper
        token = self._running.set(self._operation)
        try:
            answer = self._run(app, environ)
        except BaseException:
            self.close()
            raise
        finally:
            self._running.reset(token)
        if not isinstance(answer, Passing):
            self.close()
        return answer

    def _run(self, app: WSGIApplication, environ: WSGIEnvironment) -> Whole | Passing | Dropped:
        self._iterable = app(environ, self._start_response)
        chunks = iter(self._iterable)
        if not self.passing:
            for chunk in chunks:
                self._hold(chunk)
                if self.passing or self._dropped:
                    break
            else:
                self._require_start_response()
        if self._dropped:
            return Dropped()
        if self.passing:
            return Passing(_Rest(self, chunks))
        assert self._status is not None
        if self._spool is not None:
            self._spool.seek(0)
        body = b"".join(self._take_held())
        self.whole = Whole(self._status, self._headers, body, self._spool)
        return self.whole

    def rest(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """What the server has still to send of a passing answer."""
        yield from self._take_held()
        while True:
            token = self._running.set(self._operation)
            try:
                chunk = next(chunks, None)
            finally:
                self._running.reset(token)
            if chunk is None:
                return
            yield chunk

    def close(self) -> None:
        """Close the application's iterable, once. Its answer is good whatever close() does."""
        if self._closed:
            return
        self._closed = True
        token = self._running.set(self._operation)
        try:
            close = getattr(self._iterable, "close", None)
            if close is not None:
                close()
        except Exception:
            logger.exception("close() of the application's iterable failed")
        finally:
            self._running.reset(token)
            if self.passing:
                self._after_last_byte()

    # ------------------------------------------------------------ what the application calls

    def _start_response(
        self, status: str, headers: Headers, exc_info: OptExcInfo | None = None, /
    ) -> Callable[[bytes], object]:
        try:
            if self.passing:
                if exc_info is not None:
                    self._server_start_response(status, headers, exc_info)  # raises it
                raise InvalidApplication("start_response was called after the first byte")
            if self._status is not None and exc_info is None:
                raise InvalidApplication("start_response was called again without exc_info")
        finally:
            exc_info = None  # PEP 3333, "Error Handling": it would keep a cycle alive
        if not (isinstance(status, str) and status[:3].isdecimal() and len(status[:3]) == 3):
            raise InvalidApplication(f"the status is {status!r}, not a text like '200 OK'")
        # On a restart nothing is out yet: the new answer replaces what was begun.
        self._held.clear()
        self._spool = None
        self._size = 0
        self._status = status
        self._headers = list(headers)
        return self._write

    def _write(self, data: bytes) -> None:
        if not self.passing:
            self._hold(data)
            data = b"".join(self._take_held()) if self.passing else b""
        if data:
            self._server_write(data)

    # ------------------------------------------------------------ holding back

    def _hold(self, chunk: bytes) -> None:
        if not isinstance(chunk, bytes):
            raise InvalidApplication(f"the body has {type(chunk).__name__} where bytes belong")
        if not chunk or self._dropped:
            return
        status = self._require_start_response()
        self._held.append(chunk)
        self._size += len(chunk)
        reason = self._reason_to_pass()
        if reason is None:
            return
        if self._before_first_byte is None:
            self._hold_in_file(reason)
        elif self._before_first_byte(status, self._headers, reason):
            self._server_write = self._server_start_response(status, self._headers)
            self.passing = True
        else:
            self._dropped = True

    def _hold_in_file(self, reason: str) -> None:
        if reason == STREAMED:
            raise EventStream(STREAMED)
        if self._spool is None:
            self._spool = Spool.new()
        self._spool.writelines(self._take_held())

    def _take_held(self) -> list[bytes]:
        held, self._held = self._held, []
        return held

    def _require_start_response(self) -> str:
        if self._status is None:
            raise InvalidApplication("the application did not call start_response")
        return self._status

    def _reason_to_pass(self) -> str | None:
        if len(self._held) == 1:  # with the first chunk
            for name, value in filter(sendable, self._headers):
                name = name.lower()
                if name == "content-type" and _media_type(value) == "text/event-stream":
                    return STREAMED
                if name == "content-length" and value.isdecimal() and int(value) > self._limit:
                    return TOO_LARGE
        return TOO_LARGE if self._size > self._limit else None


def _media_type(value: str) -> str:
    return value.partition(";")[0].strip().lower()


class _Rest:
    """The iterable a server gets of a passing answer."""

    def __init__(self, capture: Capture, chunks: Iterator[bytes]) -> None:
        self._capture = capture
        self._chunks = capture.rest(chunks)

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks

    def close(self) -> None:
        self._chunks.close()  # type: ignore[attr-defined]
        self._capture.close()


def play(
    response: StoredResponse,
    extra: Iterable[tuple[str, str]],
    environ: WSGIEnvironment,
    start_response: StartResponse,
) -> Iterable[bytes]:
    """Answer with a stored response.

    :param response: one that :func:`~wsgi_idempotency.headers.unsendable` has nothing against.
    :param extra: header pairs to add, in place of stored ones of the same name.
    """
    status = int(response.status[:3])
    head_only = environ["REQUEST_METHOD"] == "HEAD"
    # RFC 9110 sections 15.3.5, 15.3.6 and 15.4.5: these have no content. Section 8.6: no
    # Content-Length with 204, and with 304 or HEAD only the length of what isn't sent.
    body = b"" if head_only or status in (204, 205, 304) else response.body
    extra = tuple(extra)
    ours = {name.lower() for name, _ in extra}
    headers = [pair for pair in response.headers if pair[0].lower() not in ours]
    headers += extra
    if not head_only and status not in (204, 304):
        headers.append(("Content-Length", str(len(body))))
    start_response(response.status, headers)
    return [body]
