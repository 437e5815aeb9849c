"""Stripe's own SDK against the example shop, on a network that loses answers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import stripe
from servers.cutting_proxy import CuttingProxy
from servers.http import Gunicorn
from sqlalchemy import create_engine, text

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def shop(pg_database: str, tmp_path: Path) -> Iterator[Gunicorn]:
    """examples/flask_shop.py under gunicorn, set up as its own text says."""
    environment = {"SHOP_DATABASE": pg_database}
    subprocess.run(
        [sys.executable, "-m", "flask", "--app", "flask_shop", "create-ledger"],
        cwd=EXAMPLES,
        env={**os.environ, **environment},
        check=True,
    )
    with Gunicorn(
        "flask_shop:app", tmp_path, environment=environment, folders=[EXAMPLES]
    ) as server:
        yield server


@pytest.fixture
def http_client() -> Iterator[stripe.RequestsClient]:
    """The SDK's usual way to send, closed at the end."""
    client = stripe.RequestsClient()
    yield client
    client.close()


@pytest.mark.parametrize("cuts", [1, 2], ids=["one lost answer", "two lost answers"])
def test_the_sdk_retries_a_lost_answer_and_gets_the_original_charge(
    shop: Gunicorn, pg_database: str, http_client: stripe.RequestsClient, cuts: int
) -> None:
    """The shop commits and answers, the connection is reset before the answer arrives, the
    SDK sends the request again with the key it made: one charge, and the SDK gets it."""
    with CuttingProxy(shop.address, cuts=cuts) as network:
        client = stripe.StripeClient(
            "sk_test_alice",
            base_addresses={"api": network.url},
            max_network_retries=cuts,
            http_client=http_client,
        )
        charge = client.v1.charges.create({"amount": 4200, "currency": "eur"})
        http_client.close()  # or its kept connection would keep the proxy's

    *cut, last = network.conversations
    assert [conversation.cut for conversation in network.conversations] == [True] * cuts + [False]
    assert cut[0].answer.startswith(b"HTTP/1.1 201 ")
    [key] = {conversation.header("Idempotency-Key") for conversation in network.conversations}
    assert key
    assert b"Idempotency-Replayed: true" not in cut[0].answer
    assert b"Idempotency-Replayed: true" in last.answer
    assert ledger(pg_database) == [(1, 4200, "eur")]
    assert isinstance(charge, stripe.Charge)
    assert (charge.id, charge.amount, charge.currency) == ("ch_1", 4200, "eur")


def test_a_new_call_of_the_sdk_is_a_new_charge(
    shop: Gunicorn, pg_database: str, http_client: stripe.RequestsClient
) -> None:
    """The SDK makes a key for each call, so buying the same thing again charges again."""
    client = stripe.StripeClient(
        "sk_test_alice", base_addresses={"api": shop.url}, http_client=http_client
    )
    charges = [client.v1.charges.create({"amount": 100, "currency": "eur"}) for _ in range(2)]

    assert [charge.id for charge in charges] == ["ch_1", "ch_2"]
    assert len(ledger(pg_database)) == 2


def ledger(url: str) -> list[tuple[int, int, str]]:
    engine = create_engine(url)
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT id, amount, currency FROM ledger ORDER BY id"))
        found = [(row.id, row.amount, row.currency) for row in rows]
    engine.dispose()
    return found
