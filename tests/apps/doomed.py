"""A ledger whose workers die at an edge of their first request.

Run as a program it reads the cells of a matrix as JSON from standard input, forks a worker
for each, and writes by what signal each has died.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from sqlalchemy import create_engine, text
from werkzeug.test import Client
from werkzeug.wrappers import Response

from wsgi_idempotency import (
    IdempotencyMiddleware,
    Policy,
    SQLStore,
    everyone,
    hold_unknown,
    store_everything,
    store_success,
)
from wsgi_idempotency.crashing import CrashPoint, crash_at

LEASE = 1800  # seconds; the first retry comes when all workers have died, which takes long

MODES = {
    "store_success": Policy(outcomes=store_success, lease=LEASE),
    "store_everything": Policy(outcomes=store_everything, lease=LEASE),
    "hold_unknown": Policy(outcomes=hold_unknown, lease=LEASE),
    # The server notices by itself that a worker is dead, but not in no time.
    "transaction": Policy(transaction=True, wait=30),
    "step": Policy(lease=LEASE),
    "guard": Policy(lease=LEASE, rebuild=lambda operation: Response("rebuilt", 201)),
}

AT_ONCE = 8  # workers

_BUSY = {"sqlite": {"timeout": 30}, "postgresql": {}}


class Ledger:
    """The application: one row in the ledger for each execution that was committed, and one
    line in a file for each that has begun.

    :param url: of the database that has keys and ledger.
    :param diary: the file.
    """

    def __init__(self, url: str, diary: str) -> None:
        self.url = url
        self._diary = diary
        self._engine = create_engine(
            url, connect_args=_BUSY[url.partition(":")[0].partition("+")[0]]
        )

    def make_table(self) -> None:
        with self._engine.begin() as connection:
            connection.execute(text("CREATE TABLE ledger (key TEXT NOT NULL)"))

    def __call__(self, environ: Any, start_response: Any) -> list[bytes]:
        operation = environ["wsgi_idempotency.operation"]
        with open(self._diary, "a") as diary:
            diary.write(f"{operation.key}\n")
        mode = environ["HTTP_X_MODE"]
        if mode == "transaction":
            self._enter(operation, operation.connection)
        elif mode == "step":
            operation.step("entry", lambda: self._commit(operation))
        else:
            self._commit(operation, guarded=mode == "guard")
        start_response(environ["HTTP_X_STATUS"], [("Content-Type", "text/plain")])
        return [b"attempt %d" % operation.attempt]

    def _commit(self, operation: Any, *, guarded: bool = False) -> None:
        with self._engine.begin() as connection:
            if guarded:
                operation.guard(connection)
            self._enter(operation, connection)

    def _enter(self, operation: Any, connection: Any) -> None:
        connection.execute(text("INSERT INTO ledger VALUES (:key)"), {"key": operation.key})

    def protected(self, mode: str) -> IdempotencyMiddleware:
        store = SQLStore(self.url, timeout=30)
        return IdempotencyMiddleware(self, store, scope=everyone, policy=MODES[mode])

    def executions(self, key: str) -> int:
        with open(self._diary) as diary:
            return diary.read().splitlines().count(key)

    def rows(self, key: str) -> int:
        with self._engine.connect() as connection:
            found = connection.execute(
                text("SELECT count(*) FROM ledger WHERE key = :key"), {"key": key}
            )
            return int(found.scalar_one())

    def let_leases_run_out(self) -> None:
        hour = "interval '1 hour'" if self._engine.name == "postgresql" else "3600"
        with self._engine.begin() as connection:
            connection.execute(
                text(f"UPDATE idempotency_keys SET lease_until = lease_until - {hour}")
            )

    def close(self) -> None:
        self._engine.dispose()


def post(app: Any, mode: str, key: str, status: str) -> Any:
    """Send one request as a server and its client do."""
    headers = {"Idempotency-Key": key, "X-Mode": mode, "X-Status": status}
    with Client(app).post("/pay", headers=headers, buffered=True) as response:
        return response


def die(cell: dict[str, str], url: str, diary: str) -> None:
    middleware = Ledger(url, diary).protected(cell["mode"])
    app = crash_at(middleware, CrashPoint[cell["point"]])
    post(app, cell["mode"], cell["key"], cell["status"])


def main(url: str, diary: str) -> None:
    ends: dict[str, int] = {}
    workers: dict[int, str] = {}
    for cell in [*json.load(sys.stdin), None]:
        while workers and (cell is None or len(workers) == AT_ONCE):
            pid, end = os.wait()
            ends[workers.pop(pid)] = end
        if cell is None:
            break
        pid = os.fork()
        if not pid:
            try:
                die(cell, url, diary)
            finally:
                os._exit(1)
        workers[pid] = cell["key"]
    json.dump(ends, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
