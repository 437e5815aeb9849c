"""What time does to a row: retention, clocks, and the purge."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from apps.gate import Gate
from apps.shop import (
    Shop,
    at_gate,
    at_once,
    background,
    code,
    expect_one,
    open_shop,
    query,
    replayed,
)
from werkzeug.test import Client, TestResponse

from wsgi_idempotency import IdempotencyMiddleware, SQLStore, everyone
from wsgi_idempotency.records import Claim, Claimed, Lapse, Record

DAY = 24 * 3600  # seconds; the default retention


def now(url: str) -> str:
    """The database's clock, in its own words."""
    return "(julianday('now') - 2440587.5) * 86400.0" if "sqlite" in url else "clock_timestamp()"


def seconds(url: str, count: float) -> str:
    """A span of time, to add to a column of the table."""
    return f"({count})" if "sqlite" in url else f"make_interval(secs => {count})"


def let_pass(url: str, count: float) -> None:
    """Let time pass for every row."""
    span = seconds(url, count)
    query(
        url,
        f"UPDATE idempotency_keys SET created_at = created_at - {span},"
        f" lease_until = lease_until - {span}, expires_at = expires_at - {span}",
    )


def test_one_of_50_racers_runs_when_the_retention_is_over(database: str, tmp_path: Path) -> None:
    """Nothing was purged: the row is there and counts as absent. The one that runs is a new
    operation, whose response is remembered for as long again."""
    with open_shop(database, tmp_path, workers=4) as shop:
        old = shop.post("k")
        let_pass(database, DAY)
        new = expect_one(at_once(50, lambda _: shop.post("k")))
        assert new.body != old.body
        assert shop.attempts("k") == [1, 1]
        let_pass(database, DAY - 60)
        assert shop.post("k").body == new.body


def test_an_expired_key_may_be_used_for_another_request(database: str, tmp_path: Path) -> None:
    with open_shop(database, tmp_path, workers=1) as shop:
        shop.post("k")
        assert code(shop.post("k", body=b"pay somebody else")) == "FINGERPRINT_MISMATCH"
        let_pass(database, DAY)
        assert shop.post("k", body=b"pay somebody else").status == 201
        assert code(shop.post("k")) == "FINGERPRINT_MISMATCH"


def test_a_response_is_replayed_until_the_last_second_of_its_retention(
    database: str, tmp_path: Path
) -> None:
    with open_shop(database, tmp_path, workers=1) as shop:
        first = shop.post("k")
        while True:
            query(
                database,
                f"UPDATE idempotency_keys SET expires_at = {now(database)} + "
                + seconds(database, 1),
            )
            [before] = shop.rows()
            again = shop.post("k")
            # On a machine so busy that the second is over, what came says nothing.
            if still_to_come(database, before["expires_at"]):
                break
        assert (again.status, again.body, replayed(again)) == (201, first.body, True)
        assert shop.attempts("k") == [1]


def still_to_come(url: str, moment: Any) -> bool:
    value = moment if "sqlite" in url else f"'{moment.isoformat()}'::timestamptz"
    [row] = query(url, f"SELECT {now(url)} < {value} AS yes")
    return bool(row["yes"])


@pytest.mark.parametrize("ahead", [3600, -3600], ids=["an hour ahead", "an hour behind"])
def test_a_wrong_clock_of_the_application_changes_nothing(
    database: str, tmp_path: Path, gate: Gate, ahead: int
) -> None:
    """Two hosts, one with a wrong clock, one retention of ten minutes, one lease of one: what
    either records, the other replays; what either runs, the other leaves alone."""
    policy = {"retention": 600, "lease": 60}
    with (
        open_shop(
            database,
            tmp_path,
            name="wrong",
            application="apps.wrong_clock:app",
            environment={"CLOCK_AHEAD": str(ahead)},
            policy=policy,
            workers=2,
        ) as wrong,
        open_shop(database, tmp_path, name="right", policy=policy, workers=2) as right,
    ):
        for name, here, there in (("a", wrong, right), ("b", right, wrong)):
            first = here.post(f"done-{name}")
            for shop in (here, there):
                again = shop.post(f"done-{name}")
                assert (replayed(again), again.body) == (True, first.body)
            with background(here.post, f"running-{name}", at_gate(gate)) as running:
                handler = gate.arrival()
                assert code(there.post(f"running-{name}")) == "CONFLICT"
                handler.let_pass()
                assert running().status == 201
        let_pass(database, 540)
        for name, shop in (("a", right), ("b", wrong)):
            assert replayed(shop.post(f"done-{name}"))
        let_pass(database, 60)
        for name, shop in (("a", right), ("b", wrong)):
            assert not replayed(shop.post(f"done-{name}"))


def expire(store: SQLStore, url: str, count: int) -> None:
    """Fill a table: ``count`` expired rows, and one of each kind that must stay."""
    for number in range(count):
        assert store.claim(claim(f"expired {number}"))
    query(url, "UPDATE idempotency_keys SET state = 'released'")
    let_pass(url, DAY)
    for what in ("live", "held", "in flight", "lapsed and held"):
        assert store.claim(claim(what))
    for what, change in (
        ("held", "state = 'held', "),
        ("in flight", ""),
        ("lapsed and held", f"lapse = 'hold', lease_until = {now(url)}, "),
    ):
        query(
            url,
            f"UPDATE idempotency_keys SET {change}expires_at = {now(url)}"
            f" WHERE idempotency_key = '{what}'",
        )


def claim(key: str) -> Claim:
    return Claim(
        digest=sha256(key.encode()).digest(),
        token=os.urandom(16),
        fingerprint=b"",
        fingerprint_version=0,
        scope="",
        key=key,
        method="POST",
        path="/",
        lease=60,
        retention=DAY,
        lapse=Lapse.RELEASE,
    )


def test_two_purges_at_once_delete_every_expired_row_once_and_no_other(database: str) -> None:
    """They neither block each other nor count a row twice, however small their batches."""
    stores = [SQLStore(database), SQLStore(database)]
    expire(stores[0], database, 300)

    def purge(number: int) -> int:
        deleted = 0
        while batch := stores[number].purge(7):
            deleted += batch
        return deleted

    counts = at_once(2, purge)
    left = {row["idempotency_key"] for row in query(database, "SELECT * FROM idempotency_keys")}
    assert left == {"live", "held", "in flight", "lapsed and held"}
    assert sum(counts) == 300
    for store in stores:
        store.close()


def test_a_purge_skips_the_rows_another_one_is_deleting(pg_database: str, postgres: Any) -> None:
    """A purge that stands still holds up nobody: neither another purge nor a request."""
    store = SQLStore(pg_database)
    expire(store, pg_database, 20)
    with postgres.connect(pg_database.rpartition("/")[2]) as connection:
        with connection.transaction():
            connection.execute(
                "SELECT FROM idempotency_keys WHERE state = 'released'"
                " ORDER BY expires_at LIMIT 5 FOR UPDATE"
            )
            assert store.purge(100) == 15
            assert isinstance(store.claim(claim("fresh")), Claimed)
        assert store.purge(100) == 5
    store.close()


class PurgedBetween(SQLStore):
    """A store whose expired rows are purged at the worst moment: after a request has looked
    and before it takes over."""

    def take_over(self, claim: Claim, seen: Record) -> Claimed | None:
        assert self.purge(10) == 1
        return super().take_over(claim, seen)


def test_a_purge_between_the_look_and_the_take_over_is_a_new_run(database: str) -> None:
    runs = []

    def handler(environ, start_response):
        runs.append(environ["wsgi_idempotency.operation"].attempt)
        start_response("201 Created", [])
        return [str(len(runs)).encode()]

    store = PurgedBetween(database)
    client = Client(IdempotencyMiddleware(handler, store, scope=everyone))
    assert post(client).text == "1"
    let_pass(database, DAY)
    again = post(client)
    assert (again.status_code, again.text) == (201, "2")
    assert post(client).text == "2"
    assert runs == [1, 1]
    store.close()


def post(client: Client) -> TestResponse:
    return client.post("/pay", headers={"Idempotency-Key": "k"})


def test_a_purge_that_never_rests_makes_no_request_fail(database: str, tmp_path: Path) -> None:
    """Keys that expire all the time, used by several processes while others purge: each
    request is a new run or a replay, never an error, and no key runs twice at once."""
    over = threading.Event()
    purger = SQLStore(database)

    def purge() -> int:
        deleted = 0
        while not over.is_set():
            query(database, f"UPDATE idempotency_keys SET expires_at = {now(database)}")
            deleted += purger.purge(3)
        return deleted

    def use(shop: Shop, number: int) -> set[tuple[int, str | None]]:
        responses = [shop.post(f"key-{number % 3}") for _ in range(15)]
        return {(response.status, code(response)) for response in responses}

    with open_shop(database, tmp_path, workers=4) as shop, ThreadPoolExecutor(1) as pool:
        assert shop.post("key-0").status == 201
        purged = pool.submit(purge)
        try:
            answers = at_once(8, lambda number: use(shop, number))
        finally:
            over.set()
        assert set().union(*answers) <= {(201, None), (409, "CONFLICT")}
        assert purged.result() > 0
        for key in ("key-0", "key-1", "key-2"):
            assert shop.never_two_at_once(key)
            assert set(shop.attempts(key)) == {1}
    purger.close()
