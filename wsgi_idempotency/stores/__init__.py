"""Where the records live."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from wsgi_idempotency.errors import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from wsgi_idempotency.stores.base import Store


def open_store(store: str | Engine | Store) -> Store:
    """The store that an option names. SQLAlchemy is imported only when it is needed.

    :param store: ``"memory:"``, a database URL, an Engine, or a store as it is.
    :raises ConfigurationError: it is none of them.
    """
    if store == "memory:":
        from wsgi_idempotency.stores.memory import MemoryStore

        return MemoryStore()
    if callable(getattr(store, "claim", None)):
        return cast("Store", store)
    from sqlalchemy import Engine
    from sqlalchemy.engine import URL

    from wsgi_idempotency.stores.sql import SQLStore

    if isinstance(store, (str, URL, Engine)):
        return SQLStore(store)
    raise ConfigurationError(
        f"store is a {type(store).__name__}; use a database URL, a SQLAlchemy Engine (not an"
        ' AsyncEngine), "memory:" or a Store'
    )
