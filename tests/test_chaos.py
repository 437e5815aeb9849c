"""Short runs of the chaos harness; ``tox -e chaos`` makes long ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from chaos.report import late_completions, summary, table
from chaos.run import Result, run
from chaos.schedule import make, outage, stops, transactions
from servers.pgbouncer import MISSING, find_pgbouncer

pytestmark = pytest.mark.usefixtures("on_postgresql", "postgres")

SEED = 1  # of the schedules; one that fails fails again with the same


def expect_no_violation(result: Result) -> None:
    assert result.violations == [], (
        f"seed {SEED}\n{table(result.log)}\n{summary(result.log, result.violations)}"
    )


def test_no_promise_is_broken_whatever_breaks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Workers are killed, stopped, aborted and replaced, connections reset and frozen, and the
    database crashes, under clients that retry as SDKs do."""
    pooler = find_pgbouncer() is not None
    result = run(make(SEED, 24, pooler=pooler), tmp_path, pooler=pooler)
    with capsys.disabled():
        way = "through PgBouncer" if pooler else f"without PgBouncer ({MISSING})"
        print(f"\nchaos, seed {SEED}, {way}:\n{summary(result.log, result.violations)}")
    expect_no_violation(result)
    assert len(result.log.executions) > 80
    assert len(result.log.written) > 10
    struck = {window.what for window in result.log.windows}
    assert struck >= {fault.kind for fault in result.schedule.faults}


def test_a_store_that_does_not_check_the_token_is_seen(tmp_path: Path) -> None:
    """The same harness on a build in which whoever ends an operation ends it for whoever holds
    the claim: workers that stood still overwrite who took over from them."""
    expected = {"rows are settled by who holds them", "rows change hands as they may"}
    for seed in range(SEED, SEED + 5):  # on a busy machine there may be nobody to take over
        folder = tmp_path / str(seed)
        folder.mkdir()
        result = run(stops(seed, 6), folder, broken="unfenced")
        if expected & {violation.rule for violation in result.violations}:
            return
    pytest.fail("nothing was seen")


def test_a_transaction_that_is_none_is_seen(tmp_path: Path) -> None:
    """A build whose application writes beside the transaction: what failed has left its row."""
    result = run(transactions(SEED, 2), tmp_path, broken="beside")
    rules = {violation.rule for violation in result.violations}
    assert "what is written in a transaction is what is recorded" in rules


def test_five_seconds_without_the_database_lose_nothing_and_repeat_nothing(
    tmp_path: Path,
) -> None:
    """Under load: no request hangs longer than its bound (the checker sees to that), none runs
    twice, and what could not be recorded is, once the database is back."""
    result = run(outage(SEED, 8), tmp_path, lease=15)
    expect_no_violation(result)
    log = result.log
    assert max(Counter(one.identity for one in log.executions).values()) == 1
    assert late_completions(log) == len(log.unrecorded) > 0
    completed = {change.token for change in log.transitions if change.after == "completed"}
    assert {one.token for one in log.executions} == completed


def test_a_seed_is_a_schedule() -> None:
    """The same seed sends the same requests and breaks the same things at the same moments."""
    assert make(SEED, 30, pooler=True) == make(SEED, 30, pooler=True)
    assert make(SEED, 30).digest() == make(SEED, 30).digest() != make(SEED + 1, 30).digest()
