"""Deleting expired rows: at once, with a grace period, again and again, by pg_cron."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner
from psycopg import sql
from servers import ended
from servers.postgres import Postgres, PostgresServer, database_of
from sqlalchemy import Connection, text
from table import add_rows, count_rows
from werkzeug.test import Client

from wsgi_idempotency import IdempotencyMiddleware, SQLStore, checkup, everyone
from wsgi_idempotency.cli import main
from wsgi_idempotency.cli_options import stopped_by_signals, work_until_told
from wsgi_idempotency.errors import StoreUnavailable
from wsgi_idempotency.purging import purge, purge_forever
from wsgi_idempotency.schema import connect, upgrade
from wsgi_idempotency.stores.sql import _PG_PURGE

COMMAND = Path(sys.executable).with_name("wsgi-idempotency")

DOCS = Path(__file__).parent.parent / "docs"

HOUR = 3600.0

#: Seconds for what a command says at once.
PATIENCE = 30.0


@pytest.fixture
def store(database: str) -> Iterator[SQLStore]:
    with closing(SQLStore(database)) as store:
        store.check()
        yield store


def spoil(store: SQLStore) -> None:
    """One row of each kind that stays, and one that goes."""
    url = store.url.render_as_string(hide_password=False)
    add_rows(url, 1)
    add_rows(url, 1, expired=-60)
    add_rows(url, 1, state="held")
    add_rows(url, 1, state="claimed", lapse="hold")


def test_an_expired_row_is_kept_for_as_long_as_one_asks(store: SQLStore, database: str) -> None:
    spoil(store)
    add_rows(database, 2, expired=3 * HOUR)
    assert sum(purge(store, older_than=4 * HOUR)) == 0
    assert sum(purge(store, older_than=2 * HOUR)) == 2
    assert sum(purge(store)) == 1
    assert count_rows(database) == 3


@pytest.mark.parametrize("older_than", [-1.0, float("nan")])
def test_a_grace_period_is_a_number_of_seconds(sqlite_url: str, older_than: float) -> None:
    with closing(SQLStore(sqlite_url)) as store, pytest.raises(ValueError, match="use seconds"):
        store.purge(1, older_than=older_than)


def test_every_batch_that_deleted_something_is_told(store: SQLStore, database: str) -> None:
    add_rows(database, 4)
    told = []
    assert list(purge(store, batch=2, sleep=0.0, on_event=told.append)) == [2, 2, 0]
    assert [(event.name, event.count, event.path) for event in told] == [("purged", 2, "")] * 2
    assert all(event.seconds == event.store_seconds > 0 for event in told)


def test_a_purge_that_is_stopped_ends_after_its_batch(store: SQLStore, database: str) -> None:
    add_rows(database, 3)
    stop = threading.Event()
    batches = purge(store, batch=1, sleep=60.0, stop=stop)
    assert next(batches) == 1
    stop.set()
    assert list(batches) == []
    assert count_rows(database) == 2


def test_a_batch_keeps_nobody_waiting_but_for_its_own_keys(
    postgres: Postgres, pg_database: str
) -> None:
    """And those only until it is over, however long that is."""
    app = IdempotencyMiddleware(lambda _, start: start("201 Made", []) and [], pg_database,
                                scope=everyone)  # fmt: skip

    def post(key: str) -> tuple[int, bool]:
        headers = {"Idempotency-Key": key}
        answer = Client(app).post("/", headers=headers, buffered=True)
        return answer.status_code, "Idempotency-Replayed" in answer.headers

    waiting = sql.SQL(
        "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = {}"
    ).format(database_of(pg_database))
    post("expired")
    post("live")
    with postgres.connect(database_of(pg_database)) as purging:
        purging.execute(
            "UPDATE idempotency_keys SET expires_at = now() WHERE idempotency_key = 'expired'"
        )
        with ThreadPoolExecutor(1) as pool:
            with purging.transaction():
                params = {"limit": 10, "older_than": 0.0}
                assert purging.execute(_PG_PURGE, params).rowcount == 1  # type: ignore[call-overload]
                assert post("live") == (201, True)
                assert post("fresh") == (201, False)
                late = pool.submit(post, "expired")
                while not postgres.execute(waiting):
                    assert not late.done()
            assert late.result() == (201, False)


def test_a_batch_waits_for_nobody(postgres: Postgres, pg_database: str) -> None:
    """What somebody has locked, who takes it over or purges too, is left for another batch."""
    add_rows(pg_database, 3, expired=HOUR)
    with (
        closing(SQLStore(pg_database)) as store,
        postgres.connect(database_of(pg_database)) as other,
    ):
        with other.transaction():
            other.execute(
                "SELECT FROM idempotency_keys ORDER BY expires_at LIMIT 1 FOR NO KEY UPDATE"
            )
            assert store.purge(2) == 2
        assert store.purge(2) == 1


class Clock(threading.Event):
    """Lets no time pass, and is set after so many pauses."""

    def __init__(self, pauses: int) -> None:
        super().__init__()
        self.waited: list[float] = []
        self._pauses = pauses

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waited.append(timeout)
        if len(self.waited) == self._pauses:
            self.set()
        return self.is_set()


def test_it_purges_again_and_again_with_pauses_that_differ(store: SQLStore, database: str) -> None:
    add_rows(database, 1)
    clock = Clock(50)
    counts = purge_forever(store, interval=100.0, stop=clock)
    assert next(counts) == 1
    add_rows(database, 1)
    assert next(counts) == 1
    assert list(counts) == [0] * 48
    assert len(set(clock.waited)) == 50
    assert 50 <= min(clock.waited) < 90
    assert 110 < max(clock.waited) <= 150


def test_a_purge_that_runs_for_ever_survives_its_database(sqlite_url: str, caplog) -> None:
    class Broken(SQLStore):
        def purge(self, limit: int, *, older_than: float = 0.0) -> int:
            raise StoreUnavailable("down")

    with closing(Broken(sqlite_url)) as store:
        assert list(purge_forever(store, stop=Clock(2))) == []
    assert caplog.text.count("a purge broke off, and is tried again: down") == 2


# ---------------------------------------------------------------------- the command


def test_the_command_keeps_what_is_younger(database: str) -> None:
    upgrade(database)
    add_rows(database, 1, expired=HOUR)
    add_rows(database, 2, expired=3 * HOUR)
    arguments = ["purge", "--database", database, "--json"]
    done = CliRunner().invoke(main, [*arguments, "--older-than", "2 h"])
    assert json.loads(done.output) == {"deleted": 2, "interrupted": False}
    assert count_rows(database) == 1


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--older-than", "soon", "use one like 30 s"),
        ("--interval", "-1", "use one like 30 s"),
        ("--interval", "0", "0 is not from 1 s to 30 days"),
        ("--interval", "1e400", "use one like 30 s"),
        ("--interval", "31 days", "31 days is not from 1 s to 30 days"),
        ("--on-event", "print", "use module:name"),
    ],
)
def test_the_command_refuses_what_it_can_not_use(option: str, value: str, said: str) -> None:
    done = CliRunner().invoke(main, ["purge", "--database", "sqlite:///none", option, value])
    assert done.exit_code == 2
    assert f"Invalid value for '{option}'" in done.output
    assert said in " ".join(done.output.split())


@contextmanager
def purging_forever(database: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [COMMAND, "purge", "--forever", "--database", database, "--on-event", "logging"]
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with ended(process):
        yield process


@contextmanager
def away(server: PostgresServer) -> Iterator[None]:
    server.stop("immediate")
    try:
        yield
    finally:
        server.start()


def heard(process: subprocess.Popen[str], says: str) -> None:
    """Wait for a line of its log, and not for ever."""
    assert process.stderr is not None
    silent = threading.Timer(PATIENCE, process.kill)
    silent.start()
    line = process.stderr.readline()
    silent.cancel()
    assert says in line, line + process.stderr.read()


def stop_it(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Its pause may be an hour, or 30 days."""
    process.send_signal(signal.SIGTERM)
    said, complained = process.communicate(timeout=PATIENCE)
    return process.returncode, said, complained


def test_a_signal_ends_a_purge_for_ever_in_the_middle_of_its_pause(database: str) -> None:
    """With success, as a service that was told to stop; and it tells its observers meanwhile."""
    upgrade(database)
    add_rows(database, 5)
    with purging_forever(database, "--batch", "2", "--sleep", "0") as process:
        for count in (2, 2, 1):
            heard(process, f"INFO purged count={count} ")
        assert stop_it(process) == (0, "5 expired rows deleted\n", "")


def test_a_purge_for_ever_outlives_an_outage(
    postgres_server: PostgresServer, pg_database: str
) -> None:
    """It says so once a round, goes on where it was, and counts no row twice."""
    add_rows(pg_database, 3)
    with purging_forever(pg_database, "--interval", "1 s", "--json") as process:
        heard(process, "purged count=3")
        with away(postgres_server):
            heard(process, "trying a new one")
            for _ in range(2):
                heard(process, "a purge broke off, and is tried again")
        add_rows(pg_database, 4)
        while "purged count=4" not in process.stderr.readline():  # type: ignore[union-attr]
            assert process.poll() is None
        status, said, _ = stop_it(process)
    assert (status, json.loads(said)) == (0, {"deleted": 7, "interrupted": True})


def test_a_signal_ends_a_purge_for_ever_whose_database_is_away(
    postgres_server: PostgresServer, pg_database: str
) -> None:
    with purging_forever(pg_database, "--interval", "30 days") as process:
        # It has asked for the schema before.
        while not is_idle(postgres_server, "DELETE"):
            assert process.poll() is None
        with away(postgres_server):
            assert stop_it(process) == (0, "0 expired rows deleted\n", "")


def test_a_purge_for_ever_does_not_begin_without_its_database(
    postgres_server: PostgresServer, pg_database: str
) -> None:
    """What is wrong with the URL is said when it is started, and doesn't hide in a log."""
    with away(postgres_server), purging_forever(pg_database) as process:
        said, complained = process.communicate()
    assert (process.returncode, said) == (1, "")
    (line,) = complained.splitlines()
    assert "can't be reached" in line
    assert "run: wsgi-idempotency check" in line


def is_idle(server: PostgresServer, statement: str) -> bool:
    """Whether a connection has such a statement behind it."""
    return bool(
        server.execute(
            sql.SQL(
                "SELECT 1 FROM pg_stat_activity WHERE state = 'idle'"
                " AND ltrim(query, E'\\n') LIKE {}"
            ).format(statement + "%")
        )
    )


@pytest.mark.parametrize(
    ("signals", "status", "complaint"),
    [
        ([signal.SIGTERM], 0, "The batch at hand is left to the database, and is not counted.\n"),
        ([signal.SIGINT, signal.SIGINT], 130, "Interrupted.\n"),
    ],
    ids=["after five seconds", "at the second signal"],
)
def test_a_signal_ends_a_purge_that_its_database_keeps_waiting(
    postgres: Postgres,
    pg_database: str,
    signals: list[signal.Signals],
    status: int,
    complaint: str,
) -> None:
    """A statement may take a minute, for all that libpq hears of signals."""
    waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = {}"
    mine = sql.SQL(waiting).format(database_of(pg_database))
    with (
        postgres.connect(database_of(pg_database)) as locker,
        locker.transaction(),
    ):
        locker.execute("LOCK TABLE idempotency_keys")
        with purging_forever(pg_database) as process:
            while not postgres.execute(mine):
                assert process.poll() is None
            started = time.monotonic()
            for number in signals:
                process.send_signal(number)
                # Two that come at once are one.
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
            said, complained = process.communicate()
            took = time.monotonic() - started
    assert (process.returncode, said) == (status, "0 expired rows deleted\n")
    assert complained == complaint
    assert took < 30, "a statement's time-out is 60"


def test_two_hosts_that_purge_count_each_row_once(database: str) -> None:
    upgrade(database)
    how = ("--batch", "10", "--sleep", "0", "--json", "--interval", "1 s")
    added = 0
    deadline = time.monotonic() + 60
    with (
        ThreadPoolExecutor(2) as pool,
        purging_forever(database, *how) as one,
        purging_forever(database, *how) as other,
    ):
        hosts = (one, other)
        purged = [pool.submit(heard, host, "purged count=") for host in hosts]
        while count_rows(database) or not all(host.done() for host in purged):
            assert time.monotonic() < deadline, "they do not purge side by side"
            if not all(host.done() for host in purged):
                add_rows(database, 50)
                added += 50
            time.sleep(0.05)
        counts = [json.loads(stop_it(host)[1])["deleted"] for host in hosts]
    assert sum(counts) == added
    assert min(counts) > 0


def test_a_signal_that_comes_while_a_purge_goes_to_sleep_ends_it() -> None:
    """An event's lock is held for a moment before it sleeps, by the thread that is interrupted:
    whoever sets the event there would wait for itself."""
    with stopped_by_signals() as stop:
        with stop._cond:  # type: ignore[attr-defined]
            signal.raise_signal(signal.SIGTERM)
            assert not stop.is_set()
        assert stop.wait(10)


def test_a_signal_that_does_not_wake_the_sleeper_ends_its_sleep() -> None:
    """It comes between the last look for one and the system call, or another thread gets it."""
    told = threading.Event()
    with stopped_by_signals(told.set) as stop:

        def to_this_thread() -> None:
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

        threading.Timer(0.2, to_this_thread).start()
        started = time.monotonic()
        assert stop.wait(60)
        assert time.monotonic() - started < 30
        assert told.wait(10)


def test_other_signals_stop_nothing() -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with stopped_by_signals() as stop:
            signal.raise_signal(signal.SIGUSR1)
            assert not stop.wait(0.3)
            signal.raise_signal(signal.SIGINT)
            assert stop.wait(10)
        assert signal.set_wakeup_fd(-1) == -1, "Python's own hears of signals as before"
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_afterwards_signals_do_what_they_did() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    heard, hears = socket.socketpair()
    heard.setblocking(False)
    with heard, hears:
        previous = signal.set_wakeup_fd(heard.fileno())
        try:
            with stopped_by_signals():
                assert [signal.getsignal(number) for number in numbers] != before
            assert [signal.getsignal(number) for number in numbers] == before
            assert signal.set_wakeup_fd(previous) == heard.fileno()
        finally:
            signal.set_wakeup_fd(previous)


def test_what_the_work_raises_is_raised() -> None:
    def work(stop: threading.Event) -> None:
        raise LookupError("nothing there")

    with pytest.raises(LookupError, match="nothing there"):
        work_until_told(work)


def test_work_that_does_not_end_is_left_behind() -> None:
    go_on = threading.Event()

    def work(stop: threading.Event) -> None:
        signal.raise_signal(signal.SIGTERM)
        go_on.wait(60)

    try:
        assert work_until_told(work, grace=0.1) == (True, False)
    finally:
        go_on.set()


# ---------------------------------------------------------------------- the bar


def test_what_is_too_much_to_count_is_guessed(
    pg_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_rows(pg_database, 500, expired=HOUR)
    add_rows(pg_database, 500, expired=-HOUR)
    with connect(pg_database) as connection, connection.begin():
        connection.execute(text("ANALYZE idempotency_keys"))
    assert about(pg_database) == 500
    monkeypatch.setattr(checkup, "COUNTED", 100)
    assert 400 < about(pg_database) < 600
    assert about(pg_database, older_than=2 * HOUR) == 0


def test_sqlite_counts_what_is_older(sqlite_url: str) -> None:
    upgrade(sqlite_url)
    add_rows(sqlite_url, 3, expired=HOUR)
    assert (about(sqlite_url), about(sqlite_url, older_than=2 * HOUR)) == (3, 0)


def about(url: str, older_than: float = 0.0) -> int:
    connection: Connection
    with connect(url) as connection:
        return checkup.about_expired(connection, older_than)


# ---------------------------------------------------------------------- pg_cron


def documented() -> str:
    """The statement that schedules the job."""
    page = (DOCS / "purge.md").read_text(encoding="utf-8")
    (statement,) = re.findall(r"SELECT cron\.schedule\(.*?\$\$\);", page, re.DOTALL)
    return statement


def cron_job() -> str:
    """What the documentation has pg_cron run."""
    return documented().split("$$")[1]


#: Runs a job once, when it is scheduled.
CRON = """
CREATE SCHEMA cron;
CREATE FUNCTION cron.schedule(job_name text, schedule text, command text) RETURNS bigint
LANGUAGE plpgsql AS $$ BEGIN EXECUTE command; RETURN 1; END $$"""


def every_kind() -> Iterator[tuple[dict[str, Any], bool]]:
    """What may be in a row that has expired or not, and whether a purge deletes it."""
    now = datetime.now(timezone.utc)
    for state, lapse, effects, lease, expired in itertools.product(
        ("completed", "not replayable", "released", "held", "claimed"),
        ("release", "hold"),
        (None, now - timedelta(minutes=1)),
        (-60.0, 60.0),
        (-60.0, 60.0),
    ):
        columns: dict[str, Any] = {
            "state": state,
            "lapse": lapse,
            "effects_at": effects,
            "lease_until": now + timedelta(seconds=lease),
            "expired": expired,
            "key_digest": os.urandom(32),
            "created_at": now - timedelta(hours=1),
        }
        if state == "not replayable":
            columns |= {"state": "completed", "not_replayable": "too large", "response_body": None}
        in_flight = state == "claimed" and lease > 0
        unknown = state == "claimed" and lapse == "hold" and effects is None
        stays = expired < 0 or state == "held" or in_flight or unknown
        yield columns, not stays


def test_the_job_of_pg_cron_deletes_what_the_command_does(
    postgres: Postgres, pg_database: str
) -> None:
    """The documentation's SQL as it is, on a row of every kind, each with a step."""
    conninfo = pg_database.replace("postgresql+psycopg", "postgresql")
    rows = list(every_kind())
    left = []

    def fill(connection: psycopg.Connection[Any]) -> None:
        connection.execute("TRUNCATE idempotency_keys CASCADE")
        for columns, _ in rows:
            add_rows(pg_database, 1, **columns)
        connection.execute(
            "INSERT INTO idempotency_steps SELECT now(), created_at, 1, key_digest, 'charge', '1'"
            " FROM idempotency_keys"
        )

    def remaining(connection: psycopg.Connection[Any]) -> set[bytes]:
        keys = connection.execute("SELECT key_digest FROM idempotency_keys").fetchall()
        steps = connection.execute("SELECT key_digest FROM idempotency_steps").fetchall()
        assert sorted(keys) == sorted(steps)
        return {digest for (digest,) in keys}

    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(CRON)
        for how in ("pg_cron", "the command", "the job again"):
            if how != "the job again":
                fill(connection)
            if how == "the command":
                with closing(SQLStore(pg_database)) as store:
                    assert sum(purge(store)) == sum(goes for _, goes in rows)
            else:
                connection.execute(documented())  # type: ignore[call-overload]
            left.append(remaining(connection))
    stays = {columns["key_digest"] for columns, goes in rows if not goes}
    assert 0 < len(stays) < len(rows)
    assert left == [stays, stays, stays]


def test_the_job_of_pg_cron_is_the_package_s_own_statement() -> None:
    def words(statement: str) -> str:
        return "".join(statement.split()).rstrip(";")

    grace = "AND expires_at <= now() - make_interval(secs => %(older_than)s)"
    ours = words(_PG_PURGE).replace(words(grace), "").replace("%(limit)s", "10000")
    assert words(cron_job()) == ours
