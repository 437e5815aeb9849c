"""Rows put into the table, and counted, without a store."""

from __future__ import annotations

import os
import time
from datetime import datetime, timedelta, timezone
from typing import Any

from sqlalchemy import func, select

from wsgi_idempotency.schema import connect
from wsgi_idempotency.stores.tables import idempotency_keys


def add_rows(
    url: str,
    count: int,
    *,
    state: str = "completed",
    lapse: str = "release",
    expired: float = 3600,
    **columns: Any,
) -> None:
    """Add rows as the middleware leaves them.

    :param expired: seconds since they expired; negative while they haven't.
    :param columns: what is otherwise in them.
    """
    with connect(url) as connection, connection.begin():
        postgresql = connection.dialect.name == "postgresql"
        now = datetime.now(timezone.utc) if postgresql else time.time()

        def ago(seconds: float) -> Any:
            return now - (timedelta(seconds=seconds) if postgresql else seconds)  # type: ignore[operator]

        connection.execute(
            idempotency_keys.insert(),
            [
                {
                    "created_at": ago(expired + 100),
                    "lease_until": ago(expired + 50),
                    "expires_at": ago(expired),
                    "completed_at": ago(expired + 60) if state == "completed" else None,
                    "attempt": 1,
                    "fingerprint_version": 1,
                    "key_digest": os.urandom(32),
                    "claim_token": os.urandom(16),
                    "fingerprint": b"",
                    "state": state,
                    "lapse": lapse,
                    "scope": "somebody",
                    "idempotency_key": "k",
                    "method": "POST",
                    "path": "/",
                    "response_status": "201 Created" if state == "completed" else None,
                    "response_headers": "[]" if state == "completed" else None,
                    "response_body": b"" if state == "completed" else None,
                    **columns,
                }
                for _ in range(count)
            ],
        )


def count_rows(url: str) -> int:
    with connect(url) as connection:
        count: int = connection.execute(
            select(func.count()).select_from(idempotency_keys)
        ).scalar_one()
        return count
