"""The least that could be called an idempotency middleware, twice: what the product is held to.

No header filter, no limits, no problem bodies, no leases that are renewed, no errors handled.
Both use a pooled SQLAlchemy connection in autocommit; they differ in how they speak to it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from sqlalchemy import Engine, create_engine

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

_COLUMNS = """
    created_at, lease_until, expires_at, attempt, fingerprint_version, key_digest, claim_token,
    fingerprint, state, lapse, scope, idempotency_key, method, path"""

_ROW = """
    now(), now() + interval '60 s', now() + interval '1 day', 1, 1::smallint, {digest}, {token},
    {fingerprint}, 'claimed', 'release', 'everyone', {key}, 'POST', '/payments'"""

_RESPONSE = "fingerprint, response_status, response_headers, response_body"

_COMPLETE = """
UPDATE idempotency_keys SET state = 'completed', completed_at = now(),
    response_status = {status}, response_headers = {headers}, response_body = {body}
WHERE key_digest = {digest} AND claim_token = {token}"""


class _Reference(ABC):
    """Finds the key, claims or replays, runs, completes."""

    def __init__(self, app: WSGIApplication, url: str, *, workers_threads: int) -> None:
        self._app = app
        self._url = url
        self._threads = workers_threads
        self._made: Engine | None = None

    @property
    def _engine(self) -> Engine:
        if self._made is None:  # after the fork
            self._made = create_engine(
                self._url,
                isolation_level="AUTOCOMMIT",
                pool_size=self._threads,
                pool_reset_on_return=None,
                use_native_hstore=False,
            )
        return self._made

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        key = environ.get("HTTP_IDEMPOTENCY_KEY")
        if environ["REQUEST_METHOD"] != "POST" or key is None:
            return self._app(environ, start_response)
        digest = hashlib.sha256(key.encode()).digest()
        payload = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(payload)
        fingerprint = hashlib.sha256(payload).digest()
        token = os.urandom(16)
        done = self.claim(digest, token, fingerprint, key)
        if done is not None:
            stored, status, headers, body = done
            assert stored == fingerprint
            start_response(status, [tuple(pair) for pair in json.loads(headers)])
            return [body]
        said: list[Any] = []

        def begin(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            said[:] = [status, headers]

        iterable = self._app(environ, begin)
        body = b"".join(iterable)
        getattr(iterable, "close", lambda: None)()
        status, headers = said
        self.complete(digest, token, status, json.dumps(headers), body)
        start_response(status, headers)
        return [body]

    @abstractmethod
    def claim(self, digest: bytes, token: bytes, fingerprint: bytes, key: str) -> Any:
        """Claim the key; None when it is ours.

        :returns: otherwise the fingerprint, status line, headers as JSON and body that are stored.
        """

    @abstractmethod
    def complete(self, digest: bytes, token: bytes, status: str, headers: str, body: bytes) -> None:
        """Store the response of a claim.

        :param headers: as JSON.
        """


class ExecPreparedInsertFirst(_Reference):
    """libpq's ``PQexecPrepared`` underneath psycopg; claims, and selects only when it lost."""

    _STATEMENTS: ClassVar = {
        b"insert": f"INSERT INTO idempotency_keys ({_COLUMNS}) VALUES ({_ROW})"
        " ON CONFLICT (key_digest) DO NOTHING".format(
            digest="$1", token="$2", fingerprint="$3", key="$4"
        ),
        b"select": f"SELECT {_RESPONSE} FROM idempotency_keys WHERE key_digest = $1",
        b"complete": _COMPLETE.format(
            digest="$1", token="$2", status="$3", headers="$4", body="$5"
        ),
    }

    def _run(self, name: bytes, values: list[bytes]) -> Any:
        pooled = self._engine.raw_connection()
        try:
            connection: Any = pooled.driver_connection
            prepared = connection.__dict__.setdefault("_prepared_by_reference", set())
            if name not in prepared:
                connection.pgconn.prepare(name, self._STATEMENTS[name].encode())
                prepared.add(name)
            result = connection.pgconn.exec_prepared(name, values, [1] * len(values), 1)
            assert not result.error_message, result.error_message
            return result
        finally:
            pooled.close()

    def claim(self, digest: bytes, token: bytes, fingerprint: bytes, key: str) -> Any:
        if self._run(b"insert", [digest, token, fingerprint, key.encode()]).command_tuples:
            return None
        found = self._run(b"select", [digest])
        stored, status, headers, body = (found.get_value(0, column) for column in range(4))
        return stored, status.decode(), headers.decode(), body

    def complete(self, digest: bytes, token: bytes, status: str, headers: str, body: bytes) -> None:
        self._run(b"complete", [digest, token, status.encode(), headers.encode(), body])


class ExecuteBinaryOne(_Reference):
    """psycopg's ``execute(binary=True)``; one statement that looks before it inserts."""

    _ONE = f"""
    WITH seen AS (
        SELECT {_RESPONSE} FROM idempotency_keys WHERE key_digest = %(digest)s
    ), won AS (
        INSERT INTO idempotency_keys ({_COLUMNS}) SELECT {_ROW}
        WHERE NOT EXISTS (SELECT FROM seen) ON CONFLICT (key_digest) DO NOTHING RETURNING 1
    )
    SELECT (SELECT count(*) FROM won), seen.* FROM (SELECT 1) AS one LEFT JOIN seen ON true
    """.format(digest="%(digest)s", token="%(token)s", fingerprint="%(fingerprint)s", key="%(key)s")
    _COMPLETE = _COMPLETE.format(
        digest="%(digest)s", token="%(token)s", status="%(status)s", headers="%(headers)s",
        body="%(body)s",
    )  # fmt: skip

    def _run(self, statement: str, values: dict[str, Any]) -> Any:
        pooled = self._engine.raw_connection()
        try:
            connection: Any = pooled.driver_connection
            cursor = connection.cursor(binary=True)
            return cursor.execute(statement, values, prepare=True)
        finally:
            pooled.close()

    def claim(self, digest: bytes, token: bytes, fingerprint: bytes, key: str) -> Any:
        values = {"digest": digest, "token": token, "fingerprint": fingerprint, "key": key}
        won, *seen = self._run(self._ONE, values).fetchone()
        return None if won else seen

    def complete(self, digest: bytes, token: bytes, status: str, headers: str, body: bytes) -> None:
        values = {"digest": digest, "token": token, "status": status, "headers": headers}
        self._run(self._COMPLETE, {**values, "body": body})
