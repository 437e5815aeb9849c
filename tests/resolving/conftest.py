"""Databases and stores for tests of operations of unknown outcome."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from apps.shop import query
from servers.postgres import Postgres

from wsgi_idempotency import SQLStore
from wsgi_idempotency.stores.tables import metadata


@pytest.fixture(scope="module")
def server_database(postgres: Postgres, schema_template: str) -> Iterator[str]:
    """One for all tests of a file, since to make and drop one takes longer than a test."""
    url = postgres.create_database(schema_template)
    yield url
    postgres.drop_database(url)


@pytest.fixture
def pg_database(on_postgresql: None, server_database: str) -> str:
    query(server_database, f"TRUNCATE {', '.join(metadata.tables)}")
    return server_database


@pytest.fixture
def store(database: str) -> Iterator[SQLStore]:
    store = SQLStore(database)
    store.check()
    yield store
    store.close()
