"""Many requests with one key, at once, on real servers."""

from __future__ import annotations

import select
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from apps.gate import Gate
from apps.shop import (
    GUNICORNS,
    Shop,
    at_gate,
    at_once,
    background,
    code,
    expect_one,
    open_shop,
    query,
    replayed,
    until,
)
from servers.http import Connection, Response, request_bytes
from servers.postgres import Postgres, database_of

#: Seconds for an answer that waits for nothing. It is a tenth of that on an idle machine.
AT_ONCE = 2.0

THREADS = {"worker_class": "gthread", "workers": 1, "threads": 16}


def storm(shop: Shop, gate: Gate) -> list[Response]:
    """100 identical requests at once, of which half are answered before the first is done."""
    answered = threading.Semaphore(0)

    def post(_: int) -> Response:
        try:
            return shop.post("storm", at_gate(gate))
        finally:
            answered.release()

    def let_pass() -> None:
        first = gate.arrival()
        for _ in range(50):
            assert answered.acquire(timeout=30)
        first.let_pass()

    with background(let_pass) as passed:
        responses = at_once(100, post)
        passed()
    return responses


def expect_a_quiet_storm(shop: Shop, gate: Gate) -> None:
    responses = storm(shop, gate)
    first = expect_one(responses)
    assert sum(response.status == 409 for response in responses) >= 50
    assert shop.attempts("storm") == [1]

    later = shop.post("storm", at_gate(gate))
    assert replayed(later)
    assert later.body == first.body
    assert shop.attempts("storm") == [1]


@pytest.mark.parametrize("gunicorn", GUNICORNS.values(), ids=GUNICORNS)
def test_100_simultaneous_duplicates_on_postgresql_run_once(
    pg_database: str, tmp_path: Path, gate: Gate, gunicorn: dict[str, Any]
) -> None:
    """One handler runs; everybody else gets its response or is told to come back."""
    with open_shop(pg_database, tmp_path, **gunicorn) as shop:
        expect_a_quiet_storm(shop, gate)


def test_100_simultaneous_duplicates_on_sqlite_run_once(
    sqlite_url: str, tmp_path: Path, gate: Gate
) -> None:
    """Also when four processes make the file and its tables at the same moment."""
    with open_shop(sqlite_url, tmp_path, workers=4) as shop:
        expect_a_quiet_storm(shop, gate)


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
def test_claims_that_meet_in_the_primary_key_are_one_run_or_replays(
    pg_database: str, tmp_path: Path, postgres: Postgres, end: str
) -> None:
    """Four claims find no row and wait for another one to be committed, which their snapshots
    don't show: they replay it. When it is rolled back, one of the four runs."""
    with open_shop(pg_database, tmp_path, workers=4) as shop:
        first = shop.post("k")
        query(pg_database, "CREATE TABLE kept AS SELECT * FROM idempotency_keys")
        query(pg_database, "DELETE FROM idempotency_keys")
        with postgres.connect(database_of(pg_database)) as other, ThreadPoolExecutor(4) as pool:
            other.execute("BEGIN")
            other.execute("INSERT INTO idempotency_keys SELECT * FROM kept")
            claims = [pool.submit(shop.post, "k") for _ in range(4)]
            until(lambda: waiting_for_a_lock(pg_database) == 4)
            other.execute(end)
            responses = [claim.result(30) for claim in claims]
        if end == "COMMIT":
            assert {(response.body, replayed(response)) for response in responses} == {
                (first.body, True)
            }
            assert shop.attempts("k") == [1]
        else:
            expect_one(responses)
            assert shop.attempts("k") == [1, 1]


def waiting_for_a_lock(url: str) -> int:
    """How many statements of a database wait for another transaction."""
    [row] = query(
        url,
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock'",
    )
    return int(row["count"])


def test_50_keys_sent_twice_at_once_run_50_times(database: str, tmp_path: Path) -> None:
    with open_shop(database, tmp_path, workers=4) as shop:
        responses = at_once(100, lambda number: shop.post(f"key-{number // 2}"))
        for pair in zip(responses[::2], responses[1::2], strict=True):
            expect_one(pair)
        executions = shop.executions()
    assert len({line["key"] for line in executions}) == len(executions) == 50


def test_a_duplicate_that_need_not_wait_is_refused_at_once(
    pg_database: str, tmp_path: Path, gate: Gate
) -> None:
    with (
        open_shop(pg_database, tmp_path, **THREADS) as shop,
        background(shop.post, "k", at_gate(gate)) as original,
    ):
        first = gate.arrival()
        started = time.monotonic()
        refused = shop.post("k")
        assert time.monotonic() - started < AT_ONCE
        assert (refused.status, code(refused)) == (409, "CONFLICT")
        assert refused.header("Retry-After") == "1"
        assert refused.header("X-Should-Retry") == "true"
        first.let_pass()
        assert original().status == 201
        assert shop.attempts("k") == [1]


def test_another_payload_is_refused_at_once_while_the_first_is_in_flight(
    pg_database: str, tmp_path: Path, gate: Gate
) -> None:
    """It would be a mismatch whatever came of the first, so it doesn't wait to hear it."""
    with (
        open_shop(pg_database, tmp_path, policy={"wait": 30}, **THREADS) as shop,
        background(shop.post, "k", at_gate(gate)) as original,
    ):
        first = gate.arrival()
        started = time.monotonic()
        refused = shop.post("k", body=b"pay somebody else")
        assert time.monotonic() - started < AT_ONCE
        assert (refused.status, code(refused)) == (422, "FINGERPRINT_MISMATCH")
        first.let_pass()
        assert original().status == 201


class Waiters:
    """Duplicates that wait for the one in flight."""

    def __init__(self, shop: Shop, count: int, *headers: tuple[str, str], key: str = "k") -> None:
        self._stack = ExitStack()
        self.connections = [self._stack.enter_context(shop.connect()) for _ in range(count)]
        fields = [("Idempotency-Key", key), ("Connection", "close"), *headers]
        for connection in self.connections:
            connection.send(request_bytes("POST", "/pay", fields, b"pay"))

    def answered(self, timeout: float) -> list[Connection]:
        """Which have their answer, as soon as there is one."""
        sockets = {connection.socket: connection for connection in self.connections}
        return [sockets[sock] for sock in select.select(sockets, [], [], timeout)[0]]

    def responses(self) -> list[Response]:
        return [connection.receive() for connection in self.connections]

    def __enter__(self) -> Waiters:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()


@pytest.mark.parametrize(
    "gunicorn",
    [THREADS, GUNICORNS["2 gevent workers"], GUNICORNS["2 gevent workers forked after a warm-up"]],
    ids=["gthread", "gevent", "gevent forked after a warm-up"],
)
def test_a_waiting_duplicate_gets_the_response_soon_after_it_is_there(
    pg_database: str, tmp_path: Path, gate: Gate, gunicorn: dict[str, Any]
) -> None:
    with (
        open_shop(pg_database, tmp_path, policy={"wait": 10}, **gunicorn) as shop,
        background(shop.post, "k", at_gate(gate)) as original,
    ):
        first = gate.arrival()
        with Waiters(shop, 3) as waiters:
            assert waiters.answered(0.3) == []
            first.let_pass()
            completed = time.monotonic()
            responses = waiters.responses()
            assert time.monotonic() - completed < AT_ONCE
        assert {response.body for response in responses} == {original().body}
        assert all(map(replayed, responses))
        assert shop.attempts("k") == [1]


def test_a_duplicate_that_has_waited_long_enough_is_told_to_come_back(
    pg_database: str, tmp_path: Path, gate: Gate
) -> None:
    with (
        open_shop(pg_database, tmp_path, policy={"wait": 0.5}, **THREADS) as shop,
        background(shop.post, "k", at_gate(gate)) as original,
    ):
        first = gate.arrival()
        started = time.monotonic()
        refused = shop.post("k")
        assert 0.5 <= time.monotonic() - started < 0.5 + AT_ONCE
        assert code(refused) == "CONFLICT"
        first.let_pass()
        assert original().status == 201


def test_exactly_one_waiter_runs_when_the_original_has_failed(
    database: str, tmp_path: Path, gate: Gate
) -> None:
    """The claim is released, one of those that wait takes it over, and the others go on
    waiting for that one."""
    with (
        open_shop(database, tmp_path, policy={"wait": 20}, **THREADS) as shop,
        background(shop.post, "k", at_gate(gate)) as original,
    ):
        first = gate.arrival()
        with Waiters(shop, 5, at_gate(gate)) as waiters:
            assert waiters.answered(0.3) == []
            first.let_pass("500 Out Of Luck")
            second = gate.arrival()
            assert second.attempt == 2
            with pytest.raises(TimeoutError):
                gate.arrival(0.3)
            second.let_pass()
            expect_one(waiters.responses())
        assert original().status == 500
        assert shop.attempts("k") == [1, 2]


@pytest.mark.parametrize(
    "gunicorn",
    [THREADS, {"worker_class": "gevent", "workers": 1}],
    ids=["gthread", "gevent"],
)
def test_waiters_are_bounded_and_everything_else_stays_fast(
    pg_database: str, tmp_path: Path, gate: Gate, gunicorn: dict[str, Any]
) -> None:
    """With two places to wait and a pool of one connection: the third duplicate is refused
    at once, other requests are served meanwhile, and all of it comes to its end."""
    with (
        open_shop(
            pg_database,
            tmp_path,
            policy={"wait": 30},
            max_waiting=2,
            store_options={"pool_size": 1},
            **gunicorn,
        ) as shop,
        background(shop.post, "k", at_gate(gate)) as original,
    ):
        first = gate.arrival()
        with Waiters(shop, 2) as waiters:
            assert waiters.answered(0.3) == []
            started = time.monotonic()
            for refused in at_once(4, lambda _: shop.post("k")):
                assert (refused.status, code(refused)) == (409, "CONFLICT")
            assert shop.get().body == b"ok"
            assert shop.post("another").status == 201
            assert time.monotonic() - started < 2 * AT_ONCE
            assert waiters.answered(0) == []
            first.let_pass()
            assert {response.body for response in waiters.responses()} == {original().body}
        # Their places are free again.
        with background(shop.post, "k2", at_gate(gate)) as second_original:
            second = gate.arrival()
            with Waiters(shop, 2, key="k2") as waiters:
                assert waiters.answered(0.3) == []
                second.let_pass()
                assert {response.body for response in waiters.responses()} == {
                    second_original().body
                }
        assert shop.attempts("k") == shop.attempts("k2") == [1]


def test_one_connection_is_enough_for_the_application_and_its_keys(
    pg_database: str, tmp_path: Path
) -> None:
    """The middleware keeps no connection while the handler runs, so an Engine that has only
    one, and that the handler writes with as well, serves everybody in turn."""
    query(pg_database, "CREATE TABLE ledger (pid int NOT NULL)")
    with open_shop(
        pg_database,
        tmp_path,
        engine_options={"pool_size": 1, "max_overflow": 0, "pool_timeout": 20},
        policy={"wait": 20},
        **THREADS,
    ) as shop:
        responses = at_once(30, lambda number: shop.post(f"key-{number // 3}"))
        for three in zip(responses[::3], responses[1::3], responses[2::3], strict=True):
            expect_one(three)
        assert len(shop.executions()) == 10
    assert query(pg_database, "SELECT count(*) FROM ledger") == [{"count": 10}]


@pytest.mark.parametrize("wait", [0, 1], ids=["not waiting", "waiting a second"])
def test_a_handler_that_sends_its_own_request_again_is_refused_and_goes_on(
    pg_database: str, tmp_path: Path, wait: int
) -> None:
    with open_shop(pg_database, tmp_path, policy={"wait": wait}, **THREADS) as shop:
        response = shop.post("k", ("X-Call-Self", "{}:{}".format(*shop.address)))
        assert response.status == 201
        assert b'"inner": [409, "CONFLICT"]' in response.body
        assert shop.attempts("k") == [1]


def test_a_key_whose_handler_keeps_failing_never_runs_twice_at_once(
    database: str, tmp_path: Path
) -> None:
    """12 clients that try again at once whatever they get: one attempt after the other,
    each of them protected, each numbered one higher than the last."""
    with open_shop(database, tmp_path, workers=4) as shop:

        def churn(_: int) -> set[tuple[int, str | None]]:
            responses = [
                shop.post("k", ("X-Status", "500 Out Of Luck"), ("X-Takes", "0.005"))
                for _ in range(10)
            ]
            return {(response.status, code(response)) for response in responses}

        answers = set[tuple[int, str | None]]().union(*at_once(12, churn))
        attempts = shop.attempts("k")
        assert shop.never_two_at_once("k")
    assert answers <= {(500, None), (409, "CONFLICT")}
    assert attempts == list(range(1, len(attempts) + 1))
    assert len(attempts) > 1


@pytest.mark.parametrize(
    "gunicorn",
    [GUNICORNS["4 sync workers forked after a warm-up"], GUNICORNS["2 gevent workers"]],
    ids=["sync forked after a warm-up", "gevent"],
)
def test_a_handler_of_five_leases_length_is_not_taken_over(
    pg_database: str, tmp_path: Path, gate: Gate, gunicorn: dict[str, Any]
) -> None:
    """The heartbeat of its process keeps its claim, in a process forked after its parent's
    began as well."""
    with (
        open_shop(pg_database, tmp_path, policy={"lease": 1}, **gunicorn) as shop,
        background(shop.post, "k", at_gate(gate)) as original,
    ):
        first = gate.arrival()
        end = time.monotonic() + 5
        while time.monotonic() < end:
            with background(shop.post, "k") as retry:
                assert code(retry()) == "CONFLICT"
            with pytest.raises(TimeoutError):
                gate.arrival(0.2)
        first.let_pass()
        assert original().status == 201
        assert replayed(shop.post("k"))
        assert shop.attempts("k") == [1]
