"""Clients that retry as SDKs do, and sometimes hang up."""

from __future__ import annotations

import hashlib
import json
import random
import select
import time
from collections.abc import Callable, Sequence
from typing import Any

from servers.http import Address, Connection, Response, request_bytes

from chaos.log import Identity, Try
from chaos.schedule import BOUND, Operation, Tap

TRIES = 8  # of a client; SDKs make three to eleven
LONGEST_BACK_OFF = 2.0  # seconds

#: Fields of the handler's that a replay must have, in this order.
KEPT = frozenset({"content-type", "location", "x-chaos"})

#: Statuses that SDKs retry without being told to.
RETRIED = frozenset({408, 409, 429})


def send(
    address: Address,
    identity: Identity,
    body: bytes,
    *,
    patience: float = BOUND,
    cut: str = "no",
    closing: bool = False,
) -> tuple[Try, Response | None]:
    """Send one request on a connection of its own.

    :param patience: seconds without a byte after which the client hangs up.
    :param cut: as :class:`chaos.schedule.Tap` has it.
    """
    headers = [
        ("Idempotency-Key", identity.key),
        ("X-Scope", identity.scope),
        ("Content-Type", "application/json"),
        ("Connection", "close"),
    ]
    data = request_bytes("POST", f"/{identity.policy}", headers, body)
    started = time.time()
    response, error = None, None
    try:
        with Connection(address, timeout=patience) as connection:
            if cut == "half sent":
                connection.send(data[: -len(body) // 2])
                connection.abort()
                error = "cut"
            else:
                connection.send(data)
                if cut == "unread":
                    select.select([connection.socket], [], [], patience)
                    connection.abort()
                    error = "cut"
                else:
                    response = connection.receive()
    except TimeoutError:
        error = "timeout"
    except OSError:
        error = "reset"
    said = describe(response)
    return Try(
        identity=identity,
        payload=hashlib.sha256(body).hexdigest(),
        started=started,
        ended=time.time(),
        error=error,
        bound=BOUND if patience == BOUND else None,
        closing=closing,
        **said,
    ), response


def describe(response: Response | None) -> dict[str, Any]:
    """What of a response is worth remembering."""
    if response is None:
        return {}
    said: dict[str, Any] = {
        "status": response.status,
        "body": hashlib.sha256(response.body).hexdigest(),
        "replayed": response.header("Idempotency-Replayed") == "true",
        "headers": tuple(pair for pair in response.headers if pair[0].lower() in KEPT),
    }
    try:
        told = json.loads(response.body.removeprefix(b"data: "))
    except ValueError:  # gunicorn's own words about a handler that raised
        return said
    if "execution" in told:
        whose = Identity(told["scope"], told["policy"], told["key"])
        said |= {"execution": told["execution"], "echoed": (whose, told["payload"])}
    else:
        said["code"] = told["code"]
    return said


class Client:
    """One client of one operation.

    :param addresses: of the servers it may turn to, as behind a load balancer.
    :param record: called with each try.
    :param sleep: waits for as many seconds.
    """

    def __init__(
        self,
        operation: Operation,
        tap: Tap,
        addresses: Sequence[Address],
        record: Callable[[Try], object],
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._operation = operation
        self._tap = tap
        self._addresses = addresses
        self._record = record
        self._sleep = sleep
        self._chance = random.Random(tap.seed)

    def run(self) -> None:
        """Ask until there is an answer that isn't worth asking again, and correct a request
        that was refused."""
        operation = self._operation
        number = operation.taps.index(self._tap)
        answer = self._ask(operation.body(broken=operation.kind == "refuses", tap=number))
        if operation.kind == "refuses" and answer is not None and answer.status == 400:
            self._ask(operation.body(tap=number))

    def _ask(self, body: bytes) -> Response | None:
        patience, cut = self._tap.patience, self._tap.cut
        for number in range(TRIES):
            made, response = send(
                self._chance.choice(self._addresses),
                self._operation.identity,
                body,
                patience=patience,
                cut=cut,
            )
            self._record(made)
            if response is not None and not worth_another(response):
                return response
            patience, cut = BOUND, "no"
            self._sleep(self._delay(number, response))
        return response

    def _delay(self, number: int, response: Response | None) -> float:
        """Seconds until the next try: what the server asks for, else a jittered back-off."""
        asked = None if response is None else response.header("Retry-After")
        if asked is not None:
            return float(asked)
        longest = min(0.2 * 2.0**number, LONGEST_BACK_OFF)
        return longest * self._chance.uniform(0.5, 1.0)


def worth_another(response: Response) -> bool:
    """Whether an SDK would try again: as it is told, else as it thinks of the status."""
    told = response.header("X-Should-Retry")
    if told is not None:
        return told == "true"
    return response.status in RETRIED or response.status >= 500
