"""What MemoryStore promises beyond the contract."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from textwrap import dedent

from wsgi_idempotency.records import Claimed, Lapse
from wsgi_idempotency.stores.memory import SWEEP_FLOOR, MemoryStore
from wsgi_idempotency.testing import DONE, lookup, make_claim


def fill(store: MemoryStore, prefix: str, rows: int, *, retention: float) -> None:
    for number in range(rows):
        claim = make_claim(f"{prefix} {number}", lease=10, retention=retention)
        assert store.claim(claim) == Claimed(1)
        store.complete(claim.digest, claim.token, DONE)


def size(store: MemoryStore) -> int:
    return len(store._rows)


def test_a_long_session_does_not_grow_for_ever() -> None:
    """Claims sweep out what has expired, so that what is kept is bounded by what is live."""
    now = 0.0
    store = MemoryStore(clock=lambda: now)
    for round_ in range(10):
        fill(store, f"round {round_}", SWEEP_FLOOR, retention=100)
        assert size(store) <= 2 * SWEEP_FLOOR
        now += 101


def test_a_sweep_comes_when_the_rows_have_doubled() -> None:
    """Not with every claim: a claim pays for a constant number of rows on average."""
    now = 0.0
    store = MemoryStore(clock=lambda: now)
    fill(store, "live", SWEEP_FLOOR + 1, retention=1e9)
    fill(store, "brief", SWEEP_FLOOR - 2, retention=100)
    now += 101
    assert size(store) == 2 * SWEEP_FLOOR - 1
    fill(store, "one", 1, retention=100)
    assert size(store) == 2 * SWEEP_FLOOR
    fill(store, "another", 1, retention=100)
    assert size(store) == SWEEP_FLOOR + 3


def test_a_sweep_spares_what_may_not_go() -> None:
    """Nothing that is live, in flight or held, however old."""
    now = 0.0
    store = MemoryStore(clock=lambda: now)
    in_flight = make_claim("in flight", lease=1000, retention=10)
    held = make_claim("held", lease=10, retention=10)
    lapsed = make_claim("lapsed", lease=10, retention=10, lapse=Lapse.HOLD)
    live = make_claim("live", lease=10, retention=1000)
    gone = make_claim("gone", lease=10, retention=10)
    for claim in (in_flight, held, lapsed, live, gone):
        store.claim(claim)
    store.hold(held.digest, held.token)
    now += 500
    fill(store, "other", SWEEP_FLOOR, retention=1000)
    assert store.lookup(gone.digest) is None
    for claim in (in_flight, held, lapsed, live):
        assert lookup(store, claim).token == claim.token


def test_leases_and_retentions_run_on_the_clock_it_was_given() -> None:
    """To the second, both of them at the second itself."""
    now = 5000.0
    store = MemoryStore(clock=lambda: now)
    claim = make_claim(lease=60, retention=3600)
    store.claim(claim)
    now += 59
    assert (lookup(store, claim).lapsed, lookup(store, claim).lease_left) == (False, 1.0)
    now += 1
    assert (lookup(store, claim).lapsed, lookup(store, claim).lease_left) == (True, 0.0)
    assert lookup(store, claim).age == 60.0
    store.complete(claim.digest, claim.token, DONE)
    now += 3539
    assert lookup(store, claim).expired is False
    now += 1
    assert lookup(store, claim).expired is True


def test_a_store_that_is_not_used_any_more_is_let_go() -> None:
    """Being told of forks keeps none alive."""
    gone = weakref.ref(MemoryStore())
    gc.collect()
    assert gone() is None


def run_script(script: str) -> str:
    """Run a script in a process of its own, which may fork; returns what it logged."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore:.*fork:DeprecationWarning", "-c", dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return done.stderr


def test_a_forked_child_is_warned_once_at_its_first_use() -> None:
    """Each child that uses a store of its parent's, but not the parent, and not for a
    store of its own."""
    log = run_script(
        """
        import logging, os
        from wsgi_idempotency.stores.memory import MemoryStore

        logging.basicConfig(format="%(process)d %(name)s %(levelname)s %(message)s")
        parent, store, unused = os.getpid(), MemoryStore(), MemoryStore()
        children = [pid for pid in (os.fork(), os.getpid() == parent and os.fork()) if pid]
        store.lookup(b"")
        store.lookup(b"")
        MemoryStore().lookup(b"")
        if os.getpid() != parent:
            os._exit(0)
        for child in children:
            assert os.waitpid(child, 0)[1] == 0
        """
    )
    lines = log.splitlines()
    assert len(lines) == 2, log
    assert len({line.split()[0] for line in lines}) == 2
    for line in lines:
        pid, name, level, message = line.split(maxsplit=3)
        assert (name, level) == ("wsgi_idempotency", "WARNING")
        assert f"process {pid} shares no idempotency keys" in message


def test_a_child_forked_during_a_call_is_not_locked_out() -> None:
    """The thread that held the lock does not exist in the child, so nobody would let go."""
    run_script(
        """
        import logging, os, signal, threading
        from wsgi_idempotency.stores.memory import MemoryStore

        inside, go_on = threading.Event(), threading.Event()

        def clock():
            # Called while the store is locked.
            if threading.current_thread() is caller:
                inside.set()
                go_on.wait()
            return 0.0

        logging.disable()
        store = MemoryStore(clock=clock)
        caller = threading.Thread(target=store.lookup, args=(b"",))
        caller.start()
        inside.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            store.lookup(b"")
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        go_on.set()
        caller.join()
        assert status == 0, f"the child ended with {status}"
        """
    )


def test_a_child_knows_what_was_recorded_before_the_fork() -> None:
    """What its parent finished is done, and what its parent runs is in flight."""
    run_script(
        """
        import logging, os
        from wsgi_idempotency.records import State
        from wsgi_idempotency.stores.memory import MemoryStore
        from wsgi_idempotency.testing import DONE, lookup, make_claim

        logging.disable()
        store, done, running = MemoryStore(), make_claim("done"), make_claim("running")
        store.claim(done)
        store.complete(done.digest, done.token, DONE)
        store.claim(running)
        child = os.fork()
        if child == 0:
            good = lookup(store, done).body == DONE.body
            good &= lookup(store, running).state is State.CLAIMED
            store.forget(running.digest, running.token)
            os._exit(0 if good else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert lookup(store, running).token == running.token, "the child changed the parent"
        """
    )
