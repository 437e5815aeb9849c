"""Databases and stores for tests of operations of unknown outcome."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from wsgi_idempotency import SQLStore


@pytest.fixture
def pg_database(emptied_database: str) -> str:
    return emptied_database


@pytest.fixture
def store(database: str) -> Iterator[SQLStore]:
    store = SQLStore(database)
    store.check()
    yield store
    store.close()
