"""What is SQLStore's alone: engines it is given, URLs it shows, statements that take too long."""

from __future__ import annotations

import os
import threading

import psycopg
import pytest
import sqlalchemy
from sqlalchemy.pool import StaticPool

from wsgi_idempotency import SQLStore
from wsgi_idempotency.errors import AnswerLost, ConfigurationError
from wsgi_idempotency.records import Claim, Claimed, Lapse
from wsgi_idempotency.stores.sql import database_url, shown


def new_claim() -> Claim:
    return Claim(
        digest=os.urandom(32),
        token=os.urandom(16),
        fingerprint=b"f",
        fingerprint_version=1,
        scope="everyone",
        key="k",
        method="POST",
        path="/pay",
        lease=60.0,
        retention=600.0,
        lapse=Lapse.HOLD,
    )


def libpq(url: str) -> str:
    return url.replace("postgresql+psycopg://", "postgresql://")


def test_a_statement_that_times_out_leaves_no_backend_waiting(pg_database: str) -> None:
    """Others need the server's connections, and the statement must not run later."""
    store = SQLStore(pg_database, timeout=1.0, pool_size=2)
    store.check()
    claim = new_claim()
    lost: list[AnswerLost] = []

    def claim_in_vain() -> None:
        try:
            store.claim(claim)
        except AnswerLost as exc:
            lost.append(exc)

    with psycopg.connect(libpq(pg_database)) as lock, lock.transaction():
        lock.execute("LOCK TABLE idempotency_keys IN ACCESS EXCLUSIVE MODE")
        threads = [threading.Thread(target=claim_in_vain) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with psycopg.connect(libpq(pg_database), autocommit=True) as other:
            waiting = other.execute(
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event_type = 'Lock'"
            ).fetchone()
        assert waiting == (0,)
    assert len(lost) == 2
    assert store.lookup(claim.digest) is None
    store.close()


def test_a_given_engine_s_connections_stay_the_application_s(pg_database: str) -> None:
    """A handler that holds them all must not keep the heartbeat from renewing its claim."""
    engine = sqlalchemy.create_engine(pg_database, pool_size=1, max_overflow=0, pool_timeout=1)
    store = SQLStore(engine)
    claim = new_claim()
    with engine.begin() as held:
        assert held.exec_driver_sql("SELECT 1").scalar() == 1
        assert store.claim(claim) == Claimed(attempt=1)
        assert store.renew([(claim.digest, claim.token, 60.0)]) == {claim.token}
        assert engine.pool.checkedout() == 1
    store.close()
    engine.dispose()


def test_an_engine_of_another_driver_is_refused() -> None:
    engine = sqlalchemy.create_engine("postgresql+psycopg_async://host/name")
    with pytest.raises(ConfigurationError, match="psycopg_async; use one for"):
        SQLStore(engine)


def test_an_engine_with_one_connection_for_all_is_refused(tmp_path) -> None:
    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path}/a.db", poolclass=StaticPool)
    with pytest.raises(ConfigurationError, match="one connection for all"):
        SQLStore(engine)


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file::memory:?uri=true",
        "sqlite:///file:x?mode=memory&uri=true",
    ],
)
def test_a_database_in_memory_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="memory:"):
        database_url(url)


def test_no_password_is_shown_wherever_the_url_has_it() -> None:
    url = "postgresql://u:s3cret@h/db?password=s3cret&sslpassword=s3cret&application_name=x"
    store = SQLStore(url)
    assert "s3cret" not in repr(store)
    assert "application_name=x" in shown(store.url)
