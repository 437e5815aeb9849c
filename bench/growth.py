"""(d) Large tables, large bodies, many scopes; (e) one key for many; (f) a database far away."""

from __future__ import annotations

import os
import queue
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import final

from servers.postgres import PostgresServer
from servers.proxy import ThreadingProxy
from sqlalchemy.engine import make_url

from bench.measure import Figure, interleaved
from bench.operations import claim_of, fresh, milliseconds, per_second, replay
from bench.rows import database_with, loading
from wsgi_idempotency import SQLStore
from wsgi_idempotency.records import Claimed, Completion

FEW = 10_000
_THREADS = 4


def growth(server: PostgresServer, *, rounds: int, seconds: float, rows: int) -> list[Figure]:
    few, many = f"{FEW:,} rows", f"{rows:,} rows"
    stores = {
        few: SQLStore(database_with(server, FEW), pool_size=_THREADS),
        many: SQLStore(database_with(server, rows), pool_size=_THREADS),
    }
    counts = {few: FEW, many: rows}
    run = partial(per_second, threads=_THREADS, seconds=seconds)
    figures = interleaved(
        "d",
        "fresh",
        {name: partial(run, fresh(store)) for name, store in stores.items()},
        rounds=rounds,
        unit="a second",
        floors={many: 0.9},
    )
    figures += interleaved(
        "d",
        "replay",
        {name: partial(run, replay(store, counts[name])) for name, store in stores.items()},
        rounds=rounds,
        unit="a second",
    )
    figures += interleaved(
        "d",
        "fresh, by the size of the response",
        {
            f"{size:,} bytes": partial(run, fresh(stores[few], body=size))
            for size in (100, 1_000, 100_000)
        },
        rounds=rounds,
        unit="a second",
    )
    for store in stores.values():
        store.close()
    figures += _scopes(server, run, rounds)
    return figures


def _scopes(
    server: PostgresServer, run: Callable[[Callable[[], None]], float], rounds: int
) -> list[Figure]:
    stores = {
        name: SQLStore(database_with(server, 100_000, scopes=scopes), pool_size=_THREADS)
        for name, scopes in (("1 scope", 1), ("1,000 scopes", 1000))
    }
    figures = interleaved(
        "d",
        "replay, by the number of scopes",
        {name: partial(run, replay(store, 100_000)) for name, store in stores.items()},
        rounds=rounds,
        unit="a second",
    )
    for store in stores.values():
        store.close()
    return figures


def contention(server: PostgresServer, *, rounds: int) -> list[Figure]:
    duplicates = 50
    store = SQLStore(database_with(server, 0), pool_size=10)

    def storm(one: bool) -> float:
        """Milliseconds until each of 50 has its answer."""
        shared = os.urandom(32)
        claims = [claim_of(shared if one else os.urandom(32)) for _ in range(duplicates)]
        start = threading.Barrier(duplicates + 1)
        won = queue.SimpleQueue[bool]()

        def claim(which: int) -> None:
            start.wait()
            won.put(isinstance(store.claim(claims[which]), Claimed))

        threads = [threading.Thread(target=claim, args=(which,)) for which in range(duplicates)]
        for thread in threads:
            thread.start()
        start.wait()
        started = time.perf_counter()
        for thread in threads:
            thread.join()
        took = (time.perf_counter() - started) * 1e3
        winners = sum(won.get() for _ in threads)
        assert winners == (1 if one else duplicates)
        return took

    storm(False)
    figures = interleaved(
        "e",
        f"{duplicates} claims at once",
        {"of as many keys": partial(storm, False), "of one key": partial(storm, True)},
        rounds=rounds * 3,
        unit="ms for all",
    )
    store.close()
    return figures


@final
class Distance(ThreadingProxy):
    """Carries every byte so many seconds later, either way."""

    def __init__(self, upstream: tuple[str, int], seconds: float) -> None:
        super().__init__(upstream)
        self._seconds = seconds

    def carrier(self, client: socket.socket) -> Callable[[], None]:
        return partial(self._carry, client)

    def _carry(self, client: socket.socket) -> None:
        server = socket.create_connection(self.upstream)
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        other = {client: server, server: client}
        under_way: list[tuple[float, socket.socket, bytes]] = []
        with client, server:
            while True:
                wait = None
                if under_way:
                    wait = max(0.0, under_way[0][0] - time.monotonic())
                ready, _, _ = select.select([client, server, self._woken], [], [], wait)
                now = time.monotonic()
                while under_way and under_way[0][0] <= now:
                    _, to, data = under_way.pop(0)
                    to.sendall(data)
                for end in ready:
                    if end is self._woken or not (data := end.recv(65536)):
                        return
                    under_way.append((now + self._seconds, other[end], data))


def distance(server: PostgresServer, *, rounds: int) -> list[Figure]:
    """How many round trips an operation is: what it takes longer with 2 ms each way, in units
    of what a round trip takes longer."""
    url = database_with(server, FEW)
    completion = Completion("201 Created", (), b"x")
    figures: list[Figure] = []
    # A wait for the disk is the same near and far, and only hides the difference.
    with loading(server), Distance(("127.0.0.1", server.port), 0.002) as proxy:
        far = make_url(url).set(port=proxy.address[1]).render_as_string(hide_password=False)
        stores = {where: SQLStore(at, pool_size=1) for where, at in (("near", url), ("far", far))}

        def transacted(store: SQLStore) -> Callable[[], None]:
            def operate() -> None:
                transaction = store.begin(claim_of(os.urandom(32)))
                assert transaction is not None
                transaction.complete(completion)

            return operate

        def asking(store: SQLStore) -> Callable[[], None]:
            return lambda: store.lookup(b"") and None

        for case, make in (
            ("one statement", asking),
            ("replay", partial(replay, rows=FEW)),
            ("fresh", fresh),
            ("fresh, in a transaction", transacted),
        ):
            figures += interleaved(
                "f",
                f"{case}, 2 ms each way",
                {where: partial(milliseconds, make(store), 30) for where, store in stores.items()},
                rounds=rounds,
                unit="ms",
            )
            near, there = figures[-2:]
            trips = [
                (late - early) / 4.0 for early, late in zip(near.values, there.values, strict=True)
            ]
            figures.append(
                Figure(
                    section="f", case=f"{case}, 2 ms each way", variant="round trips",
                    unit="trips of 4 ms", values=trips,
                )
            )  # fmt: skip
            print(figures[-1], file=sys.stderr)
        for store in stores.values():
            store.close()
    return figures
