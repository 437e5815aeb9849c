"""What a client is told when its request is refused: RFC 9457 problem details, or as
Stripe's SDKs expect them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from werkzeug.wrappers import Response

from wsgi_idempotency.headers import unsendable
from wsgi_idempotency.records import StoredResponse

if TYPE_CHECKING:
    from _typeshed import OptExcInfo
    from _typeshed.wsgi import WSGIApplication, WSGIEnvironment

#: Where the problem types' URIs start unless a renderer is given another base.
TYPE_BASE = "urn:wsgi-idempotency:problem:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why a request was refused (RFC 9457 section 3.1).

    :param type: a stable URI for the code.
    :param title: the code in a few words; the same for every occurrence.
    :param status: the HTTP status code.
    :param detail: what to do next.
    :param code: a stable name for programs, such as ``CONFLICT``.
    :param retryable: whether the same request may be sent again.
    :param retry_after: seconds after which to send it again, or None.
    :param headers: header pairs that are sent besides, whatever the renderer does.
    :param extensions: more members for the body.
    """

    type: str
    title: str
    status: int
    detail: str
    code: str
    retryable: bool
    retry_after: int | None = None
    headers: tuple[tuple[str, str], ...] = ()
    extensions: Mapping[str, Any] = field(default_factory=dict)


Renderer = Callable[[Problem, "WSGIEnvironment"], "WSGIApplication"]


@dataclass(frozen=True, slots=True)
class _Kind:
    status: int
    title: str
    detail: str
    retryable: bool = False


_KINDS = {
    "MISSING_KEY": _Kind(
        400,
        "Idempotency key missing",
        "This operation needs an idempotency key. Send the request again with an"
        " Idempotency-Key header: a new unique value, for example a UUID, for each new"
        " operation, and the same value for each retry of it.",
    ),
    "INVALID_KEY": _Kind(
        400,
        "Idempotency key malformed",
        "The idempotency key can't be read. Send exactly one key of visible ASCII characters"
        " without commas, quotes or spaces, bare or as a quoted string.",
    ),
    "KEY_TOO_LONG": _Kind(
        400,
        "Idempotency key too long",
        "The idempotency key is too long. Use a shorter one, for example a UUID.",
    ),
    "MISSING_SCOPE": _Kind(
        400,
        "Nobody to keep the key for",
        "The request does not say on whose behalf it is sent. Send the credentials that this"
        " service identifies its clients by, with the same idempotency key.",
    ),
    "EXTRACTOR_FAILED": _Kind(
        500,
        "Idempotency configuration failed",
        "The service could not tell what this request is for, and did not run it. Its operator"
        " has been told; sending the same request again will not help until it is fixed.",
    ),
    "LENGTH_REQUIRED": _Kind(
        411,
        "Content-Length required",
        "The end of the request body can't be told. Send the request with a Content-Length.",
    ),
    "BODY_TOO_LARGE": _Kind(
        413,
        "Request body too large",
        "The request body is larger than this service accepts together with an idempotency key.",
    ),
    "INCOMPLETE_BODY": _Kind(
        400,
        "Request body incomplete",
        "The request body ended early and nothing was run. Send the whole request again with"
        " the same idempotency key.",
        retryable=True,
    ),
    "FINGERPRINT_MISMATCH": _Kind(
        422,
        "Idempotency key used for another request",
        "This idempotency key was used before, for a different request. Send the original"
        " request unchanged to get its response, or use a new key for a new operation.",
    ),
    "CONFLICT": _Kind(
        409,
        "Request in progress",
        "A request with this idempotency key is being processed. Send it again later with the"
        " same key to get its response.",
        retryable=True,
    ),
    "OUTCOME_UNKNOWN": _Kind(
        409,
        "Outcome unknown",
        "A request with this idempotency key was interrupted and it is not known whether it took"
        " effect. Do not send it again under a new key; ask the service what came of it.",
    ),
    "RESPONSE_NOT_REPLAYABLE": _Kind(
        409,
        "Done, but the response can't be repeated",
        "The request with this idempotency key was processed and its response can't be repeated."
        " Do not send it again; fetch the resulting resource instead.",
    ),
    "STORE_UNAVAILABLE": _Kind(
        503,
        "Idempotency store unavailable",
        "The request was not run, because the service can't protect it right now. Send it again"
        " later with the same idempotency key.",
        retryable=True,
    ),
    "TRANSACTION_CONFLICT": _Kind(
        503,
        "Transaction conflict",
        "The request collided with another one and was undone: nothing happened. Send it again"
        " with the same idempotency key.",
        retryable=True,
    ),
    "TRANSACTION_FAILED": _Kind(
        500,
        "Transaction failed",
        "The request could not be completed and was undone: nothing happened. The service's"
        " operator has been told; sending it again will not help until it is fixed.",
    ),
    "REBUILD_FAILED": _Kind(
        500,
        "Response could not be made again",
        "The operation is done, and its response was lost and could not be made again. It will not"
        " be run again: send the request again later to get its response.",
        retryable=True,
    ),
    "COMMIT_UNKNOWN": _Kind(
        503,
        "Commit unknown",
        "It is not known yet whether the request took effect. Send it again with the same"
        " idempotency key: it takes effect once at most, and you get its response.",
        retryable=True,
    ),
}

#: The code of every problem there is.
CODES = tuple(_KINDS)


def problem(
    code: str,
    *,
    detail: str | None = None,
    retry_after: int | None = None,
    headers: tuple[tuple[str, str], ...] = (),
    extensions: Mapping[str, Any] | None = None,
) -> Problem:
    """The problem of a code, with its pinned status.

    :param code: one of :data:`CODES`.
    :param detail: what to say instead of the code's own detail.
    :param retry_after: seconds.
    :param headers: as of :class:`Problem`, and so are ``extensions``.
    :raises KeyError: there is no such code.
    """
    kind = _KINDS[code]
    return Problem(
        type=TYPE_BASE + code.lower().replace("_", "-"),
        title=kind.title,
        status=kind.status,
        detail=detail or kind.detail,
        code=code,
        retryable=kind.retryable,
        retry_after=retry_after,
        headers=headers,
        extensions=extensions or {},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RFC9457:
    """Renders ``application/problem+json`` (RFC 9457).

    :param type_base: what the type URIs start with, for a service that documents its
        problems under its own address.
    :param docs_url: where the service documents its use of idempotency keys; sent as
        ``Link: <...>; rel="describedby"``. None sends no Link.
    """

    type_base: str = TYPE_BASE
    docs_url: str | None = None

    def __call__(self, problem: Problem, environ: WSGIEnvironment) -> WSGIApplication:
        if self.type_base != TYPE_BASE and problem.type.startswith(TYPE_BASE):
            problem = replace(problem, type=self.type_base + problem.type[len(TYPE_BASE) :])
        members = {
            **problem.extensions,
            "type": problem.type,
            "title": problem.title,
            "status": problem.status,
            "detail": problem.detail,
            "code": problem.code,
            "retryable": problem.retryable,
        }
        response = _json_response(problem, members, "application/problem+json")
        if self.docs_url is not None:
            response.headers.add("Link", f'<{self.docs_url}>; rel="describedby"')
        return response


rfc9457 = RFC9457()


def stripe(problem: Problem, environ: WSGIEnvironment) -> WSGIApplication:
    """Renders errors as Stripe's SDKs expect them: an ``idempotency_error``, a mismatch as 400."""
    if problem.code == "FINGERPRINT_MISMATCH":
        problem = replace(problem, status=400)
    error = {
        **problem.extensions,
        "type": "idempotency_error",
        "code": problem.code,
        "message": problem.detail,
    }
    return _json_response(problem, {"error": error}, "application/json")


def _json_response(problem: Problem, members: object, content_type: str) -> Response:
    response = Response(
        json.dumps(members, separators=(",", ":")), problem.status, content_type=content_type
    )
    response.headers["Content-Language"] = "en"
    return response


def rendered(render: Renderer, problem: Problem, environ: WSGIEnvironment) -> StoredResponse:
    """What a renderer's application answers, whole, so that one that fails can be replaced.

    :raises Exception: it failed, or its answer can't be sent.
    """
    heads: list[tuple[str, list[tuple[str, str]]]] = []
    chunks: list[bytes] = []

    def start_response(
        status: str, headers: list[tuple[str, str]], exc_info: OptExcInfo | None = None, /
    ) -> Callable[[bytes], object]:
        heads.append((status, headers))
        return chunks.append

    iterable = render(problem, environ)(environ, start_response)
    try:
        chunks.extend(iterable)
    finally:
        close = getattr(iterable, "close", None)
        if close is not None:
            close()
    if not heads:
        raise ValueError("its application did not call start_response")
    status, headers = heads[-1]
    reason = unsendable(status, headers)
    if reason is not None:
        raise ValueError(reason)
    return StoredResponse(status, tuple(headers), b"".join(chunks))
