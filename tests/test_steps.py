"""The steps of an operation: each runs once, and the next attempt goes on where one ended."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from apps.shop import query
from sqlalchemy import create_engine
from werkzeug.test import Client, TestResponse
from werkzeug.wrappers import Response

from wsgi_idempotency import (
    IdempotencyMiddleware,
    MemoryStore,
    Operation,
    Policy,
    SQLStore,
    everyone,
    hold_unknown,
    steps,
)
from wsgi_idempotency.errors import (
    AnswerLost,
    ClaimLost,
    CorruptRecord,
    NotStorable,
    StepNotStorable,
    StepRefused,
    StoreUnavailable,
)
from wsgi_idempotency.records import Claimed, Step
from wsgi_idempotency.schema import upgrade
from wsgi_idempotency.stores.base import Store
from wsgi_idempotency.stores.resolving import Resolution, Resolver
from wsgi_idempotency.testing import make_claim

Handler = Callable[[Operation], Any]


class Shop:
    """A protected application whose handler a test gives, request by request."""

    def __init__(self, store: Store, policy: Policy) -> None:
        self.store = store
        self._handler: Handler
        self._client = Client(
            IdempotencyMiddleware(self._app, store, scope=everyone, policy=policy)
        )

    def _app(self, environ: Any, start_response: Any) -> Any:
        told = self._handler(environ["wsgi_idempotency.operation"])
        return Response(repr(told), 201)(environ, start_response)

    def post(self, handler: Handler) -> TestResponse:
        self._handler = handler
        return self._client.post("/pay", headers={"Idempotency-Key": "k"})


OpenShop = Callable[..., Shop]


@pytest.fixture
def pg_database(emptied_database: str) -> str:
    return emptied_database


@pytest.fixture
def open_shop(database: str) -> Iterator[OpenShop]:
    stores = []

    def open_shop(**options: Any) -> Shop:
        stores.append(SQLStore(database))
        return Shop(stores[-1], Policy(**options))

    yield open_shop
    for store in stores:
        store.close()


@pytest.fixture
def shop() -> Shop:
    return Shop(MemoryStore(), Policy())


def fails() -> Any:
    raise RuntimeError("the other system is away")


def never() -> Any:
    raise AssertionError("a step was run again")


def test_a_later_attempt_goes_on_after_the_last_step_that_was_finished(
    open_shop: OpenShop,
) -> None:
    shop = open_shop()

    def first(operation: Operation) -> None:
        operation.step("reserve", lambda: {"id": 7, "items": ("book",)})
        operation.step("charge", fails)

    def second(operation: Operation) -> Any:
        return operation.step("reserve", never), operation.step("charge", lambda: None)

    with pytest.raises(RuntimeError, match="away"):
        shop.post(first)
    assert shop.post(second).text == "({'id': 7, 'items': ['book']}, None)"
    assert shop.post(never).headers["Idempotency-Replayed"] == "true"


def test_the_first_attempt_gets_what_a_later_one_would(shop: Shop) -> None:
    """A handler that works on the result behaves the same on every attempt."""
    result = {1: ("a", "é\x00\ud800"), "x": 0.1, "big": 2**70, "no": None}
    seen: list[Any] = []

    def handler(operation: Operation) -> None:
        seen.append(operation.step("s", lambda: result))
        raise RuntimeError

    for _ in range(2):
        with pytest.raises(RuntimeError):
            shop.post(handler)
    assert seen[0] == seen[1]
    assert seen[0] == {"1": ["a", "é\x00\ud800"], "x": 0.1, "big": 2**70, "no": None}


@pytest.mark.parametrize(
    ("result", "why"),
    [
        pytest.param(object(), "not JSON .Object of type object", id="an object"),
        pytest.param(float("nan"), "not JSON .Out of range float", id="a number that JSON hasn't"),
        pytest.param({(1, 2): 3}, "not JSON .keys must be", id="a key that JSON hasn't"),
        pytest.param("x" * 99, "has 101 bytes as JSON, and max_step_bytes is 100", id="too large"),
    ],
)
def test_what_cant_be_recorded_is_an_error_that_names_the_step_and_says_that_it_has_run(
    result: object, why: str
) -> None:
    shop = Shop(MemoryStore(), Policy(max_step_bytes=100))
    with pytest.raises(
        StepNotStorable, match=rf"^step 'charge' has run, and is not recorded: .*{why}"
    ):
        shop.post(lambda operation: operation.step("charge", lambda: result))


def test_a_result_may_have_as_many_bytes_as_the_policy_allows_of_any_depth_that_json_has() -> None:
    shop = Shop(MemoryStore(), Policy(max_step_bytes=100))
    assert shop.post(lambda o: o.step("s", lambda: "x" * 98)).status_code == 201
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    deeper = Shop(MemoryStore(), Policy())
    with pytest.raises(StepNotStorable, match="not JSON"):
        deeper.post(lambda operation: operation.step("s", lambda: deep))
    while deep:
        deep = deep.pop()  # in C, to delete it would be as deep a recursion


@pytest.mark.parametrize(
    ("name", "error"),
    [
        pytest.param("", ValueError, id="empty"),
        pytest.param("x" * 201, ValueError, id="too long"),
        pytest.param("a\nb", ValueError, id="with a control character"),
        pytest.param("a\x00", ValueError, id="with NUL"),
        pytest.param("\ud800", ValueError, id="half a character"),
        pytest.param(7, TypeError, id="a number"),
    ],
)
def test_a_name_that_makes_no_sense_is_refused(shop: Shop, name: Any, error: type) -> None:
    with pytest.raises(error, match="the name of a step"):
        shop.post(lambda operation: operation.step(name, never))


def test_a_name_may_be_long_and_in_any_script(open_shop: OpenShop) -> None:
    longest = "ж" * 200
    assert open_shop().post(lambda o: o.step(longest, lambda: "done")).text == "'done'"


def test_a_name_is_for_one_step_of_an_attempt(shop: Shop) -> None:
    def handler(operation: Operation) -> None:
        operation.step("charge", lambda: 1)
        operation.step("charge", never)

    with pytest.raises(StepRefused, match="'charge' has run in this attempt already"):
        shop.post(handler)


def test_a_name_is_for_one_step_also_where_its_result_is_an_earlier_attempts(shop: Shop) -> None:
    with pytest.raises(RuntimeError):
        shop.post(lambda operation: (operation.step("charge", lambda: 1), fails()))

    def handler(operation: Operation) -> None:
        assert operation.step("charge", never) == 1
        operation.step("charge", never)

    with pytest.raises(StepRefused, match="already"):
        shop.post(handler)


def test_a_step_whose_function_has_raised_may_be_tried_again(shop: Shop) -> None:
    def handler(operation: Operation) -> Any:
        with pytest.raises(RuntimeError):
            operation.step("charge", fails)
        return operation.step("charge", lambda: "charged")

    assert shop.post(handler).text == "'charged'"


def test_a_step_that_has_run_and_is_not_recorded_is_not_run_again_in_its_attempt(
    shop: Shop,
) -> None:
    def handler(operation: Operation) -> None:
        with pytest.raises(StepNotStorable):
            operation.step("charge", object)
        operation.step("charge", never)

    with pytest.raises(StepRefused, match="already"):
        shop.post(handler)


def test_a_step_inside_a_step_is_refused(shop: Shop) -> None:
    def handler(operation: Operation) -> None:
        operation.step("outer", lambda: operation.step("inner", never))

    with pytest.raises(StepRefused, match="step 'inner' is inside step 'outer', and was not run"):
        shop.post(handler)


def test_a_step_may_be_inside_that_of_another_operation(shop: Shop) -> None:
    """An application that calls another one in the same thread."""
    other = Shop(MemoryStore(), Policy())

    def call_the_other() -> str:
        return other.post(lambda operation: operation.step("s", lambda: 1)).text

    assert shop.post(lambda operation: operation.step("s", call_the_other)).text == "'1'"


def test_steps_may_run_side_by_side_in_threads(shop: Shop) -> None:
    """Each waits for the other, so neither ends before both run."""
    meet = threading.Barrier(2, timeout=30)

    def handler(operation: Operation) -> Any:
        threads = [threading.Thread(target=operation.step, args=(name, meet.wait)) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        shop.post(handler)
    again = shop.post(lambda o: sorted([o.step("a", never), o.step("b", never)]))
    assert again.text == "[0, 1]"


def test_of_two_threads_with_one_name_one_is_refused(shop: Shop) -> None:
    begun, refused = threading.Event(), threading.Event()
    told: list[StepRefused] = []

    def slow() -> None:
        begun.set()
        assert refused.wait(30)

    def handler(operation: Operation) -> None:
        thread = threading.Thread(target=operation.step, args=("s", slow))
        thread.start()
        assert begun.wait(30)
        try:
            operation.step("s", never)
        except StepRefused as exc:
            told.append(exc)
        finally:
            refused.set()
            thread.join()

    assert shop.post(handler).status_code == 201
    assert len(told) == 1


def test_transaction_mode_has_no_steps(open_shop: OpenShop) -> None:
    with pytest.raises(StepRefused, match="in transaction mode a rollback would forget"):
        open_shop(transaction=True).post(lambda operation: operation.step("s", never))


def test_a_store_without_steps_says_so() -> None:
    class Plain:
        """A store of somebody's from before there were steps."""

        def __init__(self) -> None:
            self._memory = MemoryStore()

        def __getattr__(self, name: str) -> Any:
            if name in ("step", "record_step"):
                raise AttributeError(name)
            return getattr(self._memory, name)

    with pytest.raises(StepRefused, match="can't record steps, so 's' was not run"):
        Shop(Plain(), Policy()).post(lambda operation: operation.step("s", never))


def test_an_operation_that_has_ended_has_no_more_steps(shop: Shop) -> None:
    kept: list[Operation] = []
    shop.post(kept.append)
    with pytest.raises(StepRefused, match="its operation has ended"):
        kept[0].step("s", never)


def taken_over(operation: Operation, store: Store) -> None:
    """Another worker has the operation: this one was paused past its lease."""
    digest = operation._claim.digest
    seen = store.lookup(digest)
    assert seen is not None
    assert store.release(digest, seen.token)
    seen = store.lookup(digest)
    assert seen is not None
    assert store.take_over(make_claim(digest=digest), seen) == Claimed(operation.attempt + 1)


def test_a_worker_that_lost_its_claim_runs_no_step(open_shop: OpenShop) -> None:
    """It has not noticed yet: the store knows."""
    shop = open_shop()

    def handler(operation: Operation) -> None:
        taken_over(operation, shop.store)
        operation.step("charge", never)

    with pytest.raises(ClaimLost, match="'charge' was not run: its claim is lost"):
        shop.post(handler)


def test_a_worker_that_knows_that_it_lost_its_claim_asks_nobody(shop: Shop) -> None:
    def handler(operation: Operation) -> None:
        operation.lost = True
        operation._steps = None  # type: ignore[assignment]
        operation.step("charge", never)

    with pytest.raises(ClaimLost, match="was not run"):
        shop.post(handler)


def test_a_worker_that_lost_its_claim_during_a_step_records_nothing(open_shop: OpenShop) -> None:
    shop = open_shop()

    def handler(operation: Operation) -> None:
        operation.step("charge", lambda: taken_over(operation, shop.store))

    with pytest.raises(ClaimLost, match="'charge' has run, and is not recorded: its claim is lost"):
        shop.post(handler)
    assert query(str(shop.store.url), "SELECT * FROM idempotency_steps") == []  # type: ignore[attr-defined]


class Failing(MemoryStore):
    """A store that can't be reached for so many calls."""

    def __init__(self, failures: int, error: Exception | None = None) -> None:
        super().__init__()
        self.left = failures
        self.error = error or StoreUnavailable("the store is away")

    def record_step(self, digest: bytes, token: bytes, name: str, result: str) -> bool:
        if isinstance(self.error, AnswerLost):
            super().record_step(digest, token, name, result)
        if self.left:
            self.left -= 1
            raise self.error
        return super().record_step(digest, token, name, result)


@pytest.mark.parametrize(
    "error",
    [StoreUnavailable("the store is away"), AnswerLost("the answer was lost")],
    ids=["it can't be reached", "its answer is lost"],
)
def test_a_result_is_recorded_once_the_store_is_back(error: Exception) -> None:
    """What it stands for has happened."""
    shop = Shop(Failing(2, error), Policy())
    with pytest.raises(RuntimeError):
        shop.post(lambda operation: (operation.step("charge", lambda: "ch_1"), fails()))
    assert shop.post(lambda operation: operation.step("charge", never)).text == "'ch_1'"


def test_a_store_that_stays_away_is_waited_for_in_bounded_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(steps, "RECORD_FOR", 0.25)
    store = Failing(99)
    with pytest.raises(StoreUnavailable, match="away"):
        Shop(store, Policy()).post(lambda operation: operation.step("charge", lambda: 1))
    assert 99 - store.left == 2


def test_a_result_that_the_store_refuses_is_an_error_that_names_the_step() -> None:
    store = Failing(1, NotStorable("too large for this store"))
    with pytest.raises(StepNotStorable, match=r"'charge' has run, .*: too large for this store"):
        Shop(store, Policy()).post(lambda operation: operation.step("charge", lambda: 1))


@pytest.mark.parametrize("text", ["{", "[" * 100_000], ids=["cut off", "too deep"])
def test_a_step_whose_record_is_corrupt_is_not_run_again(open_shop: OpenShop, text: str) -> None:
    shop = open_shop()
    with pytest.raises(RuntimeError):
        shop.post(lambda operation: (operation.step("charge", lambda: 1), fails()))
    query(str(shop.store.url), f"UPDATE idempotency_steps SET result = '{text}'")  # type: ignore[attr-defined]
    with pytest.raises(CorruptRecord, match="'charge' has run in an earlier attempt"):
        shop.post(lambda operation: operation.step("charge", never))


def test_steps_stay_behind_for_nobody_where_a_row_is_deleted_by_hand(sqlite_url: str) -> None:
    """SQLite's connections cascade only where they were asked to, which sqlite3's own isn't."""
    store = SQLStore(sqlite_url)
    claim = make_claim()
    store.claim(claim)
    assert store.record_step(claim.digest, claim.token, "charge", "1")
    query(sqlite_url, "DELETE FROM idempotency_keys")
    assert len(query(sqlite_url, "SELECT * FROM idempotency_steps")) == 1
    heir = dataclasses.replace(claim, token=b"another".ljust(16))
    store.claim(heir)
    found = store.step(claim.digest, heir.token, "charge")
    assert found is not None
    assert found.result is None
    store.close()


def test_the_finished_steps_of_an_operation_can_be_listed_in_their_order(database: str) -> None:
    """For whoever has to find out what became of it; those of an earlier one don't count."""
    store = SQLStore(database)
    owner, resolver = make_claim(retention=0.0), Resolver(store)
    store.claim(owner)
    for name in ("reserve", "charge"):
        assert store.record_step(owner.digest, owner.token, name, "1")
    assert store.release(owner.digest, owner.token)
    first, second = resolver.steps(owner.digest)
    assert (first.name, second.name, first.attempt) == ("reserve", "charge", 1)
    assert first.created_at <= second.created_at <= time.time() + 60
    seen, heir = store.lookup(owner.digest), make_claim()
    assert seen is not None
    assert store.take_over(heir, seen) == Claimed(1)
    assert resolver.steps(owner.digest) == []
    assert store.record_step(heir.digest, heir.token, "charge", "2")
    assert [step.name for step in resolver.steps(owner.digest)] == ["charge"]
    store.close()


def test_a_handler_that_keeps_sqlite_locked_runs_no_step_that_cant_be_recorded(
    sqlite_url: str,
) -> None:
    """Its own session has written and not committed; what an earlier attempt has recorded it
    gets all the same."""
    store = SQLStore(sqlite_url, timeout=0.1)
    shop = Shop(store, Policy())
    engine = create_engine(sqlite_url)

    def handler(operation: Operation) -> Any:
        operation.step("first", lambda: 1)
        with engine.connect() as connection:
            connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS mine (id INTEGER)")
            connection.exec_driver_sql("INSERT INTO mine VALUES (1)")
            with pytest.raises(StoreUnavailable, match="locked"):
                operation.step("charge", never)
            connection.rollback()
            return operation.step("charge", lambda: "ch_1")

    assert shop.post(lambda operation: handler(operation)).text == "'ch_1'"
    engine.dispose()
    store.close()


@pytest.mark.parametrize("action", [Resolution.RELEASE, Resolution.FORGET])
def test_an_operator_keeps_the_steps_with_a_release_and_drops_them_with_a_forget(
    open_shop: OpenShop, action: Resolution
) -> None:
    shop = open_shop(outcomes=hold_unknown)
    with pytest.raises(RuntimeError):
        shop.post(lambda operation: (operation.step("charge", lambda: "ch_1"), fails()))
    resolver = Resolver(cast(SQLStore, shop.store))
    [held] = resolver.unresolved()
    resolver.resolve(held.digest, held.token, action, actor="ann", reason="the bank says so")
    told = shop.post(lambda o: (o.attempt, o.step("charge", lambda: "ch_2")))
    assert (
        told.text
        == {
            Resolution.RELEASE: "(2, 'ch_1')",
            Resolution.FORGET: "(1, 'ch_2')",
        }[action]
    )


@pytest.mark.parametrize("given", ["a URL", "an engine"])
def test_steps_leave_the_table_with_the_row_of_their_key(database: str, given: str) -> None:
    engine = create_engine(database)
    store = SQLStore(database if given == "a URL" else engine)
    store.check()
    for name, retention in (("forgotten", 60.0), ("purged", 0.0)):
        claim = make_claim(name, retention=retention)
        store.claim(claim)
        assert store.record_step(claim.digest, claim.token, "charge", "1")
        if name == "forgotten":
            assert store.forget(claim.digest, claim.token)
        else:
            assert store.release(claim.digest, claim.token)
            assert store.purge(10) == 1
        assert query(database, "SELECT * FROM idempotency_steps") == []
    store.close()
    engine.dispose()


def test_who_takes_over_while_a_step_is_recorded_waits_for_it_and_finds_it(
    pg_url: str,
) -> None:
    """A take-over that went by would run the step again, although its worker was told that it is
    recorded."""
    upgrade(pg_url)
    query(
        pg_url,
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN PERFORM pg_advisory_xact_lock(7); RETURN NEW; END$$",
    )
    query(
        pg_url,
        "CREATE TRIGGER wait BEFORE INSERT ON idempotency_steps"
        " FOR EACH ROW EXECUTE FUNCTION wait()",
    )
    store = SQLStore(pg_url)
    told: dict[str, Any] = {}
    owner, heir = make_claim(lease=0.0), make_claim()
    store.claim(owner)
    seen = store.lookup(owner.digest)
    assert seen is not None

    def record() -> None:
        told["recorded"] = store.record_step(owner.digest, owner.token, "charge", "1")

    def take_over() -> None:
        told["taken"] = store.take_over(heir, seen)
        told["found"] = store.step(heir.digest, heir.token, "charge")

    def waiting(count: int) -> bool:
        [row] = query(pg_url, "SELECT count(*) AS n FROM pg_locks WHERE NOT granted")
        return bool(row["n"] >= count)

    engine = create_engine(pg_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7)")
        threads = [threading.Thread(target=record), threading.Thread(target=take_over)]
        threads[0].start()
        while not waiting(1):
            assert threads[0].is_alive()
        threads[1].start()
        while threads[1].is_alive() and not waiting(2):
            pass
    for thread in threads:
        thread.join()
    assert told == {"recorded": True, "taken": Claimed(2), "found": Step("1")}
    engine.dispose()
    store.close()
