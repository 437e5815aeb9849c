"""The reconciler: what becomes of operations whose worker never said."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from apps.gate import Gate
from apps.shop import query
from servers import ended
from servers.http import TESTS
from sqlalchemy import create_engine
from sqlalchemy.engine import make_url
from unresolved import OVER, age_rows, held, lapsed

from wsgi_idempotency import (
    Completed,
    MemoryStore,
    NotExecuted,
    Reconciler,
    SQLStore,
    StillUnknown,
)
from wsgi_idempotency import reconciler as reconciler_module
from wsgi_idempotency.errors import ConfigurationError, StoreUnavailable
from wsgi_idempotency.reconciler import backoff
from wsgi_idempotency.records import (
    Claim,
    Claimed,
    Completion,
    Lapse,
    Record,
    State,
    StoredResponse,
)
from wsgi_idempotency.stores.resolving import Details, Resolution, Resolver
from wsgi_idempotency.testing import make_claim, until

COMMAND = Path(sys.executable).with_name("wsgi-idempotency")

RESPONSE = StoredResponse("201 Made It", (("Location", "/1"), ("Date", "today")), b"\x00made")
DONE = Completion("200 OK", (), b"by its worker")


Arrange = Callable[..., Claim]


def lapsed_to_hold(store: SQLStore, name: str = "a key", **changes: Any) -> Claim:
    return lapsed(store, name, lapse=Lapse.HOLD, **changes)


def held_and_due(store: SQLStore, name: str = "a key", **changes: Any) -> Claim:
    return held(store, name, lease=OVER, **changes)


HELD: dict[str, Arrange] = {"held": held_and_due, "lapsed where a lapse holds": lapsed_to_hold}
DUE = HELD | {"lapsed where a lapse releases": lapsed}
each_due = pytest.mark.parametrize("arrange", DUE.values(), ids=list(DUE))
each_held = pytest.mark.parametrize("arrange", HELD.values(), ids=list(HELD))


def row(store: SQLStore, claim: Claim) -> Record:
    found = store.lookup(claim.digest)
    assert found is not None
    return found


def details(store: SQLStore, claim: Claim) -> Details:
    found = Resolver(store).details(claim.digest)
    assert found is not None
    return found


def walk(store: SQLStore, answer: Any, **options: Any) -> Counter[str]:
    """One walk with a verdict that has one answer."""
    return Reconciler(store, lambda record: answer, **options).walk()


def come_due(url: str) -> None:
    """Let every look that was put off be due."""
    query(url, "UPDATE idempotency_keys SET lease_until = created_at")


# ---------------------------------------------------------------------- verdicts


@each_due
def test_what_was_done_is_replayed(store: SQLStore, arrange: Arrange) -> None:
    """Less what is never replayed, and its worker is fenced off."""
    claim = arrange(store)
    assert walk(store, Completed(RESPONSE, "receipt 7")) == {"completed": 1}
    record = row(store, claim)
    assert (record.state, record.status, record.body) == (
        State.COMPLETED, RESPONSE.status, RESPONSE.body,
    )  # fmt: skip
    assert record.headers == (("Location", "/1"),)
    assert record.attempt == 1
    assert store.complete(claim.digest, claim.token, DONE) is False
    [made] = Resolver(store).resolutions(claim.digest)
    assert (made.action, made.reason) == (Resolution.COMPLETE, "receipt 7")
    assert made.actor == f"reconciler@{socket.gethostname()}"


@each_due
@pytest.mark.parametrize(
    "answer", [NotExecuted, NotExecuted("no trace")], ids=["bare", "with a reason"]
)
def test_what_was_not_done_is_a_fresh_key(store: SQLStore, arrange: Arrange, answer: Any) -> None:
    claim = arrange(store)
    assert walk(store, answer, actor="the night shift") == {"not executed": 1}
    assert store.lookup(claim.digest) is None
    assert store.claim(make_claim(fingerprint=b"corrected")) == Claimed(1)
    [made] = Resolver(store).resolutions(claim.digest)
    assert (made.action, made.actor) == (Resolution.FORGET, "the night shift")
    assert made.reason in ("no trace", "it was found not to have been done")


@each_held
@pytest.mark.parametrize(
    "answer", [StillUnknown, StillUnknown("too early")], ids=["bare", "with a reason"]
)
def test_what_is_still_unknown_stays_held_and_is_asked_about_later(
    database: str, store: SQLStore, arrange: Arrange, answer: Any
) -> None:
    """After half its age. Its worker may still complete it meanwhile."""
    claim = arrange(store)
    age_rows(database, 1000)
    assert walk(store, answer) == {"still unknown": 1}
    assert walk(store, NotExecuted) == {}, "it isn't due yet"
    record = row(store, claim)
    assert (record.state, record.token) == (State.HELD, claim.token)
    assert 400 < record.lease_left <= 520
    assert Resolver(store).resolutions(claim.digest) == []
    assert store.complete(claim.digest, claim.token, DONE) is True
    come_due(database)
    assert walk(store, NotExecuted) == {}, "it is completed"


def test_what_a_lapse_releases_and_nobody_knows_is_for_the_next_retry_to_run(
    store: SQLStore,
) -> None:
    """As the policy says. The reconciler's look was no attempt."""
    claim = lapsed(store)
    assert walk(store, StillUnknown) == {"still unknown": 1}
    record = row(store, claim)
    assert (record.state, record.attempt) == (State.RELEASED, 1)
    assert record.fingerprint == claim.fingerprint
    assert walk(store, NotExecuted) == {}, "there is nothing unknown about it any more"
    assert store.take_over(make_claim(), record) == Claimed(2)


@pytest.mark.parametrize(
    ("age", "seconds"),
    [(0, 10), (19, 10), (21, 10.5), (3600, 1800), (7199, 3599.5), (86400, 3600)],
    ids=lambda value: f"{value} s",
)
def test_a_look_is_put_off_by_half_the_age_within_bounds(age: float, seconds: float) -> None:
    assert backoff(age) == seconds


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        (lambda record: 1 / 0, "division by zero"),
        (lambda record: None, "the verdict returned None; return Completed(response)"),
        (lambda record: Completed, "the verdict returned <class"),
        (lambda record: True, "the verdict returned True"),
        (lambda record: NotExecuted(7), "the verdict's reason is 7"),
        (lambda record: Completed(None), "is not a StoredResponse"),
        (lambda record: Completed(replace(RESPONSE, headers=None)), "not iterable"),
        (lambda record: Completed(replace(RESPONSE, status="Made")), "not valid HTTP"),
        (lambda record: Completed(replace(RESPONSE, body=b"x" * 101)), "more than the 100"),
    ],
    ids=["raises", "has no answer", "returns a class that needs a response", "returns a bool",
         "has no reason", "has no response", "has no headers", "has no status line",
         "has too large a body"],
)  # fmt: skip
@each_due
def test_a_verdict_that_fails_is_logged_and_leaves_the_outcome_unknown(
    store: SQLStore,
    caplog: pytest.LogCaptureFixture,
    arrange: Arrange,
    verdict: Any,
    said: str,
) -> None:
    """And the walk goes on."""
    first, second = arrange(store, "first"), arrange(store, "second")
    counts = Reconciler(store, verdict, max_response_bytes=100).walk()
    assert counts == {"failed": 2}
    expected = State.RELEASED if arrange is lapsed else State.HELD
    assert [row(store, claim).state for claim in (first, second)] == [expected, expected]
    assert caplog.text.count("it is unknown still") == 2
    assert said in caplog.text
    assert first.digest.hex() in caplog.text


def test_a_response_that_the_database_refuses_leaves_the_outcome_unknown(
    pg_database: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = SQLStore(pg_database)
    claim = held_and_due(store)
    query(
        pg_database,
        "CREATE FUNCTION too_big() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN IF NEW.state = 'completed' THEN RAISE 'too big' USING ERRCODE = '54000';"
        " END IF; RETURN NEW; END $$;"
        "CREATE TRIGGER too_big BEFORE UPDATE ON idempotency_keys"
        " FOR EACH ROW EXECUTE FUNCTION too_big()",
    )
    try:
        assert walk(store, Completed(RESPONSE)) == {"failed": 1}
    finally:
        query(pg_database, "DROP FUNCTION too_big() CASCADE")
    assert "can't be recorded" in caplog.text
    record = row(store, claim)
    assert (record.state, record.token) == (State.HELD, claim.token)
    assert record.lease_left < 60, "it is put off"
    store.close()


def test_a_row_that_makes_no_sense_does_not_stop_the_walk(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = SQLStore(sqlite_url)
    held_and_due(store, "lost")
    held_and_due(store, "sound")
    with sqlite3.connect(make_url(sqlite_url).database or "") as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute(
            "UPDATE idempotency_keys SET lapse = 'lost' WHERE idempotency_key = 'lost'"
        )
    connection.close()
    assert walk(store, NotExecuted) == {"failed": 1, "not executed": 1}
    assert "makes no sense" in caplog.text
    store.close()


# ---------------------------------------------------------------------- what a verdict sees


@each_due
def test_a_verdict_sees_all_that_a_person_would(
    database: str, store: SQLStore, arrange: Arrange
) -> None:
    claim = arrange(store, scope="bob", key="k-1", method="PATCH", path="/pay")
    age_rows(database, 500)
    seen: list[Details] = []

    def verdict(record: Details) -> type[StillUnknown]:
        seen.append(record)
        return StillUnknown

    Reconciler(store, verdict).walk()
    [record] = seen
    assert (record.scope, record.key) == ("bob", "k-1")
    assert (record.method, record.path) == ("PATCH", "/pay")
    assert (record.digest, record.attempt) == (claim.digest, 1)
    assert 500 <= record.age < 560
    expected = State.CLAIMED if arrange is lapsed else State.HELD
    assert record.state is expected
    with pytest.raises(AttributeError):
        record.attempt = 2  # type: ignore[misc]


def test_only_what_is_due_is_judged(store: SQLStore) -> None:
    """Nothing in flight, released, completed, absent, or put off."""
    due = {arrange(store, name).key for name, arrange in DUE.items()}
    held(store, "held by a worker a moment ago")
    lapsed(store, "absent", retention=OVER)
    for name, ending in (
        ("in flight", None),
        ("released", SQLStore.release),
    ):
        claim = make_claim(name)
        store.claim(claim)
        if ending is not None:
            ending(store, claim.digest, claim.token)
    done = make_claim("done", lease=OVER)
    store.claim(done)
    store.complete(done.digest, done.token, DONE)
    asked: list[str] = []
    Reconciler(store, lambda record: asked.append(record.key) or StillUnknown).walk()
    assert sorted(asked) == sorted(due)


def test_no_lock_and_no_transaction_is_held_while_the_verdict_thinks(pg_database: str) -> None:
    store = SQLStore(pg_database)
    held_and_due(store)
    seen: list[Any] = []

    def verdict(record: Details) -> type[NotExecuted]:
        seen.extend(
            query(
                pg_database,
                "SELECT state FROM pg_stat_activity WHERE datname = current_database()"
                " AND pid <> pg_backend_pid() AND xact_start IS NOT NULL",
            )
        )
        query(pg_database, "SELECT FROM idempotency_keys FOR UPDATE NOWAIT")
        return NotExecuted

    assert Reconciler(store, verdict).walk() == {"not executed": 1}
    assert seen == []
    store.close()


# ---------------------------------------------------------------------- overtaken


@each_held
@pytest.mark.parametrize(
    "answer", [Completed(RESPONSE), NotExecuted, StillUnknown], ids=["done", "not done", "unknown"]
)
def test_a_slow_worker_may_complete_while_the_verdict_thinks(
    store: SQLStore, arrange: Arrange, answer: Any
) -> None:
    """Its own word counts, and nothing is on record."""
    claim = arrange(store)

    def verdict(record: Details) -> Any:
        assert store.complete(claim.digest, claim.token, DONE) is True
        return answer

    assert Reconciler(store, verdict).walk() == {"overtaken": 1}
    assert row(store, claim).body == DONE.body
    assert Resolver(store).resolutions(claim.digest) == []


@pytest.mark.parametrize(
    "answer", [Completed(RESPONSE), NotExecuted, StillUnknown], ids=["done", "not done", "unknown"]
)
def test_a_verdict_that_takes_too_long_is_overtaken_by_a_retry(
    store: SQLStore, answer: Any
) -> None:
    """Where a lapse releases: the retry's attempt is the one that counts."""
    claim, heir = lapsed(store), make_claim()

    def verdict(record: Details) -> Any:
        assert store.take_over(heir, row(store, claim)) is None, "not within its patience"
        store.renew([(record.digest, record.token, OVER)])  # as if time had passed
        assert store.take_over(heir, row(store, claim)) == Claimed(2)
        return answer

    assert Reconciler(store, verdict, patience=1).walk() == {"overtaken": 1}
    assert row(store, claim).token == heir.token
    assert store.complete(heir.digest, heir.token, DONE) is True
    assert Resolver(store).resolutions(claim.digest) == []


def test_a_verdict_that_takes_too_long_counts_where_nobody_was_faster(store: SQLStore) -> None:
    claim = lapsed(store)

    def verdict(record: Details) -> Completed:
        store.renew([(record.digest, record.token, OVER)])  # as if time had passed
        return Completed(RESPONSE)

    assert Reconciler(store, verdict).walk() == {"completed": 1}
    assert row(store, claim).body == RESPONSE.body


@each_due
def test_a_person_who_resolves_while_the_verdict_thinks_is_heard(
    store: SQLStore, arrange: Arrange
) -> None:
    """What a lapse releases is in flight meanwhile, so that they can't."""
    claim = arrange(store)
    resolver = Resolver(store)

    def verdict(record: Details) -> type[NotExecuted]:
        resolver.resolve(
            claim.digest, record.token, Resolution.COMPLETE, actor="ann", reason="I know",
            response=RESPONSE, mine=record.state is State.CLAIMED,
        )  # fmt: skip
        return NotExecuted

    assert Reconciler(store, verdict).walk() == {"overtaken": 1}
    assert row(store, claim).body == RESPONSE.body
    assert [made.actor for made in resolver.resolutions(claim.digest)] == ["ann"]


# ---------------------------------------------------------------------- walks


@each_due
def test_what_comes_due_after_the_walk_has_begun_is_left_for_the_next(
    store: SQLStore, arrange: Arrange
) -> None:
    """A walk ends. The moment it began is the cutoff, for whoever finds and for whoever takes."""
    resolver = Resolver(store)
    began = resolver.now()
    until(lambda: resolver.now() > began)
    claim = arrange(store)
    until(lambda: resolver.now() > details(store, claim).lease_until)
    assert resolver.due(began, limit=10) == []
    assert resolver.take_up(claim.digest, cutoff=began, seconds=60) is None
    next_walk = resolver.now()
    assert resolver.due(next_walk, limit=10) == [claim.digest]
    assert resolver.take_up(claim.digest, cutoff=next_walk, seconds=60) is not None
    assert resolver.due(resolver.now(), limit=10) == [], "somebody is looking into it"
    assert resolver.take_up(claim.digest, cutoff=resolver.now(), seconds=60) is None


def test_each_operation_is_judged_once_a_walk_however_soon_it_is_due_again(
    database: str, store: SQLStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A walk ends, also where verdicts take longer than looks are put off."""
    monkeypatch.setattr(reconciler_module, "_PAGE", 2)
    # The least by which SQLite's clock, in milliseconds, is past the walk's beginning.
    monkeypatch.setattr(reconciler_module, "backoff", lambda age: 0.002)
    for number in range(3):
        held_and_due(store, f"key {number}")
    stop = threading.Event()
    asked = Counter[str]()

    def verdict(record: Details) -> type[StillUnknown]:
        asked[record.key] += 1
        if asked[record.key] > 2:
            stop.set()
        return StillUnknown

    reconciler = Reconciler(store, verdict)
    for times in (1, 2):
        reconciler.walk(stop=stop)
        assert sorted(asked.values()) == [times] * 3
        come_due(database)
    assert reconciler.counts == {"still unknown": 6}


def test_a_walk_goes_on_page_by_page(store: SQLStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconciler_module, "_PAGE", 2)
    for number in range(5):
        held_and_due(store, f"key {number}")
    assert walk(store, StillUnknown) == {"still unknown": 5}


def test_a_walk_ends_at_a_page_of_rows_that_others_have_locked(
    pg_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are left for the next walk."""
    monkeypatch.setattr(reconciler_module, "_PAGE", 2)
    store = SQLStore(pg_database)
    for number in range(2):
        held_and_due(store, f"key {number}")
    engine = create_engine(pg_database)
    with engine.connect() as connection:
        connection.exec_driver_sql("SELECT FROM idempotency_keys FOR UPDATE")
        assert walk(store, NotExecuted) == {}
    engine.dispose()
    assert walk(store, NotExecuted) == {"not executed": 2}
    store.close()


def test_a_walk_that_is_told_to_stop_ends_after_the_operation_at_hand(store: SQLStore) -> None:
    for number in range(3):
        held_and_due(store, f"key {number}")
    stop = threading.Event()

    def verdict(record: Details) -> type[NotExecuted]:
        stop.set()
        return NotExecuted

    assert Reconciler(store, verdict).walk(stop=stop) == {"not executed": 1}


def test_walks_are_repeated_until_they_are_told_to_stop(database: str, store: SQLStore) -> None:
    held_and_due(store)
    stop = threading.Event()

    def verdict(record: Details) -> type[StillUnknown]:
        if reconciler.counts["still unknown"] == 2:
            stop.set()
        return StillUnknown

    reconciler = Reconciler(store, verdict)
    thread = threading.Thread(target=reconciler.run, kwargs={"interval": 0.01, "stop": stop})
    thread.start()
    while thread.is_alive():
        come_due(database)
        thread.join(0.05)
    assert reconciler.counts == {"still unknown": 3}


def test_a_store_that_can_not_be_reached_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    store = SQLStore("sqlite:////no/such/folder/keys.db", timeout=0.1)
    reconciler = Reconciler(store, lambda record: NotExecuted)
    with pytest.raises(StoreUnavailable):
        reconciler.walk()
    stop = threading.Event()
    thread = threading.Thread(target=reconciler.run, kwargs={"interval": 0.01, "stop": stop})
    thread.start()
    until(lambda: caplog.text.count("the reconciler's walk broke off") >= 2)
    stop.set()
    thread.join(30)
    assert not thread.is_alive()


# ---------------------------------------------------------------------- options


def test_a_database_may_be_named_by_url_or_engine(database: str) -> None:
    store = SQLStore(database)
    held_and_due(store)
    store.close()
    by_url = Reconciler(database, lambda record: NotExecuted, patience=timedelta(minutes=5))
    assert by_url.walk() == {"not executed": 1}
    by_url.store.close()
    engine = create_engine(database)
    by_engine = Reconciler(engine, lambda record: NotExecuted)
    assert by_engine.walk() == {}
    by_engine.store.close()
    engine.dispose()


@pytest.mark.parametrize(
    ("store", "verdict", "options", "said"),
    [
        (MemoryStore(), print, {}, "can't see into MemoryStore; use a database"),
        ("memory:", print, {}, "can't see into MemoryStore; use a database"),
        ("sqlite:///k.db", None, {}, "verdict is None, which can't be called"),
        ("sqlite:///k.db", print, {"patience": 0.5}, "patience"),
        ("sqlite:///k.db", print, {"patience": "a minute"}, "patience"),
    ],
    ids=["a store in memory", "memory", "no verdict", "no patience", "patience in words"],
)
def test_nonsense_is_refused(store: Any, verdict: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Reconciler(store, verdict, **options)


@pytest.mark.parametrize("interval", [-1, float("nan")])
def test_an_interval_of_nonsense_is_refused(interval: float) -> None:
    reconciler = Reconciler("sqlite:///k.db", lambda record: NotExecuted)
    with pytest.raises(ConfigurationError, match="interval"):
        reconciler.run(interval=interval)


# ---------------------------------------------------------------------- several processes


@contextmanager
def reconciling(
    url: str, verdict: str, folder: Path, *arguments: str, gate: Gate | None = None
) -> Iterator[subprocess.Popen[str]]:
    """The command as it runs on a host."""
    process = subprocess.Popen(
        [COMMAND, "reconcile", "--database", url, "--verdict", f"apps.verdicts:{verdict}",
         *arguments],
        cwd=TESTS,
        env={**os.environ, "LEDGER": str(folder / "ledger"),
             "GATE": "" if gate is None else gate.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    with ended(process):
        yield process


def judged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ledger").read_text().splitlines()]


def test_two_reconcilers_judge_each_operation_once(
    database: str, store: SQLStore, tmp_path: Path, gate: Gate
) -> None:
    """Both are in the middle of their walks when they are let go."""
    for number in range(100):
        held_and_due(store, f"never {number}")
        lapsed(store, f"done {number}")
    verdict = "answer_after_the_first_at_a_gate"
    with (
        reconciling(database, verdict, tmp_path, "--once", gate=gate) as one,
        reconciling(database, verdict, tmp_path, "--once", gate=gate) as other,
    ):
        for arrived in (gate.arrival(), gate.arrival()):
            arrived.let_pass()
        said = [process.communicate(timeout=60) for process in (one, other)]
        assert [one.returncode, other.returncode] == [0, 0], said
    lines = judged(tmp_path)
    assert len(lines) == 200
    assert len({line["key"] for line in lines}) == 200
    assert len({line["pid"] for line in lines}) == 2, "one of them did it all"
    counts = query(
        database, "SELECT action, count(*) AS n FROM idempotency_resolutions GROUP BY action"
    )
    assert {found["action"]: found["n"] for found in counts} == {"forget": 100, "complete": 100}
    left = query(database, "SELECT state, count(*) AS n FROM idempotency_keys GROUP BY state")
    assert left == [{"state": "completed", "n": 100}]


@each_due
def test_a_reconciler_killed_in_a_verdict_strands_nothing(
    database: str, store: SQLStore, tmp_path: Path, gate: Gate, arrange: Arrange
) -> None:
    """The operation comes due again, and a retry may run what a lapse releases."""
    claim = arrange(store)
    verdict = "answer_after_the_first_at_a_gate"
    with reconciling(database, verdict, tmp_path, "--patience", "1", gate=gate) as process:
        gate.arrival()
        process.send_signal(signal.SIGKILL)
        process.wait()
    until(lambda: details(store, claim).lease_left < 0)
    if arrange is lapsed:
        assert store.take_over(make_claim(), row(store, claim)) == Claimed(2)
    else:
        assert row(store, claim).token == claim.token
        assert walk(store, NotExecuted) == {"not executed": 1}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_it_after_the_operation_at_hand(
    sqlite_url: str, tmp_path: Path, gate: Gate, number: signal.Signals
) -> None:
    store = SQLStore(sqlite_url)
    for name in ("never 1", "never 2"):
        held_and_due(store, name)
    verdict = "answer_after_the_first_at_a_gate"
    with reconciling(sqlite_url, verdict, tmp_path, gate=gate) as process:
        arrived = gate.arrival()
        process.send_signal(number)
        arrived.let_pass()
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0
    assert said.splitlines()[-1] == "1 looked at: 1 not executed"
    assert len(judged(tmp_path)) == 1
    assert len(Resolver(store).unresolved()) == 1
    store.close()
