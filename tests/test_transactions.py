"""Transaction mode: what the application writes and the response, both or neither."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from werkzeug.test import Client, TestResponse
from werkzeug.wrappers import Request, Response

from wsgi_idempotency import (
    HOLD,
    IdempotencyMiddleware,
    MemoryStore,
    Policy,
    Route,
    SQLStore,
    current_operation,
    everyone,
    hold_unknown,
    store_everything,
)
from wsgi_idempotency.errors import ConfigurationError, NoTransaction, TransactionFailed
from wsgi_idempotency.events import Event


class Base(DeclarativeBase):
    pass


class Charge(Base):
    __tablename__ = "charges"

    id: Mapped[int] = mapped_column(primary_key=True)
    amount: Mapped[int] = mapped_column(unique=True)


@dataclass
class Shop:
    """An application in transaction mode, and what a test may look at."""

    url: str
    store: SQLStore
    middleware: IdempotencyMiddleware
    engine: Engine
    events: list[Event] = field(default_factory=list)

    def post(self, key: str = "k", **options: Any) -> TestResponse:
        headers = {"Idempotency-Key": key} | options.pop("headers", {})
        return Client(self.middleware).post("/charges", headers=headers, **options)

    def amounts(self) -> list[int]:
        """What was charged, as everybody sees it."""
        with self.engine.connect() as connection:
            return list(connection.scalars(text("SELECT amount FROM charges ORDER BY id")))

    def rows(self) -> list[dict[str, Any]]:
        with self.engine.connect() as connection:
            rows = connection.execute(text("SELECT * FROM idempotency_keys"))
            return [dict(row) for row in rows.mappings()]

    def told(self, *names: str) -> list[Event]:
        return [event for event in self.events if event.name in names]


OpenShop = Callable[..., Shop]


@pytest.fixture
def open_shop(database: str) -> Iterator[OpenShop]:
    engine = create_engine(database.replace("sqlite:///", "sqlite+pysqlite:///"))
    Base.metadata.create_all(engine)
    opened: list[Shop] = []

    def open_(app: Any, *, store_options: dict[str, Any] | None = None, **policy: Any) -> Shop:
        events: list[Event] = []
        store = SQLStore(database, **(store_options or {}))
        middleware = IdempotencyMiddleware(
            app,
            store,
            scope=everyone,
            policy=Policy(transaction=True, **policy),
            on_event=events.append,
        )
        opened.append(Shop(database, store, middleware, engine, events))
        return opened[-1]

    yield open_
    for shop in opened:
        shop.store.close()
    engine.dispose()


def session() -> Session:
    return Session(bind=current_operation.connection, join_transaction_mode="create_savepoint")


def charge(amount: int) -> None:
    with session() as joined:
        joined.add(Charge(amount=amount))
        joined.commit()


@Request.application
def charging(request: Request) -> Response:
    """Charges, and answers with the status that the request asks for."""
    charge(int(request.args.get("amount", "1")))
    status = request.headers.get("X-Status", "201 Made It")
    return Response(b"charged", status, headers={"X-Attempt": str(current_operation.attempt)})


def code(response: TestResponse) -> str:
    found: str = json.loads(response.data)["code"]
    return found


# ---------------------------------------------------------------------- both or neither


def test_the_write_and_the_response_are_there_once(open_shop: OpenShop) -> None:
    shop = open_shop(charging)
    first, second = shop.post(), shop.post()
    assert (first.status, first.data) == ("201 Made It", b"charged")
    assert "Idempotency-Replayed" not in first.headers
    assert (second.status, second.data) == ("201 Made It", b"charged")
    assert second.headers["Idempotency-Replayed"] == "true"
    assert shop.amounts() == [1]
    [row] = shop.rows()
    assert (row["state"], row["attempt"]) == ("completed", 1)


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [(None, "400"), (None, "503"), (hold_unknown, "500"), (lambda outcome: HOLD, "201")],
    ids=["forgotten", "released", "held", "held though it succeeded"],
)
def test_any_outcome_but_store_undoes_everything(
    open_shop: OpenShop, outcomes: Any, status: str
) -> None:
    """And the key is fresh: another payload may use it."""
    shop = open_shop(charging, **({"outcomes": outcomes} if outcomes else {}))
    failed = shop.post(headers={"X-Status": status}, data=b"one")
    assert (failed.status_code, failed.data) == (int(status), b"charged")
    assert (shop.amounts(), shop.rows()) == ([], [])
    again = shop.post(headers={"X-Status": status}, data=b"another")
    assert (again.status_code, again.headers["X-Attempt"]) == (int(status), "1")
    assert [event.action for event in shop.told("executed")] == ["forget", "forget"]


def test_an_error_is_stored_with_what_it_wrote_where_the_policy_says_so(
    open_shop: OpenShop,
) -> None:
    shop = open_shop(charging, outcomes=store_everything)
    assert shop.post(headers={"X-Status": "500"}).status_code == 500
    replay = shop.post(headers={"X-Status": "500"})
    assert (replay.status_code, replay.headers["Idempotency-Replayed"]) == (500, "true")
    assert shop.amounts() == [1]


def test_an_exception_undoes_everything(open_shop: OpenShop) -> None:
    def failing(environ: Any, start_response: Any) -> Any:
        charge(1)
        raise LookupError("no such account")

    shop = open_shop(failing)
    for _ in range(2):
        with pytest.raises(LookupError, match="no such account"):
            shop.post()
    assert (shop.amounts(), shop.rows()) == ([], [])


def test_an_interrupted_handler_undoes_everything(open_shop: OpenShop) -> None:
    def interrupted(environ: Any, start_response: Any) -> Any:
        charge(1)
        raise KeyboardInterrupt

    shop = open_shop(interrupted)
    with pytest.raises(KeyboardInterrupt):
        shop.post()
    assert (shop.amounts(), shop.rows()) == ([], [])


def test_the_handler_may_overrule_the_policy(open_shop: OpenShop) -> None:
    def regretting(environ: Any, start_response: Any) -> Any:
        charge(1)
        current_operation.forget()
        return Response("sorry", 200)(environ, start_response)

    shop = open_shop(regretting)
    assert shop.post().status_code == 200
    assert (shop.amounts(), shop.rows()) == ([], [])


def test_another_payload_is_refused_once_the_first_is_committed(open_shop: OpenShop) -> None:
    shop = open_shop(charging)
    shop.post(data=b"one")
    refused = shop.post(data=b"another")
    assert (refused.status_code, code(refused)) == (422, "FINGERPRINT_MISMATCH")
    assert shop.amounts() == [1]
