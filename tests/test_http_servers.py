"""What a client sees on the wire, on every server that people deploy."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from apps.gate import Gate
from apps.handler import handler
from apps.shop import Shop, at_gate, code, open_shop, replayed, until
from servers.http import IN_PROCESS, Connection, Response, chunked, request_bytes

from wsgi_idempotency import IdempotencyMiddleware, SQLStore, everyone
from wsgi_idempotency.schema import upgrade

GUNICORNS = {
    "gunicorn sync": {"workers": 2},
    "gunicorn gthread": {"worker_class": "gthread", "workers": 1, "threads": 8},
    "gunicorn gevent": {"worker_class": "gevent", "workers": 1},
}

KEEP_ALIVE = ("Connection", "keep-alive")

CHUNKED = ("Transfer-Encoding", "chunked")


@pytest.fixture(scope="module", params=[*GUNICORNS, *IN_PROCESS])
def shop(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shop]:
    """The ledger under one server after the other, for tests that use keys of their own."""
    folder = tmp_path_factory.mktemp("shop")
    url = f"sqlite:///{folder / 'keys.db'}"
    upgrade(url)  # there are tests that look before the first request has made the schema
    if request.param in GUNICORNS:
        with open_shop(url, folder, **GUNICORNS[request.param]) as shop:
            yield shop
        return
    book = folder / "ledger"
    store = SQLStore(url)
    app = IdempotencyMiddleware(handler, store, scope=everyone)
    with (
        pytest.MonkeyPatch.context() as patch,
        IN_PROCESS[request.param](app) as address,
    ):
        patch.setenv("LEDGER", str(book))
        yield Shop(address, book, url)
    store.close()


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    """A key of the test's own."""
    return request.node.name.replace(" ", "-")


def decodes_chunks(shop: Shop, key: str) -> bool:
    """Whether the server does, which wsgiref alone doesn't: what it can't end is refused."""
    with shop.connect() as connection:
        connection.send(head(key, CHUNKED) + chunked(b"pay"))
        response = connection.receive()
    assert response.status == 201 or code(response) == "LENGTH_REQUIRED"
    return response.status == 201


def head(key: str, *headers: tuple[str, str]) -> bytes:
    """The head of a request whose body is sent by hand."""
    return request_bytes("POST", "/pay", [("Idempotency-Key", key), *headers])


class Client:
    """A client that keeps its connection for as long as the server does."""

    def __init__(self, shop: Shop) -> None:
        self._shop = shop
        self._connection: Connection | None = None

    def post(self, key: str, *headers: tuple[str, str]) -> Response:
        if self._connection is None:
            self._connection = self._shop.connect()
        fields = [("Idempotency-Key", key), KEEP_ALIVE, *headers]
        response = self._connection.request("POST", "/pay", fields, b"pay")
        default = "keep-alive" if response.version == "HTTP/1.1" else "close"
        if (response.header("Connection") or default).lower() == "close":
            assert self._connection.at_end(), "more came than the response that was announced"
            self.close()
        return response

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@pytest.mark.parametrize(
    "status",
    [
        "204 No Content",
        "205 Reset Content",
        "303 See Other",
        "304 Not Modified",
        "201 Created",
    ],
)
def test_a_response_without_a_body_is_replayed_and_the_connection_stays_in_step(
    shop: Shop, key: str, status: str
) -> None:
    """What follows on the same connection is the next response, from its first byte on."""
    with closing(Client(shop)) as client:
        first = client.post(key, ("X-Status", status), ("X-Size", "0"))
        again = client.post(key)
        third = client.post(key)
        other = client.post(f"{key}-other")
    for response in (first, again, third):
        assert f"{response.status} {response.reason}" == status
        assert response.body == b""
    assert (replayed(first), replayed(again), replayed(third)) == (False, True, True)
    assert again.header("Location") == first.header("Location")
    assert again.header("ETag") == first.header("ETag")
    assert again.header("Content-Type") == first.header("Content-Type")
    assert again.header("Transfer-Encoding") is None
    if status[:3] in ("204", "304"):
        # wsgiref alone adds one.
        assert again.header("Content-Length") == first.header("Content-Length")
    else:
        assert again.header("Content-Length") == "0"
    assert (other.status, replayed(other)) == (201, False)
    assert len(shop.executions(key)) == len(shop.executions(f"{key}-other")) == 1


def test_a_body_of_10_mb_is_the_same_with_a_length_and_in_chunks(shop: Shop, key: str) -> None:
    """Also in chunks of other sizes; and one byte makes another request of it."""
    body = os.urandom(10_000_000)
    first = shop.post(key, body=body)
    assert first.status == 201
    chunks = decodes_chunks(shop, f"{key}-chunks")
    for size in (1 << 20, 65_537):
        pieces = [body[start : start + size] for start in range(0, len(body), size)]
        with shop.connect() as connection:
            connection.send(head(key, CHUNKED) + (chunked(*pieces) if chunks else b""))
            again = connection.receive()
        if chunks:
            assert (replayed(again), again.body) == (True, first.body)
        else:
            assert (again.status, code(again)) == (411, "LENGTH_REQUIRED")
    assert replayed(shop.post(key, body=body))
    assert code(shop.post(key, body=body[:-1] + bytes([body[-1] ^ 1]))) == "FINGERPRINT_MISMATCH"
    assert len(shop.executions(key)) == 1


def test_no_body_and_an_empty_one_are_the_same(shop: Shop, key: str) -> None:
    requests = [
        head(key),
        head(key, ("Content-Length", "0")),
    ]
    if decodes_chunks(shop, f"{key}-chunks"):
        requests.append(head(key, CHUNKED) + chunked())
    answers = []
    for request in requests:
        with shop.connect() as connection:
            connection.send(request)
            answers.append(connection.receive())
    assert [replayed(answer) for answer in answers] == [False] + [True] * (len(answers) - 1)
    assert {answer.status for answer in answers} == {201}
    assert len(shop.executions(key)) == 1


#: Uploads that are not whole.
PARTS = {
    "nothing of a body with a length": (("Content-Length", "100000"), b""),
    "half of a body with a length": (("Content-Length", "100000"), b"x" * 50_000),
    "all but a byte of a body with a length": (("Content-Length", "100000"), b"x" * 99_999),
    "nothing of a chunked body": (CHUNKED, b""),
    "the middle of a chunk's size": (CHUNKED, b"5\r\nhello\r\n1"),
    "the middle of a chunk": (CHUNKED, b"5\r\nhello\r\n5\r\nwor"),
    "the end of a chunk": (CHUNKED, b"5\r\nhello\r\n5\r\nworld\r\n"),
}


def hang_up(connection: Connection) -> None:
    """End our side, and wait until the server has ended its own: it is done with us then."""
    connection.socket.shutdown(socket.SHUT_WR)
    while connection.socket.recv(65536):
        pass
    connection.close()


@pytest.mark.parametrize("leave", [hang_up, Connection.abort], ids=["hangs up", "resets"])
@pytest.mark.parametrize("part", PARTS)
def test_nothing_runs_for_a_client_that_left_before_its_body_was_whole(
    shop: Shop, key: str, part: str, leave: Callable[[Connection], None]
) -> None:
    """Its operation is not even claimed: the same key with the whole body is the first."""
    length, sent = PARTS[part]
    if length == CHUNKED and not decodes_chunks(shop, f"{key}-chunks"):
        sent = b""  # what the server wouldn't read it would take for the next request
    connection = shop.connect()
    connection.send(head(key, length) + sent)
    leave(connection)
    assert shop.executions(key) == []
    assert key not in {row["idempotency_key"] for row in shop.rows()}
    whole = shop.post(key)
    assert (whole.status, replayed(whole)) == (201, False)
    assert shop.attempts(key) == [1]


def replay_of(shop: Shop, key: str) -> Response:
    """The replay, as soon as the operation is done."""

    def ask() -> Response | None:
        response = shop.post(key)
        assert response.status == 201 or code(response) == "CONFLICT"
        return response if response.status == 201 else None

    response = until(ask)
    assert replayed(response)
    return response


def test_what_a_client_did_not_wait_for_is_recorded(shop: Shop, key: str, gate: Gate) -> None:
    """It left while the handler ran; its retry gets the response."""
    connection = shop.connect()
    connection.send(head(key, at_gate(gate), ("Content-Length", "3")) + b"pay")
    running = gate.arrival()
    connection.abort()
    running.let_pass()
    response = replay_of(shop, key)
    [execution] = shop.executions(key)
    assert execution["execution"].encode() in response.body
    assert execution["attempt"] == 1


def test_what_a_client_did_not_read_to_its_end_is_recorded(shop: Shop, key: str) -> None:
    """It left after the first bytes of a response that no socket's buffer holds; its retry
    gets all of it."""
    size = 4_000_000
    connection = shop.connect()
    connection.send(head(key, ("X-Size", str(size)), ("Content-Length", "3")) + b"pay")
    assert connection.socket.recv(100)
    connection.abort()
    response = replay_of(shop, key)
    [execution] = shop.executions(key)
    assert len(response.body) == size
    assert execution["execution"].encode() in response.body
