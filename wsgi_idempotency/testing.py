"""The suite every store passes, shipped so that a store of your own can run it. Needs pytest.

.. code-block:: python

    from wsgi_idempotency.testing import StoreConformance

    class TestMyStore(StoreConformance):
        def make_store(self):
            return MyStore()

A store that several processes share names a function that opens it instead, so that real
processes race for its claims:

.. code-block:: python

    class TestMyStore(StoreConformance):
        process_store = "my_package:MyStore"

        @pytest.fixture(autouse=True)
        def storage(self, tmp_path):
            self.process_argument = str(tmp_path / "keys")

To have pytest explain a failed assertion, say
``pytest.register_assert_rewrite("wsgi_idempotency.testing")`` in ``conftest.py``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import itertools
import multiprocessing
import os
import random
import secrets
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import pytest

from wsgi_idempotency.crashing import CrashPoint, crash_at
from wsgi_idempotency.errors import StoreUnavailable
from wsgi_idempotency.records import Claim, Claimed, Completion, Lapse, Record, State, Step
from wsgi_idempotency.stores.base import StepStore, Store, Transaction, TransactionalStore
from wsgi_idempotency.stores.memory import MemoryStore

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = [
    "CrashPoint",
    "StoreConformance",
    "TransactionalConformance",
    "crash_at",
    "foreign_writes_warned_of",
    "make_claim",
]


def foreign_writes_warned_of() -> AbstractContextManager[None]:
    """Within it, what a handler with ``Policy(transaction=True)`` writes on another connection of
    SQLAlchemy's than ``current_operation.connection`` is warned of by
    :class:`~wsgi_idempotency.errors.ForeignWrite`. Around an application's whole suite, with that
    warning as an error, no write is forgotten outside the transaction."""
    from wsgi_idempotency import foreign_writes

    return foreign_writes.watched()


#: Workers in a race. More than the cores of a small machine, so that they interrupt each other.
WORKERS = 4

#: How long a race may take before it counts as a deadlock, in seconds.
PATIENCE = 60.0

DONE = Completion("201 Created", (("Location", "/charges/1"),), b'{"id": 1}')
OTHER = Completion("200 OK", (("X-By", "somebody else"),), b"not this one")

BEFORE, AFTER = 3600.0, 0.0  # a retention that has not passed, and one that passes at once
ALIVE, OVER = 60.0, 0.0  # a lease that has not run out, and one that runs out at once


def make_claim(
    name: str = "a key",
    *,
    lease: float = ALIVE,
    retention: float = BEFORE,
    lapse: Lapse = Lapse.RELEASE,
    **changes: Any,
) -> Claim:
    """Make a claim with a token of its own, on the digest of a name.

    :param name: equal names are the same key.
    :param lease: seconds; 0 has run out at once.
    :param retention: seconds; 0 has passed at once, and less lies further back.
    :param lapse: what it means when the lease runs out.
    :param changes: other fields of :class:`~wsgi_idempotency.records.Claim`.
    """
    claim = Claim(
        digest=hashlib.sha256(name.encode()).digest(),
        token=secrets.token_bytes(16),
        fingerprint=hashlib.sha256(b"a payload").digest(),
        fingerprint_version=1,
        scope="alice",
        key=name,
        method="POST",
        path="/charges",
        lease=lease,
        retention=retention,
        lapse=lapse,
    )
    return dataclasses.replace(claim, **changes)


@dataclass(frozen=True)
class Situation:
    """A row in one of the conditions that the contract tells apart."""

    lease: float = ALIVE
    retention: float = BEFORE
    lapse: Lapse = Lapse.RELEASE
    settled: State = State.CLAIMED

    def arrange(self, store: Store, name: str = "a key") -> Claim:
        """Bring a key into this situation; returns the claim that did."""
        claim = make_claim(name, lease=self.lease, retention=self.retention, lapse=self.lapse)
        assert store.claim(claim) == Claimed(1)
        settle(store, self.settled, claim)
        return claim


def settle(store: Store, state: State, claim: Claim, completion: Completion = DONE) -> None:
    if state is State.COMPLETED:
        assert store.complete(claim.digest, claim.token, completion) is True
    elif state is State.RELEASED:
        assert store.release(claim.digest, claim.token) is True
    elif state is State.HELD:
        assert store.hold(claim.digest, claim.token) is True


HOLD = Lapse.HOLD
RELEASED = Situation(settled=State.RELEASED)
LAPSED = Situation(lease=OVER)

#: Rows that may be taken over by whoever is first, and stay the same operation.
RERUNNABLE = {
    "a released row": RELEASED,
    "a released row whose lapse would hold it": Situation(lapse=HOLD, settled=State.RELEASED),
    "a lapsed row": LAPSED,
}
#: Rows that count as absent.
EXPIRED = {
    "an expired completed row": Situation(retention=AFTER, settled=State.COMPLETED),
    "an expired released row": Situation(retention=AFTER, settled=State.RELEASED),
    "an expired lapsed row": Situation(lease=OVER, retention=AFTER),
    "an expired row completed after its lapse": Situation(
        lease=OVER, retention=AFTER, lapse=HOLD, settled=State.COMPLETED
    ),
}
#: Rows that nobody may take.
TAKEN = {
    "a row in flight": Situation(),
    "a row in flight past its retention": Situation(retention=AFTER),
    "a lapsed row that its lapse holds": Situation(lease=OVER, lapse=HOLD),
    "a lapsed row that its lapse holds past its retention": Situation(
        lease=OVER, retention=AFTER, lapse=HOLD
    ),
    "a held row": Situation(settled=State.HELD),
    "a held row past its lease": Situation(lease=OVER, settled=State.HELD),
    "a held row past its retention": Situation(retention=AFTER, settled=State.HELD),
    "a held row past everything": Situation(lease=OVER, retention=AFTER, settled=State.HELD),
    "a completed row": Situation(settled=State.COMPLETED),
    "a completed row past its lease": Situation(lease=OVER, settled=State.COMPLETED),
}


def each(situations: dict[str, Situation]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("situation", situations.values(), ids=list(situations))


#: The ways to end a claim: each is called with (store, digest, token).
SETTLEMENTS: dict[str, Callable[[Store, bytes, bytes], bool]] = {
    "complete": lambda store, digest, token: store.complete(digest, token, OTHER),
    "release": lambda store, digest, token: store.release(digest, token),
    "forget": lambda store, digest, token: store.forget(digest, token),
    "hold": lambda store, digest, token: store.hold(digest, token),
}
each_settlement = pytest.mark.parametrize("ending", SETTLEMENTS.values(), ids=list(SETTLEMENTS))


def still(record: Record | None) -> Record | None:
    """A record less what changes by itself as time goes by."""
    return record and dataclasses.replace(record, age=0.0, lease_left=0.0)


def lookup(store: Store, claim: Claim) -> Record:
    record = store.lookup(claim.digest)
    assert record is not None
    return record


def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for the store's clock, which nobody else can move."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        time.sleep(0.005)


def acquire(store: Store, claim: Claim) -> Claimed | Record:
    """Claim a key as the middleware does: look, take over if it is free, look again."""
    for _ in range(1000):
        answer = store.claim(claim)
        if isinstance(answer, Claimed):
            return answer
        rerunnable = answer.state is State.RELEASED or (
            answer.lapsed and answer.lapse is Lapse.RELEASE
        )
        if not (rerunnable or answer.expired):
            return answer
        granted = store.take_over(claim, answer)
        if granted is not None:
            return granted
    raise AssertionError("the key was free a thousand times and never granted")


# What the workers of a race do. Each is called with a store of the worker's own, a
# function that returns once all workers have called it, and the worker's number.

Meet = Callable[[], object]
Task = Callable[..., Any]


def race_for(store: Store, meet: Meet, worker: int, names: list[str]) -> list[Claimed | Record]:
    answers = []
    for name in names:
        claim = make_claim(name, token=token_of(worker))
        meet()
        answers.append(acquire(store, claim))
    return answers


def race_against_purge(
    store: Store, meet: Meet, worker: int, names: list[str]
) -> list[Claimed | Record]:
    answers = []
    for turn, name in enumerate(names):
        claim = make_claim(name, token=token_of(worker))
        meet()
        if worker == turn % WORKERS:
            store.purge(10)
        answers.append(acquire(store, claim))
    return answers


def owner_against_heir(
    store: Store, meet: Meet, worker: int, owned: list[tuple[Claim, Record]], way: str
) -> list[bool]:
    """Worker 0 keeps claims that have lapsed, while the others take them over."""
    won = []
    for claim, seen in owned:
        heir = make_claim(claim.key)
        meet()
        if worker:
            won.append(store.take_over(heir, seen) is not None)
        elif way == "renew":
            won.append(store.renew([(claim.digest, claim.token, ALIVE)]) == {claim.token})
        else:
            won.append(SETTLEMENTS[way](store, claim.digest, claim.token))
    return won


def step_against_heir(
    store: Store, meet: Meet, worker: int, owners: list[tuple[str, bytes]]
) -> list[bool | Step | None]:
    """The first worker records a step of claims that have lapsed, the others take them over and
    look for it; None for those who come too late."""
    assert isinstance(store, StepStore)
    answers: list[bool | Step | None] = []
    for name, token in owners:
        mine = make_claim(name)
        seen = lookup(store, mine)
        meet()
        if worker == 0:
            answers.append(store.record_step(mine.digest, token, "charge", "1"))
        elif store.take_over(mine, seen) is None:
            answers.append(None)
        else:
            answers.append(store.step(mine.digest, mine.token, "charge"))
    return answers


def churn(store: Store, meet: Meet, worker: int, name: str, turns: int) -> list[int]:
    """Win a key and release it, over and over; returns the attempts that were won."""
    attempts: list[int] = []
    deadline = time.monotonic() + PATIENCE
    meet()
    while len(attempts) < turns:
        assert time.monotonic() < deadline, "starved"
        claim = make_claim(name)
        answer = acquire(store, claim)
        if isinstance(answer, Claimed):
            attempts.append(answer.attempt)
            assert store.release(claim.digest, claim.token) is True, "lost a live claim"
    return attempts


def purge_all(store: Store, meet: Meet, worker: int, limit: int) -> int:
    meet()
    total = 0
    while (count := store.purge(limit)) == limit:
        total += count
    return total + count


def look_up(store: Store, meet: Meet, worker: int, digest: bytes) -> Record | None:
    return store.lookup(digest)


def fork_and_use(
    store: Store, meet: Meet, worker: int, used: bool
) -> tuple[int, list[bool], Record | None]:
    """Use one store on both sides of a fork at the same time.

    :returns: the child's wait status, what the parent's claims came to, and what the
        parent sees of the child's last claim.
    """
    if used:
        store.claim(make_claim("before the fork"))
    child = os.fork() or use_and_exit(store)
    answers = use(store, "parent")
    return os.waitpid(child, 0)[1], answers, store.lookup(make_claim("child 19").digest)


def use_and_exit(store: Store) -> NoReturn:
    """The life of a forked child, whose wait status is 0 if all went well."""
    signal.alarm(int(PATIENCE))
    status = 1
    try:
        status = 0 if all(use(store, "child")) else 2
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def use(store: Store, who: str) -> list[bool]:
    claims = [make_claim(f"{who} {number}") for number in range(20)]
    return [
        store.claim(claim) == Claimed(1) and store.complete(claim.digest, claim.token, DONE)
        for claim in claims
    ]


def token_of(worker: int) -> bytes:
    return worker.to_bytes(16, "big")


class Crowd(Protocol):
    """Workers that race, each with a Store object of its own on one storage."""

    def race(self, task: Task, *arguments: Any) -> list[Any]:
        """Run a task in every worker at once; returns what each one returned."""

    def alone(self, task: Task, *arguments: Any) -> Any:
        """Run a task in one worker that has no other threads."""


@dataclass(frozen=True)
class Threads:
    open_store: Callable[[], Store]

    def race(self, task: Task, *arguments: Any) -> list[Any]:
        meet = threading.Barrier(WORKERS, timeout=PATIENCE).wait
        with ThreadPoolExecutor(WORKERS) as pool:
            futures = [
                pool.submit(task, self.open_store(), meet, worker, *arguments)
                for worker in range(WORKERS)
            ]
        return [future.result() for future in futures]

    def alone(self, task: Task, *arguments: Any) -> Any:
        return task(self.open_store(), int, 0, *arguments)


class Processes:
    """Spawned once for a class of tests, since a start takes the better part of a second."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._barrier = context.Barrier(WORKERS, timeout=PATIENCE)
        pipes = [context.Pipe() for _ in range(WORKERS)]
        self._ends = [here for here, there in pipes]
        self._workers = [
            context.Process(target=serve, args=(there, self._barrier.wait, worker), daemon=True)
            for worker, (here, there) in enumerate(pipes)
        ]
        for process in self._workers:
            process.start()
        for _, there in pipes:
            there.close()

    def run(self, workers: int, *order: Any) -> list[Any]:
        ends = self._ends[:workers]
        self._barrier.reset()  # a race that failed has broken it
        for end in ends:
            end.send(order)
        answers = [end.recv() for end in ends if end.poll(2 * PATIENCE)]
        failures = [answer for good, answer in answers if not good]
        assert not failures, "\n".join(failures)
        assert len(answers) == workers, "a worker did not answer"
        return [answer for _, answer in answers]

    def stop(self) -> None:
        for end in self._ends:
            end.close()
        for process in self._workers:
            process.join()


@dataclass(frozen=True)
class ProcessesOn:
    processes: Processes
    opener: str
    argument: str

    def race(self, task: Task, *arguments: Any) -> list[Any]:
        return self.processes.run(WORKERS, self.opener, self.argument, task, arguments)

    def alone(self, task: Task, *arguments: Any) -> Any:
        return self.processes.run(1, self.opener, self.argument, task, arguments)[0]


PROCESSES = pytest.StashKey[Processes]()


def serve(orders: Connection, meet: Meet, worker: int) -> None:
    """The life of a worker process: it ends when its parent hangs up."""
    while True:
        try:
            opener, argument, task, arguments = orders.recv()
        except EOFError:
            return
        try:
            store = load(opener)(argument)
            try:
                orders.send((True, task(store, meet, worker, *arguments)))
            finally:
                store.close()
        except Exception:
            orders.send((False, traceback.format_exc()))


def load(name: str) -> Callable[[str], Store]:
    module, _, function = name.partition(":")
    opener: Callable[[str], Store] = getattr(importlib.import_module(module), function)
    return opener


class StoreConformance:
    """Every promise of :class:`~wsgi_idempotency.stores.base.Store`, as tests for pytest.

    A subclass says how to make a store whose storage is empty at the start of each test:
    by :meth:`make_store`, or by ``process_store`` and ``process_argument``. A lease or
    retention of 0 s or less must have run out at once: few tests wait for a clock.
    """

    #: ``"module:callable"``: called with ``process_argument``, opens a store in any process.
    #: None for a store that lives in one process; its races are run by threads.
    process_store: str | None = None

    #: Where this test's storage is; set it in a fixture. Pickled to the worker processes.
    process_argument: str = ""

    def make_store(self) -> Store:
        """Make a store on empty storage; called once a test."""
        assert self.process_store, "a subclass gives make_store() or process_store"
        return load(self.process_store)(self.process_argument)

    def open_store(self) -> Store:
        """Open another Store object on the storage of this test's store.

        For a store that lives in one process, it is the same object.
        """
        return self.make_store() if self.process_store else self._store

    def unreachable_store(self) -> Store | None:
        """Make a store that can't be reached, or None for one that always can."""
        return None

    @pytest.fixture
    def store(self) -> Iterator[Store]:
        self._store = self.make_store()
        yield self._store
        self._store.close()

    @pytest.fixture
    def crowd(self, store: Store, request: pytest.FixtureRequest) -> Crowd:
        if self.process_store is None:
            return Threads(self.open_store)
        group = request.node.getparent(pytest.Class)
        if PROCESSES not in group.stash:
            group.stash[PROCESSES] = Processes()
            group.addfinalizer(group.stash[PROCESSES].stop)
        return ProcessesOn(group.stash[PROCESSES], self.process_store, self.process_argument)

    # One winner.

    def test_one_of_many_workers_wins_each_fresh_key(self, crowd: Crowd) -> None:
        """Of all calls for one digest with no row, one is granted; the others get its row."""
        names = [f"key {number}" for number in range(60)]
        for answers in zip(*crowd.race(race_for, names), strict=True):
            winner = the_one(answers)
            assert answers[winner] == Claimed(1)
            losers = [answer for answer in answers if isinstance(answer, Record)]
            assert {record.token for record in losers} == {token_of(winner)}
            assert {record.state for record in losers} == {State.CLAIMED}

    @each(RERUNNABLE)
    def test_one_of_many_workers_takes_over(
        self, store: Store, crowd: Crowd, situation: Situation
    ) -> None:
        """A take-over is a compare-and-swap."""
        names = [f"key {number}" for number in range(30)]
        for name in names:
            situation.arrange(store, name)
        assert_one_is_granted(crowd.race(race_for, names), Claimed(2))

    @each(EXPIRED)
    def test_one_of_many_workers_takes_over_what_has_expired(
        self, store: Store, crowd: Crowd, situation: Situation
    ) -> None:
        """An expired row is claimable at once, without any purge having run."""
        names = [f"key {number}" for number in range(30)]
        for name in names:
            situation.arrange(store, name)
        assert_one_is_granted(crowd.race(race_for, names), Claimed(1))

    def test_one_of_many_workers_wins_while_a_purge_takes_the_row_away(
        self, store: Store, crowd: Crowd
    ) -> None:
        """A purge between look and take-over leads to another look, not to two winners."""
        names = [f"key {number}" for number in range(60)]
        for name in names:
            EXPIRED["an expired completed row"].arrange(store, name)
        assert_one_is_granted(crowd.race(race_against_purge, names), Claimed(1))

    @pytest.mark.parametrize("way", ["renew", "complete", "hold", "forget"])
    def test_either_the_owner_keeps_a_lapsed_claim_or_one_other_takes_it(
        self, store: Store, crowd: Crowd, way: str
    ) -> None:
        """A late renewal or settlement and a take-over never both succeed."""
        claims = [LAPSED.arrange(store, f"key {number}") for number in range(40)]
        owned = [(claim, lookup(store, claim)) for claim in claims]
        for won in zip(*crowd.race(owner_against_heir, owned, way), strict=True):
            assert sum(won) == 1

    def test_a_key_released_over_and_over_is_held_by_one_worker_at_a_time(
        self, crowd: Crowd
    ) -> None:
        """Each grant is an attempt of its own, and nobody loses a claim that is alive."""
        attempts = crowd.race(churn, "a key", 25)
        assert sorted(itertools.chain(*attempts)) == list(range(1, 25 * WORKERS + 1))

    def test_twelve_threads_on_one_store_never_hold_a_key_together(self, store: Store) -> None:
        """However a claim ends, the next is granted after it; attempts count the reruns."""
        hammer = Hammer(store)
        with ThreadPoolExecutor(12) as pool:
            for future in [pool.submit(hammer.swing, number) for number in range(12)]:
                future.result()
        assert hammer.grants == Counter(dict.fromkeys(range(12), Hammer.turns))

    def test_purges_at_once_count_no_row_twice(self, store: Store, crowd: Crowd) -> None:
        """Rows that another purge is deleting are skipped."""
        live = TAKEN["a completed row"].arrange(store, "live")
        for number in range(200):
            EXPIRED["an expired completed row"].arrange(store, f"key {number}")
        assert sum(crowd.race(purge_all, 10)) == 200
        assert store.purge(1000) == 0
        assert lookup(store, live).state is State.COMPLETED

    # Claiming.

    def test_a_fresh_key_is_granted_as_attempt_1(self, store: Store) -> None:
        """A key that has no row is claimed."""
        assert store.claim(make_claim()) == Claimed(1)

    def test_a_second_claim_gets_the_row_of_the_first(self, store: Store) -> None:
        """The record has every field, with times as the store's clock reads them."""
        first = make_claim(lease=30, lapse=HOLD, fingerprint=b"\x00\xff", fingerprint_version=2)
        store.claim(first)
        record = store.claim(make_claim(fingerprint=b"another payload"))
        assert isinstance(record, Record)
        assert 0 <= record.age < 10
        assert 20 < record.lease_left <= 30
        assert still(record) == Record(
            digest=first.digest,
            token=first.token,
            state=State.CLAIMED,
            fingerprint=b"\x00\xff",
            fingerprint_version=2,
            attempt=1,
            lapse=HOLD,
            lapsed=False,
            past_retention=False,
            age=0.0,
            lease_left=0.0,
            status=None,
            headers=(),
            body=None,
            not_replayable=None,
        )

    @each(RERUNNABLE | EXPIRED | TAKEN)
    def test_a_claim_returns_a_row_as_it_is(self, store: Store, situation: Situation) -> None:
        """A claim never overwrites: what has lapsed or expired is for a take-over."""
        owner = situation.arrange(store)
        before = still(store.lookup(owner.digest))
        answer = store.claim(make_claim(fingerprint=b"another payload", lapse=HOLD))
        assert isinstance(answer, Record)
        assert still(answer) == before
        assert still(store.lookup(owner.digest)) == before
        assert answer.token == owner.token

    @each(RERUNNABLE | EXPIRED | TAKEN)
    def test_a_record_says_what_the_row_means_now(self, store: Store, situation: Situation) -> None:
        """Lapsed and expired are what a row means, not what it stores."""
        record = lookup(store, situation.arrange(store))
        assert record.state is situation.settled
        assert record.lapse is situation.lapse
        assert record.past_retention is (situation.retention == AFTER)
        assert record.lapsed is (situation.settled is State.CLAIMED and situation.lease == OVER)
        assert record.expired is (situation in EXPIRED.values())

    def test_a_claim_repeated_with_its_own_token_is_granted_again(self, store: Store) -> None:
        """The answer to the first call may have been lost."""
        claim = make_claim()
        assert store.claim(claim) == store.claim(claim) == Claimed(1)

    @pytest.mark.parametrize("lapse", Lapse, ids=lambda lapse: f"that lapses to {lapse.value}")
    def test_a_lapsed_claim_that_nobody_took_is_granted_again(
        self, store: Store, lapse: Lapse
    ) -> None:
        """It carries the caller's own token."""
        claim = make_claim(lease=OVER, lapse=lapse)
        assert store.claim(claim) == store.claim(claim) == Claimed(1)

    @pytest.mark.parametrize("state", [State.COMPLETED, State.RELEASED, State.HELD])
    def test_a_settled_claim_is_not_granted_again(self, store: Store, state: State) -> None:
        """An operation that has ended is not run again because its own token asks."""
        claim = Situation(settled=state).arrange(store)
        answer = store.claim(claim)
        assert isinstance(answer, Record)
        assert answer.state is state

    def test_keys_with_other_digests_are_other_keys(self, store: Store) -> None:
        """The digest alone names a key; what is kept for people does not."""
        digests = [bytes(32), bytes(31) + b"\x01", b"\xff" * 32, b"\x01" + bytes(31)]
        for digest in digests:
            assert store.claim(make_claim(digest=digest)) == Claimed(1)
        assert {lookup(store, make_claim(digest=digest)).digest for digest in digests} == set(
            digests
        )

    def test_looking_up_claims_nothing(self, store: Store) -> None:
        """A key that has no row has none afterwards."""
        claim = make_claim()
        assert store.lookup(claim.digest) is None
        assert store.claim(claim) == Claimed(1)

    def test_looking_up_returns_what_a_claim_would(self, store: Store) -> None:
        """One reading of a row, whichever way it was fetched."""
        owner = TAKEN["a completed row"].arrange(store)
        assert still(store.lookup(owner.digest)) == still(
            store.claim(make_claim())  # type: ignore[arg-type]
        )

    def test_every_worker_sees_one_storage(self, store: Store, crowd: Crowd) -> None:
        """Records are shared by every process that serves the application."""
        claim = TAKEN["a completed row"].arrange(store)
        for record in crowd.race(look_up, claim.digest):
            assert still(record) == still(store.lookup(claim.digest))

    def test_another_store_object_settles_what_this_one_claimed(self, store: Store) -> None:
        """A claim belongs to its token, not to a connection."""
        claim = make_claim()
        store.claim(claim)
        other = self.open_store()
        assert other.complete(claim.digest, claim.token, DONE) is True
        other.close()
        assert lookup(store, claim).body == DONE.body

    @pytest.mark.parametrize(
        "text",
        [
            pytest.param("", id="empty"),
            pytest.param("a\x00b", id="with a NUL"),
            pytest.param("a\ud800b", id="with a lone surrogate"),
            pytest.param("\udcff\udcfe", id="undecodable bytes"),
            pytest.param("Zürich \N{PILE OF POO}", id="beyond ASCII"),
            pytest.param("'; DROP TABLE idempotency_keys; -- %s :x {0} \\", id="like SQL"),
            pytest.param("x" * 100_000, id="long"),
        ],
    )
    @pytest.mark.parametrize("field", ["scope", "key", "method", "path"])
    def test_no_text_for_people_stops_a_claim(self, store: Store, field: str, text: str) -> None:
        """What a client sends ends up there; it must not turn into an error."""
        claim = dataclasses.replace(make_claim(), **{field: text})  # type: ignore[arg-type]
        assert store.claim(claim) == Claimed(1)
        assert store.release(claim.digest, claim.token) is True
        heir = dataclasses.replace(claim, token=secrets.token_bytes(16))
        assert store.take_over(heir, lookup(store, claim)) == Claimed(2)
        assert lookup(store, heir).token == heir.token

    # Taking over.

    @each(RERUNNABLE)
    def test_a_row_free_to_run_again_is_taken_over_as_the_next_attempt(
        self, store: Store, situation: Situation
    ) -> None:
        """The row becomes the heir's, and the operation stays as old as it is."""
        owner = situation.arrange(store)
        until(lambda: lookup(store, owner).age > 0.1)
        heir = make_claim(lapse=HOLD, fingerprint=b"another", fingerprint_version=7)
        seen = lookup(store, owner)
        assert store.take_over(heir, seen) == Claimed(2)
        self.check_taken_over(store, heir, attempt=2)
        assert lookup(store, heir).age >= seen.age

    @each(EXPIRED)
    def test_an_expired_row_is_taken_over_as_a_fresh_key(
        self, store: Store, situation: Situation
    ) -> None:
        """It counts as absent: attempt 1, an age of its own, nothing left of its response."""
        owner = situation.arrange(store)
        until(lambda: lookup(store, owner).age > 0.1)
        heir = make_claim(lapse=HOLD, fingerprint=b"another", fingerprint_version=7)
        seen = lookup(store, owner)
        start = time.monotonic()
        assert store.take_over(heir, seen) == Claimed(1)
        self.check_taken_over(store, heir, attempt=1)
        assert lookup(store, heir).age < time.monotonic() - start + 0.05

    def check_taken_over(self, store: Store, heir: Claim, attempt: int) -> None:
        record = lookup(store, heir)
        assert heir.lease - 10 < record.lease_left <= heir.lease
        assert still(record) == Record(
            digest=heir.digest,
            token=heir.token,
            state=State.CLAIMED,
            fingerprint=heir.fingerprint,
            fingerprint_version=heir.fingerprint_version,
            attempt=attempt,
            lapse=heir.lapse,
            lapsed=False,
            past_retention=False,
            age=0.0,
            lease_left=0.0,
        )

    def test_attempts_count_up_until_the_row_expires(self, store: Store) -> None:
        """One more for each take-over, and 1 again once the row counts as absent."""
        claim = RELEASED.arrange(store)
        for attempt in (2, 3, 4):
            claim = make_claim(retention=AFTER if attempt == 4 else BEFORE)
            assert store.take_over(claim, lookup(store, claim)) == Claimed(attempt)
            assert store.release(claim.digest, claim.token) is True
        heir = make_claim()
        assert store.take_over(heir, lookup(store, heir)) == Claimed(1)
        assert lookup(store, heir).attempt == 1

    @each(TAKEN)
    def test_a_row_that_is_not_free_is_not_taken_over(
        self, store: Store, situation: Situation
    ) -> None:
        """In flight, held, lapsed with HOLD, or completed: refused, and nothing changes."""
        owner = situation.arrange(store)
        before = lookup(store, owner)
        assert store.take_over(make_claim(fingerprint=b"another"), before) is None
        assert still(store.lookup(owner.digest)) == still(before)

    @pytest.mark.parametrize(
        "pretence",
        [
            {"state": State.RELEASED},
            {"lapsed": True},
            {"past_retention": True, "lapsed": True},
            {"lapse": Lapse.RELEASE, "state": State.RELEASED, "past_retention": True},
        ],
        ids=["released", "lapsed", "expired", "released and expired"],
    )
    @each(TAKEN)
    def test_what_was_seen_does_not_make_a_row_free(
        self, store: Store, situation: Situation, pretence: dict[str, Any]
    ) -> None:
        """The row is judged as it is now, on the store's clock, not as it was seen."""
        owner = situation.arrange(store)
        before = lookup(store, owner)
        seen = dataclasses.replace(before, **pretence)
        assert store.take_over(make_claim(), seen) is None
        assert still(store.lookup(owner.digest)) == still(before)

    @each(RERUNNABLE | EXPIRED)
    def test_the_second_of_two_who_saw_the_same_row_is_refused(
        self, store: Store, situation: Situation
    ) -> None:
        """Granted only while the row carries the token that was seen."""
        owner = situation.arrange(store)
        seen = lookup(store, owner)
        first, second = make_claim(lease=OVER), make_claim()
        assert store.take_over(first, seen) is not None
        assert store.take_over(second, seen) is None
        assert lookup(store, first).token == first.token

    @each(RERUNNABLE | EXPIRED)
    def test_a_row_that_came_free_again_under_another_token_is_refused(
        self, store: Store, situation: Situation
    ) -> None:
        """The row looks as it was seen, but somebody has run the operation since."""
        owner = situation.arrange(store)
        seen = lookup(store, owner)
        between = make_claim(
            lease=situation.lease, retention=situation.retention, lapse=situation.lapse
        )
        assert store.take_over(between, seen) is not None
        settle(store, situation.settled, between)
        assert store.take_over(make_claim(), seen) is None
        assert lookup(store, owner).token == between.token

    def test_a_lease_renewed_since_it_was_seen_is_not_taken_over(self, store: Store) -> None:
        """The token is the same, but the row isn't free any more."""
        owner = LAPSED.arrange(store)
        seen = lookup(store, owner)
        assert store.renew([(owner.digest, owner.token, ALIVE)]) == {owner.token}
        assert store.take_over(make_claim(), seen) is None
        assert lookup(store, owner).token == owner.token

    @pytest.mark.parametrize("state", [State.COMPLETED, State.HELD])
    def test_a_lapsed_claim_settled_since_it_was_seen_is_not_taken_over(
        self, store: Store, state: State
    ) -> None:
        """The slow owner came back before the heir."""
        owner = LAPSED.arrange(store)
        seen = lookup(store, owner)
        settle(store, state, owner)
        assert store.take_over(make_claim(), seen) is None
        assert lookup(store, owner).state is state

    @pytest.mark.parametrize("gone", ["forgotten", "purged"])
    def test_a_row_gone_since_it_was_seen_is_claimed_afresh(self, store: Store, gone: str) -> None:
        """The take-over makes no row of its own; another claim does."""
        owner = EXPIRED["an expired lapsed row"].arrange(store)
        seen = lookup(store, owner)
        if gone == "forgotten":
            assert store.forget(owner.digest, owner.token) is True
        else:
            assert store.purge(10) == 1
        heir = make_claim()
        assert store.take_over(heir, seen) is None
        assert store.lookup(heir.digest) is None
        assert store.claim(heir) == Claimed(1)

    def test_a_take_over_gets_the_new_claims_retention(self, store: Store) -> None:
        """``expires_at`` starts again with the claim, whichever way it moves."""
        owner = RELEASED.arrange(store)
        brief = make_claim(lease=OVER, retention=AFTER)
        assert store.take_over(brief, lookup(store, owner)) is not None
        assert lookup(store, brief).past_retention is True
        assert lookup(store, brief).lapsed is True
        lasting = make_claim()
        assert store.take_over(lasting, lookup(store, brief)) is not None
        assert lookup(store, lasting).past_retention is False
        assert lookup(store, lasting).lapsed is False

    def test_a_take_over_leaves_other_keys_alone(self, store: Store) -> None:
        """Even a row whose token is the one that was seen."""
        token = secrets.token_bytes(16)
        for name in ("a key", "another key"):
            store.claim(make_claim(name, token=token, lease=OVER))
        heir = make_claim("a key")
        assert store.take_over(heir, lookup(store, heir)) == Claimed(2)
        assert lookup(store, make_claim("another key")).token == token

    # Settling.

    @pytest.mark.parametrize(
        "body",
        [
            pytest.param(b"", id="empty"),
            pytest.param(b"\x00", id="one NUL"),
            pytest.param(b"a\x00b\xff\xfe\r\n\\x00'\"%s", id="NUL, 0xFF and what looks like SQL"),
            pytest.param(bytes(range(256)) * 4096, id="1 MB of every byte"),
            pytest.param(bytes(range(255, -1, -1)) * 40960, id="10 MB of every byte"),
        ],
    )
    def test_a_body_is_kept_byte_for_byte(self, store: Store, body: bytes) -> None:
        """What is stored is what was sent."""
        claim = make_claim()
        store.claim(claim)
        assert store.complete(claim.digest, claim.token, Completion("200 OK", (), body)) is True
        for record in (store.lookup(claim.digest), store.claim(make_claim())):
            assert isinstance(record, Record)
            assert (record.body == body) is True  # not explained: it would print 10 MB

    @pytest.mark.parametrize(
        "headers",
        [
            pytest.param((), id="none"),
            pytest.param(
                (("Link", "</2>"), ("ETag", '"a"'), ("Link", "</1>"), ("Link", "</2>")),
                id="in order, with duplicates",
            ),
            pytest.param((("x-lower", "A"), ("X-LOWER", "a"), ("X-Lower", " ")), id="in any case"),
            pytest.param((("X-Empty", ""), ("X-Quotes", "\"\\'\t{}%s:x")), id="hard to quote"),
            pytest.param(
                (("X-Latin-1", "".join(map(chr, [*range(32, 127), *range(128, 256)]))),),
                id="of every latin-1 character",
            ),
            pytest.param(tuple((f"X-{n}", "v" * 100) for n in range(1000)), id="a thousand"),
        ],
    )
    def test_headers_are_kept_in_order_with_duplicates_and_case(
        self, store: Store, headers: tuple[tuple[str, str], ...]
    ) -> None:
        """What is stored is what was sent."""
        claim = make_claim()
        store.claim(claim)
        store.complete(claim.digest, claim.token, Completion("200 OK", headers, b""))
        assert lookup(store, claim).headers == headers

    @pytest.mark.parametrize(
        "status", ["201 Made It", "204 ", "299 Tr\xe8s bien", "303 See 'Other'"]
    )
    def test_a_status_line_is_kept_with_its_reason(self, store: Store, status: str) -> None:
        """What is stored is what was sent."""
        claim = make_claim()
        store.claim(claim)
        store.complete(claim.digest, claim.token, Completion(status, (), b""))
        assert lookup(store, claim).status == status

    def test_a_completion_is_all_that_completing_changes(self, store: Store) -> None:
        """The row keeps its token, attempt and payload."""
        claim = make_claim()
        store.claim(claim)
        before = lookup(store, claim)
        assert store.complete(claim.digest, claim.token, DONE) is True
        assert still(store.lookup(claim.digest)) == dataclasses.replace(
            before,
            state=State.COMPLETED,
            age=0.0,
            lease_left=0.0,
            status=DONE.status,
            headers=DONE.headers,
            body=DONE.body,
        )

    def test_a_response_that_cant_be_replayed_counts_as_done(self, store: Store) -> None:
        """There is a reason in place of the body."""
        claim = make_claim()
        store.claim(claim)
        streamed = Completion("200 OK", (("Location", "/1"),), None, not_replayable="streamed")
        assert store.complete(claim.digest, claim.token, streamed) is True
        record = lookup(store, claim)
        assert record.state is State.COMPLETED
        assert (record.status, record.headers) == ("200 OK", (("Location", "/1"),))
        assert (record.body, record.not_replayable) == (None, "streamed")

    @pytest.mark.parametrize("lapse", Lapse, ids=lambda lapse: f"that lapses to {lapse.value}")
    @pytest.mark.parametrize("retention", [BEFORE, AFTER], ids=["within", "past"])
    def test_a_lapsed_claim_that_nobody_took_can_still_complete(
        self, store: Store, lapse: Lapse, retention: float
    ) -> None:
        """The operation was done, and only late."""
        claim = make_claim(lease=OVER, retention=retention, lapse=lapse)
        store.claim(claim)
        assert store.complete(claim.digest, claim.token, DONE) is True
        assert lookup(store, claim).body == DONE.body

    @pytest.mark.parametrize("retention", [BEFORE, AFTER], ids=["within", "past"])
    def test_a_held_claim_can_still_complete(self, store: Store, retention: float) -> None:
        """A worker that was only slow knows best, until somebody has resolved its row."""
        claim = Situation(lease=OVER, retention=retention, settled=State.HELD).arrange(store)
        assert store.complete(claim.digest, claim.token, DONE) is True
        record = lookup(store, claim)
        assert (record.state, record.body) == (State.COMPLETED, DONE.body)
        assert record.past_retention is (retention == AFTER)

    @pytest.mark.parametrize("retention", [BEFORE, AFTER], ids=["within", "past"])
    def test_a_held_claim_can_still_be_released(self, store: Store, retention: float) -> None:
        """A worker that was only slow has failed, and its policy lets a retry run."""
        claim = Situation(lease=OVER, retention=retention, settled=State.HELD).arrange(store)
        assert store.release(claim.digest, claim.token) is True
        assert lookup(store, claim).state is State.RELEASED
        assert isinstance(acquire(store, make_claim()), Claimed)

    @pytest.mark.parametrize("retention", [BEFORE, AFTER], ids=["within", "past"])
    def test_a_held_claim_can_still_be_forgotten(self, store: Store, retention: float) -> None:
        """A worker that was only slow knows that nothing happened."""
        claim = Situation(lease=OVER, retention=retention, settled=State.HELD).arrange(store)
        assert store.forget(claim.digest, claim.token) is True
        assert store.lookup(claim.digest) is None
        assert store.claim(make_claim(fingerprint=b"another")) == Claimed(1)

    @pytest.mark.parametrize("retention", [BEFORE, AFTER], ids=["within", "past"])
    def test_completing_moves_no_expiry(self, store: Store, retention: float) -> None:
        """``expires_at`` is set once, at the claim."""
        claim = Situation(retention=retention, settled=State.COMPLETED).arrange(store)
        assert lookup(store, claim).expired is (retention == AFTER)

    def test_a_completion_stays_recorded_when_it_is_sent_again(self, store: Store) -> None:
        """The answer to the first call may have been lost."""
        claim = make_claim()
        store.claim(claim)
        assert store.complete(claim.digest, claim.token, DONE) is True
        once = still(store.lookup(claim.digest))
        assert store.complete(claim.digest, claim.token, DONE) is True
        assert still(store.lookup(claim.digest)) == once

    def test_a_released_row_is_kept_for_its_payload(self, store: Store) -> None:
        """The same request may run again; a different one can still be told apart."""
        claim = make_claim(fingerprint=b"the payload", fingerprint_version=3)
        store.claim(claim)
        assert store.release(claim.digest, claim.token) is True
        record = lookup(store, claim)
        assert (record.state, record.lapsed) == (State.RELEASED, False)
        assert (record.fingerprint, record.fingerprint_version) == (b"the payload", 3)

    def test_a_forgotten_key_is_fresh(self, store: Store) -> None:
        """The row is dropped, and another payload may have the key."""
        claim = make_claim()
        store.claim(claim)
        assert store.forget(claim.digest, claim.token) is True
        assert store.lookup(claim.digest) is None
        assert store.claim(make_claim(fingerprint=b"another")) == Claimed(1)

    def test_a_held_row_keeps_everybody_out(self, store: Store) -> None:
        """Nobody runs the operation until it is resolved."""
        claim = make_claim(lease=OVER, retention=AFTER)
        store.claim(claim)
        assert store.hold(claim.digest, claim.token) is True
        assert lookup(store, claim).state is State.HELD
        assert isinstance(acquire(store, make_claim()), Record)
        assert store.purge(10) == 0

    @pytest.mark.parametrize("way", ["release", "hold"])
    def test_a_settlement_sent_again_stands(self, store: Store, way: str) -> None:
        """The answer to the first call may have been lost."""
        claim = make_claim()
        store.claim(claim)
        assert SETTLEMENTS[way](store, claim.digest, claim.token) is True
        once = still(store.lookup(claim.digest))
        assert SETTLEMENTS[way](store, claim.digest, claim.token) is True
        assert still(store.lookup(claim.digest)) == once

    def test_forgetting_again_does_no_harm(self, store: Store) -> None:
        """The answer to the first call may have been lost; somebody else may have the key."""
        claim = make_claim()
        store.claim(claim)
        store.forget(claim.digest, claim.token)
        assert store.forget(claim.digest, claim.token) is False
        heir = make_claim()
        assert store.claim(heir) == Claimed(1)
        assert store.forget(claim.digest, claim.token) is False
        assert lookup(store, heir).token == heir.token

    def test_a_take_over_sent_again_is_still_the_callers(self, store: Store) -> None:
        """Refused or not, the caller's next claim finds its own token."""
        owner = RELEASED.arrange(store)
        seen = lookup(store, owner)
        heir = make_claim()
        assert store.take_over(heir, seen) == Claimed(2)
        assert store.take_over(heir, seen) in (None, Claimed(2))
        assert store.claim(heir) == Claimed(2)

    @each_settlement
    @each(RERUNNABLE | EXPIRED)
    def test_a_claim_that_was_taken_over_settles_nothing(
        self, store: Store, situation: Situation, ending: Callable[[Store, bytes, bytes], bool]
    ) -> None:
        """A worker that was only slow can't overwrite its successor."""
        owner = situation.arrange(store)
        heir = make_claim()
        assert store.take_over(heir, lookup(store, owner)) is not None
        before = still(store.lookup(heir.digest))
        assert ending(store, owner.digest, owner.token) is False
        assert still(store.lookup(heir.digest)) == before

    @each_settlement
    @each(RERUNNABLE | EXPIRED | TAKEN)
    def test_somebody_elses_token_settles_nothing(
        self, store: Store, situation: Situation, ending: Callable[[Store, bytes, bytes], bool]
    ) -> None:
        """Whatever state the row is in."""
        owner = situation.arrange(store)
        before = still(store.lookup(owner.digest))
        assert ending(store, owner.digest, secrets.token_bytes(16)) is False
        assert still(store.lookup(owner.digest)) == before

    @each_settlement
    def test_a_key_without_a_row_is_not_settled(
        self, store: Store, ending: Callable[[Store, bytes, bytes], bool]
    ) -> None:
        """Nor does it get a row."""
        claim = make_claim()
        assert ending(store, claim.digest, claim.token) is False
        assert store.lookup(claim.digest) is None

    @pytest.mark.parametrize(
        ("state", "way"),
        [
            (state, way)
            for state, same in {State.COMPLETED: "complete", State.RELEASED: "release"}.items()
            for way in SETTLEMENTS
            if way != same
        ],
    )
    def test_a_claim_that_was_settled_one_way_is_not_settled_another(
        self, store: Store, state: State, way: str
    ) -> None:
        """There is no claim left: what is finished stays so."""
        claim = Situation(settled=state).arrange(store)
        before = still(store.lookup(claim.digest))
        assert SETTLEMENTS[way](store, claim.digest, claim.token) is False
        assert still(store.lookup(claim.digest)) == before

    @each_settlement
    def test_settling_one_key_leaves_the_others_alone(
        self, store: Store, ending: Callable[[Store, bytes, bytes], bool]
    ) -> None:
        """Even a row that carries the same token."""
        token = secrets.token_bytes(16)
        one, other = make_claim("one", token=token), make_claim("other", token=token)
        store.claim(one)
        store.claim(other)
        before = still(store.lookup(other.digest))
        assert ending(store, one.digest, token) is True
        assert still(store.lookup(other.digest)) == before

    # Leases.

    def test_many_leases_are_renewed_at_once_each_by_its_own_length(self, store: Store) -> None:
        """Those that hold their claim are named; the others have lost it."""
        mine = [make_claim(f"mine {number}") for number in range(300)]
        lost, heir = LAPSED.arrange(store, "lost"), make_claim("lost", lease=30)
        store.take_over(heir, lookup(store, lost))
        gone = make_claim("never claimed")
        for claim in mine:
            store.claim(claim)
        leases = [(claim.digest, claim.token, 1000.0 + n) for n, claim in enumerate(mine)]
        more = [(lost.digest, lost.token, 5000.0), (gone.digest, gone.token, 5000.0)]
        assert store.renew(leases + more) == {claim.token for claim in mine}
        for number, claim in enumerate(mine):
            assert 990 + number < lookup(store, claim).lease_left <= 1000 + number
        assert lookup(store, heir).lease_left <= 30
        assert store.lookup(gone.digest) is None

    def test_a_lease_can_be_renewed_to_a_shorter_one(self, store: Store) -> None:
        """The new lease counts from now, whatever was left of the old one."""
        claim = make_claim(lease=1000)
        store.claim(claim)
        assert store.renew([(claim.digest, claim.token, OVER)]) == {claim.token}
        assert lookup(store, claim).lapsed is True

    @pytest.mark.parametrize("many", [list, tuple, set, iter], ids=lambda many: many.__name__)
    def test_any_iterable_of_claims_is_renewed(
        self, store: Store, many: Callable[..., Any]
    ) -> None:
        """A generator too, which can be gone through only once."""
        claim = make_claim()
        store.claim(claim)
        assert store.renew(many([(claim.digest, claim.token, 500.0)])) == {claim.token}
        assert lookup(store, claim).lease_left > 400

    def test_no_claims_are_renewed_without_a_fuss(self, store: Store) -> None:
        """A heartbeat may find nothing to do."""
        assert store.renew([]) == set()

    def test_a_token_renews_only_its_own_key(self, store: Store) -> None:
        """Digest and token are matched in pairs."""
        one, other = make_claim("one"), make_claim("other")
        store.claim(one)
        store.claim(other)
        crossed = [(one.digest, other.token, 500.0), (other.digest, one.token, 500.0)]
        assert store.renew(crossed) == set()
        assert lookup(store, one).lease_left <= ALIVE
        assert lookup(store, other).lease_left <= ALIVE

    @each(
        {"a lapsed row": LAPSED, **{name: row for name, row in TAKEN.items() if "lapsed" in name}}
    )
    def test_renewing_revives_a_lapsed_claim(self, store: Store, situation: Situation) -> None:
        """Nobody took it over, so it is still the caller's."""
        claim = situation.arrange(store)
        assert store.renew([(claim.digest, claim.token, ALIVE)]) == {claim.token}
        record = lookup(store, claim)
        assert (record.lapsed, record.state) == (False, State.CLAIMED)
        assert record.past_retention is (situation.retention == AFTER)
        assert store.take_over(make_claim(), record) is None

    def test_a_held_claim_is_its_workers_and_stays_held(self, store: Store) -> None:
        """It has not been lost, though a renewal, which may come after the worker's own HOLD,
        opens nothing. Whoever wants to look into it is told to wait."""
        claim = Situation(lease=OVER, settled=State.HELD).arrange(store)
        for lease, left in ((5000.0, 5000), (OVER, 5000), (6000.0, 6000)):
            assert store.renew([(claim.digest, claim.token, lease)]) == {claim.token}
            record = lookup(store, claim)
            assert (record.state, record.lapsed) == (State.HELD, False)
            assert left - 60 < record.lease_left <= left

    @pytest.mark.parametrize("state", [State.COMPLETED, State.RELEASED])
    def test_a_settled_claim_is_not_renewed(self, store: Store, state: State) -> None:
        """There is no claim left to hold, and nothing changes."""
        claim = Situation(settled=state).arrange(store)
        assert store.renew([(claim.digest, claim.token, 5000.0)]) == set()
        record = lookup(store, claim)
        assert record.state is state
        assert record.lease_left <= ALIVE

    # Time.

    def test_a_lease_and_an_age_go_by_on_the_stores_clock(self, store: Store) -> None:
        """A claim lapses by itself, and may be taken over as soon as it has."""
        claim = make_claim(lease=0.2)
        store.claim(claim)
        first = lookup(store, claim)
        until(lambda: lookup(store, claim).age > max(0.2, first.age))
        last = lookup(store, claim)
        assert last.lapsed is True
        assert last.lease_left <= 0 <= first.age < last.age
        assert last.age - first.age == pytest.approx(first.lease_left - last.lease_left, abs=0.05)
        assert store.take_over(make_claim(), last) == Claimed(2)

    def test_a_retention_goes_by_on_the_stores_clock(self, store: Store) -> None:
        """A completed row expires by itself, and counts as absent as soon as it has."""
        claim = make_claim(retention=0.2)
        store.claim(claim)
        store.complete(claim.digest, claim.token, DONE)
        until(lambda: lookup(store, claim).age > 0.2)
        assert lookup(store, claim).expired is True
        assert store.take_over(make_claim(), lookup(store, claim)) == Claimed(1)

    @pytest.mark.parametrize("hours", [-1, 1], ids=["slow", "fast"])
    def test_a_caller_whose_clock_is_an_hour_wrong_changes_nothing(
        self, store: Store, hours: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The store's own clock decides what has lapsed or expired."""
        mine, true_time = make_claim("mine"), time.time
        theirs = TAKEN["a completed row"].arrange(store, "theirs")
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: true_time() + 3600 * hours)
            store.claim(mine)
            assert store.renew([(mine.digest, mine.token, 30.0)]) == {mine.token}
            assert store.take_over(make_claim("theirs"), lookup(store, theirs)) is None
            assert store.purge(10) == 0
            self.check_fresh(lookup(store, mine))
            self.check_fresh(lookup(store, theirs))
        self.check_fresh(lookup(store, mine))
        assert store.purge(10) == 0

    def check_fresh(self, record: Record) -> None:
        assert (record.lapsed, record.expired) == (False, False)
        assert 0 <= record.age < 20
        assert 0 < record.lease_left <= ALIVE

    # Purging.

    @each(EXPIRED)
    def test_a_purge_deletes_what_has_expired(self, store: Store, situation: Situation) -> None:
        """It is counted, and the key is fresh."""
        claim = situation.arrange(store)
        assert store.purge(10) == 1
        assert store.lookup(claim.digest) is None
        assert store.claim(make_claim()) == Claimed(1)

    @each(RERUNNABLE | TAKEN)
    def test_a_purge_spares_what_has_not(self, store: Store, situation: Situation) -> None:
        """Never a row before its ``expires_at``, in flight, or held."""
        claim = situation.arrange(store)
        before = still(store.lookup(claim.digest))
        assert store.purge(10) == 0
        assert still(store.lookup(claim.digest)) == before

    def test_a_purge_deletes_the_oldest_up_to_its_limit(self, store: Store) -> None:
        """Less than the limit means that there is no more to do."""
        since = {20: "b", 50: "e", 10: "a", 40: "d", 30: "c"}
        for seconds, name in since.items():
            Situation(retention=-seconds, settled=State.COMPLETED).arrange(store, name)
        for name in ("in flight", "held"):
            TAKEN[f"a {name} row" if name == "held" else f"a row {name}"].arrange(store, name)
        left = []
        for expected in (2, 2, 1, 0):
            assert store.purge(2) == expected
            left.append(
                "".join(n for n in "abcde" if store.lookup(make_claim(n).digest) is not None)
            )
        assert left == ["abc", "a", "", ""]

    def test_rows_that_may_not_go_dont_use_up_the_limit(self, store: Store) -> None:
        """However many there are, and however long ago they were due."""
        for number in range(5):
            held = make_claim(f"held {number}", retention=-100)
            store.claim(held)
            store.hold(held.digest, held.token)
            store.claim(make_claim(f"in flight {number}", retention=-100))
            store.claim(make_claim(f"lapsed {number}", lease=OVER, retention=-100, lapse=HOLD))
        EXPIRED["an expired completed row"].arrange(store)
        assert store.purge(1) == 1
        assert store.purge(1) == 0

    @pytest.mark.parametrize("limit", [0, -1])
    def test_a_purge_of_no_rows_is_refused(self, store: Store, limit: int) -> None:
        """Rather than taken for all of them, or none."""
        claim = EXPIRED["an expired completed row"].arrange(store)
        with pytest.raises(ValueError, match=str(limit)):
            store.purge(limit)
        assert store.lookup(claim.digest) is not None

    def test_an_empty_store_has_nothing_to_purge(self, store: Store) -> None:
        """Which is no error."""
        assert store.purge(10) == 0

    # Steps, where a store has them.

    @pytest.fixture
    def steps(self, store: Store) -> StepStore:
        if not isinstance(store, StepStore):
            pytest.skip("this store has no steps")
        return store

    def test_a_step_is_known_once_it_is_recorded(self, steps: StepStore) -> None:
        """By its name, and for its operation alone."""
        claim, other = Situation().arrange(steps), Situation().arrange(steps, "another key")
        assert steps.step(claim.digest, claim.token, "charge") == Step(None)
        assert steps.record_step(claim.digest, claim.token, "charge", '"ch_1"') is True
        assert steps.step(claim.digest, claim.token, "charge") == Step('"ch_1"')
        assert steps.step(claim.digest, claim.token, "Charge") == Step(None)
        assert steps.step(other.digest, other.token, "charge") == Step(None)

    def test_every_step_of_an_operation_is_known(self, steps: StepStore) -> None:
        """Results of any length keep their text."""
        claim = Situation().arrange(steps)
        results = {f"step {n}": f'"{"x" * n * 1000}"' for n in range(20)}
        for name, result in results.items():
            assert steps.record_step(claim.digest, claim.token, name, result) is True
        for name, result in results.items():
            assert steps.step(claim.digest, claim.token, name) == Step(result)

    def test_a_step_recorded_again_stands(self, steps: StepStore) -> None:
        """The answer to the first call may have been lost."""
        claim = Situation().arrange(steps)
        for _ in range(2):
            assert steps.record_step(claim.digest, claim.token, "charge", "1") is True
        assert steps.step(claim.digest, claim.token, "charge") == Step("1")

    @each(RERUNNABLE)
    def test_a_take_over_finds_the_steps_of_its_operation(
        self, steps: StepStore, situation: Situation
    ) -> None:
        """And goes on after the last that was finished."""
        owner = make_claim(lease=situation.lease, lapse=situation.lapse)
        steps.claim(owner)
        assert steps.record_step(owner.digest, owner.token, "reserve", "1") is True
        settle(steps, situation.settled, owner)
        heir = make_claim()
        assert steps.take_over(heir, lookup(steps, owner)) == Claimed(2)
        assert steps.step(heir.digest, heir.token, "reserve") == Step("1")
        assert steps.step(heir.digest, heir.token, "charge") == Step(None)
        assert steps.record_step(heir.digest, heir.token, "charge", "2") is True

    @each(EXPIRED)
    def test_an_expired_row_claimed_anew_has_no_steps(
        self, steps: StepStore, situation: Situation
    ) -> None:
        """It is another operation, whose step of the same name is its own."""
        owner = make_claim(
            lease=situation.lease, retention=situation.retention, lapse=situation.lapse
        )
        steps.claim(owner)
        assert steps.record_step(owner.digest, owner.token, "charge", "1") is True
        settle(steps, situation.settled, owner)
        heir = make_claim()
        assert steps.take_over(heir, lookup(steps, owner)) == Claimed(1)
        assert steps.step(heir.digest, heir.token, "charge") == Step(None)
        assert steps.record_step(heir.digest, heir.token, "charge", "2") is True
        assert steps.step(heir.digest, heir.token, "charge") == Step("2")

    @pytest.mark.parametrize("gone", ["forgotten", "purged"])
    def test_steps_go_with_the_row(self, steps: StepStore, gone: str) -> None:
        """Whoever claims the key next has none."""
        owner = make_claim(retention=BEFORE if gone == "forgotten" else AFTER)
        steps.claim(owner)
        assert steps.record_step(owner.digest, owner.token, "charge", "1") is True
        if gone == "forgotten":
            assert steps.forget(owner.digest, owner.token) is True
        else:
            assert steps.complete(owner.digest, owner.token, DONE) is True
            assert steps.purge(10) == 1
        heir = make_claim()
        assert steps.claim(heir) == Claimed(1)
        assert steps.step(heir.digest, heir.token, "charge") == Step(None)

    @each(RERUNNABLE | EXPIRED)
    def test_a_claim_that_was_taken_over_records_no_step(
        self, steps: StepStore, situation: Situation
    ) -> None:
        """Nor is it told what its successor has recorded."""
        owner = situation.arrange(steps)
        heir = make_claim()
        assert steps.take_over(heir, lookup(steps, owner)) is not None
        assert steps.step(owner.digest, owner.token, "charge") is None
        assert steps.record_step(owner.digest, owner.token, "charge", "1") is False
        assert steps.step(heir.digest, heir.token, "charge") == Step(None)
        assert steps.record_step(heir.digest, heir.token, "charge", "2") is True
        assert steps.record_step(owner.digest, owner.token, "charge", "1") is False
        assert steps.step(heir.digest, heir.token, "charge") == Step("2")

    def test_a_lapsed_claim_that_nobody_took_still_has_steps(self, steps: StepStore) -> None:
        """A worker that was only slow goes on."""
        owner = LAPSED.arrange(steps)
        assert steps.step(owner.digest, owner.token, "charge") == Step(None)
        assert steps.record_step(owner.digest, owner.token, "charge", "1") is True

    def test_a_held_claim_begins_no_step_and_records_one_that_has_run(
        self, steps: StepStore
    ) -> None:
        """Whatever is decided about it, that this has happened is worth knowing."""
        owner = Situation(settled=State.HELD).arrange(steps)
        assert steps.step(owner.digest, owner.token, "charge") is None
        assert steps.record_step(owner.digest, owner.token, "charge", "1") is True

    @pytest.mark.parametrize("state", [State.RELEASED, State.COMPLETED])
    def test_a_settled_claim_has_no_steps_to_record(self, steps: StepStore, state: State) -> None:
        """Its operation is over for its worker."""
        owner = Situation(settled=state).arrange(steps)
        assert steps.step(owner.digest, owner.token, "charge") is None
        assert steps.record_step(owner.digest, owner.token, "charge", "1") is False

    def test_a_key_without_a_row_has_no_steps(self, steps: StepStore) -> None:
        """Nor does it get any."""
        claim = make_claim()
        assert steps.step(claim.digest, claim.token, "charge") is None
        assert steps.record_step(claim.digest, claim.token, "charge", "1") is False

    def test_either_a_step_is_recorded_before_a_take_over_or_not_at_all(
        self, steps: StepStore, crowd: Crowd
    ) -> None:
        """Whoever takes over finds every step that its predecessor was told is recorded."""
        owners = [LAPSED.arrange(steps, f"key {n}") for n in range(40)]
        answers = crowd.race(step_against_heir, [(owner.key, owner.token) for owner in owners])
        for owner, *told in zip(owners, *answers, strict=True):
            heirs = [answer for answer in told if isinstance(answer, Step)]
            assert len(heirs) == 1, "one takes over"
            recorded = True in told
            assert heirs == [Step("1" if recorded else None)], owner.key

    # The life of a store.

    def test_a_store_in_order_passes_its_check(self, store: Store) -> None:
        """At deploy time, before any request."""
        store.check()

    def test_a_store_may_be_used_after_it_was_closed(self, store: Store) -> None:
        """And its records are still there."""
        claim = make_claim()
        store.claim(claim)
        store.close()
        assert lookup(store, claim).token == claim.token
        assert store.complete(claim.digest, claim.token, DONE) is True
        store.close()
        store.close()
        assert lookup(store, claim).body == DONE.body

    @pytest.mark.parametrize("used", [True, False], ids=["used", "only constructed"])
    def test_a_store_works_on_both_sides_of_a_fork(self, crowd: Crowd, used: bool) -> None:
        """Servers fork their workers after the application was built."""
        child_status, parents, childs = crowd.alone(fork_and_use, used)
        assert child_status == 0
        assert parents == [True] * 20
        assert (childs is not None) is (self.process_store is not None)

    def test_a_store_that_cant_be_reached_says_so_in_bounded_time(self) -> None:
        """Every method but close() raises StoreUnavailable."""
        store = self.unreachable_store()
        if store is None:
            pytest.skip("this store can always be reached")
        reachable = MemoryStore()
        claim = RELEASED.arrange(reachable)
        seen = lookup(reachable, claim)
        calls: list[Callable[[], object]] = [
            store.check,
            lambda: store.claim(claim),
            lambda: store.take_over(make_claim(), seen),
            lambda: store.lookup(claim.digest),
            lambda: store.renew([(claim.digest, claim.token, ALIVE)]),
            lambda: store.purge(10),
            *(
                lambda ending=ending: ending(store, claim.digest, claim.token)
                for ending in SETTLEMENTS.values()
            ),
        ]
        if isinstance(store, StepStore):
            steps: StepStore = store
            calls.append(lambda: steps.step(claim.digest, claim.token, "charge"))
            calls.append(lambda: steps.record_step(claim.digest, claim.token, "charge", "1"))
        for call in calls:
            start = time.monotonic()
            with pytest.raises(StoreUnavailable):
                call()
            assert time.monotonic() - start < 15
        store.close()


class TransactionalConformance:
    """What :class:`~wsgi_idempotency.stores.base.TransactionalStore` promises; a store that has
    transactions inherits this beside :class:`StoreConformance`.

    Override :meth:`kill` if its connections are not SQLAlchemy's.
    """

    @pytest.fixture
    def transactional(self, store: Store) -> TransactionalStore:
        """The store, known to have transactions."""
        assert isinstance(store, TransactionalStore)
        return store

    def kill(self, transaction: Transaction) -> None:
        """End a transaction's connection as a worker's death does; by default by closing the
        driver's."""
        transaction.connection.connection.driver_connection.close()

    def test_a_fresh_key_is_granted_in_its_transaction(
        self, transactional: TransactionalStore
    ) -> None:
        with begun(transactional, make_claim()) as transaction:
            assert transaction.claimed == Claimed(attempt=1)
            assert transaction.seen is None

    def test_nobody_else_may_claim_while_a_transaction_has_the_key(
        self, transactional: TransactionalStore
    ) -> None:
        """None, or on a store of one writer at a time StoreUnavailable."""
        with begun(transactional, make_claim()):
            second = None
            with suppress(StoreUnavailable):
                second = transactional.begin(make_claim(token=b"2" * 16))
            assert second is None

    def test_a_completion_is_committed_with_its_response(
        self, transactional: TransactionalStore
    ) -> None:
        claim = make_claim()
        with begun(transactional, claim) as transaction:
            transaction.complete(DONE)
        record = lookup(transactional, claim)
        assert (record.state, record.token) == (State.COMPLETED, claim.token)
        assert (record.status, record.headers, record.body) == (
            DONE.status,
            DONE.headers,
            DONE.body,
        )
        assert_seen(transactional, make_claim(token=b"2" * 16), record)

    def test_a_rollback_leaves_nothing_and_frees_the_key(
        self, transactional: TransactionalStore
    ) -> None:
        claim = make_claim()
        with begun(transactional, claim) as transaction:
            transaction.rollback()
            transaction.rollback()
            assert transactional.lookup(claim.digest) is None
        with begun(transactional, make_claim(token=b"2" * 16)) as second:
            assert second.claimed == Claimed(attempt=1)

    def test_a_dead_connection_frees_the_key(self, transactional: TransactionalStore) -> None:
        claim = make_claim()
        with begun(transactional, claim) as transaction:
            self.kill(transaction)
            until(lambda: transactional.lookup(claim.digest) is None)
            second = None
            deadline = time.monotonic() + 10
            while second is None and time.monotonic() < deadline:
                second = transactional.begin(make_claim(token=b"2" * 16), wait=1.0)
            assert second is not None
            assert second.claimed == Claimed(attempt=1)
            second.rollback()

    def test_what_is_lost_before_the_commit_is_not_recorded(
        self, transactional: TransactionalStore
    ) -> None:
        claim = make_claim()
        with begun(transactional, claim) as transaction:
            self.kill(transaction)
            with pytest.raises(StoreUnavailable):
                transaction.complete(DONE)
        assert transactional.lookup(claim.digest) is None

    def test_another_payload_is_seen_as_such(self, transactional: TransactionalStore) -> None:
        claim = make_claim()
        with begun(transactional, claim) as transaction:
            transaction.complete(DONE)
        with begun(transactional, make_claim(token=b"2" * 16, fingerprint=b"other")) as second:
            assert second.claimed is None
            assert second.seen is not None
            assert second.seen.fingerprint == claim.fingerprint

    @each(RERUNNABLE | EXPIRED)
    def test_a_row_that_is_free_is_taken_over_or_left_as_it_was(
        self, transactional: TransactionalStore, situation: Situation
    ) -> None:
        owner = situation.arrange(transactional)
        before = lookup(transactional, owner)
        for ends in ("rollback", "complete"):
            heir = make_claim(token=secrets.token_bytes(16))
            with begun(transactional, heir) as transaction:
                assert transaction.seen is not None
                assert transaction.take_over(heir, transaction.seen) is not None
                if ends == "complete":
                    transaction.complete(DONE)
            after = lookup(transactional, owner)
            if ends == "rollback":
                assert (after.state, after.token) == (before.state, before.token)
            else:
                assert (after.state, after.token) == (State.COMPLETED, heir.token)


@contextmanager
def begun(store: TransactionalStore, claim: Claim) -> Iterator[Transaction]:
    """A transaction that is over at the end, whatever happens."""
    transaction = store.begin(claim)
    assert transaction is not None
    try:
        yield transaction
    finally:
        transaction.rollback()


def assert_seen(store: TransactionalStore, claim: Claim, record: Record) -> None:
    with begun(store, claim) as transaction:
        assert transaction.claimed is None
        assert still(transaction.seen) == still(record)


def the_one(answers: tuple[Claimed | Record, ...]) -> int:
    """The worker whose claim was granted, of all the answers for one key."""
    winners = [worker for worker, answer in enumerate(answers) if isinstance(answer, Claimed)]
    assert len(winners) == 1, f"{len(winners)} workers hold the key"
    return winners[0]


def assert_one_is_granted(race: list[list[Claimed | Record]], granted: Claimed) -> None:
    """Of all workers' answers for each key, one is a grant, and it is this one."""
    for answers in zip(*race, strict=True):
        assert answers[the_one(answers)] == granted


class Hammer:
    """Threads that win one key and end their claims in every way, over and over."""

    turns = 8

    def __init__(self, store: Store) -> None:
        self.store = store
        self.grants: Counter[int] = Counter()
        self.holder: int | None = None
        self.next_attempt = 1

    def swing(self, number: int) -> None:
        dice = random.Random(number)
        deadline = time.monotonic() + PATIENCE
        while self.grants[number] < self.turns:
            assert time.monotonic() < deadline, "starved"
            ending = dice.choice(["complete", "release", "forget"])
            claim = make_claim(retention=AFTER if ending == "complete" else BEFORE)
            answer = acquire(self.store, claim)
            if isinstance(answer, Claimed):
                self.hold(number, answer)
                self.next_attempt = answer.attempt + 1 if ending == "release" else 1
                self.holder = None
                assert SETTLEMENTS[ending](self.store, claim.digest, claim.token) is True

    def hold(self, number: int, granted: Claimed) -> None:
        assert self.holder is None, f"{number} and {self.holder} hold the key together"
        self.holder = number
        assert granted.attempt == self.next_attempt
        self.grants[number] += 1
        time.sleep(0)  # let another thread in, if it can get in
        assert self.holder == number, f"{number} and {self.holder} hold the key together"
