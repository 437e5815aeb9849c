"""Through a PgBouncer in transaction mode, where a connection keeps nothing between two
statements."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
from apps.gate import Gate
from apps.shop import (
    at_gate,
    at_once,
    background,
    code,
    expect_one,
    kill_mid_handler,
    open_shop,
    post_in_vain,
    query,
    replayed,
    until,
)
from servers.pgbouncer import MISSING, PREPARES_FROM, PgBouncer, find_pgbouncer
from servers.postgres import PostgresServer
from sqlalchemy.engine import make_url

from wsgi_idempotency import SQLStore
from wsgi_idempotency.checkup import Verdict, check_database
from wsgi_idempotency.errors import StoreUnavailable
from wsgi_idempotency.schema import upgrade
from wsgi_idempotency.stores.sql import database_url
from wsgi_idempotency.testing import make_claim

pytestmark = pytest.mark.skipif(find_pgbouncer() is None, reason=MISSING)

THREADS = {"worker_class": "gthread", "workers": 2, "threads": 16}


@pytest.fixture
def direct(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of a database with our schema, past the pooler."""
    url = postgres_server.create_database()
    upgrade(url)
    yield url
    postgres_server.drop_database(url)


@pytest.fixture(params=[False, True], ids=["unprepared", "prepared"])
def prepare(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def pooler(postgres_server: PostgresServer, prepare: bool) -> Iterator[PgBouncer]:
    """Two connections to the server, whoever comes."""
    upstream = ("127.0.0.1", postgres_server.port)
    with PgBouncer(upstream, pool_size=2) as plain:
        version = plain.version
        if not prepare:
            yield plain
            return
    if version < PREPARES_FROM:
        pytest.skip(f"PgBouncer {version} carries no prepared statements over")
    with PgBouncer(upstream, pool_size=2, prepared=100) as preparing:
        yield preparing


def through(pooler: PgBouncer, url: str) -> str:
    address = make_url(url).set(port=pooler.address[1])
    return address.render_as_string(hide_password=False)


def test_100_simultaneous_duplicates_run_once(
    pooler: PgBouncer, direct: str, prepare: bool, tmp_path: Path
) -> None:
    options = {"prepare": prepare}
    with open_shop(through(pooler, direct), tmp_path, store_options=options, workers=4) as shop:
        first = expect_one(at_once(100, lambda _: shop.post("storm", ("X-Takes", "0.2"))))
        assert shop.attempts("storm") == [1]
        assert shop.post("storm").body == first.body
        for pair in range(2):
            assert shop.post("storm").body == first.body, pair
        pairs = at_once(100, lambda number: shop.post(f"key-{number // 2}"))
        for number in range(50):
            expect_one(pairs[2 * number : 2 * number + 2])
            assert shop.attempts(f"key-{number}") == [1]


def test_duplicates_are_refused_at_once_or_wait_for_the_replay(
    pooler: PgBouncer, direct: str, prepare: bool, tmp_path: Path, gate: Gate
) -> None:
    url, options = through(pooler, direct), {"prepare": prepare}
    with (
        open_shop(url, tmp_path, name="refusing", store_options=options, **THREADS) as shop,
        background(shop.post, "refused", at_gate(gate)) as original,
    ):
        first = gate.arrival()
        assert code(shop.post("refused")) == "CONFLICT"
        first.let_pass()
        assert original().status == 201
    with (
        open_shop(
            url, tmp_path, name="w", store_options=options, policy={"wait": 10}, **THREADS
        ) as shop,
        background(shop.post, "waits", at_gate(gate)) as original,
    ):
        first = gate.arrival()
        with background(shop.post, "waits") as duplicate:
            first.let_pass()
            assert replayed(duplicate())
            assert duplicate().body == original().body


def test_exactly_one_waiter_runs_when_the_first_fails(
    pooler: PgBouncer, direct: str, prepare: bool, tmp_path: Path, gate: Gate
) -> None:
    options = {"prepare": prepare}
    url, policy = through(pooler, direct), {"wait": 10}
    with (
        open_shop(url, tmp_path, store_options=options, policy=policy, **THREADS) as shop,
        background(shop.post, "k", at_gate(gate)) as original,
    ):
        first = gate.arrival()
        with background(at_once, 5, lambda _: shop.post("k")) as duplicates:
            first.let_pass("500 Out Of Luck")
            assert original().status == 500
            expect_one(duplicates())
        assert shop.attempts("k") == [1, 2]


def test_a_killed_worker_is_held_or_overtaken_once(
    pooler: PgBouncer, direct: str, prepare: bool, tmp_path: Path, gate: Gate
) -> None:
    url, options = through(pooler, direct), {"prepare": prepare}
    for outcomes in ("hold_unknown", "store_success"):
        policy = {"lease": 1, "outcomes": outcomes}
        with open_shop(
            url, tmp_path, name=outcomes, store_options=options, policy=policy, workers=4
        ) as shop:
            kill_mid_handler(shop, gate)
            if outcomes == "hold_unknown":
                for refused in at_once(10, lambda _, shop=shop: shop.post("k")):
                    assert (refused.status, code(refused)) == (409, "OUTCOME_UNKNOWN")
                assert shop.attempts("k") == [1]
                query(direct, "DELETE FROM idempotency_keys")
            else:
                expect_one(at_once(50, lambda _, shop=shop: shop.post("k")))
                assert shop.attempts("k") == [1, 2]


def test_in_transaction_mode_duplicates_run_once_and_a_killed_worker_frees_its_key(
    pooler: PgBouncer, direct: str, prepare: bool, tmp_path: Path, gate: Gate
) -> None:
    """The key's lock is the transaction's, so it is the pooler's connection's for as long."""
    with open_shop(
        through(pooler, direct),
        tmp_path,
        store_options={"prepare": prepare},
        policy={"transaction": True, "wait": 20},
        workers=4,
    ) as shop:
        expect_one(at_once(20, lambda _: shop.post("storm", ("X-Takes", "0.1"))))
        assert shop.attempts("storm") == [1]
        with background(post_in_vain, shop, at_gate(gate)) as lost:
            os.kill(gate.arrival().pid, signal.SIGKILL)
            lost()
        assert [row["idempotency_key"] for row in shop.rows()] == ["storm"]
        expect_one(at_once(10, lambda _: shop.post("k")))
        assert shop.attempts("k") == [1, 1]


@pytest.mark.parametrize("prepare", [False], ids=["unprepared"], indirect=True)
def test_an_exhausted_pooler_refuses_in_bounded_time(
    pooler: PgBouncer, postgres_server: PostgresServer, direct: str
) -> None:
    """Two transactions of somebody else's occupy both its connections."""
    url = through(pooler, direct)
    store, claim = SQLStore(url, prepare=False, timeout=1.0), make_claim()
    store.check()
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain) as one, psycopg.connect(plain) as two:
        one.execute("SELECT 1")
        two.execute("SELECT 1")
        started = time.monotonic()
        with pytest.raises(StoreUnavailable):
            store.claim(claim)
        assert time.monotonic() - started < 5
    assert store.claim(claim) is not None
    store.close()


@pytest.mark.parametrize("prepare", [False], ids=["unprepared"], indirect=True)
def test_a_statement_that_is_given_up_is_cancelled_behind_the_pooler(
    pooler: PgBouncer, postgres_server: PostgresServer, direct: str
) -> None:
    """It waits for a lock: after the time-out nobody waits any more, so that the pooler has its
    connection back."""
    store, claim = SQLStore(through(pooler, direct), prepare=False, timeout=1.0), make_claim()
    store.claim(claim)
    database = make_url(direct).database
    waiting = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    with postgres_server.connect(database) as other:
        other.execute("BEGIN")
        other.execute("UPDATE idempotency_keys SET attempt = 7")
        started = time.monotonic()
        with pytest.raises(StoreUnavailable):
            store.release(claim.digest, claim.token)
        assert time.monotonic() - started < 5
        until(lambda: query(direct, waiting)[0]["count"] == 0)
        other.execute("ROLLBACK")
    assert store.release(claim.digest, claim.token)
    store.close()


def test_no_statement_is_ever_taken_for_another(
    postgres_server: PostgresServer, direct: str
) -> None:
    """Prepared statements through a pooler that knows nothing of them: what is asked is done,
    or refused. Hold, release and forget take the same parameters."""
    store = SQLStore(direct)
    with PgBouncer(("127.0.0.1", postgres_server.port), pool_size=3) as pooler:

        def client(number: int) -> int:
            pooled = SQLStore(through(pooler, direct), pool_size=1)
            done = 0
            for action, state in itertools.islice(
                itertools.cycle([("hold", "held"), ("forget", None), ("release", "released")]),
                number,
                number + 30,
            ):
                claim = make_claim(os.urandom(8).hex())
                store.claim(claim)
                with suppress(StoreUnavailable):
                    assert getattr(pooled, action)(claim.digest, claim.token)
                    row = store.lookup(claim.digest)
                    assert (None if row is None else row.state.value) == state
                    done += 1
            pooled.close()
            return done

        assert sum(at_once(6, client)) > 0
    store.close()


def test_check_finds_the_pooler_and_what_it_does_with_prepared_statements(
    pooler: PgBouncer, direct: str, prepare: bool
) -> None:
    url = through(pooler, direct)
    for _ in range(2):  # the first leaves nothing behind that disturbs the second
        found = {finding.check: finding for finding in check_database(database_url(url))}
        assert found["pooler"].verdict is (Verdict.OK if prepare else Verdict.WARNING)
        assert Verdict.FAIL not in {finding.verdict for finding in found.values()} - {
            found[name].verdict for name in ("fsync", "full_page_writes")
        }
    direct_findings = {finding.check: finding for finding in check_database(database_url(direct))}
    assert direct_findings["pooler"].found == "none"
