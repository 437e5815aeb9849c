"""A worker may also stand still at any edge of a request, be overtaken, and go on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from werkzeug.test import Client, TestResponse
from werkzeug.wrappers import Request, Response

from wsgi_idempotency import IdempotencyMiddleware, Policy, SQLStore, current_operation, everyone
from wsgi_idempotency.crashing import CrashPoint, crash_at

MODES = {"lease": Policy(), "transaction": Policy(transaction=True)}

#: The claim is made, and its end is not recorded.
HOLDING = (CrashPoint.AFTER_CLAIM, CrashPoint.DURING_HANDLER, CrashPoint.BEFORE_SETTLE)


class Ledger:
    """An application that enters who has sent a request, and says so."""

    def __init__(self, url: str, policy: Policy) -> None:
        self.engine = create_engine(url)
        self.store = SQLStore(url, timeout=1)
        self.middleware = IdempotencyMiddleware(self.app, self.store, scope=everyone, policy=policy)

    @Request.application
    def app(self, request: Request) -> Response:
        who = {"who": request.headers["X-Who"]}
        entry = text("INSERT INTO ledger VALUES (:who)")
        if self.middleware.policy.transaction:
            current_operation.connection.execute(entry, who)
        else:
            with self.engine.begin() as connection:
                connection.execute(entry, who)
        return Response(who["who"], 201)

    def post(self, app: Any, who: str) -> TestResponse:
        headers = {"Idempotency-Key": "k", "X-Who": who}
        return Client(app).post("/pay", headers=headers, buffered=True)

    def entries(self) -> list[str]:
        with self.engine.connect() as connection:
            return list(connection.scalars(text("SELECT who FROM ledger")))


@pytest.fixture(params=MODES)
def ledger(pg_database: str, request: pytest.FixtureRequest) -> Iterator[Ledger]:
    opened = Ledger(pg_database, MODES[request.param])
    with opened.engine.begin() as connection:
        connection.execute(text("CREATE TABLE ledger (who text NOT NULL)"))
    yield opened
    opened.store.close()
    opened.engine.dispose()


@pytest.mark.parametrize("point", CrashPoint, ids=lambda point: point.value)
def test_who_stood_still_at_an_edge_and_goes_on_changes_nothing(
    ledger: Ledger, point: CrashPoint
) -> None:
    """With a lease, whoever took over keeps the record; in a transaction nobody takes over, and
    there is one row. Every retry gets the one answer that is recorded."""
    second: list[TestResponse] = []

    def overtaken() -> None:
        with ledger.engine.begin() as connection:
            connection.execute(
                text("UPDATE idempotency_keys SET lease_until = lease_until - interval '1 hour'")
            )
        second.append(ledger.post(ledger.middleware, "second"))

    first = ledger.post(crash_at(ledger.middleware, point, die=overtaken), "first")
    replay = ledger.post(ledger.middleware, "third")
    assert replay.headers["Idempotency-Replayed"] == "true"
    [overtaking] = second
    if ledger.middleware.policy.transaction and point in HOLDING:
        assert overtaking.get_json()["code"] == "CONFLICT"
        recorded = "first"
    else:
        recorded = "second" if point in (CrashPoint.BEFORE_CLAIM, *HOLDING) else "first"
        assert overtaking.text == recorded
    assert replay.text == recorded
    entries = ledger.entries()
    assert entries.count(recorded) == 1
    if ledger.middleware.policy.transaction or point not in HOLDING:
        assert (entries, first.text) == ([recorded], recorded)
