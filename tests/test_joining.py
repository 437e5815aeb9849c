"""Applications as their users write them, joined to the transaction by one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from apps.shop import query, replayed
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from pyramid.config import Configurator
from pyramid.response import Response as PyramidResponse
from servers.http import Connection, Gunicorn, Response
from sqlalchemy import create_engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from werkzeug.test import Client
from werkzeug.wrappers import Response as WerkzeugResponse

from wsgi_idempotency import (
    IdempotencyMiddleware,
    Policy,
    Route,
    current_operation,
    everyone,
)
from wsgi_idempotency.contrib.flask import Idempotency
from wsgi_idempotency.contrib.flask_sqlalchemy import JoiningSession

EXAMPLES = Path(__file__).parent.parent / "examples"
DOCS = Path(__file__).parent.parent / "docs"
FORM = ("Content-Type", "application/x-www-form-urlencoded")

SHOPS = {
    "Flask-SQLAlchemy": "flask_sqlalchemy_shop:app",
    "Pyramid with pyramid_tm": "pyramid_tm_shop:main()",
    "Bottle with plain SQLAlchemy": "bottle_sqlalchemy_shop:application",
}


def post(server: Gunicorn, path: str, key: str | None, amount: int) -> Response:
    fields = [("Authorization", "Bearer alice"), ("Connection", "close"), FORM]
    if key is not None:
        fields.append(("Idempotency-Key", key))
    with Connection(server.address) as connection:
        return connection.request("POST", path, fields, b"amount=%d" % amount)


@pytest.mark.parametrize("shop", SHOPS)
def test_an_example_charges_and_answers_once_or_not_at_all(
    database: str, tmp_path: Path, shop: str
) -> None:
    """Its own commit() commits nothing by itself, and what it reads back is its own."""
    environment = {"SHOP_DATABASE": database}
    paths = ["/charges", "/driver/charges"] if "Bottle" in shop else ["/charges"]
    charged: list[int] = []
    with Gunicorn(
        SHOPS[shop], tmp_path, workers=1, environment=environment, folders=[EXAMPLES]
    ) as server:
        for path, key in zip(paths, ("one", "two"), strict=False):
            answers = [post(server, path, key, 7) for _ in range(2)]
            assert [answer.status for answer in answers] == [201, 201]
            assert [replayed(answer) for answer in answers] == [False, True]
            assert answers[0].body == answers[1].body
            refused = post(server, path, f"{key}-refused", 5000)
            assert (refused.status, replayed(refused)) == (402, False)
            charged.append(7)
            assert amounts(database) == charged
        if len(paths) == 1 or "sqlite" not in database:
            unprotected = post(server, "/charges", None, 8)
            assert unprotected.status == 201
            assert amounts(database) == [*charged, 8]
    rows = query(database, "SELECT state FROM idempotency_keys")
    assert [row["state"] for row in rows] == ["completed"] * len(paths)


def amounts(database: str) -> list[int]:
    return [row["amount"] for row in query(database, "SELECT amount FROM charges ORDER BY id")]


# ---------------------------------------------------------------------- Flask-SQLAlchemy


@dataclass
class FlaskShop:
    app: Flask
    db: Any
    Charge: Any
    client: Client

    def post(self, path: str = "/charges", key: str | None = "k") -> Any:
        return self.client.post(path, headers={} if key is None else {"Idempotency-Key": key})


@pytest.fixture
def flask_shop(database: str, tmp_path: Path) -> Iterator[FlaskShop]:
    app = Flask("shop")
    app.config["SQLALCHEMY_DATABASE_URI"] = database
    app.config["SQLALCHEMY_BINDS"] = {"audit": f"sqlite:///{tmp_path / 'audit.db'}"}
    db = SQLAlchemy(app, session_options={"class_": JoiningSession})
    protection = Idempotency(
        app,
        database,
        scope=everyone,
        policy=Policy(transaction=True),
        routes=[Route("/leased", Policy())],
    )
    assert protection is not None

    class Charge(db.Model):  # type: ignore[name-defined, misc]
        __tablename__ = "charges"
        id = db.Column(db.Integer, primary_key=True)
        amount = db.Column(db.Integer, unique=True)

    class Entry(db.Model):  # type: ignore[name-defined, misc]
        __bind_key__ = "audit"
        __tablename__ = "entries"
        id = db.Column(db.Integer, primary_key=True)

    def add(amount: int) -> None:
        db.session.add(Charge(amount=amount))
        db.session.commit()

    @app.post("/charges")
    @app.post("/leased")
    def charge() -> Any:
        add(1)
        # It begins anew after the commit, and is left to the teardown.
        return {"charges": Charge.query.count()}, 201

    @app.post("/audited")
    def audited() -> Any:
        db.session.add(Entry())
        add(2)
        return "sorry", 500

    @app.post("/clashing")
    def clashing() -> Any:
        add(3)
        db.session.add(Charge(amount=3))
        try:
            db.session.commit()
        except IntegrityError:
            db.session.rollback()
        add(4)
        db.session.add(Charge(amount=5))
        db.session.flush()
        return "done", 201

    @app.post("/spawning")
    def spawning() -> Any:
        def background() -> None:
            with app.app_context():
                add(6)

        if "sqlite" not in database:
            thread = Thread(target=background)
            thread.start()
            thread.join()
        return "sorry", 500

    with app.app_context():
        db.create_all()
    yield FlaskShop(app, db, Charge, Client(app))
    with app.app_context():
        for engine in db.engines.values():
            engine.dispose()
    app.extensions["idempotency"].store.close()


def test_flask_s_session_is_rolled_back_with_the_response(flask_shop: FlaskShop) -> None:
    """And another bind's isn't: it is another database."""
    assert flask_shop.post("/audited").status_code == 500
    with flask_shop.app.app_context():
        assert flask_shop.Charge.query.count() == 0
        engine = flask_shop.db.engines["audit"]
        assert query(str(engine.url), "SELECT count(*) AS n FROM entries") == [{"n": 1}]


def test_flask_s_session_commits_and_rolls_back_what_it_always_did(
    flask_shop: FlaskShop,
) -> None:
    assert flask_shop.post("/clashing").status_code == 201
    with flask_shop.app.app_context():
        assert sorted(charge.amount for charge in flask_shop.Charge.query) == [3, 4]


@pytest.mark.parametrize("around", [False, True], ids=["none", "one"])
def test_flask_s_session_leaves_with_the_request(flask_shop: FlaskShop, around: bool) -> None:
    """An application context that is around the request has one session, before, in and after
    it; only in the request it is the transaction's."""
    with _context(flask_shop.app, around):
        assert flask_shop.post().json == {"charges": 1}
        assert flask_shop.post().headers["Idempotency-Replayed"] == "true"
        with _context(flask_shop.app, not around):
            bind = flask_shop.db.session.connection().engine
            assert bind is flask_shop.db.engine
            assert flask_shop.Charge.query.count() == 1
            flask_shop.db.session.remove()


@contextmanager
def _context(app: Flask, wanted: bool) -> Iterator[None]:
    if wanted:
        with app.app_context():
            yield
    else:
        yield


@pytest.mark.parametrize(("path", "key"), [("/charges", None), ("/leased", "k")])
def test_flask_s_session_is_its_own_without_a_transaction(
    flask_shop: FlaskShop, path: str, key: str | None
) -> None:
    assert flask_shop.post(path, key).status_code == 201
    with flask_shop.app.app_context():
        assert flask_shop.Charge.query.count() == 1


def test_a_background_thread_of_flask_s_commits_by_itself(flask_shop: FlaskShop) -> None:
    assert flask_shop.post("/spawning").status_code == 500
    with flask_shop.app.app_context():
        on_postgresql = flask_shop.db.engine.name == "postgresql"
        assert flask_shop.Charge.query.count() == int(on_postgresql)


# ---------------------------------------------------------------------- Pyramid


class Base(DeclarativeBase):
    pass


class Charge(Base):
    __tablename__ = "charges"

    id: Mapped[int] = mapped_column(primary_key=True)
    amount: Mapped[int]


@pytest.fixture
def pyramid_shop(database: str) -> Iterator[Client]:
    """Views that fail in the ways that pyramid_tm and pyramid_retry know."""
    import transaction
    import zope.sqlalchemy

    tries: list[int] = []

    def sql(request: Any) -> Session:
        keeps = "keep" in request.GET
        made = Session(current_operation.connection, join_transaction_mode="create_savepoint")
        zope.sqlalchemy.register(made, transaction_manager=request.tm, keep_session=keeps)
        return made

    def view(request: Any) -> Any:
        way = request.matchdict["way"]
        tries.append(1)
        request.sql.add(Charge(amount=len(tries)))
        request.sql.flush()
        if way == "retried" and len(tries) < 3:
            raise transaction.interfaces.TransientError
        headers = {"X-Tm": "abort"} if way == "vetoed" else {}
        status = 400 if way == "refused" else 201
        return PyramidResponse(json_body=len(tries), status=status, headers=headers)

    engine = create_engine(database)
    Base.metadata.create_all(engine)
    engine.dispose()
    settings = {
        "tm.commit_veto": "pyramid_tm.default_commit_veto",
        "tm.manager_hook": "pyramid_tm.explicit_manager",
        "retry.attempts": 3,
        "idempotency.store": database,
        "idempotency.scope": everyone,
        "idempotency.policy": Policy(transaction=True),
    }
    with Configurator(settings=settings) as config:
        for name in ("pyramid_tm", "pyramid_retry", "wsgi_idempotency.contrib.pyramid"):
            config.include(name)
        config.add_request_method(sql, "sql", reify=True)
        config.add_route("way", "/{way}")
        config.add_view(view, route_name="way")
        app = config.make_wsgi_app()
    yield Client(app)
    app.execution_policy.middleware.store.close()


@pytest.mark.parametrize(
    ("way", "status", "expected"),
    [
        ("charged", 201, [1]),
        ("charged?keep", 201, [1]),
        ("refused", 400, []),
        ("refused?keep", 400, []),
        ("vetoed", 201, []),
        ("retried", 201, [3]),
    ],
)
def test_pyramid_tm_commits_and_aborts_what_it_always_did(
    pyramid_shop: Client, database: str, way: str, status: int, expected: list[int]
) -> None:
    """Its commit releases a savepoint, its abort undoes what the view wrote, and what it tried
    in vain leaves nothing."""
    answers = [pyramid_shop.post(f"/{way}", headers={"Idempotency-Key": "k"}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [status, status]
    assert amounts(database) == expected
    stored = status == 201
    assert ("Idempotency-Replayed" in answers[1].headers) is stored
    assert (answers[0].data == answers[1].data) is stored
    assert json.loads(answers[0].data) == (3 if way == "retried" else 1)


def test_a_session_that_zope_keeps_is_not_retried_over(
    pyramid_shop: Client, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With keep_session, zope.sqlalchemy's abort rolls nothing back: the next try would be
    within what the first has left, and be undone with it."""
    failed = pyramid_shop.post("/retried?keep", headers={"Idempotency-Key": "k"})
    assert (failed.status_code, json.loads(failed.data)["code"]) == (500, "TRANSACTION_FAILED")
    assert "savepoints nest" in caplog.text
    assert amounts(database) == []


def test_the_line_of_the_page_serves_whatever_policy_a_request_is_under(tmp_path: Path) -> None:
    """One line makes all the sessions of an application, and not all its URLs need have a
    transaction."""
    page = (DOCS / "join-transactions.md").read_text()
    line = page.partition("```python\n")[2].partition("```")[0]
    url = f"sqlite:///{tmp_path}/shop.db"
    engine = create_engine(url)
    binds = []

    def app(environ: Any, start_response: Any) -> Any:
        names = {"current_operation": current_operation, "engine": engine, "Session": Session}
        exec(line, names)
        with names["session"] as session:
            binds.append(session.get_bind())
        return WerkzeugResponse("made", 201)(environ, start_response)

    policy = Policy(transaction=True)
    middleware = IdempotencyMiddleware(app, url, scope=everyone, routes=[Route("/charges", policy)])
    for path, key in (("/charges", {"Idempotency-Key": "k"}), ("/mail", {"Idempotency-Key": "k"})):
        assert Client(middleware).post(path, headers=key).status_code == 201
    assert Client(middleware).post("/charges").status_code == 201
    assert [bind is engine for bind in binds] == [False, True, True]
    engine.dispose()
