"""examples/webhook_receiver.py: verified by the libraries of those who sign, then done once."""

from __future__ import annotations

import base64
import importlib
import json
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import stripe
from servers.http import Connection, Gunicorn, chunked, request_bytes
from standardwebhooks.webhooks import Webhook
from werkzeug.test import Client, TestResponse

EXAMPLES = Path(__file__).parent.parent / "examples"

SECRETS = {
    name: "whsec_" + base64.b64encode(name.encode() * 4).decode()
    for name in ("WEBHOOK_SECRET", "SVIX_SECRET", "STRIPE_SECRET")
}

Headers = dict[str, str]


@dataclass(frozen=True)
class Sender:
    """Somebody who delivers events, and signs them with the library they publish.

    :param path: where they are received.
    :param event: the body of a delivery, made of the event's id and an order.
    :param sign: the header fields for an id, a body and a time.
    """

    path: str
    event: Callable[[str, str], dict[str, Any]]
    sign: Callable[[str, bytes, float], Headers]


def standard(secret: str, prefix: str) -> Callable[[str, bytes, float], Headers]:
    def sign(event_id: str, body: bytes, at: float) -> Headers:
        moment = datetime.fromtimestamp(at, tz=timezone.utc)
        return {
            f"{prefix}-id": event_id,
            f"{prefix}-timestamp": str(int(at)),
            f"{prefix}-signature": Webhook(secret).sign(event_id, moment, body.decode()),
        }

    return sign


def by_stripe(event_id: str, body: bytes, at: float) -> Headers:
    value = stripe.WebhookSignature.generate_signature_header(
        body.decode(), SECRETS["STRIPE_SECRET"], int(at)
    )
    return {"Stripe-Signature": value}


def standard_event(event_id: str, order: str) -> dict[str, Any]:
    return {"type": "payment.succeeded", "data": {"order": order}}


def stripe_event(event_id: str, order: str) -> dict[str, Any]:
    return {
        "id": event_id,
        "object": "event",
        "type": "payment_intent.succeeded",
        "data": {"object": {"id": "pi_1", "metadata": {"order": order}}},
    }


SENDERS = {
    "Standard Webhooks": Sender(
        "/hooks/standard", standard_event, standard(SECRETS["WEBHOOK_SECRET"], "webhook")
    ),
    "Svix": Sender("/hooks/svix", standard_event, standard(SECRETS["SVIX_SECRET"], "svix")),
    "Stripe": Sender("/hooks/stripe", stripe_event, by_stripe),
}


@dataclass
class Receiver:
    """The example, in this process.

    :param file: the SQLite file of its orders and of the deliveries that are done.
    """

    client: Client
    file: Path
    numbers: Iterator[int] = field(default_factory=lambda: iter(range(1_000)))

    def order(self) -> str:
        name = f"order-{next(self.numbers)}"
        with closing(sqlite3.connect(self.file)) as shop, shop:
            shop.execute("INSERT INTO orders VALUES (?, 0)", (name,))
        return name

    def paid(self, order: str) -> int:
        """How often an order was paid."""
        with closing(sqlite3.connect(self.file)) as shop:
            (paid,) = shop.execute("SELECT paid FROM orders WHERE name = ?", (order,)).fetchone()
        return int(paid)

    def claims(self) -> int:
        """How many rows the middleware has."""
        with closing(sqlite3.connect(self.file)) as shop:
            tables = shop.execute("SELECT name FROM sqlite_master").fetchall()
            if ("idempotency_keys",) not in tables:
                return 0
            (rows,) = shop.execute("SELECT count(*) FROM idempotency_keys").fetchone()
        return int(rows)

    def deliver(
        self,
        sender: Sender,
        event_id: str,
        order: str,
        *,
        at: float | None = None,
        change: Callable[[bytes], bytes] = bytes,
        **more: object,
    ) -> TestResponse:
        """Sign an event and send it.

        :param at: when it is signed, if not now.
        :param change: what somebody makes of the body after it was signed.
        :param more: more members of the event.
        """
        body = json.dumps({**sender.event(event_id, order), **more}).encode()
        headers = sender.sign(event_id, body, time.time() if at is None else at)
        return self.client.post(
            sender.path, data=change(body), headers=headers, content_type="application/json"
        )


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    file = tmp_path_factory.mktemp("webhooks") / "shop.db"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**SECRETS, "SHOP_DATABASE": f"sqlite:///{file}"}.items():
            patch.setenv(name, value)
        patch.syspath_prepend(EXAMPLES)
        patch.delitem(sys.modules, "webhook_receiver", raising=False)
        module = importlib.import_module("webhook_receiver")
        yield Receiver(Client(module.application), file)
        module.application.app.store.close()
        module.engine.dispose()
        del sys.modules["webhook_receiver"]


def replayed(answer: TestResponse) -> bool:
    return answer.headers.get("Idempotency-Replayed") == "true"


@pytest.fixture(params=SENDERS)
def sender(request: pytest.FixtureRequest) -> Sender:
    return SENDERS[request.param]


def test_a_delivery_is_processed_once_however_often_it_comes(
    receiver: Receiver, sender: Sender
) -> None:
    """Each time with another timestamp, and so with another signature."""
    order, now = receiver.order(), time.time()
    answers = [
        receiver.deliver(sender, f"evt_{order}", order, at=now - age) for age in (240, 120, 0)
    ]
    assert [answer.status_code for answer in answers] == [204, 204, 204]
    assert [replayed(answer) for answer in answers] == [False, True, True]
    assert receiver.paid(order) == 1


def test_another_event_about_the_same_order_is_processed_too(
    receiver: Receiver, sender: Sender
) -> None:
    order = receiver.order()
    for number in (1, 2):
        assert receiver.deliver(sender, f"evt-{order}-{number}", order).status_code == 204
    assert receiver.paid(order) == 2


def test_the_id_alone_says_that_it_is_a_redelivery(receiver: Receiver, sender: Sender) -> None:
    """What is said beside the event may change, as Stripe's count of pending deliveries does."""
    order = receiver.order()
    answers = [
        receiver.deliver(sender, f"evt_{order}", order, pending_webhooks=pending)
        for pending in (2, 1)
    ]
    assert [answer.status_code for answer in answers] == [204, 204]
    assert receiver.paid(order) == 1


def test_one_id_of_two_senders_is_two_events(receiver: Receiver) -> None:
    order = receiver.order()
    for sender in SENDERS.values():
        assert receiver.deliver(sender, f"evt_{order}", order).status_code == 204
    assert receiver.paid(order) == 3


def test_a_failure_is_delivered_again_and_processed_then(
    receiver: Receiver, sender: Sender
) -> None:
    """The event comes before the order is there: a 5xx, and nothing is kept of it."""
    rows = receiver.claims()
    order = "early of " + sender.path
    assert receiver.deliver(sender, "evt_early", order).status_code == 503
    assert receiver.claims() == rows
    with closing(sqlite3.connect(receiver.file)) as shop, shop:
        shop.execute("INSERT INTO orders VALUES (?, 0)", (order,))
    answers = [receiver.deliver(sender, "evt_early", order) for _ in range(2)]
    assert [(answer.status_code, replayed(answer)) for answer in answers] == [
        (204, False),
        (204, True),
    ]
    assert receiver.paid(order) == 1


def add_a_space(body: bytes) -> bytes:
    return body + b" "


def other_bytes(body: bytes) -> bytes:
    return b"\xff" + body


@pytest.mark.parametrize("change", [add_a_space, other_bytes])
def test_what_was_changed_on_the_way_is_refused_and_nothing_claimed(
    receiver: Receiver, sender: Sender, change: Callable[[bytes], bytes]
) -> None:
    """And the genuine delivery afterwards is processed."""
    order, rows = receiver.order(), receiver.claims()
    answer = receiver.deliver(sender, f"evt_{order}", order, change=change)
    assert (answer.status_code, receiver.paid(order), receiver.claims()) == (400, 0, rows)
    assert receiver.deliver(sender, f"evt_{order}", order).status_code == 204
    assert receiver.paid(order) == 1


@pytest.mark.parametrize(
    "forge",
    [
        pytest.param(lambda name, value: None, id="that is not there"),
        pytest.param(lambda name, value: "", id="that is empty"),
        pytest.param(lambda name, value: "v1,t=1,v1=2", id="of nonsense"),
        pytest.param(lambda name, value: value[:-3] + "abc", id="of somebody else"),
        pytest.param(lambda name, value: value + "\u00e9", id="that is not ASCII"),
    ],
)
def test_a_delivery_is_refused_with_a_signature(
    receiver: Receiver, sender: Sender, forge: Callable[[str, str], str | None]
) -> None:
    order, rows = receiver.order(), receiver.claims()
    body = json.dumps(sender.event("evt_forged", order)).encode()
    headers = sender.sign("evt_forged", body, time.time())
    changed = {
        name: forge(name, value) if name.lower().endswith("signature") else value
        for name, value in headers.items()
    }
    kept = {name: value for name, value in changed.items() if value is not None}
    answer = receiver.client.post(sender.path, data=body, headers=kept)
    assert (answer.status_code, receiver.paid(order), receiver.claims()) == (400, 0, rows)


def test_a_delivery_that_was_recorded_long_ago_is_refused(
    receiver: Receiver, sender: Sender
) -> None:
    order = receiver.order()
    long_ago = time.time() - timedelta(hours=1).total_seconds()
    assert receiver.deliver(sender, f"evt_{order}", order, at=long_ago).status_code == 400
    assert receiver.paid(order) == 0


def test_a_delivery_for_one_sender_s_path_is_refused_on_another_s(receiver: Receiver) -> None:
    order = receiver.order()
    body = json.dumps(standard_event("m", order)).encode()
    headers = SENDERS["Svix"].sign("m", body, time.time())
    renamed = {name.replace("svix", "webhook"): value for name, value in headers.items()}
    assert receiver.client.post("/hooks/standard", data=body, headers=renamed).status_code == 400
    assert receiver.paid(order) == 0


@pytest.mark.parametrize("path", ["/hooks/stripe/", "//hooks/stripe", "/hooks", "/hooks/github"])
def test_no_other_way_leads_around_the_verification(receiver: Receiver, path: str) -> None:
    assert receiver.client.post(path, data=b"{}").status_code == 404


def test_a_path_that_is_no_webhook_s_is_left_alone(receiver: Receiver) -> None:
    answer = receiver.client.get("/")
    assert answer.status_code == 404
    assert b"was not found on the server" in answer.data


def test_an_event_of_another_type_is_answered_and_done(receiver: Receiver) -> None:
    order = receiver.order()
    sender = SENDERS["Stripe"]
    assert receiver.deliver(sender, "evt_other", order, type="charge.failed").status_code == 204
    assert receiver.paid(order) == 0


def test_an_event_without_an_id_is_refused(receiver: Receiver) -> None:
    """It is signed, but could never be told from its redelivery."""
    answer = receiver.deliver(SENDERS["Stripe"], "evt", receiver.order(), id=None)
    assert (answer.status_code, answer.json["code"]) == (400, "MISSING_KEY")


def test_a_delivery_too_large_is_refused_unread(receiver: Receiver) -> None:
    answer = receiver.deliver(SENDERS["Svix"], "evt", receiver.order(), padding="x" * 1024 * 1024)
    assert answer.status_code == 413


def test_deliveries_at_once_are_processed_once_whether_chunked_or_not(
    receiver: Receiver, tmp_path: Path
) -> None:
    """Under gunicorn, in two processes: the body is read from the socket once, verified, and
    read again by the middleware and by the view."""
    order, sender = receiver.order(), SENDERS["Stripe"]
    body = json.dumps(sender.event("evt_storm", order)).encode()

    def deliver(number: int) -> int:
        fields = [
            ("Content-Type", "application/json"),
            ("Connection", "close"),
            *sender.sign("evt_storm", body, time.time() - number).items(),
        ]
        with Connection(server.address) as connection:
            if number % 2:
                return connection.request("POST", sender.path, fields, body).status
            head = request_bytes("POST", sender.path, [*fields, ("Transfer-Encoding", "chunked")])
            connection.send(head + chunked(body[:9], body[9:]))
            return connection.receive().status

    with (
        Gunicorn(
            "webhook_receiver:application",
            tmp_path,
            environment={**SECRETS, "SHOP_DATABASE": f"sqlite:///{receiver.file}"},
            folders=[EXAMPLES],
        ) as server,
        ThreadPoolExecutor(8) as senders,
    ):
        statuses = set(senders.map(deliver, range(16)))
        assert statuses <= {204, 409}
        assert deliver(0) == deliver(1) == 204
    assert receiver.paid(order) == 1
