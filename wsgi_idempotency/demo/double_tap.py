"""A double tap and a later retry, fired at both doors of the shop, and what to make of them."""

from __future__ import annotations

import http.client
import json
import secrets
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlencode

from wsgi_idempotency.demo.server import ShopFailed

AMOUNT = 4200  # cents
TIMEOUT = 30.0  # seconds; a shop that takes longer is broken


@dataclass(frozen=True)
class Observation:
    """One request and its answer.

    :param request: which one it was, for people.
    :param status: the status code; None when no answer came.
    :param replayed: the answer carried ``Idempotency-Replayed: true``.
    :param charge: the identifier of the charge it names, if any.
    """

    request: str
    status: int | None
    replayed: bool = False
    charge: str | None = None


@dataclass(frozen=True)
class Purchase:
    """All requests that were made for one order, and how often it was charged.

    :param protected: whether the middleware stood in front of the handler.
    :param observations: what the client saw.
    :param rows: how many rows the ledger has for the order.
    """

    protected: bool
    observations: tuple[Observation, ...]
    rows: int


def complaints(purchase: Purchase) -> list[str]:
    """Say what is wrong with a purchase; an empty list when it kept the promise.

    Without protection everything is as expected: a double charge is the point.
    """
    if not purchase.protected:
        return []
    found = []
    if purchase.rows != 1:
        found.append(f"The protected order was charged {times(purchase.rows)} instead of once.")
    for seen in purchase.observations:
        if seen.status not in (201, 409):
            found.append(f"The protected {seen.request} got {seen.status or 'no answer'}.")
    if len({seen.charge for seen in purchase.observations if seen.status == 201}) > 1:
        found.append("The protected requests were told of different charges.")
    if not any(seen.replayed for seen in purchase.observations[-1:]):
        found.append("The protected later retry was not answered with a replay.")
    return found


def times(count: int) -> str:
    """``once``, ``twice``, ``3 times``."""
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def buy(address: tuple[str, int], *, protected: bool) -> Purchase:
    """Tap twice at once, then once more when both have their answer.

    :param address: host and port of the shop.
    :param protected: which of its doors to knock on.
    :raises ShopFailed: the ledger can't be read.
    """
    order = secrets.token_hex(4)
    key = new_key()
    both_ready = threading.Barrier(2)

    def tap(name: str) -> Observation:
        both_ready.wait(TIMEOUT)
        return pay(address, name, order=order, key=key, protected=protected)

    with ThreadPoolExecutor(2) as fingers:
        try:
            taps = tuple(fingers.map(tap, ("first tap", "second tap")))
        except BaseException:
            both_ready.abort()  # Ctrl-C may have come before the second was begun
            raise
    retry = pay(address, "later retry", order=order, key=key, protected=protected)
    status, _, body = ask(address, "GET", "/ledger?" + urlencode({"order": order}))
    if status != 200:
        raise ShopFailed(f"the ledger answered {status}")
    return Purchase(protected, (*taps, retry), json.loads(body)["rows"])


def new_key() -> str:
    """An idempotency key as a client would make one."""
    return secrets.token_hex(16)


def pay(
    address: tuple[str, int], name: str, *, order: str, key: str, protected: bool
) -> Observation:
    """Send one request for a charge."""
    try:
        status, headers, body = ask(
            address,
            "POST",
            f"/{'protected' if protected else 'unprotected'}/charges",
            body=urlencode({"order": order, "amount": AMOUNT}),
            headers={
                "Content-Type": "application/x-www-form-urlencoded",
                "Idempotency-Key": key,
            },
        )
    except ShopFailed:
        return Observation(name, None)
    charge = json.loads(body)["id"] if status == 201 else None
    return Observation(name, status, headers.get("Idempotency-Replayed") == "true", charge)


def ask(
    address: tuple[str, int],
    method: str,
    path: str,
    *,
    body: str | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Send one request on a connection of its own.

    :raises ShopFailed: it hung up, took longer than ``TIMEOUT``, or did not speak HTTP.
    """
    connection = http.client.HTTPConnection(*address, timeout=TIMEOUT)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    except (OSError, http.client.HTTPException) as exc:
        raise ShopFailed(f"the shop did not answer: {exc!r}") from exc
    finally:
        connection.close()


def report(purchases: Iterable[Purchase]) -> str:
    """Lay out what happened as a table."""
    rows = [("", "request", "status", "replayed?", "charge", "ledger rows")]
    for purchase in purchases:
        door = "with protection" if purchase.protected else "without protection"
        for number, seen in enumerate(purchase.observations, 1):
            last = number == len(purchase.observations)
            rows.append(
                (
                    door if number == 1 else "",
                    seen.request,
                    str(seen.status or "none"),
                    "yes" if seen.replayed else "no",
                    seen.charge or "-",
                    str(purchase.rows) if last else "",
                )
            )
    return layout(rows)


def layout(rows: Sequence[Sequence[str]]) -> str:
    """Pad columns to their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
