"""The heartbeat: claims are kept alive, and what could not be finished is finished late."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import uuid

import pytest

from wsgi_idempotency import MemoryStore, lease
from wsgi_idempotency.errors import StoreUnavailable
from wsgi_idempotency.lease import Heartbeat
from wsgi_idempotency.operation import Operation
from wsgi_idempotency.records import Claim, Claimed, Completion
from wsgi_idempotency.testing import make_claim


def claim_of(store, lease=0.3, retention=60.0) -> Claim:
    claim = make_claim(str(uuid.uuid4()), lease=lease, retention=retention, path="/pay")
    store.claim(claim)
    return claim


def operation_of(claim: Claim) -> Operation:
    return Operation(claim, key="k", scope="everyone", attempt=1, secret=None)


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


class Watched:
    """A store that counts renewals and fails on command."""

    def __init__(self):
        self.memory = MemoryStore()
        self.renewed = []
        self.fault = None

    def renew(self, claims):
        claims = list(claims)
        self.renewed.append(claims)
        if self.fault is not None:
            raise self.fault
        return self.memory.renew(claims)


@pytest.fixture
def store():
    return Watched()


def test_a_claim_outlives_many_leases_and_all_are_renewed_in_one_statement(store):
    lost = []
    heartbeat = Heartbeat(store, lost.append)
    claims = [claim_of(store.memory) for _ in range(3)]
    for claim in claims:
        heartbeat.start(claim, operation_of(claim))
    until(lambda: len(store.renewed) >= 12)
    assert not any(store.memory.lookup(claim.digest).lapsed for claim in claims)
    assert max(map(len, store.renewed)) == 3
    heartbeat.stop(claims[0])
    until(lambda: len(store.renewed[-1]) == 2)
    assert lost == []


def test_no_thread_is_started_before_the_first_claim(store):
    before = threading.active_count()
    heartbeat = Heartbeat(store, lambda operation: None)
    heartbeat.stop(claim_of(store.memory))
    heartbeat.flush()
    assert threading.active_count() == before
    for _ in range(2):
        claim = claim_of(store.memory)
        heartbeat.start(claim, operation_of(claim))
    assert threading.active_count() == before + 1


def test_of_two_first_claims_at_once_one_starts_the_thread(store):
    heartbeat = Heartbeat(store, lambda operation: None)
    before = threading.active_count()
    assert heartbeat._begin() is heartbeat._begin()
    assert threading.active_count() == before + 1


def test_a_claim_that_is_done_while_it_is_renewed_is_not_lost(store):
    lost = []
    heartbeat = Heartbeat(store, lost.append)
    claim, other = claim_of(store.memory), claim_of(store.memory)

    def renew(claims):
        store.memory.forget(claim.digest, claim.token)
        heartbeat.stop(claim)
        return Watched.renew(store, claims)

    store.renew = renew
    for one in (claim, other):
        heartbeat.start(one, operation_of(one))
    until(lambda: len(store.renewed) >= 2)
    assert lost == []
    heartbeat.stop(other)


def test_a_claim_that_somebody_took_over_is_lost_and_no_longer_renewed(store):
    lost = []
    heartbeat = Heartbeat(store, lost.append)
    claim = claim_of(store.memory)
    operation = operation_of(claim)
    heartbeat.start(claim, operation)
    store.memory.forget(claim.digest, claim.token)
    until(lambda: lost == [operation])
    assert operation.lost


def test_a_store_that_can_not_renew_is_asked_again_sooner(store):
    store.fault = StoreUnavailable("down")
    heartbeat = Heartbeat(store, lambda operation: None)
    claim = claim_of(store.memory, lease=2.0)
    operation = operation_of(claim)
    heartbeat.start(claim, operation)
    until(lambda: len(store.renewed) >= 3)
    store.fault = None
    until(lambda: len(store.renewed) >= 5)
    assert not operation.lost
    assert not store.memory.lookup(claim.digest).lapsed


def test_what_can_not_be_finished_at_once_is_finished_later_while_the_claim_is_kept(store):
    heartbeat = Heartbeat(store, lambda operation: None)
    claim = claim_of(store.memory, lease=1.0)
    tries = []

    def finish():
        tries.append(store.memory.lookup(claim.digest).lapsed)
        if len(tries) < 3:
            raise StoreUnavailable("down")
        return True

    heartbeat.finish_later(claim, operation_of(claim), finish)
    until(lambda: len(tries) == 3)
    assert tries == [False] * 3


def test_an_end_that_comes_too_late_makes_the_operation_lost(store):
    lost = []
    heartbeat = Heartbeat(store, lost.append)
    claim = claim_of(store.memory)
    operation = operation_of(claim)
    heartbeat.finish_later(claim, operation, lambda: False)
    until(lambda: lost == [operation])


def test_renewals_go_on_while_nothing_can_be_finished(store):
    heartbeat = Heartbeat(store, lambda operation: None)
    pending = [claim_of(store.memory) for _ in range(5)]

    back = threading.Event()

    def finish():
        if not back.is_set():
            raise StoreUnavailable("down")
        return True

    for claim in pending:
        heartbeat.finish_later(claim, operation_of(claim), finish)
    until(lambda: len(store.renewed) > 10)
    assert not any(store.memory.lookup(claim.digest).lapsed for claim in pending)
    back.set()
    until(lambda: heartbeat._kept == {})


def test_a_store_that_answers_nobody_is_asked_by_one_end_at_a_time(store):
    """Each try costs its time-out, and the leases of all the others run meanwhile."""
    heartbeat = Heartbeat(store, lambda operation: None)
    pending = [claim_of(store.memory, lease=1.5) for _ in range(6)]
    lapsed = []

    def finish():
        if len(lapsed) > 6:
            return True
        time.sleep(0.5)  # the time-out
        lapsed.append(any(store.memory.lookup(claim.digest).lapsed for claim in pending))
        raise StoreUnavailable("no answer")

    for claim in pending:
        heartbeat.finish_later(claim, operation_of(claim), finish)
    until(lambda: heartbeat._kept == {})
    assert not any(lapsed)


def test_a_claim_is_kept_for_its_retention_at_the_longest(store, caplog):
    heartbeat = Heartbeat(store, lambda operation: None)
    claim = claim_of(store.memory, lease=0.2, retention=0.5)
    heartbeat.start(claim, operation_of(claim))
    until(lambda: "gave up keeping" in caplog.text)


def test_a_doubtful_claim_is_undone_as_often_as_it_shows_up(store):
    """It was sent again when it had no answer, and both may arrive after the first undo."""
    heartbeat = Heartbeat(store, lambda operation: None)
    claim = make_claim(lease=0.9)
    undone = []

    def undo():
        undone.append(store.memory.forget(claim.digest, claim.token))
        return undone[-1]

    heartbeat.undo_later(claim, undo)
    for _ in range(2):
        assert store.memory.claim(claim) == Claimed(1)
        until(lambda: store.memory.lookup(claim.digest) is None)
    assert undone.count(True) == 2
    assert store.renewed == []


def test_a_doubtful_claim_is_looked_for_a_while_after_the_store_first_answers(store, monkeypatch):
    monkeypatch.setattr(lease, "_ON_ITS_WAY", 0.0)
    heartbeat = Heartbeat(store, lambda operation: None)
    claim = make_claim(lease=0.6)
    answers = []

    def undo():
        answers.append(time.monotonic())
        if len(answers) == 1:
            raise StoreUnavailable("down")
        return True

    heartbeat.undo_later(claim, undo)
    until(lambda: heartbeat._kept == {})
    assert answers[-1] - answers[1] >= 0.6, "a lease, at least"


def test_claims_are_kept_however_many_ends_there_are_to_catch_up_with(store):
    """After an outage the store answers, and a round of all would outlast the leases."""
    heartbeat = Heartbeat(store, lambda operation: None)
    claim = claim_of(store.memory, lease=1.5)
    lapsed, tried = [], set()

    def slow(number):
        def undo():
            time.sleep(0.08)
            lapsed.append(store.memory.lookup(claim.digest).lapsed)
            tried.add(number)
            return False

        return undo

    heartbeat.start(claim, operation_of(claim))
    for number in range(40):
        heartbeat.undo_later(make_claim(str(number), lease=1.5), slow(number))
    until(lambda: len(tried) == 40)
    assert not any(lapsed)
    heartbeat.forget_parent()


def test_a_doubtful_claim_is_looked_for_no_longer_than_it_would_be_kept(store, caplog):
    """A row that has expired is in nobody's way."""
    heartbeat = Heartbeat(store, lambda operation: None)
    tries = []

    def undo():
        tries.append(1)
        raise StoreUnavailable("down")

    heartbeat.undo_later(make_claim(lease=0.6, retention=0.6), undo)
    until(lambda: heartbeat._kept == {})
    assert tries
    assert "gave up" not in caplog.text


def test_an_observer_of_losses_that_fails_does_not_stop_the_thread(store, caplog):
    def failing(operation):
        raise LookupError("oops")

    heartbeat = Heartbeat(store, failing)
    for _ in range(2):
        claim = claim_of(store.memory)
        heartbeat.start(claim, operation_of(claim))
        store.memory.forget(claim.digest, claim.token)
        until(lambda token=claim.token: token not in heartbeat._kept)
    until(lambda: caplog.text.count("the heartbeat failed") == 2)


def test_a_claim_is_kept_while_its_end_is_being_recorded(store):
    """The store may take longer over it than the lease has left."""
    lost = []
    heartbeat = Heartbeat(store, lost.append)
    claim = claim_of(store.memory)
    operation = operation_of(claim)
    heartbeat.start(claim, operation)
    heartbeat.finishing(claim)
    until(lambda: len(store.renewed) >= 6)
    assert not store.memory.lookup(claim.digest).lapsed
    store.memory.forget(claim.digest, claim.token)
    beats = len(store.renewed)
    until(lambda: len(store.renewed) >= beats + 2)
    heartbeat.stop(claim)
    assert (lost, operation.lost) == ([], False)


def test_an_end_that_was_recorded_although_its_answer_was_lost_is_no_loss(store):
    """The next renewal finds the row no longer in flight: it is the operation's own doing."""
    lost = []
    heartbeat = Heartbeat(store, lost.append)
    claim = claim_of(store.memory)
    operation = operation_of(claim)
    done = Completion("201 Made It", (), b"made")
    store.memory.complete(claim.digest, claim.token, done)
    tries = []

    def finish():
        tries.append(len(store.renewed))
        return store.memory.complete(claim.digest, claim.token, done)

    heartbeat.finish_later(claim, operation, finish)
    until(lambda: heartbeat._kept == {})
    assert len(tries) == 1
    assert tries[0] > 0
    assert (lost, operation.lost) == ([], False)


def test_an_end_that_can_not_be_recorded_at_all_does_not_hold_up_the_others(store, caplog):
    """A store that can't be reached is one thing, an error that is one record's own another."""
    heartbeat = Heartbeat(store, lambda operation: None)
    poison, other = claim_of(store.memory), claim_of(store.memory)
    tries = []

    def failing():
        tries.append(1)
        raise ZeroDivisionError

    def renew(claims):
        """Take so long over it that both ends are due at once."""
        until(
            lambda: all(
                kept.finish_at < time.monotonic() for kept in list(heartbeat._kept.values())
            )
        )
        return store.memory.renew(claims)

    store.renew = renew
    heartbeat.finish_later(poison, operation_of(poison), failing)
    heartbeat.finish_later(other, operation_of(other), lambda: True)
    until(lambda: other.token not in heartbeat._kept)
    assert len(tries) == 1
    heartbeat.finish_later(other, operation_of(other), lambda: True)
    heartbeat.flush()
    assert list(heartbeat._kept) == [poison.token]
    assert caplog.text.count("was run, and the store could not be told") == 1
    heartbeat.stop(poison)


def test_at_the_end_a_store_that_can_not_be_reached_is_tried_once(store, caplog):
    """Whoever waits for the process to end may kill it, and then nothing would be told."""
    heartbeat = Heartbeat(store, lambda operation: None)
    pending = [claim_of(store.memory, lease=60.0) for _ in range(3)]
    tries = []

    def finish():
        tries.append(1)
        raise StoreUnavailable("down")

    for claim in pending:
        heartbeat.finish_later(claim, operation_of(claim), finish)
    heartbeat.flush()
    assert len(tries) == 1
    told = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert [claim.digest.hex() in one.getMessage() for claim, one in zip(pending, told)] == [
        True
    ] * 3
    for claim in pending:
        heartbeat.stop(claim)


def test_at_the_end_what_was_run_is_recorded_before_what_was_not_is_undone(store):
    """Whoever waits for the process to end may not wait for all of it."""
    heartbeat = Heartbeat(store, lambda operation: None)
    doubtful, run = make_claim("doubtful"), make_claim("run")
    order = []
    heartbeat.undo_later(doubtful, lambda: order.append("undone") or True)
    heartbeat.finish_later(run, operation_of(run), lambda: order.append("recorded") or True)
    heartbeat.flush()
    assert order == ["recorded", "undone"]
    heartbeat.forget_parent()


def test_a_thread_that_can_not_be_started_is_started_with_the_next_claim(store):
    heartbeat = Heartbeat(store, lambda operation: None)
    claim = claim_of(store.memory)
    size = threading.stack_size(1 << 50)  # more than there is
    try:
        with pytest.raises(RuntimeError):
            heartbeat.start(claim, operation_of(claim))
    finally:
        threading.stack_size(size)
    heartbeat.start(claim, operation_of(claim))
    until(lambda: len(store.renewed) >= 3)
    heartbeat.stop(claim)


AT_EXIT = """
import logging, os, sys
sys.path[:0] = {path!r}
logging.basicConfig(format="%(levelname)s %(message)s")
import test_lease as t
store = t.Watched()
heartbeat = t.Heartbeat(store, print)
claim = t.claim_of(store.memory, lease=60.0)
if {fork}:
    heartbeat.start(claim, t.operation_of(claim))
    pid = os.fork()
    if pid:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    assert heartbeat._kept == {{}} and heartbeat._changed is None
    claim = t.claim_of(store.memory, lease=0.2)
    heartbeat.start(claim, t.operation_of(claim))
    t.until(lambda: len(store.renewed) >= 3)
    sys.exit()
def finish():
    raise t.StoreUnavailable("down")
heartbeat.finish_later(claim, t.operation_of(claim), finish)
"""


def run(fork: bool) -> subprocess.CompletedProcess[str]:
    code = AT_EXIT.format(path=[os.path.dirname(__file__)], fork=fork)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_what_was_not_recorded_when_the_process_ends_is_told_with_all_a_person_needs():
    done = run(fork=False)
    assert done.returncode == 0
    assert "CRITICAL POST /pay was run" in done.stderr
    assert "attempt 1" in done.stderr


def test_a_forked_child_keeps_claims_of_its_own():
    done = run(fork=True)
    assert done.returncode == 0, done.stderr
