"""Purging at scale, and what a day of churn leaves behind.

    PYTHONPATH=tests python -m bench.purge --rows 10000000 --output purge.json

A table of so many rows, all past their retention, is a day's rows that nobody purged. Then
comes a day in fast motion, in 24 rounds. Each purges the oldest 24th with the package's own
statement, batch by batch without a rest, and meanwhile another connection claims new keys, as
requests do; then it adds as many rows, claimed first and completed afterwards in batches of
:data:`CHUNK`. In the end every row has been replaced once.

Autovacuum is off, since its minute is not ours. After each round the rule by which it would
have begun is applied instead, to the server's own count of dead rows (PostgreSQL documentation,
25.1.6): VACUUM once there are more than 50 and ``scale factor`` times the table's rows, or more
than 1000 and a fifth of them were inserted. It runs at full speed, which autovacuum does not. What
a round adds and vacuums is not timed against anything, and has no fsync; the purge has.

Before, fresh claims, their completions, and the look-up that a replay is are timed on that table
and on one of 10,000 rows, in turns, so that what else the machine does hits both alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from servers.postgres import PostgresServer, database_of

from bench.operations import claim_of, digest_of
from bench.rows import database_with, loading, measured_server
from wsgi_idempotency import SQLStore
from wsgi_idempotency.records import Claimed, Completion, Record

ROUNDS = 24  # hours of a day
CHUNK = 2000  # rows that are in flight at once
BATCH = 1000  # rows, the command's default
BODY = 200  # bytes of a response
SMALL = 10_000  # rows of the table to compare with
REQUESTS = 2000  # of each kind that are timed
TURN = 100  # requests on one table, before it is the other's turn

#: Of autovacuum_vacuum_scale_factor: the server's default, and one for a table of this size.
SCALE_FACTORS = (0.2, 0.02)

_CLAIMED = """
INSERT INTO idempotency_keys (
    created_at, lease_until, expires_at, attempt, fingerprint_version, key_digest, claim_token,
    fingerprint, state, lapse, scope, idempotency_key, method, path)
SELECT now(), now() + interval '60 s', now() + interval '24 h', 1, 1, digest,
       substr(digest, 1, 16), digest, 'claimed', 'release', 'header:tenant', 'key-' || number,
       'POST', '/payments'
FROM (SELECT number, sha256(int8send(number)) AS digest
      FROM generate_series(%(first)s::bigint, %(last)s) AS number) AS numbered"""

_COMPLETED = """
UPDATE idempotency_keys SET
    state = 'completed', completed_at = clock_timestamp(), response_status = '201 Created',
    response_headers = '[["Content-Type","application/json"]]',
    response_body = convert_to(repeat('x', %(body)s), 'UTF8')
WHERE key_digest IN (SELECT sha256(int8send(number))
                     FROM generate_series(%(first)s::bigint, %(last)s) AS number)"""

_SIZES = """
SELECT pg_relation_size('idempotency_keys'), pg_relation_size('pk_idempotency_keys'),
       pg_relation_size('ix_idempotency_keys_expires_at'),
       pg_table_size('idempotency_keys') - pg_relation_size('idempotency_keys')"""

_DUE = """
SELECT n_dead_tup > 50 + %s * reltuples OR n_ins_since_vacuum > 1000 + 0.2 * reltuples
FROM pg_stat_user_tables JOIN pg_class ON oid = relid
WHERE relid = 'idempotency_keys'::regclass"""


def sizes(server: PostgresServer, url: str) -> dict[str, int]:
    """Bytes: of the rows, of both indexes, and of what else there is (TOAST, maps)."""
    (found,) = server.execute(_SIZES, database_of(url))
    return dict(zip(("table", "primary key", "expires_at index", "other"), found, strict=True))


# ---------------------------------------------------------------------- requests


def fresh(store: SQLStore) -> tuple[float, float]:
    """Seconds of a claim and of its completion."""
    claim = claim_of(os.urandom(32))
    began = time.perf_counter()
    answer = store.claim(claim)
    claimed = time.perf_counter()
    completion = Completion("201 Created", (("Content-Type", "text/plain"),), b"x" * BODY)
    done = store.complete(claim.digest, claim.token, completion)
    completed = time.perf_counter()
    assert isinstance(answer, Claimed)
    assert done
    return claimed - began, completed - claimed


def replay(store: SQLStore, number: int) -> float:
    """Seconds of fetching a stored response. That the row has expired makes no difference to
    the statement."""
    claim = claim_of(digest_of(number))
    began = time.perf_counter()
    answer = store.claim(claim)
    took = time.perf_counter() - began
    assert isinstance(answer, Record)
    assert answer.body is not None
    return took


def quantiles(seconds: Iterable[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(seconds)
    return {
        f"p{percent}": round(1000 * ordered[len(ordered) * percent // 100], 3)
        for percent in (50, 95, 99)
    }


def latencies(stores: dict[int, SQLStore]) -> dict[str, dict[str, dict[str, float]]]:
    """By the number of rows, what a claim, a completion and a replay take. Each table has its
    first turn for nothing."""
    seconds: dict[int, dict[str, list[float]]] = {
        rows: {"claim": [], "complete": [], "replay": []} for rows in stores
    }
    for turn in range(REQUESTS // TURN + 1):
        for rows, store in stores.items():
            of = seconds[rows]
            for _ in range(TURN):
                claimed, completed = fresh(store)
                replayed = replay(store, random.randint(1, rows))
                if turn:
                    of["claim"].append(claimed)
                    of["complete"].append(completed)
                    of["replay"].append(replayed)
    return {
        str(rows): {what: quantiles(took) for what, took in of.items()}
        for rows, of in seconds.items()
    }


class Requests:
    """Fresh claims and completions beside what the context runs, about 100 a second."""

    def __init__(self, url: str) -> None:
        self.seconds: list[float] = []
        self._url = url
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with closing(SQLStore(self._url, pool_size=1, timeout=60.0)) as store:
            fresh(store)
            while not self._over.wait(0.01):
                self.seconds.append(sum(fresh(store)))

    def __enter__(self) -> Requests:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()


# ---------------------------------------------------------------------- a day


def churn(
    server: PostgresServer, url: str, rows: int, scale_factor: float
) -> Iterator[dict[str, Any]]:
    """Replace every row once; after each round, how it went so far.

    :param url: a database with so many rows, numbered from 1, all of them expired.
    """
    before = largest = sizes(server, url)
    rates: list[float] = []
    vacuums: list[float] = []
    beside: list[float] = []
    for number in range(ROUNDS):
        first, last = rows * number // ROUNDS + 1, rows * (number + 1) // ROUNDS
        with Requests(url) as requests, closing(SQLStore(url, timeout=600.0)) as store:
            store.check()
            began = time.perf_counter()
            deleted = sum(purged(store, last - first + 1))
            rates.append(deleted / (time.perf_counter() - began))
        assert deleted == last - first + 1, deleted
        beside += requests.seconds
        with loading(server):
            add(server, url, rows + first, rows + last)
            took = vacuum_if_due(server, url, scale_factor)
        if took is not None:
            vacuums.append(took)
        now = sizes(server, url)
        largest = max(largest, now, key=lambda size: sum(size.values()))
        yield {
            "rounds": number + 1,
            "scale_factor": scale_factor,
            "purged_rows_a_second": {
                "slowest": round(min(rates)),
                "median": round(sorted(rates)[len(rates) // 2]),
            },
            "claim_and_complete_beside_the_purge": quantiles(beside) if beside else None,
            "vacuums": [round(took, 1) for took in vacuums],
            "bytes_before": before,
            "bytes_largest": largest,
            "bytes_after": now,
        }


def purged(store: SQLStore, count: int) -> Iterator[int]:
    """Purge so many rows, as the command does."""
    while count > 0:
        deleted = store.purge(min(BATCH, count))
        if not deleted:
            return
        yield deleted
        count -= deleted


def add(server: PostgresServer, url: str, first: int, last: int) -> None:
    """Claim and complete rows of these numbers."""
    with server.connect(database_of(url)) as connection:
        for number in range(first, last + 1, CHUNK):
            some = {"first": number, "last": min(number + CHUNK - 1, last), "body": BODY}
            connection.execute(_CLAIMED, some)
            connection.execute(_COMPLETED, some)


def vacuum_if_due(server: PostgresServer, url: str, scale_factor: float) -> float | None:
    """Seconds a VACUUM took; None when autovacuum would not have begun one."""
    with server.connect(database_of(url)) as connection:
        time.sleep(0.5)  # sessions that end tell the statistics what they did
        if connection.execute(_DUE, (scale_factor,)).fetchone() != (True,):
            return None
        began = time.perf_counter()
        connection.execute("VACUUM ANALYZE idempotency_keys")
        return time.perf_counter() - began


def measure(rows: int) -> Iterator[dict[str, Any]]:
    """The whole of it, as far as it has come."""
    with measured_server() as server:
        found: dict[str, Any] = {
            "rows": rows,
            "postgresql": server.version,
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
        }
        large = database_with(server, rows, expired=rows, body=BODY)
        small = database_with(server, SMALL, expired=SMALL, body=BODY)
        with closing(SQLStore(small)) as few, closing(SQLStore(large)) as many:
            found["milliseconds"] = latencies({SMALL: few, rows: many})
        found["load_average"] = os.getloadavg()
        yield found
        days: list[dict[str, Any]] = []
        for scale_factor in SCALE_FACTORS:
            for day in churn(server, large, rows, scale_factor):
                yield {**found, "days": [*days, day]}
            days.append(day)
            if scale_factor != SCALE_FACTORS[-1]:
                server.drop_database(large)
                large = database_with(server, rows, expired=rows, body=BODY)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.purge", description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--output", type=Path, help="where the JSON goes; standard output if not")
    arguments = parser.parse_args()
    for found in measure(arguments.rows):
        text = json.dumps(found, indent=2)
        if arguments.output is not None:
            arguments.output.write_text(text + "\n")
        print(json.dumps(found.get("days", [found])[-1]), file=sys.stderr, flush=True)
    if arguments.output is None:
        print(text)


if __name__ == "__main__":
    main()
