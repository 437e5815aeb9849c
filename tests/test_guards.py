"""Sessions that the application commits by itself: fenced, and marked as done."""

from __future__ import annotations

import copy
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, cast

import pytest
import sqlalchemy
from apps.shop import query
from click.testing import CliRunner, Result
from servers.commit_proxy import CommitProxy
from sqlalchemy import Column, Connection, Engine, Integer, String, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IllegalStateChangeError
from sqlalchemy.orm import DeclarativeBase, Session, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool
from werkzeug.test import Client, TestResponse
from werkzeug.wrappers import Response

from wsgi_idempotency import (
    IdempotencyMiddleware,
    MemoryStore,
    NotExecuted,
    Operation,
    Policy,
    Reconciler,
    SQLStore,
    everyone,
    hold_unknown,
    store_everything,
    store_success,
)
from wsgi_idempotency.cli import main
from wsgi_idempotency.crashing import CrashPoint, crash_at
from wsgi_idempotency.errors import ClaimLost, Disconnected, GuardRefused, StoreUnavailable
from wsgi_idempotency.lease import Heartbeat
from wsgi_idempotency.records import Claim, Claimed, Record
from wsgi_idempotency.stores.resolving import Resolver
from wsgi_idempotency.testing import make_claim


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id = Column(Integer, primary_key=True)
    what = Column(String)


Handler = Callable[[Operation, Session], Any]


class Died(BaseException):
    """Raised instead of dying."""


class Silent:
    """The heartbeat of a worker that has died."""

    def _nothing(self, *args: object) -> None: ...

    start = finishing = stop = finish_later = _nothing


def die() -> None:
    raise Died


class Shop:
    """An application that commits by itself, and what its requests come to."""

    def __init__(self, url: str, **options: Any) -> None:
        self.url = url
        self.store = SQLStore(url)
        self.store.check()
        self.engine = create_engine(url)
        Base.metadata.create_all(self.engine)
        self.handler: Handler = buy
        self.runs = 0
        self.middleware = IdempotencyMiddleware(
            self._app, self.store, scope=everyone, policy=Policy(**options)
        )

    def _app(self, environ: Any, start_response: Any) -> Any:
        self.runs += 1
        operation = environ["wsgi_idempotency.operation"]
        with Session(self.engine) as session:
            told = self.handler(operation, session)
        response = told if isinstance(told, Response) else Response(f"bought {told}", 201)
        return response(environ, start_response)

    def post(self, handler: Handler | None = None, *, app: Any = None) -> TestResponse:
        self.handler = handler or buy
        client = Client(app or self.middleware)
        return client.post("/orders", headers={"Idempotency-Key": "k"})

    def crash(self, handler: Handler | None = None) -> None:
        """A worker that dies when its handler has ended, and whose lease has run out."""
        doomed = copy.copy(self.middleware)
        doomed.heartbeat = cast(Heartbeat, Silent())
        with pytest.raises(Died):
            self.post(handler, app=crash_at(doomed, CrashPoint.BEFORE_SETTLE, die=die))
        self.lapse()

    def lapse(self) -> None:
        hour = "interval '1 hour'" if "postgres" in self.url else "3600"
        query(self.url, f"UPDATE idempotency_keys SET lease_until = lease_until - {hour}")

    def orders(self) -> list[str]:
        return [row["what"] for row in query(self.url, "SELECT what FROM orders ORDER BY id")]

    def row(self) -> dict[str, Any]:
        [row] = query(self.url, "SELECT * FROM idempotency_keys")
        return row

    def close(self) -> None:
        self.middleware.heartbeat.forget_parent()
        self.engine.dispose()
        self.store.close()


def buy(operation: Operation, session: Session) -> int:
    operation.guard(session)
    session.add(Order(what="a book"))
    session.commit()
    return operation.attempt


OpenShop = Callable[..., Shop]


@pytest.fixture
def pg_database(emptied_database: str) -> str:
    query(emptied_database, "DROP TABLE IF EXISTS orders")
    return emptied_database


def opener(url: str) -> Iterator[OpenShop]:
    shops = []

    def open_shop(**options: Any) -> Shop:
        shops.append(Shop(url, **options))
        return shops[-1]

    yield open_shop
    for shop in shops:
        shop.close()


@pytest.fixture
def open_shop(database: str) -> Iterator[OpenShop]:
    yield from opener(database)


@pytest.fixture
def on_pg(pg_database: str) -> Iterator[OpenShop]:
    yield from opener(pg_database)


def code(response: TestResponse) -> str:
    assert response.json is not None
    return str(response.json["code"])


def overtake(shop: Shop) -> None:
    """Somebody else takes the operation over, as after this worker's lease."""
    digest = bytes(shop.row()["key_digest"])
    shop.lapse()
    seen = shop.store.lookup(digest)
    assert seen is not None
    assert shop.store.take_over(make_claim(digest=digest), seen) == Claimed(2)


def hold(shop: Shop) -> None:
    """Take the claim away."""
    row = shop.row()
    assert shop.store.hold(bytes(row["key_digest"]), bytes(row["claim_token"]))


def rebuild(operation: Operation) -> Response:
    return Response(f"rebuilt for {operation.key}", 201, [("Location", "/orders/1")])


LAPSES = pytest.mark.parametrize("outcomes", [store_success, hold_unknown, store_everything])

# ---------------------------------------------------------------------- what it promises


def test_what_is_committed_under_a_guard_is_marked_and_replayed(open_shop: OpenShop) -> None:
    shop = open_shop()
    assert shop.post().text == "bought 1"
    assert shop.row()["effects_at"] is not None
    again = shop.post()
    assert (again.text, again.headers["Idempotency-Replayed"]) == ("bought 1", "true")
    assert (shop.runs, shop.orders()) == (1, ["a book"])


def test_the_writes_of_a_worker_that_lost_its_claim_are_rolled_back(open_shop: OpenShop) -> None:
    """Also if its handler doesn't hear of it, and its connection goes back to the pool."""
    shop = open_shop()

    def zombie(operation: Operation, session: Session) -> None:
        operation.guard(session)
        session.add(Order(what="a book"))
        session.flush()
        if "postgres" in shop.url:  # SQLite's file is locked by the flush
            overtake(shop)
        else:
            session.rollback()
            overtake(shop)
            session.add(Order(what="a book"))
        with pytest.raises(ClaimLost, match="what the session wrote was rolled back"):
            session.commit()

    shop.post(zombie)
    with shop.engine.begin() as connection:
        connection.execute(text("INSERT INTO orders (what) VALUES ('another')"))
    assert shop.orders() == ["another"]


@LAPSES
def test_a_crash_between_the_commit_and_the_record_never_runs_it_again(
    open_shop: OpenShop, outcomes: Any
) -> None:
    """Whatever the policy says of a lapse: what happened is known."""
    shop = open_shop(outcomes=outcomes)
    shop.crash()
    for _ in range(2):
        refused = shop.post()
        assert (refused.status_code, code(refused)) == (409, "RESPONSE_NOT_REPLAYABLE")
    assert (shop.runs, shop.orders()) == (1, ["a book"])


def test_while_its_lease_runs_its_retries_are_told_to_come_back(open_shop: OpenShop) -> None:
    shop = open_shop()
    inner: list[TestResponse] = []

    def handler(operation: Operation, session: Session) -> None:
        buy(operation, session)
        inner.append(shop.post())

    shop.post(handler)
    assert code(inner[0]) == "CONFLICT"


@LAPSES
def test_a_lost_response_is_rebuilt_recorded_and_replayed(
    open_shop: OpenShop, outcomes: Any
) -> None:
    shop = open_shop(outcomes=outcomes, rebuild=rebuild)
    shop.crash()
    first, second = shop.post(), shop.post()
    for answer in (first, second):
        assert (answer.status_code, answer.text) == (201, "rebuilt for k")
        assert answer.headers["Idempotency-Replayed"] == "true"
        assert answer.headers["Location"] == "/orders/1"
    assert (shop.runs, shop.orders()) == (1, ["a book"])
    assert (shop.row()["state"], shop.row()["attempt"]) == ("completed", 1)


def test_a_response_is_rebuilt_once_for_retries_that_come_at_once(open_shop: OpenShop) -> None:
    """One makes it, the other waits for it, and both get the same."""
    made: list[int] = []
    both = threading.Barrier(2, timeout=30)

    def numbered(operation: Operation) -> Response:
        made.append(len(made))
        return Response(f"rebuilt {len(made)}", 201)

    shop = open_shop(rebuild=numbered, wait=30)
    shop.crash()
    told: list[str] = []

    def retry() -> None:
        both.wait()
        told.append(shop.post().text)

    threads = [threading.Thread(target=retry) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == ["rebuilt 1", "rebuilt 1"]
    assert made == [0]


def fails(operation: Operation) -> Response:
    raise RuntimeError("the template is broken")


@pytest.mark.parametrize(
    "broken",
    [
        fails,
        lambda operation: Response("not now", 503),
        lambda operation: Response("who are you?", 401),
        lambda operation: Response("data: 1\n\n", mimetype="text/event-stream"),
        lambda operation: None,
    ],
    ids=["raises", "answers 503", "answers 401", "streams", "is no response"],
)
def test_a_rebuild_that_fails_is_logged_and_tried_again_with_the_next_retry(
    open_shop: OpenShop, broken: Any, caplog: pytest.LogCaptureFixture
) -> None:
    works = False
    shop = open_shop(rebuild=lambda operation: rebuild(operation) if works else broken(operation))
    shop.crash()
    failed = shop.post()
    assert (failed.status_code, code(failed)) == (500, "REBUILD_FAILED")
    assert failed.headers["X-Should-Retry"] == "true"
    assert "can't be rebuilt" in caplog.text
    assert shop.row()["state"] == "released"
    works = True
    assert shop.post().text == "rebuilt for k"
    assert shop.runs == 1


def test_a_rebuild_that_is_interrupted_is_tried_again_with_the_next_retry(
    open_shop: OpenShop,
) -> None:
    shop = open_shop(rebuild=lambda operation: die())
    shop.crash()
    with pytest.raises(Died):
        shop.post()
    assert shop.row()["state"] == "released"


def test_a_rebuilt_response_that_cant_be_replayed_is_sent_once(open_shop: OpenShop) -> None:
    shop = open_shop(rebuild=rebuild, max_response_bytes=5)
    shop.crash()
    assert shop.post().text == "rebuilt for k"
    assert code(shop.post()) == "RESPONSE_NOT_REPLAYABLE"


def test_a_rebuild_that_was_overtaken_gives_way_to_the_one_that_counts(
    open_shop: OpenShop,
) -> None:
    shop = open_shop(rebuild=lambda operation: Response("by the one that counts", 201))
    shop.crash()

    def slow(operation: Operation) -> Response:
        shop.lapse()
        other = Shop(shop.url, rebuild=rebuild)
        assert other.post().text == "rebuilt for k"
        other.close()
        return Response("too late", 201)

    late = open_shop(rebuild=slow)
    assert late.post().text == "rebuilt for k"


def test_where_no_thread_can_be_started_to_keep_a_rebuild_it_is_left_to_the_next_retry(
    open_shop: OpenShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row is not forgotten, although its attempt is the first."""
    shop = open_shop(rebuild=rebuild)
    shop.crash()

    def no_thread(*args: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(shop.middleware.heartbeat, "start", no_thread)
        with pytest.raises(RuntimeError, match="thread"):
            shop.post()
    assert shop.post().text == "rebuilt for k"


def test_a_rebuild_whose_claim_was_answered_late_is_still_a_rebuild(
    open_shop: OpenShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection broke once the take-over had taken effect: asked again, the store says
    that the row is the caller's, and the handler must not run for it."""
    shop = open_shop(rebuild=rebuild)
    shop.crash()
    take_over, asked = shop.store.take_over, list[Claimed | None]()

    def breaks(claim: Claim, seen: Record) -> Any:
        asked.append(take_over(claim, seen))
        if len(asked) == 1:
            raise Disconnected("the connection broke")
        return asked[-1]

    monkeypatch.setattr(shop.store, "take_over", breaks)
    assert shop.post().text == "rebuilt for k"
    assert asked == [Claimed(1, effects=True), None]
    assert (shop.runs, shop.orders()) == (1, ["a book"])


def test_a_key_that_is_fresh_when_a_rebuild_was_about_to_begin_is_run(
    open_shop: OpenShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was about to rebuild is gone: there is nothing a response could be made of."""
    shop = open_shop(rebuild=rebuild, lease=1)
    shop.crash()
    take_over = shop.store.take_over

    def is_paused(claim: Claim, seen: Record) -> Any:
        monkeypatch.undo()
        taken = take_over(claim, seen)
        query(shop.url, "DELETE FROM orders")
        query(shop.url, "DELETE FROM idempotency_keys")
        time.sleep(1.05)
        return taken

    monkeypatch.setattr(shop.store, "take_over", is_paused)
    assert shop.post().text == "bought 1"
    assert (shop.runs, shop.orders()) == (2, ["a book"])


def test_an_operator_is_not_asked_about_what_is_known_to_be_done(open_shop: OpenShop) -> None:
    shop = open_shop(outcomes=hold_unknown)
    shop.crash()
    resolver = Resolver(shop.store)
    assert resolver.unresolved() == []
    assert resolver.due(resolver.now() + 3600, limit=10) == []
    found = resolver.details(bytes(shop.row()["key_digest"]))
    assert found is not None
    assert (found.effects, found.held) == (True, False)


def command(shop: Shop, *arguments: str) -> Result:
    runner = CliRunner(env={"WSGI_IDEMPOTENCY_DATABASE": shop.url})
    return runner.invoke(main, [*arguments])


def holds(operation: Operation, session: Session) -> Response:
    buy(operation, session)
    operation.hold()
    return Response("somebody has to look at it", 202)


@pytest.mark.parametrize("end", ["held", "lapsed, done", "released, done"])
def test_an_operator_forgets_what_is_done_only_where_it_was_undone(
    open_shop: OpenShop, end: str
) -> None:
    """A retry would do it again."""
    shop = open_shop(rebuild=rebuild)
    if end == "lapsed, done":
        shop.crash()
    else:
        shop.post(holds if end == "held" else answers(400))
    shown = command(shop, "show", "k").output
    assert (f"{end}\n" in shown, "effects" in shown) == (True, True)
    assert json.loads(command(shop, "show", "k", "--json").output)["operation"]["effects"]
    for_the_record = "--reason", "no trace of it"
    refused = command(shop, "resolve", "k", "--forget", *for_the_record)
    assert (refused.exit_code, "Nothing was changed" in refused.output) == (1, True)
    assert "committed in the database: it was done" in refused.output
    misplaced = command(shop, "resolve", "k", "--release", "--undone", *for_the_record)
    assert "--undone belongs to --forget" in misplaced.output
    digest = bytes(shop.row()["key_digest"])
    assert Resolver(shop.store).resolutions(digest) == []
    query(shop.url, "DELETE FROM orders")
    told = command(shop, "resolve", "k", "--forget", "--undone", *for_the_record)
    assert "The key is fresh" in told.output
    assert len(Resolver(shop.store).resolutions(digest)) == 1
    assert shop.post().text == "bought 1"
    assert (shop.runs, shop.orders()) == (2, ["a book"])


def test_what_an_operator_releases_that_is_done_is_rebuilt(open_shop: OpenShop) -> None:
    shop = open_shop(rebuild=rebuild)
    shop.post(holds)
    told = command(shop, "resolve", "k", "--release", "--reason", "looked at")
    assert "It was done: its response may be rebuilt" in told.output
    assert shop.post().text == "rebuilt for k"
    assert (shop.runs, shop.orders()) == (1, ["a book"])


def test_a_verdict_that_what_is_done_was_not_is_a_failure(
    open_shop: OpenShop, caplog: pytest.LogCaptureFixture
) -> None:
    shop = open_shop()
    shop.post(holds)
    shop.lapse()
    counts = Reconciler(shop.store, lambda record: NotExecuted()).walk()
    assert dict(counts) == {"failed": 1}
    assert "can't be right: what it did is committed" in caplog.text
    assert code(shop.post()) == "OUTCOME_UNKNOWN"


def test_past_its_retention_a_lost_response_is_a_fresh_key(open_shop: OpenShop) -> None:
    """Also where a lapse is held: it is done, so it expires like what is completed."""
    shop = open_shop(outcomes=hold_unknown)
    shop.crash()
    days = "interval '2 days'" if "postgres" in shop.url else "172800"
    query(shop.url, f"UPDATE idempotency_keys SET expires_at = expires_at - {days}")
    assert shop.post().text == "bought 1"
    assert (shop.runs, shop.row()["state"]) == (2, "completed")


def test_past_its_retention_a_lost_response_is_purged(open_shop: OpenShop) -> None:
    shop = open_shop(outcomes=hold_unknown)
    shop.crash()
    days = "interval '2 days'" if "postgres" in shop.url else "172800"
    query(shop.url, f"UPDATE idempotency_keys SET expires_at = expires_at - {days}")
    assert shop.store.purge(10) == 1


def test_a_key_that_has_expired_has_no_mark_of_the_operation_before(open_shop: OpenShop) -> None:
    shop = open_shop()
    shop.post()
    days = "interval '2 days'" if "postgres" in shop.url else "172800"
    query(shop.url, f"UPDATE idempotency_keys SET expires_at = expires_at - {days}")

    def reads(operation: Operation, session: Session) -> None:
        assert shop.row()["effects_at"] is None

    assert shop.post(reads).status_code == 201


# ---------------------------------------------------------------------- how the handler ends


def raises(operation: Operation, session: Session) -> None:
    buy(operation, session)
    raise RuntimeError("after the commit")


def answers(status: int) -> Handler:
    def handler(operation: Operation, session: Session) -> Response:
        buy(operation, session)
        return Response("no", status)

    return handler


@pytest.mark.parametrize("outcomes", [store_success, hold_unknown])
@pytest.mark.parametrize(
    "handler",
    [raises, answers(500), answers(400), answers(429)],
    ids=["raises", "500", "400", "429"],
)
def test_what_has_committed_and_then_fails_is_done_at_once(
    open_shop: OpenShop, outcomes: Any, handler: Handler
) -> None:
    """Neither run again, nor forgotten, nor held until somebody finds out what is known."""
    shop = open_shop(outcomes=outcomes, rebuild=rebuild)
    if handler is raises:
        with pytest.raises(RuntimeError, match="after the commit"):
            shop.post(handler)
    else:
        assert shop.post(handler).text == "no"
    assert shop.row()["state"] == "released"
    assert shop.post().text == "rebuilt for k"
    assert (shop.runs, shop.orders()) == (1, ["a book"])


def test_what_a_handler_holds_is_held_also_where_its_effects_are_committed(
    open_shop: OpenShop,
) -> None:
    shop = open_shop(rebuild=rebuild)
    shop.post(holds)
    assert code(shop.post()) == "OUTCOME_UNKNOWN"


def test_a_stored_failure_is_replayed(open_shop: OpenShop) -> None:
    shop = open_shop(outcomes=store_everything)
    assert [shop.post(answers(500)).text, shop.post().text] == ["no", "no"]


def in_doubt(operation: Operation, session: Session) -> Response:
    """Its transaction was marked, and its COMMIT has failed: it may or may not be there."""
    operation.guard(session)
    session.add(Order(what="a book"))

    def fail(connection: Connection) -> None:
        raise OSError("the answer to COMMIT was lost")

    connection = session.connection()
    driver: Any = connection.connection.driver_connection
    event.listen(connection, "commit", fail)
    with pytest.raises(OSError, match="was lost"):
        session.commit()
    assert operation.marked
    driver.rollback()
    return Response("no", 400)


def test_what_was_marked_and_not_committed_is_settled_as_ever(open_shop: OpenShop) -> None:
    shop = open_shop()
    shop.post(in_doubt)
    assert query(shop.url, "SELECT * FROM idempotency_keys") == []
    assert shop.post().text == "bought 1"


def test_what_may_be_committed_is_not_forgotten_where_the_store_cant_say(
    open_shop: OpenShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mark is in the row, and the row stays."""
    shop = open_shop(rebuild=rebuild)

    def away(digest: bytes) -> None:
        raise StoreUnavailable("away")

    with monkeypatch.context() as patched:
        patched.setattr(shop.store, "lookup", away)
        assert shop.post(answers(400)).text == "no"
    assert shop.row()["state"] == "released"
    assert shop.post().text == "rebuilt for k"


# ---------------------------------------------------------------------- sessions


def test_a_commit_that_has_written_nothing_marks_nothing(open_shop: OpenShop) -> None:
    """A handler that has only read may fail and run again."""
    shop = open_shop()

    def reads(operation: Operation, session: Session) -> Response:
        operation.guard(session)
        session.scalars(text("SELECT 1")).all()
        session.commit()
        return Response("not now", 503)

    assert shop.post(reads).status_code == 503
    assert shop.row()["effects_at"] is None
    assert shop.post().text == "bought 2"


def test_what_is_rolled_back_marks_nothing(open_shop: OpenShop) -> None:
    shop = open_shop()

    def rolls_back(operation: Operation, session: Session) -> Response:
        operation.guard(session)
        session.add(Order(what="a book"))
        session.flush()
        session.rollback()
        return Response("not now", 503)

    assert shop.post(rolls_back).status_code == 503
    assert shop.row()["effects_at"] is None


def begins_in_time(engine: Engine) -> None:
    """sqlite3 doesn't begin a transaction for a savepoint, whose release then commits it."""
    if engine.name == "sqlite":
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))


def test_a_savepoint_is_not_yet_a_commit(open_shop: OpenShop) -> None:
    shop = open_shop()
    begins_in_time(shop.engine)

    def handler(operation: Operation, session: Session) -> Any:
        operation.guard(session)
        with session.begin_nested():
            session.add(Order(what="a book"))
        if operation.attempt == 1:
            assert not operation.marked
            return Response("not now", 503)
        session.commit()
        return operation.attempt

    assert shop.post(handler).status_code == 503
    assert shop.post(handler).text == "bought 2"
    assert shop.orders() == ["a book"]


def lose_the_claim_between_two_commits(shop: Shop, operation: Operation, session: Session) -> None:
    buy(operation, session)
    hold(shop)
    session.add(Order(what="another"))
    with pytest.raises(ClaimLost):
        session.commit()


def test_every_commit_of_a_request_is_fenced(open_shop: OpenShop) -> None:
    shop = open_shop()

    def handler(operation: Operation, session: Session) -> None:
        lose_the_claim_between_two_commits(shop, operation, session)

    shop.post(handler)
    assert shop.orders() == ["a book"]


def test_what_is_added_while_it_is_committed_is_fenced_too(open_shop: OpenShop) -> None:
    """By a listener that comes after the guard's."""
    shop = open_shop()

    def handler(operation: Operation, session: Session) -> None:
        operation.guard(session)
        session.scalars(text("SELECT 1")).all()
        event.listen(session, "before_commit", lambda session: session.add(Order(what="late")))
        session.commit()

    shop.post(handler)
    assert shop.orders() == ["late"]
    assert shop.row()["effects_at"] is not None


def test_a_session_can_be_guarded_in_the_middle_of_its_transaction(open_shop: OpenShop) -> None:
    shop = open_shop()

    def handler(operation: Operation, session: Session) -> None:
        session.add(Order(what="a book"))
        session.flush()
        operation.guard(session)
        session.commit()

    shop.post(handler)
    assert shop.row()["effects_at"] is not None


def test_a_scoped_session_serves_the_next_request_unguarded(open_shop: OpenShop) -> None:
    """What watched it for one operation is gone with it."""
    shop = open_shop()
    scoped = scoped_session(sessionmaker(shop.engine))

    def handler(operation: Operation, _: Session) -> int:
        operation.guard(scoped)
        scoped.add(Order(what="a book"))
        scoped.commit()
        return operation.attempt

    shop.post(handler)
    query(shop.url, "DELETE FROM idempotency_keys")
    scoped.add(Order(what="by a request without a key"))
    scoped.commit()
    shop.post(handler)
    scoped.remove()
    assert shop.orders() == ["a book", "by a request without a key", "a book"]


@pytest.mark.parametrize("moment", ["before it begins", "in its middle"])
def test_a_connection_can_be_guarded(open_shop: OpenShop, moment: str) -> None:
    shop = open_shop()

    def handler(operation: Operation, _: Session) -> None:
        with shop.engine.connect() as connection:
            if moment == "before it begins":
                operation.guard(connection)
            connection.execute(text("INSERT INTO orders (what) VALUES ('a book')"))
            operation.guard(connection)
            connection.commit()

    shop.post(handler)
    assert shop.orders() == ["a book"]
    assert shop.row()["effects_at"] is not None


def test_a_session_on_a_connection_with_a_transaction_of_its_own_is_marked_with_that(
    open_shop: OpenShop,
) -> None:
    """The session's commit is not the database's."""
    shop = open_shop()
    begins_in_time(shop.engine)

    def handler(operation: Operation, _: Session) -> Any:
        with shop.engine.connect() as connection:
            outer = connection.begin()
            with Session(connection, join_transaction_mode="create_savepoint") as session:
                operation.guard(session)
                session.add(Order(what="a book"))
                session.commit()
                assert not operation.marked
            if operation.attempt == 1:
                outer.rollback()
                return Response("not now", 503)
            outer.commit()
            assert operation.marked
        return operation.attempt

    assert shop.post(handler).status_code == 503
    assert shop.post(handler).text == "bought 2"


def test_a_session_of_another_database_is_refused_with_what_would_be_right(
    open_shop: OpenShop, tmp_path: Any
) -> None:
    shop = open_shop()
    other = create_engine(f"sqlite:///{tmp_path / 'other.db'}")
    Base.metadata.create_all(other)

    def handler(operation: Operation, _: Session) -> None:
        with Session(other) as session:
            operation.guard(session)
            session.add(Order(what="a book"))
            with pytest.raises(GuardRefused, match="Guard a session on the database and schema of"):
                session.commit()

    shop.post(handler)
    assert query(str(other.url), "SELECT * FROM orders") == []
    other.dispose()


def test_a_session_of_another_database_that_has_keys_too_is_refused(
    open_shop: OpenShop, tmp_path: Any
) -> None:
    """Which it isn't because somebody else has the operation."""
    shop = open_shop()
    other = Shop(f"sqlite:///{tmp_path / 'other.db'}")

    def handler(operation: Operation, _: Session) -> None:
        with Session(other.engine) as session, pytest.raises(GuardRefused, match="not where"):
            buy(operation, session)

    shop.post(handler)
    assert other.orders() == []
    other.close()


def test_what_else_the_database_says_comes_out_as_it_is(on_pg: OpenShop) -> None:
    """And everything is rolled back."""
    shop = on_pg()

    def handler(operation: Operation, session: Session) -> None:
        operation.guard(session)
        session.add(Order(what="a book"))
        session.execute(text("SET LOCAL lock_timeout = '10ms'"))
        with shop.engine.begin() as other:
            other.execute(text("SELECT 1 FROM idempotency_keys FOR UPDATE"))
            with pytest.raises(DBAPIError, match="lock timeout"):
                session.commit()

    shop.post(handler)
    assert shop.orders() == []


def test_a_connection_in_autocommit_is_refused(open_shop: OpenShop) -> None:
    shop = open_shop()
    engine = create_engine(shop.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)

    def handler(operation: Operation, _: Session) -> None:
        with Session(engine) as session, pytest.raises(GuardRefused, match="in autocommit"):
            buy(operation, session)

    shop.post(handler)


SINCE_3_12 = pytest.mark.skipif(
    sys.version_info < (3, 12), reason="sqlite3 has autocommit since Python 3.12"
)


@SINCE_3_12
def test_sqlite3_s_own_autocommit_is_refused_too(sqlite_url: str) -> None:
    """Its commit() does nothing, and so there would be no moment to mark anything in."""
    shop = Shop(sqlite_url)
    engine = create_engine(shop.url, connect_args={"autocommit": True}, poolclass=NullPool)

    def handler(operation: Operation, _: Session) -> None:
        with Session(engine) as session, pytest.raises(GuardRefused, match="in autocommit"):
            buy(operation, session)

    shop.post(handler)
    shop.close()


@SINCE_3_12
def test_a_connection_whose_transaction_is_always_open_is_fenced_and_marked(
    sqlite_url: str,
) -> None:
    """autocommit=False of sqlite3."""
    shop = Shop(sqlite_url)
    engine = create_engine(shop.url, connect_args={"autocommit": False}, poolclass=NullPool)

    def handler(operation: Operation, _: Session) -> None:
        with Session(engine) as session:
            lose_the_claim_between_two_commits(shop, operation, session)

    shop.post(handler)
    assert shop.orders() == ["a book"]
    assert shop.row()["effects_at"] is not None
    shop.close()


@pytest.mark.parametrize("default", [True, False], ids=["and a default one", "and no default one"])
def test_a_session_can_be_guarded_in_a_transaction_of_any_of_its_binds(
    open_shop: OpenShop, default: bool
) -> None:
    shop = open_shop()
    other = create_engine(shop.url)

    def handler(operation: Operation, _: Session) -> None:
        with Session(shop.engine if default else None, binds={Order: other}) as session:
            session.add(Order(what="a book"))
            session.flush()
            with session.begin_nested():
                operation.guard(session)
            session.commit()

    shop.post(handler)
    assert shop.orders() == ["a book"]
    assert shop.row()["effects_at"] is not None
    other.dispose()


def test_a_transaction_whose_connection_is_lost_is_not_given_back_to_the_pool(
    on_pg: OpenShop,
) -> None:
    shop = on_pg()

    def handler(operation: Operation, session: Session) -> None:
        operation.guard(session)
        session.add(Order(what="a book"))
        session.flush()
        driver: Any = session.connection().connection.driver_connection
        driver.close()
        with pytest.raises(DBAPIError):
            session.commit()

    shop.post(handler)
    assert shop.orders() == []
    assert shop.post().headers["Idempotency-Replayed"]


@pytest.mark.parametrize("way", ["Session", "Connection"])
@pytest.mark.parametrize(("cut", "runs"), [("after", "rebuilt for k"), ("before", "bought 2")])
def test_a_transaction_whose_commit_was_not_heard_of_is_not_committed_twice(
    on_pg: OpenShop, cut: Any, runs: str, way: str
) -> None:
    """An application that tries its transaction again after a lost connection can't know
    whether the first has taken effect. The row knows."""
    shop = on_pg(rebuild=rebuild)
    address = make_url(shop.url)
    assert address.host is not None
    assert address.port is not None

    def commits(operation: Operation, engine: Engine) -> None:
        with Session(engine) if way == "Session" else engine.connect() as target:
            operation.guard(target)
            target.execute(text("INSERT INTO orders (what) VALUES ('a book')"))
            target.commit()

    def tries_twice(operation: Operation, session: Session) -> str:
        with CommitProxy((address.host or "", address.port or 0), cut) as proxy:
            host, port = proxy.address
            engine = create_engine(address.set(host=host, port=port))
            with pytest.raises(DBAPIError):
                commits(operation, engine)
            try:
                commits(operation, engine)
            finally:
                engine.dispose()
        return "2"

    if cut == "after":
        with pytest.raises(GuardRefused, match="whose COMMIT was not heard of"):
            shop.post(tries_twice)
        assert shop.post().text == runs
    else:
        assert shop.post(tries_twice).text == runs
    assert (shop.runs, shop.orders()) == (1, ["a book"])


def test_a_commit_that_was_not_heard_of_is_not_forgotten_for_one_that_has_only_read(
    on_pg: OpenShop,
) -> None:
    shop = on_pg(rebuild=rebuild)
    address = make_url(shop.url)

    def reads_in_between(operation: Operation, _: Session) -> None:
        with CommitProxy((address.host or "", address.port or 0), "after") as proxy:
            host, port = proxy.address
            engine = create_engine(address.set(host=host, port=port))
            try:
                with Session(engine) as session:
                    with pytest.raises(DBAPIError):
                        buy(operation, session)
                    session.rollback()
                    session.scalar(text("SELECT 1"))
                    session.commit()
                    session.add(Order(what="a book"))
                    session.commit()
            finally:
                engine.dispose()

    with pytest.raises(GuardRefused, match="whose COMMIT was not heard of"):
        shop.post(reads_in_between)
    assert shop.orders() == ["a book"]


def test_a_connection_that_breaks_after_a_commit_leaves_no_doubt_about_it(
    on_pg: OpenShop,
) -> None:
    shop = on_pg()

    def handler(operation: Operation, session: Session) -> str:
        operation.guard(session)
        session.add(Order(what="a book"))
        session.commit()
        pid = session.scalar(text("SELECT pg_backend_pid()"))
        query(shop.url, f"SELECT pg_terminate_backend({pid})")
        with pytest.raises(DBAPIError):
            session.scalar(text("SELECT 1"))
        session.rollback()
        session.add(Order(what="another"))
        session.commit()
        return "both"

    assert shop.post(handler).text == "bought both"
    assert shop.orders() == ["a book", "another"]


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_snapshot_from_before_the_take_over_is_no_way_around_the_fence(
    on_pg: OpenShop, level: str
) -> None:
    shop = on_pg()
    engine = shop.engine.execution_options(isolation_level=level)

    def zombie(operation: Operation, _: Session) -> None:
        with Session(engine) as session:
            operation.guard(session)
            session.add(Order(what="a book"))
            session.flush()
            overtake(shop)
            with pytest.raises(DBAPIError, match="could not serialize"):
                session.commit()

    shop.post(zombie)
    assert shop.orders() == []


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_guard_works_at_every_isolation_level(on_pg: OpenShop, level: str) -> None:
    shop = on_pg(rebuild=rebuild)
    shop.engine = shop.engine.execution_options(isolation_level=level)
    shop.crash()
    assert shop.post().text == "rebuilt for k"
    assert shop.orders() == ["a book"]


#: Before 2.0.51 SQLAlchemy's session fails on what it is told while it prepares.
FENCED = (
    ClaimLost
    if tuple(map(int, sqlalchemy.__version__.split(".")[:3])) >= (2, 0, 51)
    else IllegalStateChangeError
)


@pytest.mark.parametrize("overtaken", [False, True], ids=["its own", "somebody else's"])
def test_a_transaction_in_two_phases_is_fenced_and_marked_when_it_is_prepared(
    on_pg: OpenShop, overtaken: bool
) -> None:
    shop = on_pg()
    [setting] = query(shop.url, "SHOW max_prepared_transactions")
    if setting["max_prepared_transactions"] == "0":
        pytest.skip("this server prepares no transactions")

    def handler(operation: Operation, _: Session) -> None:
        with Session(shop.engine, twophase=True) as session:
            operation.guard(session)
            session.add(Order(what="a book"))
            session.flush()
            if overtaken:
                overtake(shop)
                with pytest.raises(FENCED):
                    session.commit()
            else:
                session.commit()

    shop.post(handler)
    assert shop.orders() == ([] if overtaken else ["a book"])
    assert query(shop.url, "SELECT * FROM pg_prepared_xacts") == []
    assert (shop.row()["effects_at"] is None) is overtaken


# ---------------------------------------------------------------------- while COMMIT takes long


class SlowCommit:
    """A transaction that is marked, and whose COMMIT has not come.

    :param before: called before it is marked.
    """

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        self._before = before
        self.reached, self.goes_on = threading.Event(), threading.Event()

    @contextmanager
    def under(self, send: Callable[[Handler], object]) -> Iterator[SlowCommit]:
        """While it is sent. Whatever becomes of the test, its COMMIT comes then: the next test
        would wait for its locks."""
        with ThreadPoolExecutor(1) as pool:
            sent = pool.submit(send, self)
            try:
                assert self.reached.wait(30)
                yield self
            finally:
                self.goes_on.set()
            sent.result()

    def __call__(self, operation: Operation, session: Session) -> int:
        self._before()
        operation.guard(session)
        session.add(Order(what="a book"))
        event.listen(session.connection(), "commit", self._wait)
        session.commit()
        return operation.attempt

    def _wait(self, connection: Connection) -> None:
        self.reached.set()
        assert self.goes_on.wait(30)


def test_who_takes_over_during_a_commit_waits_for_it_and_finds_it_done(on_pg: OpenShop) -> None:
    """Its lease has run out, and its row is locked: the take-over looks at the row again."""
    shop = on_pg()
    with ThreadPoolExecutor(1) as pool, SlowCommit(shop.lapse).under(shop.crash) as commit:
        digest = bytes(shop.row()["key_digest"])
        seen = shop.store.lookup(digest)
        assert seen is not None
        retry = pool.submit(shop.store.take_over, make_claim(digest=digest), seen)
        while not query(shop.url, "SELECT 1 FROM pg_locks WHERE NOT granted"):
            assert not retry.done()
        commit.goes_on.set()
        assert retry.result() is None
    assert code(shop.post()) == "RESPONSE_NOT_REPLAYABLE"
    assert shop.orders() == ["a book"]


def test_leases_are_renewed_while_a_transaction_has_a_row_locked(on_pg: OpenShop) -> None:
    """The others', at once; the one whose row is locked counts as held."""
    shop = on_pg()
    other = make_claim("another key")
    shop.store.claim(other)
    with SlowCommit().under(shop.post):
        query(shop.url, "UPDATE idempotency_keys SET lease_until = now() WHERE path = '/charges'")
        [row] = query(shop.url, "SELECT * FROM idempotency_keys WHERE path = '/orders'")
        mine = bytes(row["key_digest"]), bytes(row["claim_token"]), 60.0
        renewed = shop.store.renew([mine, (other.digest, other.token, 60.0)])
        assert renewed == {mine[1], other.token}
        found = shop.store.lookup(other.digest)
        assert found is not None
        assert not found.lapsed
    assert shop.orders() == ["a book"]


# ---------------------------------------------------------------------- what can't be guarded


def refused(shop: Any, target: Any = None) -> str:
    told: list[str] = []

    def handler(operation: Operation, session: Session) -> None:
        with pytest.raises(GuardRefused) as refusal:
            operation.guard(session if target is None else target)
        told.append(str(refusal.value))

    shop.post(handler)
    return told[0]


def test_an_engine_is_no_session(open_shop: OpenShop) -> None:
    shop = open_shop()
    assert "use a Session or a Connection" in refused(shop, shop.engine)


def test_transaction_mode_needs_no_guard(open_shop: OpenShop) -> None:
    assert "transaction=True, which fences and commits" in refused(open_shop(transaction=True))


def test_a_store_without_a_database_guards_nothing(sqlite_url: str) -> None:
    shop = Shop(sqlite_url)
    shop.middleware = IdempotencyMiddleware(shop._app, MemoryStore(), scope=everyone)
    assert "use PostgreSQL or SQLite" in refused(shop)
    shop.close()


def test_an_operation_that_has_ended_guards_nothing(open_shop: OpenShop) -> None:
    shop = open_shop()
    kept: list[Operation] = []
    shop.post(lambda operation, session: kept.append(operation))
    with Session(shop.engine) as session, pytest.raises(GuardRefused, match="has ended"):
        kept[0].guard(session)


def test_a_transaction_that_outlives_its_operation_is_not_fenced_any_more(
    open_shop: OpenShop,
) -> None:
    """Its response is recorded: it is not an effect of the operation."""
    shop = open_shop()
    left: list[Session] = []

    def handler(operation: Operation, _: Session) -> None:
        left.append(Session(shop.engine))
        operation.guard(left[0])
        left[0].add(Order(what="a book"))
        left[0].flush() if "postgres" in shop.url else None

    shop.post(handler)
    operation_row = shop.row()
    left[0].commit()
    left[0].close()
    assert shop.orders() == ["a book"]
    assert shop.row() == operation_row


def test_a_guard_can_be_removed_twice_and_watches_nothing_afterwards(open_shop: OpenShop) -> None:
    shop = open_shop()

    def handler(operation: Operation, session: Session) -> None:
        operation.guard(session)
        guard: Any = operation._guards[0]
        guard.remove()
        guard.remove()
        guard._watch(session.connection())
        guard._commits(session.connection())
        session.add(Order(what="a book"))
        session.commit()

    shop.post(handler)
    assert shop.row()["effects_at"] is None
