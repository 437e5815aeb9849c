"""What a release has recorded is replayed, refused or run again by the next, after its upgrade."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from werkzeug.test import Client, TestResponse

from wsgi_idempotency import IdempotencyMiddleware, current_operation, everyone
from wsgi_idempotency.schema import Upgrade, connect, upgrade
from wsgi_idempotency.stores.tables import SCHEMA_REVISION

#: The statement that a worker of the release with this schema left a row with. A revision that
#: changes what is in a row adds the one of the release before it.
_ROW = """
    INSERT INTO idempotency_keys (
        created_at, lease_until, expires_at, completed_at, attempt, fingerprint_version,
        key_digest, claim_token, fingerprint, state, lapse, scope, idempotency_key, method,
        path, response_status, response_headers, not_replayable, response_body)
    VALUES (
        {now}, {lease_until}, {tomorrow}, {completed_at}, 1, 1, {digest}, {token}, {fingerprint},
        '{state}', '{lapse}', 'everyone', '{key}', 'POST', '/pay', {status}, {headers}, {reason},
        {body})"""
ROWS = {"0001": _ROW, "0002": _ROW}

#: What a worker of that release sends when its handler has ended. Hosts are upgraded one by one.
COMPLETE = """
    UPDATE idempotency_keys
    SET state = 'completed', completed_at = {now}, response_status = {status},
        response_headers = {headers}, response_body = {body}, not_replayable = {reason}
    WHERE key_digest = {digest} AND claim_token = {token} AND state = 'claimed'"""

#: As release 0.1.0 made them of POST /pay, the body "pay", scope everyone and each of the keys.
FINGERPRINT = "ca6ecb1165514178102862aac27222788443d9b7d59a150ba052f91e2d3f29ea"
DIGESTS = {
    "completed": "340e62b145dbb55ee3ed5e0fa1bccaffd0f922f8324ccb6a9cdd97ecc01c0973",
    "in-flight": "c7dced6098ecfa44c9b11b84c94629530475e6ee597347af525781d54b453c3d",
    "lapsed": "3ab70caa8de357c97cf5da57335e8aa18c2d1af2d82bca55dd64c876426dc08f",
    "lapsed-and-held": "5fa119612262d3f91b2621a673d94ef4e31a6d10c0e06c46b11fd63bbe6dd6e5",
    "released": "b156965e8bcaf22a9457fe98e345f580d4e34a0eb48d77007ef40eef75c1cd2b",
    "held": "b7f59ae37a46049d94cb64b3fd5316990d46cb57352966c57c90d184ee85861d",
    "not-replayable": "63196df7d2f0af27eb097449251539337741a27ae0ed10c37a53716c9f876816",
}
TOKEN = "5e" * 16


def statement(template: str, key: str, *, postgresql: bool) -> str:
    """A statement of an earlier release, with the values in it that it had as parameters."""
    now = "now()" if postgresql else "((julianday('now') - 2440587.5) * 86400.0)"
    hour = "interval '1 hour'" if postgresql else "3600"
    lapsed = key.startswith("lapsed")
    done = key in ("completed", "not-replayable") or template is COMPLETE
    kept = done and key != "not-replayable"

    def octets(digits: str) -> str:
        return f"decode('{digits}', 'hex')" if postgresql else f"x'{digits}'"

    return template.format(
        now=now,
        lease_until=f"{now} - {hour}" if lapsed else f"{now} + {hour}",
        tomorrow=f"{now} + 24 * {hour}",
        completed_at=now if done else "NULL",
        digest=octets(DIGESTS[key]),
        token=octets(TOKEN),
        fingerprint=octets(FINGERPRINT),
        state={"released": "released", "held": "held"}.get(key, "completed" if done else "claimed"),
        lapse="hold" if key == "lapsed-and-held" else "release",
        key=key,
        status="'201 Made It'" if done else "NULL",
        headers='\'[["Location","/1"],["Link","<1>"],["Link","<2>"]]\'' if done else "NULL",
        reason="NULL" if not done or kept else "'too large'",
        body=octets(b'{"id": 1}'.hex()) if kept else "NULL",
    )


@dataclass
class Upgraded:
    """A shop on the tables of this release, with rows of an earlier one."""

    url: str
    client: Client
    attempts: dict[str, int]

    def post(self, key: str, body: bytes = b"pay") -> TestResponse:
        return self.client.post("/pay", data=body, headers={"Idempotency-Key": key})

    def complete_as_before(self, key: str) -> int:
        """How many rows the worker of the earlier release changes."""
        with connect(self.url) as connection, connection.begin():
            postgresql = connection.dialect.name == "postgresql"
            sql = statement(COMPLETE, key, postgresql=postgresql)
            return connection.exec_driver_sql(sql).rowcount


@pytest.fixture(params=["pg_url", "sqlite_url"], ids=["on PostgreSQL", "on SQLite"])
def url(request: pytest.FixtureRequest) -> str:
    found: str = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=ROWS, ids=lambda revision: f"from {revision}")
def shop(request: pytest.FixtureRequest, url: str) -> Iterator[Upgraded]:
    revision: str = request.param
    upgrade(url, revision)
    with connect(url) as connection, connection.begin():
        postgresql = connection.dialect.name == "postgresql"
        for key in DIGESTS:
            connection.exec_driver_sql(statement(ROWS[revision], key, postgresql=postgresql))
    assert upgrade(url) == Upgrade(revision, SCHEMA_REVISION)
    attempts = {}

    def handler(environ, start_response):
        attempts[current_operation.key] = current_operation.attempt
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"run"]

    app = IdempotencyMiddleware(handler, url, scope=everyone)
    with closing(app.store):
        yield Upgraded(url, Client(app), attempts)


def test_there_are_rows_of_every_earlier_schema() -> None:
    """A new revision brings the statement that the release before it left rows with."""
    config = Config()
    config.set_main_option("script_location", "wsgi_idempotency.migrations:")
    revisions = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    assert set(ROWS) >= revisions - {SCHEMA_REVISION}


def test_rows_of_the_release_before_mean_what_they_meant(shop: Upgraded) -> None:
    """Key, payload, state, lapse and response are read as they were written."""
    replay = shop.post("completed")
    assert (replay.status, replay.data) == ("201 Made It", b'{"id": 1}')
    assert replay.headers["Idempotency-Replayed"] == "true"
    assert replay.headers["Location"] == "/1"
    assert replay.headers.getlist("Link") == ["<1>", "<2>"]

    other = {key: shop.post(key, b"pay more").json for key in DIGESTS}
    assert {key: answer["code"] for key, answer in other.items()} == dict.fromkeys(
        DIGESTS, "FINGERPRINT_MISMATCH"
    )
    refused = {
        key: shop.post(key).json["code"]
        for key in ("in-flight", "lapsed-and-held", "held", "not-replayable")
    }
    assert refused == {
        "in-flight": "CONFLICT",
        "lapsed-and-held": "OUTCOME_UNKNOWN",
        "held": "OUTCOME_UNKNOWN",
        "not-replayable": "RESPONSE_NOT_REPLAYABLE",
    }
    assert shop.attempts == {}

    assert {key: shop.post(key).data for key in ("lapsed", "released")} == {
        "lapsed": b"run",
        "released": b"run",
    }
    assert shop.attempts == {"lapsed": 2, "released": 2}


def test_a_worker_of_the_release_before_records_on_the_new_tables(shop: Upgraded) -> None:
    """And who has been overtaken by a worker of this release records nothing."""
    shop.post("lapsed")
    assert shop.complete_as_before("lapsed") == 0
    assert shop.complete_as_before("in-flight") == 1
    assert shop.post("in-flight").status == "201 Made It"
    assert shop.post("lapsed").data == b"run"
    assert shop.attempts == {"lapsed": 2}
