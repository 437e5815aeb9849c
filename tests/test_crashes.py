"""Workers that die or stand still in the middle of an operation, on real servers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from apps.gate import Gate
from apps.shop import (
    Shop,
    at_gate,
    at_once,
    background,
    code,
    expect_one,
    kill_mid_handler,
    open_shop,
    post_in_vain,
    replayed,
    until,
)

from wsgi_idempotency import Reconciler, SQLStore, StillUnknown

SHORT_LEASE = {"lease": 1}


def test_one_of_50_racers_takes_over_from_a_killed_worker(
    database: str, tmp_path: Path, gate: Gate
) -> None:
    """Once the lease of a worker killed mid-handler is over, a policy that releases a lapse
    lets exactly one retry run, as attempt 2."""
    with open_shop(database, tmp_path, policy=SHORT_LEASE, workers=4) as shop:
        kill_mid_handler(shop, gate)
        expect_one(at_once(50, lambda _: shop.post("k")))
        assert shop.attempts("k") == [1, 2]
        assert replayed(shop.post("k"))


def test_nobody_takes_over_from_a_killed_worker_while_its_lease_runs(
    pg_database: str, tmp_path: Path, gate: Gate
) -> None:
    with open_shop(pg_database, tmp_path, workers=2) as shop:
        with background(post_in_vain, shop, at_gate(gate)) as lost:
            os.kill(gate.arrival().pid, signal.SIGKILL)
            lost()
        refused = shop.post("k")
        assert (refused.status, code(refused)) == (409, "CONFLICT")
        assert shop.attempts("k") == [1]


def test_an_operation_whose_worker_was_killed_is_held_where_the_policy_says_so(
    database: str, tmp_path: Path, gate: Gate
) -> None:
    policy = SHORT_LEASE | {"outcomes": "hold_unknown"}
    with open_shop(database, tmp_path, policy=policy, workers=2) as shop:
        kill_mid_handler(shop, gate)
        for refused in at_once(10, lambda _: shop.post("k")):
            assert (refused.status, code(refused)) == (409, "OUTCOME_UNKNOWN")
            assert refused.header("X-Should-Retry") == "false"
        assert shop.attempts("k") == [1]
        assert shop.post("another").status == 201


@pytest.mark.parametrize(
    ("decision", "answers", "attempts"),
    [
        (["--forget"], (201, None), [1, 1]),
        (["--release"], (201, None), [1, 2]),
        (["--complete", "--status", "202", "--body-file", "-"], (202, b"from the books"), [1]),
    ],
    ids=["forgotten", "released", "completed"],
)
def test_an_operation_whose_worker_was_killed_is_freed_by_the_command(
    pg_database: str,
    tmp_path: Path,
    gate: Gate,
    decision: list[str],
    answers: tuple[int, bytes | None],
    attempts: list[int],
) -> None:
    """Until then retries are told that nobody knows; afterwards each gets one response."""
    policy = SHORT_LEASE | {"outcomes": "hold_unknown"}
    with open_shop(pg_database, tmp_path, policy=policy, workers=2) as shop:
        kill_mid_handler(shop, gate)
        assert code(shop.post("k")) == "OUTCOME_UNKNOWN"
        listed = command(shop, "list", "--held")
        assert "lapsed, held" in listed
        assert shop.rows()[0]["key_digest"].hex() in listed
        command(shop, "resolve", "k", *decision, "--reason", "ticket 4711")
        first, second = shop.post("k"), shop.post("k")
        status, body = answers
        assert (first.status, second.status, second.body) == (status, status, first.body)
        assert body in (None, first.body)
        assert replayed(second)
        assert replayed(first) is (body is not None)
        assert shop.attempts("k") == attempts
        assert ("ticket 4711" in command(shop, "show", "k")) is (shop.rows() != [])


def command(shop: Shop, *arguments: str) -> str:
    """Run the command as a person does; what it prints."""
    done = subprocess.run(
        [Path(sys.executable).with_name("wsgi-idempotency"), *arguments, "--database", shop.url],
        input="from the books",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_worker_that_stood_still_while_a_reconciler_looks_completes_its_operation(
    database: str, tmp_path: Path, gate: Gate
) -> None:
    """It was only slow. What it says is what counts, and nobody has to resolve anything."""
    policy = SHORT_LEASE | {"outcomes": "hold_unknown"}
    with open_shop(database, tmp_path, policy=policy, workers=2) as shop:
        with background(shop.post, "k", at_gate(gate)) as slow:
            first = gate.arrival()
            with stopped(first.pid):
                until(shop.has_lapsed)
                store = SQLStore(database)
                looks = Reconciler(store, lambda record: StillUnknown).walk()
                store.close()
                assert looks == {"still unknown": 1}
                assert [row["state"] for row in shop.rows()] == ["held"]
                assert code(shop.post("k")) == "OUTCOME_UNKNOWN"
            first.let_pass()
            response = slow()
        assert (response.status, replayed(response)) == (201, False)
        assert shop.post("k").body == response.body
        assert shop.attempts("k") == [1]


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [("store_success", (201, None)), ("hold_unknown", (409, "OUTCOME_UNKNOWN"))],
    ids=["released", "held"],
)
def test_a_handler_that_gunicorn_aborts_is_released_or_held_at_once(
    pg_database: str, tmp_path: Path, gate: Gate, outcomes: str, expected: tuple[int, str | None]
) -> None:
    """gunicorn ends a silent worker by SIGABRT, which its worker turns into SystemExit: the
    claim is settled as of an exception, and its lease need not run out."""
    with open_shop(
        pg_database, tmp_path, policy={"outcomes": outcomes}, workers=1, timeout=2
    ) as shop:
        with background(shop.post, "k", at_gate(gate)) as aborted:
            first = gate.arrival()
            assert aborted().status == 500
        again = shop.post("k")
        assert (again.status, code(again)) == expected
        assert shop.attempts("k") == ([1, 2] if again.status == 201 else [1])
        assert first.pid != shop.server.worker_pids[-1]


@pytest.mark.parametrize("moment", ["before the first byte", "after half the response"])
def test_a_response_whose_worker_was_killed_while_it_was_sent_is_replayed_in_full(
    database: str, tmp_path: Path, moment: str
) -> None:
    with open_shop(database, tmp_path, application="apps.dying:app", workers=2) as shop:
        post_in_vain(shop, ("X-Die", moment), ("X-Size", "2000"))
        retry = shop.post("k")
        assert retry.status == 201
        assert replayed(retry)
        assert len(retry.body) == 2000
        [execution] = shop.executions("k")
        assert execution["execution"].encode() in retry.body
        assert execution["attempt"] == 1


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_worker_that_stood_still_past_its_lease_changes_nothing(
    database: str, tmp_path: Path, gate: Gate
) -> None:
    """Another worker takes over meanwhile. What the first one has to say later is fenced off,
    and its own client gets the response that counts."""
    with open_shop(database, tmp_path, policy=SHORT_LEASE, workers=2) as shop:
        with background(shop.post, "k", at_gate(gate)) as zombie:
            first = gate.arrival()
            with stopped(first.pid):
                until(shop.has_lapsed)
                winner = shop.post("k")
                assert (winner.status, replayed(winner)) == (201, False)
                before = shop.rows()
            first.let_pass()
            late = zombie()
        assert (late.status, late.body) == (201, winner.body)
        assert replayed(late)
        assert shop.rows() == before
        assert shop.attempts("k") == [1, 2]
        assert shop.post("k").body == winner.body


@pytest.mark.parametrize("status", ["422 No", "500 Out Of Luck"], ids=["forgotten", "released"])
def test_a_late_failure_of_a_worker_that_stood_still_changes_nothing(
    database: str, tmp_path: Path, gate: Gate, status: str
) -> None:
    """Its failure frees the key neither while its successor runs nor after that."""
    with open_shop(database, tmp_path, policy=SHORT_LEASE, workers=3) as shop:
        with background(shop.post, "k", at_gate(gate)) as zombie:
            first = gate.arrival()
            with stopped(first.pid):
                until(shop.has_lapsed)
                with background(shop.post, "k", at_gate(gate)) as successor:
                    second = gate.arrival()
                    os.kill(first.pid, signal.SIGCONT)
                    first.let_pass(status)
                    assert zombie().status == int(status[:3])
                    assert code(shop.post("k")) == "CONFLICT"
                    second.let_pass()
                    assert successor().status == 201
        assert shop.post("k").body == successor().body
        assert shop.attempts("k") == [1, 2]


def test_a_worker_that_stood_still_within_its_lease_keeps_its_claim(
    pg_database: str, tmp_path: Path, gate: Gate
) -> None:
    with open_shop(pg_database, tmp_path, policy={"lease": 30}, workers=2) as shop:
        with background(shop.post, "k", at_gate(gate)) as original:
            first = gate.arrival()
            with stopped(first.pid):
                assert code(shop.post("k")) == "CONFLICT"
            first.let_pass()
            response = original()
        assert (response.status, replayed(response)) == (201, False)
        assert shop.post("k").body == response.body
        assert shop.attempts("k") == [1]
