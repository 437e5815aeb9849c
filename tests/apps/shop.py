"""The ledger under gunicorn: its executions, its clients, its rows."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from servers.http import Address, Connection, Gunicorn, Response
from sqlalchemy import create_engine

from apps.gate import Gate

T = TypeVar("T")

DEADLINE = 30  # seconds for what happens at once on an idle machine

#: How gunicorn is run where a behaviour must not depend on it.
GUNICORNS = {
    "4 sync workers": {"workers": 4, "preload": False},
    "2 gthread workers": {"worker_class": "gthread", "workers": 2, "threads": 8, "preload": False},
    "2 gevent workers": {"worker_class": "gevent", "workers": 2},
    "4 sync workers forked after a warm-up": {
        "application": "apps.warmed_up:app",
        "workers": 4,
    },
    "2 gevent workers forked after a warm-up": {
        "application": "apps.warmed_up:app",
        "worker_class": "gevent",
        "workers": 2,
        "preload": True,
    },
}


class Shop:
    """A running ledger.

    :param address: where it listens.
    :param book: the file it writes to.
    :param url: of the database its keys are in.
    """

    server: Gunicorn  # what it runs under, if open_shop() has opened it

    def __init__(self, address: Address, book: Path, url: str) -> None:
        self.address = address
        self.url = url
        self._book = book

    def connect(self) -> Connection:
        return Connection(self.address)

    def post(self, key: str, *headers: tuple[str, str], body: bytes = b"pay") -> Response:
        """Send one request on a connection of its own.

        :param headers: what the handler is to do, for example ``("X-Status", "500 Oops")``.
        """
        with self.connect() as connection:
            fields = [("Idempotency-Key", key), ("Connection", "close"), *headers]
            return connection.request("POST", "/pay", fields, body)

    def get(self) -> Response:
        with self.connect() as connection:
            return connection.request("GET", "/", [("Connection", "close")])

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The ledger, as it was written."""
        if not self._book.exists():
            return []
        return [json.loads(line) for line in self._book.read_text().splitlines()]

    def executions(self, key: str | None = None) -> list[dict[str, Any]]:
        """Each time the handler has run; for one key, or for all but that of a warm-up."""
        begun = [line for line in self.lines if line["what"] == "begun"]
        if key is None:
            return [line for line in begun if not line["key"].startswith("warm-up")]
        return [line for line in begun if line["key"] == key]

    def attempts(self, key: str) -> list[int | None]:
        """The attempts that have run, in order; None for one that was not protected."""
        return [line["attempt"] for line in self.executions(key)]

    def never_two_at_once(self, key: str) -> bool:
        """Whether each execution for a key had ended before the next began."""
        ours = {line["execution"] for line in self.executions(key)}
        moments = [line["what"] for line in self.lines if line["execution"] in ours]
        return moments == ["begun", "ended"] * len(ours)

    def rows(self) -> list[dict[str, Any]]:
        """The stored rows, by age."""
        return query(self.url, "SELECT * FROM idempotency_keys ORDER BY created_at")

    def has_lapsed(self) -> bool:
        """Whether no lease runs any more, on the database's clock."""
        now = "(julianday('now') - 2440587.5) * 86400.0" if "sqlite" in self.url else "now()"
        rows = query(
            self.url,
            "SELECT 1 FROM idempotency_keys WHERE state = 'claimed' AND lease_until > " + now,
        )
        return not rows


@contextmanager
def open_shop(
    url: str,
    folder: Path,
    *,
    application: str = "apps.ledger:app",
    policy: Mapping[str, Any] | None = None,
    max_waiting: int = 8,
    store_options: Mapping[str, Any] | None = None,
    engine_options: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    name: str = "shop",
    **gunicorn: Any,
) -> Iterator[Shop]:
    """Run a ledger under gunicorn.

    :param url: of the database its keys are in.
    :param policy: options of its Policy; ``outcomes`` by name.
    :param store_options: of its SQLStore.
    :param engine_options: of its own Engine, on which it keeps the keys instead.
    :param name: sets it apart from another shop in the same folder.
    :param gunicorn: as :class:`servers.http.Gunicorn` takes them; except for gevent, the
        application is loaded before the workers are forked, which takes a third of the time.
    """
    place = folder / name
    place.mkdir()
    book = place / "ledger"
    settings = {
        "LEDGER": str(book),
        "STORE": url,
        "STORE_OPTIONS": json.dumps(store_options or {}),
        "ENGINE_OPTIONS": json.dumps(engine_options) if engine_options else "",
        "POLICY": json.dumps(policy or {}),
        "MAX_WAITING": str(max_waiting),
        **(environment or {}),
    }
    gunicorn.setdefault("preload", gunicorn.get("worker_class") != "gevent")
    with Gunicorn(application, place, environment=settings, **gunicorn) as server:
        shop = Shop(server.address, book, url)
        shop.server = server
        yield shop


def query(url: str, statement: str) -> list[dict[str, Any]]:
    """Run one statement and fetch its rows, if any."""
    engine = create_engine(url)
    try:
        with engine.begin() as connection:
            result = connection.exec_driver_sql(statement)
            return [dict(row._mapping) for row in result] if result.returns_rows else []
    finally:
        engine.dispose()


def at_once(count: int, call: Callable[[int], T]) -> list[T]:
    """Call from as many threads, all let go at the same moment."""
    barrier = threading.Barrier(count)

    def racer(number: int) -> T:
        barrier.wait(DEADLINE)
        return call(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(racer, range(count)))


@contextmanager
def background(call: Callable[..., T], *args: Any) -> Iterator[Callable[[], T]]:
    """Call in another thread; what is yielded waits for the result."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call, *args)
        yield lambda: future.result(DEADLINE)


def until(condition: Callable[[], T]) -> T:
    """Ask until the answer is true.

    :raises AssertionError: it never was.
    """
    deadline = time.monotonic() + DEADLINE
    while not (answer := condition()):
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)
    return answer


def code(response: Response) -> str | None:
    """The problem code of an answer; None when it is no problem."""
    if response.header("Content-Type") != "application/problem+json":
        return None
    found: str = json.loads(response.body)["code"]
    return found


def replayed(response: Response) -> bool:
    return response.header("Idempotency-Replayed") == "true"


def expect_one(responses: Iterable[Response]) -> Response:
    """Of duplicates: one answer of the handler; the others are its replay, or were told to
    come back. Returns the handler's."""
    responses = list(responses)
    assert {(response.status, code(response)) for response in responses} <= {
        (201, None),
        (409, "CONFLICT"),
    }
    done = [response for response in responses if response.status == 201]
    [first] = [response for response in done if not replayed(response)]
    assert {response.body for response in done} == {first.body}
    return first


def at_gate(gate: Gate) -> tuple[str, str]:
    """The header field that makes a handler wait at a gate."""
    return "X-Gate", gate.address


def post_in_vain(shop: Shop, *headers: tuple[str, str]) -> None:
    """Send a request whose answer never comes."""
    with pytest.raises(ConnectionError):
        shop.post("k", *headers)


def kill_mid_handler(shop: Shop, gate: Gate) -> None:
    """Kill a worker by SIGKILL while its handler runs, and wait for the end of its lease."""
    with background(post_in_vain, shop, at_gate(gate)) as lost:
        os.kill(gate.arrival().pid, signal.SIGKILL)
        lost()
    [row] = shop.rows()
    assert row["state"] == "claimed"
    until(shop.has_lapsed)
