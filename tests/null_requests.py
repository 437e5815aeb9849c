"""Requests and an application that cost as little as they can."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

HEADERS = [("Content-Type", "application/json"), ("Location", "/payments/1")]
BODY = b'{"id": 1}'


def paying(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """An application that does nothing."""
    start_response("201 Created", list(HEADERS))
    return [BODY]


def request(method: str, key: str | None = None, body: bytes = b'{"amount": 1}') -> WSGIEnvironment:
    """What a server makes of a request, as gunicorn does."""
    environ: dict[str, Any] = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": "/payments",
        "QUERY_STRING": "",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "HTTP_HOST": "localhost",
        "HTTP_AUTHORIZATION": "Bearer 5f0e3c",
        "HTTP_USER_AGENT": "client",
        "CONTENT_TYPE": "application/json",
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(body),
        "wsgi.input_terminated": True,
        "wsgi.errors": io.StringIO(),
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
    }
    if key is not None:
        environ["HTTP_IDEMPOTENCY_KEY"] = key
    return environ


def serve(app: WSGIApplication, environ: WSGIEnvironment) -> None:
    """Take an application's answer as a server does."""
    answer = app(environ, _start_response)
    for _ in answer:
        pass
    close = getattr(answer, "close", None)
    if close is not None:
        close()


def _start_response(status: str, headers: Any, exc_info: Any = None, /) -> Any:
    return None
