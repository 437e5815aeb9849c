"""The request body: read once, bounded, spooled, and handed on intact.

PEP 3333 lets an application read ``wsgi.input`` up to Content-Length and no further;
servers that set ``wsgi.input_terminated`` end the stream themselves, which is the only
way a chunked body (RFC 9112 section 7.1) can reach an application.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from wsgi_idempotency.errors import BodyTooLarge, IncompleteBody, LengthRequired
from wsgi_idempotency.spool import Spool

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

# Inside the class the name is that of a method.
_Bytes = bytes

_CHUNK = 64 * 1024  # bytes; one read() from the server
_IN_MEMORY = 1024 * 1024  # bytes; a larger body goes to a temporary file


class Body:
    """A request's body. Nothing is read from the server until somebody asks for it.

    :param environ: the request's WSGI environment.
    :param limit: the largest body accepted, in bytes.
    """

    def __init__(self, environ: WSGIEnvironment, limit: int) -> None:
        self._environ = environ
        self._limit = limit
        self._spool: io.BytesIO | Spool | None = None
        self._bytes: bytes | None = None
        self._size = 0

    @classmethod
    def of_bytes(cls, data: bytes) -> Body:
        """A body that is in memory already."""
        environ: dict[str, Any] = {"CONTENT_LENGTH": str(len(data)), "wsgi.input": io.BytesIO(data)}
        return cls(environ, limit=len(data))

    def read(self) -> None:
        """Take the whole body from the server, if that hasn't been done.

        :raises LengthRequired: nothing says where the body ends.
        :raises BodyTooLarge: it is longer than the limit.
        :raises IncompleteBody: it ends before its Content-Length, or the connection broke.
        """
        if self._spool is not None:
            return
        self._spool = self._copy(self._expected())

    def bytes(self) -> bytes:
        """The whole body in memory. Raises what :meth:`read` does."""
        if self._bytes is None:
            self._bytes = b"".join(self.chunks())
        return self._bytes

    def chunks(self) -> Iterator[_Bytes]:
        """The whole body, piece by piece. Raises what :meth:`read` does."""
        self.read()
        assert self._spool is not None
        self._spool.seek(0)
        while chunk := self._spool.read(_CHUNK):
            yield chunk

    def hand_on(self) -> None:
        """Give the application a fresh stream of what was read; nothing if nothing was."""
        if self._spool is None:
            return
        self._spool.seek(0)
        self._environ["wsgi.input"] = self._spool
        self._environ["CONTENT_LENGTH"] = str(self._size)
        # The stream ends by itself now and its length is known, so an application that
        # looks at either (or that would decode chunks) finds the truth.
        self._environ["wsgi.input_terminated"] = True
        self._environ.pop("HTTP_TRANSFER_ENCODING", None)

    def _expected(self) -> int | None:
        """The body's length in bytes, or None when it ends where the server ends it."""
        terminated = bool(self._environ.get("wsgi.input_terminated"))
        # RFC 9112 section 6.3: Transfer-Encoding overrides Content-Length.
        if self._environ.get("HTTP_TRANSFER_ENCODING"):
            if terminated:
                return None
            raise LengthRequired("the server does not decode chunked bodies")
        text = (self._environ.get("CONTENT_LENGTH") or "").strip()
        if not text:
            return None if terminated else 0
        if not (text.isascii() and text.isdigit()):
            raise LengthRequired("Content-Length is not a number")
        # Compared as text first: int() refuses more than 4,300 digits.
        text = text.lstrip("0") or "0"
        if len(text) > 18 or int(text) > self._limit:
            raise BodyTooLarge(f"the body has {text[:20]} bytes, the limit is {self._limit}")
        return int(text)

    def _copy(self, expected: int | None) -> io.BytesIO | Spool:
        stream = self._environ["wsgi.input"]
        spool: io.BytesIO | Spool = io.BytesIO()
        while expected is None or self._size < expected:
            wanted = _CHUNK if expected is None else min(_CHUNK, expected - self._size)
            try:
                chunk = stream.read(wanted)
            except Exception as exc:
                # Servers say in their own ways that the client went away: OSError,
                # ValueError, gunicorn's NoMoreData and ChunkMissingTerminator.
                raise IncompleteBody("the connection broke while the body was read") from exc
            if not chunk:
                break
            self._size += len(chunk)
            if self._size > self._limit:
                raise BodyTooLarge(f"the body has more than {self._limit} bytes")
            if self._size > _IN_MEMORY and isinstance(spool, io.BytesIO):
                file = Spool.new()
                file.write(spool.getbuffer())
                spool = file
            spool.write(chunk)
        if expected is not None and self._size < expected:
            raise IncompleteBody(f"the body ended after {self._size} of {expected} bytes")
        return spool
