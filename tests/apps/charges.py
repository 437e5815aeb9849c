"""A shop in transaction mode, and what a test may look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from servers.commit_proxy import CommitProxy
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from werkzeug.test import Client, TestResponse
from werkzeug.wrappers import Request, Response

from wsgi_idempotency import IdempotencyMiddleware, Policy, SQLStore, current_operation, everyone
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
    proxy: CommitProxy | None = None

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


def opener(database: str) -> Iterator[OpenShop]:
    engine = create_engine(database)
    Base.metadata.create_all(engine)
    opened: list[Shop] = []

    def open_(
        app: Any,
        *,
        store_options: dict[str, Any] | None = None,
        url: str = database,
        given: Engine | None = None,
        **policy: Any,
    ) -> Shop:
        events: list[Event] = []
        store = SQLStore(given or url, **(store_options or {}))
        middleware = IdempotencyMiddleware(
            app,
            store,
            scope=everyone,
            policy=Policy(transaction=True, **policy),
            on_event=events.append,
        )
        opened.append(Shop(url, store, middleware, engine, events))
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
