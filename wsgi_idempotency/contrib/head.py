"""A request without its body, for frameworks that find out who sent it."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment


def head_of(environ: WSGIEnvironment) -> WSGIEnvironment:
    """A copy of a request's environ, whose body can't be read.

    What a framework leaves in it does not reach the application, and neither does it lose
    a byte of the body.
    """
    return {**environ, "wsgi.input": _Unreadable()}


class _Unreadable(io.RawIOBase):
    def readinto(self, buffer: object, /) -> int:
        raise RuntimeError(
            "the scope read the request's body; use what is in its head, its session or its user"
        )
