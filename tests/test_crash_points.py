"""A worker may die at any edge of a request: what a retry finds is what the diagram says."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from apps.doomed import MODES, Ledger, post
from apps.shop import query
from servers.http import TESTS
from werkzeug.test import Client, create_environ
from werkzeug.wrappers import Response

from wsgi_idempotency import (
    FORGET,
    HOLD,
    RELEASE,
    STORE,
    IdempotencyMiddleware,
    MemoryStore,
    Outcome,
    Policy,
    SQLStore,
    crashing,
    everyone,
    hold_unknown,
    protocol,
    testing,
)
from wsgi_idempotency.crashing import CrashPoint, crash_at
from wsgi_idempotency.records import Lapse

PAGE = Path(__file__).parent.parent / "docs" / "crashes.md"

CREATED, REFUSED, FAILED = "201 Created", "400 Bad Request", "500 Internal Server Error"

#: A row of the table: where the worker dies, and how its handler ended, or would have.
Edge = tuple[CrashPoint, str]
EDGES: dict[str, Edge] = {point.value: (point, CREATED) for point in CrashPoint} | {
    f"{point.value}, a {status[:3]}": (point, status)
    for status in (REFUSED, FAILED)
    for point in (CrashPoint.BEFORE_SETTLE, CrashPoint.AFTER_SETTLE)
}

UNCLAIMED = (CrashPoint.BEFORE_CLAIM,)
NOT_RUN = (*UNCLAIMED, CrashPoint.AFTER_CLAIM)
UNSETTLED = (*NOT_RUN, CrashPoint.DURING_HANDLER, CrashPoint.BEFORE_SETTLE)


@dataclass(frozen=True)
class Aftermath:
    """What retries of a request come to whose worker has died.

    :param retries: the answer to the first retry and, if that was told to come back, to one
        after the lease.
    :param executions: how often the handler has begun, in the end.
    :param rows: how many rows of the application's are committed, in the end.
    """

    retries: tuple[str, ...]
    executions: int
    rows: int

    def __str__(self) -> str:
        runs = "1 run" if self.executions == 1 else f"{self.executions} runs"
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        return f"{', then '.join(self.retries)}: {runs}, {rows}"


def after_diagram(mode: str, point: CrashPoint, status: str) -> Aftermath:
    """What the diagram of a key's states says."""
    policy = MODES[mode]
    ran = int(point not in NOT_RUN)
    action = protocol.settle(Outcome(status=int(status[:3])), policy.outcomes)
    if policy.transaction:
        # A transaction that was not committed never was.
        if point not in UNSETTLED and action is STORE:
            return Aftermath(("replay",), 1, 1)
        return Aftermath(("attempt 1",), ran + 1, 1)
    if point in UNCLAIMED:
        return Aftermath(("attempt 1",), 1, 1)
    if mode == "guard" and ran:
        # Its effects are committed, whatever became of the response.
        retry = "replay" if point not in UNSETTLED and action is STORE else "rebuilt"
        return Aftermath(("CONFLICT", retry) if point in UNSETTLED else (retry,), 1, 1)
    if mode == "step" and ran:
        # Its next attempt finds what its step has written, unless its row is gone with its steps.
        if point in UNSETTLED:
            return Aftermath(("CONFLICT", "attempt 2"), 2, 1)
        if action is RELEASE:
            return Aftermath(("attempt 2",), 2, 1)
    if point in UNSETTLED:
        if policy.lapse is Lapse.HOLD:
            return Aftermath(("CONFLICT", "OUTCOME_UNKNOWN"), ran, ran)
        return Aftermath(("CONFLICT", "attempt 2"), ran + 1, ran + 1)
    return {
        STORE: Aftermath(("replay",), 1, 1),
        FORGET: Aftermath(("attempt 1",), 2, 2),
        RELEASE: Aftermath(("attempt 2",), 2, 2),
        HOLD: Aftermath(("OUTCOME_UNKNOWN",), 1, 1),
    }[action]


def key_of(mode: str, edge: str) -> str:
    return f"{mode}/{edge}".replace(" ", "-").replace(",", "")


class Matrix:
    """Workers that have died at every edge of every mode, and what came after them."""

    def __init__(self, url: str, folder: Path, modes: list[str]) -> None:
        self.ends: dict[str, int] = {}
        self.aftermath: dict[str, Aftermath] = {}
        self._diary = str(folder / "diary")
        self._ledger = Ledger(url, self._diary)
        self._apps = {mode: self._ledger.protected(mode) for mode in modes}
        for app in self._apps.values():
            app.store.check()
        self._ledger.make_table()
        self._kill(modes)
        keys = [(mode, key_of(mode, edge)) for mode in modes for edge in EDGES]
        first = {key: self._retry(mode, key) for mode, key in keys}
        self._ledger.let_leases_run_out()
        for mode, key in keys:
            retries: tuple[str, ...] = (first[key],)
            if retries == ("CONFLICT",):
                retries = (*retries, self._retry(mode, key))
            executions, rows = self._ledger.executions(key), self._ledger.rows(key)
            self.aftermath[key] = Aftermath(retries, executions, rows)

    def _kill(self, modes: list[str]) -> None:
        cells = [
            {"mode": mode, "key": key_of(mode, edge), "point": point.name, "status": status}
            for mode in modes
            for edge, (point, status) in EDGES.items()
        ]
        workers = subprocess.run(
            [sys.executable, "-m", "apps.doomed", self._ledger.url, self._diary],
            input=json.dumps(cells).encode(),
            stdout=subprocess.PIPE,
            cwd=TESTS,
            check=True,
            timeout=200,
        )
        self.ends = json.loads(workers.stdout)

    def _retry(self, mode: str, key: str) -> str:
        response: Response = post(self._apps[mode], mode, key, CREATED)
        if response.mimetype == "application/problem+json":
            return str(response.get_json()["code"])
        if response.text == "rebuilt":
            assert "Idempotency-Replayed" in response.headers
            return response.text
        return "replay" if "Idempotency-Replayed" in response.headers else response.text

    def close(self) -> None:
        for app in self._apps.values():
            app.store.close()
        self._ledger.close()


@pytest.fixture(scope="module")
def on_pg(module_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    matrix = Matrix(module_database, tmp_path_factory.mktemp("postgresql"), list(MODES))
    yield matrix
    matrix.close()


ON_SQLITE = ["store_success", "transaction", "step", "guard"]


@pytest.fixture(scope="module")
def on_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    folder = tmp_path_factory.mktemp("sqlite")
    matrix = Matrix(f"sqlite:///{folder / 'shop.db'}", folder, ON_SQLITE)
    yield matrix
    matrix.close()


def check(matrix: Matrix, mode: str, edge: str) -> None:
    key = key_of(mode, edge)
    assert matrix.ends[key] == signal.SIGKILL
    assert matrix.aftermath[key] == after_diagram(mode, *EDGES[edge])


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("mode", MODES)
def test_a_retry_finds_what_the_diagram_says_on_postgresql(
    on_pg: Matrix, mode: str, edge: str
) -> None:
    check(on_pg, mode, edge)


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("mode", ON_SQLITE)
def test_a_retry_finds_what_the_diagram_says_on_sqlite(
    on_sqlite: Matrix, mode: str, edge: str
) -> None:
    check(on_sqlite, mode, edge)


def test_the_table_of_the_documentation_is_what_happened(on_pg: Matrix) -> None:
    lines = [
        f"| the worker dies | {' | '.join(f'`{mode}`' for mode in MODES)} |",
        "|---|" + "---|" * len(MODES),
        *(
            f"| {edge} | {' | '.join(str(on_pg.aftermath[key_of(mode, edge)]) for mode in MODES)} |"
            for edge in EDGES
        ),
    ]
    table = "\n".join(lines).replace("CONFLICT", "`CONFLICT`")
    table = table.replace("OUTCOME_UNKNOWN", "`OUTCOME_UNKNOWN`")
    assert table in PAGE.read_text(encoding="utf-8"), f"the table has to be:\n\n{table}"


# ---------------------------------------------------------------------- crash_at itself


class Died(BaseException):
    """Raised instead of dying."""


class Stage:
    """A request as everybody sees it: its handler, its row, its client."""

    def __init__(self, url: str, policy: Policy, body: bytes = b"hello") -> None:
        self._url = url
        self._body = body
        self.store = SQLStore(url)
        self.store.check()
        self.handler = ""
        self.sent: bytes | None = None
        self.seen: list[tuple[str, str | None, bytes | None]] = []
        self.middleware = IdempotencyMiddleware(
            self._app, self.store, scope=everyone, policy=policy
        )

    def _app(self, environ, start_response):
        self.handler = "begun"
        if self.middleware.policy.transaction:
            assert environ["wsgi_idempotency.operation"].connection is not None
        start_response(environ.get("HTTP_X_STATUS", CREATED), [("Content-Type", "text/plain")])
        self.handler = "ended"
        return [self._body]

    def look(self) -> None:
        rows = query(self._url, "SELECT state FROM idempotency_keys")
        state = rows[0]["state"] if rows else None
        self.seen.append((self.handler, state, self.sent))

    def raise_(self) -> None:
        self.look()
        raise Died

    def post(self, app, status: str = CREATED) -> None:
        """One request, as a server handles it."""
        self.handler, self.sent = "", None
        environ = create_environ("/pay", method="POST")
        environ |= {"HTTP_IDEMPOTENCY_KEY": "k", "HTTP_X_STATUS": status}

        def start_response(status, headers, exc_info=None):
            self.sent = b""
            return

        answer = app(environ, start_response)
        try:
            for chunk in answer:
                assert self.sent is not None
                self.sent += chunk
        finally:
            getattr(answer, "close", lambda: None)()


OpenStage = Callable[..., Stage]

POLICIES = {
    "lease": Policy(),
    "transaction": Policy(transaction=True),
}


@pytest.fixture
def stage(sqlite_url: str) -> Iterator[OpenStage]:
    stages: list[Stage] = []

    def open_stage(mode: str, **options) -> Stage:
        stages.append(Stage(sqlite_url, POLICIES[mode], **options))
        return stages[-1]

    yield open_stage
    for opened in stages:
        opened.store.close()


#: At each edge: the handler, the row as others see it, and what the server has been handed.
SCENES = {
    "lease": [
        ("", None, None),
        ("", "claimed", None),
        ("begun", "claimed", None),
        ("ended", "claimed", None),
        ("ended", "completed", None),
        ("ended", "completed", b""),
        ("ended", "completed", b"h"),
        ("ended", "completed", b"hello"),
    ],
    "transaction": [
        ("", None, None),
        ("", None, None),
        ("begun", None, None),
        ("ended", None, None),
        ("ended", "completed", None),
        ("ended", "completed", b""),
        ("ended", "completed", b"h"),
        ("ended", "completed", b"hello"),
    ],
}


@pytest.mark.parametrize("mode", SCENES)
@pytest.mark.parametrize("point", CrashPoint)
def test_at_each_edge_so_much_has_happened_and_no_more(
    stage: OpenStage, mode: str, point: CrashPoint
) -> None:
    opened = stage(mode)
    opened.post(crash_at(opened.middleware, point, die=opened.look))
    assert opened.seen == [SCENES[mode][list(CrashPoint).index(point)]]
    assert opened.sent == b"hello"


@pytest.mark.parametrize("mode", POLICIES)
@pytest.mark.parametrize(
    ("status", "settled"), [(REFUSED, None), (FAILED, "released")], ids=["400", "500"]
)
def test_what_is_not_stored_is_settled_too(
    stage: OpenStage, mode: str, status: str, settled: str | None
) -> None:
    opened = stage(mode)
    for point in (CrashPoint.BEFORE_SETTLE, CrashPoint.AFTER_SETTLE):
        opened.post(crash_at(opened.middleware, point, die=opened.look), status)
    lease = mode == "lease"
    before = "claimed" if lease else None
    after = settled if lease else None
    assert opened.seen == [("ended", before, None), ("ended", after, None)]


def test_what_is_held_is_settled_too(stage: OpenStage) -> None:
    opened = stage("lease")
    opened.middleware.policy = Policy(outcomes=hold_unknown)
    app = crash_at(opened.middleware, CrashPoint.AFTER_SETTLE, die=opened.look)
    opened.post(app, FAILED)
    assert opened.seen == [("ended", "held", None)]


@pytest.mark.parametrize("mode", POLICIES)
def test_a_take_over_is_a_claim_too(stage: OpenStage, mode: str) -> None:
    opened = stage("lease")
    opened.post(opened.middleware, FAILED)
    opened = stage(mode)
    opened.post(crash_at(opened.middleware, CrashPoint.AFTER_CLAIM, die=opened.look))
    assert opened.seen == [("", "claimed" if mode == "lease" else "released", None)]
    assert opened.handler == "ended"


def test_who_finds_a_claim_in_the_way_of_its_transaction_passes_no_edge_of_an_execution(
    stage: OpenStage,
) -> None:
    """What another policy has claimed, with a lease, is in flight in transaction mode too."""
    opened = stage("transaction")
    in_flight = stage("lease")
    with pytest.raises(Died):
        in_flight.post(crash_at(in_flight.middleware, CrashPoint.AFTER_CLAIM, die=raises))
    for point in (CrashPoint.AFTER_CLAIM, CrashPoint.BEFORE_SETTLE, CrashPoint.AFTER_SETTLE):
        opened.post(crash_at(opened.middleware, point, die=opened.look))
    assert opened.seen == []
    assert opened.sent is not None
    assert b"CONFLICT" in opened.sent


def raises() -> None:
    raise Died


def test_a_transaction_that_is_waited_for_in_vain_passes_no_edge_of_an_execution(
    pg_database: str,
) -> None:
    first, second = (Stage(pg_database, POLICIES["transaction"]) for _ in range(2))
    inner = crash_at(second.middleware, CrashPoint.AFTER_CLAIM, die=second.look)
    first.post(crash_at(first.middleware, CrashPoint.AFTER_CLAIM, die=lambda: second.post(inner)))
    assert (first.sent, second.seen) == (b"hello", [])
    assert second.sent is not None
    assert b"CONFLICT" in second.sent
    first.store.close()
    second.store.close()


@pytest.mark.parametrize("mode", POLICIES)
@pytest.mark.parametrize(
    "point", [CrashPoint.AFTER_CLAIM, CrashPoint.BEFORE_SETTLE, CrashPoint.AFTER_SETTLE]
)
def test_a_replay_passes_no_edge_of_an_execution(
    stage: OpenStage, mode: str, point: CrashPoint
) -> None:
    opened = stage(mode)
    opened.post(opened.middleware)
    opened.post(crash_at(opened.middleware, point, die=opened.look))
    assert (opened.seen, opened.sent) == ([], b"hello")


def test_an_answer_without_a_body_has_no_first_byte(stage: OpenStage) -> None:
    opened = stage("lease", body=b"")
    for point in (CrashPoint.AFTER_FIRST_BYTE, CrashPoint.AFTER_ANSWER):
        opened.post(crash_at(opened.middleware, point, die=opened.look))
    assert opened.seen == [("", "completed", b"")]


@pytest.mark.parametrize("mode", POLICIES)
def test_what_is_raised_instead_of_dying_comes_out_and_leaves_no_transaction_behind(
    stage: OpenStage, mode: str
) -> None:
    opened = stage(mode)
    for point in CrashPoint:
        with pytest.raises(Died):
            opened.post(crash_at(opened.middleware, point, die=opened.raise_))
        query(opened._url, "DELETE FROM idempotency_keys")
    assert len(opened.seen) == len(CrashPoint)


@pytest.mark.parametrize("mode", POLICIES)
def test_a_take_over_that_comes_too_late_passes_no_edge_of_an_execution(
    stage: OpenStage, mode: str
) -> None:
    opened = stage("lease")
    opened.post(opened.middleware, FAILED)
    [row] = query(opened._url, "SELECT key_digest FROM idempotency_keys")
    record = opened.store.lookup(row["key_digest"])
    assert record is not None
    stale = dataclasses.replace(record, token=b"somebody else's.")
    passed: list[CrashPoint] = []
    store = crashing._Store(opened.store, passed.append)
    claim = testing.make_claim(digest=record.digest)
    if mode == "lease":
        assert store.take_over(claim, stale) is None
    else:
        transaction = store.begin(claim)
        assert transaction is not None
        assert transaction.take_over(claim, stale) is None
        transaction.rollback()
    assert set(passed) <= {CrashPoint.BEFORE_CLAIM}


def test_only_the_requests_that_are_meant_die_and_the_middleware_stays_as_it_was(
    stage: OpenStage,
) -> None:
    opened = stage("lease")
    app = crash_at(
        opened.middleware,
        CrashPoint.BEFORE_CLAIM,
        when=lambda environ: environ["HTTP_X_STATUS"] == FAILED,
        die=raises,
    )
    with pytest.raises(Died):
        opened.post(app, FAILED)
    opened.post(app)
    opened.post(opened.middleware, FAILED)
    assert opened.sent == b"hello"


def test_an_application_may_start_again_while_it_is_watched(sqlite_url: str) -> None:
    """PEP 3333: with exc_info, while nothing was sent."""

    def app(environ, start_response):
        start_response(CREATED, [])
        try:
            raise ValueError("too late")
        except ValueError:
            start_response(FAILED, [("Content-Type", "text/plain")], sys.exc_info())
        return iter([b"sorry"])

    store = SQLStore(sqlite_url)
    middleware = IdempotencyMiddleware(app, store, scope=everyone)
    passed: list[CrashPoint] = []
    point = CrashPoint.DURING_HANDLER
    response = Client(crash_at(middleware, point, die=lambda: passed.append(point))).post(
        "/", headers={"Idempotency-Key": "k"}
    )
    assert (response.status, response.data, passed) == (FAILED, b"sorry", [point])
    store.close()


def test_what_the_application_answers_with_is_closed_before_the_last_edge() -> None:
    """PEP 3333: also where nobody asks for the key, and what is closed is the application's."""
    told: list[object] = []

    class Answer:
        def __iter__(self):
            return iter([b"hello"])

        def close(self):
            told.append("closed")

    def app(environ, start_response):
        start_response(CREATED, [])
        return Answer()

    middleware = IdempotencyMiddleware(app, MemoryStore(), scope=everyone)
    point = CrashPoint.AFTER_ANSWER
    response = Client(crash_at(middleware, point, die=lambda: told.append(point))).post("/")
    assert response.data == b"hello"
    response.close()
    assert told == ["closed", point]


def test_the_package_s_testing_module_has_all_of_it() -> None:
    assert {testing.CrashPoint, testing.crash_at} == {CrashPoint, crash_at}
    assert {"CrashPoint", "crash_at"} <= {*testing.__all__}


def test_the_process_is_killed_where_nothing_else_is_said() -> None:
    pid = os.fork()
    if not pid:
        try:
            crashing.kill()
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
