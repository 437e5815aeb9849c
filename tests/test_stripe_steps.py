"""examples/stripe_steps.py: killed at every moment of its three steps, it does each once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from apps.gateway import Gateway
from apps.shop import query
from servers.http import TESTS, Connection, Gunicorn, Response

EXAMPLES = Path(__file__).parent.parent / "examples"

STEPS = ["reserve", "charge", "receipt"]


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with Gateway().serving() as gateway:
        yield gateway


@pytest.fixture(scope="module")
def shop(
    module_database: str, gateway: Gateway, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gunicorn]:
    """Under gunicorn, set up as the example's own text says."""
    environment = {
        "SHOP_DATABASE": module_database,
        "STRIPE_KEY": "sk_test_shop",
        "STRIPE_API": gateway.url,
        "MAIL_API": f"{gateway.url}/receipts",
    }
    subprocess.run(
        [sys.executable, "-m", "flask", "--app", "stripe_steps", "create-reservations"],
        cwd=EXAMPLES,
        env={**os.environ, **environment},
        check=True,
    )
    with Gunicorn(
        "apps.dying_steps:app",
        tmp_path_factory.mktemp("shop"),
        workers=2,
        environment=environment,
        folders=[EXAMPLES, TESTS],
    ) as server:
        yield server


def order(shop: Gunicorn, key: str, *headers: tuple[str, str]) -> Response:
    fields = [
        ("Idempotency-Key", key),
        ("Authorization", "Bearer alice"),
        ("Content-Type", "application/x-www-form-urlencoded"),
        ("Connection", "close"),
        *headers,
    ]
    body = b"item=book&amount=900&email=alice%40example.com"
    with Connection(shop.address) as connection:
        return connection.request("POST", "/orders", fields, body)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("moment", ["in", "after"])
def test_killed_in_or_after_each_step_and_resumed_it_does_each_once(
    shop: Gunicorn, module_database: str, gateway: Gateway, moment: str, step: str
) -> None:
    """Killed after it, no step that is done is called again; killed in it, one is, with the
    same key."""
    key = f"{moment}-{step}"
    reservations = len(query(module_database, "SELECT * FROM reservations"))
    charges, receipts = len(gateway.charges), len(gateway.receipts)
    gateway.calls.clear()
    with pytest.raises(ConnectionError):
        order(shop, key, ("X-Die", f"{moment} {step}"))
    # Its worker is dead, which only the lease would tell.
    query(
        module_database, "UPDATE idempotency_keys SET lease_until = now() WHERE state = 'claimed'"
    )
    resumed = order(shop, key)
    assert resumed.status == 201
    assert order(shop, key).body == resumed.body
    assert len(query(module_database, "SELECT * FROM reservations")) == reservations + 1
    assert (len(gateway.charges), len(gateway.receipts)) == (charges + 1, receipts + 1)
    called_again = moment == "in" and step != "reserve"
    assert len(gateway.calls) == (3 if called_again else 2)
