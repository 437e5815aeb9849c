"""Claims that need not be on the disk: what they save, and what a crash makes of them."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from servers.postgres import PostgresServer
from sqlalchemy.engine import make_url
from werkzeug import Request, Response
from werkzeug.test import Client

from wsgi_idempotency import (
    IdempotencyMiddleware,
    MemoryStore,
    Policy,
    Route,
    SQLStore,
    everyone,
    hold_unknown,
)
from wsgi_idempotency.errors import ConfigurationError
from wsgi_idempotency.records import Claimed
from wsgi_idempotency.schema import upgrade
from wsgi_idempotency.testing import make_claim

ASYNCHRONOUS = Policy(claim_durability="asynchronous", outcomes=hold_unknown)


@pytest.fixture
def slow_walwriter(postgres_server: PostgresServer) -> Iterator[PostgresServer]:
    """A server on which only a commit that waits brings WAL to the disk soon."""
    server = postgres_server
    server.execute("ALTER SYSTEM SET wal_writer_delay = '10s'")
    server.execute("SELECT pg_reload_conf()")
    yield server
    server.execute("ALTER SYSTEM RESET wal_writer_delay")
    server.execute("SELECT pg_reload_conf()")


@pytest.fixture
def own_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A database with our schema on the server that may be crashed."""
    url = postgres_server.create_database()
    upgrade(url)
    yield url
    postgres_server.drop_database(url)


def asking(store: Any, *, policy: Policy | None = ASYNCHRONOUS, **options: Any) -> Client:
    return Client(IdempotencyMiddleware(paying, store, scope=everyone, policy=policy, **options))


def paying(environ: Any, start_response: Any) -> Any:
    return Response("paid", 201)(environ, start_response)


@pytest.mark.parametrize("prepare", [True, False], ids=["prepared", "unprepared"])
def test_only_the_claim_of_a_policy_that_says_so_is_not_waited_for(
    slow_walwriter: PostgresServer, own_url: str, prepare: bool
) -> None:
    """In one statement, which leaves the connection's setting as it was."""
    store = SQLStore(own_url, prepare=prepare, pool_size=1)
    store.check()

    def waited(asynchronous: bool) -> int:
        """How many of some claims were on the disk when they were granted."""
        on_disk = 0
        for _ in range(20):
            claim = replace(make_claim(str(uuid.uuid4())), asynchronous=asynchronous)
            assert store.claim(claim) == Claimed(attempt=1)
            written, flushed = slow_walwriter.execute(
                "SELECT pg_current_wal_insert_lsn() - '0/0', pg_current_wal_flush_lsn() - '0/0'"
            )[0]
            on_disk += flushed >= written
        return on_disk

    before = waited(False)
    assert waited(True) < 10 <= before
    with store.engine.connect() as connection:
        setting = connection.exec_driver_sql("SHOW synchronous_commit").scalar()
    assert setting == "on"
    store.close()


def test_an_asynchronous_claim_is_a_claim_like_any_other(own_url: str) -> None:
    """One runs, the others replay, with as many statements."""
    store = SQLStore(own_url)
    client = asking(store)
    headers = {"Idempotency-Key": "k"}
    first, second = (client.post("/", headers=headers) for _ in range(2))
    assert (first.status_code, second.status_code) == (201, 201)
    assert second.headers["Idempotency-Replayed"] == "true"
    store.close()


@pytest.mark.parametrize("where", ["policy", "route"])
def test_a_store_that_can_not_grant_claims_asynchronously_refuses_the_policy(
    sqlite_url: str, where: str
) -> None:
    """SQLite has one durability for a connection; memory has none."""
    options: dict[str, Any] = {"policy": ASYNCHRONOUS}
    if where == "route":
        options = {"policy": None, "routes": [Route("/pay", ASYNCHRONOUS)]}
    for store in (sqlite_url, MemoryStore()):
        with pytest.raises(ConfigurationError, match="needs PostgreSQL"):
            asking(store, **options)


class Shop:
    """Writes a row for each operation in the cluster that has the keys, on connections of its
    own; its clients know which they were told of."""

    def __init__(self, url: str) -> None:
        self.url = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        self.told: set[str] = set()
        self.store = SQLStore(url, timeout=2.0, pool_size=8)
        self.client = Client(
            IdempotencyMiddleware(self.charging, self.store, scope=everyone, policy=ASYNCHRONOUS)
        )
        with self.connect() as connection:
            connection.execute("CREATE TABLE charges (key text NOT NULL)")

    def connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.url, autocommit=True, connect_timeout=2)

    def charging(self, environ: Any, start_response: Any) -> Any:
        with self.connect() as connection:
            key = Request(environ).headers["Idempotency-Key"]
            connection.execute("INSERT INTO charges VALUES (%s)", (key,))
        return Response("charged", 201)(environ, start_response)

    def pay(self, key: str) -> int:
        return self.client.post("/charges", headers={"Idempotency-Key": key}).status_code

    def load(self, over: threading.Event, started: threading.Semaphore) -> None:
        """Pay for one key after the other, each told of and paid for but once."""
        while not over.is_set():
            key = str(uuid.uuid4())
            with suppress(psycopg.Error):
                if self.pay(key) == 201:
                    self.told.add(key)
                    started.release()
                else:
                    over.wait(0.1)  # the database is away


def crash(server: PostgresServer) -> None:
    """Kill the postmaster; its children go when they see it, and what is only in its shared
    memory, as WAL nobody has waited for, goes with them."""
    pid = server.pid
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while True:
        try:
            server.start()
            return
        except RuntimeError:  # its children are still there, and it says so
            if time.monotonic() > deadline:
                raise


def test_no_effect_in_the_cluster_outlives_its_asynchronous_claim(
    slow_walwriter: PostgresServer, own_url: str
) -> None:
    """The postmaster is killed under load, three times: whatever charge survives has its key's
    row, so that no retry charges again; and what a client was told of has both."""
    shop = Shop(own_url)
    for _ in range(3):
        over, started = threading.Event(), threading.Semaphore(0)
        threads = [threading.Thread(target=shop.load, args=(over, started)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for _ in range(30):
            assert started.acquire(timeout=60)
        crash(slow_walwriter)
        over.set()
        for thread in threads:
            thread.join()
    with shop.connect() as connection:
        rows = connection.execute("SELECT key FROM charges").fetchall()
        known = connection.execute("SELECT idempotency_key FROM idempotency_keys").fetchall()
    charged = [key for (key,) in rows]
    assert len(charged) == len(set(charged))
    assert set(charged) <= {key for (key,) in known}
    assert shop.told <= set(charged)
    for key in charged:
        shop.pay(key)
    with shop.connect() as connection:
        again = connection.execute("SELECT count(*) FROM charges").fetchone()
    assert again == (len(charged),)
    shop.store.close()
