"""Every store of ours keeps every promise of the contract."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import sqlalchemy
from sqlalchemy import select

from wsgi_idempotency.errors import StoreUnavailable
from wsgi_idempotency.records import Claim, Claimed, Completion, Lapse, Record
from wsgi_idempotency.stores.base import Store
from wsgi_idempotency.stores.memory import MemoryStore
from wsgi_idempotency.stores.sql import SQLStore
from wsgi_idempotency.stores.tables import idempotency_keys
from wsgi_idempotency.testing import (
    EXPIRED,
    RERUNNABLE,
    SETTLEMENTS,
    Situation,
    StoreConformance,
    TransactionalConformance,
    each,
    lookup,
    make_claim,
)


class TestMemoryStore(StoreConformance):
    def make_store(self) -> Store:
        return MemoryStore()


class WithoutSteps:
    """A store of a third party's, with what is required and no more, on a server that may be
    away."""

    def __init__(self, away: bool = False) -> None:
        self._rows, self._away = MemoryStore(), away

    def _reached(self) -> MemoryStore:
        if self._away:
            raise StoreUnavailable("the server is away")
        return self._rows

    def claim(self, claim: Claim) -> Claimed | Record:
        return self._reached().claim(claim)

    def take_over(self, claim: Claim, seen: Record) -> Claimed | None:
        return self._reached().take_over(claim, seen)

    def lookup(self, digest: bytes) -> Record | None:
        return self._reached().lookup(digest)

    def complete(self, digest: bytes, token: bytes, completion: Completion) -> bool:
        return self._reached().complete(digest, token, completion)

    def release(self, digest: bytes, token: bytes) -> bool:
        return self._reached().release(digest, token)

    def forget(self, digest: bytes, token: bytes) -> bool:
        return self._reached().forget(digest, token)

    def hold(self, digest: bytes, token: bytes) -> bool:
        return self._reached().hold(digest, token)

    def renew(self, claims: Iterable[tuple[bytes, bytes, float]]) -> set[bytes]:
        return self._reached().renew(claims)

    def purge(self, limit: int) -> int:
        return self._reached().purge(limit)

    def check(self) -> None:
        self._reached().check()

    def close(self) -> None:
        self._rows.close()


class TestWithoutSteps(StoreConformance):
    """Steps are an ability that a store may do without."""

    def make_store(self) -> Store:
        return WithoutSteps()

    def unreachable_store(self) -> Store:
        return WithoutSteps(away=True)


class SQLConformance(StoreConformance):
    """What the contract says of a row, where it can be read as it is stored."""

    process_store = "wsgi_idempotency.stores.sql:SQLStore"

    def row(self, claim: Claim) -> sqlalchemy.Row[tuple[object, ...]]:
        store = SQLStore(self.process_argument)
        statement = select(idempotency_keys).where(idempotency_keys.c.key_digest == claim.digest)
        with store.engine.connect() as connection:
            row = connection.execute(statement).one()
        store.close()
        return row

    def test_a_row_says_to_people_whose_it_is(self, store: Store) -> None:
        """Scope, key, method and path are there to be read, NULs made visible."""
        store.claim(make_claim(scope="Zürich", key="k\x00", method="PATCH", path="/a\udcffb"))
        row = self.row(make_claim())
        assert (row.scope, row.idempotency_key, row.method) == ("Zürich", "k\\x00", "PATCH")
        assert row.path == "/a\\udcffb"
        assert (row.response_status, row.response_body, row.completed_at) == (None, None, None)

    @each(RERUNNABLE | EXPIRED)
    def test_a_take_over_leaves_nothing_of_the_row_before(
        self, store: Store, situation: Situation
    ) -> None:
        """A row past its retention may have been another payload's, and had a response."""
        owner = situation.arrange(store)
        heir = make_claim(scope="bob", key="his key", method="PATCH", path="/b", lapse=Lapse.HOLD)
        assert store.take_over(heir, lookup(store, owner)) is not None
        row = self.row(heir)
        assert (row.scope, row.idempotency_key) == ("bob", "his key")
        assert (row.method, row.path, row.lapse) == ("PATCH", "/b", "hold")
        assert (row.completed_at, row.response_status, row.response_headers) == (None, None, None)
        assert (row.response_body, row.not_replayable) == (None, None)

    @pytest.mark.parametrize("way", ["complete", "release", "hold", "renew"])
    def test_the_expiry_is_set_once_at_the_claim(self, store: Store, way: str) -> None:
        """No settlement or renewal moves ``expires_at``."""
        claim = make_claim()
        store.claim(claim)
        before = self.row(claim)
        if way == "renew":
            store.renew([(claim.digest, claim.token, 5000.0)])
        else:
            SETTLEMENTS[way](store, claim.digest, claim.token)
        after = self.row(claim)
        assert after != before
        assert (after.expires_at, after.created_at) == (before.expires_at, before.created_at)


class TestSQLite(TransactionalConformance, SQLConformance):
    @pytest.fixture(autouse=True)
    def storage(self, sqlite_url: str) -> None:
        self.process_argument = sqlite_url

    def unreachable_store(self) -> Store:
        return SQLStore("sqlite:////no/such/directory/keys.db", timeout=0.5)


class TestPostgreSQL(TransactionalConformance, SQLConformance):
    @pytest.fixture(autouse=True)
    def storage(self, emptied_database: str) -> None:
        self.process_argument = emptied_database

    def unreachable_store(self) -> Store:
        return SQLStore("postgresql+psycopg://nobody@127.0.0.1:1/nowhere", timeout=0.5)
